"""Costs that remember and a budget that asks only for what has changed, against those that compute everything anew."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

from optimum_rmtkd import BudgetError, RMTKDConfig, count_parameters
from optimum_rmtkd.surgery import budget
from optimum_rmtkd.surgery.budget import Couple, allocate, couple_grid, flops_of, parameters_of, site_widths
from optimum_rmtkd.surgery.checks import anatomy_of, positions_of
from optimum_rmtkd.surgery.sites import get_module, is_layer, linear_shape, module_parameters, unit_delta

from . import seq2seq_zoo, zoo


MODELS = [
    ("vit", "ForImageClassification", "absorbed"),
    ("bert", "ForMaskedLM", "absorbed"),
    ("bert", "ForSequenceClassification", "absorbed"),
    ("electra-projected", "ForTokenClassification", "absorbed"),
    ("resnet-bottleneck", "ForImageClassification", "absorbed"),
    ("distilbert", "ForMaskedLM", "factored"),
]


def parameters_anew(model, anatomy, scope=None):
    """The count of every unit at every call."""
    units = [(u, get_module(model, u.path)) for u in scope or anatomy.units if is_layer(model, u.path)]

    def size(unit, module, widths):
        delta = unit_delta(unit, module, widths)
        if unit.factor == "hidden":
            return delta.get("rank", getattr(module, "rank", 0)) * module.in_features
        return module_parameters(module, delta)

    fixed = 0 if scope else count_parameters(model) - sum(size(u, m, {}) for u, m in units)
    return lambda couples: fixed + sum(size(u, m, site_widths(couples, anatomy)) for u, m in units)


def flops_anew(model, anatomy, positions, scope=None):
    """The work of every unit at every call."""
    units = [u for u in scope or anatomy.units if u.path in positions]
    others = [] if scope else sorted(set(positions) - {u.path for u in anatomy.units})
    pairs = {"attention_qk": 1.0, "attention_vo": 2.0}
    attention = {s.name: pairs[s.kind] for s in anatomy.sites.values() if s.kind in pairs}

    def work(couples):
        widths, total = site_widths(couples, anatomy), 0.0
        for unit in units:
            module = get_module(model, unit.path)
            (inputs, outputs, area), delta = linear_shape(module), unit_delta(unit, module, widths)
            inputs, outputs = delta.get("in", inputs), delta.get("out", outputs)
            rank = delta.get("rank", getattr(module, "rank", None))
            products = inputs * outputs * area if rank is None else rank * (inputs + outputs)
            total += 2.0 * products * positions[unit.path]
            if unit.writes in attention:
                total += attention[unit.writes] * positions[unit.path] ** 2 * outputs
        for path in others:
            inputs, outputs, area = linear_shape(get_module(model, path))
            total += 2.0 * inputs * outputs * area * positions[path]
        return total

    return work


def descend_anew(couples, pinned, cost, local, goal, whole, config):
    """All moves of all couples priced at every step."""
    widths, curve = {c.name: c.width for c in couples}, []
    size, lost = cost(widths), sum(float(c.damage[c.width]) for c in couples)

    def take(couple, width, saved):
        nonlocal size, lost
        lost += float(couple.damage[width] - couple.damage[widths[couple.name]])
        widths[couple.name], size = width, size - saved
        curve.append(budget.BudgetPoint(float(size), lost, couple.name, width))

    for couple in couples:
        if couple.name in pinned:
            take(couple, pinned[couple.name], size - cost({**widths, couple.name: pinned[couple.name]}))
    while size > goal:
        moves = [
            move
            for c in couples
            if c.name not in pinned
            for move in budget._moves(couples, c, widths, size, cost, local[c.name], config)
        ]
        if not moves:
            raise budget._Stuck(size, curve)
        fitting = [m for m in moves if size - m[1] >= goal - budget.TOLERANCE * whole]
        _, saved, couple, width = min(fitting, key=lambda m: m[0]) if fitting else min(moves, key=lambda m: m[1::-1])
        take(couple, width, saved)
    return curve, widths


def problem(name, task, form, seed):
    """(model, anatomy, positions, random couples)"""
    model, draw = zoo.make(name, task), random.Random(seed)
    config = RMTKDConfig(form=form, round_to=draw.choice((1, 2, 4, 16)), min_width=draw.choice((1, 4)))
    anatomy = anatomy_of(model, config)
    generator, couples = torch.Generator().manual_seed(seed), []
    grouped = {}
    for site in anatomy.sites.values():
        grouped.setdefault(site.couple, []).append(site)
    for couple, sites in grouped.items():
        lead = next((site for site in sites if site.kind != "pooled"), None)
        if lead is None or draw.random() < 0.2:
            continue
        width = lead.group_width
        fall = torch.rand(width, generator=generator, dtype=torch.float64) ** draw.choice((1, 4)) * draw.random()
        damage = torch.cat([fall.sort().values.cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        score = torch.rand(width, generator=generator).sort(descending=True).values
        grid = couple_grid(lead, config)
        couples.append(Couple(couple, tuple(sites), width, *grid, damage, score, width))
    return model, anatomy, positions_of(model, zoo.batches(name, 1)), couples, config


@pytest.mark.parametrize("name, task, form", MODELS)
def test_costs_are_those_computed_anew(name, task, form):
    model, anatomy, positions, couples, _ = problem(name, task, form, 0)
    for scope in (None, [u for i, u in enumerate(anatomy.units) if i % 2]):
        pairs = [
            (parameters_of(model, anatomy, scope), parameters_anew(model, anatomy, scope)),
            (flops_of(model, anatomy, positions, scope), flops_anew(model, anatomy, positions, scope)),
        ]
        draw = random.Random(1)
        for _ in range(60):
            widths = {c.name: draw.randint(1, c.width) for c in couples if draw.random() < 0.7}
            for found, expected in pairs:
                assert found(widths) == expected(widths), widths


@pytest.mark.parametrize(
    "name, task, form", [*MODELS[:2], *[pytest.param(*m, marks=pytest.mark.slow) for m in MODELS[2:]]]
)
def test_widths_are_those_of_a_budget_that_prices_everything_at_every_step(name, task, form, monkeypatch):
    planned = 0
    for seed in range(3):
        model, anatomy, positions, couples, config = problem(name, task, form, seed)
        units = {c.name: [u for site in c.sites for u in anatomy.units_of(site.name)] for c in couples}
        sides = {
            "found": (parameters_of(model, anatomy), flops_of(model, anatomy, positions)),
            "expected": (parameters_anew(model, anatomy), flops_anew(model, anatomy, positions)),
        }
        for target, allocation in [(0.2, "loss"), (0.5, "loss"), (0.4, "edge"), (0.4, "uniform"), (0.9, "loss")]:
            recipe, plans = config.replace(allocation=allocation), {}
            for side, (size, work) in sides.items():
                cost = size if seed % 2 else work
                of = parameters_of if side == "found" else parameters_anew
                whole = float(cost({}))
                with monkeypatch.context() as patch:
                    if side == "expected":
                        patch.setattr(budget, "_descend", descend_anew)
                    try:
                        plans[side] = allocate(
                            couples,
                            cost,
                            lambda c, of=of, m=model, a=anatomy, u=units: of(m, a, u[c.name]),
                            (1 - target) * whole,
                            whole,
                            recipe,
                            "parameters",
                        )
                    except BudgetError as error:
                        plans[side] = str(error)
            assert plans["found"] == plans["expected"], (seed, target, allocation)
            planned += not isinstance(plans["found"], str)
    assert planned > 4


def test_a_move_prices_again_what_shares_a_layer_with_it_and_nothing_else():
    model, anatomy, _, couples, config = problem("bert", "ForSequenceClassification", "absorbed", 3)
    size = parameters_of(model, anatomy)
    assert size.neighbours("layer.0.intermediate") == {"hidden", "layer.0.intermediate"}
    assert size.neighbours("layer.1.heads") == {"hidden", "layer.1.heads"}
    assert size.neighbours("hidden") >= {c.name for c in couples}


SOUND = {"input_features": torch.randn(1, 8, 20), "decoder_input_ids": torch.randint(3, 60, (1, 8))}
LONG = zoo.TEXT | {"max_position_embeddings": 70}
WINDOWS = {"image_size": 28, "patch_size": 1, "num_channels": 1, "embed_dim": 16, "depths": [1, 1], "window_size": 7}
COUNTED = {
    "windows of an image": lambda: tf.SwinModel(tf.SwinConfig(**WINDOWS, num_heads=[2, 4])),
    "attention of whole heads to both sides": lambda: tf.ModernBertModel(
        tf.ModernBertConfig(**LONG, **zoo.BODY, **zoo.ENDS, local_attention=8)
    ),
    "layers that positions share": lambda: tf.DebertaV2Model(
        tf.DebertaV2Config(**LONG, **zoo.BODY, **zoo.RELATIVE, share_att_key=True, position_buckets=16)
    ),
    "layers of positions": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**LONG, **zoo.BODY, **zoo.RELATIVE)),
    "blocks that run again": lambda: zoo.make("albert", "Model"),
    "two stacks and convolutions of sounds": lambda: seq2seq_zoo.make("whisper"),
}


@pytest.mark.parametrize("kind", COUNTED)
def test_flops_are_those_that_torch_counts(kind):
    model = COUNTED[kind]().eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    batch = {"input_ids": torch.randint(5, 61, (1, 36))}
    if model.main_input_name != "input_ids":
        batch = {"pixel_values": torch.randn(1, 1, 28, 28)} if "Swin" in type(model).__name__ else SOUND
    anatomy = anatomy_of(model, RMTKDConfig())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    assert flops_of(model, anatomy, positions_of(model, [batch]))({}) == pytest.approx(counter.get_total_flops())
