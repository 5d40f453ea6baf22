"""Where a model is not what its class builds from its config, module by module, and which field would say so."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..errors import UnsupportedArchitectureError
from .carrying import is_bare, is_plain, is_untrained
from .rebuilding import blank


__all__ = ["AROUND_THE_RESULT", "ON_THE_RESULT", "Difference", "differences", "field_that_says_so", "not_its_config"]

# Plain attributes that decide what a module computes, beside the numbers that a spec can state (`rebuilding.PINNED`).
# Others are carried over where the outputs are equal.
MEANING = frozenset(
    "num_heads num_attention_heads n_heads n_head num_key_value_heads num_key_value_groups head_dim "
    "attention_head_size all_head_size is_causal is_decoder max_norm norm_type scale_grad_by_freq "
    "approximate kernel_size stride padding dilation groups padding_mode track_running_stats sliding_window".split()
)
CANNOT_BUILD = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, ZeroDivisionError)
# They matter to one class and not to another (the row of padding has no gradient; position ids count from it), and
# fields of the config that say them are often set after the model was made: the outputs tell.
PERHAPS = MEANING | {"padding_idx"}
ON_THE_RESULT = "narrow the stock model, and put the change on the result"
AROUND_THE_RESULT = (
    "Narrow the model of transformers inside by itself, with optimum_rmtkd.narrow, and put your layers around the "
    "result (without the site 'hidden' its stream stays as wide as it is)"
)


@dataclass(frozen=True)
class Difference:
    """One module that is not what the config describes: what stands at `path`, and what the class builds there.
    `numbers` are pairs of (expected, found) that a field of the config may state."""

    path: str
    found: str
    expected: str
    numbers: tuple[tuple[Any, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.path or 'the model itself'} is {self.found}, the class and config describe {self.expected}"


def differences(model: nn.Module, stock: nn.Module, activations: bool = False) -> list[Difference]:
    """Where a model is not what `stock`, built from its class and config, is; what stands inside a module that differs
    is not named again.

    Args:
        activations: also name what may make no difference: modules without tensors that are of another type (an
            Identity in place of a dropout), another padding index. The outputs tell.
    """
    ours, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (model, stock))
    found: list[Difference] = []
    for path in dict.fromkeys((*theirs, *ours)):
        if any(path.startswith(f"{d.path}.") or path == d.path for d in found if d.path):
            continue
        if path not in ours:
            found.append(Difference(path, "missing", _shown(theirs[path]), _layer_counts(path, ours, theirs)))
        elif path not in theirs:
            if not is_untrained(ours[path]):
                found.append(Difference(path, f"a {_shown(ours[path])}", "nothing", _layer_counts(path, ours, theirs)))
        elif difference := _difference(path, ours[path], theirs[path], activations):
            found.append(difference)
    return found


def _difference(path: str, ours: nn.Module, theirs: nn.Module, activations: bool) -> Difference | None:
    if type_before_parametrizations(ours) is not type_before_parametrizations(theirs):
        if is_bare(ours) and is_bare(theirs) and not activations:
            return None
        return Difference(path, f"a {_shown(ours)}", f"a {_shown(theirs)}", ((type(theirs), type(ours)),))
    shapes, expected = _shapes(ours), _shapes(theirs)
    wrong = {name: shape for name, shape in expected.items() if shapes.get(name) != shape}
    extra = [name for name in ours._parameters if name not in expected and ours._parameters[name] is not None]
    if wrong or extra:
        numbers = [
            pair
            for name, shape in wrong.items()
            if shape and shapes.get(name)
            for pair in zip(shape, shapes[name], strict=False)
            if pair[0] != pair[1]
        ]
        if not next(ours.children(), None):
            return Difference(path, f"a {_shown(ours)}", f"a {_shown(theirs)}", tuple(numbers))
        names = ", ".join((*wrong, *extra))
        return Difference(path, f"a {type(ours).__name__} with other {names}", f"{wrong or 'none'}", tuple(numbers))
    for name, value in vars(theirs).items():
        given = vars(ours).get(name, value)
        if name in (PERHAPS if activations else MEANING) and is_plain(value) and is_plain(given) and given != value:
            return Difference(path, f"a {type(ours).__name__} with {name}={given!r}", f"{value!r}", ((value, given),))
    return None


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...] | None]:
    """Shapes of a module's own tensors; None for a bias that it goes without."""
    tensors = module._parameters | module._buffers
    return {name: None if tensor is None else tuple(tensor.shape) for name, tensor in tensors.items()}


def _layer_counts(path: str, ours: Mapping[str, nn.Module], theirs: Mapping[str, nn.Module]) -> tuple:
    """(layers that the config describes, layers there are) of the list that a missing or added layer belongs to."""
    parent = path.rpartition(".")[0]
    if isinstance(theirs.get(parent), nn.ModuleList) and isinstance(ours.get(parent), nn.ModuleList):
        return ((len(theirs[parent]), len(ours[parent])),)
    return ()


def _shown(module: nn.Module) -> str:
    """One line: with its arguments where it has no children."""
    children = [type(child).__name__ for child in module.children()]
    return f"{type(module).__name__}({', '.join(children[:4])})" if children else repr(module)


def not_its_config(model: PreTrainedModel, found: list[Difference]) -> UnsupportedArchitectureError:
    listed = "; ".join(map(str, found[:3])) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
    field = field_that_says_so(model, found)
    cure = (
        f"Say so in the config: model.config.{field}."
        if field
        else f"Put the change into the config if it has a field for it; else {ON_THE_RESULT}."
    )
    return UnsupportedArchitectureError(
        f"{type(model).__name__} is not what its config describes, and a narrow model is rebuilt from class and "
        f"config: {listed}. {cure}"
    )


def field_that_says_so(model: PreTrainedModel, found: list[Difference]) -> str | None:
    """The assignment to one field of the config with which the class builds what the model is; tried, not guessed."""
    values = {"num_labels": getattr(model.config, "num_labels", None), **model.config.to_dict()}
    for expected, found in dict.fromkeys(pair for d in found for pair in d.numbers):
        wanted = _names_of_activation(found) if isinstance(found, type) else [found]
        for name, value in values.items():
            if not (value == expected if not isinstance(expected, type) else value in _names_of_activation(expected)):
                continue
            if isinstance(value, bool) != isinstance(expected, bool):
                continue
            for new in wanted:
                if _explains(model, name, new):
                    return f"{name} = {new!r}"
    return None


def _names_of_activation(kind: type) -> list[str]:
    """Names under which transformers knows an activation class."""
    entries = {name: dict.__getitem__(ACT2FN, name) for name in ACT2FN}  # reading through it would make all of them
    return [name for name, entry in entries.items() if kind is (entry[0] if isinstance(entry, tuple) else entry)]


def _explains(model: PreTrainedModel, name: str, value: Any) -> bool:
    config = copy.deepcopy(model.config)
    try:
        setattr(config, name, value)
        return not differences(model, blank(model, config), activations=True)
    except (*CANNOT_BUILD, StrictDataclassError):
        return False  # no config of this class has that value
