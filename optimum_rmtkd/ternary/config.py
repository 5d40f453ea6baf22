"""The recipe of a ternary network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..errors import RMTKDError
from ..recipe import Recipe
from ..recipe import option as _option
from ..validation import Count, Interval, Length, Positive, Seed


__all__ = ["TernaryConfig"]


@dataclass(frozen=True)
class TernaryConfig(Recipe):
    """What the ternary network looks like, and how its constants and its readout are found.

    Raises:
        RMTKDError: a value outside its range, or contradictory values; the message says what was got and expected.
    """

    # The network
    hidden: Annotated[tuple[Count, ...], Length(1)] = _option(
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
    levels: Annotated[int, Interval(2)] = _option(3, "Levels of the step function of min_shift, at least 3 for ReLU.")
    sparsity: Annotated[float, Interval(0, 1, "left", "a share of the weights")] = _option(
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
    ridge: Positive | None = _option(
        None, "Ridge of the readout, relative to the mean variance of the last features; None: by leave-one-out error."
    )
    calibration_samples: Annotated[int, Interval(2)] = _option(16384, "Rows of features used at most.")
    seed: Seed = _option(0, "Seed of the hidden weights.")

    def check_together(self) -> None:
        if self.weights == "trained" and self.storage not in ("base3", "2bit"):
            raise RMTKDError(f"storage={self.storage!r} keeps no trained ternary weights; expected 'base3' or '2bit'.")
        if self.weights == "trained" and self.mode != "weights_only":
            raise RMTKDError(
                f"mode={self.mode!r} matches the kernels of random weights; trained weights need mode='weights_only'."
            )
