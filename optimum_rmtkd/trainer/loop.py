"""RMTKDLoop: narrows a model in a loop that a script runs itself, with Accelerate.

With `loops/`, the only place that knows Accelerate's accelerator: the loop as a `Host` (`hosting`), its schedule, its
checkpoints, and what it refuses.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config import RMTKDConfig
from ..distillation import BatchTransform, DistillationObjective, Teacher
from ..distillation.teachers import clean_copy, without_labels
from ..errors import RMTKDError
from ..hub import write_results
from ..hub.run import public_name
from ..reparameterization import Reparameterization, fold, is_reparameterized
from ..signals import Termination
from .checks import check_data, check_model, check_parts, check_rows
from .companions import Companions
from .failures import NoticeBoard
from .loops.checkpoints import (
    LoopCheckpoints,
    WholeStates,
    random_state,
    register_checkpoints,
    set_random_state,
)
from .loops.checks import (
    check_accelerator,
    check_batch,
    check_evaluation,
    check_loader,
    check_model_is_whole,
    check_prepared,
    check_steps,
    one_loss,
    recipe_of,
)
from .loops.hosting import LoopHost
from .loops.schedules import LoopSchedule
from .parts import parts_of
from .run import Run
from .stages import Stage, stage_table
from .step import Around
from .swap import raw_optimizer
from .teaching import accept_teacher


__all__ = ["RMTKDLoop"]

logger = logging.getLogger(__name__)


class RMTKDLoop:
    """For a script with a training loop of its own, as transformers' `run_glue_no_trainer.py`: the same run as an
    `RMTKDTrainer`'s, driven by the script.

        model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(...)
        loop = RMTKDLoop(
            accelerator, model, optimizer, train_dataloader, lr_scheduler,
            rmtkd_config=RMTKDConfig(target_reduction=0.8), max_steps=args.max_train_steps,
            evaluate=lambda: evaluate(model), metric_for_best_model="accuracy", output_dir=args.output_dir,
        )
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                loss = loop.loss(batch)              # in place of model(**batch).loss
                accelerator.backward(loss)
                optimizer.step(); lr_scheduler.step(); optimizer.zero_grad()
        loop.end()

    Made after `accelerator.prepare` and before `accelerator.load_state`. `model`, `optimizer` and `lr_scheduler` stay
    the objects that they are, DDP wrapper included; the model's inside changes at each cut. `accelerator.save_state`
    holds the run, and `load_state` into the script's freshly built model takes it up, architecture first. The run
    counts the optimizer's steps itself: how the script accumulates, and that fp16 skips a step, is seen.

    What is due after a step (the end of the fit, a cut, a verdict) is done at the next `loss`, `save_state`, `step` or
    `end`, whichever comes first.

    Args:
        accelerator: the script's `accelerate.Accelerator`; one process or DDP.
        model: as `accelerator.prepare` returned it: a `PreTrainedModel` of a supported family, fine-tuned or not.
        optimizer: prepared; it holds the model's parameters.
        train_dataloader: prepared. Cuts are calibrated on its rows, through its `collate_fn`.
        lr_scheduler: prepared or not, stepped once after each optimizer step. A `LambdaLR` (transformers'
            `get_scheduler`) runs once a phase of the run, at the rate that suits the cut. Another scheduler, or None:
            the learning rate stays the script's own.
        rmtkd_config: the recipe. None: `RMTKDConfig()`.
        max_steps: optimizer steps in the whole run, over which the cuts are spread.
        evaluate: () -> metrics of the validation data by name, a number each; called on all processes, before the
            first cut, after each, and at the end. None: the stages are judged by how far the model's answers are from
            the uncut model's on training rows.
        metric_for_best_model: which of them judges the stages. None: the loss, if it is there, else a known one.
        greater_is_better: its direction. None: unless its last word is loss, perplexity, error, wer, mse or the like.
        validation_rows: rows behind the metrics, for the noise that a verdict allows; None: unknown.
        task_loss: (outputs, batch) -> the task's loss of a batch, a scalar mean; for a script that computes its own.
            The model is then called without labels, and with the columns that it takes. None: the model's own loss.
        output_dir: where journal, spectra and results go, on the main process. None: the accelerator's `project_dir`;
            without one nothing is written.
        teacher_model, objectives, reparameterization, transforms: as in `RMTKDMixin`.

    Raises:
        RMTKDError: a model, optimizer or loader that this accelerator did not prepare, or that do not belong together;
            sharded parameters (FSDP, DeepSpeed, tensor parallelism); an unfit teacher; data without what the
            objectives read; a recipe that compares metrics without `evaluate`.
        UnsupportedArchitectureError: no known family.
        BudgetError: a target that the model already meets, or that no widths can give.
    """

    def __init__(
        self,
        accelerator: Any,
        model: nn.Module,
        optimizer: Any,
        train_dataloader: Iterable,
        lr_scheduler: Any = None,
        *,
        max_steps: int,
        rmtkd_config: RMTKDConfig | None = None,
        evaluate: Callable[[], Mapping[str, Any]] | None = None,
        metric_for_best_model: str | None = None,
        greater_is_better: bool | None = None,
        validation_rows: int | None = None,
        task_loss: Callable[[Any, Mapping[str, Any]], torch.Tensor] | None = None,
        output_dir: str | None = None,
        teacher_model: nn.Module | Teacher | Sequence | None = None,
        objectives: Iterable[DistillationObjective] | Mapping[str, Any] | None = None,
        reparameterization: Reparameterization | Mapping[str, Any] | str | None = None,
        transforms: BatchTransform | Sequence | Mapping[str, Any] | str | None = None,
    ):
        config = recipe_of(rmtkd_config)
        parts = parts_of(config, objectives, reparameterization, transforms)
        check_accelerator(accelerator)
        check_prepared(accelerator, model, optimizer)
        check_loader(train_dataloader)
        check_data(train_dataloader.dataset)
        check_steps(max_steps)
        check_evaluation(config, evaluate, metric_for_best_model)
        folder = output_dir if output_dir is not None else accelerator.project_dir
        host = LoopHost(
            accelerator,
            model,
            optimizer,
            train_dataloader,
            config,
            max_steps,
            evaluate,
            folder=folder,
            own_loss=task_loss is not None,
        )
        host.judge_by(metric_for_best_model, greater_is_better)
        host.validation_rows = validation_rows
        check_model_is_whole(host.model)
        check_model(host.model, config, evaluated=evaluate is not None)
        self._host, self._task_loss, self._board = host, task_loss, NoticeBoard(accelerator)
        self.run = Run(host, config, parts, _companions(host, optimizer), reentrant=_reentrant(host.model))
        self.run.evaluates = False
        if teacher_model is not None:
            self._accept(teacher_model)
        self._check_data(train_dataloader.batch_size)
        if lr_scheduler is not None:
            host.schedule = LoopSchedule(lr_scheduler, max_steps, lambda: self.run.pace.phases)
        self._begun = self._ended = self._due = False
        self._random: dict[str, Any] | None = None
        self._termination = Termination(_what_is_kept, speaks=host.shows_progress)
        self._register(raw_optimizer(optimizer))

    def _accept(self, teacher: Any) -> None:
        """A teacher that was passed in."""
        run, host = self.run, self._host
        if accept_teacher(run.tutor, teacher, host.model, host.accelerator.device):
            host.teacher = run.tutor.given
        else:
            host.config = run.config.replace(teacher="initial")
            run.follow(host.config)

    def _check_data(self, batch_size: int | None) -> None:
        """Do the parts of the run, the model and the first batch fit together?"""
        run, model, most = self.run, self._host.model, self.run.config.calibration_samples
        check_parts(run, model)
        models_own = self._task_loss is None
        needed = models_own and not _returns_loss(model)
        check_rows(run, min(batch_size or most, most), labels_needed=needed, classes_known=models_own)

    def _register(self, raw: torch.optim.Optimizer) -> None:
        """From here on the optimizer tells of its steps, and the accelerator of its checkpoints."""
        accelerator, how = self._host.accelerator, self.run.parts.reparameterization
        if how is not None:
            logger.warning(
                "The tensors of %s join the optimizer's groups of the weights they stand for. lr_scale=%.3g and the "
                "freedom from weight decay are not applied; set the rate accordingly.",
                how.name,
                how.lr_scale,
            )
        for earlier in [known for known in accelerator._custom_objects if isinstance(known, RMTKDLoop)]:
            earlier._withdraw()
        self._handles = [
            raw.register_step_pre_hook(lambda *_: self.run.tutor.companions.step(raw)),
            raw.register_step_post_hook(lambda *_: self._stepped()),
            *register_checkpoints(LoopCheckpoints(self.run, self._before_save, self._taken_up)),
        ]
        accelerator.register_for_checkpointing(self)
        self._states = WholeStates(self.run, self._board)
        self._states.put_on()

    def _withdraw(self) -> None:
        """Another loop takes over this accelerator: a new run, or a new attempt with a smaller batch."""
        known = self._host.accelerator._custom_objects
        known[:] = [other for other in known if other is not self]
        for handle in self._handles:
            handle.remove()
        self._states.take_off()
        self._termination.stop()

    # -- what the script calls ----------------------------------------------------------------------------------------

    def loss(self, batch: Mapping[str, Any], return_outputs: bool = False) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The loss to go backward from, in place of `model(**batch).loss`: while the model is fine-tuned the task's,
        then the weighted sum of all terms. What the last optimizer step made due is done first.

        Each term is a mean over the micro-batches that all processes hold at this moment. An accumulated batch is not
        known in advance, so each of its micro-batches stands for itself, and `accelerator.backward` averages them:
        with rows of uneven length that is not quite the mean over all tokens that `RMTKDTrainer` takes.

        Args:
            batch: a (micro-)batch of the training data, on the device, as the model takes it.
            return_outputs: also return the model's outputs.

        Returns:
            Scalar tensor; with `return_outputs` a pair with the outputs, by name.

        Raises:
            RMTKDError: a batch that is no dictionary, or lacks what an objective reads; no gradients; after `end`; a
                scheduler that is not stepped after each optimizer step.
        """
        if self._ended:
            raise RMTKDError("loop.loss after loop.end(): the run is over. Make a new RMTKDLoop for another one.")
        check_batch(batch)
        run, host = self.run, self._host
        with self._board.watching():
            self._go_on()
            (batch,) = run.begin_batch([batch])
            task = "outputs" if return_outputs or self._task_loss is not None else "model"
            loss, outputs = run.loss(host.model, batch, self._forward, host.columns.for_student, run.progress, task)
        return (loss, outputs) if return_outputs else loss

    def step(self) -> None:
        """Do now what the last optimizer step made due, which the next `loss` would do: for a script that wants the
        narrow model at hand, for example before it evaluates. Call it after `optimizer.zero_grad()`, on all
        processes. Without effect where nothing is due."""
        if self._due:
            self._due = False
            step, leaving = self._host.step, self._termination.leaving
            with self._board.watching(), self._termination.busy(not leaving and self.run.is_due(step)):
                self.run.after_step(step, leaving)

    def should_stop(self, now: bool = False) -> bool:
        """Whether SIGTERM has come, to any process: then save a checkpoint and exit. What is due after the step is
        left to the run that goes on from there. Call it after each optimizer step, on all processes; only with the
        first call the signal is listened to. A cut that is being made, or `end`, is not waited for: the process ends
        (143), and the last checkpoint holds. A second signal ends it at once. A handler of your own stays in its
        place.

        Args:
            now: ask all processes. Else several processes ask each other about every half second, and after 64 calls
                at the latest. For what takes long, such as an evaluation of your own: before and after it.
        """
        run, host = self.run, self._host
        self._termination.listen()
        self._termination.soon = True
        now = now or self._due and run.is_due(host.step) or host.step >= host.max_steps
        return self._termination.agreed(host.accelerator, now)

    def end(self) -> dict[str, float]:
        """Training is over: the last stage is judged, dropout comes back, and the model has plain weights. Call it
        before the model is saved, on all processes. Prints the table of the stages.

        Returns:
            `parameters_before`, `parameters_after`, `reduction`.

        Raises:
            RMTKDError: `loss` was never called.
        """
        run, host = self.run, self._host
        if not self._begun and run.restored is None:
            raise RMTKDError(
                "loop.end() without a single loop.loss(batch): the model was neither cut nor distilled. Train on "
                "loop.loss(batch) in place of model(**batch).loss."
            )
        with self._board.watching(), self._termination.busy(not self._ended and not self._termination.leaving):
            if not self._begun:  # resumed from the last step
                self._begin()
            self.step()
            if not self._ended:
                run.end()
                if is_reparameterized(host.model):
                    host.install(fold(clean_copy(host.model), run.parts.reparameterization))
                self._ended = True
                self._termination.stop()
                self._report()
        before, after = run.reference_parameters, run.parameters
        return {"parameters_before": before, "parameters_after": after, "reduction": 1 - after / before}

    def terms(self) -> dict[str, float]:
        """Mean of each term of the loss since the last call, over all processes, unweighted, under `loss/<objective>`:
        for the script's log. Call it on all processes."""
        return self.run.loss.log_terms()

    @property
    def stages(self) -> list[Stage]:
        """Records of the cuts so far, in order."""
        return list(self.run.stages)

    @property
    def cuts_to_come(self) -> bool:
        """Whether a cut is still to be made: until then the model is larger than it will be, and none to keep as the
        best one, or to stop early with."""
        return self.run.cuts_to_come

    @property
    def objectives(self) -> list[DistillationObjective]:
        """The terms of the loss."""
        return self.run.tutor.objectives

    @property
    def reports(self) -> list[Any]:
        """The spectra that each cut was made from."""
        return self.run.reports

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For `accelerator.save_state`, which writes the run itself beside it: the place in the training."""
        if self._random is not None:  # what was due at the end of the epoch may have drawn
            self._random = random_state()
        return {"step": self._host.step, "draws_on": self._random is not None or self._host.within_epoch}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`, called by `accelerator.load_state` after all else was loaded."""
        self._host.step = int(values["step"])
        # The next step draws what it would have drawn just here: the uninterrupted run has begun its epoch before, or
        # goes back to the end of the last one (`_stepped`). A resumed one begins an epoch first, which draws.
        self._random = random_state() if values["draws_on"] else None

    def _before_save(self) -> None:
        if self._random is not None:
            set_random_state(self._random)
        self.step()

    def _taken_up(self) -> None:
        self._begun = self._ended = self._due = False

    # -- the run ------------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        if self._random is not None:
            set_random_state(self._random)
            self._random = None
        if not self._begun:
            with self._termination.busy():
                self._begin()
        if self._due and self._host.schedule is not None:
            self._host.schedule.check(self._host.step)
        self.step()

    def _begin(self) -> None:
        if self._host.schedule is not None:
            self._host.schedule.begin(self._host.step)
        self.run.begin()
        self._begun = True

    def _stepped(self) -> None:
        """The optimizer made a step: was it made on our loss?"""
        run, self._due = self.run, self._begun
        # what a script draws between two epochs, in an evaluation, a resumed one may not draw: no step depends on it
        self._random = random_state() if self._host.ends_epoch else None
        computed, run.loss.computed = run.loss.computed, 0
        if self._begun:
            self._host.step += 1
        if not computed and not self._ended:
            run.loss.warn_once(
                "optimizer.step() without loop.loss(batch) since the last one: the step was made on a loss of the "
                "script's own, without the distillation terms, and is counted only once the run has begun. Go "
                "backward from loop.loss(batch)."
            )

    def _forward(
        self, inputs: Mapping[str, Any], tasked: bool, compared: bool, around: Around | None
    ) -> tuple[torch.Tensor | None, Any]:
        host, own = self._host, self._task_loss is not None
        taken = host.columns.for_calibration(inputs)
        with around or contextlib.nullcontext():
            outputs = host.wrapped(**(without_labels(host.model, taken, host.label_names) if own else taken))
        if not tasked:
            return None, outputs
        loss = self._task_loss(outputs, inputs) if own else outputs.get("loss")
        return one_loss(loss, host.label_names, inputs, own), outputs

    def _report(self) -> None:
        run, host = self.run, self._host
        if host.folder is not None:
            write_results(
                host.folder,
                base_model=public_name(run.initial.config._name_or_path),
                parameters=(run.reference_parameters, run.parameters),
                training={"max_steps": host.max_steps},
                recipe=run.config.to_dict(),
            )
        if run.stages:
            host.accelerator.print(stage_table(run.stages, run.fit.to_dict()))


def _what_is_kept() -> str:
    return "The last checkpoint holds."


def _companions(host: LoopHost, optimizer: Any) -> Companions:
    group = optimizer.param_groups[0]
    return Companions(host, **{name: group[name] for name in ("betas", "eps") if name in group})


def _reentrant(model: nn.Module) -> bool:
    """Are activations recomputed by reentrant checkpointing?"""
    functions = [getattr(module, "_gradient_checkpointing_func", None) for module in model.modules()]
    return any(getattr(function, "keywords", {}).get("use_reentrant") for function in functions)


def _returns_loss(model: nn.Module) -> bool:
    from transformers.utils import can_return_loss

    return can_return_loss(type(model))
