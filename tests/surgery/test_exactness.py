"""Models that are low rank by construction are narrowed to that rank without loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from optimum_rmtkd import RMTKDConfig, count_parameters
from optimum_rmtkd.surgery import narrow_to
from optimum_rmtkd.surgery.budget import flops_of, parameters_of
from optimum_rmtkd.surgery.sites import linear_layers
from optimum_rmtkd.surgery.surgeon import anatomy_of

from . import zoo


RECIPE = RMTKDConfig(round_to=1, min_width=1, calibration_samples=48)


def test_duplicate_neurons_cost_nothing():
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.weight[32:] = layer.intermediate.dense.weight[:32]
            layer.intermediate.dense.bias[32:] = layer.intermediate.dense.bias[:32]
    small = narrow_to(model, data, {f"layer.{i}.intermediate": 32 for i in (0, 1)}, RECIPE, progress=False)
    assert small.bert.encoder.layer[0].intermediate.dense.out_features == 32
    assert (zoo.outputs(small, data[0]) - zoo.outputs(model, data[0])).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra"])
def test_a_tied_decoder_gets_no_second_factor_where_the_stream_is_whole(name):
    model, data = zoo.make(name, "ForMaskedLM"), zoo.batches(name)
    anatomy = anatomy_of(model, RECIPE)
    count = parameters_of(model, anatomy)
    for widths in ({"hidden": 32}, {"hidden": 32, "layer.0.intermediate": 40}):
        same = narrow_to(model, data, widths, RECIPE, progress=False)
        decoder = same.get_output_embeddings()
        assert type(decoder) is nn.Linear and decoder.weight is same.get_input_embeddings().weight
        assert count(widths) == count_parameters(same) <= count_parameters(model)
    assert count({"hidden": 32}) == count_parameters(model)
    work = flops_of(model, anatomy, dict.fromkeys(linear_layers(model), 1.0))
    assert work({"hidden": 32}) == work({}) > work({"hidden": 16})
    cut = narrow_to(same, data, {"hidden": 20}, RECIPE, progress=False)
    again = narrow_to(cut, data, {"hidden": 20, "layer.0.intermediate": 32}, RECIPE, progress=False)
    assert again.get_output_embeddings().rank == cut.get_output_embeddings().rank == 20
    assert zoo.outputs(again, data[0]).isfinite().all()
    saved = narrow_to(zoo.make(name, "ForSequenceClassification"), data, {"hidden": 32}, RECIPE, progress=False)
    assert not [path for path, entry in saved.config.rmtkd["spec"]["modules"].items() if "rank" in entry]


def test_low_rank_heads_cost_nothing():
    model, data = zoo.make("vit", "ForImageClassification"), zoo.batches("vit")
    with torch.no_grad():
        for layer in model.vit.layers:
            for linear in (layer.attention.q_proj, layer.attention.k_proj, layer.attention.v_proj):
                for head in range(4):  # rows of a head span three directions
                    rows = slice(8 * head, 8 * head + 8)
                    mix = torch.randn(8, 3)
                    linear.weight[rows] = mix @ torch.randn(3, 32) / 4
                    linear.bias[rows] = 0
    small = narrow_to(model, data, {f"layer.{i}.heads": 3 for i in (0, 1)}, RECIPE, progress=False)
    assert small.vit.layers[0].attention.q_proj.out_features == 12
    assert (zoo.outputs(small, data[0]) - zoo.outputs(model, data[0])).abs().max() < 1e-4


def _confine(model: nn.Module, basis: torch.Tensor) -> None:
    """Let everything that writes the stream of a ViT write into the span of `basis` alone."""
    project = basis @ basis.T
    with torch.no_grad():
        vit = model.vit
        vit.embeddings.cls_token.copy_(vit.embeddings.cls_token @ project)
        vit.embeddings.position_embeddings.copy_(vit.embeddings.position_embeddings @ project)
        convolution = vit.embeddings.patch_embeddings.projection
        convolution.weight.copy_(torch.einsum("ab,bcde->acde", project, convolution.weight))
        convolution.bias.copy_(project @ convolution.bias)
        for layer in vit.layers:
            for linear in (layer.attention.o_proj, layer.mlp.fc2):
                linear.weight.copy_(project @ linear.weight)
                linear.bias.copy_(project @ linear.bias)


def test_low_rank_stream_costs_nothing():
    """A stream of rank 12 about its feature mean fits into 13 features: one is the mean that layer norm subtracts."""
    model, data = zoo.make("vit", "ForImageClassification"), zoo.batches("vit")
    centred = torch.randn(32, 12)
    _confine(model, torch.linalg.qr(centred - centred.mean(0))[0])
    small = narrow_to(model, data, {"hidden": 13}, RECIPE, progress=False)
    assert small.config.hidden_size == 13
    assert (zoo.outputs(small, data[0]) - zoo.outputs(model, data[0])).abs().max() < 1e-4


def test_surgery_is_deterministic():
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    widths = {"hidden": 20, "layer.0.heads": 5, "layer.1.intermediate": 17}
    first, second = (narrow_to(model, data, widths, RECIPE, progress=False) for _ in range(2))
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_refit_beats_projection_alone():
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", count=12)
    widths = {"hidden": 16}

    def error(refit):
        small = narrow_to(model, data, widths, RECIPE.replace(refit=refit, calibration_samples=96), progress=False)
        return (zoo.outputs(small, data[0]) - zoo.outputs(model, data[0])).square().mean()

    assert error(True) < 0.8 * error(False)
