"""RMTKDMixin: what makes a trainer of transformers, or of a library built on it, narrow its model while it trains it.

With `hooks/`, the only place that knows the hooks of `transformers.Trainer`: the trainer as a `Host` (`hosting`), its
moments (`callbacks`), its loss, schedule, checkpoints and card.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..batches import evaluating
from ..config import RMTKDConfig
from ..distillation import BatchTransform, CachedTeacher, DistillationObjective, Teacher
from ..distillation.cached import CLASSES, AnswerCollator
from ..reparameterization import Reparameterization
from ..signals import Terminated, Termination
from .checks import (
    check_data,
    check_given,
    check_length,
    check_model,
    check_own_loss,
    check_parts,
    check_rows,
    check_steps,
    check_wrapped,
    cuts_stream,
)
from .companions import Companions
from .failures import NoticeBoard
from .hooks.callbacks import Patience, StageCallback, VerdictCallback
from .hooks.checkpoints import CheckpointHooks
from .hooks.hosting import TrainerHost, judged_by
from .hooks.losses import LossHooks
from .hooks.modes import check_modes
from .hooks.names import shown, with_wrapper_in_use
from .hooks.results import ResultHooks
from .hooks.schedules import ScheduleHooks
from .hooks.sharding import host_of
from .inside import inside_of
from .parts import parts_of
from .run import Run
from .sharding_checks import check_sharding, check_sharding_arguments, one_device
from .stages import Stage, stage_table
from .stream import Stream, evaluated_again
from .swap import made_whole
from .teaching import accept_teacher, check_cached
from .verdicts import greater_is_better


__all__ = ["RMTKDMixin"]

logger = logging.getLogger(__name__)

TAUGHT = ("training", "calibration")  # what transformers and we call the data that a teacher sees as well


class RMTKDMixin(LossHooks, CheckpointHooks, ScheduleHooks, ResultHooks):
    """Put in front of a `transformers.Trainer`, or of any subclass of it: `class MyTrainer(RMTKDMixin, SFTTrainer)`.

    It trains as that trainer does, and narrows the model on the way as the recipe says.

    Args:
        model: a `PreTrainedModel` of a supported family. It keeps its identity; class and widths change at each cut.
            Under FSDP2 `trainer.model` is another object after a cut, whose inside the one passed in shares.
        args: `RMTKDTrainingArguments`, or any `TrainingArguments`.
        rmtkd_config: the recipe. None: `RMTKDConfig()`, which asks for a target where the spectra do not say how far
            to cut.
        teacher_model: None for self-distillation (`rmtkd_config.teacher`); a model of the same vocabulary and labels;
            a list of models, or of (model, weight); or a `Teacher` (OnlineTeacher, CachedTeacher). `HiddenStateLoss`
            is used only if it is the very model that is cut: no projection is known for another one.
        objectives: None for the recipe's three terms; or a list of objectives (or of their dicts), or {name:
            arguments}.
        reparameterization: None, an instance, a name ("mpo", "powerpropagation") or a dict: trained in place of the
            weights, put on again after each cut, folded back in everything that is saved and when training ends.
        transforms: batch transforms (EmbeddingMixup, OnPolicy, ...), one or several, or their names or dicts.
        *positional, **kwargs: as the trainer behind it takes them, in its order.

    Each training log line carries `loss/<objective>`, unweighted, averaged since the last one. `train()` adds
    `parameters_before`, `parameters_after` and `reduction` to its metrics; `stages` and `rmtkd_stages.json` tell what
    happened at each cut. Every term is a mean over the whole accumulated batch of all processes, however it is split
    and padded.

    A `compute_loss` of a class in front of this one or behind it, and a `compute_loss_func`, give the task's term
    (`loss/task`) and the loss of evaluations; the other terms stay. They see one micro-batch and return its mean:
    `num_items_in_batch` is the number of labels in it, and accumulation is weighed here. `replaces_loss = True` in the
    class says that its `compute_loss` is the whole training loss; `super().compute_loss` of one in front then gives it
    the weighted sum of all terms.

    A model that cannot teach yet (a new head) is fine-tuned first, see `RMTKDConfig.fit_share`. What a subclass
    overrides keeps its meaning: the stages are judged by what its `evaluate` returns, cuts are calibrated on what its
    `get_train_dataloader` gives.

    `EarlyStoppingCallback` and the like wait for the last cut: see `callbacks.Patience`.

    Raises:
        RMTKDError: a setting that cannot work with cuts; an unfit teacher; a recipe that needs an eval_dataset without
            one.
        UnsupportedArchitectureError: no known family.
    """

    _host: TrainerHost | None = None  # until the trainer behind is made

    def __init__(
        self,
        *positional,
        rmtkd_config: RMTKDConfig | None = None,
        teacher_model: nn.Module | Teacher | Sequence | None = None,
        objectives: Iterable[DistillationObjective] | Mapping[str, Any] | None = None,
        reparameterization: Reparameterization | Mapping[str, Any] | str | None = None,
        transforms: BatchTransform | Sequence | Mapping[str, Any] | str | None = None,
        **kwargs,
    ):
        self.rmtkd_config = RMTKDConfig.taken(rmtkd_config, "rmtkd_config")
        self._parts = parts = parts_of(self.rmtkd_config, objectives, reparameterization, transforms)
        given = _by_name(super().__init__, positional) | kwargs
        if getattr(super().__init__, "__module__", "").startswith("transformers."):  # TRL's take names as well
            check_given(given.get("model"))
        if (args := given.get("args")) is not None:
            check_sharding_arguments(args)
            check_length(args, given.get("train_dataset"))
        super().__init__(*positional, **kwargs)
        check_length(self.args, self.train_dataset)
        self._settle_direction()
        self._model_takes_items, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, False
        self._check_setting()
        self.optimizer_was_given = self.optimizer is not None
        if self.optimizer_was_given and (how := parts.reparameterization) is not None:
            logger.warning(
                "An optimizer was given: the tensors of %s join the groups of the weights they stand for. "
                "lr_scale=%.3g and the freedom from weight decay are not applied; set the rate accordingly.",
                how.name,
                how.lr_scale,
            )
        adam = {"betas": (self.args.adam_beta1, self.args.adam_beta2), "eps": self.args.adam_epsilon}
        self._host = host = host_of(self)
        companions = Companions(host, **adam, max_grad_norm=self.args.max_grad_norm)
        host.run = run = Run(host, self.rmtkd_config, parts, companions, reentrant=self._reentrant)
        run.evaluates = str(getattr(self.args.eval_strategy, "value", self.args.eval_strategy)) != "no"
        if teacher_model is not None:
            self._accept(teacher_model)
        check_parts(run, host.model)
        if host.inside.wraps:
            check_wrapped(run, type(self.model).__name__)
        if self._own_loss and self.compute_loss_func is None:
            check_own_loss(self._their_loss(), type(self).__name__, run)
        self._adapt_losses()
        host.patience = Patience(run, self.callback_handler)
        self._termination = Termination(self._what_is_kept, speaks=self.is_local_process_zero())
        self.callback_handler.callbacks.insert(0, VerdictCallback(self._termination, self._settle))
        self.add_callback(StageCallback(run, host.patience, self._termination, self._end_step))

    def _check_setting(self) -> None:
        parts = self._parts
        check_sharding(self.accelerator, self.args, self.model, parts.reparameterization, parts.transforms)
        made_whole(self.model)
        if self.args.n_gpu > 1 or self.is_model_parallel:
            raise one_device(self.args.n_gpu)
        if self.rmtkd_config.schedule != "none" or parts.reparameterization is not None:
            check_modes(self.args)
        host = TrainerHost(self)
        check_model(host.model, self.rmtkd_config, evaluated=host.evaluates)

    def _settle_direction(self) -> None:
        """TrainingArguments takes greater for better in every metric whose name does not end in "loss". Best model and
        early stopping go by that as well."""
        name = judged_by(self.args)
        if not self.args.greater_is_better or name.endswith("loss") or greater_is_better(name):
            return
        self.args.greater_is_better = False
        logger.warning(
            "greater_is_better=True for metric_for_best_model=%r, as transformers has it for every name that does not "
            "end in 'loss': taken as False, by its name it is to be small. One that is to be large has another name "
            "(neg_%s).",
            self.args.metric_for_best_model,
            name.removeprefix("eval_"),
        )

    @property
    def _reentrant(self) -> bool:
        args = self.args
        return args.gradient_checkpointing and bool((args.gradient_checkpointing_kwargs or {}).get("use_reentrant"))

    def _accept(self, teacher: Any) -> None:
        """A teacher that was passed in."""
        run, host = self._host.run, self._host
        if isinstance(teacher, nn.Module):
            teacher = inside_of(teacher, self).model
        if not accept_teacher(run.tutor, teacher, host.model, self.args.device):
            self.rmtkd_config = self.rmtkd_config.replace(teacher="initial")
            run.follow(self.rmtkd_config)
            return
        host.teacher = given = run.tutor.given
        columns = getattr(self.train_dataset, "column_names", None) or ()
        if isinstance(given, CachedTeacher):
            if CLASSES in columns:
                rows = self.train_dataset if host.stream is None else host.stream.samples(1)
                check_cached(given, host.model, lambda: rows[0])
            self.data_collator = AnswerCollator(self.data_collator)

    # -- what the user reads ------------------------------------------------------------------------------------------

    # Read by nothing here, see `shown`.

    run: Run = shown(lambda self: self._host.run)
    """The run: what is planned, done and known of it."""

    stages: list[Stage] = shown(lambda self: list(self._host.run.stages))
    """Records of the cuts so far, in order."""

    cuts_to_come: bool = shown(lambda self: self._host.run.cuts_to_come)
    """Whether a cut is still to be made: until then the model is larger than it will be, and none to keep as the best
    one, or to stop early with."""

    objectives: list[DistillationObjective] = shown(lambda self: self._host.run.tutor.objectives)
    """The terms of the loss."""

    reports: list[Any] = shown(lambda self: self._host.run.reports)
    """The spectra that each cut was made from."""

    reparameterization: Reparameterization | None = shown(lambda self: self._parts.reparameterization)
    """Trained in place of the weights."""

    transforms: list[BatchTransform] = shown(lambda self: self._parts.transforms)
    """What the batches go through."""

    stream: Stream | None = shown(lambda self: self._host.stream)
    """The first rows of a train_dataset that is iterated; None where it is indexed."""

    metric_name: str = shown(lambda self: self._host.metric_name)
    """Key of the validation metric that judges the stages: `metric_for_best_model`, else the loss."""

    greater_is_better: bool = shown(lambda self: self._host.greater_is_better)
    """Direction of that metric."""

    def calibration_batches(self, strip: bool = True, samples: int | None = None) -> Iterable[dict[str, Any]]:
        """This process's share of the calibration data, the same in every pass.

        Args:
            strip: without what is there for the teacher, or a loss of the user's own, alone.
            samples: how many; None: `calibration_samples`.
        """
        return self._host.calibration_batches(samples, strip)

    def train(self, resume_from_checkpoint=None, *positional, **kwargs):
        """As the trainer's own; the metrics also hold `parameters_before`, `parameters_after` and `reduction`.

        SIGTERM saves a checkpoint at the end of the step at hand and ends the process (143); where no step ends soon,
        it ends at once. A handler of your own stays in its place.

        Args:
            resume_from_checkpoint: True: the newest whole one in `output_dir`; a line says which newer ones were
                passed over.

        Raises:
            IncompleteCheckpointError: the checkpoint is not whole; names what is missing, and an intact one beside it.
            DiskFullError: no room for a checkpoint; the earlier ones are intact.
            RMTKDError: no train_dataset, an empty one, or batches without labels or cached answers that are needed; a
                checkpoint of a run that started from another model or with other parts.
            BudgetError: the model is already as small as the target.
        """
        self._board = NoticeBoard(self.accelerator)
        try:
            with self._board.watching():
                return self._train_watched(resume_from_checkpoint, *positional, **kwargs)
        finally:
            self._board = None

    def _train_watched(self, resume_from_checkpoint, *positional, **kwargs):
        run, host = self._host.run, self._host
        check_data(self.train_dataset, host.own_loader)
        if self.rmtkd_config.schedule != "none":
            check_steps(self.args)
        self._tidy()
        resume_from_checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        host.keep_stream()
        self.eval_dataset = evaluated_again(self.eval_dataset, self.rmtkd_config.seed)
        if self.model_init is None:
            self.check_first_batch()
        else:  # a new trial: the model of the last one is thrown away, and the new one is looked at once it is there
            run.reset()
        host.take_back()
        given, self.train_dataset = self.train_dataset, self._training_data()
        run.train_on()
        self._saved_at = None
        run.loss.forget()
        run.tutor.companions.base_rate = None
        host.patience.remember()
        told = _by_name(super().train, [resume_from_checkpoint, *positional]) | kwargs
        host.ignored = told.get("ignore_keys_for_eval")
        try:
            with self._termination.listening(), with_wrapper_in_use(self):
                output = super().train(resume_from_checkpoint, *positional, **kwargs)
        finally:
            host.ignored = None
            run.dropout.restore()
            self.train_dataset = given
            run.tutor.let_go()
            host.forget_data()
        before, after = run.reference_parameters, run.parameters
        output.metrics.update(parameters_before=before, parameters_after=after, reduction=1 - after / before)
        if self.args.should_save:
            self._write_results(before, after)
        if self.is_world_process_zero() and run.stages:
            print(stage_table(run.stages, run.fit.to_dict()))
        return output

    def _settle(self) -> None:
        """The last step is made: the last stage is judged, and the model has plain weights."""
        self._host.run.end()
        self._fold()

    def check_first_batch(self) -> None:
        """Look at the first rows of the data, as `train()` does before anything else: what is wrong with data, recipe
        or model is said now. For a script that wants to know before it queues for a machine.

        Raises:
            RMTKDError: as `trainer.checks.check_rows`.
        """
        own, run = self._own_loss, self._host.run
        needed, samples = not own and not self.can_return_loss, self.args.per_device_eval_batch_size
        check_rows(run, samples, labels_needed=needed, classes_known=not own)
        inside = self._host.inside
        if inside.wraps and cuts_stream(inside.model, self.rmtkd_config):
            batch = self._host.a_batch()
            with evaluating(self.model):
                inside.check_width(lambda: super(RMTKDMixin, self).compute_loss(self.model, dict(batch)))

    def _training_data(self) -> Any:
        """The train_dataset, or what gives its rows from the first one on if it is a stream that was looked at."""
        stream, objectives = self._host.stream, self._host.run.tutor.objectives
        if stream is None:
            return self.train_dataset
        cuts = self.rmtkd_config.schedule != "none"
        if cuts or self.model_init is not None or any(objective.observes for objective in objectives):
            stream.samples(self.rmtkd_config.calibration_samples)  # before training reads on, so that a resumed
            # run is calibrated on the same rows
        stream.settle()
        return stream.data

    # -- log and evaluations ------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *positional, **kwargs) -> None:
        """As the trainer's own; a training line ("loss") also gets the mean of each term since the last one."""
        if "loss" in logs:
            logs |= self._host.run.loss.log_terms()
        asked = self.control.should_training_stop
        super().log(logs, *positional, **kwargs)
        self._host.patience.grant(self.control, asked)

    def _log_of_the_run(self, logs: dict[str, float], *positional, **kwargs) -> None:
        """In place of `log` while the run evaluates for itself."""
        super().log(logs, *positional, **kwargs)

    def _evaluate(self, *positional, **kwargs):
        asked = self.control.should_training_stop
        metrics = super()._evaluate(*positional, **kwargs)
        self._host.patience.weigh(self.control, asked, metrics)
        return metrics

    def _maybe_log_save_evaluate(self, *positional, **kwargs):
        took_long = self.control.should_evaluate or self.control.should_save
        super()._maybe_log_save_evaluate(*positional, **kwargs)
        if took_long and not self._termination.leaving:  # it may have come meanwhile: no further step is made
            self._termination.agreed(self.accelerator)
        if self._termination.leaving:
            self._save_before_leaving()
            step = self.state.global_step
            self._termination.say(f"SIGTERM: training stopped after step {step}. {self._what_is_kept()}")
            raise Terminated

    # -- private hooks of Trainer -------------------------------------------------------------------------------------

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(trial)
        if self.model_init is not None:
            check_model(self._host.model, self.rmtkd_config, evaluated=self._host.evaluates)
            self.check_first_batch()

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self._host.hand_over(resume_from_checkpoint)
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self._in_charge():
            return super().training_step(model, inputs, num_items_in_batch)

    @contextlib.contextmanager
    def _kept_for_teacher(self, description: str | None) -> Iterator[None]:
        """While open, the columns that a given teacher reads are not "unused" in data that it sees."""
        given = None if self._host is None else self._host.run.tutor.given
        if given is None or (description or TAUGHT[0]).lower() not in TAUGHT:
            yield
            return
        self._set_signature_columns_if_needed()
        own = self._signature_columns
        self._signature_columns = own + [name for name in given.columns if name not in own]
        try:
            yield
        finally:
            self._signature_columns = own

    def _remove_unused_columns(self, dataset, description=None):
        with self._kept_for_teacher(description):
            return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        with self._kept_for_teacher(description):
            return super()._get_collator_with_removed_columns(data_collator, description)


def _by_name(function: Callable, positional: Sequence[Any]) -> dict[str, Any]:
    """Positional arguments by the names of the parameters that they meet; those that meet *args have none."""
    named = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return {parameter.name: value for parameter, value in zip(named, positional, strict=False)}
