"""Whether what a trimming promises holds, on texts: what stays is cut and scored as before."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from tokenizers import Tokenizer
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from ..batches import evaluating, in_one_line, run
from ..errors import RMTKDError
from ..models import nearly_equal
from .report import HeldOut
from .tables import TokenTables
from .texts import Texts, encoded, in_batches
from .tokenizer import Vocabulary


__all__ = ["check_cut", "difference", "held_out"]

SAMPLE, LENGTH = 4, 32  # texts that the models are compared on, and tokens of each at most
CANNOT_RUN = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, MemoryError)


def held_out(vocabulary: Vocabulary, backend: Tokenizer, new: Mapping[int, int], texts: Texts) -> HeldOut:
    """What changes on texts that were not counted.

    Args:
        backend: of the trimmed tokenizer, as `Vocabulary.backend`.
        new: {old id: new id} of the tokens that stayed.

    Raises:
        RMTKDError: no text; or one whose tokens all stayed is cut otherwise.
    """
    unknown = vocabulary.pieces.unknown
    read = changed = before = after = growth = lost = 0
    for batch in in_batches(texts, "validation_texts"):
        for old, now in _cut(vocabulary, backend, new, batch):
            read, before, after = read + 1, before + len(old), after + len(now)
            if [new.get(i) for i in old] != now:
                changed, growth = changed + 1, max(growth, len(now) - len(old))
                lost += 0 if unknown is None else max(0, now.count(new[unknown]) - old.count(unknown))
    return HeldOut(read, changed, before, after, growth, lost)


def check_cut(vocabulary: Vocabulary, backend: Tokenizer, new: Mapping[int, int], texts: list[str]) -> None:
    """
    Raises:
        RMTKDError: a text whose tokens all stayed is cut otherwise, or gets other special tokens around it.
    """
    rows = _cut(vocabulary, backend, new, texts)
    whole = [text for text, (old, _) in zip(texts, rows, strict=True) if all(i in new for i in old)]
    for batch in (whole, list(itertools.pairwise(whole))):
        ours, theirs = (encoded(b, batch, special=True) for b in (vocabulary.backend, backend))
        for text, old, now in zip(batch, ours, theirs, strict=True):
            if [new.get(i) for i in old] != now:
                name = type(vocabulary.tokenizer).__name__
                raise RMTKDError(
                    f"{name} puts special tokens around {str(text)[:80]!r} otherwise when it is loaded anew: its "
                    "class does not keep the post-processor that this one was given. Make it a "
                    "PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, ...), and trim that one."
                )


def _cut(
    vocabulary: Vocabulary, backend: Tokenizer, new: Mapping[int, int], batch: list[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """(old ids, new ids) of each text."""
    for text, old, now in zip(batch, encoded(vocabulary.backend, batch), encoded(backend, batch), strict=True):
        if all(i in new for i in old) and [new[i] for i in old] != now:
            raise RMTKDError(
                f"The text {text[:80]!r} is cut otherwise although all its tokens stay: the tokenizer does more than "
                "its model says. Its vocabulary cannot be trimmed; please report which tokenizer this is."
            )
        yield old, now


def difference(
    tables: TokenTables, made: PreTrainedModel, vocabulary: Vocabulary, new: Mapping[int, int], texts: list[str]
) -> tuple[float | None, str | None]:
    """Largest difference of an output on tokens that stay, over the largest output: a model that does something else
    with ids than to look them up would show here.

    Args:
        made: the trimmed model.

    Returns:
        The difference, or None and why the outputs were not compared.

    Raises:
        RMTKDError: the outputs are not the same, or there is no memory to compute them.
    """
    model = tables.model
    ids = _sample(model, vocabulary, new, texts)
    if model.main_input_name != "input_ids":
        return None, f"{type(model).__name__} reads {model.main_input_name}, not token ids"
    if not ids:
        return None, "no token of the first texts stays"
    try:
        ours = _outputs(model, ids)
    except CANNOT_RUN as error:  # it wants images, boxes, ... as well
        _check_memory(error, model)
        told = in_one_line(error)[:200]
        return None, f"{type(model).__name__} does not run on token ids alone ({type(error).__name__}: {told})"
    try:
        theirs = _outputs(made, [[new[i] for i in row] for row in ids])
    except RuntimeError as error:
        _check_memory(error, model)
        raise
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
    return worst, None


def _check_memory(error: Exception, model: PreTrainedModel) -> None:
    """
    Raises:
        RMTKDError: `error` says that there is no memory left.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
        raise RMTKDError(
            f"No memory is left to compare the outputs of {type(model).__name__} before and after, on "
            f"{model.device}: expected room for both models. Free some, or trim on the CPU and move the result."
        ) from error


def _sample(
    model: PreTrainedModel, vocabulary: Vocabulary, new: Mapping[int, int], texts: list[str]
) -> list[list[int]]:
    """Old ids of a few texts, without those of tokens that went, all of one length."""
    rows = [[i for i in row if i in new][:LENGTH] for row in encoded(vocabulary.backend, texts[:SAMPLE])]
    rows = [row for row in rows if row]
    end = getattr(model.config, "eos_token_id", None)
    read = model.config.is_encoder_decoder and isinstance(end, int) and end in new  # by classifiers (BART)
    ending = [end] if read else []
    return [row[: min(map(len, rows)) - len(ending)] + ending for row in rows]


def _outputs(model: PreTrainedModel, ids: list[list[int]]) -> list[torch.Tensor]:
    given = torch.tensor(ids, device=model.device)
    inputs = {"input_ids": given, "attention_mask": torch.ones_like(given)}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = given
    with evaluating(model), torch.no_grad():
        return [leaf for leaf in tree_leaves(run(model, inputs)) if isinstance(leaf, torch.Tensor)]
