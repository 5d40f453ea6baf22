"""Masks of heads and neurons by the Fisher information of the loss, without training, beside a factorised word table.

Kwon, Kim, Mahoney, Hassoun, Keutzer, Gholami 2022, "A Fast Post-Training Pruning Framework for Transformers"
(arXiv:2204.09656): search by the diagonal of the Fisher information (section 4.1, algorithm 1, here with parameters in
place of FLOPs), rearrangement within a layer by its block (4.2), masks tuned to the teacher's outputs by least squares
(4.3). The paper leaves the table whole; it is brought to the same share of its size here, by frequency-weighted SVD.
Own implementation. What is masked is removed from the matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .common import Given, OutOfReachError, blocks, factorise_table, hooked, inputs_of, largest, table_size, word_table


LARGEST_SCALE = 10.0  # of a tuned mask: beyond, the paper keeps the masks as they were
TUNED_ON = 4  # batches of calibration, spread over all, which are in the order of their lengths


@dataclass
class Kept:
    """Indices that stay, of heads and of neurons, for each layer."""

    heads: list[torch.Tensor]
    neurons: list[torch.Tensor]


def prune(given: Given, tune: bool = True) -> PreTrainedModel:
    """A model with fewer heads and neurons, within the limit."""
    model = given.copied()
    if given.is_small:
        return model
    table, encoder = word_table(model), sum(_costs(model)[kind] * n for kind, n in _numbers(model).items())
    fixed = sum(p.numel() for p in model.parameters()) - table.weight.numel() - encoder
    share = (given.limit - fixed) / (table.weight.numel() + encoder)
    if share <= 0:
        raise OutOfReachError(f"what is neither table, head nor neuron has {fixed:,} parameters")
    rank = largest(
        lambda rank: table_size(table, rank), share * table.weight.numel(), 1, min(table.weight.shape), "rank"
    )
    room = given.limit - fixed - table_size(table, rank)
    kept = choose(model, fisher(model, given.batches), room)
    factorise_table(model, rank, given.counts)
    remove(model, kept)
    if tune:
        tune_masks(given.model, model, given.batches[:: -(-len(given.batches) // TUNED_ON)], kept)
    return model


def _numbers(model: PreTrainedModel) -> dict[str, int]:
    heads = sum(block.attention.self.num_attention_heads for block in blocks(model))
    return {"heads": heads, "neurons": sum(block.output.dense.in_features for block in blocks(model))}


def _costs(model: PreTrainedModel) -> dict[str, int]:
    """Parameters of one head and of one neuron."""
    attention, width = blocks(model)[0].attention.self, model.config.hidden_size
    return {"heads": attention.attention_head_size * (4 * width + 3), "neurons": 2 * width + 1}


def fisher(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """{kind: for each layer the matrix E[g g^T]} of the gradients g of a row's loss by the masks, all ones.

    The gradient by the mask of a head or neuron is the sum of activation times gradient over what it masks.
    """
    parts = {"heads": "attention.output.dense", "neurons": "output.dense"}
    layers = {kind: [block.get_submodule(path) for block in blocks(model)] for kind, path in parts.items()}
    head = blocks(model)[0].attention.self.attention_head_size
    found = {kind: [0.0] * len(of) for kind, of in layers.items()}
    seen: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, arguments: tuple) -> None:
        arguments[0].retain_grad()
        seen[module] = arguments[0]

    with hooked(layer.register_forward_pre_hook(keep) for of in layers.values() for layer in of):
        for batch in batches:
            logits = model(**inputs_of(batch)).logits
            nn.functional.cross_entropy(logits, batch["labels"], reduction="sum").backward()
            for kind, of in layers.items():
                for place, layer in enumerate(of):
                    effect = (seen[layer] * seen[layer].grad).sum(1)
                    if kind == "heads":
                        effect = effect.unflatten(-1, (-1, head)).sum(-1)
                    found[kind][place] = found[kind][place] + effect.double().T @ effect.double()
            seen.clear()
            model.zero_grad(set_to_none=True)
    return found


def choose(model: PreTrainedModel, information: dict[str, list[torch.Tensor]], room: int) -> Kept:
    """The masks of the least expected loss within `room` parameters: for each number of heads as many neurons as fit,
    both by the diagonal; then, layer by layer with its numbers fixed, by the whole matrix."""
    costs = _costs(model)
    scores = {kind: [matrix.diagonal() for matrix in matrices] for kind, matrices in information.items()}
    ranked = {kind: _ranked(of) for kind, of in scores.items()}
    least = len(blocks(model))  # one of each kind stays in every layer
    best = None
    for heads in range(least, len(ranked["heads"][0]) + 1):
        neurons = min(int((room - heads * costs["heads"]) // costs["neurons"]), len(ranked["neurons"][0]))
        if neurons < least:
            break
        lost = ranked["heads"][1][heads] + ranked["neurons"][1][neurons]
        if best is None or lost < best[0]:
            best = (lost, {"heads": heads, "neurons": neurons})
    if best is None:
        raise OutOfReachError(f"{room:,} parameters hold no head and neuron in each of {least} layers")
    kept = {}
    for kind, number in best[1].items():
        chosen = ranked[kind][0][:number]
        kept[kind] = [_rearranged(information[kind][i], chosen[chosen[:, 0] == i, 1]) for i in range(least)]
    return Kept(**kept)


def _ranked(scores: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer, index) from the most important one on, the best of each layer first; and what is lost where the first n
    of them stay, for n from 0."""
    raised = [torch.where(torch.arange(len(s)) == s.argmax(), torch.inf, s) for s in scores]
    places = torch.tensor([(layer, index) for layer, of in enumerate(scores) for index in range(len(of))])
    order = torch.cat(raised).argsort(descending=True, stable=True)
    ordered = torch.cat(scores)[order]
    lost = torch.cat((ordered.flip(0).cumsum(0).flip(0), ordered.new_zeros(1)))
    return places[order], lost


def _rearranged(matrix: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """As many indices as `kept`, of a smaller m^T F m for the mask m of those removed: each removed one in turn is
    exchanged for the one whose removal costs least beside the others."""
    removed = torch.ones(len(matrix), dtype=torch.bool)
    removed[kept] = False
    beside = matrix[:, removed].sum(1)  # F m
    for index in removed.nonzero().flatten():
        removed[index] = False
        beside -= matrix[:, index]
        cost = 2 * beside + matrix.diagonal()
        cost[removed] = torch.inf
        removed[best := cost.argmin()] = True
        beside += matrix[:, best]
    return (~removed).nonzero().flatten()


@torch.no_grad()
def remove(model: PreTrainedModel, kept: Kept) -> None:
    """Take what is not kept out of the matrices."""
    for block, heads, neurons in zip(blocks(model), kept.heads, kept.neurons, strict=True):
        attention = block.attention.self
        size = attention.attention_head_size
        features = (heads[:, None] * size + torch.arange(size)).flatten()
        for name in ("query", "key", "value"):
            _select(getattr(attention, name), features, 0)
        _select(block.attention.output.dense, features, 1)
        attention.num_attention_heads, attention.all_head_size = len(heads), len(features)
        _select(block.intermediate.dense, neurons, 0)
        _select(block.output.dense, neurons, 1)


def _select(layer: nn.Linear, features: torch.Tensor, dim: int) -> None:
    layer.weight = nn.Parameter(layer.weight.index_select(dim, features))
    if dim == 0:
        layer.bias = nn.Parameter(layer.bias[features])
    layer.out_features, layer.in_features = layer.weight.shape


@torch.no_grad()
def tune_masks(
    teacher: PreTrainedModel, student: PreTrainedModel, batches: list[dict[str, torch.Tensor]], kept: Kept
) -> None:
    """Scale what is left so that each layer, shallow to deep, gives what it gave in the teacher, by least squares."""
    size = blocks(teacher)[0].attention.self.attention_head_size
    for ours, theirs in zip(blocks(student), blocks(teacher), strict=True):
        for part in ("attention.output", "output"):
            group = size if part == "attention.output" else 1
            mine, other = ours.get_submodule(part), theirs.get_submodule(part)
            gram = wanted = 0.0
            for batch in batches:
                x, residual = _reads(student, mine, batch)
                y, before = _reads(teacher, other, batch)
                target = other.dense(y) + before - residual - mine.dense.bias
                weight = mine.dense.weight.double()
                x, target = x.double(), target.double()
                gram = gram + (x.T @ x) * (weight.T @ weight)
                wanted = wanted + ((x.T @ target) * weight.T).sum(1)
            count = len(wanted) // group
            gram = gram.unflatten(0, (count, group)).sum(1).unflatten(1, (count, group)).sum(2)
            wanted = wanted.unflatten(0, (count, group)).sum(1)
            damped = gram + 1e-6 * gram.diagonal().mean() * torch.eye(count, dtype=gram.dtype)
            scale = torch.linalg.solve(damped, wanted)
            if bool(scale.isfinite().all()) and float(scale.abs().max()) <= LARGEST_SCALE:
                mine.dense.weight *= scale.repeat_interleave(group).to(mine.dense.weight.dtype)


def _reads(model: PreTrainedModel, part: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What a part (dense, residual, norm) is called with, real tokens alone."""
    found: list[torch.Tensor] = []
    mask = batch["attention_mask"].bool()

    def keep(module: nn.Module, arguments: tuple) -> None:
        found.extend(x[mask] for x in arguments)

    with hooked([part.register_forward_pre_hook(keep)]):
        model(**inputs_of(batch))
    return tuple(found)
