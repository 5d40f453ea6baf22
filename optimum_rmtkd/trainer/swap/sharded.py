"""A model whose parameters are sharded over processes (FSDP2) takes over the architecture of another.

A cut needs whole parameters: they are gathered on every process, the plain model is cut as ever, and what came of it
is sharded anew, with the same optimizer object. torch shards no module twice, so the live model becomes a new object;
the former ones become aliases of it, for those who still hold one (the training loop until its epoch ends, the user).

Knows torch's FSDP2 and Accelerate; no trainer and no run. Every function here that gathers is collective: each
process has to call it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...distillation import Teacher
from ...distillation.teachers import clean_copy
from ...models import block_names, copied
from .in_place import become
from .optimizer import raw_optimizer, regroup


__all__ = [
    "Blueprint",
    "Holder",
    "Sharding",
    "assign",
    "gathered",
    "hold",
    "is_sharded",
    "is_whole",
    "load_state",
    "outline",
    "real_class",
    "whole",
    "whole_copy",
]

HEADROOM = 4  # a cut holds the weights, their gradients, the narrow model, and what passes through a block

_HELD: weakref.WeakKeyDictionary[nn.Module, Holder] = weakref.WeakKeyDictionary()  # by live model and aliases


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to the model."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def holder_of(model: nn.Module) -> Holder | None:
    """Who holds the model's weights now; None where they are at hand, and its own to change."""
    holder = _HELD.get(model)
    return holder if holder is not None and holder.holds(model) else None


def is_whole(model: nn.Module) -> bool:
    """Whether the model's weights are at hand: neither in shards, nor an engine's."""
    return holder_of(model) is None and not is_sharded(model)


def whole(model: nn.Module) -> nn.Module:
    """The model with all of its parameters: itself, or a plain model of its real class with the gathered ones.
    Collective, where it is held."""
    return model if is_whole(model) else _HELD[model].whole(model)


def whole_copy(model: nn.Module) -> nn.Module:
    """A whole copy in evaluation mode, to be kept: in the memory of the processor, where the model is held for want of
    another one. Collective there."""
    return clean_copy(model) if is_whole(model) else whole(model).eval().to("cpu")


def outline(model: nn.Module) -> nn.Module:
    """A model that tells the class and the sizes of all tensors: itself, or one without memory for its parameters."""
    return model if is_whole(model) else _HELD[model].blueprint.model


def real_class(model: nn.Module) -> type:
    """Of the model, without what torch makes of it (`FSDP<its name>`)."""
    return type(outline(model))


def load_state(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Whole tensors into a model, sharded or not; each process has them all."""
    if not is_sharded(model):
        model.load_state_dict(tensors)
        return
    for name, tensor in model.state_dict().items():
        assign(tensor, tensors[name])


def resharded(model: nn.Module) -> nn.Module:
    """The model itself, with nothing but shards in it: a forward pass without a backward one (an evaluation) leaves
    the parameters of the outermost modules whole."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def gathered(tensors: Mapping[str, torch.Tensor], device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
    """The same tensors whole. Collective, where any is sharded.

    Args:
        device: where to, each as soon as it is whole: all of them together may not fit where they are. None: where
            they are.
    """
    return {
        name: _moved(t.detach().full_tensor() if _in_shards(t) else t.detach(), device) for name, t in tensors.items()
    }


def _moved(tensor: torch.Tensor, device: torch.device | str | None) -> torch.Tensor:
    return tensor if device is None else tensor.to(device)


@torch.no_grad()
def assign(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy a whole or a sharded tensor into another one of the same shape; each process has the whole one."""
    if _in_shards(target) and not _in_shards(source):
        from torch.distributed.tensor import distribute_tensor

        source = source.to(target.device_mesh.device_type)
        source = distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(source)


def _in_shards(tensor: torch.Tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor: torch may have been built without them


class Blueprint:
    """A model as it was before it was sharded, with its class, attributes, hooks, buffers and ties, and without the
    memory of its parameters."""

    def __init__(self, model: nn.Module):
        known = {}
        for parameter in model.parameters():
            known[id(parameter)] = _like(parameter, torch.empty_like(parameter, device="meta"))
        self.model = copied(model, known)

    def filled(self, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
        """A plain model with these tensors, which it takes over; by the names of `state_dict`."""
        known = {
            id(parameter): _like(parameter, tensors[name].detach())
            for name, parameter in self.model.named_parameters()
        }
        twin = copied(self.model, known)
        device = next(twin.parameters()).device
        for name, buffer in twin.named_buffers():
            if name in tensors:
                buffer.copy_(tensors[name])
        return twin.to(device)

    def save_config(self, folder: str | Path) -> None:
        """Write what says of which architecture the tensors beside it are, as `save_pretrained` does."""
        config = copy.deepcopy(self.model.config)
        config.architectures = [type(self.model).__name__]
        config.save_pretrained(folder)


def _like(parameter: nn.Parameter, data: torch.Tensor) -> nn.Parameter:
    """Another parameter with the flags and the attributes of this one (transformers marks those that it loads)."""
    made = nn.Parameter(data, requires_grad=parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def hold(teacher: Teacher, student: nn.Module) -> Callable[[], None]:
    """Hold what a teacher asks as the student is held, but for models that have trained parts, which stay whole.
    Collective there.

    Returns:
        Puts the teacher's own models back.
    """
    holder, own = holder_of(student), []
    if holder is None:
        return lambda: None
    for member in _members(teacher):
        if isinstance(member.model, nn.Module) and not member.parameters():
            own.append((member, member.model))
            member.model = holder.teaching(member.model, student)

    def let_go() -> None:
        for member, model in own:
            member.model = model

    return let_go


def _members(teacher: Teacher) -> list[Teacher]:
    inner = getattr(teacher, "members", None)
    return [teacher] if inner is None else [m for member in inner for m in _members(member)]


class Holder:
    """A way in which several processes hold a model whose weights are not at hand.

    Attributes:
        blueprint: of the model that was remembered last.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.blueprint: Blueprint | None = None

    def holds(self, model: nn.Module) -> bool:
        """Whether a model that was remembered is held now."""
        raise NotImplementedError

    def tensors(self, model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
        """Whole tensors of a held model by the names of `state_dict`, on `device`. Collective."""
        raise NotImplementedError

    def size(self, model: nn.Module) -> int:
        """Bytes of the whole weights of a held model."""
        raise NotImplementedError

    def teaching(self, model: nn.Module, student: nn.Module) -> nn.Module:
        """A teacher's model as it is asked beside a held student: itself, or a copy."""
        return model.to(self.accelerator.device)

    def remember(self, model: nn.Module) -> None:
        """The model is about to be held."""
        if not self.holds(model):
            self.blueprint = Blueprint(model)
            _HELD[model] = self

    def whole(self, model: nn.Module) -> nn.Module:
        """See `whole`."""
        twin = self.blueprint.filled(self.tensors(model, self._bench(model)))
        flags = {_plain_name(name): p.requires_grad for name, p in model.named_parameters()}
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(flags[name])
        return twin.train(model.training)

    def _bench(self, model: nn.Module) -> torch.device:
        """Where a whole model is worked on: the device, unless it would not fit. All processes decide alike."""
        device = self.accelerator.device
        if device.type != "cuda":
            return device
        needed = HEADROOM * self.size(model)
        short = torch.tensor([needed > torch.cuda.mem_get_info(device)[0]], device=device, dtype=torch.int32)
        return torch.device("cpu") if self.accelerator.reduce(short, reduction="sum").item() else device


class Sharding(Holder):
    """How Accelerate shards a model over its processes (FSDP2).

    Args:
        shards_teachers: teachers are sharded as well; else each process holds them whole.
    """

    def __init__(self, accelerator: Any, shards_teachers: bool = True):
        super().__init__(accelerator)
        self.shards_teachers = shards_teachers
        self._former: list[nn.Module] = []

    def holds(self, model: nn.Module) -> bool:
        return is_sharded(model)

    def tensors(self, model: nn.Module, device: torch.device) -> dict[str, torch.Tensor]:
        return gathered(model.state_dict(), device)

    def size(self, model: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in resharded(model).parameters())

    def teaching(self, model: nn.Module, student: nn.Module) -> nn.Module:
        return self.shard(clean_copy(model), student) if self.shards_teachers else super().teaching(model, student)

    def shard(self, model: nn.Module, like: nn.Module) -> nn.Module:
        """Shard a model that does not learn (a teacher), in place, over the processes of one that does.

        Args:
            like: the sharded model.
        """
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh, policy = next(iter(resharded(like).parameters())).device_mesh, self._plugin.mixed_precision_policy
        options = {"mesh": mesh, "reshard_after_forward": True, "mp_policy": policy or MixedPrecisionPolicy()}
        blocks = set(getattr(model, "_no_split_modules", None) or ())
        for module in reversed([module for module in model.modules() if type(module).__name__ in blocks]):
            fully_shard(module, **options)
        return fully_shard(model, **options)

    @property
    def _plugin(self) -> Any:
        return self.accelerator.state.fsdp_plugin

    def install(
        self,
        model: nn.Module,
        replacement: nn.Module,
        optimizer: Any,
        fresh_groups: Callable[[], list[dict[str, Any]]] | None,
        ready: Callable[[nn.Module], None] = lambda model: None,
    ) -> nn.Module:
        """The new live model, sharded, with the inside of `replacement`; optimizer and learning rate go on. Its state
        follows the parameters that did not change, shard by shard. Collective.

        Args:
            fresh_groups: the groups that an optimizer made now would have; None: the user built it, see `regroup`.
            ready: called before that with the new model, which is not sharded yet.
        """
        from torch.distributed.fsdp import register_fsdp_forward_method

        raw, accelerator = raw_optimizer(optimizer), self.accelerator
        twin = self.whole(model)
        name = block_names(twin, replacement)
        same = become(twin, replacement.to(next(twin.parameters()).device))
        ready(twin)
        self.remember(twin)
        before = {_plain_name(path): p for path, p in resharded(model).named_parameters()}
        old = {name(path) or f"removed {path}": p for path, p in before.items()}
        # in one order on all processes, which gather it one by one: that of a set of names is each process's own
        state = {name: raw.state[p] for name, p in old.items() if name in same and p in raw.state}
        groups = None if fresh_groups is None else fresh_groups()
        regroup(optimizer, old, dict(twin.named_parameters()), set(), groups)
        accelerator._models = [m for m in accelerator._models if m is not model]
        accelerator._optimizers = [o for o in accelerator._optimizers if o is not optimizer]
        live, _ = accelerator.prepare(twin, optimizer)
        new = {_plain_name(name): p for name, p in live.named_parameters()}
        raw.state.update({new[name]: values for name, values in state.items()})
        if hasattr(live, "generate"):
            register_fsdp_forward_method(live, "generate")
        self._alias(model, live)
        return live

    def _alias(self, model: nn.Module, live: nn.Module) -> None:
        """All former objects share the inside of the live one: what they held is freed, and `zero_grad`, a forward
        pass or `no_sync` through one of them reach the model that trains."""

        def sync(self, *positional: Any, **named: Any) -> None:
            live.set_requires_gradient_sync(*positional, **named)

        shown = type(type(live).__name__, (type(live),), {"set_requires_gradient_sync": sync})
        self._former.append(model)
        for former in self._former:
            former.__dict__ = live.__dict__
            former.__class__ = shown


def _plain_name(name: str) -> str:
    """Of a parameter, without what activation checkpointing puts into its path."""
    return name.replace("_checkpoint_wrapped_module.", "")
