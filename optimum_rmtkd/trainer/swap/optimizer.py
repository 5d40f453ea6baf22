"""An optimizer whose parameters are exchanged under it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...reparameterization import core_parameters


__all__ = [
    "adam_rate",
    "alike_rates",
    "forget_moments",
    "groups_by_name",
    "peak_rates",
    "raw_optimizer",
    "regroup",
    "separate_cores",
]


def regroup(
    optimizer: Any,
    old: dict[str, nn.Parameter],
    new: dict[str, nn.Parameter],
    same: set[str],
    groups: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Point the existing optimizer at the new parameters.

    The optimizer object stays, so scheduler, accelerate's wrapper and callbacks keep valid references and the learning
    rate goes on. State (Adam's moments) follows the parameters that did not change and is dropped for the others: it
    describes coordinates that no longer exist.

    Args:
        old, new: all parameters of the model by name, before and after.
        same: names of those that did not change.
        groups: those of an optimizer made now, in the very order of a resumed run's; None: each parameter joins the
            group of its old namesake. Where the groups depend on the architecture (one a parameter, rates that fall
            from layer to layer) those of the new one take the place of the old ones, at rates as far down the
            schedule.
    """
    raw = raw_optimizer(optimizer)
    gone = set(map(id, old.values()))
    state = {parameter: values for parameter, values in raw.state.items() if id(parameter) not in gone}
    state |= {new[name]: raw.state[old[name]] for name in same if old[name] in raw.state}
    if groups is None:
        parameters = groups_by_name(raw, old, new)
    else:
        parameters = [group["params"] for group in groups]
        if not alike_rates([group["lr"] for group in groups], peak_rates(raw)):
            _replace_groups(raw, groups)
    for group, held in zip(raw.param_groups, parameters, strict=True):
        group["params"] = held
    forget_moments(raw)
    raw.state.update(state)


def peak_rates(optimizer: Any) -> list[Any]:
    """What a schedule multiplies, group by group."""
    return [group.get("initial_lr", group["lr"]) for group in raw_optimizer(optimizer).param_groups]


def alike_rates(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """As many rates, in the same proportions: a resumed run goes on at its own, whatever the arguments say now."""
    if len(ours) != len(theirs) or None in ours or None in theirs:
        return len(ours) == len(theirs)
    one, other = max(ours), max(theirs)
    return all(math.isclose(a * other, b * one, rel_tol=1e-6) for a, b in zip(ours, theirs, strict=True))


def _replace_groups(raw: torch.optim.Optimizer, groups: Sequence[dict[str, Any]]) -> None:
    """Groups of another number, or of rates in other proportions, as far down the schedule as the first one is."""
    if None in (*peak_rates(raw), *(group["lr"] for group in groups)):  # adafactor's own
        raw.param_groups[:] = map(dict, groups)
        return
    now, peak = raw.param_groups[0]["lr"], max(peak_rates(raw))
    scale = peak / most if (most := max(group["lr"] for group in groups)) else 1.0
    done = now / first if (first := peak_rates(raw)[0]) else 1.0
    rates = [group["lr"] * scale for group in groups]
    raw.param_groups[:] = [
        {**group, "initial_lr": rate, "lr": rate * done} for group, rate in zip(groups, rates, strict=True)
    ]


def forget_moments(optimizer: Any) -> None:
    """The state of an optimizer as it was before the first step, for the parameters that it has now."""
    raw = raw_optimizer(optimizer)
    raw.state.clear()
    if isinstance(raw, torch.optim.Adagrad):  # alone of torch's to give parameters their state when it is made
        raw.state.update(torch.optim.Adagrad([dict(group) for group in raw.param_groups], **raw.defaults).state)


def separate_cores(optimizer: Any, model: nn.Module, lr_scale: float) -> None:
    """Move the tensors behind parametrised weights into a group of their own, the last one: no decay, its own rate.

    The group exists, empty, before there are any: the number of groups must not change in a run.
    """
    raw = raw_optimizer(optimizer)
    cores = {id(p) for p in core_parameters(model).values()}
    moved = [p for group in raw.param_groups for p in group["params"] if id(p) in cores]
    for group in raw.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in cores]
    rate = raw.param_groups[0]["lr"]
    raw.add_param_group({"params": moved, "weight_decay": 0.0} | ({} if rate is None else {"lr": rate * lr_scale}))


def adam_rate(optimizer: Any, but_last: bool = False) -> float | None:
    """Peak learning rate of an optimizer of the Adam family whose groups share it; None for any other one: rates that
    differ by group were chosen with care, and those of other optimizers mean something else.

    Args:
        but_last: the last group is that of `separate_cores`.
    """
    raw = raw_optimizer(optimizer)
    groups = raw.param_groups[:-1] if but_last else raw.param_groups
    rates = {float(group.get("initial_lr", group["lr"])) for group in groups if group["params"]}
    return rates.pop() if len(rates) == 1 and "adam" in type(raw).__name__.lower() else None


def raw_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper, and inside DeepSpeed's."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, torch.optim.Optimizer) else getattr(inner, "optimizer", inner)


def groups_by_name(raw, old: dict[str, nn.Parameter], new: dict[str, nn.Parameter]) -> list[list[nn.Parameter]]:
    """For an optimizer that the user built: each new parameter joins the group of its old namesake, or nearest
    relative."""
    names = {id(parameter): name for name, parameter in old.items()}
    group_of = {
        names[id(p)]: number
        for number, group in enumerate(raw.param_groups)
        for p in group["params"]
        if id(p) in names
    }
    # Parameters outside the model (layers of a loss) stay where they are.
    groups = [[p for p in group["params"] if id(p) not in names] for group in raw.param_groups]
    for name, parameter in new.items():
        if name in group_of:
            groups[group_of[name]].append(parameter)
        elif name not in old and parameter.requires_grad and group_of:
            nearest = max(group_of, key=lambda known, name=name: _kinship(known, name))
            groups[group_of[nearest]].append(parameter)
    return groups


def _kinship(known: str, name: str) -> tuple[int, bool]:
    """(length of the common module path, same last word): "dense.weight" is nearest to "dense.down.weight"."""
    ours, theirs = known.split("."), name.split(".")
    common = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    return common, ours[-1] == theirs[-1]
