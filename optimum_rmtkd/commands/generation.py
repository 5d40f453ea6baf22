"""What a causal language model costs when it writes: tokens a second of reading a prompt and of decoding, bytes of its
cache, and its perplexity on a text."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import RMTKDError
from .corpora import check_texts, text_columns
from .inputs import check_tokens, load_tokenizer
from .language import check_separator, kind_of, token_stream


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from ..models.timing import Latency

__all__ = ["cache_bytes", "check_bench_texts", "compare_decoding", "perplexities", "writes"]


def writes(model: PreTrainedModel) -> bool:
    """Whether it is a causal language model that keeps a cache."""
    return kind_of(model.config) == "causal" and model.can_generate()


def _read(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    """The cache after a prompt."""
    import torch

    with torch.inference_mode():
        return model(**inputs, use_cache=True).past_key_values


def cache_bytes(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """Bytes of the keys and values that are kept of a prompt."""
    cache = _read(model, inputs)
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def compare_decoding(
    before: PreTrainedModel, after: PreTrainedModel, inputs: dict[str, Tensor], repeats: int
) -> Latency:
    """Seconds of one more token for each row behind a prompt, whose cache is at hand. The prompt of a table of
    positions that is full is one token shorter, so that there is a position for it."""
    from ..batches.examples import longest_text
    from ..models.timing import compare_latency

    if inputs["input_ids"].shape[1] in (longest_text(before), longest_text(after)):
        inputs = {name: tensor[:, :-1] for name, tensor in inputs.items()}
    caches = {id(model): _read(model, inputs) for model in (before, after)}

    def step(model: PreTrainedModel) -> dict[str, Any]:
        # each step lengthens the cache that it is given
        last = inputs["input_ids"][:, -1:]
        return {"input_ids": last, "past_key_values": copy.deepcopy(caches[id(model)]), "use_cache": True}

    return compare_latency(before, after, step, repeats=repeats)


def check_bench_texts(files: Sequence[str] | None, columns: Sequence[str] | None, models: Sequence) -> None:
    """Refuse texts that nothing can be measured on, before anything is timed.

    Raises:
        RMTKDError: models that are no causal language models, or files that cannot be read.
    """
    if files is None:
        if columns is not None:
            raise RMTKDError(f"--text-column {columns[0]} without --texts FILE: there is no table to find it in.")
        return
    if wrong := [model for model in models if kind_of(model.config) != "causal"]:
        raise RMTKDError(
            f"--texts {files[0]}: {type(wrong[0]).__name__} is no causal language model, which alone has a perplexity "
            "by a sliding window. Leave it out."
        )
    check_texts(files)
    text_columns(files, columns)


def perplexities(
    models: Sequence[PreTrainedModel],
    name: str,
    files: Sequence[str],
    columns: Sequence[str] | None,
    window: int | None,
    most: int,
) -> list[float]:
    """Of each model, by a sliding window over the first tokens of the files.

    Args:
        name: of the model whose tokenizer is used.
        window: tokens that are seen at once; None: 512, or what the models take.
        most: tokens that are read.

    Raises:
        RMTKDError: a text shorter than a window, a window longer than a model's positions, or ids that it has no row
            for.
    """
    import torch

    from ..batches.examples import longest_text
    from ..distillation.perplexity import perplexity

    longest = min((found for model in models if (found := longest_text(model))), default=None)
    if window is not None and longest is not None and window > longest:
        raise RMTKDError(f"--window {window}: the models take at most {longest} tokens.")
    window = window or min(512, longest or 512)
    tokenizer = load_tokenizer(name, models[0].config, padded=False)
    check_separator(name, tokenizer, files)
    ids: list[int] = []
    for part in token_stream(files, text_columns(files, columns), tokenizer):
        ids += part
        if len(ids) >= most:
            break
    ids = ids[:most]
    if len(ids) < window:
        raise RMTKDError(
            f"--texts: {len(ids)} tokens; expected at least {window}, one window. Give --window, or more."
        )
    check_tokens([ids], min(model.config.get_text_config().vocab_size for model in models), name)
    return [perplexity(model, torch.tensor(ids), window).value for model in models]
