"""The contract of a reparameterization: put on, folded back, and its tensors for a resumed run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import RMTKDError
from ..models import copied
from ..registry import Part, Registry
from ..validation import Length, Positive
from .targets import target_paths


__all__ = [
    "Reparameterization",
    "Targets",
    "build_reparameterization",
    "core_parameters",
    "fold",
    "folded_copy",
    "is_reparameterized",
    "over_parameterize",
    "plain_parameters",
    "register_reparameterization",
]


Targets = str | Annotated[Sequence[str], Length(1)]


class Reparameterization(Part):
    """Writes chosen weights as a function of other parameters, which are trained in their place.

    The modules stay what they are (`torch.nn.utils.parametrize`): hooks, PEFT and the code of transformers see an
    ordinary `weight`. The function that the model computes does not change when it is put on, nor when it is folded
    back. To add one, subclass, name it, implement `parametrization`, and register it.

    Args:
        target_modules: None: all matrices inside the blocks; a regular expression for whole paths, or a list of last
            words.
        lr_scale: factor on the learning rate of the new parameters; they get no weight decay.
    """

    def __init__(self, target_modules: Targets | None = None, lr_scale: Positive = 1.0):
        if isinstance(target_modules, str):
            try:
                re.compile(target_modules)
            except re.error as error:
                raise RMTKDError(f"target_modules={target_modules!r} is no regular expression: {error}.") from error
        self.target_modules, self.lr_scale = target_modules, lr_scale

    def parametrization(self, weight: torch.Tensor) -> nn.Module:
        """A module with `forward(*originals) -> weight` and `right_inverse(weight) -> originals` for this weight."""
        raise NotImplementedError(f"{type(self).__name__} must implement parametrization(weight).")

    def kinds(self) -> tuple[type, ...]:
        """Module types that can be taken: matrices, those of GPT-2 (stored transposed) included."""
        from transformers.pytorch_utils import Conv1D

        return (nn.Linear, Conv1D)

    def finish(self, weight: torch.Tensor) -> torch.Tensor:
        """Change of a folded weight that is about to be saved or handed back (pruning); none by default."""
        return weight

    @torch.no_grad()
    def apply(self, model: nn.Module, tensors: Mapping[str, torch.Tensor] | None = None) -> list[str]:
        """Put it on `model`, in place.

        Args:
            tensors: of `state(model)` at an earlier time; None: computed from the weights.

        Returns:
            paths of the modules taken.

        Raises:
            RMTKDError: no module matches, it is on already, or tensors of another model or another setting. The model
                is then what it was.
        """
        if is_reparameterized(model):
            raise RMTKDError(f"{type(model).__name__} is reparameterised already; fold(model) first.")
        paths = target_paths(model, self.target_modules, self.kinds())
        weights = {path: model.get_submodule(path).weight for path in paths}
        values = {path: weight.detach() for path, weight in weights.items()}
        try:
            for path in paths:
                self._put_on(model.get_submodule(path))
            if tensors is not None:
                self._load(model, tensors)
        except Exception:
            fold(model)
            for path, weight in weights.items():
                weight.data = values[path]  # parametrize writes into the parameter where the shape stays
                model.get_submodule(path).weight = weight
            raise
        return paths

    def _put_on(self, module: nn.Module) -> None:
        trained = module.weight.requires_grad
        parametrize.register_parametrization(module, "weight", self.parametrization(module.weight), unsafe=True)
        chain = module.parametrizations["weight"]
        chain.folds = True
        for parameter in chain.parameters():
            parameter.requires_grad_(trained)

    def _load(self, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
        own = core_parameters(model)
        wrong = [n for n in {**own, **tensors} if n not in own or n not in tensors or own[n].shape != tensors[n].shape]
        if wrong:
            raise RMTKDError(
                f"The checkpoint's tensors do not fit this {self.name}: {len(wrong)} differ, the first is "
                f"{min(wrong)!r}. Resume with the reparameterization (same arguments) that the run was started with."
            )
        for name, parameter in own.items():
            parameter.copy_(tensors[name])

    def state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The trained tensors that a folded checkpoint does not hold: folding forgets how they share the weight."""
        return {name: parameter.detach() for name, parameter in core_parameters(model).items()}


REPARAMETERIZATIONS: Registry[Reparameterization] = Registry("reparameterization")
register_reparameterization = REPARAMETERIZATIONS.register


def build_reparameterization(given: Any) -> Reparameterization | None:
    """From None, an instance, a name, or {"name": ..., arguments}.

    Raises:
        RMTKDError: unknown names, answered with the known ones; arguments it does not take.
    """
    if given is None or isinstance(given, Reparameterization):
        return given
    return REPARAMETERIZATIONS.build(given)


def _taken(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) that `apply` took. Parametrizations of the architecture itself (weight norm) are none of ours."""
    return [
        (path, module)
        for path, module in model.named_modules()
        if parametrize.is_parametrized(module)
        and any(getattr(chain, "folds", False) for chain in module.parametrizations.values())
    ]


def is_reparameterized(model: nn.Module) -> bool:
    """Does any module carry a `Reparameterization`?"""
    return bool(_taken(model))


def core_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters behind reparameterised weights, by name."""
    heads = tuple(f"{path}.parametrizations." for path, _ in _taken(model))
    return {name: p for name, p in model.named_parameters() if heads and name.startswith(heads)}


def plain_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Name -> parameter as `fold` would leave them; reparameterised weights are computed now."""
    cores = core_parameters(model)
    plain = {name: parameter for name, parameter in model.named_parameters() if name not in cores}
    for path, module in _taken(model):
        plain |= {f"{path}.{name}": getattr(module, name) for name in module.parametrizations}
    return plain


@torch.no_grad()
def fold(model: nn.Module, finish: Reparameterization | None = None) -> nn.Module:
    """Turn every reparameterised weight back into a plain parameter, in place; outputs do not change. Returns the
    model.

    Args:
        finish: apply its last step (pruning) to what was folded.
    """
    for _, module in _taken(model):
        chains = module.parametrizations
        plain = {name: (getattr(module, name).detach().clone(), chains[name]) for name in chains}
        # Not `remove_parametrizations`: it takes the property from the class, which deep copies share.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        others = dict(module._parameters)
        module._parameters.clear()  # the weight comes first again
        for name, (weight, chain) in plain.items():
            weight = weight if finish is None else finish.finish(weight)
            trained = any(parameter.requires_grad for parameter in chain.parameters())
            module.register_parameter(name, nn.Parameter(weight, requires_grad=trained))
        module._parameters.update(others)
    return model


def folded_copy(model: nn.Module, finish: Reparameterization | None = None) -> nn.Module:
    """As `fold`, of a copy; the model itself stays as it is."""
    return fold(copied(model), finish)


def over_parameterize(model: nn.Module, reparameterization: Any) -> nn.Module:
    """Put a reparameterization (instance, name or dict) on a model, in place; returns the model. `fold` undoes it."""
    build_reparameterization(reparameterization).apply(model)
    return model
