"""What a batch is asked for, whatever a collator put into it."""

from __future__ import annotations

import collections
import re
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from transformers.modeling_outputs import BaseModelOutput

from optimum_rmtkd.batches import (
    accepted_names,
    batch_size,
    decoder_mask,
    described,
    first_samples,
    padding_mask,
    run,
    to_device,
    unchunked,
)
from optimum_rmtkd.batches.examples import example_inputs
from optimum_rmtkd.batches.rows import unfit_columns
from optimum_rmtkd.errors import RMTKDError

from .surgery import seq2seq_zoo, zoo


IDS = torch.randint(5, 60, (8, 12))


@pytest.mark.parametrize(
    "batch, size",
    [
        ({"temperature": torch.tensor(1.0), "input_ids": IDS}, 8),
        ({"flag": True, "position_ids": torch.arange(12)[None], "input_ids": IDS}, 8),
        ({"class_weights": torch.ones(3), "pixel_values": torch.zeros(5, 3, 4, 4)}, 5),
        ({"head_mask": torch.ones(2, 4), "flattened_patches": torch.zeros(6, 9, 5)}, 6),
        ({"weights": torch.ones(3), "flattened_patches": torch.zeros(6, 9, 5), "rows": torch.zeros(6)}, 6),
        ({"flag": True, "scale": torch.tensor(2.0)}, 0),
        ({"input_ids": torch.zeros(0, 12)}, 0),
    ],
)
def test_samples_are_counted_by_the_model_s_input(batch, size):
    assert batch_size(batch) == size


def test_a_part_of_a_batch_cuts_what_is_one_entry_a_sample():
    batch = {
        "scale": torch.tensor(2.0),
        "input_ids": IDS,
        "position_ids": torch.arange(8),  # shared, though as long as the batch
        "token_type_ids": torch.zeros(1, 12),
        "interpolate_pos_encoding": True,
        "head_mask": torch.ones(8, 4),
        "inputs_embeds": None,
        "labels": [{"boxes": i} for i in range(8)],
    }
    part = first_samples(batch, 3)
    assert torch.equal(part["input_ids"], IDS[:3]) and part["labels"] == batch["labels"][:3]
    for name in ("scale", "position_ids", "token_type_ids", "interpolate_pos_encoding", "head_mask", "inputs_embeds"):
        assert part[name] is batch[name]
    assert first_samples(batch, 8)["input_ids"] is IDS


@pytest.mark.parametrize(
    "other",
    [torch.zeros(32, 6), (torch.zeros(8, 2),), {"last_hidden_state": torch.zeros(8, 4)}],
    ids=["packed patches", "tuple", "mapping"],
)
def test_a_batch_that_cannot_be_divided_stays_whole(other):
    batch = {"input_ids": IDS, "other": other}
    assert first_samples(batch, 3) == batch


def test_nested_tensors_move_and_the_rest_stays():
    Pair = collections.namedtuple("Pair", "a b")
    batch = {
        "flag": True,
        "nothing": None,
        "text": "word",
        "encoder_outputs": BaseModelOutput(last_hidden_state=torch.zeros(2, 3)),
        "pair": Pair(torch.zeros(2), [torch.zeros(1), {"deep": torch.zeros(4)}]),
    }
    moved = to_device(batch, "meta")
    assert moved["encoder_outputs"].last_hidden_state.is_meta and isinstance(moved["encoder_outputs"], BaseModelOutput)
    assert moved["pair"].a.is_meta and moved["pair"].b[0].is_meta and moved["pair"].b[1]["deep"].is_meta
    assert (moved["flag"], moved["nothing"], moved["text"]) == (True, None, "word")


def test_masks_of_padding_are_told_from_masks_of_attention():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert torch.equal(padding_mask({"attention_mask": mask.float()}), mask.bool())
    assert padding_mask({"attention_mask": None}) is None and padding_mask({}) is None
    assert padding_mask({"attention_mask": torch.zeros(2, 1, 3, 3), "input_ids": mask}) is None
    assert padding_mask({"attention_mask": torch.ones(2, 3, 3), "input_ids": mask}) is None
    choices = torch.stack([mask, 1 - mask])
    assert torch.equal(padding_mask({"attention_mask": choices, "input_ids": choices}), choices.flatten(0, 1).bool())


def test_accepted_names_are_those_of_the_forward_and_of_the_models_inside_it():
    names = accepted_names(zoo.make("bert", "ForSequenceClassification"))
    assert {"input_ids", "labels", "encoder_hidden_states", "output_attentions"} <= names
    assert not names & {"text", "idx", "self", "kwargs", "pixel_values"}
    assert "interpolate_pos_encoding" in accepted_names(zoo.make("vit", "ForImageClassification"))
    assert "attention_mask" not in accepted_names(zoo.make("resnet-basic", "ForImageClassification"))


def test_descriptions():
    assert described(IDS) == "int64 (8, 12)"
    assert described([IDS, IDS]) == "a list of 2 (int64 (8, 12), ...)"
    assert described(IDS.numpy()) == "ndarray int64 (8, 12)"
    assert described(True) == "True" and described({"a": 1}) == "a dict" and described([]) == "a list of 0"


# One forward pass


def decoder(**options):
    config = tf.BertConfig(**zoo.TEXT, **zoo.BODY, is_decoder=True, **options)
    return tf.BertLMHeadModel(config).eval()


@pytest.mark.parametrize(
    "model",
    [
        lambda: decoder(),
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**zoo.TEXT, **zoo.BODY, is_decoder=True)).eval(),
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2)).eval(),
    ],
    ids=["keyword", "no keyword", "gpt2"],
)
def test_no_pass_makes_a_cache_and_the_config_stays_as_it_was(model):
    model = model()
    before = model.config.to_dict()
    assert before["use_cache"] is True
    outputs = run(model, {"input_ids": IDS, "use_cache": True, "return_dict": False})
    assert not any(isinstance(value, tf.Cache) for value in outputs.values()) and outputs.logits is not None
    assert model.config.to_dict() == before
    with pytest.raises(AttributeError):
        run(model, {"input_ids": IDS, "attention_mask": 3.0})
    assert model.config.to_dict() == before


def test_chunked_layers_see_whole_sequences_inside_and_are_chunked_again_afterwards():
    config = tf.BertConfig(**zoo.TEXT, **zoo.BODY, chunk_size_feed_forward=4)
    model = tf.BertModel(config).eval()
    seen = []
    model.encoder.layer[0].intermediate.dense.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    odd = {"input_ids": IDS[:, :11]}
    with torch.no_grad():
        run(model, odd)
        assert seen == [11] and model.encoder.layer[0].chunk_size_feed_forward == 4
        whole = run(model, {"input_ids": IDS}).last_hidden_state
        assert torch.allclose(whole, model(IDS).last_hidden_state, atol=1e-6)
        assert seen == [11, 12, 4, 4, 4]
        with pytest.raises(ValueError, match="chunk"), unchunked(model):
            raise ValueError("chunk")
    assert model.encoder.layer[1].chunk_size_feed_forward == 4


SPEECH = {
    "vocab_size": 61, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 16, "d_model": 32,
    "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 3, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip


def whisper():
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**SPEECH)).eval()


def test_an_encoder_decoder_shifts_the_labels_itself():
    model, labels = whisper(), torch.tensor([[7, 8, 9, -100], [10, 11, -100, -100]])
    batch = {"input_features": torch.randn(2, 16, 40), "labels": labels}
    read = []
    model.model.decoder.embed_tokens.register_forward_hook(lambda m, args, out: read.append(args[0].tolist()))
    with torch.no_grad():
        ours = run(model, batch)
        given = run(model, {**batch, "decoder_input_ids": torch.tensor([[3, 5], [3, 6]])})
    assert read == [[[3, 7, 8, 9], [3, 10, 11, 0]], [[3, 5], [3, 6]]]
    assert ours.logits.shape == (2, 4, 61) and given.logits.shape == (2, 2, 61)
    assert decoder_mask(model, batch).tolist() == [[True, True, True, False], [True, True, False, False]]
    assert decoder_mask(model, {**batch, "decoder_input_ids": labels}) is None
    assert decoder_mask(model, {"decoder_attention_mask": labels > 0}).tolist() == (labels > 0).tolist()


def test_labels_of_other_models_are_never_run():
    model = zoo.make("bert", "ForTokenClassification")
    assert run(model, {"input_ids": IDS, "labels": torch.full_like(IDS, 99)}).get("loss") is None
    assert decoder_mask(model, {"input_ids": IDS, "labels": IDS}) is None
    classifier = tf.WhisperForAudioClassification(tf.WhisperConfig(**SPEECH)).eval()
    batch = {"input_features": torch.randn(2, 16, 40), "labels": torch.tensor([-1, 99])}
    assert run(classifier, batch).logits.shape[0] == 2


ROW = {"input_ids": [5, 6], "labels": 0}


@pytest.mark.parametrize(
    "rows, told",
    [
        ([{"text": "a text", "labels": 0}] * 2, "'text' holds text that is not tokenized .*tokenizer.row.'text'"),
        ([ROW | {"text": "a text"}] * 2, r"leave it out, dataset.remove_columns\(\['text'\]\)"),
        ([ROW | {"labels": "good"}] * 2, "'labels' holds words .'good'.*label2id"),
        ([{"text": "a text", "label": "good"}] * 2, "not tokenized .*'label' holds words"),
        ([ROW, ROW | {"input_ids": [5]}], "'input_ids' has rows of 1 to 2 values.*DataCollatorWithPadding"),
        ([ROW, ROW | {"labels": None}], "'labels' is None in row 1"),
        ([{"labels": 0}] * 2, "none of what a model reads"),
        ([(1, 2)], "columns of text have to be left out"),
    ],
)
def test_the_column_that_makes_no_batch_is_named(rows, told):
    assert re.search(told, unfit_columns(SimpleNamespace(dataset=rows)))


READING = {
    "whisper": (lambda: seq2seq_zoo.make("whisper"), {"input_features": (2, 8, 20), "decoder_input_ids": (2, 6)}),
    "an encoder of sounds": (
        lambda: tf.WhisperForAudioClassification(seq2seq_zoo.CONFIGS["whisper"][1]),
        {"input_features": (2, 8, 20)},
    ),
    "images of two configs": (lambda: zoo.make("clip", "ForImageClassification"), {"pixel_values": (2, 1, 8, 8)}),
    "texts and images": (
        lambda: tf.CLIPModel(zoo.CONFIGS["clip"]),
        {"input_ids": (2, 6), "attention_mask": (2, 6), "pixel_values": (2, 1, 8, 8)},
    ),
    "texts with one end": (
        lambda: tf.BartForSequenceClassification(seq2seq_zoo.CONFIGS["bart"][1]),
        {"input_ids": (2, 6), "attention_mask": (2, 6), "decoder_input_ids": (2, 6)},
    ),
}


@pytest.mark.parametrize("kind", READING)
def test_examples_are_what_a_model_reads(kind):
    make, shapes = READING[kind]
    model = make().eval()
    inputs = example_inputs(model, 2, 6)
    assert {name: tuple(value.shape) for name, value in inputs.items()} == shapes
    with torch.no_grad():
        assert model(**inputs)[0].isfinite().all()


def test_examples_of_other_inputs_are_refused_by_name():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = tf.Wav2Vec2Config(**sizes, conv_dim=(8,), conv_kernel=(4,), conv_stride=(2,), num_feat_extract_layers=1)
    with pytest.raises(RMTKDError, match="Wav2Vec2Model reads 'input_values'"):
        example_inputs(tf.Wav2Vec2Model(config), 2)
