"""What a run may ask of whoever trains, and nothing else of it: what is trained, measured and written.

`RMTKDMixin` (any Trainer) and `RMTKDLoop` (a loop with Accelerate) are hosts; a test's may have twenty lines. A part
of a run that needs one side alone asks for that side.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from torch import nn

from .columns import Columns


__all__ = ["Host", "Measuring", "Training", "Writing"]


class Training(Protocol):
    """The model under training, and how it is trained.

    Attributes:
        model: without wrappers. `install` changes its inside; where it is sharded over processes, it is another object
            afterwards.
        accelerator: the processes of the run: their number, sums over them, autocast.
        step, max_steps: optimizer steps done, and in the whole run.
        optimizer: of the model; None before training.
        rate: peak learning rate of the run, as the user gave it; None where it is not the host's to change.
        follows_phases: the learning rate follows the `phases` of a run.
    """

    model: nn.Module
    accelerator: Any
    step: int
    max_steps: int
    optimizer: Any
    rate: float | None
    follows_phases: bool

    def install(self, replacement: nn.Module, prepare: bool = True) -> None:
        """Give `model` the inside of `replacement`, optimizer and wrappers included."""

    def forget_moments(self) -> None:
        """Drop the optimizer's state: the weights were put back to an earlier moment, from which patience counts."""

    def reschedule(self) -> None:
        """The run's `phases` have changed: the learning rate follows them from here on."""

    def model_changed(self) -> None:
        """A model of another size is under training: patience and the best checkpoint begin anew."""


class Measuring(Protocol):
    """The data that a run looks at: what calibrates its cuts, and what judges them.

    Attributes:
        label_names: entries of a batch that are labels.
        columns: what of a batch reaches the student.
        metric_name, greater_is_better: key among the values of `measure` that judges the stages, and its direction.
        metric_asked_for: the user named that metric, so that it must be there; what is no number is NaN then.
        loss_name: key of the loss among those values.
        validation_rows: rows of the validation data; None where unknown.
    """

    label_names: Iterable[str]
    columns: Columns
    metric_name: str
    greater_is_better: bool
    metric_asked_for: bool
    loss_name: str
    validation_rows: int | None

    def calibration_batches(self, samples: int | None = None, strip: bool = True) -> Iterable[dict[str, Any]]:
        """This process's share of the calibration data, the same in every pass; see `data.CalibrationBatches`."""

    def measure(self) -> dict[str, float] | None:
        """Every metric of the validation data now, and no trace of it in the training; None without such data."""

    def looks(self) -> int:
        """Steps between two looks at a metric that has not come back yet."""


class Writing(Protocol):
    """What the user reads.

    Attributes:
        shows_progress: bars are wanted.
        folder: where journal and spectra go; None on a process that writes nothing.
    """

    shows_progress: bool
    folder: str | None

    def log(self, logs: dict[str, float]) -> None:
        """One line in the training log."""


@runtime_checkable
class Host(Training, Measuring, Writing, Protocol):
    """Whoever trains the model of a `Run`."""
