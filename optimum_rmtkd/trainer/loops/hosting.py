"""The `Host` that a loop with Accelerate is. Knows what Accelerate prepared, and what it means for a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import find_labels

from ...config import RMTKDConfig
from ...distillation import Teacher
from ...errors import RMTKDError
from ...surgery.processes import from_main
from ..columns import Columns
from ..data import CalibrationBatches, pick_samples
from ..evaluations import numbers_of
from ..stream import Stream, is_stream, rewindable
from ..swap import adam_rate, forget_moments, install, renew_wrapper
from ..verdicts import greater_is_better
from .schedules import LoopSchedule


__all__ = ["LoopHost"]

FALLBACK = "loss"  # judges the stages where no metric was named
UNKNOWN_SIZE = 8  # rows a calibration batch, where a batch_sampler of the user's own does not say


class LoopHost:
    """A `Host` over an accelerator and what it prepared.

    Attributes:
        wrapped: the model as the user holds it.
        evaluate: gives the metrics of the validation data; None without such data.
        own_loss: the task's loss is computed by the user, from columns that no model may take.
        teacher: that was passed in.
    """

    metric_name = FALLBACK

    def __init__(
        self,
        accelerator: Any,
        wrapped: nn.Module,
        optimizer: Any,
        loader: Any,
        config: RMTKDConfig,
        max_steps: int,
        evaluate: Callable[[], Mapping[str, Any]] | None,
        folder: str | None,
        own_loss: bool,
    ):
        self.accelerator, self.wrapped, self.optimizer, self.loader = accelerator, wrapped, optimizer, loader
        self.model = accelerator.unwrap_model(wrapped)
        self.config, self.max_steps, self.evaluate, self.own_loss = config, max_steps, evaluate, own_loss
        self.folder = str(folder) if folder is not None and accelerator.is_main_process else None
        self.label_names = tuple(find_labels(type(self.model))) or ("labels",)
        self.shows_progress = accelerator.is_local_main_process
        self.step = 0
        self.validation_rows: int | None = None
        self.teacher: Teacher | None = None
        self.schedule: LoopSchedule | None = None
        self._asked: str | None = None
        self._no_numbers: set[str] = set()
        self._greater: bool | None = None
        self._stream: Stream | None = None

    # -- what a run reads ---------------------------------------------------------------------------------------------

    def judge_by(self, name: str | None, greater_is_better: bool | None) -> None:
        """Name the metric that judges the stages; None: the loss, if there is one."""
        self._asked, self._greater = name, greater_is_better
        self.metric_name = FALLBACK if name is None else name

    @property
    def greater_is_better(self) -> bool:
        known = greater_is_better(self.metric_name)
        return known if self._greater is None else self._greater

    @property
    def metric_asked_for(self) -> bool:
        return self._asked is not None

    @property
    def columns(self) -> Columns:
        return Columns(self.model, self.teacher, self.label_names, own_loss=self.own_loss)

    @property
    def rate(self) -> float | None:
        """None where the schedule stays the user's own, or the optimizer is not of Adam's kind: what is known of rates
        was measured with it."""
        if self.schedule is None or not self.schedule.known:
            return None
        return adam_rate(self.optimizer)

    @property
    def follows_phases(self) -> bool:
        return self.schedule is not None and self.schedule.known

    @property
    def loss_name(self) -> str:
        return "eval_loss" if self.metric_name.startswith("eval_") else "loss"

    @property
    def within_epoch(self) -> bool:
        """Whether the script has batches of the training data to come before it begins with them anew."""
        active = self._active()
        return active is not None and not active.end_of_dataloader

    @property
    def ends_epoch(self) -> bool:
        """Whether the batch at hand is the last one before the script begins with them anew."""
        active = self._active()
        return active is not None and active.end_of_dataloader

    def _active(self) -> Any:
        """The loader that the script runs through now, where it is one of the training data."""
        active = self.accelerator.gradient_state.active_dataloader
        return active if getattr(active, "dataset", None) is self.loader.dataset else None

    def looks(self) -> int:
        return max(1, self.max_steps // 20)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def measure(self) -> dict[str, float] | None:
        """What the user's `evaluate` returns; in several processes what it returned on the first one, or they would
        part ways. The modes of the modules and Accelerate's place in the training data stay as they were.

        Raises:
            RMTKDError: something else than metrics by name.
        """
        if self.evaluate is None:
            return None
        with torch.no_grad(), self._undisturbed():
            given = self.evaluate()
        if not isinstance(given, Mapping):
            raise RMTKDError(
                f"evaluate() returned a {type(given).__name__}; expected the metrics by name, such as "
                '{"accuracy": 0.91, "loss": 0.27}.'
            )
        found = numbers_of({str(name): value for name, value in given.items()}, self._asked, self._no_numbers)
        found = from_main(found, self.accelerator)
        asked = FALLBACK if self._asked is None else self._asked
        names = (asked, f"eval_{asked}", asked.removeprefix("eval_"))
        self.metric_name = next((name for name in names if name in found), asked)
        return found

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        state = self.accelerator.gradient_state
        modes = [(module, module.training) for module in self.wrapped.modules()]
        known = list(state.dataloader_references)
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            state.dataloader_references = known  # an evaluation that breaks off would leave its own

    # -- calibration --------------------------------------------------------------------------------------------------

    def calibration_batches(self, samples: int | None = None, strip: bool = True) -> Iterable[dict[str, Any]]:
        """This process's share of the calibration data, the same in every pass: rows of the training loader, through
        its `collate_fn`.

        Args:
            samples: how many; None: `calibration_samples`.
            strip: without what is there for the teacher, or a loss of the user's own, alone.
        """
        from accelerate.utils import send_to_device

        device = next(self.model.parameters()).device
        rows = self._rows(self.config.calibration_samples if samples is None else samples)
        collate, size = self.loader.collate_fn, self.loader.batch_size
        if size is None and getattr(self.loader, "batch_sampler", None) is None:  # its rows are batches
            collate, size = (lambda rows, one=collate: one(rows[0])), 1
        return CalibrationBatches(
            rows,
            collate,
            size or getattr(self.loader.batch_sampler, "batch_size", None) or UNKNOWN_SIZE,
            seed=self.config.seed,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            prepare=lambda batch: send_to_device(self.columns.for_calibration(batch) if strip else batch, device),
        )

    def _rows(self, wanted: int) -> Any:
        dataset = self.loader.dataset
        if not is_stream(dataset):
            return pick_samples(dataset, wanted, self.config.seed)
        if self._stream is None:
            held = max(wanted, self.config.calibration_samples)
            self._stream = rewindable(dataset, self.config.seed, "train_dataloader", held)
        return self._stream.samples(wanted)

    # -- changing the model -------------------------------------------------------------------------------------------

    def install(self, replacement: nn.Module, prepare: bool = True) -> None:
        install(self.model, replacement, self.optimizer)
        renew_wrapper(self.accelerator, self.model, self.wrapped)

    def forget_moments(self) -> None:
        forget_moments(self.optimizer)

    def reschedule(self) -> None:
        if self.schedule is not None:
            self.schedule.follow()

    def model_changed(self) -> None:
        """Nothing: patience and the best checkpoint are the script's."""

    def log(self, logs: Mapping[str, float]) -> None:
        self.accelerator.log(dict(logs), step=self.step)
