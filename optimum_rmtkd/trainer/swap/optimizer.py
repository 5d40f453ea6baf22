"""An optimizer whose parameters are exchanged under it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...errors import RMTKDError
from ...reparameterization import core_parameters


__all__ = ["adam_rate", "forget_moments", "groups_by_name", "raw_optimizer", "regroup", "separate_cores"]


def regroup(
    optimizer: Any,
    old: dict[str, nn.Parameter],
    new: dict[str, nn.Parameter],
    same: set[str],
    groups: Sequence[list[nn.Parameter]] | None = None,
) -> None:
    """Point the existing optimizer at the new parameters.

    The optimizer object stays, so scheduler, accelerate's wrapper and callbacks keep valid references and the learning
    rate goes on. State (Adam's moments) follows the parameters that did not change and is dropped for the others: it
    describes coordinates that no longer exist.

    Args:
        old, new: all parameters of the model by name, before and after.
        same: names of those that did not change.
        groups: the new parameters of each group, in the very order of a resumed run's; None: each joins the group of
            its old namesake.

    Raises:
        RMTKDError: another number of groups than the optimizer has.
    """
    raw = raw_optimizer(optimizer)
    groups = groups_by_name(raw, old, new) if groups is None else groups
    if len(groups) != len(raw.param_groups):
        raise RMTKDError(
            f"The optimizer {type(raw).__name__} has {len(raw.param_groups)} parameter groups, the reduced model "
            f"needs {len(groups)}: the groups depend on the architecture. Pass an optimizer whose groups do not, or "
            "`optim`."
        )
    gone = set(map(id, old.values()))
    state = {parameter: values for parameter, values in raw.state.items() if id(parameter) not in gone}
    state |= {new[name]: raw.state[old[name]] for name in same if old[name] in raw.state}
    for group, parameters in zip(raw.param_groups, groups, strict=True):
        group["params"] = parameters
    forget_moments(raw)
    raw.state.update(state)


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
