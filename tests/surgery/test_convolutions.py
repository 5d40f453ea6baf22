"""Convolutional networks: channels that are summed go together, units do not matter, and the life cycle of each
family."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from optimum_rmtkd import RMTKDConfig, RMTKDError, UnsupportedArchitectureError, count_parameters, narrow
from optimum_rmtkd.modeling_rmtkd import SpecMismatchError, apply_spec
from optimum_rmtkd.surgery import narrow_to, reduce
from optimum_rmtkd.surgery.channels import joint_pivots
from optimum_rmtkd.surgery.convolutions import ResidualConvLayout, Step
from optimum_rmtkd.surgery.sites import get_module
from optimum_rmtkd.surgery.surgeon import Surgeon, anatomy_of

from ..tables import some_slow
from . import conv_zoo as zoo
from .test_families import FRESH, _environment


RECIPE = RMTKDConfig(target_reduction=0.3, round_to=1, min_width=2, calibration_samples=64)
QUICK = ("regnet y",)


def slow_but(names, quick):
    return some_slow([(name,) for name in names], [(name,) for name in quick])


def quiet(function, *arguments, **options):
    return function(*arguments, progress=False, **options)


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# What belongs together


def test_the_channels_of_a_stage_are_one_site():
    model = zoo.make("resnet first stage")
    anatomy = anatomy_of(model, RECIPE)
    stages = "@.encoder.stages"
    assert {u.path for u in anatomy.units if u.writes == "stream.2" and "convolution" in u.path} == {
        f"{stages}.1.layers.0.layer.1.convolution",
        f"{stages}.1.layers.0.shortcut.convolution",
        f"{stages}.1.layers.1.layer.1.convolution",
    }
    assert {u.path for u in anatomy.units if u.reads == "stream.1"} == {
        f"{stages}.1.layers.0.layer.0.convolution",
        f"{stages}.1.layers.0.shortcut.convolution",
    }
    assert anatomy.sites["stream.2"].kind == "residual_channels"
    assert [u.path for u in anatomy.units if u.reads == "stream.2"][-1] == "classifier.1"


def test_a_stage_without_a_shortcut_shares_the_channels_of_the_stem():
    anatomy = anatomy_of(zoo.make("resnet basic"), RECIPE)
    writers = {u.path for u in anatomy.units if u.writes == "stream.0"}
    assert (
        "@.embedder.embedder.convolution" in writers and "@.encoder.stages.0.layers.0.layer.1.convolution" in writers
    )


def test_depthwise_convolutions_keep_the_index_of_what_they_read():
    anatomy = anatomy_of(zoo.make("mobilenet v2"), RECIPE)
    for unit in anatomy.units:
        if unit.path.endswith("conv_3x3.convolution"):
            assert unit.reads == unit.writes is not None


def test_groups_are_cut_whole():
    model, data = zoo.make("regnet x"), zoo.batches()
    site = anatomy_of(model, RECIPE).sites["stage.1.1.channels.0"]
    assert (site.parts, site.group_width) == ((4,), 6)
    small = quiet(narrow_to, model, data, {site.couple: 4}, RECIPE)
    middle = small.regnet.encoder.stages[1].layers[1].layer[1].convolution
    assert (middle.in_channels, middle.out_channels, middle.groups) == (16, 16, 4)
    assert small.config.rmtkd["version"] == 3


def test_groups_that_change_their_width_are_refused_by_name():
    net = nn.Module()
    net.first, net.blocks = nn.Conv2d(1, 8, 1), nn.ModuleList([nn.ModuleList([nn.Conv2d(8, 16, 1, groups=4)])])
    net.base_model = None
    layout = ResidualConvLayout(stem=(Step("first"),), stages="blocks", steps=(Step("0"),), adds=False)
    with pytest.raises(UnsupportedArchitectureError, match="'blocks.0.0' of Module is .* in 4 groups from 8 to 16"):
        layout.anatomy(net)


def test_a_spec_with_groups_of_another_width_is_refused():
    model = zoo.make("regnet x")
    path = "@.encoder.stages.0.layers.0.layer.1.convolution"
    for delta in ({"in": 8, "out": 8}, {"in": 8, "out": 12, "groups": 2}, {"groups": 2}):
        with pytest.raises(SpecMismatchError, match="groups as wide"):
            apply_spec(copy.deepcopy(model), {"modules": {path: delta}})


# Pivots and prices


def test_common_pivots_are_those_of_a_decomposition_in_each_place():
    torch.manual_seed(0)
    rows = [torch.randn(50, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64) for _ in range(2)]
    grams = torch.stack([torch.corrcoef(r.T) for r in rows])
    worth = torch.rand(2, 6, dtype=torch.float64)
    order, residual, factors = joint_pivots(grams, worth)
    for k in range(7):
        kept, rest = order[:k], order[k:]
        left = 0.0
        for gram, value in zip(grams, worth, strict=True):
            inside = gram[rest][:, rest]
            if k:
                inside = inside - gram[rest][:, kept] @ torch.linalg.solve(gram[kept][:, kept], gram[kept][:, rest])
            left += float((inside.diagonal() * value[rest]).sum())
        assert residual[k] == pytest.approx(left, abs=1e-9)
    for gram, factor in zip(grams, factors, strict=True):
        middle = torch.linalg.solve(factor, torch.linalg.solve(factor, gram[order][:, order]).T)
        assert torch.allclose(middle, torch.diag(middle.diagonal()), atol=1e-9)


def test_a_price_is_the_share_of_the_answers_that_is_lost():
    """Cuts of one site without a refit, by how far they move the answers."""
    model, data = zoo.make("resnet bottleneck"), zoo.batches(8)
    recipe = RECIPE.replace(calibration_samples=128, refit=False)
    surgeon = Surgeon(model, data, recipe, progress=False)
    couples = {c.name: c for c in surgeon.couples()}
    wanted = torch.cat([zoo.outputs(model, batch) for batch in data])
    wanted = wanted - wanted.mean(1, keepdim=True)
    ratios = []
    for name, couple in couples.items():
        small = surgeon.operate({name: couple.width - max(1, couple.width // 8)})[0]
        found = torch.cat([zoo.outputs(small, batch) for batch in data])
        found = found - found.mean(1, keepdim=True)
        lost = float((found - wanted).square().sum() / wanted.square().sum())
        ratios.append(float(couple.damage[couple.width - max(1, couple.width // 8)]) / lost)
    assert all(0.2 < ratio < 5 for ratio in ratios), ratios


@pytest.mark.parametrize("importance", ["variance", pytest.param("fisher", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", slow_but(zoo.NAMES, ["resnet in bottleneck", "convnext"]))
def test_units_do_not_matter(name, importance):
    model, data = zoo.make(name), zoo.batches()
    other = zoo.rescaled(model, anatomy_of(model, RECIPE), name in zoo.HOMOGENEOUS)
    assert far(zoo.outputs(other, data[0]), zoo.outputs(model, data[0])) < 1e-4
    changed = [not torch.allclose(a, b, rtol=0.1) for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    assert sum(changed) >= 4
    recipe, found = RECIPE.replace(importance=importance), []
    for m in (model, other):
        surgeon = Surgeon(m, data, recipe, progress=False)
        couples = {c.name: c for c in surgeon.couples()}
        # beyond half of them there may be fewer samples than channels, and the order of what is left is chance
        kept = {
            s.name: surgeon.directions_of(s).cut(max(1, s.group_width // 2))[""].index.tolist() for s in surgeon.sites
        }
        small = surgeon.operate({name: max(1, 3 * c.width // 4) for name, c in couples.items()})[0]
        found.append((couples, kept, zoo.outputs(small, data[1])))
    (one, kept, ours), (two, same, theirs) = found
    for name, index in kept.items():  # of two that are nearly worth as much, rounding may choose either
        assert len(set(index) - set(same[name])) <= 1, name
    for name, couple in one.items():
        assert torch.allclose(couple.damage, two[name].damage, rtol=5e-3, atol=1e-6 * float(couple.damage[0])), name
    dense = zoo.outputs(model, data[1])
    assert (ours - dense).abs().max() > 5e-3 * dense.abs().max()  # the cut itself is no rounding
    if kept == same and len(data) * 16 > max(len(c.damage) for c in one.values()):
        assert (ours - theirs).abs().max() < 0.1 * (ours - dense).abs().max()
    else:  # other channels of a tie: another network, as good
        assert 0.5 < float((ours - dense).norm() / (theirs - dense).norm()) < 2


def test_units_of_neurons_behind_relu_do_not_matter():
    from . import zoo as text

    config = copy.deepcopy(text.CONFIGS["bert"])
    config.hidden_act = "relu"
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
        other = copy.deepcopy(model)
        for layer in other.bert.encoder.layer:
            s = torch.exp(2 * torch.randn(64))
            layer.intermediate.dense.weight.mul_(s[:, None])
            layer.intermediate.dense.bias.mul_(s)
            layer.output.dense.weight.div_(s)
    data, widths = text.batches("bert"), {"layer.0.intermediate": 40, "layer.1.intermediate": 24}
    dense = text.outputs(model, data[0])
    ours, theirs = (text.outputs(quiet(narrow_to, m, data, widths, RECIPE), data[0]) for m in (model, other))
    assert (ours - theirs).abs().max() < 0.01 * (ours - dense).abs().max()


# What is redundant goes for nothing


def planted(name: str, copies: bool):
    """Every third channel of each stage is silent, or a copy of the one before."""
    model = zoo.make(name)
    anatomy = anatomy_of(model, RECIPE)
    widths = {}
    with torch.no_grad():
        for site in anatomy.sites.values():
            if site.kind != "residual_channels" or site.name == "stream.0":
                continue
            at = torch.arange(2, site.width, 3)
            widths[site.couple] = site.width - len(at)
            for unit in anatomy.units:
                if unit.writes != site.name:
                    continue
                module = get_module(model, unit.path)
                tensors = [module.weight, getattr(module, "bias", None)]
                if isinstance(module, nn.BatchNorm2d):
                    tensors += [module.running_mean, module.running_var] if copies else []
                elif not copies:
                    continue
                for tensor in tensors:
                    if tensor is not None:
                        tensor[at] = tensor[at - 1] if copies else 0.0
    return model, widths


@pytest.mark.parametrize("copies", [False, True], ids=["silent", "copies"])
@pytest.mark.parametrize(
    "name", slow_but(["resnet first stage", "resnet bottleneck", "regnet x", "mobilenet v2"], ["resnet bottleneck"])
)
def test_redundant_channels_of_a_stage_go_for_nothing(name, copies):
    model, widths = planted(name, copies)
    data = zoo.batches()
    surgeon = Surgeon(model, data, RECIPE, progress=False)
    for couple in surgeon.couples():
        if couple.name in widths:
            # what never varied is not free: it may vary in other data
            worth = couple.damage[widths[couple.name] - 1] if copies else couple.damage[0]
            assert couple.damage[widths[couple.name]] < 1e-2 * worth
    small = surgeon.operate(widths)[0]
    assert count_parameters(small) < count_parameters(model)
    assert far(zoo.outputs(small, data[1]), zoo.outputs(model, data[1])) < 1e-3


# Batch norms


def test_batch_norms_have_the_statistics_of_the_narrow_network():
    model, data = zoo.make("resnet bottleneck"), zoo.batches()
    small = quiet(narrow, model, data, RECIPE)
    seen = {}
    norms = {name: m for name, m in small.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for name, norm in norms.items():
        norm.register_forward_pre_hook(lambda m, args, name=name: seen.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for batch in data:
            small(**batch)
    for name, norm in norms.items():
        rows = torch.cat(seen[name]).double().movedim(1, 0).flatten(1)
        assert torch.allclose(norm.running_mean.double(), rows.mean(1), atol=1e-4 * float(rows.std())), name
        assert torch.allclose(norm.running_var.double(), rows.var(1), rtol=1e-3), name


# The life cycle


@pytest.mark.parametrize("name", slow_but(zoo.NAMES, QUICK))
def test_life_cycle(name, tmp_path):
    model, data = zoo.make(name), zoo.batches()
    surgeon = Surgeon(model, data, RECIPE, progress=False)
    wanted = zoo.outputs(model, data[0])
    full = {site.couple: site.group_width for site in surgeon.sites}
    assert far(zoo.outputs(surgeon.operate(full)[0], data[0]), wanted) < 1e-4
    plan = surgeon.plan(0.3)
    small = surgeon.operate(plan.couples)[0]
    assert count_parameters(small) == plan.curve[-1].cost <= 0.7 * count_parameters(model)
    _distil(small, model, data)
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.allclose(zoo.outputs(again, data[0]), zoo.outputs(small, data[0]), rtol=1e-4, atol=1e-5)
    twice = quiet(narrow, again, data, RECIPE.replace(target_reduction=0.4))
    assert count_parameters(twice) < count_parameters(small)
    assert zoo.outputs(twice, data[0]).isfinite().all()


def test_a_grouped_convolution_of_one_group_that_is_left_stays_one():
    """In units of its groups, or the next cut would leave groups of another width than the dense layer has."""
    model, data = zoo.make("regnet x"), zoo.batches()
    inside = {s.couple: 1 for s in Surgeon(model, data, RECIPE, progress=False).sites if s.kind == "channels"}
    small = quiet(narrow_to, model, data, inside, RECIPE)
    twice = quiet(narrow, small, data, RECIPE.replace(target_reduction=0.8))
    assert count_parameters(twice) < count_parameters(small)


def _distil(small, model, data):
    optimizer = torch.optim.SGD(small.train().parameters(), 1e-3)
    for batch in data[:2]:
        theirs = zoo.outputs(model, batch).softmax(-1)
        nn.functional.cross_entropy(small(**batch).logits, theirs).backward()
        optimizer.step()
        optimizer.zero_grad()
    small.eval()


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NAMES)
def test_each_site_alone(name):
    model, data = zoo.make(name), zoo.batches()
    surgeon = Surgeon(model, data, RECIPE, progress=False)
    wanted = zoo.outputs(model, data[0])
    for couple in (couple for couple in surgeon.couples() if couple.width > 1):
        small = surgeon.operate({couple.name: couple.width // 2})[0]
        assert count_parameters(small) < count_parameters(model), couple.name
        # half of the channels of a random stem leave little; what is left is no farther than another network
        assert far(zoo.outputs(small, data[0]), wanted) < 1.4, couple.name


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.NAMES)
def test_models_without_a_head_and_targets_in_work(name):
    model, data = zoo.make(name, "Model"), zoo.batches()
    found = quiet(reduce, model, data, RECIPE.replace(target_reduction=None, target_flops=0.3))
    assert found.loss_unit == "energy"
    assert count_parameters(found.model) < count_parameters(model)
    assert zoo.outputs(found.model, data[0]).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("plugin", [True, False], ids=["plugin", "remote code"])
def test_fresh_process(plugin, tmp_path):
    jobs = []
    for name in ("resnet bottleneck", "regnet y", "mobilenet v2", "efficientnet", "convnext v2"):
        small, folder = quiet(narrow, zoo.make(name), zoo.batches(), RECIPE), tmp_path / name.replace(" ", "_")
        small.save_pretrained(folder)
        save_file({**zoo.batches()[0], "outputs": zoo.outputs(small, zoo.batches()[0])}, folder / "x.safetensors")
        jobs.append((str(folder), "AutoModelForImageClassification"))
    command = [sys.executable, "-c", FRESH, json.dumps([plugin, jobs])]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(tmp_path))
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


# Plain checkpoints


@pytest.mark.parametrize("name", slow_but([n for n in zoo.NAMES if n.startswith("resnet")], ["resnet bottleneck"]))
def test_a_native_resnet_is_a_plain_one(name, tmp_path):
    model, data = zoo.make(name), zoo.batches()
    small = quiet(narrow, model, data, RECIPE.replace(shape="native", min_width=1))
    assert type(small) is transformers.ResNetForImageClassification
    sizes = [small.config.embedding_size, *small.config.hidden_sizes]
    assert any(new < old for new, old in zip(sizes, [8, *zoo.CONFIGS[name].hidden_sizes], strict=True))
    small.save_pretrained(tmp_path)
    again = transformers.ResNetForImageClassification.from_pretrained(tmp_path)
    assert torch.allclose(zoo.outputs(again, data[0]), zoo.outputs(small, data[0]), rtol=1e-4, atol=1e-5)


def test_families_whose_config_states_no_widths_have_no_native_shape():
    with pytest.raises(RMTKDError, match="no field for the widths"):
        anatomy_of(zoo.make("mobilenet v2"), RECIPE.replace(shape="native"))
