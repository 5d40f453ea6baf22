"""Do calibration data differ enough to say anything of a model? Told by the number of different samples."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..batches import LABELS, batch_size, from_loader, no_mapping, padding_mask
from ..batches.reading import with_tensors
from ..config import RMTKDConfig
from ..errors import CalibrationError
from .processes import one_for_all, several


__all__ = ["check_variety", "different_samples", "enough_rows", "extent_of", "warn_of_few"]

ROWS = 8  # of a moment, for each feature: perplexities of small decoders got worse with fewer

logger = logging.getLogger(__name__)


def check_variety(batches: Iterable[Mapping[str, Any]], accelerator: Any = None) -> None:
    """Refuse data that are one sample, however often, or images of one colour each: nothing varies in them, and every
    direction would be a guess. Reads until it has seen two samples that differ.

    Args:
        accelerator: with several processes the data of all count, and all are told.

    Raises:
        CalibrationError: says which.
    """
    with one_for_all(accelerator):
        found = different_samples(batches, 2)
    if several(accelerator):
        from accelerate.utils import gather_object

        found = set(gather_object(sorted(found)))
    if len(found) > 1:
        return
    what = "are one sample, alone or again and again" if found else "are images of one colour each"
    raise CalibrationError(
        f"The calibration data {what}: expected samples that differ, hundreds of them (calibration_samples). Check "
        "the dataset and its filters; blank texts, and words that the tokenizer does not know, all look alike to the "
        "model."
    )


def warn_of_few(batches: Sequence[Mapping[str, Any]], config: RMTKDConfig, width: int) -> None:
    """Say it where so few samples differ that they cannot span the features that are to be cut: the covariance of n
    vectors has no rank above n.

    Args:
        width: features of the stream; of the widest site where the stream stays.
    """
    rows = {"spaced": config.tokens_per_sequence, "sequence_mean": 1}.get(config.sample_unit) or _positions(batches)
    if rows is None:
        return
    enough = -(-width // rows)
    found = len(different_samples(batches, enough))
    if found < enough:
        logger.warning(
            "The calibration data hold %d different samples (%d in all), which give at most %d of the %d directions "
            "that are to be ranked; what is kept beyond those is a guess. Expected %d different samples or more.",
            found,
            sum(map(batch_size, batches)),
            found * rows,
            width,
            enough,
        )


def extent_of(batches: Sequence[Mapping[str, Any]], accelerator: Any = None) -> tuple[int, int]:
    """(real tokens, samples) of the data of all processes, whose moments are summed. Collective."""
    own = sum(map(_tokens, batches)), sum(map(batch_size, batches))
    if not several(accelerator):
        return own
    from accelerate.utils import gather_object

    tokens, samples = zip(*gather_object([own]), strict=True)
    return sum(tokens), sum(samples)


def enough_rows(config: RMTKDConfig, width: int, tokens: int, samples: int) -> RMTKDConfig:
    """The recipe with as many tokens of a sequence as make ROWS rows of each of `width` features, of a language model:
    its texts are few and long, in the extreme two packed ones. No fewer than the recipe's.

    Args:
        tokens, samples: of the calibration data, see `extent_of`.

    Raises:
        CalibrationError: fewer real tokens than `width`: directions would be guesses.
    """
    if tokens < width:
        raise CalibrationError(
            f"The calibration text has {tokens} tokens, and the widest site of the model has {width} features: "
            f"expected {ROWS * width} tokens or more. Give more text, or longer samples (calibration_samples)."
        )
    if tokens < ROWS * width:
        logger.warning(
            "The calibration text has %d tokens for %d features of the widest site; %d or more give better cuts.",
            tokens,
            width,
            ROWS * width,
        )
    each = -(-ROWS * width // max(1, samples))
    return config.replace(tokens_per_sequence=max(config.tokens_per_sequence, each))


def _tokens(batch: Mapping[str, Any]) -> int:
    mask, ids = padding_mask(batch), batch.get("input_ids")
    if mask is not None:
        return int(mask.sum())
    if ids is None:  # speech, which is answered with words
        ids = batch.get("decoder_input_ids", batch.get("labels"))
    return ids.numel() if isinstance(ids, torch.Tensor) else batch_size(batch)


def different_samples(batches: Iterable[Mapping[str, Any]], enough: int) -> set[bytes]:
    """Digests of the samples that differ, without padding and labels; of images, those of more than one colour.

    Args:
        enough: stop when so many are found.

    Raises:
        CalibrationError: a loader that fails, a batch that is no mapping.
    """
    found: set[bytes] = set()
    for batch in from_loader(batches):
        if not isinstance(batch, Mapping):
            raise CalibrationError(no_mapping(batch))
        for digest in _digests({name: with_tensors(value) for name, value in batch.items()}):
            found.add(digest)
            if len(found) >= enough:
                return found
    return found


def _digests(batch: Mapping[str, Any]) -> Iterator[bytes]:
    size, mask = batch_size(batch), padding_mask(batch)
    columns = {
        name: value
        for name, value in sorted(batch.items())
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == size and name not in LABELS
    }
    if not columns:  # of a form that is not known here, and not judged
        yield from (secrets.token_bytes(16) for _ in range(2))
    for row in range(size if columns else 0):
        image = columns.get("pixel_values")
        if image is not None and image.dim() == 4 and _is_flat(image[row]):
            continue
        digest = hashlib.blake2b(digest_size=16)
        for name, column in columns.items():
            value = column[row]
            if mask is not None and mask.shape == column.shape:
                value = value[mask[row]]
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        yield digest.digest()


def _is_flat(image: torch.Tensor) -> bool:
    """Of one colour: (channels, height, width)."""
    flat = image.flatten(1)
    return flat.shape[1] > 1 and bool((flat == flat[:, :1]).all())


def _positions(batches: Sequence[Mapping[str, Any]]) -> int | None:
    """The most positions that a sample of token ids has; None for what is none."""
    return max(
        (b["input_ids"].shape[-1] for b in batches if isinstance(b.get("input_ids"), torch.Tensor)), default=None
    )
