"""Whole blocks that go: their sites, and a model and its anatomy without some of them.

A model of fewer blocks is what its class builds from a config that says so: `num_hidden_layers`, and the lists with an
entry a layer. All paths then count the blocks that are left; sites keep the numbers that their blocks have in the
uncut model, so that a name means the same block in every round.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import UnsupportedArchitectureError
from ..loading_rmtkd import REFUSALS
from ..models import KEPT, blank, copied, is_plain, kept_blocks
from ..spec_rmtkd import NUMBERS
from .sites import BLOCK, Anatomy, Point, Site, get_module


__all__ = ["former_blocks", "list_of", "removed_blocks", "with_blocks", "without_blocks"]

COUNT = "num_hidden_layers"
ADVICE = "Leave 'block' out of `sites`."
LISTS = re.compile("layer|block")  # fields of a config with an entry a block
NUMBERED = ("layer_idx", "layer_id", "layer_index", "layer_number")  # attributes that say which block it is
OTHERWISE = (*NUMBERED, *NUMBERS, "training")  # that may differ between two blocks, or that the spec states


def with_blocks(model: nn.Module, anatomy: Anatomy, wanted: tuple[str, ...] | None) -> Anatomy:
    """The anatomy with its sites named by the numbers of the uncut model's blocks, and with a site for each block
    where `wanted` (a recipe's `sites`) names any."""
    path = list_of(anatomy)
    entry = kept_blocks(model).get(path) if path else None
    if entry is not None and len(entry["kept"]) == len(anatomy.blocks):
        anatomy = _numbered(anatomy, tuple(entry["kept"]), entry["of"])
    asked = [name for name in wanted or () if name == BLOCK or name.endswith(f".{BLOCK}")]
    if not asked:
        return anatomy
    if (why := _why_not(model, anatomy)) is not None:
        return dataclasses.replace(anatomy, refused={**anatomy.refused, **dict.fromkeys(asked, why)})
    numbers = anatomy.kept[0] if anatomy.kept else range(len(anatomy.blocks))
    names = {depth: f"layer.{number}.{BLOCK}" for depth, number in enumerate(numbers)}
    sites = {name: Site(name, BLOCK, 1, (), depth=depth, couple=name) for depth, name in names.items()}
    staying = {} if len(sites) == 1 else _staying(model, anatomy, sites)
    if len(staying) == len(sites):
        return dataclasses.replace(anatomy, refused={**anatomy.refused, BLOCK: next(iter(staying.values()))})
    sites = {name: site for name, site in sites.items() if name not in staying}
    return dataclasses.replace(anatomy, sites={**anatomy.sites, **sites}, refused={**anatomy.refused, **staying})


def _staying(model: nn.Module, anatomy: Anatomy, sites: Mapping[str, Site]) -> dict[str, str]:
    """{name of a block's site: why the class has no model without it}: each is tried without memory."""
    found = {}
    for name, site in sites.items():
        try:
            without_blocks(model, dataclasses.replace(anatomy, sites={name: site}), {name: 0})
        except UnsupportedArchitectureError as error:
            found[name] = str(error).removesuffix(f" {ADVICE}").removesuffix(".")
    return found


def removed_blocks(anatomy: Anatomy, couples: Mapping[str, int]) -> list[int]:
    """Places of the blocks that {couple: features of a group} removes."""
    return [
        depth
        for depth, block in enumerate(anatomy.blocks)
        if block in anatomy.block_sites and couples.get(anatomy.block_sites[block].couple) == 0
    ]


def without_blocks(
    model: PreTrainedModel, anatomy: Anatomy, couples: Mapping[str, int]
) -> tuple[PreTrainedModel, Anatomy]:
    """(a model without the blocks that `couples` removes, its anatomy): the tensors are those of `model`, the sites
    keep their names. Both as they are where no block goes.

    Raises:
        UnsupportedArchitectureError: the class would make the blocks that are left otherwise than they are: what they
            do depends on their place.
    """
    removed = removed_blocks(anatomy, couples)
    if not removed:
        return model, anatomy
    kept = [depth for depth in range(len(anatomy.blocks)) if depth not in removed]
    path = list_of(anatomy)
    before = anatomy.kept or (tuple(range(len(anatomy.blocks))), len(anatomy.blocks))
    stayed = tuple(before[0][depth] for depth in kept), before[1]
    shallow = copied(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    blocks = get_module(shallow, path)
    for depth in reversed(removed):
        del blocks[depth]
    for place, block in enumerate(blocks):
        for module in block.modules():
            vars(module).update({name: place for name in NUMBERED if isinstance(vars(module).get(name), int)})
    rename = _renaming(path, kept)
    _say(shallow, path, kept, len(anatomy.blocks), stayed, rename)
    _check_alike(shallow, blocks)
    return shallow, _shallow_anatomy(anatomy, removed, rename, stayed)


def former_blocks(whole: Anatomy, shallow: Anatomy) -> dict[str, str]:
    """{path of a block of the model of fewer blocks: its path in the whole one}"""
    numbers = whole.kept[0] if whole.kept else range(len(whole.blocks))
    known = dict(zip(numbers, whole.blocks, strict=True))
    stayed = shallow.kept[0] if shallow.kept else numbers
    return {block: known[number] for number, block in zip(stayed, shallow.blocks, strict=True)}


def list_of(anatomy: Anatomy) -> str | None:
    """Path of the one list that all blocks are in, in order; None where there is none."""
    path = anatomy.blocks[0].rpartition(".")[0] if anatomy.blocks else ""
    return path if path and list(anatomy.blocks) == [f"{path}.{i}" for i in range(len(anatomy.blocks))] else None


def _why_not(model: nn.Module, anatomy: Anatomy) -> str | None:
    path = list_of(anatomy)
    if anatomy.stacks:
        return (
            "it has an encoder and a decoder, or was built as one of the two, and only one list of blocks is counted"
        )
    if path is None or not isinstance(get_module(model, path), nn.ModuleList):
        return "its blocks are not one list of equal ones"
    if len(get_module(model, path)) != len(anatomy.blocks):
        return f"{path} has blocks that its family does not declare"
    if getattr(model.config, COUNT, None) != len(anatomy.blocks):
        return f"its config does not state their number as {COUNT}"
    return None


def _numbered(anatomy: Anatomy, numbers: tuple[int, ...], of: int) -> Anatomy:
    """The anatomy with sites named by other numbers than their depth."""
    starts = {f"layer.{depth}.": f"layer.{number}." for depth, number in enumerate(numbers)}

    def name(old: str | None) -> str | None:
        found = re.match(r"layer\.\d+\.", old or "")
        return old if found is None else starts.get(found[0], found[0]) + old[found.end() :]

    sites = [
        dataclasses.replace(site, name=name(site.name), couple=name(site.couple), follows=name(site.follows))
        for site in anatomy.sites.values()
    ]
    units = [
        dataclasses.replace(unit, reads=name(unit.reads), writes=name(unit.writes), factor=name(unit.factor))
        for unit in anatomy.units
    ]
    return dataclasses.replace(
        anatomy,
        sites={site.name: site for site in sites},
        units=tuple(units),
        attributes=tuple(dataclasses.replace(a, site=name(a.site)) for a in anatomy.attributes),
        config_fields={field: name(site) for field, site in anatomy.config_fields.items()},
        heads={path: name(site) for path, site in anatomy.heads.items()},
        kept=(numbers, of),
    )


def _renaming(path: str, kept: list[int]) -> Callable[[str], str | None]:
    """A function from a path to what it is called where only these blocks are left; None inside the others."""
    places = {str(depth): place for place, depth in enumerate(kept)}

    def rename(old: str) -> str | None:
        if not old.startswith(f"{path}."):
            return old
        number, dot, rest = old[len(path) + 1 :].partition(".")
        return f"{path}.{places[number]}{dot}{rest}" if number in places else None

    return rename


def _say(
    model: PreTrainedModel,
    path: str,
    kept: list[int],
    count: int,
    stayed: tuple[tuple[int, ...], int],
    rename: Callable[[str], str | None],
) -> None:
    """Put it into the config, and into the spec of a narrowed model."""
    config = model.config
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == count and LISTS.search(name) and name != "architectures":
            setattr(config, name, type(value)(value[depth] for depth in kept))
    if getattr(config, "attention_types", None):  # GPT-Neo: kinds and how often they repeat
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    setattr(config, COUNT, len(kept))
    _say_stages(config, kept, count)
    entry = {"kept": list(stayed[0]), "of": stayed[1]}
    vars(config).pop(KEPT, None)  # the spec says it
    rmtkd = getattr(config, "rmtkd", None)
    if not rmtkd:
        return
    spec = {
        section: {found: value for raw, value in entries.items() if (found := rename(raw)) is not None}
        for section, entries in rmtkd.get("spec", {}).items()
    }
    config.rmtkd = {**rmtkd, "version": 4, "spec": {**spec, "blocks": {path: entry}}}


def _say_stages(config: Any, kept: list[int], count: int) -> None:
    """Of a config that could be a backbone's: the stem and a stage a block, numbered anew; it gives those of the
    blocks that stayed, or the last one."""
    names = getattr(config, "stage_names", None)
    if not isinstance(names, list) or len(names) != count + 1:
        return
    given = [index % len(names) for index in getattr(config, "out_indices", None) or ()]
    places = [0, *(depth + 1 for depth in kept)]
    config.stage_names = names[: len(places)]
    if given:
        config.out_indices = [place for place, old in enumerate(places) if old in given] or [len(kept)]


def _check_alike(model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Whether the class, asked for so many blocks, makes these."""
    cls = type(model).__name__
    try:
        type(model.config).from_dict(model.config.to_dict())  # as it will be read again
        stock = blank(model)
    except REFUSALS as error:
        raise UnsupportedArchitectureError(
            f"{cls} with {len(blocks)} blocks cannot be built from a config ({error}). {ADVICE}"
        ) from error
    start = next(name for name, module in model.named_modules() if module is blocks)
    twins = dict(stock.named_modules())
    for name, module in model.named_modules():
        if not f"{name}.".startswith(f"{start}.") or "drop" in name.rpartition(".")[2]:  # does nothing to answers
            continue
        twin = twins.get(name)
        own, theirs = (None if m is None else _looks(m) for m in (module, twin))
        if own != theirs:
            odd = "" if theirs is None else next((k for k in own if own.get(k) != theirs.get(k)), "")
            raise UnsupportedArchitectureError(
                f"{cls}: the class makes {name} otherwise ({odd or 'other tensors'}) where blocks before it are "
                f"missing: what it does depends on its place. {ADVICE}"
            )


def _looks(module: nn.Module) -> dict[str, Any]:
    """Type, shapes and plain attributes."""
    shapes = {name: tuple(p.shape) for name, p in module._parameters.items() if p is not None}
    plain = {
        name: value
        for name, value in vars(module).items()
        if not (name in OTHERWISE or "drop" in name or name.startswith("_"))
        and is_plain(value)
        and not (isinstance(value, (list, tuple)) and LISTS.search(name))  # of all blocks
    }
    return {"type": type(module), **shapes, **plain}


def _shallow_anatomy(
    anatomy: Anatomy, removed: list[int], rename: Callable[[str], str | None], kept: tuple[tuple[int, ...], int]
) -> Anatomy:
    gone = {anatomy.blocks[depth] for depth in removed}
    places = {old: place for place, old in enumerate(b for b in anatomy.blocks if b not in gone)}
    depths = {depth: places.get(block) for depth, block in enumerate(anatomy.blocks)}

    def point(old: Point | None) -> Point | None:
        path = None if old is None else rename(old.path)
        return None if path is None else dataclasses.replace(old, path=path)

    sites = {}
    for site in anatomy.sites.values():
        inside = site.depth in depths and site.kind != "hidden"
        if not inside or depths[site.depth] is not None:
            points = tuple(found for found in map(point, site.points) if found is not None)
            depth = depths[site.depth] if inside else site.depth
            sites[site.name] = dataclasses.replace(site, points=points, depth=depth)
    units = []
    for unit in anatomy.units:
        if unit.block not in gone:
            paths = {name: getattr(unit, name) for name in ("path", "block", "norm", "through", "behind", "scaled")}
            paths = {name: rename(path) for name, path in paths.items() if path}
            points = {name: point(getattr(unit, name)) for name in ("skip", "lands", "beside")}
            units.append(dataclasses.replace(unit, **paths, **points))
    attributes = [dataclasses.replace(a, path=path) for a in anatomy.attributes if (path := rename(a.path))]
    return dataclasses.replace(
        anatomy,
        sites=sites,
        units=tuple(units),
        blocks=tuple(rename(block) for block in anatomy.blocks if block not in gone),
        attributes=tuple(attributes),
        fixed_attrs={found: value for path, value in anatomy.fixed_attrs.items() if (found := rename(path))},
        softmax_scales={found: value for path, value in anatomy.softmax_scales.items() if (found := rename(path))},
        heads={found: site for path, site in anatomy.heads.items() if (found := rename(path))},
        kept=kept,
    )
