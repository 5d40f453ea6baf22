"""A spec from which one entry was lost is refused, or describes the same model; no text (image) fails later."""

from __future__ import annotations

import copy

import pytest
import torch

from optimum_rmtkd import RMTKDConfig
from optimum_rmtkd.surgery import narrow_to
from optimum_rmtkd.surgery.reduction import anatomy_of

from ..tables import SLOW, some_slow
from . import decoder_zoo as zoo
from . import zoo as encoders


RECIPE = RMTKDConfig(round_to=1, min_width=1, calibration_samples=16, refit=False, importance="variance")
QUICK = ("gpt2", "opt", "phi3", "stablelm")  # numbers as attributes: of heads, of features; in the config
# What a loader does not miss: sections whose lack changes what a model computes, or fails at its first text (the width
# that a router of experts keeps as a number).
UNSEEN = dict.fromkeys(("gemma", "gemma2", "gemma3"), ("base",)) | {"mixtral": ("attrs",)}
NAMES = [name if name in QUICK else SLOW(name) for name in zoo.CONFIGS]


def places(tree: dict, above: tuple = ()) -> list[tuple]:
    found = []
    for name, value in tree.items():
        found += [(*above, name), *(places(value, (*above, name)) if isinstance(value, dict) else [])]
    return found


def without(config, place: tuple):
    config = copy.deepcopy(config)
    *above, name = ("spec", *place)
    inside = config.rmtkd
    for part in above:
        inside = inside[part]
    del inside[name]
    return config


def answers(small, place, outputs):
    """ "refused", "same", or what the model computes from a spec without the entry at `place`."""
    try:
        other = type(small)(without(small.config, place)).eval()
    except ValueError as error:
        assert type(error).__name__ == "SpecMismatchError" and "\n" not in str(error)
        return "refused"
    tensors, own = small.state_dict(), other.state_dict()
    if any(own[key].shape != tensor.shape for key, tensor in tensors.items()):
        return "refused"  # by whoever loads it
    other.load_state_dict(tensors)
    assert torch.allclose(outputs(other), outputs(small), atol=1e-4), place
    return "same"


@pytest.mark.parametrize("name", NAMES)
def test_a_spec_without_one_of_its_entries(name):
    model, batch = zoo.make(name), zoo.batches(4)
    sites = anatomy_of(model, RECIPE).sites.values()
    widths = {site.couple: 3 * site.group_width // 4 for site in sites}
    small = narrow_to(model, batch, widths, RECIPE, progress=False).eval()
    for key in ("modules", "heads"):
        assert small.config.rmtkd["spec"][key]
    found = [
        answers(small, place, lambda model: zoo.logits(model, batch[0]))
        for place in places(small.config.rmtkd["spec"])
        # numbers within their range can compute anything: Gemma's table is scaled by the dense width
        if not (place[-1] == "eps" or place[:1] == UNSEEN.get(name))
    ]
    assert found.count("refused") > found.count("same")  # sections that are empty, numbers that no code reads


ENCODERS = {
    "bert": "ForSequenceClassification",
    "mpnet": "ForSequenceClassification",
    "deberta-v2": "ForTokenClassification",
    "deberta-v3": "ForSequenceClassification",
    "albert": "ForQuestionAnswering",
    "modernbert": "ForTokenClassification",
    "dinov2": "ForImageClassification",
    "beit": "ForImageClassification",
    "clip-text": "ModelWithProjection",
    "clip-images": "ModelWithProjection",
}


@pytest.mark.parametrize("name", some_slow(ENCODERS, ["mpnet"]))
def test_a_spec_of_an_encoder_without_one_of_its_entries(name):
    model, data = encoders.make(name, ENCODERS[name]), encoders.batches(name, 4)
    sites = anatomy_of(model, RECIPE).sites.values()
    widths = {site.couple: 3 * site.group_width // 4 for site in sites}
    small = narrow_to(model, data, widths, RECIPE, progress=False).eval()
    spec = small.config.rmtkd["spec"]
    assert spec["modules"] and (spec["attrs"] or spec["heads"])
    found = [
        answers(small, place, lambda model: encoders.outputs(model, data[0]))
        for place in places(spec)
        if place[-1] != "eps"
    ]
    assert found.count("refused") > found.count("same")
