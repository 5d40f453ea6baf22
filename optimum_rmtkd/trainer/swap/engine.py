"""A model that a DeepSpeed engine owns (ZeRO) takes over the architecture of another.

An engine is built around one set of parameters: it lays them out in flat partitions, or leaves a process nothing but
its part of each (stage 3). So a cut gathers the whole weights on every process, from the partitions in fp32 where
there are such, ends the engine, gives the model its new inside, and has Accelerate build another engine around it,
with a fresh optimizer: the moments of Adam lie in partitions, with one count of steps for all. The model stays the
object that it was, and so do the optimizer's wrapper, which the schedule and the callbacks hold, and the engine that
the training loop holds until its epoch ends: it becomes an alias of the new one.

Knows DeepSpeed and Accelerate; no trainer and no run. What gathers or builds is collective: each process has to call
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...errors import RMTKDError
from .in_place import become
from .optimizer import raw_optimizer
from .sharded import Holder, holder_of


__all__ = ["Engine", "built_whole", "in_engine", "made_whole"]

COUNTED = ("global_steps", "global_samples", "skipped_steps")  # by an engine, for its log and its checkpoints


class Engine(Holder):
    """How Accelerate has a DeepSpeed engine hold a model. Teachers stay whole on every process."""

    def __init__(self, accelerator: Any):
        super().__init__(accelerator)
        self._former: list[nn.Module] = []  # kept: an engine that is thrown away ends what it shares with the live one

    @property
    def live(self) -> Any:
        """The engine in use; None without one."""
        return getattr(self.accelerator.deepspeed_engine_wrapped, "engine", None)

    def holds(self, model: nn.Module) -> bool:
        return self.live is not None and self.live.module is model

    def tensors(self, model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
        found = {
            name: _gathered(model.get_parameter(name)).to(device=device, dtype=like.dtype)
            for name, like in self.blueprint.model.named_parameters()
        }
        buffers = dict(model.named_buffers())
        return found | {name: buffers[name].detach() for name in model.state_dict() if name in buffers}

    def size(self, model: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in self.blueprint.model.parameters())

    def install(
        self,
        model: nn.Module,
        replacement: nn.Module,
        optimizer: Any,
        fresh_optimizer: Callable[[], torch.optim.Optimizer],
        ready: Callable[[], None] = lambda: None,
    ) -> nn.Module:
        """Give a held model the inside of `replacement`; the learning rate goes on, moments begin anew. Collective.

        Args:
            optimizer: Accelerate's wrapper around that of the engine; it stays that object.
            fresh_optimizer: makes one for the parameters that the model has then.
            ready: called before that.

        Returns:
            The engine that holds it now.

        Raises:
            RMTKDError: the new optimizer has another number of groups.
        """
        accelerator, former = self.accelerator, self.live
        twin = self.whole(model)
        become(twin, replacement.to(next(twin.parameters()).device))
        settings = [{**group, "params": None} for group in raw_optimizer(optimizer).param_groups]
        counted = {name: getattr(former, name) for name in COUNTED}
        self._end(model, twin)
        ready()
        self.remember(model)
        live, made = accelerator.prepare(model, fresh_optimizer())
        groups = raw_optimizer(made).param_groups
        if len(groups) != len(settings):
            raise RMTKDError(
                f"The optimizer {type(raw_optimizer(made)).__name__} has {len(settings)} parameter groups, the "
                f"reduced model needs {len(groups)}: the groups depend on the architecture. Use one whose groups do "
                "not."
            )
        for group, setting in zip(groups, settings, strict=True):
            group.update({name: value for name, value in setting.items() if name != "params"})
        vars(live).update(counted)
        optimizer.optimizer = made.optimizer
        accelerator._optimizers = [optimizer if known is made else known for known in accelerator._optimizers]
        self._former.append(former)
        for engine in self._former:
            engine.__dict__ = live.__dict__
        return live

    def release(self, model: nn.Module) -> None:
        """End the engine: the model has its whole weights again, and can be held by another one. Collective."""
        self._end(model, self.whole(model))
        self._former.clear()

    def _end(self, model: nn.Module, twin: nn.Module) -> None:
        """The model becomes its twin; all that the engine hung on the old inside goes with that."""
        accelerator, engine = self.accelerator, self.live
        engine.destroy()
        accelerator.deepspeed_engine_wrapped = None  # else it goes on asking this one for the backward pass
        accelerator._models = [known for known in accelerator._models if known is not engine]
        accelerator._optimizers = []
        training = model.training
        vars(model).clear()
        vars(model).update(vars(twin))
        model.__class__ = twin.__class__
        model.train(training)


def in_engine(model: nn.Module) -> bool:
    """Whether an engine of DeepSpeed holds the model's weights."""
    return isinstance(holder_of(model), Engine)


def _partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")  # of ZeRO-3: each process has its part


def _gathered(parameter: nn.Parameter) -> torch.Tensor:
    """The whole parameter: in fp32 where an optimizer keeps it so beside the half precision that computes."""
    from deepspeed import zero
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad and (hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")):
        return safe_get_full_fp32_param(parameter)
    with zero.GatheredParameters([parameter], enabled=_partitioned(parameter)):
        return parameter.detach().clone()


@torch.no_grad()
def made_whole(model: nn.Module) -> nn.Module:
    """The same model with plain parameters in place of those that lie in partitions: under ZeRO-3 transformers' own
    `from_pretrained` leaves each process its part, in half precision where the engine computes in it. They come in
    fp32, as the engine's optimizer keeps them. Collective there."""
    plain: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and _partitioned(parameter):
                if id(parameter) not in plain:
                    plain[id(parameter)] = _unpartitioned(parameter)
                module._parameters[name] = plain[id(parameter)]
    return model


def _unpartitioned(parameter: nn.Parameter) -> nn.Parameter:
    whole = _gathered(parameter)
    whole = whole.float() if whole.is_floating_point() else whole
    made = nn.Parameter(whole, requires_grad=parameter.requires_grad)
    theirs = {n: v for n, v in vars(parameter).items() if n.startswith("_is_hf_")}  # transformers': loaded already
    vars(made).update(theirs)
    return made


@contextmanager
def built_whole() -> Iterator[None]:
    """While open, `from_pretrained` gives whole models: where training arguments with ZeRO-3 are alive, transformers
    partitions all that it loads."""
    from transformers.integrations import deepspeed as known

    kept = known._hf_deepspeed_config_weak_ref
    known.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        known._hf_deepspeed_config_weak_ref = kept
