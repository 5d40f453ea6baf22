"""The layout of decoders: how the anatomy of a pre-norm causal language model is read off a declaration of paths.

Attention is cut by whole key-value groups, each with the query heads that share it: positions (rotary pairs, biases by
distance) live inside a head, and configs and caches know how many heads there are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import nn

from ..models import shifts_labels
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
    linear_shape,
)


__all__ = ["DecoderLayout"]


@dataclass(frozen=True)
class DecoderLayout:
    """A stack of causal attention and feed-forward blocks around one residual stream, which norms read.

    Paths start with "@." where relative to the backbone; paths of `attention` to `ffn_norm` are relative to a block.

    Attributes:
        stream: tables whose sum is the stream; those a model lacks are passed over. The first is the word table.
        blocks: the ModuleList of blocks.
        attention: the module that holds the heads; `head_size` names its attribute for the width of one.
        query, key, value: its layers; or `fused`, one that makes all three, as three stretches ("blocked") or head by
            head ("by_head", where each head has keys and values of its own).
        output: the layer behind the heads.
        up: layers of as many features that are multiplied (gate and up, in any order), or one; or `fused_up`, one that
            makes both, one behind the other.
        down: the layer that reads them.
        attention_norm, ffn_norm: norms in front of attention and feed-forward; without the second both read the first.
            Without either, both read the stream as it is (OLMo 2).
        after_attention, after_ffn: norms between what attention and feed-forward give and the sum.
        query_norm, key_norm: norms over all heads of queries and keys together.
        reads, writes: bare parameters of a block that read what the second norm gives, with their last axis, or write
            the stream, with the last but one: a router and its experts. Together with `down=""`.
        refused: {kind of site: why it is not cut}.
        multiple: widths of the stream are multiples of it, whatever the recipe rounds to.
        parallel: attention and feed-forward read the same stream, and their sum is added to it.
        stream_norm: a norm between the tables and the first block.
        final_norm: the norm in front of the head.
        heads: layers of the task heads of this family that read the stream; each is the layer of some class. One may
            be tied to the word table.
        decoder: an output layer behind a head and a norm of its own, tied to the word table.
        counts, query_counts: attributes of `attention` that hold the number of key-value groups, of query heads.
        heads_in_config: the code of `attention` reads these numbers from its config.
        widths: attributes of `attention` that hold the width of all query heads.
        stream_widths: {module of a block: its attribute that holds the width of the stream}.
        multiplier: field of the config by which what a block adds is multiplied.
        inner_field: field of the config that states the feed-forward width, where together with the usual names of
            heads (num_attention_heads, num_key_value_heads, head_dim) it says all widths that shape="native" needs,
            and the stock class is the same function of its tensors; None: there is no native shape.
        causal: a position attends to those before it alone.
        needs: {field of the config: its value}, without which the classes run other code than what is declared.
        width_field: field of the config that states the hidden width.
    """

    stream: tuple[str, ...]
    blocks: str
    output: str
    down: str
    final_norm: str
    attention_norm: str | None = None
    attention: str = "self_attn"
    query: str = ""
    key: str = ""
    value: str = ""
    fused: str | None = None
    fused_by: str = "blocked"
    up: tuple[str, ...] = ()
    fused_up: str | None = None
    ffn_norm: str | None = None
    after_attention: str | None = None
    after_ffn: str | None = None
    query_norm: str | None = None
    key_norm: str | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    refused: dict[str, str] = field(default_factory=dict)
    multiple: int = 1
    parallel: bool = False
    stream_norm: str | None = None
    heads: tuple[str, ...] = ("lm_head", "score", "qa_outputs")
    decoder: str | None = None
    head_size: str = "head_dim"
    counts: tuple[str, ...] = ()
    query_counts: tuple[str, ...] = ()
    heads_in_config: bool = False
    widths: tuple[str, ...] = ()
    stream_widths: dict[str, str] = field(default_factory=dict)
    multiplier: str | None = None
    causal: bool = True
    needs: dict[str, object] = field(default_factory=dict)
    width_field: str = "hidden_size"
    inner_field: str | None = None

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Sites and units of `model`.

        Raises:
            UnsupportedArchitectureError: the model lacks a declared module, or its config asks for code that no
                declaration covers.
        """
        check_needs(model, self.needs)
        blocks = [f"{self.blocks}.{i}" for i in range(len(get_module(model, self.blocks)))]
        units = [Unit(path, writes="hidden") for path in self.stream if has_module(model, path)]
        if self.stream_norm:
            landing = Point(self.stream_norm, "input")
            if not any(is_layer(model, unit.path) for unit in decoder_units(model, self.decoder, self.stream[0])):
                # a table that an output layer shares does not take in the scale of the norm behind it
                units = [dataclasses.replace(unit, behind=self.stream_norm, lands=landing) for unit in units]
            units.append(Unit(self.stream_norm, writes="hidden"))
        sites, attributes, heads, norms = {}, [], {}, []
        for depth, block in enumerate(blocks):
            attention = self._attention_sites(model, block, depth)
            inner = self._inner_sites(model, block, depth)
            sites |= {site.name: site for site in (*attention, *inner)}
            following = blocks[depth + 1] if depth + 1 < len(blocks) else None
            after = Point(self._at(following, self.attention_norm) if following else self.final_norm, "input")
            units += self._units(model, block, depth, after)
            norms += [f"{block}.{path}" for path in (self.attention_norm, self.ffn_norm) if path]
            attributes += [
                Attribute(f"{block}.{path}", name, "hidden", False) for path, name in self.stream_widths.items()
            ]
            at, lead = f"{block}.{self.attention}", attention[0].name
            each = getattr(get_module(model, at), self.head_size)
            attributes += [Attribute(at, name, lead, True) for name in self.counts]
            attributes += [Attribute(at, name, lead, True, each) for name in self.query_counts]
            attributes += [Attribute(at, name, lead, False) for name in self.widths]
            heads[at] = lead
        units.append(Unit(self.final_norm, writes="hidden"))
        width = get_module(model, self.final_norm).weight.numel()
        step = self.multiple if width % self.multiple == 0 else 1
        answers = shifts_labels(model)
        points = self._stream_points(model, blocks, norms, answers)
        return Anatomy(
            sites={"hidden": Site("hidden", "hidden", width, points, step, couple="hidden"), **sites},
            units=(*units, *self._heads(model)),
            blocks=tuple(blocks),
            attributes=tuple(attributes),
            config_fields={self.width_field: "hidden"},
            heads=heads,
            heads_in_config=self.heads_in_config,
            pre_norm=True,
            last_norm=self.final_norm,
            causal=self.causal,
            answers=answers,
            refused=self.refused,
        )

    @staticmethod
    def _at(block: str, path: str | None) -> str:
        """A path in a block; the block itself where it has no such module."""
        return f"{block}.{path}" if path else block

    def _stream_points(
        self, model: nn.Module, blocks: list[str], norms: list[str], answers: bool
    ) -> tuple[Point, ...]:
        """Where the stream is observed. Raw streams hold few tokens with most of the energy, so what readers see is
        what counts. Where they read the raw stream itself, it is what was added to it: the gradient there holds that
        of all later readers, and each term of a sum is lost once."""
        if self.attention_norm is None:
            added = [path for path in self.stream if has_module(model, path)]
            added += [f"{block}.{path}" for block in blocks for path in (self.after_attention, self.after_ffn)]
            return tuple(Point(path) for path in added)
        sides = ("output",) if answers else ("input", "output")
        return tuple(Point(path, side) for path in (*norms, self.final_norm) for side in sides)

    def _heads(self, model: nn.Module) -> list[Unit]:
        table = get_module(model, self.stream[0])
        found = []
        for path in self.heads:
            there = get_module(model, path) if has_module(model, path) else None
            tied = there is not None and getattr(there, "weight", None) is table.weight
            found.append(Unit(path, "hidden", through=self.final_norm, tied=tied))
        return found + decoder_units(model, self.decoder, self.stream[0])

    def _attention_sites(self, model: nn.Module, block: str, depth: int) -> list[Site]:
        """The site of queries and heads, which is chosen, and that of what makes keys and values."""
        each = getattr(get_module(model, f"{block}.{self.attention}"), self.head_size)
        queries = linear_shape(get_module(model, f"{block}.{self.output}"))[0]
        name = f"layer.{depth}.attention"
        if self.fused:
            made = linear_shape(get_module(model, f"{block}.{self.fused}"))[1]
            keys = (made - queries) // 2
        else:
            made = keys = linear_shape(get_module(model, f"{block}.{self.key}"))[1]
        groups = keys // each
        share = queries // groups
        parts = (share, each, each) if self.fused else (each,)
        parts = (sum(parts),) if self.fused_by == "by_head" else parts
        point = Point(f"{block}.{self.output}", "input")
        lead = Site(name, "attention_groups", queries, (point,), share, depth, name, (share,))
        return [lead, Site(f"{name}.made", "parted", made, (), made // groups, depth, name, parts, name)]

    def _inner_sites(self, model: nn.Module, block: str, depth: int) -> list[Site]:
        if not self.down:
            return []
        inner = linear_shape(get_module(model, f"{block}.{self.down}"))[0]
        name = f"layer.{depth}.intermediate"
        lead = Site(name, "intermediate", inner, (Point(f"{block}.{self.down}", "input"),), 1, depth, name)
        if not self.fused_up:
            return [lead]
        return [lead, Site(f"{name}.made", "parted", 2 * inner, (), 2, depth, name, (1, 1), name)]

    def _units(self, model: nn.Module, block: str, depth: int, after: Point) -> list[Unit]:
        at = lambda path: f"{block}.{path}"  # noqa: E731
        # the first block of some reads the stream behind a norm as it is
        first = at(self.attention_norm) if self.attention_norm and is_layer(model, at(self.attention_norm)) else None
        second = at(self.ffn_norm) if self.ffn_norm else first
        scale = float(getattr(model.config, self.multiplier)) if self.multiplier else 1.0
        entrance = Point(block, "input")
        inner = [] if not self.down else self._inner_units(block, f"layer.{depth}.intermediate", second)
        inner += [Unit(at(path), "hidden", block=block, through=second) for path in self.reads]
        inner += [Unit(at(path), writes="hidden", block=block, axis=-2) for path in self.writes]
        between = Point(second if self.ffn_norm else inner[0].path, "input")
        attention = self._added(
            self._attention_units(block, f"layer.{depth}.attention", first),
            self.after_attention and at(self.after_attention),
            entrance,
            after if self.parallel else between,
            scale,
        )
        feed_forward = self._added(
            inner,
            self.after_ffn and at(self.after_ffn),
            entrance if self.parallel else between,
            after,
            scale,
            Point(at(self.output)) if self.parallel else None,
        )
        norms = [
            [Unit(path, writes="hidden", block=block)] if path and is_layer(model, path) else []
            for path in (first, second if second != first else None)
        ]
        return [*norms[0], *attention, *norms[1], *feed_forward]

    def _attention_units(self, block: str, heads: str, through: str | None) -> list[Unit]:
        """What makes queries, keys and values, and the layer behind the heads."""
        at = lambda path: f"{block}.{path}"  # noqa: E731
        made = (
            {self.fused: f"{heads}.made"}
            if self.fused
            else {self.query: heads, self.key: f"{heads}.made", self.value: f"{heads}.made"}
        )
        norms = {self.query_norm: heads, self.key_norm: f"{heads}.made"}
        return [
            *(Unit(at(path), "hidden", site, block=block, through=through) for path, site in made.items()),
            *(Unit(at(path), writes=site, block=block) for path, site in norms.items() if path),
            Unit(at(self.output), heads, "hidden", block=block),
        ]

    def _inner_units(self, block: str, inner: str, through: str | None) -> list[Unit]:
        at = lambda path: f"{block}.{path}"  # noqa: E731
        ups = {self.fused_up: f"{inner}.made"} if self.fused_up else dict.fromkeys(self.up, inner)
        made = [Unit(at(path), "hidden", site, block=block, through=through) for path, site in ups.items()]
        return [*made, Unit(at(self.down), inner, "hidden", block=block)]

    @staticmethod
    def _added(
        units: list[Unit], norm: str | None, skip: Point, lands: Point, scale: float, beside: Point | None = None
    ) -> list[Unit]:
        """Units of which the last is added to the stream, through `norm` where there is one."""
        last = units[-1]
        if last.axis != -1:  # experts are not fitted to what their sum lacks
            return units
        if norm is None:
            added = dataclasses.replace(last, skip=skip, lands=lands, beside=beside, scale=scale)
            return [*units[:-1], added]
        writer = dataclasses.replace(last, lands=Point(norm, "input"), behind=norm)
        return [*units[:-1], writer, Unit(norm, writes="hidden", skip=skip, block=last.block, scale=scale)]
