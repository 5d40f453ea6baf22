"""What a narrowed model costs, in parameters or FLOPs, without building it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ..models import count_parameters
from .sites import BLOCK, Anatomy, Site, Unit, get_module, is_layer, linear_shape, module_parameters, unit_delta


__all__ = ["Additive", "Positions", "couples_of", "flops_of", "parameters_of", "site_widths"]


def site_widths(couples: Mapping[str, int], anatomy: Anatomy) -> dict[str, int]:
    """{site: all features} from {couple: features of a group}; the pooler follows the stream even where it is absent.

    Factors of full rank are no cut, nor is a table's factor that is not thinner than the stream it feeds, nor a block
    that stays: such sites are left out.
    """
    stream = couples.get("hidden", float("inf"))
    widths = {}
    for site in anatomy.sites.values():
        width = couples.get(site.couple)
        factored = site.kind in ("embedding", "linear")
        if width is None or (site.kind == BLOCK and width):
            continue
        if factored and width >= min(site.width, stream if site.kind == "embedding" else width + 1):
            continue
        widths[site.name] = width * site.groups
    if "hidden" in widths:
        widths["pooler"] = widths["hidden"]
    return widths


class Additive:
    """A function from {couple: width} to a sum of terms of which each depends on few couples. What a term was once
    found to be is not computed again; a sum takes the terms in their order, so that it does not depend on the widths
    that were asked for before.

    Args:
        anatomy: whose couples these are.
        fixed: what does not depend on widths.
        terms: (unit, its value from {site: features}: summands).
    """

    def __init__(
        self,
        anatomy: Anatomy,
        fixed: float,
        terms: list[tuple[Unit, Callable[[Mapping[str, int]], tuple[float, ...]]]],
    ):
        self.anatomy, self.fixed = anatomy, fixed
        self._terms = [(tuple(sorted(couples_of(unit, anatomy))), value, {}) for unit, value in terms]
        self._together: dict[str, set[str]] = {}
        for unit in (*anatomy.units, *(unit for unit, _ in terms)):
            couples = couples_of(unit, anatomy)
            for couple in couples:
                self._together.setdefault(couple, {couple}).update(couples)

    def __call__(self, couples: Mapping[str, int]) -> float:
        total = self.fixed
        for names, value, known in self._terms:
            key = tuple([couples.get(name) for name in names])
            if key not in known:
                chosen = {name: width for name, width in zip(names, key, strict=True) if width is not None}
                known[key] = value(site_widths(chosen, self.anatomy))
            for summand in known[key]:
                total += summand
        return total

    def neighbours(self, couple: str) -> set[str]:
        """Couples whose moves are worth something else once `couple` has moved: those it shares a unit with."""
        return self._together.get(couple, {couple})


def couples_of(unit: Unit, anatomy: Anatomy) -> set[str]:
    """Names of the couples that the size of a unit depends on (`site_widths`)."""
    found = set()
    for name in (unit.reads, unit.writes, unit.factor):
        site = anatomy.sites.get(name)
        found |= {site.couple} if site is not None else set()
        # the pooler follows the stream, and a table's factor counts only while it is thinner than that
        found |= {"hidden"} if name == "pooler" or (site is not None and site.kind == "embedding") else set()
    whole = anatomy.block_sites.get(unit.block)
    return found if whole is None else found | {whole.couple}


def _is_tied(model: nn.Module, unit: Unit) -> bool:
    """A decoder whose table is counted, and cut, elsewhere."""
    return unit.factor == "hidden"


def parameters_of(
    model: nn.Module, anatomy: Anatomy, scope: list[Unit] | None = None
) -> Callable[[Mapping[str, int]], int]:
    """A function from {couple: width} to the parameter count of the narrowed model (with `scope`: of these units)."""
    units = [
        (u, get_module(model, u.path)) for u in (anatomy.units if scope is None else scope) if is_layer(model, u.path)
    ]

    def size(unit: Unit, module: nn.Module, widths: dict[str, int]) -> int:
        if unit.tied or anatomy.is_gone(unit.block, widths):
            return 0
        delta = unit_delta(unit, module, widths)
        if _is_tied(model, unit):
            return delta.get("rank", getattr(module, "rank", 0)) * module.in_features
        return module_parameters(module, delta)

    terms = [(u, lambda widths, u=u, m=m: (size(u, m, widths),)) for u, m in units]
    if scope is not None:
        return Additive(anatomy, 0, terms)
    fixed = count_parameters(model) - sum(size(u, m, {}) for u, m in units)
    for block in anatomy.block_sites:  # what no unit declares goes with its block, too
        rest = count_parameters(get_module(model, block)) - sum(size(u, m, {}) for u, m in units if u.block == block)
        terms.append((Unit(block, block=block), lambda w, b=block, n=rest: (0 if anatomy.is_gone(b, w) else n,)))
        fixed -= rest
    return Additive(anatomy, fixed, terms)


class Positions(dict[str, float]):
    """{spec path: positions of a sample that a layer is applied at, of all its calls}

    Attributes:
        calls: {spec path: of each call (positions of a sample, length of the rows that they come in)}: of windows of
            an image, positions attend to those of their row alone. A layer that is not named is called once, on one
            row a sample.
    """

    def __init__(
        self, positions: Mapping[str, float], calls: Mapping[str, list[tuple[float, float]]] | None = None
    ) -> None:
        super().__init__(positions)
        self.calls = dict(calls or {})

    def calls_of(self, path: str) -> list[tuple[float, float]]:
        """Of each call of a layer that has positions."""
        return self.calls.get(path) or [(self[path], self[path])]


def flops_of(
    model: nn.Module, anatomy: Anatomy, positions: Mapping[str, float], scope: list[Unit] | None = None
) -> Callable[[Mapping[str, int]], float]:
    """A function from {couple: width} to the FLOPs of one sample, 2 a multiply-add: all linear layers, convolutions
    and attention products (with `scope`: of these units).

    Args:
        positions: {spec path: positions of a sample it is applied to}, of every layer that counts; a mapping that is
            none of `Positions` is one of layers that are called once.
    """
    positions = positions if isinstance(positions, Positions) else Positions(positions)
    units = [
        (u, get_module(model, u.path)) for u in (anatomy.units if scope is None else scope) if u.path in positions
    ]
    fixed = set(positions) - {u.path for u in anatomy.units} if scope is None else ()
    blocks = {path: next((b for b in anatomy.blocks if path.startswith(f"{b}.")), None) for path in fixed}
    units += [(Unit(path, block=blocks[path]), get_module(model, path)) for path in sorted(fixed)]
    # products with the keys and with the values: 2 a pair of positions and feature each; queries and keys share one
    halves = {"attention_qk": 1.0, "attention_vo": 2.0}
    attention, pairs = {s.name: halves[s.kind] for s in anatomy.sites.values() if s.kind in halves}, {}
    for site in anatomy.sites.values():
        pairs |= _pairs_of(site, anatomy, positions) if site.kind == "attention_qk" else {}
    # whole heads are both products, of causal attention each over half of the pairs
    heads = {s.name for s in anatomy.sites.values() if s.kind == "attention_groups"} | set(anatomy.heads.values())
    both = 2.0 if anatomy.causal else 4.0

    def work(unit: Unit, module: nn.Module, widths: Mapping[str, int]) -> tuple[float, ...]:
        if anatomy.is_gone(unit.block, widths):
            return (0.0,)
        shape, delta = linear_shape(module), unit_delta(unit, module, widths)
        # a grouped convolution has fewer groups, each reads as much as before
        inputs = shape[0] if "groups" in delta else delta.get("in", shape[0])
        outputs = delta.get("out", shape[1])
        rank = delta.get("rank", getattr(module, "rank", None))
        products = inputs * outputs * shape[2] if rank is None else rank * (inputs + outputs)
        linear = 2.0 * products * positions[unit.path]
        if unit.reads in heads:
            return linear, both * sum(rows * length for rows, length in positions.calls_of(unit.path)) * inputs
        if unit.writes not in attention:
            return (linear,)
        return linear, attention[unit.writes] * pairs.get(unit.path, 0.0) * outputs

    return Additive(anatomy, 0.0, [(u, lambda widths, u=u, m=m: work(u, m, widths)) for u, m in units])


def _pairs_of(site: Site, anatomy: Anatomy, positions: Positions) -> dict[str, float]:
    """{layer that makes queries, keys or values of an attention: pairs of positions of a sample, all calls together,
    that its features are multiplied for}

    Layers that relative positions share with the text are called once for the text and then for the positions, which
    are multiplied with the other side of the text. Half of a product is the query's, half the key's; that with
    positions is all theirs.
    """
    units = [unit for unit in anatomy.units if unit.writes == site.name and unit.path in positions]
    partner = site.name.replace("attention_qk", "attention_vo")
    values = [unit.path for unit in anatomy.units if unit.writes == partner and unit.path in positions]
    if len(units) < 2 or not values:
        return {}
    runs = len(positions.calls_of(values[0]))
    sides = [positions.calls_of(unit.path) for unit in units[:2]]
    texts = [calls[:: max(1, len(calls) // runs)] for calls in sides]
    pairs = sum(query[0] * key[1] for query, key in zip(*texts, strict=False))
    found = dict.fromkeys(values, pairs) | {unit.path: pairs for unit in units[:2]}
    for unit, calls, facing in zip(units, sides, reversed(texts), strict=False):
        each = len(calls) // len(facing)
        beside = [(length, facing[i // each][0]) for i, (_, length) in enumerate(calls) if i % each]
        found[unit.path] += 2.0 * sum(length * rows for length, rows in beside)
    for unit in units[2:]:
        facing = texts[0 if unit.keys else 1]
        made = positions.calls_of(unit.path)
        found[unit.path] = 2.0 * sum(length * rows for (_, length), (rows, _) in zip(made, facing, strict=False))
    return found
