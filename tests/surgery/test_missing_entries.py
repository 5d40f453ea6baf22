"""A spec of a decoder from which one entry was lost is refused, or describes the same model; no text fails later."""

from __future__ import annotations

import copy

import pytest
import torch

from optimum_rmtkd import RMTKDConfig
from optimum_rmtkd.surgery import narrow_to
from optimum_rmtkd.surgery.reduction import anatomy_of

from ..tables import SLOW
from . import decoder_zoo as zoo


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


@pytest.mark.parametrize("name", NAMES)
def test_a_spec_without_one_of_its_entries(name):
    model, batch = zoo.make(name), zoo.batches(4)
    sites = anatomy_of(model, RECIPE).sites.values()
    widths = {site.couple: 3 * site.group_width // 4 for site in sites}
    small = narrow_to(model, batch, widths, RECIPE, progress=False).eval()
    wanted, tensors = zoo.logits(small, batch[0]), small.state_dict()
    for key in ("modules", "heads"):
        assert small.config.rmtkd["spec"][key]
    same = refused = 0
    for place in places(small.config.rmtkd["spec"]):
        # numbers within their range can compute anything: Gemma's table is scaled by the dense width
        if place[-1] == "eps" or place[:1] == UNSEEN.get(name):
            continue
        try:
            other = type(small)(without(small.config, place)).eval()
        except ValueError as error:
            assert type(error).__name__ == "SpecMismatchError" and "\n" not in str(error)
            refused += 1
            continue
        if any(other.state_dict()[key].shape != tensor.shape for key, tensor in tensors.items()):
            refused += 1  # by whoever loads it
            continue
        other.load_state_dict(tensors)
        assert torch.allclose(zoo.logits(other, batch[0]), wanted, atol=1e-4), place
        same += 1
    assert refused > same  # the same: sections that are empty, numbers that no code reads
