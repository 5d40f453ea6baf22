"""Answers of a teacher, computed once and kept in the dataset: no teacher in memory while the student trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..batches import evaluating, main_input, padding_mask, to_device
from ..errors import RMTKDError
from ..validation import Count, checked
from .heads import Heads, Postponed, output_layer
from .signatures import named_inputs
from .sparse import SparseLogits
from .stream import CHUNK_NUMBERS, chunk_of
from .teachers import Teacher, without_labels


__all__ = ["COLUMNS", "AnswerCollator", "CachedTeacher", "cache_answers"]

VALUES, INDICES, REST, CLASSES = COLUMNS = ("teacher_values", "teacher_indices", "teacher_rest", "teacher_classes")


class CachedTeacher(Teacher):
    """Reads the answers that `cache_answers` wrote into the training data.

    The logits of the k largest classes are exact; the others share the rest of the probability evenly. With k at least
    the number of classes (the default covers any classifier) nothing is lost. Hidden states are not kept: objectives
    that compare features refuse this teacher.
    """

    def __init__(self):
        self.model = None

    def __call__(
        self, inputs: Mapping[str, Any], paths: Iterable[str] = (), drop: Iterable[str] = ()
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        if wanted := list(paths):
            raise RMTKDError(f"Cached answers hold no features, {wanted[0]!r} was asked for; pass a teacher model.")
        kept = self._kept(inputs)
        if kept.rest.dim() < 2:
            return {"logits": kept.dense()}, {}
        shape = kept.rest.shape
        flat = SparseLogits(kept.values.flatten(0, 1), kept.indices.flatten(0, 1), kept.rest.flatten(), kept.classes)
        return {"logits": flat.dense().unflatten(0, shape)}, {}

    def _kept(self, inputs: Mapping[str, Any]) -> SparseLogits:
        """The answers of a batch, (batch, k), or (batch, tokens, k) where its tokens are; of padding all are 0.

        Raises:
            RMTKDError: none in the batch, or for fewer tokens than it has.
        """
        missing = [name for name in COLUMNS if name not in inputs]
        if missing:
            raise RMTKDError(
                f"The batch has no {', '.join(missing)}: expected training data from cache_answers(teacher, dataset, "
                "...)."
            )
        kept = (inputs[VALUES].float(), inputs[INDICES].long(), inputs[REST].float())
        classes, mask = int(inputs[CLASSES].max()), padding_mask(inputs)
        if kept[2].dim() == 1 or mask is None:
            return SparseLogits(*kept, classes)
        tokens = kept[2].shape[1]
        if tokens < int(mask.sum(1).max()):
            raise RMTKDError(
                f"A sample has {int(mask.sum(1).max())} tokens, its cached answers are for at most {tokens}: "
                "the data was tokenized or truncated otherwise when the answers were computed. Run cache_answers "
                "again."
            )
        # Wherever the collator put the padding, the answers belong to the real tokens in their order.
        held = torch.arange(tokens, device=mask.device) < mask.sum(1, keepdim=True)
        placed = [tensor.new_zeros(*mask.shape, *tensor.shape[2:]) for tensor in kept]
        for whole, tensor in zip(placed, kept, strict=True):
            whole[mask] = tensor[held]
        return SparseLogits(*placed, classes)

    @property
    def streams(self) -> bool:
        return type(self).__call__ is CachedTeacher.__call__

    def answers_at(self, inputs: Mapping[str, Any], chosen: torch.Tensor) -> SparseLogits:
        """The answers at some positions, never written out over all classes.

        Args:
            chosen: bool (batch, tokens), n of them.

        Raises:
            RMTKDError: as a call.
        """
        return self._kept(inputs)[chosen]

    @property
    def columns(self) -> tuple[str, ...]:
        return COLUMNS

    def strip(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {key: value for key, value in inputs.items() if key not in COLUMNS}


class AnswerCollator:
    """Any collator, beside which the columns of answers are put into tensors of their own."""

    def __init__(self, collator: Callable[[list], dict]):
        self.collator = collator

    def __call__(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator([{k: v for k, v in sample.items() if k not in COLUMNS} for sample in samples])
        if not all(CLASSES in sample for sample in samples):
            return batch
        values, indices = (
            _padded([torch.as_tensor(sample[name]) for sample in samples]) for name in (VALUES, INDICES)
        )
        rest = _padded([torch.as_tensor(sample[REST], dtype=torch.float32) for sample in samples])
        classes = torch.as_tensor([int(sample[CLASSES]) for sample in samples])
        answers = {VALUES: values, INDICES: indices, REST: rest, CLASSES: classes}
        return {**batch, **answers}


def _padded(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Stacked, the first dimension filled up with zeros."""
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True) if tensors[0].dim() else torch.stack(tensors)


@checked
@torch.no_grad()
def cache_answers(
    teacher: nn.Module,
    dataset: Any,
    collator: Callable[[list], dict],
    k: Count = 64,
    batch_size: Count = 64,
    progress: bool = True,
) -> Any:
    """The dataset with four more columns: the teacher's k largest logits of each sample (token), and what is left
    over.

    Use the very tokens the student will train on: tokenize first, and let the collator pad, not truncate.

    Args:
        teacher: a model that returns `logits`, (batch, classes) or (batch, tokens, classes); its device is used.
        dataset: a `datasets.Dataset` of model inputs.
        k: logits kept; all of them where there are fewer classes.

    Returns:
        `datasets.Dataset` with teacher_values (k, or tokens x k), teacher_indices, teacher_rest (the logit that each
        other class gets) and teacher_classes.

    Raises:
        RMTKDError: not a `datasets.Dataset`, or an empty one; a model without logits, or with logits at other places
            than its tokens; k below 1.
    """
    import datasets
    from tqdm.auto import tqdm

    if not isinstance(dataset, datasets.Dataset):
        raise RMTKDError(f"cache_answers got a {type(dataset).__name__}; expected a datasets.Dataset (not a stream).")
    if not len(dataset):
        raise RMTKDError("cache_answers got an empty dataset; expected rows to ask the teacher about.")
    place, names = next(teacher.parameters()).device, set(_input_names(teacher))
    answers: list[datasets.Dataset] = []  # Arrow tables: as Python lists they would take many times the memory
    with evaluating(teacher):
        ask, heads = Teacher(teacher), Heads()
        for start in tqdm(range(0, len(dataset), batch_size), "teacher's answers", unit="batch", disable=not progress):
            rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
            batch = to_device(collator([{k: v for k, v in row.items() if k in names} for row in rows]), place)
            answers.append(datasets.Dataset.from_dict(_columns(_asked(ask, heads, batch, k), padding_mask(batch))))
    return datasets.concatenate_datasets([dataset, datasets.concatenate_datasets(answers)], axis=1)


def _asked(ask: Teacher, heads: Heads, batch: Mapping[str, Any], k: int) -> SparseLogits:
    """The answers of a batch, (batch, k) or (batch, tokens, k). Of many, logits of a few positions exist at a time."""
    teacher, place = ask.model, main_input(batch)
    inputs = ask.accepted(without_labels(teacher, batch, ("labels",)))
    vocabulary = getattr(output_layer(teacher), "out_features", 0)
    many = place is not None and place.dim() == 2 and place.numel() * vocabulary > CHUNK_NUMBERS
    head = heads.of(teacher, inputs) if many else "few"
    if isinstance(head, str):
        outputs, _ = ask(batch, drop=("labels",))
        return _largest(_logits_of(teacher, outputs), k)
    with Postponed().around(head.layer) as kept:
        ask(batch, drop=("labels",))
    shape = kept.hidden.shape[:2]
    parts = [_largest(head(part).float(), k) for part in kept.hidden.flatten(0, 1).split(chunk_of(vocabulary))]
    whole = (torch.cat([getattr(part, name) for part in parts]) for name in ("values", "indices", "rest"))
    return SparseLogits(*(tensor.unflatten(0, shape) for tensor in whole), parts[0].classes)


def _largest(logits: torch.Tensor, k: int) -> SparseLogits:
    """The k largest of the last dimension, and the logit that each other class gets."""
    classes = logits.shape[-1]
    values, indices = logits.topk(min(k, classes), dim=-1)
    rest = torch.zeros(logits.shape[:-1], device=logits.device)
    if k < classes:
        rest = logits.scatter(-1, indices, -math.inf).logsumexp(-1) - math.log(classes - k)
    return SparseLogits(values, indices, rest, classes)


def _logits_of(teacher: nn.Module, outputs: Mapping[str, Any]) -> torch.Tensor:
    """fp32, at the positions of the teacher's input tokens."""
    if "logits" not in outputs:
        raise RMTKDError(f"{type(teacher).__name__} returned {', '.join(outputs)}; cache_answers keeps logits.")
    if outputs["logits"].dim() == 3 and getattr(getattr(teacher, "config", None), "is_encoder_decoder", False):
        raise RMTKDError(
            f"{type(teacher).__name__} is an encoder-decoder: its logits belong to other positions than the "
            "attention_mask. Keep it in memory (teacher_model=model)."
        )
    return outputs["logits"].float()


def _input_names(model: nn.Module) -> list[str]:
    return [*named_inputs(model), "labels", "label", "label_ids"]


def _columns(answers: SparseLogits, mask: torch.Tensor | None) -> dict[str, list]:
    """One batch's columns."""
    columns: dict[str, list] = {name: [] for name in COLUMNS}
    tokens = answers.rest.dim() == 2
    if tokens and mask is not None and mask.shape != answers.rest.shape:
        raise RMTKDError(
            f"cache_answers: logits {(*answers.rest.shape, answers.classes)} for an attention_mask "
            f"{tuple(mask.shape)}; expected an answer a token."
        )
    for number in range(len(answers.rest)):
        real = mask[number].cpu().numpy() if tokens and mask is not None else slice(None)
        values, indices = (t[number].cpu().numpy() for t in (answers.values, answers.indices.int()))
        if tokens:  # Arrow takes lists of rows, no matrices
            values, indices = list(values[real]), list(indices[real])
        columns[VALUES].append(values)
        columns[INDICES].append(indices)
        rest = answers.rest[number].cpu()
        columns[REST].append((rest[real] if tokens else rest).tolist())
        columns[CLASSES].append(answers.classes)
    return columns
