"""Ternary networks from features, and in place of a part of a larger model."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..errors import CalibrationError, RMTKDError, UnsupportedArchitectureError
from ..modeling_rmtkd import VERSION, TernaryMLP
from ..models import carry_over, check_structure, provenance_of, rebuilt, uncut_parameters
from .build import as_model, build_network
from .capture import capture_module, find_part
from .config import TernaryConfig
from .functionals import get_activation
from .packing import network_options, serialized_bytes
from .readout import one_hot
from .report import TernaryReport
from .training import ternarize_module


__all__ = ["compress_features", "compress_head"]

logger = logging.getLogger(__name__)


def compress_features(
    x: Any, y: Any, config: TernaryConfig | None = None, label_names: Sequence[str] | None = None
) -> tuple[PreTrainedModel, TernaryReport]:
    """A ternary network that is fitted to features and their labels or numbers.

    Args:
        x: (n, p) features, raw: tensor or array. Centring and scaling become part of the model.
        y: (n,) whole numbers for classes; (n,) or (n, outputs) floating point for a regression.
        config: None: `TernaryConfig()`.
        label_names: names of the classes, in order.

    Returns:
        (TernaryMLPForClassification or TernaryMLPForRegression, in eval mode; what was done)

    Raises:
        CalibrationError: features or labels that nothing can be fitted to.
        MatchingError: no step function matches the activation.
        RMTKDError: weights="trained", which needs a trained network: see `ternarize`.
    """
    config = config or TernaryConfig()
    if config.weights == "trained":
        raise RMTKDError(
            "weights='trained' rounds the weights of a trained network, and features alone have none: pass the "
            "network to optimum_rmtkd.ternary.ternarize."
        )
    get_activation(config.activation)
    x, y = _checked(x, y)
    classes, given = None if y.is_floating_point() else _number_of_classes(y, label_names), len(x)
    x, y = _some_rows(x, y, config)
    labels = None if classes is None else y
    targets = y.reshape(len(y), -1) if classes is None else one_hot(y, classes)
    mlp, report = build_network(x, targets, config, labels)
    if len(x) < given:
        report = _warned(
            report, f"Fitted to {len(x):,} of {given:,} rows, drawn at random: raise calibration_samples to use more."
        )
    _warn(report)
    return as_model(mlp, config, label_names, report, regression=labels is None), report


def compress_head(
    model: PreTrainedModel, module_name: str, dataloader: Iterable, config: TernaryConfig | None = None
) -> tuple[PreTrainedModel, TernaryReport]:
    """A copy of a Transformers model with one of its parts replaced by a ternary network that is fitted to it.

    The part is whatever maps (..., d_in) to (..., d_out): a classifier, or a feed-forward network. It is seen at work
    on the data; then the ternary network is fitted to its outputs (or, for a classifier, to the labels). The copy
    saves and reloads like every reduced model, and may have been narrowed before.

    Args:
        model: stays as it is.
        module_name: path of the part, for example "classifier".
        dataloader: batches of model inputs, with "labels" where `targets="labels"`.
        config: None: `TernaryConfig()`. weights="trained" rounds the part's own weights (`ternarize_head`).

    Returns:
        (the copy, in eval mode; what was done)

    Raises:
        UnsupportedArchitectureError: a model that its class and config do not describe, no such module (the message
            lists candidates), or one that shares weights with another.
        CalibrationError: no data; a part that is not called, or does more than map the last dimension.
        MatchingError: no step function matches the activation.
    """
    config = config or TernaryConfig()
    check_structure(model)
    get_activation(config.activation)  # what cannot work is refused before the first forward pass
    _refuse_tied(model, module_name)
    seen = capture_module(model, module_name, dataloader, config)
    replaced = model.get_submodule(module_name)
    if config.weights == "trained":
        mlp, report = ternarize_module(replaced, seen.inputs, config)
    else:
        targets = seen.outputs if seen.labels is None else one_hot(seen.labels, seen.outputs.shape[1])
        mlp, report = build_network(seen.inputs, targets, config, seen.labels)
    report = _beside(report, serialized_bytes(replaced))
    _warn(report)
    return _with_part(model, module_name, mlp, config, report), report


def _tensor(values: Any, what: str) -> torch.Tensor:
    """A CPU tensor of an array-like: tensors, arrays, lists, columns of a data frame."""
    try:
        return torch.as_tensor(values if isinstance(values, torch.Tensor) else np.asarray(values)).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"The {what} are no numbers ({error}): expected a tensor or an array of them."
        ) from error


def _checked(x: Any, y: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Features fp32 and labels int64 (or numbers, floating point) that belong together."""
    x, y = _tensor(x, "features"), _tensor(y, "labels (class indices, or numbers)")
    if x.dim() != 2 or y.dim() == 0 or len(y) != len(x) or len(x) == 0:
        raise CalibrationError(
            f"Features of shape {tuple(x.shape)} and labels of shape {tuple(y.shape)}: expected (n, p), n > 0, and "
            "one label a row."
        )
    if y.is_floating_point() and not bool(torch.isfinite(y).all()):
        raise CalibrationError("Targets are not all finite numbers.")
    if not y.is_floating_point() and (y.dim() != 1 or int(y.min()) < 0):
        raise CalibrationError(
            f"Labels of shape {tuple(y.shape)}, smallest {y.min().item()}: expected one class index of at least 0 a "
            "row."
        )
    return x.float(), y if y.is_floating_point() else y.long()


def _some_rows(x: torch.Tensor, y: torch.Tensor, config: TernaryConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """At most `calibration_samples` of them, in the order given."""
    if len(x) <= config.calibration_samples:
        return x, y
    generator = torch.Generator().manual_seed(config.seed)
    at = torch.randperm(len(x), generator=generator)[: config.calibration_samples].sort().values
    return x[at], y[at]


def _number_of_classes(y: torch.Tensor, label_names: Sequence[str] | None) -> int:
    found = int(y.max()) + 1
    if len(y.unique()) < 2:
        raise CalibrationError(f"All labels are {int(y[0])}: expected two classes or more.")
    if label_names is not None and len(label_names) < found:
        raise CalibrationError(f"The labels go up to {found - 1}, but there are {len(label_names)} label_names.")
    return found if label_names is None else len(label_names)


def _refuse_tied(model: PreTrainedModel, name: str) -> None:
    own = {id(p) for p in find_part(model, name).parameters()}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in own and not path.startswith(name + "."):
            raise UnsupportedArchitectureError(
                f"{name!r} shares a weight with {path!r}, which a ternary network in its place could not: untie them "
                "first, or replace another part."
            )


def _beside(report: TernaryReport, size: int) -> TernaryReport:
    """The report with the size of the part that is replaced, and a warning where that one was smaller."""
    if report.bytes >= size:
        report = _warned(
            report,
            f"The ternary part takes {report.bytes:,} bytes, the part it replaces {size:,}: nothing is saved. Replace "
            "a larger part, or use smaller hidden widths.",
        )
    return dataclasses.replace(report, replaced_bytes=size)


def _warned(report: TernaryReport, sentence: str) -> TernaryReport:
    return dataclasses.replace(report, warnings=(*report.warnings, sentence))


def _warn(report: TernaryReport) -> None:
    for sentence in report.warnings:
        logger.warning("%s", sentence)


def _with_part(
    model: PreTrainedModel, name: str, mlp: TernaryMLP, config: TernaryConfig, report: TernaryReport
) -> PreTrainedModel:
    """A copy of `model` with `mlp` at `name`, and a config that says so."""
    rmtkd = copy.deepcopy(getattr(model.config, "rmtkd", None) or {"version": VERSION, "spec": {}, "recipe": {}})
    prefix = "" if model.base_model is model else model.base_model_prefix + "."
    path = "@." + name.removeprefix(prefix) if name.startswith(prefix) else name
    parts = rmtkd["spec"].setdefault("ternary", {})
    kind = parts[path]["replaces"] if path in parts else type(model.get_submodule(name)).__name__
    parts[path] = network_options(mlp) | {"out_features": mlp.out_features, "replaces": kind}
    former = provenance_of(model)
    rmtkd["provenance"] = {
        **former,
        "base_model": former.get("base_model", model.config._name_or_path),
        "parameters_before": uncut_parameters(model),
        "ternary": {**former.get("ternary", {}), path: {"recipe": config.to_dict(), "report": report.to_dict()}},
    }
    student = rebuilt(model, rmtkd)
    parent, _, leaf = name.rpartition(".")
    setattr(student.get_submodule(parent), leaf, mlp.to(device=model.device, dtype=model.dtype))
    student.tie_weights(recompute_mapping=False)
    return carry_over(model, student).eval()
