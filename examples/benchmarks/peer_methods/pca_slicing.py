"""The stream between the layers rotated to its principal directions and sliced, with a matrix on each skip path.

Ashkboos, Croci, do Nascimento, Hoefler, Hensman 2024, "SliceGPT" (arXiv:2401.15024), sections 3.2 to 3.4: a layer norm
is a centring, which goes into what writes, an RMS norm, which commutes with rotations, and a scale and shift, which go
into what reads. Here after each sum (post-norm), so the scale and shift are on the skip path as well. Every norm has a
basis of its own; one width for all, as there. Own implementation; the paper's decoders are an encoder here.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_rmtkd import count_parameters

from .common import Given, blocks, largest, moments_of


class SlicedNorm(nn.Module):
    """RMS norm of what is left of `width` features: (..., kept) -> (..., kept)."""

    def __init__(self, width: int, epsilon: float):
        super().__init__()
        self.width, self.epsilon = width, epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.square().sum(-1, keepdim=True) / self.width + self.epsilon).rsqrt()


class SlicedOutput(nn.Module):
    """norm(dense(x) + skip(stream)), in place of BertSelfOutput and BertOutput."""

    def __init__(self, dense: nn.Linear, skip: nn.Linear, norm: SlicedNorm):
        super().__init__()
        self.dense, self.skip, self.LayerNorm = dense, skip, norm

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(hidden_states) + self.skip(input_tensor))


def prune(given: Given) -> PreTrainedModel:
    """A model with a thinner stream, within the limit."""
    model = given.copied()
    if given.is_small:
        return model
    width = model.config.hidden_size
    kept = largest(lambda kept: size(model, kept), given.limit, 1, width, "stream of width")
    return sliced(model, given.batches, kept)


def size(model: PreTrainedModel, kept: int) -> int:
    """Parameters of the sliced model."""
    width, deep = model.config.hidden_size, len(blocks(model))
    norms = 2 * deep + 1
    # a stream's feature: a row of each table, of what reads and what writes; norms have no parameters left
    tables = sum(table.num_embeddings for table in _tables(model).values())
    inner = sum(
        3 * b.attention.self.all_head_size + b.attention.self.all_head_size + 2 * b.intermediate.dense.out_features
        for b in blocks(model)
    )
    touched = tables + inner + width + 2 * deep  # and the pooler, and the biases of what writes
    fixed = count_parameters(model) - touched * width - norms * 2 * width
    return fixed + touched * kept + 2 * deep * kept**2


def _tables(model: PreTrainedModel) -> dict[str, nn.Embedding]:
    embeddings = model.base_model.embeddings
    return {name: module for name, module in embeddings.named_children() if isinstance(module, nn.Embedding)}


@torch.no_grad()
def sliced(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], kept: int) -> PreTrainedModel:
    """The model itself, rotated and cut to `kept` features at every norm."""
    embeddings, width = model.base_model.embeddings, model.config.hidden_size
    norms = {"embeddings": embeddings.LayerNorm}
    for place, block in enumerate(blocks(model)):
        norms |= {f"{place}.attention": block.attention.output.LayerNorm, f"{place}.output": block.output.LayerNorm}
    bases = _bases(model, norms, batches, kept)
    centre = torch.eye(width, dtype=torch.float64) - 1 / width
    epsilon = model.config.layer_norm_eps
    scale, shift = norms["embeddings"].weight.double(), norms["embeddings"].bias.double()
    basis = bases["embeddings"]
    for name, table in _tables(model).items():
        rows = (table.weight.double() @ centre @ basis).float()
        setattr(embeddings, name, nn.Embedding.from_pretrained(rows, freeze=False, padding_idx=table.padding_idx))
    embeddings.LayerNorm = SlicedNorm(width, epsilon)
    for place, block in enumerate(blocks(model)):
        attention = block.attention.self
        for part, readers, name in (
            (block.attention, (attention.query, attention.key, attention.value), f"{place}.attention"),
            (block, (block.intermediate.dense,), f"{place}.output"),
        ):
            for layer in readers:
                _read(layer, scale, shift, basis)
            old, new = part.output, bases[name]
            skip = nn.Linear(kept, kept, bias=False)
            skip.weight.copy_((basis.T @ (scale[:, None] * (centre @ new))).T)
            _write(old.dense, centre @ new, shift)
            part.output = SlicedOutput(old.dense, skip, SlicedNorm(width, epsilon))
            scale, shift, basis = old.LayerNorm.weight.double(), old.LayerNorm.bias.double(), new
    _read(model.base_model.pooler.dense, scale, shift, basis)
    return model


def _bases(
    model: PreTrainedModel, norms: dict[str, nn.LayerNorm], batches: list[dict[str, torch.Tensor]], kept: int
) -> dict[str, torch.Tensor]:
    """{norm: (width, kept) principal directions of what it gives before its scale and shift}, float64."""

    def normalised(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, norm.normalized_shape, eps=norm.eps)

    moments = moments_of(model, norms, batches, normalised)
    return {name: torch.linalg.eigh(moment).eigenvectors.flip(1)[:, :kept] for name, moment in moments.items()}


def _read(layer: nn.Linear, scale: torch.Tensor, shift: torch.Tensor, basis: torch.Tensor) -> None:
    """A layer that read scale * z + shift reads z in the basis."""
    weight = layer.weight.double()
    layer.bias.copy_(layer.bias.double() + weight @ shift)
    layer.weight = nn.Parameter(((weight * scale) @ basis).float())
    layer.in_features = basis.shape[1]


def _write(layer: nn.Linear, basis: torch.Tensor, shift: torch.Tensor) -> None:
    """A layer that wrote into the stream writes its centred coordinates, and those of the skip path's shift."""
    layer.weight = nn.Parameter((basis.T @ layer.weight.double()).float())
    layer.bias = nn.Parameter((basis.T @ (layer.bias.double() + shift)).float())
    layer.out_features = basis.shape[1]
