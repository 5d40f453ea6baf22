"""The layout of encoder-decoders: how the anatomy of two stacks, of which the second reads the first, is read off a
declaration of paths.

Both streams have one basis and one width: a word table that both share feeds them, and keys and values of the
decoder's cross-attention read what the encoder gives. Heads keep their number, by which relative positions are told
apart, and lose width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import nn

from ..models import has_head
from .declaring import check_needs
from .sites import Anatomy, Attribute, Point, Site, Unit, get_module, has_module, linear_shape


__all__ = ["Seq2SeqLayout", "Stack"]

GENERATING = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")  # of transformers' auto mappings


@dataclass(frozen=True)
class Stack:
    """The encoder, or the decoder. Paths start with "@." where relative to the backbone; the others are relative to a
    block.

    Attributes:
        stream: tables and convolutions whose sum is its stream; those a model lacks are passed over. Tables may be
            tied to each other and to those of the other stack.
        blocks: the ModuleList of blocks.
        attention: the module that holds the heads.
        up: layers of as many features that are multiplied (gate and up, in any order), or one; those a model lacks
            are passed over.
        down: the layer that reads them.
        attention_norm, ffn_norm: norms in front of attention and feed-forward, or behind their sums (`pre_norm`).
        cross, cross_norm: the same of the attention to what the encoder gives.
        stream_norm: a norm behind the sum of the tables.
        final_norm: the norm behind the last block, where norms stand in front of the layers.
        turns: False where its stream cannot be turned, because what enters it is made by an activation (Whisper's
            encoder): it keeps its width.
    """

    stream: tuple[str, ...]
    blocks: str
    attention: str
    attention_norm: str
    up: tuple[str, ...]
    down: str
    ffn_norm: str
    cross: str | None = None
    cross_norm: str | None = None
    stream_norm: str | None = None
    final_norm: str | None = None
    turns: bool = True

    @property
    def site(self) -> str | None:
        """The site of its stream."""
        return "hidden" if self.turns else None


@dataclass(frozen=True)
class Seq2SeqLayout:
    """An encoder and a decoder that reads it, or the encoder alone where a class has no decoder.

    Attributes:
        encoder, decoder: their paths.
        query, key, value, output: layers of an attention, relative to it.
        head_size, count, total_size: its attributes for the width of a head, the number of heads and the width of all;
            the last may be "".
        pre_norm: norms stand in front of the layers (T5, mBART, Whisper) instead of behind the sums (BART, Marian).
        heads: layers of the task heads of this family that read the stream of the last stack; each is the layer of
            some class. One may be tied to a word table.
        needs: {field of the config: its value}, without which the classes run other code than what is declared.
        width_field: field of the config that states the width of all streams; it stays where one of them does.
        inner_field, head_field, epsilon_field: fields of the config that state the width of all feed-forward parts and
            of all heads, and the epsilon of all norms, where together with `width_field` they say what shape="native"
            needs; None: there is no native shape.
        scales_head: (field of the config, attribute of the model): where the first is true, the input of the head is
            divided by the root of the second, the width of the stream.
    """

    encoder: Stack
    decoder: Stack
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "out_proj"
    head_size: str = "head_dim"
    count: str = "num_heads"
    total_size: str = "embed_dim"
    pre_norm: bool = False
    heads: tuple[str, ...] = ("lm_head",)
    needs: dict[str, object] = field(default_factory=dict)
    width_field: str = "d_model"
    inner_field: str | None = None
    head_field: str | None = None
    epsilon_field: str | None = None
    scales_head: tuple[str, str] | None = None

    def anatomy(self, model: nn.Module) -> Anatomy:
        """Sites and units of `model`.

        Raises:
            UnsupportedArchitectureError: the model lacks a declared module, or its config asks for code that no
                declaration covers.
        """
        check_needs(model, self.needs)
        answers = any(has_head(model, mapping) for mapping in GENERATING)
        units, sites, attributes, scales, points, stacks = [], {}, [], {}, [], []
        for name, stack in self._stacks(model).items():
            paths = tuple(f"{stack.blocks}.{i}" for i in range(len(get_module(model, stack.blocks))))
            units += self._entrance(model, stack)
            for number, block in enumerate(paths):
                at, depth = f"{name}.{number}", sum(map(len, stacks)) + number
                after = f"{paths[number + 1]}.{stack.attention_norm}" if block != paths[-1] else stack.final_norm
                for path, heads in self._attentions(stack, block, at).items():
                    sites |= {site.name: site for site in self._head_sites(model, path, heads, depth)}
                    attributes.append(Attribute(path, self.head_size, f"{heads}_vo", True))
                    attributes += [Attribute(path, self.total_size, f"{heads}_vo", False)] if self.total_size else []
                    scales[path] = float(get_module(model, path).scaling)
                inner = self._inner_site(model, f"{block}.{stack.down}", f"{at}.intermediate", depth)
                sites[inner.name] = inner
                units += self._block_units(model, stack, block, at, after)
            if stack.turns:
                points += self._points(stack, paths, answers)
            stacks.append(paths)
            units += [Unit(stack.final_norm, writes=stack.site)] if stack.final_norm else []
        width = linear_shape(get_module(model, f"{stacks[-1][0]}.{stack.down}"))[1]
        stream = {"hidden": Site("hidden", "hidden", width, tuple(points), couple="hidden")} if points else {}
        units += [Unit(path, stack.site, through=stack.final_norm) for path in self.heads]
        return Anatomy(
            sites=stream | sites,
            units=_tied(model, units),
            blocks=tuple(path for paths in stacks for path in paths),
            stacks=tuple(stacks),
            attributes=tuple(attributes),
            config_fields={self.width_field: "hidden"} if self.encoder.turns and stack.turns else {},
            fixed_attrs={path: {"scaling": scale} for path, scale in scales.items()},
            softmax_scales=scales,
            pre_norm=self.pre_norm,
            last_norm=stack.final_norm,
            answers=answers,
        )

    def _stacks(self, model: nn.Module) -> dict[str, Stack]:
        found = {"encoder": self.encoder}
        return found | ({"decoder": self.decoder} if has_module(model, self.decoder.blocks) else {})

    def _entrance(self, model: nn.Module, stack: Stack) -> list[Unit]:
        paths = [path for path in stack.stream if has_module(model, path)]
        return [Unit(path, writes=stack.site) for path in (*paths, stack.stream_norm) if path]

    @staticmethod
    def _attentions(stack: Stack, block: str, at: str) -> dict[str, str]:
        """{path of an attention: what the names of its sites begin with}"""
        found = {f"{block}.{stack.attention}": f"{at}.attention"}
        return found | ({f"{block}.{stack.cross}": f"{at}.cross_attention"} if stack.cross else {})

    def _points(self, stack: Stack, blocks: tuple[str, ...], answers: bool) -> list[Point]:
        """Where the stream is observed. Raw streams of language models hold few tokens with most of the energy: what
        readers see is what counts."""
        names = [path for path in (stack.attention_norm, stack.cross_norm, stack.ffn_norm) if path]
        norms = [f"{block}.{name}" for block in blocks for name in names]
        norms = [stack.stream_norm] * bool(stack.stream_norm and not self.pre_norm) + norms
        norms += [stack.final_norm] if stack.final_norm else []
        return [Point(path, side) for path in norms for side in (("output",) if answers else ("input", "output"))]

    def _head_sites(self, model: nn.Module, path: str, name: str, depth: int) -> list[Site]:
        heads = getattr(get_module(model, path), self.count)
        query, value = (linear_shape(get_module(model, f"{path}.{n}"))[1] for n in (self.query, self.value))
        made = Point(f"{path}.{self.query}"), Point(f"{path}.{self.key}")
        read = Point(f"{path}.{self.output}", "input")
        return [
            Site(f"{name}_qk", "attention_qk", query, made, heads, depth, name),
            Site(f"{name}_vo", "attention_vo", value, (read,), heads, depth, name),
        ]

    @staticmethod
    def _inner_site(model: nn.Module, down: str, name: str, depth: int) -> Site:
        width = linear_shape(get_module(model, down))[0]
        return Site(name, "intermediate", width, (Point(down, "input"),), 1, depth, name)

    def _block_units(self, model: nn.Module, stack: Stack, block: str, at: str, after: str | None) -> list[Unit]:
        """Units of a block, part by part: attention, cross-attention, feed-forward, each with its norm in front of it
        or behind the sum."""
        given = self.encoder.final_norm  # what cross-attention reads: the encoder's last norm
        if not self.pre_norm:
            last = len(get_module(model, self.encoder.blocks)) - 1
            given = f"{self.encoder.blocks}.{last}.{self.encoder.ffn_norm}"
        parts = {stack.attention_norm: None, stack.cross_norm: given, stack.ffn_norm: None}
        norms = [f"{block}.{name}" for name in parts if name]
        units: list[Unit] = []
        for number, (norm, source) in enumerate((name, source) for name, source in parts.items() if name):
            own = norms[number]
            before = norms[number - 1] if number else None
            if self.pre_norm:
                skip = Point(own, "input") if before else Point(block, "input")
                lands = norms[number + 1] if own != norms[-1] else after
            else:
                skip = Point(before, "output") if before else Point(block, "input")
                lands = own
            if norm == stack.ffn_norm:
                inside = self._inner_units(model, stack, block, f"{at}.intermediate", own)
            else:
                path, heads = list(self._attentions(stack, block, at).items())[source is not None]
                inside = self._attention_units(stack, path, heads, block, own, source)
            inside[-1] = dataclasses.replace(inside[-1], skip=skip, lands=Point(lands, "input"))
            norm_unit = Unit(own, writes=stack.site, block=block)
            units += [norm_unit, *inside] if self.pre_norm else [*inside, norm_unit]
        return units

    def _attention_units(
        self, stack: Stack, path: str, heads: str, block: str, norm: str, source: str | None
    ) -> list[Unit]:
        """`source`: the norm that the encoder ends with, where keys and values are made of what that gives."""
        through = norm if self.pre_norm else None
        site, read = (stack.site, through) if source is None else (self.encoder.site, source)
        return [
            Unit(f"{path}.{self.query}", stack.site, f"{heads}_qk", block=block, through=through),
            Unit(f"{path}.{self.key}", site, f"{heads}_qk", block=block, through=read, keys=True),
            Unit(f"{path}.{self.value}", site, f"{heads}_vo", block=block, through=read),
            Unit(f"{path}.{self.output}", f"{heads}_vo", stack.site, block=block),
        ]

    def _inner_units(self, model: nn.Module, stack: Stack, block: str, inner: str, norm: str) -> list[Unit]:
        through = norm if self.pre_norm else None
        ups = [f"{block}.{path}" for path in stack.up if has_module(model, f"{block}.{path}")]
        made = [Unit(path, stack.site, inner, block=block, through=through) for path in ups]
        return [*made, Unit(f"{block}.{stack.down}", inner, stack.site, block=block)]


def _tied(model: nn.Module, units: list[Unit]) -> tuple[Unit, ...]:
    """The same, those whose weight is that of an earlier one marked."""
    seen, found = set(), []
    for unit in units:
        weight = getattr(get_module(model, unit.path), "weight", None) if has_module(model, unit.path) else None
        found.append(dataclasses.replace(unit, tied=True) if id(weight) in seen else unit)
        seen |= {id(weight)} if weight is not None else set()
    return tuple(found)
