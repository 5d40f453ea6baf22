"""Torch-Pruning: features of the stream, neurons and features of heads, removed where the library's groups say.

Fang, Ma, Song, Mi, Wang 2023, "DepGraph: Towards Any Structural Pruning" (arXiv:2301.12900), with the isomorphic
ranking of 2024 (arXiv:2407.04616): the library `torch-pruning` itself, as its script for BERT calls it. `taylor`:
weight times gradient (Molchanov et al. 2019); `group_norm`: the L2 norm of a group. The ratio is searched for that
meets the size.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from optimum_rmtkd import count_parameters

from .common import Given, OutOfReachError, blocks, inputs_of


TRIES = 12  # bisections of the ratio
EXACT = 0.002  # share of the limit that may be left


def prune(given: Given, importance: str = "taylor") -> PreTrainedModel:
    """A thinner model, within the limit.

    Raises:
        ModuleNotFoundError: no torch-pruning.
    """
    if given.is_small:
        return given.copied()
    gradients = gradients_of(given) if importance == "taylor" else {}
    low, high, best = 0.0, 0.98, None
    for _ in range(TRIES):
        ratio = (low + high) / 2
        model = pruned(given, importance, ratio, gradients)
        within = count_parameters(model) <= given.limit
        low, high = (low, ratio) if within else (ratio, high)
        if within and (best is None or count_parameters(model) > count_parameters(best)):
            best = model
        if best is not None and count_parameters(best) >= (1 - EXACT) * given.limit:
            break
    if best is None:
        raise OutOfReachError(f"a ratio of {high:.2f} leaves more than {given.limit:,} parameters")
    return best


def gradients_of(given: Given) -> dict[str, torch.Tensor]:
    """{parameter: gradient of the loss over all rows of calibration}"""
    model = given.copied()
    for batch in given.batches:
        nn.functional.cross_entropy(model(**inputs_of(batch)).logits, batch["labels"], reduction="sum").backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def pruned(given: Given, importance: str, ratio: float, gradients: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The model pruned by one ratio."""
    import torch_pruning

    model = given.copied()
    attentions = [block.attention.self for block in blocks(model)]
    rules = {
        "taylor": torch_pruning.importance.GroupTaylorImportance(),
        "group_norm": torch_pruning.importance.GroupMagnitudeImportance(p=2),
    }
    for name, gradient in gradients.items():
        model.get_parameter(name).grad = gradient.clone()
    example = {name: value[:2] for name, value in inputs_of(given.batches[0]).items()}
    with torch.enable_grad():
        pruner = torch_pruning.pruner.BasePruner(
            model,
            example,
            importance=rules[importance],
            global_pruning=True,
            isomorphic=True,
            pruning_ratio=ratio,
            num_heads={layer: a.num_attention_heads for a in attentions for layer in (a.query, a.key, a.value)},
            output_transform=lambda output: output.logits.sum(),
            ignored_layers=[model.classifier],
        )
        pruner.step()
    for attention in attentions:
        attention.all_head_size = attention.query.out_features
        attention.attention_head_size = attention.all_head_size // attention.num_attention_heads
    model.config.hidden_size = model.base_model.pooler.dense.in_features
    model.zero_grad(set_to_none=True)
    return model
