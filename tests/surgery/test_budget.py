"""Widths: the count that plans them is the count of the model that is built, and targets are met."""

from __future__ import annotations

import random
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from optimum_rmtkd import BudgetError, RMTKDConfig, count_parameters, narrow
from optimum_rmtkd.surgery import narrow_to, reduce
from optimum_rmtkd.surgery.budget import Couple, allocate, couple_grid, flops_of, parameters_of, speed_weight_of
from optimum_rmtkd.surgery.checks import positions_of as _positions
from optimum_rmtkd.surgery.reduction import anatomy_of
from optimum_rmtkd.surgery.sites import Site
from optimum_rmtkd.surgery.surgeon import Surgeon

from . import zoo


PLAIN = RMTKDConfig(round_to=1, min_width=1, calibration_samples=16, refit=False, importance="variance")
REALISTIC = RMTKDConfig(calibration_samples=32, refit=False)


def couples_of(model, config):
    """{couple: (width of a group, a site of it)}."""
    return {s.couple: s for s in anatomy_of(model, config).sites.values() if s.kind != "pooled"}


# The count


@pytest.mark.parametrize(
    "name, task, form",
    [
        ("bert", "ForSequenceClassification", "absorbed"),
        ("bert", "ForMaskedLM", "absorbed"),
        ("roberta", "ForMaskedLM", "absorbed"),
        ("distilbert", "ForSequenceClassification", "absorbed"),
        ("distilbert", "ForMaskedLM", "absorbed"),
        ("electra-projected", "ForTokenClassification", "absorbed"),
        ("vit", "ForImageClassification", "absorbed"),
        ("resnet-basic", "ForImageClassification", "absorbed"),
        ("resnet-bottleneck", "ForImageClassification", "absorbed"),
        ("bert", "ForMaskedLM", "factored"),
        ("vit", "ForImageClassification", "factored"),
        ("resnet-bottleneck", "ForImageClassification", "factored"),
    ],
)
def test_the_planned_count_is_the_built_count(name, task, form):
    config = PLAIN.replace(form=form)
    model, data = zoo.make(name, task), zoo.batches(name, count=2)
    sites = couples_of(model, config)
    count = parameters_of(model, anatomy_of(model, config))
    assert count({}) == count_parameters(model)
    sizes = set()
    for seed in (0, 1):
        draw = random.Random(seed)
        chosen = draw.sample(sorted(sites), max(1, len(sites) // 2)) if seed else sorted(sites)
        widths = {couple: draw.randint(1, sites[couple].group_width) for couple in chosen}
        small = narrow_to(model, data, widths, config, progress=False)
        sizes.add(count_parameters(small))
        assert count(widths) == count_parameters(small), widths
        assert zoo.outputs(small, data[0]).isfinite().all()
    assert len(sizes) == 2 and count_parameters(model) not in sizes


@pytest.mark.parametrize("name", ["Bert", "Roberta", "DistilBert"])
def test_untied_decoder(name):
    """With tie_word_embeddings=False a masked LM's decoder is a layer of its own, which must come along."""
    torch.manual_seed(0)
    body = zoo.DISTIL if name == "DistilBert" else zoo.BODY
    config = getattr(transformers, name + "Config")(**zoo.TEXT, **body, tie_word_embeddings=False)
    model, data = getattr(transformers, name + "ForMaskedLM")(config).eval(), zoo.batches("bert", count=2)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    full = {couple: site.group_width for couple, site in couples_of(model, PLAIN).items()}
    same = narrow_to(model, data, full, PLAIN, progress=False)
    wanted = zoo.outputs(model, data[0])
    assert (zoo.outputs(same, data[0]) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    small = narrow_to(model, data, {"hidden": 20}, PLAIN, progress=False)
    assert parameters_of(model, anatomy_of(model, PLAIN))({"hidden": 20}) == count_parameters(small)


def test_flops_are_those_of_the_layers():
    """Against hooks that count 2 a multiply-add on every linear layer, and the two products of attention."""
    model, batch = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")[0]
    total, positions = 0.0, {}

    def see(module, args, output, path):
        nonlocal total
        total += 2.0 * output.numel() * module.in_features
        positions[path] = output.numel() / output.shape[-1] / 8

    anatomy = anatomy_of(model, PLAIN)
    linear = {
        u.path: model.get_submodule(u.path.replace("@", "bert"))
        for u in anatomy.units
        if "cls" not in u.path and "qa" not in u.path
    }
    handles = [
        module.register_forward_hook(lambda *a, path=path: see(*a, path))
        for path, module in linear.items()
        if isinstance(module, nn.Linear)
    ]
    assert len(handles) == 2 * 6 + 2
    with torch.no_grad():
        model(**batch)
    length, products = 12, 2 * 2 * 2  # layers, products (q k^T and attention times v), multiply and add
    wanted = total / 8 + products * length**2 * 32
    assert flops_of(model, anatomy, positions)({}) == pytest.approx(wanted)


# Targets


@pytest.fixture(scope="module")
def realistic():
    """A BERT of ordinary proportions: random weights, 30 % of the parameters in the word table."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=5000,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    ids = torch.randint(5, 5000, (32, 24))
    return BertForSequenceClassification(config).eval(), [
        {"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids.split(16)
    ]


def flops(model, batches):
    """Multiply-adds of every layer for one sample, by hooks: independent of the library's own count."""
    total = 0.0

    def see(module, args, output):
        nonlocal total
        products = output.numel() // output.shape[-1]
        total += 2.0 * products * (module.in_features * module.out_features)

    handles = [m.register_forward_hook(see) for m in model.modules() if isinstance(m, nn.Linear)]
    batch = batches[0]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    size, length = batch["input_ids"].shape
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        total += 2.0 * size * length**2 * (attention.query.weight.shape[0] + attention.value.weight.shape[0])
    return total / size


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_target_reduction_is_met(realistic, target):
    model, data = realistic
    found = reduce(model, data, REALISTIC.replace(target_reduction=target), progress=False)
    reached = 1 - count_parameters(found.model) / count_parameters(model)
    assert abs(reached - target) < 0.01
    assert found.report.planned_parameters == found.parameters_after == count_parameters(found.model)


@pytest.mark.parametrize("target", [0.3, 0.5, 0.8])
def test_target_flops_is_met(realistic, target):
    model, data = realistic
    small = narrow(model, data, REALISTIC.replace(target_flops=target), progress=False)
    assert abs(1 - flops(small, data) / flops(model, data) - target) < 0.01


@pytest.mark.parametrize(("target", "weight", "other"), [(0.8, 4.0, 0.0), (0.9, 1.0, 100.0)])
def test_speed_counts_less_where_little_is_left(realistic, target, weight, other):
    model, data = realistic

    def cut(speed_weight):
        config = REALISTIC.replace(target_reduction=target, speed_weight=speed_weight, round_to=8)
        small = narrow(model, data, config, progress=False)
        return small.config.rmtkd["spec"], flops(small, data)

    default, given, different = cut(None), cut(weight), cut(other)
    assert default == given and speed_weight_of(REALISTIC.replace(target_reduction=target)) == weight
    assert default[0] != different[0] and (default[1] > different[1]) == (weight < other)


@pytest.mark.parametrize("allocation", ["edge", "uniform", "loss"])
@pytest.mark.parametrize("form", ["absorbed", "factored"])
def test_every_allocation_meets_its_target(realistic, allocation, form):
    model, data = realistic
    config = REALISTIC.replace(allocation=allocation, form=form, target_reduction=0.4)
    found = reduce(model, data, config, progress=False)
    assert abs(1 - found.parameters_after / found.parameters_before - 0.4) < 0.01
    costs = [point.cost for point in found.report.budget]
    losses = [point.predicted_loss for point in found.report.budget]
    assert len(costs) > 10
    assert costs == sorted(costs, reverse=True) and len(set(costs)) == len(costs)
    assert losses == sorted(losses)
    assert costs[-1] == found.parameters_after
    last = {point.couple: point.width for point in found.report.budget}
    sites = anatomy_of(model, config).sites
    assert any(record.width_after < record.width_before for record in found.sites)
    for record in found.sites:
        site = sites[record.name]
        assert record.width_after == last.get(site.couple, site.group_width) * site.groups


def test_uniform_takes_the_same_share_of_every_site(realistic):
    model, data = realistic
    config = REALISTIC.replace(
        allocation="uniform", target_reduction=0.5, sites=("hidden", "intermediate", "attention_qk")
    )
    found = reduce(model, data, config, progress=False)
    shares = [site.width_after / site.width_before for site in found.sites]
    assert len(shares) == 1 + 3 * 4
    assert max(shares) < 0.8 and max(shares) - min(shares) <= 8 / 32


SMALL = [
    ("bert", "ForSequenceClassification"),
    ("bert", "ForMaskedLM"),
    ("distilbert", "ForSequenceClassification"),
    ("electra-projected", "ForTokenClassification"),
    ("vit", "ForImageClassification"),
    ("deit", "ForImageClassification"),
    ("resnet-basic", "ForImageClassification"),
    ("resnet-bottleneck", "ForImageClassification"),
]


@pytest.mark.parametrize("name, task", SMALL)
@pytest.mark.parametrize("allocation", ["loss", "edge", "uniform"])
def test_small_models_meet_every_target_that_can_be_met(name, task, allocation):
    """At the default round_to of 16, on models 32 wide: in smaller steps, or with an error that names the limit."""
    model, data = zoo.make(name, task), zoo.batches(name, count=2)
    surgeon = Surgeon(model, data, RMTKDConfig(calibration_samples=16), progress=False)
    count = parameters_of(model, surgeon.anatomy)
    work = flops_of(model, surgeon.anatomy, _positions(model, surgeon.batches))
    met = set()
    for kind, size in (("target_reduction", count), ("target_flops", work)):
        for target in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
            surgeon.config = RMTKDConfig(allocation=allocation, **{kind: target})
            try:
                plan = surgeon.plan()
            except BudgetError as error:
                reachable = float(re.search(r"\(a reduction of ([0-9.]+)\)", str(error)).group(1))
                assert reachable < target
                continue
            assert -1e-9 <= 1 - size(plan.couples) / size({}) - target <= 0.01, (kind, target)
            assert plan.curve[-1].cost == pytest.approx(size(plan.couples))
            for couple in surgeon.couples():
                grid = couple.on_grid(surgeon.config.replace(round_to=plan.round_to))
                width = plan.couples[couple.name]
                assert width == couple.width or (width % grid.step == 0 and width >= grid.floor)
            met.add(plan.round_to)
    assert met and min(met) < 16


def test_a_target_that_is_met_keeps_the_steps_that_were_asked_for(realistic):
    model, data = realistic
    found = reduce(model, data, REALISTIC.replace(target_reduction=0.5), progress=False)
    assert found.report.round_to == 16 and found.report.steps == ""
    assert all(s.width_after % 16 == 0 for s in found.sites if s.kind in ("hidden", "intermediate"))


def test_moves_that_went_too_far_come_first():
    """One couple in steps of 30 % beside one in steps of 1 %: the coarse one is cut at most once, the other closes the
    gap."""
    sites = [Site(n, "intermediate", w, (), couple=n) for n, w in (("coarse", 3), ("fine", 10))]
    damages = torch.tensor([30.0, 2.0, 1.0, 0.0]).double(), torch.linspace(50, 0, 11).double()
    couples = [Couple(s.name, (s,), s.width, 1, 1, 1, d, torch.ones(s.width), s.width) for s, d in zip(sites, damages)]

    def cost(widths):
        return 30 * widths.get("coarse", 3) + widths.get("fine", 10)

    for goal, coarse in ((69, 2), (64, 2), (38, 1), (35, 1)):
        plan = allocate(
            couples, cost, lambda c: cost, goal, 100.0, RMTKDConfig(min_width=1, allocation="loss"), "parameters"
        )
        assert plan.couples["coarse"] == coarse and goal - 1 <= cost(plan.couples) <= goal
        assert [p.cost for p in plan.curve] == sorted((p.cost for p in plan.curve), reverse=True)
        assert plan.curve[-1].cost == cost(plan.couples)


# The grid


@pytest.mark.parametrize("round_to", [8, 16])
def test_widths_are_multiples_and_heads_are_cut_alike(realistic, round_to):
    model, data = realistic
    config = REALISTIC.replace(target_reduction=0.6, round_to=round_to, min_width=32, allocation="uniform")
    small = narrow(model, data, config, progress=False)
    hidden = small.config.hidden_size
    assert hidden < 128 and hidden % round_to == 0 and hidden >= 32
    for layer in small.bert.encoder.layer:
        attention, inner = layer.attention.self, layer.intermediate.dense.out_features
        size = attention.attention_head_size
        assert attention.query.out_features == attention.key.out_features == attention.value.out_features == 4 * size
        assert size < 32 and size % 8 == 0  # heads of 32 features: steps of at most a quarter
        assert inner < 512 and inner % round_to == 0 and inner >= 32
        assert attention.query.in_features == layer.output.dense.out_features == hidden


@pytest.mark.parametrize(
    "width, groups, round_to, min_width, wanted",
    [
        (512, 1, 8, 8, (8, 8, 8)),
        (512, 1, 8, 60, (64, 8, 8)),
        (2048, 1, 8, 8, (8, 8, 32)),
        (20, 1, 8, 100, (20, 8, 8)),
        (5, 1, 8, 1, (5, 5, 5)),
        (128, 4, 8, 64, (8, 8, 8)),
        (128, 4, 8, 130, (24, 8, 8)),
        (128, 4, 2, 64, (8, 2, 2)),
        (128, 4, 8, 1000, (32, 8, 8)),
        (32, 4, 8, 8, (2, 2, 2)),
        (12, 4, 8, 8, (1, 1, 1)),
    ],
)
def test_couple_grid(width, groups, round_to, min_width, wanted):
    """(floor, step, stride): floors are whole steps unless the site is narrower than that."""
    site = Site("x", "intermediate" if groups == 1 else "attention_vo", width, (), groups)
    assert couple_grid(site, RMTKDConfig(round_to=round_to, min_width=min_width)) == wanted
