"""Channels of a ResNet: those that fire rarely are seen, and on real images prices are worth something."""

from __future__ import annotations

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification

from optimum_rmtkd import RMTKDConfig, analyze
from optimum_rmtkd.surgery import narrow_to, reduce
from optimum_rmtkd.surgery.bases import neuron_order, never_free
from optimum_rmtkd.surgery.calibration import turned
from optimum_rmtkd.surgery.refit import MAX_TOKENS, _spaced
from optimum_rmtkd.surgery.surgeon import Surgeon

from . import zoo


RECIPE = RMTKDConfig(target_reduction=0.12, round_to=1, min_width=1, calibration_samples=48)


def layers_of(model) -> list[list[torch.nn.Module]]:
    """The convolution layers of each block."""
    return [list(block.layer) for stage in model.resnet.encoder.stages for block in stage.layers]


# What a few positions do not show


def blinking(model, data, duplicates: bool = False):
    """A channel of the first block that fires at two positions of all data, and (duplicates) a copy of it."""
    first, seen = layers_of(model)[0][0], []
    handle = first.convolution.register_forward_hook(lambda m, args, out: seen.append(out[:, 0].flatten()))
    with torch.no_grad():
        for batch in data:
            model(**batch)
        handle.remove()
        third = torch.cat(seen).sort(descending=True).values[2]
        norm = first.normalization
        norm.running_mean[0], norm.running_var[0], norm.weight[0], norm.bias[0] = third, 1e-2, 1.0, 0.0
        for tensor in (first.convolution.weight, norm.running_mean, norm.running_var, norm.weight, norm.bias):
            tensor[1] = tensor[0] if duplicates else tensor[1]
    return model


def test_channels_that_fire_rarely_are_not_free():
    data = zoo.batches("resnet-basic", size=2)
    model = blinking(zoo.make("resnet-basic", "ForImageClassification"), data)
    surgeon = Surgeon(model, data, RECIPE, progress=False)
    site = surgeon.anatomy.sites["stage.0.0.channels.0"]
    every, few = (surgeon.calibration.moments[point] for point in site.points)
    assert every.count == 12 * 64 and few.count == 12 * 4
    assert every.second_moment[0, 0] > 0 and few.second_moment[0, 0] == 0
    assert (surgeon.directions_of(site).damage[:-1] > 0).all()


def test_of_two_equal_channels_one_is_kept():
    data = zoo.batches("resnet-basic", size=2)
    model = blinking(zoo.make("resnet-basic", "ForImageClassification"), data, duplicates=True)
    surgeon = Surgeon(model, data, RECIPE, progress=False)
    site = surgeon.anatomy.sites["stage.0.0.channels.0"]
    kept = surgeon.directions_of(site).cut(site.width - 1, None)[""].index.tolist()
    assert len({0, 1} & set(kept)) == 1
    narrowed = narrow_to(model, data, {site.couple: site.width - 1}, RECIPE, progress=False)
    wanted = zoo.outputs(model, data[0])
    assert (zoo.outputs(narrowed, data[0]) - wanted).abs().max() < 1e-3 * wanted.abs().max()


def test_a_channel_that_never_fired_goes_first_but_not_for_nothing():
    x = torch.randn(50, 8, dtype=torch.float64).relu() * torch.linspace(0.1, 2.0, 8, dtype=torch.float64)
    x[:, [2, 5]] = 0
    effect = torch.rand(8, dtype=torch.float64) + 0.5
    moment = never_free(x.T @ x / 50, effect, 50)
    order, residual = neuron_order(moment, effect.sqrt())
    assert set(order[-2:].tolist()) == {2, 5}
    assert residual[6] > residual[7] > residual[8] == 0
    energy = x.square().mean(0) * effect
    assert residual[7] <= energy[energy > 0].mean() / 52 and residual[7] <= energy[energy > 0].min() / 2
    rescale = torch.exp(torch.randn(8, dtype=torch.float64))
    other = never_free(torch.outer(rescale, rescale) * (x.T @ x / 50), effect / rescale.square(), 50)
    assert torch.allclose(other, torch.outer(rescale, rescale) * moment)


def test_features_nobody_reads_stay_free():
    x = torch.randn(50, 4, dtype=torch.float64)
    x[:, 1] = 0
    effect = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    moment = x.T @ x / 50
    assert torch.equal(never_free(moment, effect, 50), moment)
    assert torch.equal(never_free(torch.zeros(4, 4, dtype=torch.float64), effect, 50), torch.zeros(4, 4).double())


@pytest.mark.parametrize("height, width", [(8, 8), (16, 16), (7, 7), (6, 10)])
def test_spaced_positions_are_not_one_column(height, width):
    columns = torch.arange(width).expand(height, width)
    rows = torch.arange(height)[:, None].expand(height, width)
    places = turned(torch.stack([rows, columns])[None].float())[0].long()
    assert sorted(map(tuple, places.tolist())) == [(r, c) for r in range(height) for c in range(width)]
    picked = places[[(2 * s + 1) * height * width // 8 for s in range(4)]]
    assert len(set(picked[:, 0].tolist())) == 4 and len(set(picked[:, 1].tolist())) >= 3


def test_rows_of_a_refit_come_from_all_columns():
    rows = torch.arange(64 * 1024)
    kept = _spaced(rows[:, None], 1)[:, 0]
    assert len(kept) == MAX_TOKENS and len(kept.unique()) == MAX_TOKENS
    counts = torch.bincount(kept % 32, minlength=32)
    assert counts.min() > 0.8 * MAX_TOKENS / 32
    assert torch.equal(kept, _spaced(rows[:, None], 1)[:, 0])
    assert torch.equal(_spaced(rows[:100], 1), rows[:100])


def test_the_spectra_are_those_of_spaced_positions():
    model, data = zoo.make("resnet-basic", "ForImageClassification"), zoo.batches("resnet-basic")
    report = analyze(model, data, RECIPE, progress=False)
    assert {site.subspace.n for site in report.sites if "channels" in site.name} == {48 * 4}


# On real images


def trained(kind: str, x: torch.Tensor, y: torch.Tensor):
    """A small ResNet after twelve epochs of handwritten digits, shifted and noisy."""
    wide = {"basic": [24, 48], "bottleneck": [64, 128]}[kind]
    config = ResNetConfig(
        num_channels=1, embedding_size=16, num_labels=10, depths=[2, 2], hidden_sizes=wide, layer_type=kind
    )
    torch.manual_seed(0)
    model = ResNetForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    for epoch in range(12):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - epoch / 12)
        for rows in torch.randperm(len(x)).split(60):
            shift = tuple(torch.randint(-4, 5, (2,)).tolist())
            images = x[rows].roll(shift, (2, 3)) + 0.3 * torch.randn_like(x[rows])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images).logits, y[rows]).backward()
            optimizer.step()
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind, target", [("basic", 0.5), ("bottleneck", 0.3)])
def test_priced_widths_are_as_good_as_equal_shares(kind, target):
    """Measured: basic 98.5 % before, 97.2 % with priced widths, 97.3 % with equal shares; bottleneck 97.0, 96.3,
    95.6 %. Prices that depend on the scale of a convolution gave 93.8 to 95.5 % and 90.1 to 91.6 %."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order, None] / 8 - 1
    x, y = torch.nn.functional.interpolate(images, size=32, mode="bilinear"), torch.tensor(digits.target)[order]
    model = trained(kind, x[:1200], y[:1200])
    data = [{"pixel_values": part} for part in x[:512].split(64)]

    def accuracy(model):
        with torch.no_grad():
            return float((model(x[1200:]).logits.argmax(-1) == y[1200:]).double().mean())

    recipe = RMTKDConfig(target_reduction=target, round_to=2, min_width=2, calibration_samples=512)
    priced, uniform = (
        reduce(model, data, recipe.replace(allocation=allocation), progress=False).model
        for allocation in ("loss", "uniform")
    )
    assert accuracy(model) > 0.955
    assert accuracy(priced) > accuracy(model) - 0.03
    assert accuracy(priced) > accuracy(uniform) - 0.01
