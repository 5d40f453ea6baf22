"""What can be narrowed: family by site by form, read off the registry and small models without weights.

Nothing here is a list of what works: a family that is declared appears by itself, and one of `OTHERS` leaves its place
among those that take two factors alone.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import RMTKDError, UnsupportedArchitectureError
from ..validation.wording import close, shown
from . import families
from .decoders import DecoderLayout
from .layouts import factored_anatomy
from .native import native_anatomy


if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["FamilyRow", "families_markdown", "families_table", "family_rows", "registered_families"]

# Well-known architectures of transformers, of which some are declared: those appear as families.
OTHERS = """albert bart beit bloom blip clip convnext convnextv2 deberta deberta-v2 dinov2 efficientnet falcon gemma2
gemma3_text mamba marian mbart mixtral mobilenet_v1 mobilenet_v2 modernbert mpnet mpt mt5 olmo olmo2 pegasus qwen2_moe
regnet segformer swin t5 vit_mae wav2vec2 whisper""".split()
LAYERS = 2  # of a model that is looked at
AUTO = (
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_MAPPING",
)
INCOMPLETE = (AttributeError, TypeError, ValueError, KeyError, IndexError, ImportError)  # of defaults of transformers
UNKNOWN = "transformers' default config makes no model"
NO_FAMILY = "no family is declared"
MARKS = {True: "cut", False: ""}


@dataclass(frozen=True)
class FamilyRow:
    """What is known of some model types that are laid out alike.

    Attributes:
        family: name of the declaration; "" without one.
        model_types: `config.model_type`, sorted.
        sites: kinds of sites that can be cut in `form="absorbed"`, in the order of the network; none without a family.
        native: why `shape="native"` is refused; "" where it works.
        factored: whether `form="factored"` finds layers to replace.
    """

    family: str
    model_types: tuple[str, ...]
    sites: tuple[str, ...]
    native: str
    factored: bool


def family_rows(model_types: Sequence[str] = ()) -> list[FamilyRow]:
    """All registered families, and the well-known architectures without one, asked by models without weights (on the
    device "meta", of two layers where a config counts them).

    Encoders come first, then convolutional networks, decoders, and what has no family.

    Args:
        model_types: those alone; default: all.

    Raises:
        UnsupportedArchitectureError: a model type that transformers does not know.
    """
    from transformers.utils import logging

    families_of = registered_families()
    _check_known(model_types)
    wanted = list(model_types) or [*families_of, *(name for name in OTHERS if name not in families_of)]
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # about token ids of defaults that nobody will use
    try:
        rows = [_look(name, families_of.get(name)) for name in wanted]
    finally:
        logging.set_verbosity(level)
    return _merged([row for row in rows if row.family or row.native != UNKNOWN])


def registered_families() -> dict[str, families.Family]:
    """{model type: family} of all that are shipped or were registered."""
    for module in pkgutil.iter_modules(families.__path__):
        import_module(f"{families.__name__}.{module.name}")
    return dict(families.FAMILIES)


def _check_known(model_types: Sequence[str]) -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for name in model_types:
        if name not in CONFIG_MAPPING and name not in families.FAMILIES:
            meant = close(name, list(CONFIG_MAPPING.keys()))
            raise UnsupportedArchitectureError(
                f"transformers knows no model_type {shown(name)}: expected what a config.json says of it, such as "
                f"bert.{' ' * bool(meant)}{meant}"
            )


def _merged(rows: Sequence[FamilyRow]) -> list[FamilyRow]:
    """One row for all model types of a family with the same answers; types without an answer share those of their
    family."""
    answers: dict[tuple, list[str]] = {}
    for row in sorted(rows, key=lambda row: row.native == UNKNOWN):  # stable: the answers first
        key = (row.family, row.sites, row.native, row.factored)
        if row.native == UNKNOWN:
            key = next((known for known in answers if known[0] == row.family), key)
        answers.setdefault(key, []).extend(row.model_types)
    found = [FamilyRow(name, tuple(sorted(types)), *others) for (name, *others), types in answers.items()]
    return sorted(found, key=lambda row: (_order(row), row.sites, row.family.lower(), row.model_types))


def _order(row: FamilyRow) -> int:
    kinds = set(row.sites)
    return 3 if not row.sites else 1 if not kinds & {"hidden"} else 2 if "attention_groups" in kinds else 0


def _look(model_type: str, family: families.Family | None = None) -> FamilyRow:
    """The row of one model type."""
    model = _example(model_type, causal=family is not None and isinstance(family.layout, DecoderLayout))
    name = family.name if family else ""
    if model is None:
        return FamilyRow(name, (model_type,), (), UNKNOWN, False)
    factored = bool(factored_anatomy(model).sites)
    if family is None:
        return FamilyRow(name, (model_type,), (), NO_FAMILY, factored)
    sites = family.layout.anatomy(model).sites.values()
    kinds = tuple(dict.fromkeys(site.kind for site in sites if site.chosen))
    try:
        native_anatomy(model)
    except RMTKDError as error:
        return FamilyRow(name, (model_type,), kinds, _reason(str(error), type(model).__name__), factored)
    return FamilyRow(name, (model_type,), kinds, "", factored)


def _reason(message: str, model: str) -> str:
    """Why, without the name of a class and what to do instead."""
    message = message.removeprefix("shape='native': ").replace(model, "its class")
    return re.split(r"(?<=[^.]\.) (?:Use|Narrow)\b", message)[0].rstrip(".")


def _example(model_type: str, causal: bool) -> PreTrainedModel | None:
    """A model of this type without weights; None where transformers' defaults make none."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    for given in ({"num_hidden_layers": LAYERS}, {}):
        try:
            config = _filled(AutoConfig.for_model(model_type, **given))
            cls = _class_of(config, causal)
            with torch.device("meta"):
                return cls(config) if cls else None
        except (*INCOMPLETE, StrictDataclassError):
            continue
    return None


def _filled(config: PreTrainedConfig) -> PreTrainedConfig:
    """With the numbers of heads that some configs leave to the checkpoints."""
    heads, width = (getattr(config, name, None) for name in ("num_attention_heads", "hidden_size"))
    if isinstance(heads, int) and isinstance(width, int):
        for name, value in (("num_key_value_heads", heads), ("head_dim", width // heads)):
            if getattr(config, name, 0) is None:
                setattr(config, name, value)
    return config


def _class_of(config: PreTrainedConfig, causal: bool) -> type[PreTrainedModel] | None:
    from transformers.models.auto import modeling_auto

    for name in AUTO if causal else AUTO[1:]:
        mapping: Mapping[Any, Any] = getattr(modeling_auto, name)
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    return None


def families_table(rows: Sequence[FamilyRow]) -> str:
    """Plain text: families under the sites that they share."""
    named = [(row.family or "no family", ", ".join(row.model_types), row) for row in rows]
    wide = max((len(name) for name, *_ in named), default=0)
    lines: list[str] = []
    groups = dict.fromkeys((bool(row.sites), row.sites) for row in rows)
    for declared, sites in groups:
        lines += ["", f"can be cut: {', '.join(sites)}" if declared else 'only form="factored":']
        for name, types, row in named:
            if row.sites == sites:
                marks = ["native"] * (not row.native) + ["factored"] * row.factored
                lines.append(f"  {name.ljust(wide)}  {types}" + (f"  ({', '.join(marks)})" if declared else ""))
    lines += ["", 'native: shape="native" gives a plain checkpoint; factored: form="factored" finds layers.']
    return "\n".join(lines[1:])


def families_markdown(rows: Sequence[FamilyRow], tests: Mapping[str, str]) -> str:
    """The generated part of docs/guides/families.md.

    Args:
        tests: {model type: the test that takes a model of it through its whole life}.
    """
    kinds = list(dict.fromkeys(kind for row in rows for kind in row.sites))
    reasons = list(dict.fromkeys(row.native for row in rows if row.native and row.sites))
    head = ["family", "`model_type`", *(f"`{kind}`" for kind in kinds), "native", "factored", "tested by"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        if not row.sites:
            continue
        native = f"refused ({reasons.index(row.native) + 1})" if row.native else "works"
        names = list(dict.fromkeys(tests[name] for name in row.model_types if name in tests))
        tested = ", ".join(f"`{name}`" for name in names) or "no test of its own"
        marks = [MARKS[kind in row.sites] for kind in kinds]
        lines.append([row.family, _code(row.model_types), *marks, native, "works" if row.factored else "–", tested])
    text = ["| " + " | ".join(cells) + " |" for cells in lines]
    text += ["", "Why the native shape is refused:", ""]
    text += [f"{number}. {reason}." for number, reason in enumerate(reasons, start=1)]
    without = [name for row in rows if not row.sites and row.factored for name in row.model_types]
    refused = [name for row in rows if not row.sites and not row.factored for name in row.model_types]
    text += ["", f"Factored only, because {NO_FAMILY}: {_code(without)}, and others with linear layers."]
    if refused:
        text += ["", f"Refused, because they hold no linear layer: {_code(refused)}."]
    return "\n".join(text) + "\n"


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
