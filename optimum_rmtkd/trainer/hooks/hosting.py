"""The `Host` that a Trainer is. Knows the attributes of `transformers.Trainer`, and what they mean for a run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.data import ConcatDataset, IterableDataset
from transformers import Trainer

from ...batches import batch_size
from ...config import COMPARING
from ...distillation import Teacher
from ...errors import RMTKDError
from ...surgery.processes import from_main
from ..columns import Columns
from ..data import CalibrationBatches, is_hf_dataset, isolated_rng, pick_samples
from ..evaluations import numbers_of
from ..inside import Inside, inside_of
from ..stream import Stream, is_stream, rewindable
from ..swap import adam_rate, enable_checkpointing, forget_moments, install, raw_optimizer, rewrapped
from ..verdicts import greater_is_better
from .names import instead
from .schedules import count_anew, follow_groups


__all__ = ["TrainerHost", "judged_by"]

logger = logging.getLogger(__name__)

EVALUATIONS = ("evaluate", "get_eval_dataloader")  # what a subclass may have without an eval_dataset


class TrainerHost:
    """A `Host` over a trainer: an object of its own, so that the names of neither get into the other's way.

    Attributes:
        run, patience: of the trainer.
        ignored: keys of the model's outputs that `train` was told to leave out in evaluations; None: not told.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.run: Any = None
        self.patience: Any = None
        self.ignored: list[str] | None = None
        self._nothing_to_evaluate = False
        self._no_numbers: set[str] = set()
        self.teacher: Teacher | None = None  # that was passed in
        self._stream: Stream | None = None
        self._loaded: tuple[Any, list] | None = None
        self._inside: Inside | None = None

    # -- what a run reads ---------------------------------------------------------------------------------------------

    @property
    def inside(self) -> Inside:
        """Where the narrowed model lies in the trainer's."""
        if self._inside is None or self._inside.whole is not self.trainer.model:
            self._inside = inside_of(self.trainer.model, self.trainer)
        return self._inside

    @property
    def model(self) -> nn.Module:
        return self.inside.model

    @property
    def accelerator(self) -> Any:
        return self.trainer.accelerator

    @property
    def optimizer(self) -> Any:
        return self.trainer.optimizer

    @property
    def step(self) -> int:
        return self.trainer.state.global_step

    @property
    def max_steps(self) -> int:
        return self.trainer.state.max_steps

    @property
    def metric_name(self) -> str:
        return judged_by(self.trainer.args)

    @property
    def greater_is_better(self) -> bool:
        given = self.trainer.args.greater_is_better
        return greater_is_better(self.metric_name) if given is None else given

    @property
    def metric_asked_for(self) -> bool:
        asked = self.trainer.args.metric_for_best_model
        return asked is not None and asked not in ("loss", "eval_loss")

    @property
    def validation_rows(self) -> int | None:
        rows = self.trainer.eval_dataset
        return len(rows) if hasattr(rows, "__len__") and not isinstance(rows, dict) else None

    @property
    def label_names(self) -> Iterable[str]:
        return self.trainer.label_names

    @property
    def columns(self) -> Columns:
        trainer = self.trainer
        named_only, own_loss = trainer.args.remove_unused_columns, trainer._own_loss or trainer._whole_loss
        return Columns(self.model, self.teacher, trainer.label_names, named_only, own_loss)

    @property
    def rate(self) -> float | None:
        """None where the schedule is no function of the step, or the optimizer is not of Adam's kind: what is known of
        rates was measured with it."""
        trainer = self.trainer
        if trainer.optimizer is None or not trainer.schedule_is_known:
            return None
        ours = trainer._parts.reparameterization is not None and not trainer.optimizer_was_given
        return adam_rate(trainer.optimizer, but_last=ours)

    @property
    def follows_phases(self) -> bool:
        return self.trainer.schedule_is_known

    loss_name = "eval_loss"

    @property
    def shows_progress(self) -> bool:
        return not self.trainer.args.disable_tqdm

    @property
    def folder(self) -> str | None:
        trainer = self.trainer  # the folder of a trial, in a search over hyperparameters
        return trainer._get_output_dir(getattr(trainer, "_trial", None)) if trainer.args.should_save else None

    def looks(self) -> int:
        args, state = self.trainer.args, self.trainer.state
        by_steps = str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "steps"
        return state.eval_steps if by_steps and state.eval_steps else max(1, state.max_steps // 20)

    @property
    def evaluates(self) -> bool:
        """Whether there is something to evaluate on: an eval_dataset, an evaluator (sentence-transformers), or what a
        subclass finds by itself."""
        return self._holds_data or not self._nothing_to_evaluate and any(map(self._overrides, EVALUATIONS))

    @property
    def _holds_data(self) -> bool:
        return self.trainer.eval_dataset is not None or getattr(self.trainer, "evaluator", None) is not None

    def _overrides(self, name: str) -> bool:
        """Whether a method is another one than that of transformers' Trainer."""
        own = getattr(self.trainer, name)
        return getattr(own, "__func__", own) is not getattr(Trainer, name)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def measure(self) -> dict[str, float] | None:
        """What the trainer's `evaluate` returns, a subclass's own included; its callbacks, its log and a `log` of a
        class in front of the mixin do not hear of it, and random numbers stay where they were. (One behind the mixin
        does: a library's clears there what it has gathered.)

        As in training, also after it: outside, `bf16_full_eval` would cast the model that is about to be saved.
        """
        if not self.evaluates:
            return None
        evaluate = self.trainer.evaluate
        told = {} if self.ignored is None else {"ignore_keys": self.ignored}
        with self._unseen():
            if self._holds_data:
                metrics = evaluate(**_taken(evaluate, told))
            else:
                metrics = self._evaluated_by_itself(evaluate, told)
        if self._nothing_to_evaluate and not self._holds_data:
            return None
        # an evaluate of the user's own may leave its metrics to the main process
        asked = self.metric_name if self.metric_asked_for else None
        return from_main(numbers_of(metrics or {}, asked, self._no_numbers), self.accelerator)

    def _evaluated_by_itself(self, evaluate: Callable[..., Any], told: Mapping[str, Any]) -> Any:
        """What a subclass returns that has no eval_dataset: it may have data of its own, or need one after all.

        Raises:
            RMTKDError: it needs one, and the recipe compares metrics.
        """
        try:
            return evaluate(**_taken(evaluate, told))
        except (ValueError, TypeError, AttributeError) as error:
            compared = [name for name in COMPARING if getattr(self.trainer.rmtkd_config, name) is not None]
            if compared:
                raise RMTKDError(
                    f"{compared[0]} is about validation metrics, and evaluate() without an eval_dataset ends with "
                    f"{type(error).__name__} ({error}). Pass eval_dataset."
                ) from error
            self._nothing_to_evaluate = True
            if "eval_dataset" not in str(error):
                words = "evaluate() without an eval_dataset ends with %s (%s): the stages are judged without it."
                logger.warning(words, type(error).__name__, error)
            return None

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        trainer = self.trainer
        handler, state, in_train = trainer.callback_handler, trainer.state, trainer.is_in_train
        callbacks, handler.callbacks = handler.callbacks, []
        history, state.log_history = state.log_history, list(state.log_history)
        trainer.is_in_train = True
        try:
            with instead(trainer, log=trainer._log_of_the_run):
                yield
        finally:
            handler.callbacks, state.log_history = callbacks, history
            trainer.is_in_train = in_train

    # -- calibration --------------------------------------------------------------------------------------------------

    @property
    def stream(self) -> Stream | None:
        """The first rows of a train_dataset that is iterated; None where it is indexed."""
        dataset = self.trainer.train_dataset
        if self._stream is None and dataset is not None and is_stream(dataset):
            self._stream = Stream(dataset, self.trainer.rmtkd_config.seed)
        return self._stream

    def forget_data(self) -> None:
        """The training data may be others the next time."""
        self._stream, self._loaded = None, None

    def keep_stream(self) -> None:
        """Forget a stream over other data than the trainer's."""
        if self._stream is not None and self._stream.dataset is not self.trainer.train_dataset:
            self._stream = None

    def calibration_batches(self, samples: int | None = None, strip: bool = True) -> Iterable[dict[str, Any]]:
        """This process's share of the calibration data, the same in every pass: the rows and the collator of
        `get_train_dataloader`, a subclass's own included.

        Args:
            samples: how many; None: `calibration_samples`.
            strip: without what is there for the teacher, or a loss of the user's own, alone.
        """
        trainer, config = self.trainer, self.trainer.rmtkd_config
        wanted = config.calibration_samples if samples is None else samples
        chosen, collate, size = self._rows(wanted)
        return CalibrationBatches(
            chosen,
            collate,
            size,
            seed=config.seed,
            process_index=trainer.args.process_index,
            num_processes=trainer.args.world_size,
            prepare=lambda batch: self._read(batch, strip),
        )

    def _read(self, batch: Mapping[str, Any], strip: bool) -> Mapping[str, Any]:
        batch = self.inside.read(batch)
        return self.trainer._prepare_inputs(self.columns.for_calibration(batch) if strip else batch)

    def a_batch(self) -> dict[str, Any]:
        """One batch as the trainer's loss takes it."""
        rows, collate, size = self._rows(self.trainer.args.per_device_eval_batch_size)
        return self.trainer._prepare_inputs(next(iter(CalibrationBatches(rows, collate, size))))

    @property
    def own_loader(self) -> bool:
        """Whether a subclass makes the loader of the training data."""
        return self._overrides("get_train_dataloader")

    def _rows(self, wanted: int) -> tuple[Any, Any, int]:
        """(rows, their collator, rows a batch): no more than fit where gradients are taken."""
        trainer, seed = self.trainer, self.trainer.rmtkd_config.seed
        size = min(trainer._train_batch_size, trainer.args.per_device_eval_batch_size)
        if self.own_loader:
            return self._rows_of_loader(wanted, size)
        dataset, collate = trainer.train_dataset, trainer.data_collator
        if self.stream is not None:
            collate = trainer._get_collator_with_removed_columns(collate, description="calibration")
            return self.stream.samples(wanted), collate, size
        if is_hf_dataset(dataset):
            dataset = trainer._remove_unused_columns(dataset, description="calibration")
        else:
            collate = trainer._get_collator_with_removed_columns(collate, description="calibration")
        return pick_samples(dataset, wanted, seed), collate, size

    def _rows_of_loader(self, wanted: int, size: int) -> tuple[Any, Any, int]:
        """The same of a loader that the user makes: its rows and collator where it has them, else its batches."""
        with isolated_rng(self.trainer.rmtkd_config.seed):
            if self._loaded is None:
                self._loaded = (self._train_loader(), [])
            loader, held = self._loaded
            rows = getattr(loader, "dataset", None)
            indexed = hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
            mixed = not isinstance(rows, ConcatDataset)  # else its batches may be of one part each
            whole = getattr(loader, "batch_size", 0) is None and getattr(loader, "batch_sampler", 0) is None
            if indexed and mixed and hasattr(loader, "collate_fn") and not whole:  # else its rows are batches
                return pick_samples(rows, wanted, self.trainer.rmtkd_config.seed), loader.collate_fn, size
            if sum(map(batch_size, held)) < wanted:
                if held:  # from the first row on: what was asked before may be one generator, and used up
                    loader = self._train_loader()
                held = list(_until(loader, wanted))
                self._loaded = (loader, held)
        # Each process's loader gives it batches of its own: they are not dealt out again.
        processes = self.trainer.args.world_size
        return [batch for batch in held for _ in range(processes)], lambda batches: batches[0], 1

    def _train_loader(self) -> Any:
        """A loader that the user makes.

        Raises:
            RMTKDError: its data can be read once: the rows that calibrate would be missing in training.
        """
        loader = self.trainer.get_train_dataloader()
        if isinstance(getattr(loader, "dataset", None), IterableDataset):
            rewindable(loader.dataset, self.trainer.rmtkd_config.seed, "get_train_dataloader()")
        return loader

    # -- changing the model -------------------------------------------------------------------------------------------

    def take_back(self) -> None:
        """A training begins, with a model that may be held from an earlier one."""

    def hand_over(self, checkpoint: str | None) -> None:
        """The trainer is about to have its model prepared. What is held by several processes afterwards takes up a
        checkpoint now, as a plain model does."""

    def install(self, replacement: nn.Module, prepare: bool = True) -> None:
        trainer, wrapped = self.trainer, self.trainer.model_wrapped
        fresh = None if trainer.optimizer_was_given else self._fresh_groups
        install(self.model, replacement, trainer.optimizer, fresh)
        follow_groups(trainer.lr_scheduler)
        self.inside.follow()
        enable_checkpointing(self.model, trainer.args)
        self._add_noise()
        if prepare:
            live = lambda: trainer.model_wrapped  # noqa: E731
            trainer.model_wrapped = rewrapped(trainer.accelerator, trainer.model, wrapped, live)
        else:
            trainer.model_wrapped = trainer.model
        trainer.callback_handler.model = trainer.model

    def _fresh_groups(self) -> list[dict[str, Any]]:
        """The groups, in the very order, that `create_optimizer` would make now: what a resumed run will load into."""
        trainer = self.trainer
        kept, trainer.optimizer = trainer.optimizer, None
        try:
            return raw_optimizer(trainer.create_optimizer()).param_groups
        finally:
            trainer.optimizer = kept

    def _add_noise(self) -> None:
        """NEFTune's hook, on the new embeddings."""
        trainer = self.trainer
        if getattr(trainer, "neftune_noise_alpha", None) is not None and hasattr(trainer, "neftune_hook_handle"):
            from transformers.integrations.neftune import activate_neftune

            trainer.neftune_hook_handle = activate_neftune(
                trainer.model, trainer.neftune_noise_alpha, trainer.accelerator
            )

    def forget_moments(self) -> None:
        forget_moments(self.trainer.optimizer)
        self.patience.renew()  # it does not count what was undone

    def reschedule(self) -> None:
        scheduler = self.trainer.lr_scheduler
        if not self.trainer.schedule_is_known or scheduler is None:
            return
        factors = [shape(scheduler.last_epoch) for shape in scheduler.lr_lambdas]
        rates = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def model_changed(self) -> None:
        # A metric of the larger network must not win `load_best_model_at_end`.
        state = self.trainer.state
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        self.patience.renew()
        count_anew(self.trainer.lr_scheduler)

    def log(self, logs: Mapping[str, float]) -> None:
        self.trainer.log(dict(logs))


def judged_by(args: Any) -> str:
    """Key of the validation metric that judges the stages: `metric_for_best_model`, else the loss."""
    name = args.metric_for_best_model or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def _taken(function: Callable, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a function has a place for."""
    places = inspect.signature(function).parameters
    if any(place.kind is place.VAR_KEYWORD for place in places.values()):
        return dict(arguments)
    return {name: value for name, value in arguments.items() if name in places}


def _until(loader: Iterable[Any], wanted: int) -> Iterator[Any]:
    """Batches of so many samples together, or all there are."""
    seen = 0
    for batch in loader:
        yield batch
        seen += batch_size(batch)
        if seen >= wanted:
            return
