"""A reduced model as a plain checkpoint of its base architecture, which loads with nothing of ours.

The base's config knows one width for each kind of layer. A cut with `shape="native"` keeps to that (`native_anatomy`
couples the sites so). Of any other reduced model, zeros fill the gap where it is narrower somewhere, which changes no
output:

    feed-forward      zero neurons: their columns in the layer behind are zero
    heads             zero features of queries, keys and values; whole zero heads where the stream divides only so
    softmax scale     the base derives it from the head width; the ratio goes into queries and keys, half each
    factored layers   multiplied out

The stream itself cannot be filled up: layer norm averages over it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from ..batches import run
from ..errors import RMTKDError, UnsupportedArchitectureError
from ..loading_rmtkd import REFUSALS
from ..modeling_rmtkd import VERSION, LowRankLinear
from ..models import blank, count_parameters, is_narrowed, match_precision, outline, pinned
from ..spectra.products import exact_matmul
from .convolutions import ResidualConvLayout
from .decoders import DecoderLayout
from .depth import without_blocks
from .families import family_of
from .layouts import EncoderLayout
from .narrowing import narrow_fields, narrow_spec
from .native_convolutions import coupled_channels, sizes_config
from .native_decoders import coupled, plain_copy, settle, widths_config
from .native_padding import fill_up
from .native_seq2seq import coupled_stacks, settle_head, stacks_config
from .seq2seq import Seq2SeqLayout
from .sites import Anatomy, Point, Site, Unit, get_module, is_layer


__all__ = ["NativeExport", "check_expressible", "native_anatomy", "plain_form"]

STATED = (DecoderLayout, ResidualConvLayout, Seq2SeqLayout)  # layouts whose fields of the config are declared
FFN_FIELDS = ("intermediate_size", "hidden_dim")
TOLERANCE = 1e-5  # of the largest logit, in fp32
NEGLIGIBLE = 1e-9  # an epsilon of a layer norm: no variance of a stream comes near it


@dataclass(frozen=True)
class NativeExport:
    """A plain model, and what it cost.

    Attributes:
        model: an instance of the stock class, same outputs.
        parameters_before, parameters_after: of the reduced and of the plain model.
        padded: {site: (width, width after padding)} and factored layers that were multiplied out, (rank, width).
        difference: largest difference of the outputs, relative to the largest output.
    """

    model: PreTrainedModel
    parameters_before: int
    parameters_after: int
    padded: dict[str, tuple[int, int]]
    difference: float


def plain_form(model: PreTrainedModel, inputs: Mapping[str, Any], pad: bool = False) -> NativeExport:
    """Build the plain checkpoint of a reduced model.

    Args:
        inputs: a batch, on which both have to agree.
        pad: fill narrower layers up with zeros and multiply factored layers out where that makes the model
            expressible.

    Raises:
        RMTKDError: not a reduced model; widths that the base's config cannot express; padding needed but not asked for
            (the message states its cost); or outputs that differ.
    """
    anatomy = _anatomy(model)
    layout = family_of(model).layout
    if isinstance(layout, STATED):  # a config says all widths
        native = plain_copy(model, _base(model), _stated_config(model, anatomy, layout))
        if isinstance(layout, DecoderLayout):
            settle(native, model, anatomy)
        if isinstance(layout, Seq2SeqLayout):
            settle_head(native, model, anatomy, layout)
        sizes = count_parameters(model), count_parameters(native)
        return NativeExport(native, *sizes, {}, _difference(model, native, inputs))
    widths, heads = _native_widths(model, anatomy)
    padded = {name: (site.width, widths[name]) for name, site in anatomy.sites.items() if widths[name] != site.width}
    native = _build(model, anatomy, widths, heads)
    before, after = count_parameters(model), count_parameters(native)
    if padded and not pad:
        names = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in list(padded.items())[:4])
        raise RMTKDError(
            f"The widths are not those of a plain {type(native).__name__}: "
            f"{names}{', ...' if len(padded) > 4 else ''}. With --pad zeros fill the gap without changing any output, "
            f"at a cost of {after - before:+,} parameters ({before:,} -> {after:,}, {after / before - 1:+.1%}) and "
            "the time they take. Or reduce with uniform widths, or keep the reduced format."
        )
    fill_up(model, native, anatomy, widths, heads)
    return NativeExport(native, before, after, padded, _difference(model, native, inputs))


def native_anatomy(model: PreTrainedModel) -> Anatomy:
    """The sites of a stock model, coupled so that the config of its class can state all widths they may get: one of
    all feed-forward parts, one of all heads, which is tied to that of the stream where the class ties them. The word
    table has no second factor, and a dense layer of the task head is as wide as the stream.

    Raises:
        UnsupportedArchitectureError: no family, or one whose config states no widths inside a block; an output layer
            that is tied to the word table.
        RMTKDError: a model that was narrowed in the free shape; layers with numbers of their own.
    """
    _check_plain(model)
    layout = family_of(model).layout
    if isinstance(layout, DecoderLayout):
        return coupled(model, layout)
    if isinstance(layout, ResidualConvLayout):
        return coupled_channels(model, layout)
    if isinstance(layout, Seq2SeqLayout):
        return coupled_stacks(model, layout)
    if not isinstance(layout, EncoderLayout):
        raise UnsupportedArchitectureError(
            f"shape='native': the config of {type(model).__name__} has no field for the widths inside a block. "
            "Use shape='free'."
        )
    anatomy = layout.anatomy(model)
    if any(u.factor == "hidden" and is_layer(model, u.path) for u in anatomy.units):
        raise UnsupportedArchitectureError(
            f"shape='native': the output layer of {type(model).__name__} is tied to the word table, and a norm stands "
            "before it: a narrower stream cannot be written into its config. Narrow the model with another head, or "
            "use shape='free'."
        )
    if layout.dense_head and is_layer(model, layout.dense_head[0]):
        anatomy = _with_dense_head(anatomy, *layout.dense_head)
    heads = next(site for site in anatomy.sites.values() if site.kind == "attention_qk")
    tied = not _takes_head_width(model, anatomy, max(1, heads.group_width // 2))
    inner = _share_of_stream(model, anatomy, layout)
    couples = {"intermediate": "hidden" if inner else "intermediate", "hidden": "hidden", "pooled": "hidden"}
    couples |= dict.fromkeys(("attention_qk", "attention_vo"), "hidden" if tied else "heads")
    sites = {}
    for name, site in anatomy.sites.items():
        if site.kind == "embedding":
            continue
        groups = heads.groups if tied and couples[site.kind] == "hidden" else site.groups
        groups *= inner if inner and site.kind == "intermediate" else 1
        sites[name] = dataclasses.replace(site, couple=couples[site.kind], groups=groups)
    units = [dataclasses.replace(u, factor=None, lands=None) if u.factor == "embedding" else u for u in anatomy.units]
    return dataclasses.replace(anatomy, sites=sites, units=tuple(units))


def _share_of_stream(model: PreTrainedModel, anatomy: Anatomy, layout: EncoderLayout) -> int:
    """How many times as wide as the stream the config says that feed-forward parts are; 0 where it says a width."""
    if layout.ratio_field is None:
        return 0
    inner = next(site.width for site in anatomy.sites.values() if site.kind == "intermediate")
    share = getattr(model.config, layout.ratio_field)
    if inner != share * anatomy.sites["hidden"].width:
        raise UnsupportedArchitectureError(
            f"shape='native': {type(model).__name__} makes the {inner} features of its feed-forward parts from "
            f"config.{layout.ratio_field}={share!r} and the width of the stream otherwise than as their product. Use "
            "shape='free'."
        )
    return int(share)


def _check_plain(model: PreTrainedModel) -> None:
    if getattr(model.config, "rmtkd", None):
        raise RMTKDError(
            f"shape='native': {type(model).__name__} was narrowed in the free shape already. Narrow its base instead, "
            "or write what there is as a plain checkpoint: optimum-cli rmtkd export --format native."
        )
    if numbers := pinned(model, blank(model)):
        path, values = next(iter(numbers.items()))
        raise RMTKDError(
            f"shape='native': {len(numbers)} layer(s) of {type(model).__name__} have numbers of their own, which no "
            f"config states, the first is {path} with {values}. Use shape='free', or the numbers of the config."
        )


def _with_dense_head(anatomy: Anatomy, dense: str, behind: str) -> Anatomy:
    units = [dataclasses.replace(u, writes="pooler") if u.path == dense else u for u in anatomy.units]
    units = [u for u in units if u.path != behind] + [Unit(behind, "pooler")]
    width, depth = anatomy.sites["hidden"].width, len(anatomy.blocks)
    pooler = Site("pooler", "pooled", width, (Point(behind, "input"),), depth=depth, couple="hidden")
    return dataclasses.replace(anatomy, units=tuple(units), sites={**anatomy.sites, "pooler": pooler})


def check_expressible(model: PreTrainedModel, anatomy: Anatomy, couples: Mapping[str, int]) -> None:
    """Refuse a model which, narrowed to {couple: features of a group}, has a tensor that the config cannot state: both
    are built without memory.

    Raises:
        UnsupportedArchitectureError: names the first tensor.
    """
    model, anatomy = without_blocks(model, anatomy, couples)
    spec, fields = narrow_spec(model, anatomy, couples), narrow_fields(anatomy, couples)
    with torch.device("meta"):
        student = outline(model, {"version": VERSION, "spec": spec}, fields)
        own = family_of(student).layout.anatomy(student)
        layout = family_of(student).layout
        if isinstance(layout, STATED):
            native = _base(student)(_stated_config(student, own, layout))
        else:
            native = _base(student)(_native_config(student, own, *_native_widths(student, own)))
    expected, found = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (native, student))
    for name in [*found, *expected]:
        if found.get(name) != expected.get(name):
            raise UnsupportedArchitectureError(
                f"shape='native': with the widths {couples}, {name} of {type(model).__name__} is "
                f"{found.get(name, 'not there')} where the config says {expected.get(name, 'nothing')}. Use "
                "shape='free', other sites ('intermediate' alone leaves the stream), or ask for another size."
            )


def _anatomy(model: PreTrainedModel) -> Anatomy:
    rmtkd = getattr(model.config, "rmtkd", None)
    if not rmtkd:
        raise RMTKDError(f"{type(model).__name__} is not reduced: it already is a plain checkpoint.")
    if rmtkd.get("recipe", {}).get("form") == "factored":
        raise RMTKDError(
            "The model was reduced with form='factored': multiplied out, it would be as large as before. Keep the "
            "reduced format, or reduce with form='absorbed'."
        )
    layout = family_of(model).layout
    if isinstance(layout, (DecoderLayout, Seq2SeqLayout)) and layout.inner_field is not None:
        return layout.anatomy(model)
    if isinstance(layout, ResidualConvLayout) and layout.sizes_field is not None:
        return layout.anatomy(model)
    if not isinstance(layout, EncoderLayout):
        raise RMTKDError(
            f"The config of {model.config_class.__mro__[1].__name__} has no field for the widths inside a block: a "
            f"reduced {type(model).__name__} has no plain form. Use the reduced format, or --format onnx."
        )
    if any(isinstance(module, LowRankLinear) for module in model.modules()):
        raise RMTKDError(
            f"The {type(model).__name__} has a decoder in two factors, which is tied to the word table: its base has "
            "no such layer. Use the reduced format, or --format onnx."
        )
    return layout.anatomy(model)


def _native_widths(model: PreTrainedModel, anatomy: Anatomy) -> tuple[dict[str, int], int]:
    """({site: width in the plain model}, number of heads)."""
    sites = anatomy.sites
    stream = sites["hidden"].width
    widths = {name: site.width for name, site in sites.items()}
    feed_forward = [site.width for site in sites.values() if site.kind == "intermediate"]
    attention = [site for site in sites.values() if site.kind in ("attention_qk", "attention_vo")]
    head, heads = max(site.group_width for site in attention), attention[0].groups
    if not _takes_head_width(model, anatomy, head):
        head, heads = _heads_that_fit(stream, head, heads)
    whole = stream if family_of(model).layout.ratio_field else 1  # what the config counts feed-forward widths in
    for name, site in sites.items():
        if site.kind == "intermediate":
            widths[name] = -(-max(feed_forward) // whole) * whole
        elif site in attention:
            widths[name] = heads * head
        elif site.kind == "embedding":
            widths[name] = stream if hasattr(_table(model), "up") else site.width
    return widths, heads


def _takes_head_width(model: PreTrainedModel, anatomy: Anatomy, head: int) -> bool:
    """Whether the base builds heads of the width that `config.head_dim` states, declared or not (ViT reads it
    unasked)."""
    config = _plain_config(model)
    config.head_dim = head
    try:
        with torch.device("meta"):
            probe = _base(model)(config)
    except ValueError:  # BERT refuses a stream that its heads do not divide, whatever head_dim says
        return False
    query = next(unit.path for unit in anatomy.units if (unit.writes or "").endswith("attention_qk"))
    # a layer behind the heads that is as wide as the stream may meet queries that are so by rounding alone (ALBERT)
    output = next(unit.path for unit in anatomy.units if (unit.reads or "").endswith("attention_vo"))
    wanted = head * config.num_attention_heads
    return get_module(probe, query).out_features == wanted == get_module(probe, output).in_features


def _plain_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The base's config, still with the dense inner widths."""
    values = model.config.to_dict()
    for name in ("model_type", "rmtkd", "auto_map", "architectures", "transformers_version"):
        values.pop(name, None)
    return _base(model).config_class(**values)


def _heads_that_fit(stream: int, head: int, heads: int) -> tuple[int, int]:
    """(head width, number of heads) with heads x width = stream, none fewer and none narrower than there are."""
    for count in range(heads, stream // head + 1):
        if stream % count == 0:
            return stream // count, count
    raise RMTKDError(
        f"{heads} heads of width {head} on a stream of {stream}: the base's config wants heads x width = stream and "
        "has no field for anything else. Use the reduced format or --format onnx, or reduce without the stream "
        "(--sites intermediate attention_qk attention_vo), which leaves room for any heads."
    )


def _table(model: PreTrainedModel) -> nn.Module:
    return get_module(model, family_of(model).layout.table)


def _output_width(table: nn.Module) -> int:
    return getattr(table, "output_dim", table.embedding_dim)


def _stated_config(
    model: PreTrainedModel, anatomy: Anatomy, layout: DecoderLayout | ResidualConvLayout | Seq2SeqLayout
) -> PreTrainedConfig:
    try:
        config = _plain_config(model)
        if isinstance(layout, ResidualConvLayout):
            config = sizes_config(model, layout, config)
        else:
            widths = widths_config if isinstance(layout, DecoderLayout) else stacks_config
            config = widths(model, anatomy, layout, config)
        config.validate()  # else it could be saved, and not be loaded
    except REFUSALS as error:  # Phi-3 counts the factors of its frequencies by width / heads
        raise UnsupportedArchitectureError(
            f"The config of a plain {_base(model).__name__} cannot state the widths of a narrow one ({error}). Use "
            "shape='free', or leave the stream and the heads as they are (sites='intermediate')."
        ) from error
    config._attn_implementation = model.config._attn_implementation
    return config


def _base(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The stock class of a model, reduced or not."""
    cls = type(model)
    return cls.__mro__[1] if is_narrowed(cls.config_class.model_type) else cls


def _native_config(
    model: PreTrainedModel, anatomy: Anatomy, widths: Mapping[str, int], heads: int
) -> PreTrainedConfig:
    """The config of the stock model with these widths."""
    config = _plain_config(model)
    site = {
        kind: next(n for n, s in anatomy.sites.items() if s.kind == kind) for kind in ("intermediate", "attention_vo")
    }
    ratio = family_of(model).layout.ratio_field
    inner = widths[site["intermediate"]] // (anatomy.sites["hidden"].width if ratio else 1)
    setattr(config, ratio or next(name for name in FFN_FIELDS if hasattr(config, name)), inner)
    config.num_attention_heads = heads
    width = widths[site["attention_vo"]] // heads
    if width * heads != anatomy.sites["hidden"].width or getattr(config, "head_dim", None) is not None:
        config.head_dim = width
    if hasattr(config, "embedding_size"):  # ELECTRA, whose table is as wide as the stream, or has a layer behind it
        config.embedding_size = _output_width(_table(model))
    epsilons = _epsilons(model)
    name = next((name for name in ("layer_norm_eps", "layer_norm_epsilon") if hasattr(config, name)), None)
    if name is not None:
        if len(epsilons) > 1 and max(epsilons) > NEGLIGIBLE:
            raise RMTKDError(
                f"Layer norms have {len(epsilons)} epsilons ({sorted(epsilons)}); the base's config holds one."
            )
        setattr(config, name, max(epsilons))
    config._attn_implementation = model.config._attn_implementation
    return config


def _build(model: PreTrainedModel, anatomy: Anatomy, widths: Mapping[str, int], heads: int) -> PreTrainedModel:
    """The stock model with these widths, weights still random."""
    config, epsilons = _native_config(model, anatomy, widths, heads), _epsilons(model)
    native = match_precision(_base(model)(config).to(device=model.device), model).eval()
    built = _epsilons(native)
    if built != epsilons and max(built | epsilons) > NEGLIGIBLE:
        raise RMTKDError(
            f"Layer norms have the epsilon {sorted(epsilons)}, {type(native).__name__} builds them with "
            f"{sorted(built)} and its config has no field for it. Use the reduced format, or keep the "
            "stream (sites without 'hidden')."
        )
    return native


def _epsilons(model: nn.Module) -> set[float]:
    return {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}


def _difference(model: PreTrainedModel, native: PreTrainedModel, inputs: Mapping[str, Any]) -> float:
    """Largest difference of the outputs, over the largest output, in fp32 whatever the loop around it computes in.

    Raises:
        RMTKDError: it is above the tolerance.
    """
    with torch.no_grad(), exact_matmul(model.device):
        expected, found = (tree_leaves(run(copy.deepcopy(m).float(), inputs))[0] for m in (model, native))
    difference = float((expected - found).abs().max() / expected.abs().max())
    # half precision rounds the rescaled queries anew
    allowed = TOLERANCE if model.dtype == torch.float32 else 10 * torch.finfo(model.dtype).eps
    if not difference <= allowed:
        raise RMTKDError(
            f"The plain {type(native).__name__} differs from the reduced model by {difference:.2g} of its largest "
            f"output, more than {allowed:.2g}: nothing was written. Use the reduced format, or --format onnx."
        )
    return difference
