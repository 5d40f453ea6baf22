"""What a cut is told to need, against what it takes: memory in a process of its own, work by torch's own counter."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from optimum_rmtkd import RMTKDConfig, RMTKDError, UnsupportedArchitectureError
from optimum_rmtkd.errors import BudgetError
from optimum_rmtkd.surgery.needs import moments, phases
from optimum_rmtkd.surgery.outlook import shape_of

from . import zoo


RECIPE = RMTKDConfig(target_reduction=0.4, calibration_samples=32)
MEASURE = """
import sys, threading, time, torch
from transformers import AutoConfig
from optimum_rmtkd import RMTKDConfig, narrow
from optimum_rmtkd.hub.loading import class_of

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

folder, length, batch, recipe = sys.argv[1:5]
length, batch, recipe = int(length), int(batch), RMTKDConfig.from_json_file(recipe)
config = AutoConfig.from_pretrained(folder)
small = AutoConfig.from_pretrained(sys.argv[5])  # what is loaded once does not count
ids = torch.randint(5, 100, (64, 8), generator=torch.Generator().manual_seed(0))
narrow(class_of(sys.argv[5], small)(small).eval(), [{"input_ids": ids}], recipe, progress=False)
before, peak, over = resident(), [0], threading.Event()

def look():
    while not over.wait(0.01):
        peak[0] = max(peak[0], resident())

thread = threading.Thread(target=look)
thread.start()
torch.manual_seed(0)
model = class_of(folder, config)(config).eval()
ids = torch.randint(5, 1000, (recipe.calibration_samples, length), generator=torch.Generator().manual_seed(0))
narrow(model, [{"input_ids": part} for part in ids.split(batch)], recipe, progress=False)
over.set()
thread.join()
print(peak[0] - before)
"""
SIZES = {
    "encoder": (BertForSequenceClassification, BertConfig, {"num_hidden_layers": 3}, 128, 16),
    "decoder": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 4,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 8000,
            "tie_word_embeddings": True,
        },
        256,
        8,
    ),
}


def without_weights(cls, config) -> torch.nn.Module:
    with torch.device("meta"):
        return cls(config).eval()


def ids(batch: int, length: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.empty(batch, length, dtype=torch.long, device="meta")}


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
@pytest.mark.parametrize("name", SIZES)
def test_the_memory_that_is_told_is_what_a_cut_takes(name, tmp_path):
    cls, kind, fields, length, batch = SIZES[name]
    config = kind(**fields)
    config.architectures = [cls.__name__]
    config.save_pretrained(tmp_path)
    RECIPE.to_json_file(tmp_path / "recipe.json")
    few = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    tiny = kind(**fields | few | {"num_key_value_heads": 2, "vocab_size": 100} if name == "decoder" else few)
    tiny.architectures = [cls.__name__]
    tiny.save_pretrained(tmp_path / "tiny")
    told = phases(shape_of(without_weights(cls, config), ids(batch, length), RECIPE))
    expected = max(phase.bytes for phase in told if phase.name not in ("distillation", "saving"))
    command = [sys.executable, "-c", MEASURE, tmp_path, length, batch, tmp_path / "recipe.json", tmp_path / "tiny"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert not done.returncode, done.stderr
    assert int(done.stdout.split()[-1]) == pytest.approx(expected, rel=0.25)


def test_moments_take_what_is_told():
    from optimum_rmtkd.surgery.calibration import Calibration, calibrate, gradient_points, points_of
    from optimum_rmtkd.surgery.checks import anatomy_of

    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", 3)
    anatomy = anatomy_of(model, RECIPE)
    points = points_of(anatomy, list(anatomy.sites.values()))
    seen = Calibration(points, gradient_points(model, anatomy, RECIPE, data[0]), RECIPE, halves=False)
    calibrate(model, data, seen, progress=False)
    held = sum(value.nbytes for found in seen.moments.values() for value in found._sums.values())
    with torch.device("meta"):
        shape = shape_of(type(model)(model.config).eval(), ids(8, 12), RECIPE)
    assert held == pytest.approx(moments(shape.observed, shape.rows), rel=0.02)


def test_eight_billion_parameters_are_told_in_seconds():
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    )
    start = time.process_time()
    model = without_weights(LlamaForCausalLM, config).to(torch.bfloat16)
    shape = shape_of(model, ids(4, 2048), RECIPE)
    found = {phase.name: phase for phase in phases(shape)}
    assert time.process_time() - start < 10
    assert shape.parameters == 8_030_261_248
    # forward of a token: two FLOPs a weight of every layer but the table, and attention over half of the positions
    products = 2 * (8_030_261_248 - 128256 * 4096) + 4 * 1024 * 4096 * 32
    assert shape.flops == pytest.approx(2048 * products, rel=0.01)
    assert found["calibration"].parts["source"] == 2 * 8_030_261_248
    assert found["calibration"].parts["copy with folded norms"] == 4 * 8_030_261_248
    assert found["distillation"].bytes > 100e9


def test_more_of_something_never_needs_less():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    shape = shape_of(without_weights(LlamaForCausalLM, config), ids(2, 16), RECIPE, distilled=10)
    for name in ("samples", "saved", "answers", "hidden", "parameters", "inside", "refitted", "distilled"):
        more = dataclasses.replace(shape, **{name: 2 * getattr(shape, name)})
        for one, other in zip(phases(shape), phases(more), strict=True):
            assert other.bytes >= one.bytes and other.flops >= one.flops, name
        assert phases(more) != phases(shape), name


def test_memory_of_calibration_and_refit_is_told_to_be_that_of_one_batch():
    config = BertConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=4)
    model = without_weights(BertForSequenceClassification, config)
    few, many = (shape_of(model, ids(4, 16), RECIPE.replace(calibration_samples=n)) for n in (64, 4096))
    assert [p.bytes for p in phases(few)] == [p.bytes for p in phases(many)]


def test_what_cannot_be_cut_is_refused_as_a_cut_refuses_it():
    from transformers import XLNetConfig, XLNetForSequenceClassification

    config = XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=32, vocab_size=50)
    with pytest.raises(UnsupportedArchitectureError, match="xlnet"):
        shape_of(without_weights(XLNetForSequenceClassification, config), ids(2, 8), RECIPE)
    small = BertConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=64, num_attention_heads=2, vocab_size=60)
    model = without_weights(BertForSequenceClassification, small)
    with pytest.raises(BudgetError):
        shape_of(model, ids(2, 8), RECIPE.replace(target_reduction=0.999))
    with pytest.raises(RMTKDError, match="factored"):
        shape_of(model, ids(2, 8), RECIPE.replace(form="factored"))


def test_experts_are_not_told():
    from .decoder_zoo import CONFIGS

    cls, config = CONFIGS["mixtral"]
    with pytest.raises(RMTKDError, match="MixtralForCausalLM has experts"):
        shape_of(without_weights(cls, config), ids(2, 8), RECIPE)


@pytest.mark.parametrize("name", ["vit", "gpt2", "gpt2 classifier", "resnet", "convnext"])
def test_other_kinds_of_models_are_told(name):
    from transformers import (
        ConvNextConfig,
        ConvNextForImageClassification,
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        ResNetConfig,
        ResNetForImageClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    made = {
        "vit": (ViTForImageClassification, ViTConfig(num_hidden_layers=2)),
        "gpt2": (GPT2LMHeadModel, GPT2Config(n_layer=2)),
        "gpt2 classifier": (GPT2ForSequenceClassification, GPT2Config(n_layer=2, pad_token_id=0)),
        "convnext": (ConvNextForImageClassification, ConvNextConfig(depths=[1, 1, 1, 1])),
        "resnet": (ResNetForImageClassification, ResNetConfig(depths=[1, 1, 1, 1])),
    }
    model = without_weights(*made[name])
    pixels = {"pixel_values": torch.empty(2, 3, 224, 224, device="meta")}
    found = phases(shape_of(model, ids(2, 32) if "gpt2" in name else pixels, RECIPE))
    assert [phase.name for phase in found][:2] == ["calibration", "planning"]
    assert all(phase.bytes > 0 and phase.largest in phase.parts for phase in found)
    if "gpt2" not in name:
        assert found[0].bytes > 2 * 4 * 3 * 224 * 224  # a backward pass keeps more than its input
    json.dumps([dataclasses.asdict(phase) for phase in found])
