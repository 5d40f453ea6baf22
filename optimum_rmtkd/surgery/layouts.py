"""Layouts: how the anatomy of a model is read off a declaration of paths; that of encoders, and the one without a
declaration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from ..modeling_rmtkd import LowRankConv2d, LowRankLinear
from .sites import Anatomy, Attribute, Point, Site, Unit, get_module, has_module, is_layer, linear_layers, linear_shape


__all__ = ["EncoderLayout", "factored_anatomy"]


THINNEST_FACTORED = 16  # two factors of such a layer save next to nothing


@dataclass(frozen=True)
class EncoderLayout:
    """A stack of attention and feed-forward blocks around one residual stream.

    Paths start with "@." where relative to the backbone; paths of `query` to `ffn_norm` are relative to a block.

    Attributes:
        stream: tables, convolutions and bare parameters whose sum is the stream; those a model lacks are passed over.
        project: a linear layer between tables and stream; where a model has it, it alone writes the stream.
        table: the word table, which the site "embedding" factorises; None for images.
        blocks: the ModuleList of blocks.
        attention: the module that holds head sizes; `head_size`, `heads` name its attributes; `total_size` may be "".
            Names of widths are among `spec_rmtkd.WIDTHS`.
        pre_norm: norms stand before attention and feed-forward (ViT) instead of behind the sums (BERT).
        pooler: a linear layer with element-wise activation whose output follows the hidden width; heads that read it
            where it is there, and the stream where it is not, are named in `pooled_by`.
        head_reads: layers of any task head that read the stream with their input features.
        decoder: an output layer tied to the word table.
        dense_head: a layer of a task head that reads the stream and is as wide, with an element-wise activation, and
            the layer that reads it: where the config states one width, the former follows the stream.
        width_field: field of the config that states the hidden width.
    """

    stream: tuple[str, ...]
    blocks: str
    query: str
    key: str
    value: str
    output: str
    up: str
    down: str
    attention_norm: str
    ffn_norm: str
    attention: str
    head_size: str = "attention_head_size"
    total_size: str = "all_head_size"
    heads: str = "num_attention_heads"
    pre_norm: bool = False
    stream_norm: str | None = None
    project: str | None = None
    table: str | None = None
    final_norm: str | None = None
    pooler: str | None = None
    pooled_by: tuple[str, ...] = ()
    head_reads: tuple[str, ...] = ()
    decoder: str | None = None
    dense_head: tuple[str, str] | None = None
    width_field: str = "hidden_size"

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Sites and units of `model`.

        Raises:
            UnsupportedArchitectureError: the model lacks a declared module.
        """
        blocks = [f"{self.blocks}.{i}" for i in range(len(get_module(model, self.blocks)))]
        units = self._stream_units(model)
        sites, attributes, fixed = {}, [], {}
        norm_points = self._first_points(model)
        for depth, block in enumerate(blocks):
            layer_sites = self._layer_sites(model, block, depth)
            sites.update({site.name: site for site in layer_sites})
            after = f"{blocks[depth + 1]}.{self.attention_norm}" if depth + 1 < len(blocks) else self.final_norm
            units += self._layer_units(block, depth, after)
            norms = [f"{block}.{self.attention_norm}", f"{block}.{self.ffn_norm}"]
            norm_points += [Point(norm, side) for norm in norms for side in ("input", "output")]
            heads = f"layer.{depth}.attention_vo"
            attributes.append(Attribute(f"{block}.{self.attention}", self.head_size, heads, True))
            if self.total_size:
                attributes.append(Attribute(f"{block}.{self.attention}", self.total_size, heads, False))
            fixed[f"{block}.{self.attention}"] = {
                "scaling": float(get_module(model, f"{block}.{self.attention}").scaling)
            }
        if self.final_norm:
            units.append(Unit(self.final_norm, writes="hidden"))
            norm_points += [Point(self.final_norm, side) for side in ("input", "output")]
        width = linear_shape(get_module(model, f"{blocks[0]}.{self.up}"))[0]
        stream = {"hidden": Site("hidden", "hidden", width, tuple(norm_points), couple="hidden")}
        stream |= self._table_sites(model, width)
        head_units, head_sites = self._head_units(model, width, len(blocks))
        if "embedding" in stream:
            units = [
                dataclasses.replace(u, factor="embedding", lands=Point(self.stream_norm, "input"))
                if u.path == self.table
                else u
                for u in units
            ]
        return Anatomy(
            sites=stream | sites | head_sites,
            units=tuple(units + head_units),
            blocks=tuple(blocks),
            attributes=tuple(attributes),
            config_fields={self.width_field: "hidden"},
            fixed_attrs=fixed,
            pre_norm=self.pre_norm,
            last_norm=self.final_norm if self.pre_norm else None,
        )

    def _projects(self, model: nn.Module) -> bool:
        return self.project is not None and has_module(model, self.project)

    def _ties(self, model: nn.Module) -> bool:
        """Whether the decoder, here or in the masked-LM model of the same checkpoint, shares the word table."""
        if not self.decoder or self._projects(model):
            return False
        if not has_module(model, self.decoder):
            return bool(getattr(model.config, "tie_word_embeddings", True))
        return get_module(model, self.decoder).weight is get_module(model, self.table).weight

    def _first_points(self, model: nn.Module) -> list[Point]:
        if self._projects(model):
            return [Point(self.project)]
        return [Point(self.stream_norm, side) for side in ("input", "output")] if self.stream_norm else []

    def _stream_units(self, model: nn.Module) -> list[Unit]:
        if self._projects(model):
            return [Unit(self.project, writes="hidden")]
        units = [Unit(path, writes="hidden") for path in self.stream if has_module(model, path)]
        return units + ([Unit(self.stream_norm, writes="hidden")] if self.stream_norm else [])

    def _table_sites(self, model: nn.Module, width: int) -> dict[str, Site]:
        tied = self.decoder and has_module(
            model, self.decoder
        )  # a tied decoder reads the table row by row: keep it whole
        if not (self.table and self.stream_norm) or tied or self._projects(model):
            return {}
        table = get_module(model, self.table)
        return {
            "embedding": Site(
                "embedding", "embedding", getattr(table, "rank", width), (Point(self.table),), couple="embedding"
            )
        }

    def _layer_sites(self, model: nn.Module, block: str, depth: int) -> list[Site]:
        heads = getattr(get_module(model, f"{block}.{self.attention}"), self.heads)
        value = linear_shape(get_module(model, f"{block}.{self.value}"))[1]
        query = linear_shape(get_module(model, f"{block}.{self.query}"))[1]
        inner = linear_shape(get_module(model, f"{block}.{self.up}"))[1]
        name, couple = f"layer.{depth}", f"layer.{depth}.heads"
        queries = (Point(f"{block}.{self.query}"), Point(f"{block}.{self.key}"))
        return [
            Site(f"{name}.attention_qk", "attention_qk", query, queries, heads, depth, couple),
            Site(
                f"{name}.attention_vo",
                "attention_vo",
                value,
                (Point(f"{block}.{self.output}", "input"),),
                heads,
                depth,
                couple,
            ),
            Site(
                f"{name}.intermediate",
                "intermediate",
                inner,
                (Point(f"{block}.{self.down}", "input"),),
                1,
                depth,
                f"{name}.intermediate",
            ),
        ]

    def _layer_units(self, block: str, depth: int, after: str | None) -> list[Unit]:
        name = f"layer.{depth}"
        at = lambda path: f"{block}.{path}"  # noqa: E731
        if self.pre_norm:
            ffn_skip, lands = Point(at(self.ffn_norm), "input"), (at(self.ffn_norm), after)
        else:
            ffn_skip, lands = Point(at(self.attention_norm), "output"), (at(self.attention_norm), at(self.ffn_norm))
        landing = [Point(path, "input") for path in lands]
        norms = (at(self.attention_norm), at(self.ffn_norm)) if self.pre_norm else (None, None)
        attention = [
            Unit(at(self.query), "hidden", f"{name}.attention_qk", block=block, through=norms[0]),
            Unit(at(self.key), "hidden", f"{name}.attention_qk", block=block, through=norms[0]),
            Unit(at(self.value), "hidden", f"{name}.attention_vo", block=block, through=norms[0]),
            Unit(at(self.output), f"{name}.attention_vo", "hidden", Point(block, "input"), landing[0], block),
        ]
        feed_forward = [
            Unit(at(self.up), "hidden", f"{name}.intermediate", block=block, through=norms[1]),
            Unit(at(self.down), f"{name}.intermediate", "hidden", ffn_skip, landing[1], block),
        ]
        first = [Unit(at(self.attention_norm), writes="hidden", block=block)]
        second = [Unit(at(self.ffn_norm), writes="hidden", block=block)]
        if self.pre_norm:
            return first + attention + second + feed_forward
        return attention + first + feed_forward + second

    def _head_units(self, model: nn.Module, width: int, depth: int) -> tuple[list[Unit], dict[str, Site]]:
        units, sites, reads = [], {}, "hidden"
        through = self.final_norm if self.pre_norm else None
        if self.pooler:
            units.append(Unit(self.pooler, "hidden", "pooler", through=through))
        if self.pooler and has_module(model, self.pooler):
            present = [path for path in self.pooled_by if is_layer(model, path)]
            reads = "pooler" if present else "hidden"
            point = Point(present[0], "input") if present else Point(self.pooler)
            sites["pooler"] = Site("pooler", "pooled", width, (point,), depth=depth, couple="hidden")
        units += [Unit(path, reads, through=through if reads == "hidden" else None) for path in self.pooled_by]
        units += [Unit(path, "hidden", through=through) for path in self.head_reads]
        if self._ties(model):
            units.append(Unit(self.decoder, factor="hidden", full=width))
        return units, sites


def factored_anatomy(model: nn.Module) -> Anatomy:
    """Every linear layer and 1x1 convolution as a site of its own, whose width is the rank of two factors.

    Layers that share their weight (tied decoders), those inside a factored one, and those thinner than
    THINNEST_FACTORED at either end are left as they are.
    """
    owners = [id(m.weight) for m in model.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)]
    sites, units = {}, []
    for path, module in linear_layers(model).items():
        factored = isinstance(module, (LowRankLinear, LowRankConv2d))
        spatial = isinstance(module, nn.Conv2d) and not (module.kernel_size == (1, 1) and module.groups == 1)
        if spatial or not (factored or owners.count(id(module.weight)) == 1):
            continue
        features_in, features_out, _ = linear_shape(module)
        if min(features_in, features_out) < THINNEST_FACTORED:
            continue
        rank = getattr(module, "rank", min(features_in, features_out))
        sites[path] = Site(path, "linear", rank, (Point(path),), depth=len(sites), couple=path)
        units.append(Unit(path, factor=path))
    return Anatomy(sites, tuple(units), ())
