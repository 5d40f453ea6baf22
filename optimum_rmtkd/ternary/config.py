"""The recipe of a ternary network."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..config import _option
from ..errors import RMTKDError


__all__ = ["TernaryConfig"]


@dataclass(frozen=True)
class TernaryConfig:
    """What the ternary network looks like, and how its constants and its readout are found.

    Raises:
        RMTKDError: a value outside its range, or contradictory values; the message says what was got and expected.
    """

    # The network
    hidden: tuple[int, ...] = _option(
        (1000, 1000, 1000), "Widths of the hidden layers. Wide: they are random features."
    )
    activation: str = _option(
        "relu",
        "Activation of the dense network that is stood in for: relu, leaky_relu, erf, cos, sign, gelu, tanh, silu, or "
        "a registered one.",
    )
    mode: str = _option(
        "weights_only",
        "What becomes cheap. weights_only: the weights, the activation stays. min_shift: also the activation, a step "
        "function of `levels` steps with matched kernels; costs accuracy. two_level, paper: the paper's, for "
        "reproduction.",
        ("weights_only", "min_shift", "two_level", "paper"),
    )
    levels: int = _option(3, "Levels of the step function of min_shift, at least 3 for ReLU.")
    sparsity: float = _option(
        0.5,
        "Share of hidden weights that are 0, in [0, 1). It makes neither the file smaller nor the network faster "
        "here; low values lose less at small widths.",
    )

    # The weights
    weights: str = _option(
        "random",
        "random: hidden weights are drawn, only the readout is fitted. trained: those of a trained network are "
        "rounded, and can be trained on.",
        ("random", "trained"),
    )
    scale: str = _option(
        "matched",
        "Start of the scale of trained weights. matched: the variance of each layer's weights is kept, and with it "
        "the kernels. mean_abs: their mean absolute value.",
        ("matched", "mean_abs"),
    )
    storage: str = _option(
        "base3",
        "base3: 1.6 bits a hidden weight. 2bit: 2 bits. seed: none, random weights are drawn again when loading. "
        "dense: for comparison, Gaussian weights that are not ternary at all.",
        ("base3", "2bit", "seed", "dense"),
    )

    # The data
    standardize: str = _option(
        "global",
        "Of the inputs, after centring. global: one factor for all features. feature: each feature to unit variance.",
        ("global", "feature"),
    )
    targets: str = _option(
        "outputs",
        "What a replaced part of a model is fitted to: outputs (of the part itself; needs no labels) or labels.",
        ("outputs", "labels"),
    )
    ridge: float | None = _option(
        None, "Ridge of the readout, relative to the mean variance of the last features; None: by leave-one-out error."
    )
    calibration_samples: int = _option(16384, "Rows of features used at most.")
    seed: int = _option(0, "Seed of the hidden weights.")

    def __post_init__(self):
        widths = (self.hidden,) if isinstance(self.hidden, int) else tuple(self.hidden)
        object.__setattr__(self, "hidden", widths)
        for item in dataclasses.fields(self):
            choices = item.metadata.get("choices")
            if choices and getattr(self, item.name) not in choices:
                raise RMTKDError(f"{item.name}={getattr(self, item.name)!r}: expected one of {', '.join(choices)}.")
        if not widths or not all(isinstance(w, int) and not isinstance(w, bool) and w > 0 for w in widths):
            raise RMTKDError(
                f"hidden={widths!r}: expected the width of one hidden layer or more, for example (1000, 1000)."
            )
        if not 0 <= self.sparsity < 1:
            raise RMTKDError(f"sparsity={self.sparsity}: expected a share of weights, in [0, 1).")
        if self.ridge is not None and not self.ridge > 0:
            raise RMTKDError(f"ridge={self.ridge}: expected a number above 0, or None.")
        for name, least in (("levels", 2), ("calibration_samples", 2)):
            if getattr(self, name) < least:
                raise RMTKDError(f"{name}={getattr(self, name)}: expected at least {least}.")
        if self.weights == "trained" and self.storage not in ("base3", "2bit"):
            raise RMTKDError(f"storage={self.storage!r} keeps no trained ternary weights; expected 'base3' or '2bit'.")
        if self.weights == "trained" and self.mode != "weights_only":
            raise RMTKDError(
                f"mode={self.mode!r} matches the kernels of random weights; trained weights need mode='weights_only'."
            )

    def replace(self, **changes: Any) -> TernaryConfig:
        """A copy with some fields changed, validated again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able dictionary of every field."""
        return {**dataclasses.asdict(self), "hidden": list(self.hidden)}
