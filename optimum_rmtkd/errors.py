"""Named errors. Each message says what was got, what was expected and what to do."""

from __future__ import annotations


__all__ = [
    "BudgetError",
    "CalibrationError",
    "DiskFullError",
    "IncompleteCheckpointError",
    "LatencyError",
    "MatchingError",
    "NoTargetError",
    "RMTKDError",
    "SpecMismatchError",
    "UnsupportedArchitectureError",
    "check_matplotlib",
]


class RMTKDError(ValueError):
    """Base of every error this library raises on purpose."""


class UnsupportedArchitectureError(RMTKDError):
    """The model belongs to no registered family, or its family has no such site."""


class CalibrationError(RMTKDError):
    """The calibration data cannot carry a spectrum (none, all padding, non-finite, or labels missing), or the model
    cannot run on it."""


class BudgetError(RMTKDError):
    """The requested size cannot be reached; the message names the smallest one that can, and why."""


class NoTargetError(BudgetError):
    """No size was asked for, and the spectra do not say one.

    Attributes:
        message: what was found and what to do, on one line.
        curve: what sizes are predicted to cost, as a table of several lines.
    """

    def __init__(self, message: str, curve: str):
        super().__init__(message, curve)
        self.message, self.curve = message, curve

    def __str__(self) -> str:
        return f"{self.message}\n{self.curve}"


class LatencyError(BudgetError):
    """The requested time cannot be reached; the message names the shortest one that can, and at what setting."""


class MatchingError(RMTKDError):
    """No step function has the functionals that were asked for; the message names the residual and what would do."""


class SpecMismatchError(RMTKDError):
    """A checkpoint holds tensors that do not fit the widths its own config declares."""


class IncompleteCheckpointError(RMTKDError):
    """A checkpoint that no run can be continued from; the message names what is missing, and an intact one."""


class DiskFullError(RMTKDError):
    """A disk has no room for what was to be written; the message names the disk, the bytes wanted and those free."""


def check_matplotlib() -> None:
    """
    Raises:
        RMTKDError: matplotlib (the extra `report`) is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RMTKDError('Figures need matplotlib: pip install "optimum-rmtkd[report]".') from error
