"""Loading weights that may be a stranger's: what does not fit is refused before it is allocated.

The headers of the files come first (`read_header`): they must describe the files, and bound how many layers a config
may ask for. transformers then builds the skeleton on the meta device, and says which tensors fit; the others are
refused between that and their allocation (`finalizing`).

Lies beside `modeling_rmtkd.py` in every saved repository, and imports torch and transformers alone.
"""

import collections
import contextlib
import contextvars
import json
import math
import pathlib
import re
import sys
import threading

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .layers_rmtkd import check_ternary
from .spec_rmtkd import SpecMismatchError, mismatch, shown


# What constructors of transformers raise at values that they never expected: a zero that divides, an unknown name, a
# width that is no multiple. The class of strict configs is not told to the public; transformers has loaded it.
BUILDING = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
REFUSALS = (*BUILDING, getattr(sys.modules.get("huggingface_hub.errors"), "StrictDataclassError", ValueError))


LARGEST = 2**63 - 1
NUMBERS_OF_ROTARY = re.compile("theta|factor|beta|mscale|embeddings")


def check_plain_numbers(fields):
    """Whether no field of a config holds a number that builds a model and makes every answer NaN, or that no tensor
    takes: NaN, whole numbers beyond 64 bits, and what is infinite, true or false where rotary positions read a number.

    Raises:
        SpecMismatchError: names the field.
    """
    todo = [(name, name.startswith("rope_"), value) for name, value in fields.items() if name != "rmtkd"]
    while todo:
        name, rotary, value = todo.pop()
        if isinstance(value, dict):
            todo += [(f"{name}.{inner}"[:200], rotary, held) for inner, held in value.items()]
        elif isinstance(value, (list, tuple)):
            todo += [(name, rotary, held) for held in value]
        elif isinstance(value, bool) and rotary and NUMBERS_OF_ROTARY.search(name.rpartition(".")[2]):
            raise mismatch(name, value, "a number")
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise mismatch(name, value, "a number of 64 bits")
        elif isinstance(value, float) and (math.isnan(value) or rotary and math.isinf(value)):
            raise mismatch(name, value, "a finite number")


@contextlib.contextmanager
def named_errors(what):
    """What goes wrong inside is the config's fault, and is said to be."""
    try:
        yield
    except SpecMismatchError:
        raise
    except REFUSALS as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise SpecMismatchError(
            f"config.json describes no {what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}. Its "
            "fields were changed, or belong to another model."
        ) from error


_Load = collections.namedtuple("_Load", "body ignore tensors")  # the load in progress; see `load_checked`
_LOADING = contextvars.ContextVar("_LOADING", default=None)


@contextlib.contextmanager
def as_many_as_tensors():
    """No more modules and parameters are built inside than a checkpoint of so many tensors can fill: a layer costs
    memory even on the meta device, and a config may ask for a million.

    Raises:
        SpecMismatchError: there are more.
    """
    load = _LOADING.get()
    if load is None or load.tensors is None:
        yield
        return
    thread, built, most = threading.get_ident(), [0], 12 * load.tensors + 3000  # with the heads of other tasks

    def count(module, name, part):
        if threading.get_ident() != thread:
            return
        built[0] += 1
        if built[0] > most:
            raise SpecMismatchError(
                f"config.json describes a model of more than {most} modules and parameters, and the checkpoint holds "
                f"{load.tensors} tensors: the number of layers in the config is another model's."
            )

    handles = register_module_module_registration_hook(count), register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _count_tensors(name, options):
    """How many tensors the safetensors files hold that `from_pretrained(name, **options)` will read; None where it
    reads none of its own. Their headers are checked on the way.

    Raises:
        SpecMismatchError: a file is damaged, or is missing.
    """
    if name is None or options.get("state_dict") is not None or options.get("gguf_file"):
        return None
    folder = pathlib.Path(str(name)) / (options.get("subfolder") or "")
    if folder.is_file():
        return None
    if folder.is_dir() and (distributed := sorted(folder.glob("shard-*-model-*.safetensors"))):
        raise SpecMismatchError(
            f"{distributed[0]} is a part of a distributed checkpoint, which transformers would read in the place of "
            "model.safetensors, and allocate before it is compared: save the model whole."
        )
    kept = ("cache_dir", "proxies", "token", "revision", "local_files_only", "subfolder")
    kwargs = {key: options[key] for key in kept if options.get(key) is not None}
    kwargs |= {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_gated_repo": False}

    def locate(file):
        stem, ending = file.rsplit(".", 1)
        variant = options.get("variant")
        return cached_file(name, f"{stem}.{variant}.{ending}" if variant else file, **kwargs)

    if (whole := locate(SAFE_WEIGHTS_NAME)) is not None:
        return len(read_header(whole))
    if (index := locate(SAFE_WEIGHTS_INDEX_NAME)) is None:
        return None  # transformers says so, or finds the base of an adapter
    tensors = 0
    for file in read_index(index):
        shard = cached_file(name, file, **kwargs)
        if shard is None:
            raise SpecMismatchError(f"{index} names {file}, and there is no such file: get the model again.")
        tensors += len(read_header(shard))
    return tensors


def finalizing(base):
    """A `_finalize_model_loading` that looks at what does not fit before it is allocated and initialised. transformers
    has no public place between the two; where it lost this one, `load_checked` would still refuse, only later."""

    def _finalize_model_loading(model, load_config, loading_info):
        load = _LOADING.get()
        if load is not None:
            info = {"mismatched_keys": loading_info.mismatched_keys, "missing_keys": _missing(model, loading_info)}
            _check_loaded(type(model), model, info, load.ignore, load.body)
        return base._finalize_model_loading(model, load_config, loading_info)

    return staticmethod(_finalize_model_loading)


def _missing(model, loading_info):
    """Missing keys that nothing else will fill."""
    passed_over = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        key
        for key in loading_info.missing_keys
        if key not in tied and not any(pattern.search(key) for pattern in passed_over)
    }


def _check_loaded(cls, model, info, ignore_mismatched, body=None):
    """Nothing may have been re-initialised silently, but for the head of another task than the checkpoint's.

    `body` is the prefix of all keys that are no part of a head; None: the backbone's.
    """
    prefix = body or ("" if model.base_model is model else model.base_model_prefix + ".")
    same_task = cls.__name__ in (model.config.architectures or ())
    advice = "The weights and the config are not of the same model: save them again together."
    for key, found, expected in sorted(info["mismatched_keys"]):
        if key.startswith(prefix) or not ignore_mismatched:
            raise SpecMismatchError(
                f"{cls.__name__}: the checkpoint's tensor {key} has shape {tuple(found)}, its spec (config.json, "
                f"rmtkd) expects {tuple(expected)}. {advice} (A new head, as for another num_labels, needs "
                "ignore_mismatched_sizes=True.)"
            )

    def needed(key):  # whether a model has a pooler depends on its task
        return same_task or (key.startswith(prefix) and not key.startswith(prefix + "pooler."))

    missing = sorted(key for key in info["missing_keys"] if needed(key))
    if missing:
        raise SpecMismatchError(
            f"{cls.__name__}: the checkpoint lacks {len(missing)} tensor(s) that its spec expects, the first is "
            f"{missing[0]}. {advice}"
        )


def load_checked(cls, load, *args, body=None, **kwargs):
    """What `load`, the from_pretrained of a base class, gives; refused where anything had to be re-initialised.

    Weights are read from safetensors files: others have no header that could be looked at first.

    Raises:
        SpecMismatchError: files that are damaged, a config that describes no model, or tensors that do not fit it.
        OSError: of transformers: no such model, or no safetensors file in it.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    ignore = kwargs.pop("ignore_mismatched_sizes", False)
    name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
    if kwargs.get("use_safetensors") is None and name is not None and not kwargs.get("gguf_file"):
        kwargs["use_safetensors"] = True
    token = _LOADING.set(_Load(body, ignore, _count_tensors(name, kwargs)))
    try:
        model, info = load(*args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    finally:
        _LOADING.reset(token)
    _check_loaded(cls, model, info, ignore, body)
    check_ternary(model)
    return (model, info) if wants_info else model


# -- the files of weights ---------------------------------------------------------------------------------------------

MOST_HEADER = 10_000_000  # bytes; about 100,000 tensors a file
# Bytes a number. Types that are newer than this list are left to the safetensors library.
ITEM = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
ITEM |= {"I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}


def read_header(file):
    """{tensor: shape} of a safetensors file, of which nothing but the header is read.

    Raises:
        SpecMismatchError: it is not one, or it was cut short.
    """
    path = pathlib.Path(file)
    size = path.stat().st_size
    if size < 8:
        raise _damaged(path, f"it has {size} bytes")
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, MOST_HEADER):
            raise _damaged(path, f"it has {size} bytes and announces a header of {length}")
        text = stream.read(length)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON ({type(error).__name__})") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is no object")
    entries.pop("__metadata__", None)
    end, shapes = 0, {}
    for name, start, stop, shape in sorted(
        (_tensor(path, *item) for item in entries.items()), key=lambda tensor: tensor[1:3]
    ):
        if start != end:
            raise _damaged(path, f"the bytes of {shown(name)} do not begin where the last ones end")
        end, shapes[name] = stop, shape
    if end != size - 8 - length:
        raise _damaged(path, f"its header describes {end} bytes of tensors, and there are {size - 8 - length}")
    return shapes


def _tensor(path, name, entry):
    entry = entry if isinstance(entry, dict) else {}
    shape, offsets, kind = entry.get("shape"), entry.get("data_offsets"), entry.get("dtype")
    whole = all(
        isinstance(values, list) and all(type(v) is int and 0 <= v < 2**62 for v in values)
        for values in (shape, offsets)
    )
    if not whole or len(offsets) != 2 or offsets[0] > offsets[1] or not isinstance(kind, str):
        raise _damaged(path, f"its entry of the tensor {shown(name)} is none")
    if kind in ITEM and math.prod(shape) * ITEM[kind] != offsets[1] - offsets[0]:
        raise _damaged(path, f"the tensor {shown(name)} has another shape than bytes")
    return name, *offsets, tuple(shape)


def read_index(file):
    """Names of the files that hold the tensors of a checkpoint in shards.

    Raises:
        SpecMismatchError: it is no such index, or names files outside of its folder.
    """
    path = pathlib.Path(file)
    if path.stat().st_size > MOST_HEADER:
        raise _damaged(path, f"it has {path.stat().st_size} bytes")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is not JSON ({type(error).__name__})") from error
    names = index.get("weight_map") if isinstance(index, dict) else None
    plain = re.compile(r"[\w-][\w.-]*\.safetensors", re.ASCII)
    if not isinstance(names, dict) or not isinstance(index.get("metadata", {}), dict):
        raise _damaged(path, "it maps no tensors to files")
    if odd := [name for name in names.values() if not isinstance(name, str) or not plain.fullmatch(name)]:
        raise _damaged(path, f"it names {shown(odd[0])}, which is no safetensors file beside it")
    return sorted(set(names.values()))


def _damaged(path, why):
    return SpecMismatchError(
        f"{path} is no whole safetensors checkpoint: {why}. It was cut short while it was copied, or it is something "
        "else: get the model again."
    )
