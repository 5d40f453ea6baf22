"""Inputs and outputs of one part of a model, seen while data flows through the whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from ..batches import described, evaluating, padding_mask, run, to_device
from ..errors import CalibrationError, UnsupportedArchitectureError
from ..models import check_behaviour
from .config import TernaryConfig


__all__ = ["Seen", "capture_module"]


@dataclass(frozen=True)
class Seen:
    """What went through a part of a model.

    Attributes:
        inputs: (n, d_in) fp32.
        outputs: (n, d_out) fp32.
        labels: (n,) int64, or None where the outputs are the targets.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    labels: torch.Tensor | None


def find_part(model: nn.Module, name: str) -> nn.Module:
    """The module at a path.

    Raises:
        UnsupportedArchitectureError: none there; the message lists modules of a like name, or with a linear layer.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        paths = [path for path, module in model.named_modules() if path and _holds_linear(module)]
        word = name.rpartition(".")[2]
        near = (
            [path for path in paths if word and word in path] or [path for path in paths if "." not in path] or paths
        )
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has no module {name!r}; it has {', '.join(near[:8])}."
        ) from error


def _holds_linear(module: nn.Module) -> bool:
    return any(isinstance(m, nn.Linear) for m in module.modules())


@torch.no_grad()
def capture_module(model: nn.Module, name: str, dataloader: Iterable, config: TernaryConfig) -> Seen:
    """Run batches through `model` until `config.calibration_samples` rows went through the part at `name`.

    Rows are samples, or unmasked tokens where the part sees (batch, tokens, d).

    Raises:
        CalibrationError: no data, labels missing, or a part that does not map (..., d_in) to (..., d_out).
        UnsupportedArchitectureError: no such part.
    """
    part, rows, calls = find_part(model, name), [], []
    handle = part.register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args, kwargs, out)), with_kwargs=True
    )
    count, modes = 0, contextlib.ExitStack()
    modes.enter_context(evaluating(model))
    try:
        for batch in tqdm(dataloader, desc=f"features of {name}", leave=False):
            if not isinstance(batch, Mapping):
                raise CalibrationError(f"A batch is a {type(batch).__name__}; expected a mapping of model inputs.")
            on_device = to_device(dict(batch), model.device)
            if not rows:
                check_behaviour(model, on_device)
            calls.clear()
            run(model, on_device)
            if not calls:
                raise CalibrationError(f"The forward pass does not call {name!r}: nothing can be learned about it.")
            found = [_rows_of(name, part, *call, on_device, config.targets == "labels") for call in calls]
            count += sum(len(inputs) for inputs, _, _ in found)
            rows += found
            if count >= config.calibration_samples:
                break
    finally:
        handle.remove()
        modes.close()
    if not count:
        raise CalibrationError("The data is empty: expected at least one batch with unmasked samples.")
    inputs, outputs, labels = (torch.cat(column)[: config.calibration_samples] for column in zip(*rows))
    return Seen(inputs, outputs, labels if config.targets == "labels" else None)


def _rows_of(name, part, args, kwargs, output, batch, with_labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    fits = (
        given and isinstance(output, torch.Tensor) and given[0].dim() > 1 and given[0].shape[:-1] == output.shape[:-1]
    )
    if not fits or not given[0].is_floating_point():
        found = [tuple(v.shape) for v in given], tuple(getattr(output, "shape", ())) or type(output).__name__
        inside = [f"{name}.{path}" for path, m in part.named_modules() if path and isinstance(m, nn.Linear)]
        raise CalibrationError(
            f"{name!r} ({type(part).__name__}) maps {found[0]} to {found[1]}; expected (..., d_in) to (..., d_out)."
            + (f" Choose a part inside it: {', '.join(inside)}." if inside else "")
        )
    x, leading = given[0], given[0].shape[:-1]
    mask = padding_mask(batch)
    fits = mask is not None and mask.shape == leading
    kept = mask if fits else torch.ones(leading, dtype=torch.bool, device=x.device)
    labels = torch.zeros(leading, dtype=torch.int64, device=x.device)
    if with_labels:
        labels = batch.get("labels")
        tensor = isinstance(labels, torch.Tensor)
        if not tensor or labels.shape != leading or labels.is_floating_point():
            raise CalibrationError(
                f"targets='labels' needs a class index for each of the {tuple(leading)} positions of {name!r}; the "
                f"batch has {'no labels' if labels is None else f'labels {described(labels)}'}. Use targets='outputs'."
            )
        kept = kept & (labels >= 0)
    return x[kept].float().cpu(), output[kept].float().cpu(), labels[kept].cpu()
