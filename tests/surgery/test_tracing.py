"""Heads that no family declares: what reads the stream is found, what uses it otherwise is refused by name."""

from __future__ import annotations

import ast
import copy
import dataclasses

import pytest
import torch
import transformers as tf
from torch import nn

from optimum_rmtkd import RMTKDConfig, UnsupportedArchitectureError, narrow
from optimum_rmtkd.surgery import narrow_to
from optimum_rmtkd.surgery.families import FAMILIES
from optimum_rmtkd.surgery.sites import all_but_the_stream, is_layer, select_sites
from optimum_rmtkd.surgery.surgeon import anatomy_of
from optimum_rmtkd.surgery.tracing import with_traced_reads

from . import decoder_zoo, zoo


RECIPE = RMTKDConfig(target_reduction=0.4, round_to=4, min_width=4, calibration_samples=48)
OTHERS = ("resnet-basic", "resnet-bottleneck", "modernbert", "clip", "swin")  # no encoder layouts
TRANSFORMERS = [case for case in zoo.ONE_EACH if case.values[0] not in OTHERS]


@pytest.fixture
def headless(monkeypatch):
    """Families that declare no heads."""

    def forget(name):
        family = FAMILIES[zoo.CONFIGS[name].model_type]
        layout = dataclasses.replace(family.layout, head_reads=(), pooled_by=())
        monkeypatch.setitem(FAMILIES, zoo.CONFIGS[name].model_type, dataclasses.replace(family, layout=layout))

    return forget


def reads(model, batch):
    """{path: site} of the layers outside the blocks that read something, present ones only."""
    anatomy = with_traced_reads(model, anatomy_of(model, RECIPE), batch)
    return {u.path: u.reads for u in anatomy.units if u.block is None and u.reads and is_layer(model, u.path)}


@pytest.mark.parametrize("name, task", TRANSFORMERS)
def test_what_is_declared_is_found(headless, name, task):
    model, batch = zoo.make(name, task), zoo.batches(name, 1)[0]
    declared = reads(model, batch)
    headless(name)
    assert reads(model, batch) == declared


@pytest.mark.parametrize("name, task", [case for case in zoo.SOME_SLOW if case.values[0] not in OTHERS])
def test_undeclared_heads_are_narrowed_with_the_stream(headless, name, task):
    model, data = zoo.make(name, task), zoo.batches(name)
    declared = narrow_to(model, data, {"hidden": 20}, RECIPE, progress=False)
    headless(name)
    found = narrow_to(model, data, {"hidden": 20}, RECIPE, progress=False)
    torch.testing.assert_close(zoo.outputs(found, data[0]), zoo.outputs(declared, data[0]))


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_a_convolution_that_reads_the_stream_as_an_image(name):
    config = copy.deepcopy(zoo.CONFIGS[name])
    config.encoder_stride = 2
    torch.manual_seed(0)
    model = getattr(tf, zoo.stem(name) + "ForMaskedImageModeling")(config).eval()
    data = [b | {"bool_masked_pos": torch.zeros(8, 16, dtype=torch.bool)} for b in zoo.batches(name)]
    small = narrow_to(model, data, {"hidden": 28}, RECIPE, progress=False)
    assert small.decoder[0].in_channels == 28
    with torch.no_grad():
        before, after = model(**data[0]).reconstruction, small(**data[0]).reconstruction
    assert (after - before).norm() < 0.2 * before.norm()


class Cosine(nn.Module):
    """A head without linear layers: similarities with fixed vectors."""

    def __init__(self, width, labels):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(labels, width))

    def forward(self, x):
        return x @ self.vectors.T


def test_a_layer_that_reads_what_was_made_of_the_stream():
    model = zoo.make("distilbert", "ForTokenClassification")
    model.dropout = nn.Sequential(nn.Tanh())  # between the stream and the classifier
    anatomy = anatomy_of(model, RECIPE)
    bare = dataclasses.replace(anatomy, units=tuple(u for u in anatomy.units if u.path != "classifier"))
    with pytest.raises(UnsupportedArchitectureError, match="classifier reads what was made of it"):
        with_traced_reads(model, bare, zoo.batches("distilbert", 1)[0])


def test_an_output_that_no_linear_layer_makes():
    model = zoo.make("distilbert", "ForTokenClassification")
    model.classifier = Cosine(32, 3)
    with pytest.raises(UnsupportedArchitectureError, match="output 'logits' depends on it") as caught:
        with_traced_reads(model, anatomy_of(model, RECIPE), zoo.batches("distilbert", 1)[0])
    assert "form='factored'" in str(caught.value) and "register_family" in str(caught.value)


def test_nothing_is_traced_where_the_stream_stays(monkeypatch):
    traced = []

    def trace(model, anatomy, batch):
        traced.append(model)
        return with_traced_reads(model, anatomy, batch)

    monkeypatch.setattr("optimum_rmtkd.surgery.surgeon.with_traced_reads", trace)
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", 1)
    narrow(model, data, RECIPE.replace(sites="intermediate", target_reduction=0.1), progress=False)
    assert not traced
    narrow(model, data, RECIPE, progress=False)
    assert len(traced) == 1


@pytest.mark.parametrize("make", [lambda: decoder_zoo.make("llama"), lambda: zoo.make("bert", "Model")])
def test_the_advice_to_leave_the_stream_names_sites_that_there_are(make):
    anatomy = anatomy_of(make(), RECIPE)
    sites = ast.literal_eval(all_but_the_stream(anatomy).removeprefix("sites="))
    kinds = {site.kind for site in select_sites(anatomy, sites)}
    assert "intermediate" in kinds and "hidden" not in kinds


def test_a_stream_that_bare_parameters_write_last_is_traced():
    """BEiT scales what a block adds, and its head for masked images reads a norm that no family declares."""
    config = copy.deepcopy(zoo.CONFIGS["beit"])
    config.vocab_size = 16
    model = zoo.enlivened(tf.BeitForMaskedImageModeling(config).eval())
    with pytest.raises(UnsupportedArchitectureError, match="lm_head reads what was made of it"):
        narrow(model, zoo.batches("beit", 1), RECIPE.replace(target_reduction=0.03), progress=False)
    backbone = zoo.enlivened(tf.BeitBackbone(copy.deepcopy(zoo.CONFIGS["beit"])).eval())
    assert narrow_to(backbone, zoo.batches("beit", 1), {"hidden": 24}, RECIPE, progress=False).config.hidden_size == 24
