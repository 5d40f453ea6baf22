"""What several rooms ask of batches: to collect them, to read them, to run a model on them and to say why it cannot.

A batch is what a data collator made: a mapping of the names of a forward's parameters to tensors, or to anything else
that the forward takes (flags, None, nested outputs of another model).
"""

from .collecting import collect_batches, collected, from_loader, no_mapping
from .explaining import POSITION_TABLES, explained, guarded_tables, in_one_line, position_limit, rows_before, too_long
from .reading import (
    INPUTS,
    LABELS,
    accepted_names,
    batch_size,
    decoder_mask,
    described,
    evaluating,
    first_samples,
    main_input,
    model_inputs,
    padding_mask,
    run,
    to_device,
    unchunked,
)
from .storing import Store


__all__ = [
    "INPUTS",
    "LABELS",
    "POSITION_TABLES",
    "Store",
    "accepted_names",
    "batch_size",
    "collect_batches",
    "collected",
    "decoder_mask",
    "described",
    "evaluating",
    "explained",
    "first_samples",
    "from_loader",
    "guarded_tables",
    "in_one_line",
    "main_input",
    "model_inputs",
    "no_mapping",
    "padding_mask",
    "position_limit",
    "rows_before",
    "run",
    "to_device",
    "too_long",
    "unchunked",
]
