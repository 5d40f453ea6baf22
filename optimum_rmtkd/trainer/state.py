"""The state of a run as data: JSON-able values and tensors, both ways. Knows no files and no trainer."""

from __future__ import annotations

from typing import Any

from ..distillation import EMATeacher, fingerprint
from . import checkpoint, plain
from .parts import described
from .swap import gathered, same_architecture, skeleton


__all__ = ["load_run_state", "run_state"]

PARTS = ("agenda", "judge", "pace", "fit")  # of a run, each with a state of its own


def run_state(run: Any) -> dict[str, Any]:
    """{"values": ..., "tensors": ...} of a `Run`. Collective, where its model is sharded."""
    stages, before, initial = run.stages, run.tutor.before, run.initial
    open_stage = bool(stages) and stages[-1].status == "open"
    keep = before is not None and (run.config.teacher == "previous" or open_stage)
    same = keep and fingerprint(before) == fingerprint(initial)
    values = {
        "fingerprint": run.fingerprint,
        "layout": run.layout,
        "recipe": run.config.to_dict(),
        "parts": _described(run),
        "architecture": run.host.model.config.to_dict(),
        "before": "initial" if same else before.config.to_dict() if keep else None,
    } | {name: getattr(run, name).state_dict() for name in PARTS}
    tensors = checkpoint.flatten("projection", run.tutor.projections)
    tensors |= checkpoint.flatten("projection_before", run.tutor.projections_before)
    if keep and not same:
        tensors |= checkpoint.flatten("before", before.state_dict())
    if run.fit.steps and not run.fit.going:  # the teacher exists nowhere else
        tensors |= checkpoint.flatten("initial", initial.state_dict())
    if (open_stage or run.agenda.stays) and run.keepsake.tensors is not None:
        tensors |= checkpoint.flatten("after_cut", run.keepsake.tensors)
    if isinstance(run.teacher, EMATeacher):
        tensors |= checkpoint.flatten("ema", run.teacher.model.state_dict())
    how = run.parts.reparameterization
    tensors |= run.tutor.state_dict() | checkpoint.flatten("core", plain.state_of(how, run.host.model))
    return {"values": values, "tensors": gathered(tensors)}


def load_run_state(run: Any, state: dict[str, Any], where: str) -> None:
    """Inverse of `run_state`, for a run that knows its initial model.

    Raises:
        RMTKDError: another model, recipe or other parts than the run started with.
    """
    values, tensors = state["values"], state["tensors"]
    if values["fit"]["steps"] and "layout" in values:
        checkpoint.same_layout_or_raise(values["layout"], run.layout, where)
        run.fingerprint = values["fingerprint"]
    else:
        checkpoint.same_weights_or_raise(values["fingerprint"], run.fingerprint, where)
    checkpoint.same_recipe_or_raise(values["recipe"], run.config.to_dict(), where)
    checkpoint.same_parts_or_raise(values["parts"], _described(run), where)
    for name in PARTS:
        getattr(run, name).load_state_dict(values[name])
    if fitted := checkpoint.subset("initial", tensors):
        checkpoint.load_into(run.initial, fitted)
    device = run.host.accelerator.device
    for name, field in (("projection", "projections"), ("projection_before", "projections_before")):
        setattr(run.tutor, field, {k: v.to(device) for k, v in checkpoint.subset(name, tensors).items()})
    after = {k: v.to(device) for k, v in checkpoint.subset("after_cut", tensors).items()}
    run.keepsake.tensors = after or None
    run.tutor.before = None
    if values["before"] == "initial":
        run.tutor.before = run.initial
    elif values["before"] is not None:
        run.tutor.before = skeleton(run.initial, values["before"])
        checkpoint.load_into(run.tutor.before, checkpoint.subset("before", tensors))
    run.tutor.teacher, run.restored = None, tensors
    fresh = skeleton(run.initial, values["architecture"])
    if not same_architecture(fresh, run.host.model):
        run.host.install(fresh, prepare=False)


def _described(run: Any) -> dict[str, list[str]]:
    """What a resumed run must have in common with this one."""
    parts = run.parts
    weights = [parts.reparameterization] if parts.reparameterization is not None else []
    found = described(objectives=run.tutor.objectives, reparameterization=weights, transforms=parts.transforms)
    return found | {"teacher": [] if run.tutor.described is None else [run.tutor.described]}
