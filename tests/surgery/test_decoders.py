"""Caches, cross attention, and what the decoder of an encoder-decoder reads."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from optimum_rmtkd import CalibrationError, RMTKDConfig, UnsupportedArchitectureError, count_parameters, narrow
from optimum_rmtkd.batches import decoder_mask
from optimum_rmtkd.surgery.calibration import Calibration, calibrate
from optimum_rmtkd.surgery.refit import Replay, Scope
from optimum_rmtkd.surgery.sites import Point

from ..test_batches import SPEECH, whisper
from . import zoo


RECIPE = RMTKDConfig(target_reduction=0.3, round_to=4, min_width=4, calibration_samples=48)
FACTORED = RECIPE.replace(form="factored", target_reduction=0.1)
TEXT = zoo.batches("bert")
WHOLE = [{"input_ids": batch["input_ids"]} for batch in TEXT]


def decoder(cls, name="bert", **options):
    torch.manual_seed(0)
    values = zoo.CONFIGS[name].to_dict() | {"is_decoder": True} | options
    return cls(zoo.CONFIGS[name].__class__(**values)).eval()


# Caches


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("data", [TEXT, WHOLE], ids=["padded", "whole"])
@pytest.mark.parametrize(
    "cls, name",
    [
        (tf.BertLMHeadModel, "bert"),
        (tf.RobertaForCausalLM, "roberta"),
        (tf.ElectraForCausalLM, "electra"),
        (tf.BertForSequenceClassification, "bert"),
    ],
)
def test_encoders_as_decoders(cls, name, data, attention):
    model = decoder(cls, name, attn_implementation=attention)
    before = model.config.to_dict()
    assert before["use_cache"]
    small = narrow(model, data, RECIPE, progress=False)
    assert count_parameters(small) < count_parameters(model)
    assert model.config.to_dict() == before and small.config.use_cache is True
    without = narrow(decoder(cls, name, attn_implementation=attention, use_cache=False), data, RECIPE, progress=False)
    for key, tensor in without.state_dict().items():
        assert torch.equal(small.state_dict()[key], tensor), key


def test_a_block_is_replayed_without_the_cache_of_its_first_call():
    model = decoder(tf.BertLMHeadModel)
    cached = Scope(model, lambda i: model(**TEXT[i], use_cache=True), [None] * 2)
    replay = Replay(model, tuple(f"@.encoder.layer.{i}" for i in range(2)), cached)
    values = [value for args, kwargs in replay.calls for value in (*args, *kwargs.values())]
    assert not any(isinstance(value, tf.Cache) for value in values)
    with torch.no_grad():
        first, second = replay._call(0), replay._call(0)
        states = model(**TEXT[0], output_hidden_states=True).hidden_states
    assert torch.equal(first, second) and torch.allclose(first, states[1], atol=1e-6)


G = {
    "vocab_size": 61,
    "n_positions": 40,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 2,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
T = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


def test_gpt2_factored():
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**G)).eval()
    small = narrow(model, TEXT, FACTORED, progress=False)
    assert count_parameters(small) < count_parameters(model) and model.config.use_cache is True
    long = [{"input_ids": torch.randint(5, 60, (4, 50))}]
    with pytest.raises(CalibrationError, match="has 50 tokens, GPT2LMHeadModel has positions for 40.*max_length=40"):
        narrow(model, long, FACTORED, progress=False)


# Cross attention


STATES = [
    b | {"encoder_hidden_states": torch.randn(8, 7, 32), "encoder_attention_mask": torch.ones(8, 7)} for b in TEXT
]
CROSSED = {
    "bert": lambda: decoder(tf.BertLMHeadModel, add_cross_attention=True),
    "roberta": lambda: decoder(tf.RobertaForCausalLM, "roberta", add_cross_attention=True),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**G, add_cross_attention=True)).eval(),
}


@pytest.mark.parametrize("name", CROSSED)
def test_cross_attention_without_states(name):
    with pytest.raises(CalibrationError, match="has cross attention.*no encoder_hidden_states"):
        narrow(CROSSED[name](), TEXT, FACTORED, progress=False)
    with pytest.raises(CalibrationError, match="has cross attention.*no encoder_hidden_states"):
        narrow(CROSSED[name](), [*STATES[:2], TEXT[2]], FACTORED, progress=False)


@pytest.mark.parametrize("name", CROSSED)
def test_cross_attention_in_two_factors(name):
    model = CROSSED[name]()
    small = narrow(
        model, STATES, FACTORED.replace(target_reduction=None, edge_estimator="fixed", fixed_rank=4), progress=False
    )
    spec = small.config.rmtkd["spec"]["modules"]
    assert any("cross" in path.lower() and delta.get("rank") for path, delta in spec.items()), spec
    with torch.no_grad():
        assert small(**STATES[0]).logits.shape == (8, 12, 61)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_cross_attention_and_a_cut_of_the_stream(name):
    model = CROSSED[name]()
    with pytest.raises(UnsupportedArchitectureError, match="cross attention.*crossattention.*factored"):
        narrow(model, STATES, RECIPE, progress=False)
    small = narrow(model, STATES, RECIPE.replace(sites="intermediate", target_reduction=0.05), progress=False)
    with torch.no_grad():
        assert small(**STATES[0]).logits.shape == (8, 12, 61)


# Encoder-decoders


BART = {
    "vocab_size": 61, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 40,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip


def vision():
    encoder = tf.ViTConfig(**zoo.VISION).to_dict()
    reads = tf.BertConfig(**zoo.TEXT, **zoo.BODY, is_decoder=True, add_cross_attention=True).to_dict()
    config = tf.VisionEncoderDecoderConfig(encoder=encoder, decoder=reads, decoder_start_token_id=1, pad_token_id=0)
    return tf.VisionEncoderDecoderModel(config).eval()


MODELS = {
    "whisper": (whisper, "input_features", (4, 16, 40)),
    "bart": (lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART)).eval(), "input_ids", (4, 10)),
    "m2m": (lambda: tf.M2M100ForConditionalGeneration(tf.M2M100Config(**BART)).eval(), "input_ids", (4, 10)),
    "blenderbot": (
        lambda: tf.BlenderbotForConditionalGeneration(tf.BlenderbotConfig(**BART)).eval(), "input_ids", (4, 10)
    ),
    "t5": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T)).eval(), "input_ids", (4, 10)),
    "speech to text": (
        lambda: tf.Speech2TextForConditionalGeneration(
            tf.Speech2TextConfig(**SPEECH | {"input_feat_per_channel": 16, "conv_channels": 32})
        ).eval(),
        "input_features",
        (4, 40, 16),
    ),
    "image to text": (vision, "pixel_values", (4, 1, 8, 8)),
}  # fmt: skip


def data_for(name, count=3, length=7):
    _, column, shape = MODELS[name]
    made = []
    for _ in range(count):
        inputs = torch.randint(5, 60, shape) if column == "input_ids" else torch.randn(shape)
        labels = torch.randint(5, 60, (4, length))
        labels[::2, length - 2 :] = -100
        made.append({column: inputs, "labels": labels})
    return made


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_batches_of_inputs_and_labels(name):
    model, data = MODELS[name][0](), data_for(name)
    small = narrow(model, data, FACTORED.replace(calibration_samples=12), progress=False)
    assert count_parameters(small) < count_parameters(model)
    with torch.no_grad():
        assert small(**data[0]).loss.isfinite()


@pytest.mark.parametrize("name", ["whisper", "t5", "image to text"])
def test_without_labels_the_error_says_what_to_add(name):
    column = MODELS[name][1]
    data = [{column: batch[column]} for batch in data_for(name)]
    with pytest.raises(CalibrationError, match="encoder-decoder.*neither labels.*nor decoder_input_ids: add labels"):
        narrow(MODELS[name][0](), data, FACTORED, progress=False)


def test_labels_longer_than_the_decoder():
    with pytest.raises(CalibrationError, match="has 30 tokens, WhisperForConditionalGeneration has positions for 16"):
        narrow(whisper(), data_for("whisper", length=30), FACTORED, progress=False)


@pytest.mark.parametrize("name", ["whisper", "bart", "t5"])
def test_labels_of_another_tokenizer(name):
    data = data_for(name)
    for batch in data:
        batch["labels"] = torch.where(batch["labels"] < 0, -100, batch["labels"] + 40)
    with pytest.raises(CalibrationError, match="labels .* go up to .* has 61 outputs: .*tokenizer of another model"):
        narrow(MODELS[name][0](), data, FACTORED, progress=False)


@pytest.mark.parametrize("length", [7, 10], ids=["another length", "the source's length"])
def test_padding_of_the_decoder_never_counts(length):
    model, data = MODELS["bart"][0](), data_for("bart", length=length)
    points = [Point("@.encoder.layers.0.fc1"), Point("@.decoder.layers.0.fc1")]
    found = calibrate(model, data, Calibration(points, (), FACTORED.replace(sample_unit="token")), progress=False)
    counts = [found.moments[point].count for point in points]
    real = sum(int(decoder_mask(model, batch).sum()) for batch in data)
    assert real == 3 * (4 * length - 4)
    assert counts[1] == real and counts[0] in (120, real)


def test_features_of_a_linear_layer_over_a_map_are_the_last_axis():
    torch.manual_seed(0)
    sizes = {"num_channels": 1, "hidden_sizes": [16, 32], "depths": [1, 1], "image_size": 32, "patch_size": 2}
    config = tf.ConvNextConfig(**sizes, num_labels=3, num_stages=2)
    model = tf.ConvNextForImageClassification(config).eval()
    data = [{"pixel_values": torch.randn(8, 1, 32, 32)} for _ in range(3)]
    point = Point("@.encoder.stages.0.layers.0.pwconv1")
    found = calibrate(model, data, Calibration([point], (), FACTORED.replace(sample_unit="token")), progress=False)
    rows = []
    hook = model.get_submodule("convnext.encoder.stages.0.layers.0.pwconv1").register_forward_hook(
        lambda module, args, out: rows.append(out.detach().reshape(-1, out.shape[-1]).double())
    )
    with torch.no_grad():
        for batch in data:
            model(**batch)
    hook.remove()
    x = torch.cat(rows)
    assert found.moments[point].count == len(x)
    assert torch.allclose(found.moments[point].covariance, torch.cov(x.T, correction=0), atol=1e-6)
    assert count_parameters(narrow(model, data, FACTORED, progress=False)) < count_parameters(model)
