"""What lies in a folder or repository: a model with its own class, whatever its task, and its tokenizer or processor.

They may be a stranger's. Code beside them is not run, and nobody is asked whether it may; what transformers and
tokenizers make of damaged files is one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RMTKDError


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "check_plain",
    "class_of",
    "load_config",
    "load_image_processor",
    "load_model",
    "load_processor",
    "load_processors",
    "load_tokenizer",
    "refusals_named",
    "tokenizing",
]

PLAIN = {  # quantisation -> what makes plain numbers of it in transformers
    "bitsandbytes": "load it, call model.dequantize()",
    "mxfp4": "load it with quantization_config=Mxfp4Config(dequantize=True)",
    "fp8": "load it with quantization_config=FineGrainedFP8Config(dequantize=True)",
}

# What code that expects sound files raises at others: values of another kind, of no class, beyond a range, packages
# that a named class would need.
REFUSALS = (OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError)
REFUSALS += (RuntimeError, ImportError)
LONGEST = 1000  # characters of a foreign message
OWN_CODE = (
    "it comes with code of its own (auto_map), which is never run here. Expected a class that transformers has: load "
    "it yourself, and save it as one"
)


@contextmanager
def refusals_named(words: str) -> Iterator[None]:
    """What transformers, tokenizers or safetensors refuse in this block is said on one line, behind `words`.

    Raises:
        RMTKDError: in place of their errors.
    """
    try:
        yield
    except RMTKDError:
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception; whatever is no refusal goes on
        if not (isinstance(error, _refusals()) or _of_tokenizers(error)) or _out_of_memory(error):
            raise
        raise RMTKDError(f"{words}: {_told(error)}") from error


@contextmanager
def tokenizing(name: str | Path) -> Iterator[None]:
    """What the tokenizers library refuses in this block is said of the tokenizer of `name`: a damaged one may load,
    and fail at a text.

    Raises:
        RMTKDError: in place of its errors.
    """
    try:
        yield
    except BaseException as error:
        if not _of_tokenizers(error):
            raise
        raise RMTKDError(
            f"The tokenizer of '{name}' cannot cut a text ({_told(error)}): its tokenizer.json was damaged or edited. "
            "Get it again from where it was saved."
        ) from error


def _refusals() -> tuple[type[BaseException], ...]:
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return (*REFUSALS, StrictDataclassError, SafetensorError)


def _of_tokenizers(error: BaseException) -> bool:
    """Its Rust code raises Exception itself, of no narrower class, and panics."""
    return type(error) is Exception or type(error).__module__ == "pyo3_runtime"


def _out_of_memory(error: BaseException) -> bool:
    from torch import OutOfMemoryError

    return isinstance(error, OutOfMemoryError)


def _told(error: BaseException) -> str:
    """A foreign error on one line, with its kind where the words alone might not say it."""
    words = " ".join(str(error).split())[:LONGEST]
    if "trust_remote_code" in words:
        return OWN_CODE
    speaks = words and (isinstance(error, (OSError, ValueError)) or type(error) is Exception)
    return words if speaks else f"{type(error).__name__}{': ' if words else ''}{words}"


def load_config(name: str | Path) -> PreTrainedConfig:
    """The config in a folder or repository.

    Raises:
        RMTKDError: none there, or of an unknown kind.
    """
    from transformers import AutoConfig

    _check_place(name)
    try:
        with refusals_named(f"Cannot load model '{name}'"):
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except RMTKDError as error:
        if error.__cause__ is not None and (packed := _gguf(name)) is not None:
            raise RMTKDError(
                f"Cannot load model '{name}': {packed.name} holds packed weights (GGUF), and a cut needs plain "
                "numbers. Take the checkpoint that it was made from, or unpack it with AutoModelForCausalLM."
                "from_pretrained("
                f"{str(packed.parent)!r}, gguf_file={packed.name!r}).save_pretrained(FOLDER), its tokenizer alike. "
                "Convert the narrow model to GGUF in the end."
            ) from error.__cause__
        if Path(name).is_dir() or error.__cause__ is None:
            raise
        hint = f" There is no folder {name} here, so it was looked for on the Hub."
        raise RMTKDError(f"{error}{hint}") from error.__cause__


def _check_place(name: str | Path) -> None:
    """Refuse a path that is none of a folder, before transformers takes it for the name of a repository.

    Raises:
        RMTKDError: a file; or what can only be a path, and is none that is there.
    """
    path, text = Path(name), str(name)
    if path.is_file() and _gguf(name) is None:
        beside = " (it has one)" if (path.parent / "config.json").is_file() else ""
        raise RMTKDError(
            f"Cannot load model '{name}': it is a file; expected a folder with config.json and weights, or the name "
            f"of a repository. Give the folder that it lies in, {path.parent}{beside}."
        )
    a_path = text.startswith(("/", ".", "~")) or "\\" in text or text.count("/") > 1
    if a_path and not path.exists():
        home = path.expanduser() if text.startswith("~") else path
        hint = f"The shell did not expand ~: write {home}" if home.exists() else "Check the path"
        raise RMTKDError(
            f"Cannot load model '{name}'. There is no folder {name} here, and no repository of the Hub has such a "
            f"name. {hint}."
        )


def _gguf(name: str | Path) -> Path | None:
    """The first GGUF file that a path names or holds."""
    path = Path(name)
    if path.suffix == ".gguf" and path.is_file():
        return path
    return min(path.glob("*.gguf"), default=None) if path.is_dir() else None


def check_plain(name: str | Path, config: PreTrainedConfig) -> None:
    """Refuse quantised weights, by their config alone.

    Raises:
        RMTKDError: names the method, and how to get plain numbers.
    """
    quantized = getattr(config, "quantization_config", None)
    if quantized is None:
        return
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
    method = str(getattr(method, "value", method))
    unpack = f", or {PLAIN[method]} and save it" if method in PLAIN else ""
    raise RMTKDError(
        f"The weights of '{name}' are quantised ({method}), and a cut needs plain numbers: take the checkpoint that "
        f"they were made from{unpack}. Quantise the narrow model."
    )


def load_model(name: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model in a folder or repository as the class that its config names, in eval mode.

    Args:
        dtype: None for that of the checkpoint.

    Raises:
        RMTKDError: no model there, one of a class that neither transformers nor this package has, or weights that are
            damaged or do not fit (SpecMismatchError).
    """
    config = load_config(name)
    cls = class_of(name, config)
    with refusals_named(f"Cannot load the weights of '{name}'"):
        return cls.from_pretrained(name, dtype=dtype or "auto").eval()


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


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        RMTKDError: there is none, or none that can be read and used.
    """
    tokenizer = _tokenizer(name, f"'{name}' has no tokenizer that can be read")
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        # Without any file transformers makes an empty tokenizer that turns every word into [UNK].
        raise RMTKDError(
            f"'{name}' has no tokenizer files: save the tokenizer the model was fine-tuned with beside it."
        )
    return tokenizer


def load_image_processor(name: str | Path) -> Any:
    """The image processor beside a model.

    Raises:
        RMTKDError: there is none, or none that can be read.
    """
    return _image_processor(name, f"'{name}' has no image processor that can be read")


def load_processor(name: str | Path) -> Any | None:
    """The tokenizer or image processor beside a model; None where there is none.

    Raises:
        RMTKDError: its files are there and cannot be read.
    """
    return next(iter(load_processors(name)), None)


def load_processors(name: str | Path) -> list[Any]:
    """All of image processor or feature extractor, and tokenizer, that lie beside a model.

    Raises:
        RMTKDError: the files of one are there and cannot be read.
    """
    found = []
    whole = _values(name, "processor_config.json")  # newer ones hold what was preprocessor_config.json
    inner = next((part for part in ("image_processor", "feature_extractor") if part in whole), None)
    file = "processor_config.json" if inner else "preprocessor_config.json"
    if inner or _file(name, file) is not None:
        load = _feature_extractor if _hears(whole.get(inner) if inner else _values(name, file)) else _image_processor
        found.append(load(name, f"Cannot load what {file} of '{name}' describes"))
    if _file(name, "tokenizer_config.json") is not None:
        found.append(_tokenizer(name, f"Cannot load what tokenizer_config.json of '{name}' describes"))
    return found


def _hears(values: Any) -> bool:
    """Does it describe a feature extractor, of sound?"""
    import transformers
    from transformers.utils import DummyObject

    named = values.get("feature_extractor_type") if isinstance(values, dict) else None
    cls = getattr(transformers, named, None) if isinstance(named, str) and named.isidentifier() else None
    real = isinstance(cls, type) and not isinstance(cls, DummyObject)
    return real and issubclass(cls, transformers.FeatureExtractionMixin)


def _feature_extractor(name: str | Path, words: str) -> Any:
    from transformers import AutoFeatureExtractor

    with refusals_named(words):
        return AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)


def _values(name: str | Path, file: str) -> dict[str, Any]:
    """What a JSON file beside a model holds; nothing where it is not there, or holds something else."""
    path = _file(name, file)
    if path is None:
        return {}
    with refusals_named(f"Cannot read {file} of '{name}'"):
        values = json.loads(Path(path).read_text(encoding="utf8"))
    return values if isinstance(values, dict) else {}


def _tokenizer(name: str | Path, words: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    with refusals_named(words):
        _check_class(name, "tokenizer_config.json", "tokenizer_class", PreTrainedTokenizerBase)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        _try_out(tokenizer)
    return tokenizer


def _image_processor(name: str | Path, words: str) -> Any:
    from transformers import AutoImageProcessor
    from transformers.image_processing_base import ImageProcessingMixin

    with refusals_named(words):
        _check_class(name, "preprocessor_config.json", "image_processor_type", ImageProcessingMixin)
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)


def _check_class(name: str | Path, file: str, field: str, wanted: type) -> None:
    """transformers would build whatever class of its own is named: a model with billions of weights, for example.

    Raises:
        ValueError: it is none of the `wanted`.
    """
    import transformers
    from transformers.utils import DummyObject

    for place in (file, "config.json"):
        path = _file(name, place)
        values = None if path is None else json.loads(Path(path).read_text(encoding="utf8"))
        named = values.get(field) if isinstance(values, dict) else None
        cls = getattr(transformers, named, None) if isinstance(named, str) and named.isidentifier() else None
        absent = isinstance(cls, DummyObject)  # its package is missing: transformers has another one, or says so
        if cls is not None and not absent and not (isinstance(cls, type) and issubclass(cls, wanted)):
            raise ValueError(f"{place} says {field}={named!r}, which is no {wanted.__name__}")


def _file(name: str | Path, file: str) -> str | None:
    """Where a file of a folder or repository lies; None where there is none."""
    from transformers.utils import cached_file

    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(name, file, **lenient)


def _try_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """Cut the empty text: a template of special tokens that are missing fails at every text. What a call changes,
    truncation and padding, is saved with the tokenizer, and put back."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    truncation, padding = getattr(backend, "truncation", None), getattr(backend, "padding", None)
    for special in (True, False):
        tokenizer("", add_special_tokens=special, verbose=False)
    if truncation is not None:
        backend.enable_truncation(**truncation)
    if padding is not None:
        backend.enable_padding(**padding)
