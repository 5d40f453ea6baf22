"""Layouts: how the anatomy of a model is read off a declaration of paths; that of encoders, and the one without a
declaration."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..errors import UnsupportedArchitectureError
from ..modeling_rmtkd import LowRankConv2d, LowRankLinear
from .declaring import check_needs, decoder_units
from .sites import (
    Anatomy,
    Attribute,
    Point,
    Site,
    Unit,
    get_module,
    has_module,
    is_layer,
    linear_layers,
    linear_shape,
)


__all__ = ["EncoderLayout", "factored_anatomy"]


THINNEST_FACTORED = 16  # two factors of such a layer save next to nothing


@dataclass(frozen=True)
class EncoderLayout:
    """A stack of attention and feed-forward blocks around one residual stream.

    Paths start with "@." where relative to the backbone; paths of `query` to `ffn_norm` are relative to a block.

    Attributes:
        stream: tables, convolutions and bare parameters whose sum is the stream; those a model lacks are passed over.
        beside: what lies in the coordinates of the stream without being added to it: a table of relative positions
            that attention reads, and its norm; a norm whose output no head reads.
        project: a linear layer between tables and stream; where a model has it, it alone writes the stream, and
            `stream_norm` stands in front of it (`norm_after_project`: behind it).
        table: the word table, which the site "embedding" factorises; None for images.
        blocks: the ModuleList of blocks; `inner`: or of groups, the ModuleList of blocks in one of them.
        repeats: fields of the config, of which the first over the second says how often each block runs one after the
            other; ("", "") where once.
        attention: the module that holds head sizes; `head_size`, `heads` name its attributes; `total_size` may be "".
            Names of widths are among `spec_rmtkd.WIDTHS`.
        scale: its attribute for the softmax scale; "" where its code makes it from the width of a head.
        score_terms: (its attribute, names): each of these that the attribute holds adds a term to a score, and as many
            features as a head has to what the root is taken of.
        position_query, position_key: its layers that make queries and keys of relative positions, from what lies
            `beside` the stream.
        up: the layer in front of the activation, or several: those that a model lacks are passed over, and what two
            give is multiplied. down: the layer behind; of several names the one that there is.
        pre_norm: norms stand before attention and feed-forward (ViT) instead of behind the sums (BERT).
        windowed: attention reads windows of an image, and gives positions in another order than the residual path has.
        attention_scale, ffn_scale: bare parameters of a block that multiply what attention and feed-forward add to the
            stream, feature by feature (layer-scale of pre-norm models).
        final_norm: the norm behind the last block; of several names the one that there is.
        pooled_norm: it stands behind a pooling, and sees one position alone.
        copies: {layer of a task head: how many vectors of the stream it reads, one behind the other}.
        pooler: a linear layer with element-wise activation whose output follows the hidden width; heads that read it
            where it is there, and the stream where it is not, are named in `pooled_by`.
        head_reads: layers of any task head that read the stream with their input features.
        decoder: an output layer tied to the word table.
        dense_head: a layer of a task head that reads the stream and is as wide, with an element-wise activation, and
            the layer that reads it: where the config states one width, the former follows the stream.
        width_field: field of the config that states the hidden width; "" where a config inside it does.
        width_fields: others that state it.
        ratio_field: field of the config that states the feed-forward width in units of the hidden one.
        needs: {field of the config: its value}, without which the classes run other code than what is declared.
        undeclared: heads of some classes that read the stream otherwise than any declaration says.
    """

    stream: tuple[str, ...]
    blocks: str
    query: str
    key: str
    value: str
    output: str
    up: str | tuple[str, ...]
    down: str | tuple[str, ...]
    attention_norm: str
    ffn_norm: str
    attention: str
    inner: str | None = None
    repeats: tuple[str, str] = ("", "")
    head_size: str = "attention_head_size"
    total_size: str = "all_head_size"
    heads: str = "num_attention_heads"
    scale: str = "scaling"
    score_terms: tuple[str, tuple[str, ...]] = ("", ())
    position_query: str | None = None
    position_key: str | None = None
    pre_norm: bool = False
    windowed: bool = False
    attention_scale: str | None = None
    ffn_scale: str | None = None
    stream_norm: str | None = None
    beside: tuple[str, ...] = ()
    project: str | None = None
    norm_after_project: bool = False
    table: str | None = None
    final_norm: str | tuple[str, ...] | None = None
    pooled_norm: bool = False
    pooler: str | None = None
    pooled_by: tuple[str, ...] = ()
    head_reads: tuple[str, ...] = ()
    copies: dict[str, int] = field(default_factory=dict)
    decoder: str | None = None
    dense_head: tuple[str, str] | None = None
    width_field: str = "hidden_size"
    width_fields: tuple[str, ...] = ()
    ratio_field: str | None = None
    needs: dict[str, object] = field(default_factory=dict)
    undeclared: tuple[str, ...] = ()

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Sites and units of `model`.

        Raises:
            UnsupportedArchitectureError: the model lacks a declared module, or its config asks for code that no
                declaration covers.
        """
        check_needs(model, self.needs)
        for head in self.undeclared:
            if has_module(model, head):
                raise UnsupportedArchitectureError(
                    f"{type(model).__name__} with a head {head!r} runs other code than what its family declares. Use "
                    "form='factored', which works for every architecture."
                )
        return dataclasses.replace(self, **self._found(model))._anatomy(model)

    def _found(self, model: nn.Module) -> dict[str, Any]:
        """Of the names that a declaration offers, those that this model has."""
        block = self._blocks(model)[0]
        up, down, last = (
            (names,) if isinstance(names, str) else names or () for names in (self.up, self.down, self.final_norm)
        )
        ups = tuple(name for name in up if is_layer(model, f"{block}.{name}")) or up[:1]
        down = next((name for name in down if is_layer(model, f"{block}.{name}")), down[0])
        last = next((name for name in last if is_layer(model, name)), last[0] if last else None)
        scales = {
            name: path if path and isinstance(get_module(model, f"{block}.{path}"), nn.Parameter) else None
            for name, path in (("attention_scale", self.attention_scale), ("ffn_scale", self.ffn_scale))
        }
        positions = {
            name: path if path and has_module(model, f"{block}.{path}") else None
            for name, path in (("position_query", self.position_query), ("position_key", self.position_key))
        }
        return {"up": ups, "down": down, "final_norm": last} | scales | positions

    def _blocks(self, model: nn.Module) -> list[str]:
        """Paths of the blocks."""
        found = [f"{self.blocks}.{i}" for i in range(len(get_module(model, self.blocks)))]
        if not self.inner:
            return found
        lists = [f"{path}.{self.inner}" for path in found]
        return [f"{path}.{i}" for path in lists for i in range(len(get_module(model, path)))]

    def _anatomy(self, model: nn.Module) -> Anatomy:
        blocks = self._blocks(model)
        runs, lists = (getattr(model.config, name, 1) for name in self.repeats)
        units = self._stream_units(model)
        sites, attributes, scales = {}, [], {}
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
            scales[f"{block}.{self.attention}"] = self._softmax_scale(model, block)
        if self.final_norm:
            units.append(Unit(self.final_norm, writes="hidden"))
            last = [Point(self.final_norm, side) for side in ("input", "output")]
            norm_points += [Point(blocks[-1])] if self.pooled_norm else last
        width = linear_shape(get_module(model, f"{blocks[0]}.{self.up[0]}"))[0]
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
            config_fields=dict.fromkeys(filter(None, (self.width_field, *self.width_fields)), "hidden"),
            fixed_attrs={path: {self.scale: value} for path, value in scales.items()} if self.scale else {},
            softmax_scales=scales,
            repeats=runs / lists,
            pre_norm=self.pre_norm,
            last_norm=self.final_norm if self.pre_norm else None,
        )

    def _softmax_scale(self, model: nn.Module, block: str) -> float:
        attention = get_module(model, f"{block}.{self.attention}")
        if self.scale:
            return float(getattr(attention, self.scale))
        features = linear_shape(get_module(model, f"{block}.{self.query}"))[1]
        name, terms = self.score_terms
        count = 1 + sum(term in getattr(attention, name, ()) for term in terms)
        return (count * features / getattr(attention, self.heads)) ** -0.5

    def _projects(self, model: nn.Module) -> bool:
        return self.project is not None and has_module(model, self.project)

    def _first_points(self, model: nn.Module) -> list[Point]:
        if self._projects(model) and not self.norm_after_project:
            return [Point(self.project)]
        sides = ("output",) if self.pre_norm else ("input", "output")  # what stands in front is no part of its stream
        return [Point(self.stream_norm, side) for side in sides] if self.stream_norm else []

    def _stream_units(self, model: nn.Module) -> list[Unit]:
        projects = self._projects(model)
        writers = (self.project,) if projects else self.stream
        if self.stream_norm and (not projects or self.norm_after_project):
            writers = (*writers, self.stream_norm)
        norm = {"behind": self.stream_norm, "lands": Point(self.stream_norm, "input")}
        norm = norm if self.pre_norm and self.stream_norm else {}
        return [
            Unit(path, writes="hidden", **({} if path in (self.stream_norm, *self.beside) else norm))
            for path in (*writers, *self.beside)
            if has_module(model, path)
        ]

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
        inner = linear_shape(get_module(model, f"{block}.{self.up[0]}"))[1]
        name, couple = f"layer.{depth}", f"layer.{depth}.heads"
        queries = (self.query, self.key, self.position_query, self.position_key)
        queries = tuple(Point(f"{block}.{path}") for path in queries if path)
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
        landing = [Point(path or block, "input") for path in lands]
        if after is None or (after == self.final_norm and self.pooled_norm):
            landing[1] = landing[1] if not self.pre_norm else Point(block)
        norms = (at(self.attention_norm), at(self.ffn_norm)) if self.pre_norm else (None, None)
        scales = [path and at(path) for path in (self.attention_scale, self.ffn_scale)]
        queries, inner = f"{name}.attention_qk", f"{name}.intermediate"
        # where positions have no layers of their own, those of queries and keys read them as well
        both = "with positions" if self.beside and not (self.position_query or self.position_key) else ""
        attention = [
            Unit(at(self.query), "hidden", queries, block=block, through=norms[0], entrance=both),
            Unit(at(self.key), "hidden", queries, block=block, through=norms[0], keys=True, entrance=both),
            Unit(at(self.value), "hidden", f"{name}.attention_vo", block=block, through=norms[0]),
            *(
                Unit(at(path), "hidden", queries, block=block, keys=path == self.position_key, entrance="positions")
                for path in (self.position_query, self.position_key)
                if path
            ),
            Unit(
                at(self.output),
                f"{name}.attention_vo",
                "hidden",
                None if self.windowed else Point(block, "input"),
                landing[0],
                block,
                scaled=scales[0],
            ),
        ]
        feed_forward = [
            *(Unit(at(path), "hidden", inner, block=block, through=norms[1]) for path in self.up),
            Unit(at(self.down), inner, "hidden", ffn_skip, landing[1], block, scaled=scales[1]),
        ]
        for units, scale in zip((attention, feed_forward), scales, strict=True):
            units += [Unit(scale, writes="hidden", block=block)] if scale else []
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
        units += [Unit(path, "hidden", through=through, copies=self.copies.get(path, 1)) for path in self.head_reads]
        decoder = None if self._projects(model) else self.decoder
        return units + decoder_units(model, decoder, self.table), sites


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
