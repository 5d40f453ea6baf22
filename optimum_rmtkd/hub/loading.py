"""A saved model with its own class, whatever its task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RMTKDError


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["class_of", "load_config", "load_model", "load_processor"]

TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def load_config(name: str | Path) -> PreTrainedConfig:
    """The config in a folder or repository.

    Raises:
        RMTKDError: none there, or of an unknown kind.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except RMTKDError:  # of a narrowed model, whose config has a schema
        raise
    # the last four: a config.json that is no object, or holds values of other kinds than its class declares
    except (OSError, ValueError, RecursionError, TypeError, AttributeError, KeyError, StrictDataclassError) as error:
        hint = "" if Path(name).is_dir() else f" There is no folder {name} here, so it was looked for on the Hub."
        raise RMTKDError(f"Cannot load model '{name}': {error}{hint}") from error


def load_model(name: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in a folder or repository as the class that its config names, in eval mode.

    Args:
        dtype: None for that of the checkpoint.

    Raises:
        RMTKDError: no model there, one of a class that neither transformers nor this package has, or weights that are
            damaged or do not fit (SpecMismatchError).
    """
    from safetensors import SafetensorError

    config = load_config(name)
    cls = class_of(name, config)
    try:
        return cls.from_pretrained(name, dtype=dtype or "auto").eval()
    except (OSError, SafetensorError) as error:
        raise RMTKDError(f"Cannot load the weights of '{name}': {error}") from error


def class_of(name: str | Path, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a config names.

    Raises:
        RMTKDError: it is none of transformers' models, or one of another config.
    """
    import transformers

    from .. import modeling_rmtkd, ternary
    from ..ternary.configuration_ternary import TernaryMLPConfig

    given = config.architectures
    wanted = given[0] if isinstance(given, (list, tuple)) and given and isinstance(given[0], str) else ""
    home = modeling_rmtkd if wanted.startswith(modeling_rmtkd.PREFIX) else transformers
    if config.model_type == TernaryMLPConfig.model_type:
        home = ternary
    cls = getattr(home, wanted, None) if wanted.isidentifier() else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise RMTKDError(
            f"'{name}' names the class {wanted!r}, which transformers does not have: expected a model of its own."
        )
    if cls.config_class is None or not isinstance(config, cls.config_class):
        raise RMTKDError(
            f"'{name}' names the class {wanted}, and its config is a {type(config).__name__} (model_type "
            f"{config.model_type!r}): expected both to be of one architecture."
        )
    return cls


def load_processor(name: str | Path) -> Any | None:
    """The tokenizer or image processor beside a model; None where there is none.

    Raises:
        RMTKDError: its files are there and cannot be read.
    """
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.utils import cached_file

    kinds = {"preprocessor_config.json": AutoImageProcessor, "tokenizer_config.json": AutoTokenizer}
    for file, auto in kinds.items():
        lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if cached_file(name, file, **lenient) is None:
            continue
        try:
            return auto.from_pretrained(name)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RMTKDError(f"Cannot load what {file} of '{name}' describes: {error}") from error
    return None
