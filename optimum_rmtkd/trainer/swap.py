"""The swap: one model object takes over the architecture of another in the middle of training.

`Trainer._inner_training_loop` and `_run_epoch` keep local references to the wrapped model, and users keep one to
theirs. So the object stays and its inside is exchanged (`become`); what had been built around the old inside
(optimizer groups, DDP, autocast, compilation) is refreshed in place (`rewrap`, `regroup_optimizer`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import RMTKDError
from ..models import carry_over, is_narrowed, match_precision, pinned, widest_dtype
from ..reparameterization import core_parameters
from .data import isolated_rng


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .trainer import RMTKDTrainer


__all__ = [
    "DropoutSwitch",
    "become",
    "enable_checkpointing",
    "install",
    "load_skeleton",
    "load_weights",
    "regroup_optimizer",
    "separate_cores",
    "skeleton",
]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOKS += tuple(f"{name}_with_kwargs" for name in _HOOKS[:2]) + ("_forward_hooks_always_called",)  # how to call them
_HOOKS += ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def become(model: nn.Module, other: nn.Module) -> set[str]:
    """Turn `model` into `other`, keeping the object. `other` must not be used afterwards: both share their inside.

    What the instance has beyond its class and config is carried over (`models.carry_over`), the training mode and
    hooks on the model itself are kept; whatever accelerate hung on it is gone with the old inside.

    Returns:
        Names of the parameters that the cut left as they were: same name, shape and values.
    """
    old = dict(model.named_parameters())
    same = {
        name
        for name, parameter in carry_over(model, other, root=model).named_parameters()
        if name in old
        and old[name].shape == parameter.shape
        and torch.equal(old[name].detach(), parameter.detach().to(old[name]))
    }
    training = model.training
    hooks = {name: model.__dict__[name] for name in _HOOKS if model.__dict__.get(name)}
    model.__dict__.clear()
    model.__dict__.update(other.__dict__ | hooks)
    model.__class__ = other.__class__
    model.train(training)
    return same


def install(trainer: RMTKDTrainer, replacement: nn.Module, prepare: bool = True) -> None:
    """Give `trainer.model` the inside of `replacement`, optimizer and wrappers included; the learning rate continues.

    Args:
        prepare: wrap the model for training again; False before training, where the Trainer is about to do it.
    """
    model = trainer.model
    place = next(model.parameters())
    old_parameters = dict(model.named_parameters())
    wrapped = trainer.model_wrapped
    same = become(model, replacement.to(device=place.device))
    if trainer.optimizer is not None:
        regroup_optimizer(trainer, old_parameters, same)
    trainer.after_swap()
    if prepare:
        rewrap(trainer, wrapped)
    else:
        trainer.model_wrapped = model
    trainer.callback_handler.model = model


def rewrap(trainer: RMTKDTrainer, wrapped: nn.Module) -> None:
    """Prepare the changed model again (DDP, autocast, compilation) and take the old wrapper out of service."""
    accelerator, model = trainer.accelerator, trainer.model
    accelerator._models = [m for m in accelerator._models if m is not wrapped and m is not model]
    trainer.model_wrapped = accelerator.prepare(model)
    if isinstance(wrapped, nn.parallel.DistributedDataParallel) and wrapped is not trainer.model_wrapped:
        # `_run_epoch` asks its local wrapper for no_sync until the epoch ends; its reducer would wait for dead
        # gradients.
        wrapped.no_sync = lambda: trainer.model_wrapped.no_sync()
        wrapped.reducer = wrapped.logger = None
        wrapped._module_parameters, wrapped.modules_buffers, wrapped.named_module_buffers = [], [], {}


def regroup_optimizer(trainer: RMTKDTrainer, old_parameters: dict[str, nn.Parameter], same: set[str]) -> None:
    """Point the existing optimizer at the new parameters.

    The optimizer object stays, so scheduler, accelerate's wrapper and callbacks keep valid references and the learning
    rate goes on. State (Adam's moments) follows the parameters that did not change and is dropped for the others: it
    describes coordinates that no longer exist.
    """
    raw = _raw(trainer.optimizer)
    new_parameters = dict(trainer.model.named_parameters())
    if trainer.optimizer_was_given:
        groups = _groups_by_name(raw, old_parameters, new_parameters)
    else:
        groups = _groups_of_fresh(trainer)
    if len(groups) != len(raw.param_groups):
        raise RMTKDError(
            f"The optimizer {type(raw).__name__} has {len(raw.param_groups)} parameter groups, the reduced model "
            f"needs {len(groups)}: the groups depend on the architecture. Pass an optimizer whose groups do not, or "
            "`optim`."
        )
    state = {name: raw.state[old_parameters[name]] for name in same if old_parameters[name] in raw.state}
    for group, parameters in zip(raw.param_groups, groups, strict=True):
        group["params"] = parameters
    raw.state.clear()
    for name, values in state.items():
        raw.state[new_parameters[name]] = values


def separate_cores(optimizer: Any, model: nn.Module, lr_scale: float) -> None:
    """Move the tensors behind parametrised weights into a group of their own, the last one: no decay, its own rate.

    The group exists, empty, before there are any: the number of groups must not change in a run.
    """
    raw = _raw(optimizer)
    cores = {id(p) for p in core_parameters(model).values()}
    moved = [p for group in raw.param_groups for p in group["params"] if id(p) in cores]
    for group in raw.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in cores]
    rate = raw.param_groups[0]["lr"]
    raw.add_param_group({"params": moved, "weight_decay": 0.0} | ({} if rate is None else {"lr": rate * lr_scale}))


def _raw(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _groups_of_fresh(trainer: RMTKDTrainer) -> list[list[nn.Parameter]]:
    """The groups, in the very order, that `create_optimizer` would make now: what a resumed run will load into."""
    kept, trainer.optimizer = trainer.optimizer, None
    try:
        return [group["params"] for group in _raw(trainer.create_optimizer()).param_groups]
    finally:
        trainer.optimizer = kept


def _groups_by_name(raw, old: dict[str, nn.Parameter], new: dict[str, nn.Parameter]) -> list[list[nn.Parameter]]:
    """For an optimizer that the user built: each new parameter joins the group of its old namesake, or nearest
    relative."""
    names = {id(parameter): name for name, parameter in old.items()}
    group_of = {
        names[id(p)]: number
        for number, group in enumerate(raw.param_groups)
        for p in group["params"]
        if id(p) in names
    }
    groups: list[list[nn.Parameter]] = [[] for _ in raw.param_groups]
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


def skeleton(template: PreTrainedModel, config: dict[str, Any]) -> PreTrainedModel:
    """An untrained model of the architecture in `config`, with the head, device, dtype and attention of `template`."""
    cls = type(template)
    if is_narrowed(config.get("model_type")):
        from .. import modeling_rmtkd

        cls = modeling_rmtkd.reduced_class(cls)
    built = cls.config_class.from_dict(config)
    built._attn_implementation = template.config._attn_implementation
    built.use_cache = getattr(template.config, "use_cache", None)
    with isolated_rng(0):
        fresh = cls(built)
    if _spec_of(built) == _spec_of(template.config):  # else the spec states the numbers of single layers
        for path, numbers in pinned(template, fresh).items():
            vars(fresh.get_submodule(path)).update(numbers)
    return match_precision(fresh.to(device=template.device), template)


def _spec_of(config: Any) -> dict[str, Any]:
    return (getattr(config, "rmtkd", None) or {}).get("spec", {})


def enable_checkpointing(model: PreTrainedModel, args: Any) -> None:
    """Recompute activations in the backward pass if the training arguments ask for it, as `Trainer.train` does.

    transformers calls it activation checkpointing today and gradient checkpointing until 5.20; both names are
    honoured.
    """
    names = ("activation_checkpointing", "gradient_checkpointing")
    if not any(getattr(args, name, False) for name in names):
        return
    options = dict(next(filter(None, (getattr(args, f"{name}_kwargs", None) for name in names)), {}))
    if not hasattr(model, "activation_checkpointing_enable"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options or None)
        return
    layers, offload = options.pop("every_n_layers", 1), options.pop("offload", False)
    model.activation_checkpointing_enable(
        activation_checkpointing_kwargs=options or None, every_n_layers=layers, offload=offload
    )


def load_skeleton(model: PreTrainedModel, template: PreTrainedModel, folder: str | Path) -> PreTrainedModel | None:
    """An untrained model of the architecture saved in `folder`; None where `model` has it already.

    The config class comes from `template` (the uncut model): nothing has to be registered with the Auto classes.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf8"))
    fresh = skeleton(template, config)
    return None if _architecture(fresh) == _architecture(model) else fresh


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy the weights saved in `folder` into `model`, which has their architecture.

    Through `from_pretrained`: transformers stores tensors of some architectures (ViT) under other names than they have
    in memory. The loader of its Trainer knows nothing of that and leaves them as they are: untrained, after a cut.

    Raises:
        RMTKDError: a tensor of the model is not in the folder.
        SpecMismatchError: the same for a narrowed model, or a tensor of another shape.
    """
    saved, found = type(model).from_pretrained(
        folder, config=model.config, dtype=widest_dtype(model), output_loading_info=True
    )
    if found["missing_keys"]:
        raise RMTKDError(
            f"The checkpoint {folder} lacks {len(found['missing_keys'])} tensor(s) of {type(model).__name__}, the "
            f"first is {min(found['missing_keys'])}. It is incomplete, or of another model; take another checkpoint."
        )
    model.load_state_dict(saved.state_dict())


def _architecture(model: nn.Module) -> tuple[str, dict[str, tuple[int, ...]]]:
    return model.config.model_type, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class DropoutSwitch:
    """Turns the dropout of a model off, and on again.

    Both places where transformers keeps it are covered: `nn.Dropout` modules and float attributes of modules such as
    `attention_dropout` or `drop_prob`. The config is never touched: a reduced checkpoint that is fine-tuned later
    trains with the dropout its authors chose, and `restore` gives the model back to the user as it came.
    """

    def __init__(self):
        self._saved: list[tuple[nn.Module, str, float]] = []

    def disable(self, model: nn.Module) -> None:
        """Set every rate of `model` to 0, remembering it."""
        for module in model.modules():
            names = ["p"] if isinstance(module, nn.modules.dropout._DropoutNd) else []
            names += [n for n, v in vars(module).items() if "drop" in n and isinstance(v, float)]
            for name in names:
                if rate := getattr(module, name):
                    self._saved.append((module, name, rate))
                    setattr(module, name, 0.0)

    def restore(self) -> None:
        """Put back every rate that `disable` set to 0."""
        for module, name, rate in self._saved:
            setattr(module, name, rate)
        self._saved.clear()
