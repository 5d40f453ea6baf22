"""What a run may ask of whoever trains, and nothing else of it.

`RMTKDMixin` (any Trainer) and `RMTKDLoop` (a loop with Accelerate) are hosts; a test's may have twenty lines.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch import nn

from .columns import Columns


__all__ = ["Host"]


@runtime_checkable
class Host(Protocol):
    """Whoever trains the model of a `Run`.

    Attributes:
        model: under training, without wrappers. `install` changes its inside; where it is sharded over processes, it
            is another object afterwards.
        accelerator: the processes of the run: their number, sums over them, autocast.
        step, max_steps: optimizer steps done, and in the whole run.
        metric_name, greater_is_better: key among the values of `measure` that judges the stages, and its direction.
        metric_asked_for: the user named that metric, so that it must be there.
        validation_rows: rows of the validation data; None where unknown.
        label_names: entries of a batch that are labels.
        optimizer: of the model; None before training.
        columns: what of a batch reaches the student.
        rate: peak learning rate of the run, as the user gave it; None where it is not the host's to change.
        follows_phases: the learning rate follows the `phases` of a run.
        loss_name: key of the loss among the values of `measure`.
        shows_progress: bars are wanted.
        folder: where journal and spectra go; None on a process that writes nothing.
    """

    model: nn.Module
    accelerator: Any
    step: int
    max_steps: int
    metric_name: str
    greater_is_better: bool
    metric_asked_for: bool
    validation_rows: int | None
    label_names: Iterable[str]
    optimizer: Any
    columns: Columns
    rate: float | None
    follows_phases: bool
    loss_name: str
    shows_progress: bool
    folder: str | None

    def measure(self) -> dict[str, float] | None:
        """Every metric of the validation data now, and no trace of it in the training; None without such data."""

    def looks(self) -> int:
        """Steps between two looks at a metric that has not come back yet."""

    def calibration_batches(self, samples: int | None = None, strip: bool = True) -> Iterable[dict[str, Any]]:
        """This process's share of the calibration data, the same in every pass; see `data.CalibrationBatches`."""

    def install(self, replacement: nn.Module, prepare: bool = True) -> None:
        """Give `model` the inside of `replacement`, optimizer and wrappers included."""

    def forget_moments(self) -> None:
        """Drop the optimizer's state: the weights were put back to an earlier moment."""

    def reschedule(self) -> None:
        """The run's `phases` have changed: the learning rate follows them from here on."""

    def log(self, logs: dict[str, float]) -> None:
        """One line in the training log."""

    def model_changed(self) -> None:
        """A model of another size is under training: patience and the best checkpoint begin anew."""
