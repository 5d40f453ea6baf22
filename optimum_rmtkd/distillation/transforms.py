"""What happens to a training batch before student and teacher see it: mixed samples, or samples of the student's
own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import RMTKDError
from ..registry import Part, Registry
from ..validation import Positive
from .objectives.answers import has_head, shifts_labels


__all__ = ["BatchTransform", "EmbeddingMixup", "build_transforms", "register_transform"]


class BatchTransform(Part):
    """Changes the batches of a training run; evaluation never sees it.

    Called once for each micro-batch of an accumulated batch, before its tokens are counted: what a transform generates
    is what the loss is normalised by. Random numbers come from torch's global generator, which checkpoints keep.
    """

    def __call__(self, run: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch to train on. `run` offers `model`, `teacher` (a `Teacher`), `progress` (share of the steps that is
        done) and `evaluates` (whether there are evaluations while training)."""
        return inputs

    @contextmanager
    def around(self, inputs: dict[str, Any], models: list[nn.Module]) -> Iterator[dict[str, Any]]:
        """Open during the forward passes of the given models (student, then teacher); yields the inputs they get."""
        yield inputs

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        """Refuse models that it cannot work with.

        Raises:
            RMTKDError: with the reason.
        """

    def on_evaluate(self, metrics: Mapping[str, float], progress: float) -> None:
        """After an evaluation; `progress` is the share of the training steps done."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `state_dict`."""


TRANSFORMS: Registry[BatchTransform] = Registry("batch transform")
register_transform = TRANSFORMS.register


def build_transforms(given: Any) -> list[BatchTransform]:
    """Transforms from None, one, or a list of instances, names or dicts, or {name: arguments}.

    Raises:
        RMTKDError: unknown names, answered with the known ones, or something else.
    """
    if given is None:
        return []
    if isinstance(given, Mapping) and "name" not in given:
        given = [{name: arguments} for name, arguments in given.items()]
    if isinstance(given, (str, Mapping, BatchTransform)):
        given = [given]
    if not isinstance(given, Iterable):
        raise RMTKDError(f"transforms is a {type(given).__name__}; expected transforms, their names or dicts.")
    return [item if isinstance(item, BatchTransform) else TRANSFORMS.build(item) for item in given]


@register_transform
class EmbeddingMixup(BatchTransform):
    """MixKD: each batch is followed by mixtures of its samples, e' = l e(x_i) + (1 - l) e(x_pi(i)), l ~ Beta(alpha,
    alpha).

    Student and teacher mix the outputs of their own embedding layers (`get_input_embeddings()`), so their widths may
    differ; masks are united. All objectives see the mixed rows: the divergences and feature losses compare the two
    networks there, and the task loss gets label y_i with probability l and y_pi(i) otherwise, whose expectation is the
    mixed cross-entropy. Labels of regression are mixed themselves. Images are mixed as pixels: a patch embedding is
    linear.

    Doubles the cost of a step. For classification and regression with little data; labels of tokens, spans and choices
    cannot be mixed and are refused.

    Reference: Liang et al., "MixKD", arXiv 2011.00593, section 3.
    """

    name = "embedding_mixup"

    def __init__(self, alpha: Positive = 0.4):
        self.alpha = alpha

    def check(self, student: nn.Module, teacher: nn.Module | None) -> None:
        if getattr(student.config, "is_encoder_decoder", False) or shifts_labels(student):
            raise RMTKDError(
                f"EmbeddingMixup with {type(student).__name__}: the labels of a language model belong to positions "
                "and cannot be mixed. Leave it out; it is for classification and regression of whole samples."
            )
        if has_head(student, "QUESTION_ANSWERING") or has_head(student, "MULTIPLE_CHOICE"):
            raise RMTKDError(
                f"EmbeddingMixup with {type(student).__name__}: positions and choices cannot be mixed. Leave it out; "
                "it is for classification and regression of whole samples."
            )
        if teacher is None:
            raise RMTKDError("EmbeddingMixup needs a teacher that can answer to mixtures; cached answers cannot.")

    def __call__(self, run: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        labels = inputs.get("labels")
        if torch.is_tensor(labels) and labels.dim() > 1 and not labels.is_floating_point():
            raise RMTKDError(
                f"EmbeddingMixup got labels of shape {tuple(labels.shape)}: one label a token. Expected one a sample; "
                "leave it out for token tasks."
            )
        size = len(next(value for value in inputs.values() if torch.is_tensor(value)))
        share = torch.distributions.Beta(self.alpha, self.alpha).sample()
        order = torch.randperm(size)
        mixed = {name: self._rows(name, value, share, order) for name, value in inputs.items()}
        if "pixel_values" in inputs:
            return mixed
        return mixed | {"mixup_share": share, "mixup_order": order}

    def _rows(self, name: str, value: Any, share: torch.Tensor, order: torch.Tensor) -> Any:
        """A batch's tensor (batch, ...) followed by that of its mixtures."""
        if not torch.is_tensor(value) or not value.dim():
            return value
        place = order.to(value.device)
        if "mask" in name:
            second = value | value[place] if value.dtype == torch.bool else torch.maximum(value, value[place])
        elif name == "labels" and not value.is_floating_point():
            kept = torch.rand(len(value)).to(value.device) < share.to(value.device)
            second = torch.where(kept, value, value[place])
        elif name in ("labels", "pixel_values"):
            second = torch.lerp(value[place], value, float(share))
        else:
            second = value
        return torch.cat((value, second))

    @contextmanager
    def around(self, inputs: dict[str, Any], models: list[nn.Module]) -> Iterator[dict[str, Any]]:
        if "mixup_order" not in inputs:
            yield inputs
            return
        inputs = dict(inputs)
        share, order = float(inputs.pop("mixup_share")), inputs.pop("mixup_order")

        def mix(module, args, output):
            first = output[: len(order)]
            return torch.cat((first, torch.lerp(first[order.to(first.device)], first, share)))

        handles = [model.get_input_embeddings().register_forward_hook(mix) for model in models]
        try:
            yield inputs
        finally:
            for handle in handles:
                handle.remove()
