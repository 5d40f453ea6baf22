"""`trim_vocabulary`: the rows of a token table that a domain needs, and the tokenizer that goes with them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import RMTKDError
from ..models import count_parameters, is_narrowed
from ..validation import Count, check_value
from .choice import begun, choose
from .report import VocabularyReport
from .tables import find_tables
from .texts import Texts, count_tokens
from .tokenizer import vocabulary_of
from .verifying import check_cut, difference, held_out


__all__ = ["trim_vocabulary"]

logger = logging.getLogger(__name__)


def trim_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    keep: tuple[Texts, int] | None = None,
    min_count: Count = 1,
    max_size: Count | None = None,
    always: Iterable[str | int] = (),
    validation_texts: Texts | None = None,
    pad_to_multiple_of: Count = 1,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, VocabularyReport]:
    """Drop the rows of the token table that a domain does not use. Nothing is trained.

    A text whose tokens all stay is cut into the same tokens, and has the same outputs (those of a language-model head
    up to rounding: it multiplies fewer rows). A token that goes is replaced by smaller ones, never by the unknown
    token where there was none (but for word-level tokenizers, which have nothing smaller; `report.caution` says so).
    Special, added and chat-template tokens, single bytes and characters, and the ids that config and generation
    config name always stay, and all ids follow.

    The new model is of the same class: a plain checkpoint stays plain. Its config remembers the former size in
    `uncut_parameters`, which transformers ignores, and `target_reduction` counts from it.

    Args:
        model: any model of transformers with a table of tokens; a narrowed one as well. It is not changed.
        tokenizer: its tokenizer, with a backend of the library `tokenizers`: WordPiece, BPE, Unigram or word-level. It
            is not changed.
        texts: texts of the domain, read once and in batches: strings, pairs of them, or rows of a data set, of which
            every string counts.
        keep: (texts, n): the n most frequent tokens of a second, larger corpus stay as well.
        min_count: tokens that occur less often in `texts` go.
        max_size: at most so many rows stay: tokens of `texts` by their counts, then those of `keep`. With
            `pad_to_multiple_of`, the largest multiple below.
        always: tokens, words or ids that stay.
        validation_texts: texts that were held out; the report says how many of them are cut otherwise now.
        pad_to_multiple_of: the number of rows is a multiple of this, as GPUs like it; the most frequent tokens that
            would go fill it up.

    Returns:
        The new model, in the mode, dtype and on the device of the old one; the new tokenizer; and a report.

    Raises:
        RMTKDError: arguments that do not go together; a slow tokenizer; no texts; a tokenizer that is not the model's.
        UnsupportedArchitectureError: no table of tokens, or one that does not follow the config.
        BudgetError: `max_size` has no room for what must stay, or the table none for a multiple.
    """
    min_count = check_value(min_count, Count, "min_count")
    max_size = check_value(max_size, Count | None, "max_size")
    multiple = check_value(pad_to_multiple_of, Count, "pad_to_multiple_of")
    other, other_size = _second(keep)
    vocabulary = vocabulary_of(tokenizer)
    tables = find_tables(model, vocabulary.size)
    required = vocabulary.required() | vocabulary.named(always) | tables.named | tables.anchored
    least = len(begun(required, vocabulary.needs, tables.rows, max_size, multiple).kept)  # or an error, before reading
    counts, read, first = count_tokens(vocabulary.backend, texts, vocabulary.size)
    second = np.zeros_like(counts)
    if other is not None:
        second, _, _ = count_tokens(vocabulary.backend, other, vocabulary.size, "keep")
    kept = choose(
        required,
        vocabulary.needs,
        counts,
        second,
        tables.rows,
        min_count=min_count,
        second_size=other_size,
        max_size=max_size,
        multiple=multiple,
    )
    new = {int(old): i for i, old in enumerate(kept)}
    made = tables.trimmed(torch.from_numpy(kept))
    small = vocabulary.trimmed(new)
    backend = vocabulary_of(small).backend
    check_cut(vocabulary, backend, new, first)
    compared, uncompared = difference(tables, made, vocabulary, new, first)
    used = np.flatnonzero(counts >= min_count)
    report = VocabularyReport(
        tokenizer=vocabulary.json["model"]["type"],
        texts=read,
        rows_before=tables.rows,
        rows_after=len(kept),
        used=len(used),
        required=least,
        left_out=len(np.setdiff1d(used, kept)),
        parameters_before=count_parameters(model),
        parameters_after=count_parameters(made),
        held_out=None if validation_texts is None else held_out(vocabulary, backend, new, validation_texts),
        caution=vocabulary.pieces.loses(set(vocabulary.added.values())) if len(kept) < tables.rows else None,
        difference=compared,
        uncompared=uncompared,
        narrowed=is_narrowed(model.config.model_type),
    )
    if report.caution:
        logger.warning("Trimmed vocabulary: %s.", report.caution)
    return made, small, report


def _second(keep: Any) -> tuple[Texts | None, int]:
    if keep is None:
        return None, 0
    if not isinstance(keep, tuple) or len(keep) != 2 or isinstance(keep[1], bool) or not isinstance(keep[1], int):
        raise RMTKDError(
            f"keep is {_shown(keep)}; expected a pair (texts, n): the n most frequent tokens of the texts stay."
        )
    if keep[1] < 1:
        raise RMTKDError(f"keep asks for the {keep[1]} most frequent tokens; expected at least 1, or keep=None.")
    return keep


def _shown(value: Any) -> str:
    kind = type(value).__name__
    return f"a {kind} of {len(value)}" if isinstance(value, (tuple, list)) else f"a {kind}"
