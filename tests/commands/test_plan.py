"""`plan`: a table and a file about what a cut needs; the config is all it reads."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from transformers import BertConfig, LlamaConfig

from optimum_rmtkd import RMTKDConfig, RMTKDError
from optimum_rmtkd.commands.plan import _batch
from optimum_rmtkd.surgery.outlook import shape_of

from ..surgery import seq2seq_zoo, zoo


@pytest.fixture
def folder(tmp_path):
    config = BertConfig(num_hidden_layers=2, hidden_size=128, intermediate_size=512, num_attention_heads=4)
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path / "model")  # and no weights
    return tmp_path / "model"


def test_a_plan_is_told_from_the_config_alone(cli, folder, tmp_path):
    options = ("--target-reduction", 0.5, "--batch-size", 4, "--length", 64)
    code, out, err = cli(
        "plan", "--model", folder, *options, "--host-memory", "8GB", "--json", tmp_path / "needs.json"
    )
    assert code == 0, err
    assert "everything fits" in out
    for phase in ("calibration", "planning", "cutting", "refit", "distillation", "saving"):
        assert phase in out
    told = json.loads((tmp_path / "needs.json").read_text())
    assert told["batch_size"] == 4 and told["length"] == 64
    assert told["schedule"] == "memory" and "Schedule of the cut: in memory" in out
    assert [phase["name"] for phase in told["streamed"]] == ["calibration", "planning", "cutting", "refit", "saving"]
    assert all(phase["fits"] and phase["bytes"] == sum(phase["parts"].values()) for phase in told["phases"])


def test_what_does_not_fit_is_told_with_what_to_change(cli, folder):
    options = ("--target-reduction", 0.5, "--batch-size", 512, "--length", 512)
    code, out, err = cli("plan", "--model", folder, *options, "--device-memory", "2GB")
    assert code == 0, err
    assert "calibration" in out.split("would not fit")[0].splitlines()[-1]
    assert "--batch-size under 512" in out


def test_the_streamed_schedule_is_named_where_memory_has_no_room(cli, tmp_path):
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, vocab_size=1000
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    options = ("--target-reduction", 0.3, "--batch-size", 1, "--length", 64)
    code, out, err = cli("plan", "--model", tmp_path, *options, "--host-memory", "4GB")
    assert code == 0, err
    assert "Schedule of the cut: streamed" in out and "narrow_streamed" in out
    code, out, err = cli("plan", "--model", tmp_path, *options, "--device-memory", "4GB")
    assert code == 0 and "none fits" in out  # files are mapped into the memory of the host
    both = ("--device-memory", "4GB", "--host-memory")
    for room, said in (("16GB", "Schedule of the cut: streamed"), ("1GB", "none fits")):
        code, out, err = cli("plan", "--model", tmp_path, *options, *both, room)
        assert code == 0 and said in out


@pytest.mark.parametrize(
    "options, message",
    [
        (("--host-memory", "64"), "--host-memory '64': expected a size with its unit, such as 80GB"),
        (("--length", 4096), "--length 4096: BertForSequenceClassification takes 512 tokens at most"),
        (("--batch-size", 0), "--batch-size 0: expected a whole number of at least 1"),
        (("--target-reduction", 0.9999), "cannot get below"),
    ],
)
def test_wrong_options_are_refused(cli, folder, options, message):
    code, _, err = cli("plan", "--model", folder, *options)
    assert code == 2 and message in err


KINDS = {
    "T5ForConditionalGeneration": ("t5", 512),
    "BartForConditionalGeneration": ("bart", 40),
    "WhisperForConditionalGeneration": ("whisper", 20),  # the encoder's frames, halved
    "DebertaV2ForSequenceClassification": ("deberta-v3", 40),
    "AlbertForSequenceClassification": ("albert", 40),
    "CLIPForImageClassification": ("clip", 17),
    "CLIPModel": ("clip", 40),
    "SwinForImageClassification": ("swin", 64),
}


@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_every_kind_of_input(kind):
    name, length = KINDS[kind]
    config = seq2seq_zoo.CONFIGS[name][1] if name in seq2seq_zoo.CONFIGS else zoo.CONFIGS[name]
    with torch.device("meta"):
        model = getattr(transformers, kind)(copy.deepcopy(config)).eval()
    shape = shape_of(model, _batch(model, 2, None), RMTKDConfig(target_reduction=0.2, round_to=2, min_width=2))
    assert shape.length == length and shape.flops > 0 and shape.trained > 0


def test_code_that_looks_at_values_is_refused_by_name():
    with torch.device("meta"):
        model = transformers.BartForSequenceClassification(copy.deepcopy(seq2seq_zoo.CONFIGS["bart"][1])).eval()
    with pytest.raises(RMTKDError, match="BartForSequenceClassification needs cannot be told from its config alone"):
        shape_of(model, _batch(model, 2, None), RMTKDConfig(target_reduction=0.2, round_to=2, min_width=2))
