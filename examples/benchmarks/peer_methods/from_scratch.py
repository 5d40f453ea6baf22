"""A small BERT of the same depth from random weights: what the architecture gives without its teacher's weights."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from optimum_rmtkd import count_parameters

from .common import Given, largest


HEADS = 4


def build(given: Given) -> PreTrainedModel:
    """A narrower stream, feed-forward layers four times as wide, and what is left of the limit in these."""

    def size(features: int, more: int = 0) -> int:
        with torch.device("meta"):
            return count_parameters(_model(given, features, more))

    features = largest(size, given.limit, 1, 1024, "heads of width")
    more = largest(lambda more: size(features, more), given.limit, 0, 100_000, "neurons beyond the usual")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(given.seed)
        return _model(given, features, more)


def _model(given: Given, features: int, more: int) -> PreTrainedModel:
    """With so many features a head, and so many neurons a layer beyond four times the stream."""
    config = copy.deepcopy(given.model.config)
    config.hidden_size, config.num_attention_heads = HEADS * features, HEADS
    config.intermediate_size = 4 * config.hidden_size + more
    return type(given.model)(config).eval()
