"""Storage of ternary weights: conversions, and sizes as they are on disk.

The codes themselves live in `layers_rmtkd.py`, which every saved repository carries; they are re-exported here.

    base3    5 trits a byte (3^5 = 243 <= 256): 1.6 bits a weight
    2bit     4 trits a byte: 2 bits
    seed     a checksum: the weights are random, they are drawn again from their seed
    latent   4 bytes a weight, while it is trained
    dense    4 bytes a weight, never rounded: the network to compare with, and the teacher

Zeros are stored like any other trit: a high sparsity does not make the file smaller. (The authors count one bit for
each nonzero weight and nothing for where it stands; no format stores that.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import RMTKDError
from ..layers_rmtkd import (
    PACKINGS,
    TernaryLinear,
    TernaryMLP,
    pack_trits,
    packed_length,
    random_trits,
    unpack_trits,
)
from ..modeling_rmtkd import resolve_path
from ..registration import lend_errors
from ..spec_rmtkd import MOST_DRAWN, STORAGES, hidden_weights


__all__ = [
    "PACKINGS",
    "STORAGES",
    "bits_per_weight",
    "convert",
    "network_options",
    "pack_model",
    "pack_trits",
    "packed_length",
    "random_trits",
    "serialized_bytes",
    "ternary_layers",
    "ternary_modules",
    "unpack_trits",
]


TERNARY = tuple(name for name in STORAGES if name != "dense")
lend_errors()  # damage is reported by functions of the modeling file


def ternary_layers(model: nn.Module) -> dict[str, TernaryLinear]:
    """{path: layer} of all ternary layers."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TernaryLinear)}


def ternary_modules(model: nn.Module) -> dict[str, TernaryMLP]:
    """{path: network} of all ternary networks; the path of the model itself is ""."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TernaryMLP)}


def serialized_bytes(tensors: Mapping[str, torch.Tensor] | nn.Module) -> int:
    """Bytes of the safetensors file of these tensors, header included: measured on the serialised file, not
    computed."""
    from safetensors.torch import save

    if isinstance(tensors, nn.Module):
        tensors = tensors.state_dict()
    return len(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def bits_per_weight(model: nn.Module) -> float:
    """Bits on disk for each hidden weight of the ternary layers of a model, scales and header included.

    Raises:
        RMTKDError: no ternary layer.
    """
    layers = ternary_layers(model)
    if not layers:
        raise RMTKDError(f"{type(model).__name__} has no ternary layer.")
    held = {f"{path}.{name}": t for path, layer in layers.items() for name, t in layer.state_dict().items()}
    return 8 * serialized_bytes(held) / sum(layer.in_features * layer.out_features for layer in layers.values())


@torch.no_grad()
def convert(mlp: TernaryMLP, storage: str) -> TernaryMLP:
    """A copy of a ternary network with its weights kept otherwise; the same outputs.

    Args:
        storage: "base3", "2bit", "seed" (only for the weights of its own seed), or "latent" (to train them on).

    Raises:
        RMTKDError: unknown storage; "seed" for weights that were trained.
    """
    if storage not in TERNARY:
        raise RMTKDError(f"Unknown storage {storage!r}; expected one of {', '.join(TERNARY)}.")
    if mlp.layers[0].storage == "dense":
        raise RMTKDError(
            "The network is dense, not ternary: round its weights first (optimum_rmtkd.ternary.ternarize)."
        )
    options = network_options(mlp) | {"storage": storage}
    if storage == "seed" and hidden_weights(mlp.in_features, options["hidden"]) > MOST_DRAWN:
        raise RMTKDError(f"storage='seed' is for at most {MOST_DRAWN:,} hidden weights; keep these as 'base3'.")
    twin = TernaryMLP(out_features=mlp.out_features, **options).to(mlp.readout.weight.device)
    kept = {n: t for n, t in mlp.state_dict().items() if not n.startswith("layers.")}
    twin.load_state_dict(kept, strict=False)
    for old, new in zip(mlp.layers, twin.layers, strict=True):
        _convert_layer(old, new)
    return twin.train(mlp.training)


def network_options(mlp: TernaryMLP) -> dict[str, Any]:
    """Arguments that rebuild a network, without its number of outputs; JSON-able."""
    first = mlp.layers[0]
    return {
        "in_features": mlp.in_features,
        "hidden": [layer.out_features for layer in mlp.layers],
        "activations": [activation.options() for activation in mlp.activations],
        "storage": first.storage,
        "sparsity": first.sparsity,
        "seed": first.seed,
        "bias": first.bias is not None,
    }


def _convert_layer(old: TernaryLinear, new: TernaryLinear) -> None:
    trits = old.trits()
    scale = old.log_scale.exp() if old.storage == "latent" else old.scale
    if old.bias is not None:
        new.bias.copy_(old.bias)
    if new.storage == "latent":
        new.latent.copy_(trits.to(new.latent.dtype) * scale)
        new.log_scale.copy_(scale.log())
        new.threshold.copy_(scale / 2)
        return
    new.scale.copy_(scale)
    if new.storage == "seed" and not torch.equal(new.drawn().to(trits.device), trits):
        raise RMTKDError(
            "storage='seed' keeps no weights, but these are not the ones that the seed draws: trained weights need "
            "'base3' or '2bit'."
        )
    new.store(trits)


def pack_model(model: nn.Module, storage: str | None = None) -> nn.Module:
    """Keep the ternary weights of a model as `storage`, in place; the config follows, so the model reloads. Returns
    it.

    Call it after training weights ("latent"): their rounded values are what is packed, and outputs do not change.

    Args:
        storage: of all ternary networks in the model. None: "base3" for trained ("latent") weights, others stay as
            they are.

    Raises:
        RMTKDError: no ternary network in it; see `convert`. The model is then unchanged.
    """
    found = ternary_modules(model)
    if not found:
        raise RMTKDError(f"{type(model).__name__} has no ternary network to pack.")
    wanted = {path: storage or _packed(mlp.layers[0].storage) for path, mlp in found.items()}
    twins = {path: convert(mlp, wanted[path]) for path, mlp in found.items()}
    config = getattr(model, "config", None)
    if hasattr(config, "network"):
        config.network = {**config.network, "storage": wanted["mlp"]}
    spec = (getattr(config, "rmtkd", None) or {}).get("spec", {}).get("ternary", {})
    for raw, options in spec.items():
        if (path := resolve_path(model, raw)) in wanted:
            options["storage"] = wanted[path]
    for path, twin in twins.items():
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, twin)
    return model


def _packed(storage: str) -> str:
    return storage if storage in (*PACKINGS, "seed") else "base3"
