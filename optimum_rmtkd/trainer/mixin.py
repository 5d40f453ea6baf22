"""RMTKDMixin: what makes a trainer of transformers, or of a library built on it, narrow its model while it trains it.

The only file that knows the hooks of `transformers.Trainer`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..config import RMTKDConfig
from ..distillation import BatchTransform, DistillationObjective, Teacher
from ..distillation.teachers import clean_copy
from ..errors import RMTKDError
from ..hub import write_card, write_results
from ..hub.card import CARD, is_foreign
from ..hub.run import first, public_name
from ..reparameterization import Reparameterization, fold, is_reparameterized
from .arguments import RMTKDTrainingArguments
from .callbacks import Patience, StageCallback
from .checkpoint import write_process_state
from .checks import check_first_batch, check_length, check_parts, check_setting, unsharded
from .columns import for_calibration, for_student, kept_for_teacher
from .cores import Cores
from .data import CalibrationBatches, is_hf_dataset, isolated_rng, pick_samples
from .distiller import Distiller, LateBatches
from .extras import Extras
from .fitting import transforms_state
from .parts import parts_of
from .stages import Stage, stage_table
from .staging import Staging
from .stream import Stream, evaluated_again, is_stream
from .swap import enable_checkpointing, load_weights, separate_cores
from .teaching import accept_teacher


__all__ = ["RMTKDMixin"]

logger = logging.getLogger(__name__)


class RMTKDMixin:
    """Put in front of a `transformers.Trainer`, or of any subclass of it: `class MyTrainer(RMTKDMixin, SFTTrainer)`.

    It trains as that trainer does, and narrows the model on the way as the recipe says.

    Args:
        model: a `PreTrainedModel` of a supported family. It keeps its identity; class and widths change at each cut.
        args: `RMTKDTrainingArguments`, or any `TrainingArguments`.
        rmtkd_config: the recipe. None: `RMTKDConfig()`, where the spectral edges decide the widths.
        teacher_model: None for self-distillation (`rmtkd_config.teacher`); a model of the same vocabulary and labels;
            a list of models, or of (model, weight); or a `Teacher` (OnlineTeacher, CachedTeacher). `HiddenStateLoss`
            is used only if it is the very model that is cut: no projection is known for another one.
        objectives: None for the recipe's three terms; or a list of objectives (or of their dicts), or {name:
            arguments}.
        reparameterization: None, an instance, a name ("mpo", "powerpropagation") or a dict: trained in place of the
            weights, put on again after each cut, folded back in everything that is saved and when training ends.
        transforms: batch transforms (EmbeddingMixup, OnPolicy, ...), one or several, or their names or dicts.
        **kwargs: as `transformers.Trainer`.

    Each training log line carries `loss/<objective>`, unweighted, averaged since the last one. `train()` adds
    `parameters_before`, `parameters_after` and `reduction` to its metrics; `stages` and `rmtkd_stages.json` tell what
    happened at each cut. Every term is a mean over the whole accumulated batch of all processes, however it is split
    and padded.

    A subclass that overrides `compute_loss`, and a `compute_loss_func`, give the task's term (`loss/task`) and the
    loss of evaluations; the other terms stay. They see one micro-batch and return its mean: `num_items_in_batch` is
    the number of labels in it, and accumulation is weighed here. `replaces_loss = True` in the subclass says that its
    `compute_loss` is the whole training loss; `super().compute_loss` then gives it the weighted sum of all terms.

    `EarlyStoppingCallback` and the like wait for the last cut: see `callbacks.Patience`.

    Raises:
        RMTKDError: a setting that cannot work with cuts; an unfit teacher; a recipe that needs an eval_dataset without
            one.
        UnsupportedArchitectureError: no known family.
    """

    # Our loss is averaged over the micro-batches. Inferred, it would be wrong: BERT & co. swallow `num_items_in_batch`
    # through **kwargs and ignore it, so loss and gradients would grow with accumulation steps and processes
    # (transformers #47688).
    loss_is_scaled_for_ga = False

    replaces_loss = False  # does a subclass's compute_loss stand for all terms, and not for the task's alone?

    def __init__(
        self,
        model=None,
        args=None,
        *positional,
        rmtkd_config: RMTKDConfig | None = None,
        teacher_model: nn.Module | Teacher | Sequence | None = None,
        objectives: Iterable[DistillationObjective] | Mapping[str, Any] | None = None,
        reparameterization: Reparameterization | Mapping[str, Any] | str | None = None,
        transforms: BatchTransform | Sequence | Mapping[str, Any] | str | None = None,
        **kwargs,
    ):
        self.rmtkd_config = rmtkd_config if rmtkd_config is not None else RMTKDConfig()
        if not isinstance(self.rmtkd_config, RMTKDConfig):
            raise RMTKDError(
                f"rmtkd_config is a {type(rmtkd_config).__name__}; expected an RMTKDConfig: RMTKDConfig(**values), "
                "RMTKDConfig.from_json_file(path)."
            )
        parts = parts_of(self.rmtkd_config, objectives, reparameterization, transforms)
        self.objectives, self.reparameterization, self.transforms = parts
        args = args if args is not None else RMTKDTrainingArguments("tmp_trainer")
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
            raise unsharded("fsdp" if args.fsdp else "deepspeed")
        check_length(args, *positional[1:2], **kwargs)
        super().__init__(model, args, *positional, **kwargs)
        self._model_takes_items, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, False
        if not self.replaces_loss:
            self.loss_is_scaled_for_ga = False  # the sum of the terms is not, whatever a subclass says of its own
        check_setting(self)
        self.optimizer_was_given = self.optimizer is not None
        if self.optimizer_was_given and self.reparameterization is not None:
            logger.warning(
                "An optimizer was given: the tensors of %s join the groups of the weights they stand for. "
                "lr_scale=%.3g and the freedom from weight decay are not applied; set the rate accordingly.",
                self.reparameterization.name,
                self.reparameterization.lr_scale,
            )
        self.reports: list[Any] = []
        self.distiller = Distiller(self)
        self.extras = Extras(self)
        self.cores = Cores(self)
        self.staging = Staging(self)
        self.patience = Patience(self)
        self._stream: Stream | None = None
        if teacher_model is not None:
            accept_teacher(self, teacher_model)
        check_parts(self)
        if (smooth := self.label_smoother) is not None:
            # transformers knows the causal models, whose labels are shifted, by the names of its own classes
            self.label_smoother = lambda outputs, labels, shift_labels=False, **rest: smooth(
                outputs, labels, shift_labels=shift_labels or self.distiller.shifted, **rest
            )
        if self.compute_loss_func is not None:
            self.compute_loss_func = self.distiller.counting(self.compute_loss_func)
        self.add_callback(StageCallback(self))

    # -- what the user reads ------------------------------------------------------------------------------------------

    @property
    def stages(self) -> list[Stage]:
        """Records of the cuts so far, in order."""
        return list(self.staging.stages)

    @property
    def metric_name(self) -> str:
        """Key of the validation metric that judges the stages: `metric_for_best_model`, else the loss."""
        name = self.args.metric_for_best_model or "loss"
        return name if name.startswith("eval_") else f"eval_{name}"

    @property
    def greater_is_better(self) -> bool:
        """Direction of that metric."""
        given = self.args.greater_is_better
        return not self.metric_name.endswith("loss") if given is None else given

    def train(self, resume_from_checkpoint=None, *positional, **kwargs):
        """As `Trainer.train`; the metrics also hold `parameters_before`, `parameters_after` and `reduction`.

        Raises:
            RMTKDError: no train_dataset, an empty one, or batches without labels or cached answers that are needed; a
                checkpoint of a run that started from another model or with other parts.
            BudgetError: the model is already as small as the target.
        """
        if self.train_dataset is None:
            raise RMTKDError(
                "train() without train_dataset: it is needed to calibrate the cuts and to distil. Pass train_dataset "
                "to RMTKDTrainer, or use optimum_rmtkd.narrow for a single cut without training."
            )
        if self._stream is not None and self._stream.dataset is not self.train_dataset:
            self._stream = None
        self.eval_dataset = evaluated_again(self.eval_dataset, self.rmtkd_config.seed)
        check_first_batch(self)
        given, self.train_dataset = self.train_dataset, self._training_data()
        if self.model_init is not None:  # a new trial: the model of the last one is thrown away
            self.staging.reset()
        self.distiller.forget()
        self.extras.base_rate = None
        try:
            output = super().train(resume_from_checkpoint, *positional, **kwargs)
            self.staging.end()
            self.cores.fold()
        finally:
            self.staging.dropout.restore()
            self.train_dataset, self._stream = given, None
        before, after = self.staging.reference_parameters, self.staging.parameters
        output.metrics.update(parameters_before=before, parameters_after=after, reduction=1 - after / before)
        if self.args.should_save:
            self._write_results(before, after)
        if self.is_world_process_zero() and self.stages:
            print(stage_table(self.stages))
        return output

    def create_model_card(
        self,
        language=None,
        license=None,
        tags=None,
        model_name=None,
        finetuned_from=None,
        tasks=None,
        dataset_tags=None,
        dataset=None,
        dataset_args=None,
    ) -> None:
        """As `Trainer.create_model_card`, with the card of a reduced model: sizes, stages, figures, recipe."""
        if not self.is_world_process_zero():
            return
        if not self.stages:  # nothing was cut: an ordinary model
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
            return
        given = [first(values) for values in (dataset_tags, dataset, dataset_args)]
        if is_foreign(self.args.output_dir):
            logger.warning("%s was written or changed by somebody else; it stays.", Path(self.args.output_dir) / CARD)
            return
        if any(given):
            known = {"id": given[0] or given[1], "name": given[1] or given[0], "config": given[2]}
            write_results(self.args.output_dir, dataset=known | {"on_hub": given[0] is not None})
        write_results(self.args.output_dir, base_model=finetuned_from)
        kept = getattr(self.staging.initial, "model_tags", None) or []  # a cut makes a new model, without them
        tags = [*([tags] if isinstance(tags, str) else tags or []), *kept]
        metadata = {"language": language, "license": license, "tags": tags, "pipeline_tag": first(tasks)}
        write_card(self.args.output_dir, self.hub_model_id or model_name, **metadata)

    def _training_data(self) -> Any:
        """The train_dataset, or what gives its rows from the first one on if it is a stream that was looked at."""
        if self.stream is None:
            return self.train_dataset
        if self.rmtkd_config.schedule != "none" or any(objective.observes for objective in self.objectives):
            self.stream.samples(self.rmtkd_config.calibration_samples)  # before training reads on, so that a resumed
            # run is calibrated on the same rows
        self.stream.settle()
        return self.stream.data

    def _write_results(self, before: int, after: int) -> None:
        options = {"epochs": self.args.num_train_epochs, "batch_size": self.args.per_device_train_batch_size}
        same = ("max_steps", "gradient_accumulation_steps", "learning_rate", "weight_decay", "warmup_steps", "bf16")
        options |= {name: getattr(self.args, name) for name in same}
        write_results(
            self.args.output_dir,
            base_model=public_name(self.staging.initial.config._name_or_path),
            parameters=(before, after),
            log_history=self.state.log_history,
            training=options,
            recipe=self.rmtkd_config.to_dict(),
        )

    @property
    def overrides_loss(self) -> bool:
        """Does a subclass, or a function set on this object, compute the task's loss?"""
        own = self.compute_loss
        return not self.replaces_loss and getattr(own, "__func__", own) is not RMTKDMixin.compute_loss

    # -- the loss -----------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Evaluation, and what an override calls: the task loss. Training: sum over objectives of weight * term.

        `num_items_in_batch` is withheld from the task loss: all terms alike are weighed by `DistillationStep.share`.
        """
        if not model.training or self.staging.teacher is None or self.distiller.busy:
            return super().compute_loss(model, for_student(self, inputs), return_outputs=return_outputs)
        loss, outputs = self.distiller.loss(model, inputs, super().compute_loss)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As `Trainer.prediction_step`, without columns that are there for the teacher alone."""
        with self.distiller.told_alike():
            return super().prediction_step(model, for_student(self, inputs), prediction_loss_only, ignore_keys)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As `Trainer.get_batch_samples`, with the batch transforms applied and the units of the whole batch
        counted."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        return LateBatches(batches, self.distiller.begin_batch), num_items_in_batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; a training line ("loss") also gets the mean of each term since the last one."""
        if "loss" in logs:
            logs |= self.distiller.log_terms()
        asked = self.control.should_training_stop
        super().log(logs, start_time)
        self.patience.grant(asked)

    # -- what the staging asks for ------------------------------------------------------------------------------------

    def calibration_batches(self, strip: bool = True, samples: int | None = None) -> CalibrationBatches:
        """This process's share of the calibration data, through the trainer's collator, the same in every pass.

        Args:
            strip: without what is there for the teacher alone.
            samples: how many; None: `calibration_samples`.
        """
        dataset, collate, config = self.train_dataset, self.data_collator, self.rmtkd_config
        if self.stream is None and is_hf_dataset(dataset):
            dataset = self._remove_unused_columns(dataset, description="calibration")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="calibration")
        wanted = config.calibration_samples if samples is None else samples
        if self.stream is None:
            chosen = pick_samples(dataset, wanted, config.seed)
        else:
            chosen = self.stream.samples(wanted)
        return CalibrationBatches(
            chosen,
            collate,
            self.args.per_device_eval_batch_size,
            seed=config.seed,
            process_index=self.args.process_index,
            num_processes=self.args.world_size,
            prepare=lambda batch: self._prepare_inputs(for_calibration(self, batch) if strip else batch),
        )

    @property
    def stream(self) -> Stream | None:
        """The first rows of a train_dataset that is iterated; None where it is indexed."""
        if self._stream is None and is_stream(self.train_dataset):
            self._stream = Stream(self.train_dataset, self.rmtkd_config.seed)
        return self._stream

    def measure(self) -> float | None:
        """The validation metric now, or None without an eval_dataset.

        Not `evaluate`: its callbacks would count for early stopping, and its sampler would advance the random numbers.
        As in training, also after it: outside, `bf16_full_eval` would cast the model that is about to be saved.
        """
        if self.eval_dataset is None:
            return None
        several = isinstance(self.eval_dataset, dict)
        metrics: dict[str, float] = {}
        training, self.is_in_train = self.is_in_train, True
        try:
            with isolated_rng(self.rmtkd_config.seed):
                for name in self.eval_dataset if several else (None,):
                    output = self.evaluation_loop(
                        self.get_eval_dataloader(name),
                        description="Stage",
                        prediction_loss_only=True if self.compute_metrics is None else None,
                        metric_key_prefix=f"eval_{name}" if several else "eval",
                    )
                    metrics.update(output.metrics)
        finally:
            self.is_in_train = training
        if self.metric_name not in metrics:
            found = ", ".join(sorted(metrics)) or "nothing (eval_dataset is empty, or holds no labels)"
            raise RMTKDError(
                f"The evaluation gave {found}; the stages are judged by {self.metric_name!r}. "
                "Set metric_for_best_model to one of them (with several eval datasets: <name>_<metric>)."
            )
        return float(metrics[self.metric_name])

    def after_swap(self) -> None:
        """Repeat on the new layers what `Trainer.train` did to the old ones before training."""
        enable_checkpointing(self.model, self.args)
        if self.neftune_noise_alpha is not None and hasattr(self, "neftune_hook_handle"):
            from transformers.integrations.neftune import activate_neftune

            self.neftune_hook_handle = activate_neftune(self.model, self.neftune_noise_alpha, self.accelerator)

    def log_stage(self, stage: Stage) -> None:
        """One line in the trainer's log."""
        line = {"rmtkd/stage": stage.index, "rmtkd/parameters": self.staging.parameters}
        if stage.metric_cut is not None:
            line[f"rmtkd/{stage.metric_name}"] = stage.metric_cut
        self.log(line)

    # -- private hooks of Trainer -------------------------------------------------------------------------------------
    # `_inner_training_loop` wraps the model once and hands that wrapper down as a local variable; after a cut under
    # DDP, autocast or torch.compile it is a stale one. Each override below puts the live wrapper in its place.

    def _run_epoch(self, model, *positional, **kwargs):
        return super()._run_epoch(self.model_wrapped, *positional, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self.distiller.in_charge():
            return super().training_step(self.model_wrapped, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model):
        return super()._clip_grad_norm(self.model_wrapped)

    def _get_grad_norm(self, model, grad_norm=None):
        return super()._get_grad_norm(self.model_wrapped, grad_norm=grad_norm)

    # The three below touch checkpoints: the architecture has to be in place before weights are loaded, and what only
    # we know has to lie beside the optimizer's state (hence not with save_only_model).

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.staging.restore(resume_from_checkpoint)
        load_weights(self.model, resume_from_checkpoint)
        self.staging.restore_cores()

    def _save(self, output_dir=None, state_dict=None):
        """Plain weights, whatever they are trained as: every checkpoint loads with stock `from_pretrained`."""
        if not self.args.should_save or not is_reparameterized(self.model):
            return super()._save(output_dir, state_dict)
        trained = self.model
        self.model = fold(clean_copy(trained), self.reparameterization)
        try:
            super()._save(output_dir)
        finally:
            self.model = trained

    def _load_best_model(self):
        self.cores.fold()
        self.staging.adopt(self.state.best_model_checkpoint)
        logger.info("Loading the best model from %s (%s).", self.state.best_model_checkpoint, self.state.best_metric)
        load_weights(self.model, self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        write_process_state(output_dir, self.args.process_index, self.args.world_size, transforms_state(self))
        if self.args.should_save:
            self.staging.save(output_dir)

    def create_optimizer(self, model=None):
        """As `Trainer.create_optimizer`; tensors of a reparameterization form the last group, without weight decay."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(model)
        if self.reparameterization is not None and not given:
            separate_cores(optimizer, self.model, self.reparameterization.lr_scale)
        return optimizer

    def _remove_unused_columns(self, dataset, description=None):
        with kept_for_teacher(self, description):
            return super()._remove_unused_columns(dataset, description)

    def _get_collator_with_removed_columns(self, data_collator, description=None):
        with kept_for_teacher(self, description):
            return super()._get_collator_with_removed_columns(data_collator, description)

    def _get_num_items_in_batch(self, batch_samples, device):
        # of which the model is not told, but a compute_loss of the user's own is
        self.model_accepts_loss_kwargs = self.overrides_loss and self._model_takes_items
        try:
            return super()._get_num_items_in_batch(batch_samples, device)
        finally:
            self.model_accepts_loss_kwargs = False

    def _evaluate(self, *positional, **kwargs):
        asked = self.control.should_training_stop
        metrics = super()._evaluate(*positional, **kwargs)
        self.patience.weigh(asked, metrics)
        return metrics
