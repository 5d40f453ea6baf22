"""One ternary network from features and targets: constants measured layer by layer, readout by ridge regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..errors import CalibrationError
from ..layers_rmtkd import CentredActivation, StepActivation, TernaryLinear, TernaryMLP
from ..spec_rmtkd import ACTIVATIONS, MOST_DRAWN, hidden_weights
from .config import TernaryConfig
from .configuration_ternary import TernaryMLPConfig
from .diagnostics import FeatureDiagnostics, diagnose, standardizer
from .functionals import Functionals, get_activation
from .kernels import kernel_coefficients
from .matching import match_layer, surrogate_derivative
from .modeling_ternary import TernaryMLPForClassification, TernaryMLPForRegression
from .packing import bits_per_weight, network_options, serialized_bytes
from .readout import fit_readout, probability_scale
from .report import LayerReport, TernaryReport


__all__ = ["as_model", "build_network"]

FEW_INPUTS = 30  # nonzero weights of a neuron below which its pre-activation is not near Gaussian
NARROW = 256  # width below which a draw of random features is mostly noise


@torch.no_grad()
def build_network(
    x: torch.Tensor, targets: torch.Tensor, config: TernaryConfig, labels: torch.Tensor | None = None
) -> tuple[TernaryMLP, TernaryReport]:
    """Random ternary layers whose constants come from data, and a readout by ridge regression.

    Layer after layer, t is measured on the features, the activation is matched at it, and its mean over the features
    is subtracted: in theory all that is known, but real features are no Gaussian mixture.

    Args:
        x: (n, p) raw features.
        targets: (n, outputs) fp64.
        labels: (n,) class indices where the targets are their one-hots: the readout's scores are then scaled to
            logits.

    Raises:
        CalibrationError: constant targets, features that nothing can be fitted to, or an activation that cannot be
            rebuilt.
        MatchingError: no step function matches the activation.
    """
    if not bool((targets != targets[:1]).any()):
        raise CalibrationError(f"The targets are the same for all {len(targets)} samples: there is nothing to fit.")
    if config.storage == "seed" and (drawn := hidden_weights(x.shape[1], config.hidden)) > MOST_DRAWN:
        raise CalibrationError(
            f"storage='seed' with {drawn:,} hidden weights: they are drawn again whenever the model is loaded, and "
            f"{MOST_DRAWN:,} are the most. Use storage='base3', or smaller hidden widths."
        )
    mean, factor = standardizer(x, config.standardize)
    factor = factor * math.sqrt(x.shape[1])  # the layers carry 1 / sqrt(fan-in): inputs have variance 1, not norm 1
    h = ((x.double() - mean) * factor).float()
    diagnostics = diagnose(h)
    layers, activations, options, records, functionals = [], [], [], [], []
    dense_t, activation = 1.0, get_activation(config.activation)
    for number, width in enumerate(config.hidden):
        layer = _drawn(h.shape[1], width, number, config)
        u = layer(h)
        t = float(u.double().square().mean().sqrt())
        if not t > 0:
            raise CalibrationError(
                f"Hidden layer {number + 1} is constant on these features: use less sparsity or more width."
            )
        target = activation.functionals(dense_t)
        module, record, found = _activation(config, dense_t, t, u, number == len(config.hidden) - 1)
        h = module(u)
        layers.append(layer)
        activations.append(module)
        options.append(record[0])
        records.append(LayerReport(width, dense_t, t, record[1], found.mean, record[2]))
        functionals.append((target, found))
        dense_t = math.sqrt(target.tau2)
    with torch.device("meta"):  # its own layers would be drawn once more, to be thrown away
        mlp = TernaryMLP(
            x.shape[1], targets.shape[1], config.hidden, options, config.storage, config.sparsity, config.seed
        ).eval()
    mlp.layers, mlp.activations = nn.ModuleList(layers).eval(), nn.ModuleList(activations).eval()
    mlp.readout = nn.Linear(h.shape[1], targets.shape[1])
    mlp.input_mean, mlp.input_factor = mean.float(), factor.float()
    fit = fit_readout(h, targets, config.ridge)
    scale = 1.0 if labels is None else probability_scale(fit.left_out, labels)
    mlp.readout.weight.copy_(fit.weight * scale)
    mlp.readout.bias.copy_(fit.bias * scale)
    dense, compressed = (kernel_coefficients([pair[i] for pair in functionals]) for i in (0, 1))
    return mlp, TernaryReport(
        mode=config.mode,
        storage=config.storage,
        layers=tuple(records),
        dense=asdict(dense),
        compressed=asdict(compressed),
        delta_ck=compressed.tau2 - dense.tau2,
        diagnostics=diagnostics.to_dict(),
        ridge=fit.ridge,
        error=fit.error,
        bytes=serialized_bytes(mlp),
        bits_per_weight=bits_per_weight(mlp),
        warnings=tuple(_warnings(config, diagnostics, x.shape[1], compressed.tau2 - dense.tau2, dense.tau2)),
    )


def _drawn(fan_in: int, width: int, number: int, config: TernaryConfig) -> TernaryLinear:
    """A fresh layer. Ternary weights follow from its seed; Gaussian ones of the dense twin come from torch's
    generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 * config.seed + number)
        return TernaryLinear(fan_in, width, config.storage, config.sparsity, config.seed, number)


def _activation(
    config: TernaryConfig, dense_t: float, t: float, u: torch.Tensor, last: bool
) -> tuple[nn.Module, tuple[dict[str, Any], float, float], Functionals]:
    """(module, (its options, mean before centring, residual), functionals at t)."""
    activation = get_activation(config.activation)
    if config.mode == "weights_only":
        if config.activation not in {*ACTIVATIONS, *ACT2FN}:
            raise CalibrationError(
                "A saved network is rebuilt from the name of its activation, and transformers has no "
                f"{config.activation!r}: register it under a name in transformers.activations.ACT2FN, or use "
                "mode='min_shift', which keeps the steps alone."
            )
        mean = float(activation(u).double().mean())
        options = {"name": config.activation, "mean": mean}
        return CentredActivation(**options), (options, mean, 0.0), activation.functionals(t)
    match = match_layer(activation, dense_t, t, config.mode, config.levels, last)
    mean = float(match.step(u).double().mean())
    step = match.step.shifted(-mean)
    slopes = surrogate_derivative(match).levels
    options = {"thresholds": list(step.thresholds), "levels": list(step.levels), "slopes": list(slopes)}
    return StepActivation(**options), (options, mean, match.residual), match.found


def _warnings(config: TernaryConfig, found: FeatureDiagnostics, p: int, delta: float, tau2: float) -> list[str]:
    sentences = found.warnings()
    narrow = min(config.hidden)
    if narrow < max(NARROW, p):
        sentences.append(
            f"The narrowest hidden layer has {narrow} neurons for p={p}: a draw of random features is then noisy, "
            f"{max(NARROW, p)} or more are expected."
        )
    inputs = (1 - config.sparsity) * min((p, *config.hidden[:-1]))
    if inputs < FEW_INPUTS:
        sentences.append(
            f"A neuron has {inputs:.0f} nonzero weights on average, below {FEW_INPUTS}: lower "
            f"sparsity={config.sparsity:g}."
        )
    if delta > tau2:
        sentences.append(
            f"The kernel's diagonal is shifted by {delta:.2f}, {delta / tau2:.1f} times its own: at finite width that "
            "is noise. Use weights_only, or more levels."
        )
    return sentences


def as_model(
    mlp: TernaryMLP,
    config: TernaryConfig,
    label_names: Sequence[str] | None = None,
    report: TernaryReport | None = None,
    regression: bool = False,
) -> PreTrainedModel:
    """A network as a model of its own, in eval mode."""
    kind = TernaryMLPForRegression if regression else TernaryMLPForClassification
    names = list(label_names) if label_names is not None else [f"LABEL_{i}" for i in range(mlp.out_features)]
    options = TernaryMLPConfig(
        network=network_options(mlp),
        recipe=config.to_dict(),
        report=None if report is None else report.to_dict(),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        problem_type="regression" if regression else "single_label_classification",
    )
    with torch.device("meta"):  # the network takes the place of its only part
        model = kind(options)
    model.mlp = mlp
    return model.eval()
