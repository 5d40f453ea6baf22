"""Trained weights, rounded to three values: a start for straight-through training.

The paper draws its hidden weights and trains none. Here the weights of a trained network are the latent weights of a
ternary one. They are rounded in every forward pass, and gradients go straight through (Bengio et al. 2013); one scale
a layer is trained along. `packing.pack_model` makes the rounding final.

Where a layer's scale starts: "matched" keeps the second moment of its weights, s = rms(W) / sqrt(share of nonzeros),
and with it the variance of every pre-activation that the kernels depend on; "mean_abs", the usual one, is the mean of
|W|.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..batches import evaluating
from ..errors import CalibrationError, UnsupportedArchitectureError
from ..layers_rmtkd import TernaryLinear, TernaryMLP
from .build import as_model
from .config import TernaryConfig
from .diagnostics import diagnose, standardizer
from .functionals import activation_names, get_activation
from .packing import bits_per_weight, convert, serialized_bytes
from .report import TernaryReport


__all__ = ["ternarize", "ternarize_module", "wrap"]

PROBES = 256  # rows on which a network is read
TOLERANCE = 1e-4  # of its outputs, relative: a network read rightly agrees to rounding


def ternarize(
    network: nn.Module,
    x: Any,
    config: TernaryConfig | None = None,
    label_names: Sequence[str] | None = None,
    regression: bool = False,
) -> tuple[PreTrainedModel, TernaryReport]:
    """A ternary model with the weights of a trained fully-connected network, ready to be trained on.

    Train it like any model, best with the network as teacher: `RMTKDTrainer(model=..., teacher_model=wrap(network, x),
    rmtkd_config=RMTKDConfig(schedule="none", hidden_weight=0), ...)`. Then `pack_model(model)`.

    Args:
        network: linear layers with one element-wise activation between two; called on (n, p).
        x: (n, p) features, as the network takes them.
        config: its `hidden` and `activation` are not used, the network has its own. None:
            `TernaryConfig(weights="trained")`.

    Returns:
        (TernaryMLPForClassification or TernaryMLPForRegression with storage "latent", what was done). Sizes in the
        report are those after packing.

    Raises:
        UnsupportedArchitectureError: no such network.
        RMTKDError: a mode or storage that is for random weights only.
    """
    config = (config or TernaryConfig()).replace(weights="trained")
    mlp, report = ternarize_module(network, torch.as_tensor(x).float(), config)
    return as_model(mlp, config, label_names, report, regression), report


@torch.no_grad()
def ternarize_module(module: nn.Module, x: torch.Tensor, config: TernaryConfig) -> tuple[TernaryMLP, TernaryReport]:
    """As `ternarize`, for a part of a model: (the network with storage "latent", what was done)."""
    linears, activations = read_network(module, x)
    mlp = _skeleton(linears, activations, "latent", config)
    for layer, linear in zip(mlp.layers, linears, strict=False):
        start_from(layer, linear, config.sparsity, config.scale)
    packed = convert(mlp, config.storage)
    mean, factor = standardizer(x, config.standardize)
    diagnostics = diagnose((x.double() - mean) * factor)
    report = TernaryReport(
        mode=config.mode,
        storage=config.storage,
        layers=(),
        dense={},
        compressed={},
        delta_ck=0.0,
        diagnostics=diagnostics.to_dict(),
        ridge=None,
        error=None,
        bytes=serialized_bytes(packed),
        bits_per_weight=bits_per_weight(packed),
    )
    return mlp.eval(), report


def wrap(
    network: nn.Module, x: Any, label_names: Sequence[str] | None = None, regression: bool = False
) -> PreTrainedModel:
    """A trained fully-connected network as a model that saves, reloads and teaches: nothing is rounded.

    Args and errors: as `ternarize`.
    """
    config = TernaryConfig(storage="dense")
    with torch.no_grad():
        linears, activations = read_network(network, torch.as_tensor(x).float())
        mlp = _skeleton(linears, activations, "dense", config)
        for layer, linear in zip(mlp.layers, linears, strict=False):
            layer.latent.copy_(linear.weight)
            if linear.bias is not None:
                layer.bias.copy_(linear.bias)
    return as_model(mlp.eval(), config, label_names, regression=regression)


def _skeleton(linears: list[nn.Linear], activations: list[str], storage: str, config: TernaryConfig) -> TernaryMLP:
    """A network of the shape of the one that was read, its readout and nothing else copied."""
    mlp = TernaryMLP(
        in_features=linears[0].in_features,
        out_features=linears[-1].out_features,
        hidden=[linear.out_features for linear in linears[:-1]],
        activations=[{"name": name, "mean": 0.0} for name in activations],
        storage=storage,
        sparsity=config.sparsity,
        seed=config.seed,
        bias=True,
    )
    mlp.readout.weight.copy_(linears[-1].weight)
    mlp.readout.bias.copy_(torch.zeros(()) if linears[-1].bias is None else linears[-1].bias)
    return mlp


def start_from(layer: TernaryLinear, linear: nn.Linear, sparsity: float, scale: str) -> None:
    """Give a latent layer the weights of a dense one: the smallest `sparsity` of them will be rounded to 0."""
    weight = linear.weight.detach().float().cpu()
    size = weight.abs().reshape(-1)
    small = round(sparsity * len(size))
    threshold = size.kthvalue(small).values if small else size.new_zeros(())
    nonzero = (size > threshold).float().mean().clamp_min(1 / len(size))
    start = (size.square().mean() / nonzero).sqrt() if scale == "matched" else size.mean()
    layer.latent.copy_(weight)
    layer.threshold.fill_(threshold)
    layer.log_scale.fill_(start.clamp_min(1e-12).log())
    if linear.bias is not None:
        layer.bias.copy_(linear.bias)


def read_network(module: nn.Module, x: torch.Tensor) -> tuple[list[nn.Linear], list[str]]:
    """Linear layers of a fully-connected network in the order of their calls, and the activations between them.

    What it is, is not read from its code: every activation known is tried on what flows between two layers.

    Raises:
        CalibrationError: nothing that a network could be read on.
        UnsupportedArchitectureError: something else than linear layers with one known activation between two.
    """
    if len(x) == 0:
        raise CalibrationError("No features: the network is read by running it on some.")
    calls: list[tuple[nn.Linear, torch.Tensor, torch.Tensor]] = []
    inner = [m for m in module.modules() if isinstance(m, nn.Linear)]
    handles = [
        m.register_forward_hook(lambda m, args, out: calls.append((m, args[0].clone(), out.clone()))) for m in inner
    ]
    place = next(module.parameters())
    probe = x[:PROBES].to(device=place.device, dtype=place.dtype)
    try:
        with evaluating(module):
            output = module(probe)
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) < 2 or len({id(call[0]) for call in calls}) < len(calls):
        raise UnsupportedArchitectureError(
            f"{type(module).__name__}: its forward pass calls linear layers {len(calls)} time(s); weights='trained' "
            "needs two or more of them, each called once: hidden ones and a readout. Use weights='random', which "
            "replaces anything."
        )
    if not (_close(calls[0][1], probe) and _close(calls[-1][2], output)):
        raise UnsupportedArchitectureError(
            f"{type(module).__name__} does more than linear layers and activations (before the first or after the "
            "last layer): use weights='random', or choose a part inside it."
        )
    names = [_activation_between(a[2], b[1], number) for number, (a, b) in enumerate(zip(calls, calls[1:]), start=1)]
    return [call[0] for call in calls], names


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value of `b`; infinite where the shapes differ."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) if a.shape == b.shape else float("inf")


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return _distance(a, b) <= TOLERANCE


def _activation_between(before: torch.Tensor, after: torch.Tensor, number: int) -> str:
    # the nearest, not the first: on large inputs, gelu and gelu_new are both within the tolerance
    misses = {name: _distance(get_activation(name)(before), after) for name in activation_names()}
    nearest = min(misses, key=misses.get)
    if misses[nearest] <= TOLERANCE:
        return nearest
    raise UnsupportedArchitectureError(
        f"What stands between linear layers {number} and {number + 1} is none of {', '.join(activation_names())}: use "
        "weights='random', or register_activation."
    )
