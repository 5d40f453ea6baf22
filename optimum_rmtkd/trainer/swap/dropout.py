"""Dropout of a model, off and on again."""

from __future__ import annotations

from torch import nn


__all__ = ["DropoutSwitch"]


class DropoutSwitch:
    """Turns the dropout of a model off, and on again.

    Both places where transformers keeps it are covered: `nn.Dropout` modules and float attributes of modules such as
    `attention_dropout` or `drop_prob`. The config is never touched: a reduced checkpoint that is fine-tuned later
    trains with the dropout its authors chose, and `restore` gives the model back to the user as it came.
    """

    def __init__(self):
        self._saved: list[tuple[nn.Module, str, float]] = []

    def disable(self, model: nn.Module) -> None:
        """Set every rate of `model` to 0, remembering it."""
        for module in model.modules():
            names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
            names += [n for n, v in vars(module).items() if "drop" in n and isinstance(v, float)]
            for name in names:
                if rate := getattr(module, name):
                    self._saved.append((module, name, rate))
                    setattr(module, name, 0.0)

    def restore(self) -> None:
        """Put back every rate that `disable` set to 0."""
        for module, name, rate in self._saved:
            setattr(module, name, rate)
        self._saved.clear()
