"""What a network looks like to a surgeon: sites that can be cut, and the layers that read and write them.

A *site* is a place of the network whose width can change: the residual stream, a feed-forward activation, the queries
of a layer. A *unit* is a layer (or bare parameter) that reads one site with its input features and writes one with its
output features. Sites and units together are the *anatomy* of one concrete model; a family of models is a layout from
which anatomies are read off (`families`).

Paths starting with "@." are relative to the backbone, the others to the whole model (`modeling_rmtkd.resolve_path`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import RMTKDError, UnsupportedArchitectureError
from ..modeling_rmtkd import LowRankConv2d, LowRankEmbedding, LowRankLinear, is_norm, resolve_path


__all__ = [
    "BLOCK",
    "CHANNELS",
    "FOLLOWERS",
    "Anatomy",
    "Attribute",
    "Point",
    "Site",
    "Unit",
    "all_but_the_stream",
    "get_module",
    "has_module",
    "is_layer",
    "linear_layers",
    "select_sites",
]


CHANNELS = ("channels", "residual_channels")  # kinds of sites of convolutional networks
BLOCK = "block"  # kind of the sites that are whole blocks, of width 1: all or nothing
FOLLOWERS = ("pooled", "parted")  # kinds of sites whose width follows another's


@dataclass(frozen=True)
class Point:
    """Where an activation is seen: the input or the output of the module at `path`; at all positions where `whole`,
    else at those that the recipe's sample unit takes."""

    path: str
    side: str = "output"
    whole: bool = False


@dataclass(frozen=True)
class Site:
    """A place whose width can change.

    Attributes:
        name: unique in the model, for example "layer.3.intermediate".
        kind: one of hidden, intermediate, attention_qk, attention_vo, attention_groups, embedding, channels,
            residual_channels, linear, block; or one of FOLLOWERS, which are never chosen on their own: "pooled", the
            element-wise width of a pooler, which follows the hidden width, and "parted", the output of a layer that
            makes what another site holds (fused layers; keys and values of attention whose whole groups are cut).
        width: number of features now.
        points: where its activation is observed.
        groups: number of attention heads the width is split into, 1 elsewhere; groups are cut alike. Of the stream,
            what its width is always a multiple of: the number of heads where it is tied to theirs. Where whole
            key-value groups are cut, the number of features that one of them has here, so that `group_width` counts
            them.
        depth: index of the block, -1 for the stream and the tables, the number of blocks for heads.
        couple: sites with the same couple share one width a group.
        parts: how the features of `parted` and `attention_groups` sites are laid out: stretches that lie one behind
            the other, each with so many features of every group (neuron), group by group. Queries, keys and values of
            one fused layer with 4 query heads of 8 features a group: (32, 8, 8); where they are mixed head by head:
            (24,); gate and up in one layer: (1, 1). Of channels in a grouped convolution: (channels of a group,).
        follows: of a `parted` site, the one whose groups (neurons) it holds.
    """

    name: str
    kind: str
    width: int
    points: tuple[Point, ...]
    groups: int = 1
    depth: int = -1
    couple: str = ""
    parts: tuple[int, ...] = ()
    follows: str = ""

    @property
    def group_width(self) -> int:
        """Features of one group."""
        return self.width // self.groups

    @property
    def chosen(self) -> bool:
        """Whether its width is a decision, and does not just follow another's."""
        return self.kind not in FOLLOWERS

    def features_of(self, groups: torch.Tensor) -> torch.Tensor:
        """Features (len(groups) * self.groups,) of the groups (neurons) of these numbers, in the order of the layer;
        of a site with `parts`."""
        found, start = [], 0
        for each in self.parts:
            found.append((start + groups[:, None] * each + torch.arange(each)).flatten())
            start += each * self.group_width
        return torch.cat(found)


@dataclass(frozen=True)
class Unit:
    """A layer or bare parameter, and the sites at its two ends.

    Attributes:
        path: spec path of the module or parameter.
        reads, writes: names of the sites of its input and output features; None where that end never changes.
        skip: where the residual path that its output is added to is seen.
        lands: where the sum of both is seen.
        block: path of the residual block it belongs to; None before and after the blocks.
        factor: name of a site whose width becomes the rank of this layer (a decoder tied to a table of that width; a
            factored layer; a factorised table).
        full: the width of `factor` at which nothing is inserted: the layer stays as it is.
        norm: path of the batch norm that follows at once, which takes up a constant where this layer has no bias.
        through: path of the norm through which it reads the stream of a pre-norm model; the scale of that norm is
            folded into it. Of what reads another stack: the norm that this ends with, in any model.
        beside: what else is added to the same sum before its own output is, beside the residual path (the attention
            of a parallel block).
        tied: it has no weight of its own, but that of the word table.
        behind: path of the norm that its output goes through before it is added to the stream.
        axis: of a bare parameter, the one that the site is: -1, or -2 for experts (number, out, in) that write it.
        scale: what its output is multiplied with before it is added.
        scaled: path of a bare parameter that multiplies its output, feature by feature, before it is added; it is
            folded into this layer, and is one from then on.
        keys: of those that write a site of queries and keys: it makes keys.
        entrance: which of several things in the coordinates of its site it reads; layers that differ in it are fitted
            apart.
        copies: so many vectors of its site lie one behind the other in what it reads.
    """

    path: str
    reads: str | None = None
    writes: str | None = None
    skip: Point | None = None
    lands: Point | None = None
    block: str | None = None
    factor: str | None = None
    full: int | None = None
    norm: str | None = None
    through: str | None = None
    beside: Point | None = None
    tied: bool = False
    behind: str | None = None
    axis: int = -1
    scale: float = 1.0
    scaled: str | None = None
    keys: bool = False
    entrance: str = ""
    copies: int = 1

    @property
    def sums(self) -> tuple[Point, ...]:
        """All that its output is added to."""
        return tuple(point for point in (self.skip, self.beside) if point is not None)


@dataclass(frozen=True)
class Attribute:
    """A plain number on a module that follows a site: `per_group` the width of one head, else the width of all. Of
    whole heads that are cut, `per_group` their number, in units of `each` features where that is not 0."""

    path: str
    name: str
    site: str
    per_group: bool
    each: int = 0

    def value(self, width: int, groups: int) -> int:
        """The number at this width of the site."""
        return width // (self.each or (groups if self.per_group else 1))


@dataclass(frozen=True)
class Anatomy:
    """All sites and units of one model, units in forward order.

    Attributes:
        blocks: paths of the residual blocks, in forward order.
        repeats: how often each block runs, one call after the other, where its layers are shared.
        stacks: the same in runs through each of which one stream flows; none named: it is one.
        config_fields: {field of the config: site whose width it states}.
        fixed_attrs: {path: {name: value}} that must be pinned when heads change (the softmax scale of the original
            head).
        softmax_scales: {path of an attention: what its logits are multiplied with}; without an entry in `fixed_attrs`
            its code makes it from the width of a head, and queries take up what that changes.
        heads: {path of an attention: the site by which whole heads of it go}.
        heads_in_config: its code reads the number of heads from its config.
        pre_norm: the stream is normalised before the layers that read it, and is itself a plain sum.
        last_norm: path of the norm between a pre-norm stream and the head.
        causal: where whole heads of attention go, a position attends to those before it alone.
        answers: a language model: each token is a sample of its own, and prices are taken token by token.
        refused: {kind of a site that models of this family have and that is not cut: why}.
        kept: numbers of these blocks in the uncut model, by which their sites are named, and how many it had; None
            where none is missing.
    """

    sites: dict[str, Site]
    units: tuple[Unit, ...]
    blocks: tuple[str, ...]
    stacks: tuple[tuple[str, ...], ...] = ()
    attributes: tuple[Attribute, ...] = ()
    repeats: float = 1.0
    config_fields: dict[str, str] = field(default_factory=dict)
    fixed_attrs: dict[str, dict[str, Any]] = field(default_factory=dict)
    softmax_scales: dict[str, float] = field(default_factory=dict)
    heads: dict[str, str] = field(default_factory=dict)
    heads_in_config: bool = False
    pre_norm: bool = False
    last_norm: str | None = None
    causal: bool = False
    answers: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    kept: tuple[tuple[int, ...], int] | None = None

    @functools.cached_property
    def block_sites(self) -> dict[str, Site]:
        """{path of a block: the site that is all of it}, where blocks may go."""
        return {self.blocks[site.depth]: site for site in self.sites.values() if site.kind == BLOCK}

    def is_gone(self, block: str | None, widths: Mapping[str, int]) -> bool:
        """Whether a block is removed under `widths` {site: new width}."""
        site = self.block_sites.get(block)
        return site is not None and widths.get(site.name) == 0

    def is_missing(self, name: str) -> bool:
        """Whether this names a site of a block that was removed before."""
        number = name.split(".")[1] if name.startswith("layer.") else ""
        here, most = self.kept or ((), 0)
        return number.isdigit() and int(number) < most and int(number) not in here

    @property
    def runs(self) -> tuple[tuple[str, ...], ...]:
        """The blocks, stack by stack."""
        return self.stacks or ((self.blocks,) if self.blocks else ())

    @property
    def turned_blocks(self) -> tuple[str, ...]:
        """The blocks that write the stream which is cut: all, but for those of a stack whose stream cannot be
        turned."""
        writers = {unit.block for unit in self.units if unit.writes == "hidden"}
        return tuple(block for block in self.blocks if block in writers)

    def stack_of(self, path: str) -> int:
        """Number of the run of blocks that the unit at `path` belongs to, from the first of its blocks up to the next
        run."""
        if len(self.runs) < 2:
            return 0
        order = [unit.path for unit in self.units]
        begins = [next(i for i, unit in enumerate(self.units) if unit.block == run[0]) for run in self.runs]
        return max(sum(begin <= order.index(path) for begin in begins) - 1, 0)

    def units_of(self, site: str) -> list[Unit]:
        """Units that read, write or are factored by `site`."""
        return [unit for unit in self.units if site in (unit.reads, unit.writes, unit.factor)]


def get_module(model: nn.Module, path: str) -> nn.Module | nn.Parameter:
    """Module or parameter at a spec path.

    Raises:
        UnsupportedArchitectureError: this model has none there.
    """
    parent, _, name = resolve_path(model, path).rpartition(".")
    try:
        found = getattr(model.get_submodule(parent), name, None)
    except AttributeError:
        found = None
    if found is None:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has nothing at {path!r}, which its family declares. Register a family whose "
            "layout fits (optimum_rmtkd.register_family), or use form='factored', which works for every architecture."
        )
    return found


def has_module(model: nn.Module, path: str) -> bool:
    """Whether a module or parameter stands at a spec path."""
    try:
        get_module(model, path)
    except UnsupportedArchitectureError:
        return False
    return True


LAYERS = (nn.Parameter, nn.Linear, Conv1D, nn.Conv2d, nn.Embedding, nn.BatchNorm2d, LowRankLinear, LowRankConv2d)


def is_layer(model: nn.Module, path: str) -> bool:
    """Whether a layer that can be narrowed stands at a spec path. Task heads differ: the same name may be a container,
    or missing."""
    if not has_module(model, path):
        return False
    module = get_module(model, path)
    return isinstance(module, LAYERS) or is_norm(module)


def linear_layers(model: nn.Module, *others: type[nn.Module]) -> dict[str, nn.Module]:
    """{spec path: module} of all linear layers and 2-d convolutions, and modules of the types `others`, in the order
    of `named_modules`; the two inside a factored one are part of it."""
    prefix = model.base_model_prefix + "." if model.base_model is not model else ""
    inside = {id(c) for m in model.modules() if isinstance(m, (LowRankLinear, LowRankConv2d)) for c in m.children()}
    kinds = (nn.Linear, Conv1D, nn.Conv2d, LowRankLinear, LowRankConv2d, *others)
    return {
        "@." + name[len(prefix) :] if name.startswith(prefix) else name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds) and id(module) not in inside
    }


def module_parameters(module: nn.Module | nn.Parameter, delta: dict[str, int]) -> int:
    """Number of parameters that a layer has once `delta` ("in", "out", "dim", "rank") is applied; without building
    it."""
    if isinstance(module, nn.Parameter):
        width = module.shape[delta.get("axis", -1)]
        return module.numel() // width * delta.get("dim", width)
    if isinstance(module, (nn.Embedding, LowRankEmbedding)):
        dim = delta.get("dim", getattr(module, "output_dim", module.embedding_dim))
        rank = delta.get("rank", getattr(module, "rank", None))
        return module.num_embeddings * dim if rank is None else rank * (module.num_embeddings + dim)
    if isinstance(module, nn.BatchNorm2d) or is_norm(module):
        return len(list(module.parameters())) * delta.get("dim", module.weight.numel())
    features_in, features_out, area = linear_shape(module)
    # a grouped convolution has fewer groups, each reads as much as before
    features_in = features_in if "groups" in delta else delta.get("in", features_in)
    features_out = delta.get("out", features_out)
    rank = delta.get("rank", getattr(module, "rank", None))
    bias = features_out if module.bias is not None else 0
    if rank is None:
        return features_in * features_out * area + bias
    return rank * (features_in + features_out) + bias


def linear_shape(module: nn.Module) -> tuple[int, int, int]:
    """(input features, output features, kernel positions) of a linear layer or convolution, factored or not."""
    if isinstance(module, Conv1D):  # GPT-2's linear layer, its weight transposed
        return *module.weight.shape, 1
    if isinstance(module, (nn.Linear, LowRankLinear)):
        return module.in_features, module.out_features, 1
    if isinstance(module, nn.Conv1d):
        return module.in_channels // module.groups, module.out_channels, module.kernel_size[0]
    if isinstance(module, (nn.Conv2d, LowRankConv2d)):
        return module.in_channels // module.groups, module.out_channels, module.kernel_size[0] * module.kernel_size[1]
    raise UnsupportedArchitectureError(
        f"A {type(module).__name__} is no linear layer or convolution that could be narrowed."
    )


def unit_delta(unit: Unit, module: nn.Module | nn.Parameter, widths: dict[str, int]) -> dict[str, int]:
    """Spec entry of one unit under `widths` {site: new width}; empty where nothing of it changes."""
    delta = {}
    if isinstance(module, (nn.Embedding, nn.BatchNorm2d, nn.Parameter)) or is_norm(module):
        name = unit.reads if unit.reads in widths else unit.writes
        if name in widths:
            delta = {"dim": widths[name]} | ({"axis": unit.axis} if unit.axis != -1 else {})
    else:
        if unit.reads in widths:
            delta["in"] = unit.copies * widths[unit.reads]
        if unit.writes in widths:
            delta["out"] = widths[unit.writes]
        if delta and getattr(module, "groups", 1) > 1:
            delta["groups"] = delta["in"] // (module.in_channels // module.groups)
    if unit.factor in widths and widths[unit.factor] != unit.full:
        delta["rank"] = widths[unit.factor]
    elif isinstance(module, LowRankEmbedding) and delta.get("dim", module.output_dim) <= module.rank:
        delta["rank"] = None  # no thinner than the stream it feeds any more: multiplied out
    return delta


def all_but_the_stream(anatomy: Anatomy) -> str:
    """The option that leaves the stream of this model as wide as it is, as one writes it."""
    kinds = dict.fromkeys(site.kind for site in anatomy.sites.values() if site.chosen and site.kind != BLOCK)
    return f"sites={tuple(kind for kind in kinds if kind != 'hidden')!r}"


def select_sites(anatomy: Anatomy, wanted: tuple[str, ...] | None) -> list[Site]:
    """Sites that a recipe's `sites` names, by kind or by name; coupled partners come along.

    Raises:
        RMTKDError: a name that is neither, the message lists those of this model; a site that follows the stream,
            which is not named.
        UnsupportedArchitectureError: a kind that is not cut in this family; says why.
    """
    if wanted is None:
        return [site for site in anatomy.sites.values() if site.kind != BLOCK]
    if (kinds := {site.kind for site in anatomy.sites.values()}) == {"linear"}:  # factors, of any architecture
        wanted = tuple(name for name in wanted if name != BLOCK and not name.endswith(f".{BLOCK}"))
    wanted = tuple(name for name in wanted if not anatomy.is_missing(name))
    for name in wanted:
        if name in anatomy.refused:
            raise UnsupportedArchitectureError(
                f"The site {name!r} is not cut in this model: {anatomy.refused[name]}. Leave it out of `sites`."
            )
    unknown = [name for name in wanted if name not in kinds and name not in anatomy.sites]
    if unknown:
        raise RMTKDError(
            f"Unknown site(s) {', '.join(unknown)}. Kinds of this model: {', '.join(sorted(kinds - set(FOLLOWERS)))}; "
            f"single sites: {', '.join(anatomy.sites)}."
        )
    if not wanted:
        raise RMTKDError("No site of those in `sites` is there to be narrowed: their blocks were removed before.")
    named = [site for site in anatomy.sites.values() if site.kind in wanted or site.name in wanted]
    couples = {site.couple for site in named}
    chosen = [site for site in anatomy.sites.values() if site.couple in couples]
    if (stream := anatomy.sites.get("hidden")) in chosen and stream not in named:
        partner = next(site for site in named if site.couple == stream.couple)
        raise RMTKDError(
            f"The site {partner.kind!r} has no width of its own in this shape: it follows that of the stream, and "
            "`sites` does not name 'hidden'. Name it too, leave both out, or use shape='free'."
        )
    return chosen
