"""Whether what a trimming promises holds, on texts: what stays is cut and scored as before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..batches import evaluating, run
from ..errors import RMTKDError
from ..models import nearly_equal
from .report import HeldOut
from .tables import TokenTables
from .texts import Texts, encoded, in_batches
from .tokenizer import Vocabulary, vocabulary_of


__all__ = ["difference", "held_out"]

SAMPLE, LENGTH = 4, 32  # texts that the models are compared on, and tokens of each at most
CANNOT_RUN = (RuntimeError, TypeError, ValueError, LookupError, AttributeError)


def held_out(vocabulary: Vocabulary, small: PreTrainedTokenizerBase, new: Mapping[int, int], texts: Texts) -> HeldOut:
    """What changes on texts that were not counted.

    Args:
        small: the trimmed tokenizer.
        new: {old id: new id} of the tokens that stayed.

    Raises:
        RMTKDError: no text; or one whose tokens all stayed is cut otherwise.
    """
    backend = vocabulary_of(small).backend
    unknown, now_unknown = vocabulary.tokenizer.unk_token_id, small.unk_token_id
    read = changed = before = after = growth = lost = 0
    for batch in in_batches(texts, "validation_texts"):
        for text, old, now in zip(batch, encoded(vocabulary.backend, batch), encoded(backend, batch), strict=True):
            read, before, after = read + 1, before + len(old), after + len(now)
            if [new.get(i) for i in old] == now:
                continue
            if all(i in new for i in old):
                raise RMTKDError(
                    f"The text {text[:80]!r} is cut otherwise although all its tokens stay: the tokenizer does more "
                    "than its model says. Its vocabulary cannot be trimmed; please report which tokenizer this is."
                )
            changed, growth = changed + 1, max(growth, len(now) - len(old))
            lost += max(0, now.count(now_unknown) - old.count(unknown))
    if not read:
        raise RMTKDError("validation_texts holds no text: expected at least one, or None.")
    return HeldOut(read, changed, before, after, growth, lost)


def difference(
    tables: TokenTables, made: PreTrainedModel, vocabulary: Vocabulary, new: Mapping[int, int], texts: list[str]
) -> float | None:
    """Largest difference of an output on tokens that stay, over the largest output: a model that does something else
    with ids than to look them up would show here.

    Args:
        made: the trimmed model.

    Returns:
        None where the model takes more than token ids, or no token of the texts stays.

    Raises:
        RMTKDError: the outputs are not the same.
    """
    model, ids = tables.model, _sample(vocabulary, new, texts)
    if model.main_input_name != "input_ids" or not ids:
        return None
    try:
        ours = _outputs(model, ids)
    except CANNOT_RUN:  # it wants images, boxes, ... as well
        return None
    theirs = _outputs(made, [[new[i] for i in row] for row in ids])
    kept, worst = torch.tensor(sorted(new), device=model.device), 0.0
    for old, now in zip(ours, theirs, strict=True):
        if old.shape != now.shape and old.shape[-1:] == (tables.rows,):
            old = old.index_select(-1, kept)
        if not nearly_equal(now, old):
            raise RMTKDError(
                f"{type(model).__name__} gives other outputs for the same tokens under their new ids (shapes "
                f"{tuple(old.shape)} and {tuple(now.shape)}): it does more with ids than to look them up. Its "
                "vocabulary cannot be trimmed; please report which model this is."
            )
        if old.is_floating_point() and old.numel():
            a, b = torch.nan_to_num(old.float()), torch.nan_to_num(now.float())
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(torch.float32).tiny)))
    return worst


def _sample(vocabulary: Vocabulary, new: Mapping[int, int], texts: list[str]) -> list[list[int]]:
    """Old ids of a few texts, without those of tokens that went, all of one length."""
    rows = [[i for i in row if i in new][:LENGTH] for row in encoded(vocabulary.backend, texts[:SAMPLE])]
    rows = [row for row in rows if row]
    return [row[: min(map(len, rows))] for row in rows]


def _outputs(model: PreTrainedModel, ids: list[list[int]]) -> list[torch.Tensor]:
    given = torch.tensor(ids, device=model.device)
    inputs = {"input_ids": given, "attention_mask": torch.ones_like(given)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = given
    with evaluating(model), torch.no_grad():
        return [leaf for leaf in tree_leaves(run(model, inputs)) if isinstance(leaf, torch.Tensor)]
