"""Do the labels of a batch fit the head of a model and its loss? torch would say so without a name, after hours.

Knows models and batches; no trainer and no run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..batches import main_input
from ..errors import RMTKDError
from ..models import has_head


__all__ = ["check_labels"]

ONE_ANSWER = ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION")  # heads of one answer a sample, by transformers' maps
SINGLE, SEVERAL, NUMBERS = "single_label_classification", "multi_label_classification", "regression"


def check_labels(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Shape and dtype of the labels against the loss of the head, and one class a sample against the model's.

    Raises:
        RMTKDError: names the shape, the dtype and the problem_type, and the one that would fit.
    """
    labels, sample = inputs.get("labels"), main_input(inputs)
    if not isinstance(labels, torch.Tensor) or not labels.dim() or sample is None:
        return
    if any(has_head(model, kind) for kind in ONE_ANSWER):
        _check_form(model, labels, len(sample))
    _check_classes(model, labels, sample)


def _check_form(model: nn.Module, labels: torch.Tensor, rows: int) -> None:
    config = model.config
    outputs, given = getattr(config, "num_labels", None) or 0, getattr(config, "problem_type", None)
    problem = given or _inferred(outputs, labels)
    whole, one_each, one_a_class = not labels.is_floating_point(), labels.numel() == rows, (rows, outputs)
    per_class = outputs > 1 and tuple(labels.shape) == one_a_class
    if problem == SEVERAL and per_class and not whole:
        return
    if problem == SINGLE and one_each and whole:
        return
    if problem == NUMBERS and labels.numel() == rows * outputs:
        return
    if problem not in (SINGLE, SEVERAL, NUMBERS):
        return
    kind = "whole numbers" if whole else "floats"
    expected = {
        SINGLE: f"one class a sample, whole numbers of the shape ({rows},)",
        SEVERAL: f"a float of 0 or 1 for each class, the shape ({rows}, {outputs})",
        NUMBERS: f"{rows * outputs} numbers, the shape ({rows},{f' {outputs}' if outputs > 1 else ''})",
    }[problem]
    raise RMTKDError(
        f"The labels of a batch have the shape {tuple(labels.shape)} and are {kind} ({labels.dtype}); "
        f"{type(model).__name__} has {outputs} output(s) and problem_type {given!r}"
        f"{'' if given else f', which means {problem!r} here'}, whose loss expects {expected}. "
        f"{_cure(problem, per_class, one_each, whole)}"
    )


def _inferred(outputs: int, labels: torch.Tensor) -> str:
    """The problem that transformers takes where a config names none."""
    if outputs == 1:
        return NUMBERS
    return SEVERAL if labels.is_floating_point() else SINGLE


def _cure(problem: str, per_class: bool, one_each: bool, whole: bool) -> str:
    if per_class:
        several = f'load the model with problem_type="{SEVERAL}"' if problem != SEVERAL else ""
        floats = "make the labels floats (torch.float32, [1.0, 0.0, ...])" if whole else ""
        other = "" if problem == SEVERAL else " If each sample has one class alone, give its number (argmax)."
        return f"Where a sample may have several classes, {' and '.join(filter(None, (several, floats)))}.{other}"
    if one_each and problem != NUMBERS:
        if not whole:
            return "Make class numbers whole (int64), or load the model with num_labels=1 to predict one number."
        return f'Class numbers go with problem_type="{SINGLE}"; several classes a sample need one column a class.'
    return "Map the labels, or load the model with another num_labels."


def _check_classes(model: nn.Module, labels: torch.Tensor, sample: torch.Tensor) -> None:
    """One class a sample has to be one of the model's."""
    classes = getattr(model.config, "num_labels", None) or 0
    one_each = labels.dim() == 1 and not labels.is_floating_point()
    if not one_each or classes < 2:
        return
    if sample.dim() not in (2, 4):  # (batch, choices, length): the label is a choice
        return
    known = labels[labels != -100]
    lowest, highest = (int(known.min()), int(known.max())) if len(known) else (0, 0)
    if lowest < 0 or highest >= classes:
        raise RMTKDError(
            f"The labels of a batch go from {lowest} to {highest}; expected classes from 0 to {classes - 1}, as "
            f"{type(model).__name__} has {classes} (config.num_labels). Map the labels, or load the model "
            "with more of them."
        )
