"""Every second layer, as DistilBERT is initialised, beside a factorised word table.

Sanh, Debut, Chaumond, Wolf 2019, "DistilBERT" (arXiv:1910.01108), section 3: one layer out of two of the teacher. The
table is factorised by frequency-weighted SVD to meet the size; where every second layer is too large for it, every
third one stays, and so on. Own implementation.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from optimum_rmtkd import count_parameters

from .common import Given, OutOfReachError, blocks, factorise_table, largest, table_size, word_table


SMALLEST_RANK = 16  # of the table: below, a layer more is worth nothing


def prune(given: Given) -> PreTrainedModel:
    """A model of fewer layers and a factorised table, within the limit."""
    model = given.copied()
    if given.is_small:
        return model
    table = word_table(model)
    for stride in range(2, len(blocks(model)) + 1):
        keep_layers(trial := given.copied(), stride)
        room = given.limit - (count_parameters(trial) - table.weight.numel())
        if room >= table_size(table, SMALLEST_RANK):
            break
    else:
        raise OutOfReachError(f"one layer and a table of rank {SMALLEST_RANK} are larger than {given.limit:,}")
    if room < table.weight.numel():
        rank = largest(lambda rank: table_size(table, rank), room, 1, min(table.weight.shape), "rank")
        factorise_table(trial, rank, given.counts)
    return trial


def keep_layers(model: PreTrainedModel, stride: int) -> None:
    """Layers 0, stride, 2 stride, ..."""
    model.base_model.encoder.layer = nn.ModuleList(list(blocks(model))[::stride])
    model.config.num_hidden_layers = len(blocks(model))
