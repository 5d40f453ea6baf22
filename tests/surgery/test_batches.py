"""Calibration data as users have it: it works as it is, or is refused by name before the first pass."""

from __future__ import annotations

import logging

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from torch.utils.data import DataLoader, TensorDataset

from optimum_rmtkd import CalibrationError, RMTKDConfig, RMTKDError, analyze, narrow
from optimum_rmtkd.batches import collect_batches
from optimum_rmtkd.surgery import calibration
from optimum_rmtkd.surgery.surgeon import check_data

from . import zoo


RECIPE = RMTKDConfig(target_reduction=0.3, round_to=4, min_width=4, calibration_samples=48)


@pytest.fixture
def bert():
    return zoo.make("bert", "ForSequenceClassification")


@pytest.fixture
def vit():
    return zoo.make("vit", "ForImageClassification")


TEXT = zoo.batches("bert")
IMAGES = zoo.batches("vit")
ROWS = [{k: v[i] for k, v in b.items()} | {"labels": torch.tensor(i % 3)} for b in TEXT for i in range(8)]
TABLE = datasets.Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in ROWS])


def refusal(model, data, recipe=RECIPE, error=CalibrationError):
    """The message of a refusal that comes before any moments are taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration.Calibration, "update", lambda *_: pytest.fail("the calibration has begun"))
        with pytest.raises(error) as caught:
            narrow(model, data, recipe, progress=False)
    assert isinstance(caught.value, RMTKDError)
    return str(caught.value)


def collected(model, data, samples=48):
    return collect_batches(model, data, samples)


# What works as it is


@pytest.mark.parametrize(
    "data",
    [
        DataLoader(TABLE.with_format("torch"), batch_size=8),
        TABLE.to_iterable_dataset().batch(8).with_format("torch"),
        DataLoader(ROWS, batch_size=8),
        [tf.BatchEncoding(batch) for batch in TEXT],
        [{k: v.numpy() for k, v in batch.items()} for batch in TEXT],
        [{"attention_mask": None, "token_type_ids": None} | {"input_ids": b["input_ids"]} for b in TEXT],
        [{"labels": torch.tensor(1.0)} | batch for batch in TEXT],
        [batch | {"output_attentions": True, "return_dict": False, "use_cache": True} for batch in TEXT],
        [batch | {"attention_mask": batch["attention_mask"].float()} for batch in TEXT],
        [batch | {"attention_mask": torch.zeros(8, 1, 12, 12)} for batch in TEXT],
        [batch | {"position_ids": torch.arange(12)[None]} for batch in TEXT],
        [{k: torch.cat([b[k] for b in TEXT * 2]) for k in TEXT[0]}],
        [{k: v.numpy().astype(np.uint16) for k, v in batch.items()} for batch in TEXT],
        [batch | {"attention_mask": batch["attention_mask"] * (torch.arange(8) > 1)[:, None]} for batch in TEXT],
        [batch | {7: torch.ones(8), "meta": {"a": ["x"]}, "labels": ["x"] * 8} for batch in TEXT],
        [TEXT[0], {k: v[:0] for k, v in TEXT[1].items()}, *TEXT[2:]],
    ],
    ids=[
        "tensor dataset", "stream in batches", "default collate", "BatchEncoding", "numpy", "None", "scalar first",
        "flags", "float mask", "additive mask", "positions", "one large batch", "narrow numbers",
        "texts of padding alone", "odd columns", "an empty batch",
    ],
)  # fmt: skip
def test_text_as_users_have_it(bert, data):
    small = narrow(bert, data, RECIPE, progress=False)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in bert.parameters())


@pytest.mark.parametrize("task", ["ForTokenClassification", "ForQuestionAnswering"])
def test_masks_that_know_nothing_of_padding_serve_every_likelihood(task):
    data = [batch | {"attention_mask": torch.zeros(8, 1, 12, 12)} for batch in TEXT]
    model = zoo.make("bert", task)
    small = narrow(model, data, RECIPE, progress=False)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_flags_reach_the_model(vit):
    data = [{"interpolate_pos_encoding": True, "pixel_values": torch.randn(8, 1, 12, 10)} for _ in range(6)]
    assert all(b["interpolate_pos_encoding"] is True for b in collected(vit, data))
    small = narrow(vit, data, RECIPE, progress=False)
    assert small(**data[0]).logits.shape == (8, 3)


def test_a_generator_is_read_once_and_no_further_than_needed(bert):
    read = []

    def batches():
        for number, batch in enumerate(TEXT):
            read.append(number)
            yield batch

    data = batches()
    narrow(bert, data, RECIPE.replace(calibration_samples=20), progress=False)
    assert read == [0, 1, 2]
    next(data), next(data), next(data)
    assert "a generator gives its batches once only" in refusal(bert, data)


def test_no_more_samples_than_asked_for(bert):
    for wanted, found in ((20, 20), (8, 8), (3, 3), (1000, 48)):
        assert sum(len(b["input_ids"]) for b in collected(bert, TEXT, wanted)) == found
    large = [{k: torch.cat([b[k] for b in TEXT]) for k in TEXT[0]} | {"position_ids": torch.arange(12)[None]}]
    (part,) = collected(bert, large, 5)
    assert part["input_ids"].shape == (5, 12) and part["position_ids"].shape == (1, 12)


def test_floats_of_numpy_come_in_the_default_precision_and_whole_numbers_as_they_are(vit, bert):
    (images,) = collected(vit, [{"pixel_values": np.random.rand(8, 1, 8, 8)}])
    assert images["pixel_values"].dtype == torch.float32
    (texts,) = collected(bert, [{"input_ids": np.ones((8, 12), np.int32)}])
    assert texts["input_ids"].dtype == torch.int32


def test_columns_that_the_forward_does_not_take_are_left_out_and_named_once(bert, caplog):
    data = [b | {"text": ["a"] * 8, "idx": torch.arange(8), "length": torch.ones(8)} for b in TEXT]
    with caplog.at_level(logging.WARNING):
        found = collected(bert, data)
    assert all(batch.keys() == {"input_ids", "attention_mask"} for batch in found)
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert lines == [
        "BertForSequenceClassification does not take text, idx, length: left out of the calibration batches."
    ]


def test_every_mode_of_every_module_is_restored(bert):
    bert.train()
    bert.bert.encoder.layer[0].eval()
    modes = [module.training for module in bert.modules()]
    check_data(bert, TEXT, RECIPE)
    assert [module.training for module in bert.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bert.modules())


# What is refused: the data as a whole


@pytest.mark.parametrize(
    "data, words",
    [
        (TEXT[0], ["a dict with input_ids, attention_mask", r"as [batch]"]),
        (datasets.DatasetDict(train=TABLE), ["DatasetDict with train", "one split", "DataLoader"]),
        ("train.csv", ["a str", "DataLoader"]),
        (None, ["NoneType", "DataLoader"]),
        (ROWS, ["input_ids", "(12,)", "one row", "DataLoader(dataset, batch_size=32"]),
        (TABLE, ["'input_ids'", "list of 12", "DataLoader", "collator"]),
        (TABLE.with_format("torch"), ["input_ids", "(12,)", "one row", "DataLoader"]),
        (TABLE.batch(8), ["'input_ids'", "a list of 8 (a list of 12", 'set_format("torch")']),
        (DataLoader(TABLE, batch_size=8), ["'input_ids'", "a list of 12 (int64 (8,)", "tensor", 'format("torch")']),
        (
            DataLoader(TensorDataset(TEXT[0]["input_ids"], TEXT[0]["attention_mask"]), batch_size=4),
            ["is a list", "a list of 2 (int64 (4, 12)", "collate_fn"],
        ),
        (DataLoader(ROWS, batch_size=4, collate_fn=list), ["is a list", "a list of 4 (a dict", "mapping"]),
        ([{k: v.tolist() for k, v in batch.items()} for batch in TEXT], ["'input_ids'", "a list of 8", "tensor"]),
        ([{"text": ["a"] * 8, "idx": torch.arange(8)}], ["holds text, idx", "expected input_ids", "Tokenize"]),
        ([{"labels": torch.zeros(8)}], ["holds labels", "expected input_ids"]),
        ([b | {"past_key_values": tf.DynamicCache()} for b in TEXT], ["holds past_key_values", "Leave it out"]),
    ],
    ids=[
        "one batch", "splits", "a name", "None", "rows", "dataset", "tensor dataset", "batched lists",
        "transposed lists", "tuples", "lists of rows", "nested lists", "words", "labels alone", "cache",
    ],
)  # fmt: skip
def test_data_that_is_no_iterable_of_batches(bert, data, words):
    message = refusal(bert, data)
    assert all(word in message for word in words), message


# ... and its values


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda b: {"input_ids": b["input_ids"].float()}, ["input_ids", "float32 (8, 12)", "torch.long"]),
        (lambda b: {"input_ids": b["input_ids"] - 6}, ["input_ids", "holds -1", "-100"]),
        (lambda b: {"input_ids": b["input_ids"] + 6}, ["token id 66", "has 61 rows", "tokenizer of another model"]),
        (lambda b: {"token_type_ids": b["input_ids"] * 0 + 2}, ["token_type_ids up to 2", "has 2 types"]),
        (lambda b: {"attention_mask": b["attention_mask"][:, :9]}, ["(8, 9)", "(8, 12)", "Pad both alike"]),
        (lambda b: {"attention_mask": b["attention_mask"][:4]}, ["(4, 12)", "(8, 12)"]),
        (lambda b: {"position_ids": b["input_ids"] * 0 + 40}, ["position_ids go up to 40", "has 40 positions"]),
        (lambda b: {"input_ids": "a text"}, ["Column 'input_ids'", "a str", "expected a tensor"]),
        (
            lambda b: {"input_ids": np.array([[5, 6], [7]], dtype=object)},
            ["'input_ids'", "ndarray object", "a tensor"],
        ),
        (lambda b: {"position_ids": torch.arange(5)}, ["cannot run on calibration batch 0", "int64 (5,)"]),
        (lambda b: {"inputs_embeds": torch.randn(8, 12, 32)}, ["cannot run", "inputs_embeds float32 (8, 12, 32)"]),
        (lambda b: {"input_ids": b["input_ids"].to(torch.int16)}, ["input_ids", "int16 (8, 12)", "torch.long"]),
        (lambda b: {"input_ids": b["input_ids"].to(torch.uint16)}, ["input_ids", "uint16 (8, 12)", "torch.long"]),
        (lambda b: {"input_ids": b["input_ids"].to(torch.complex64)}, ["input_ids", "complex64 (8, 12)"]),
        (lambda b: {"attention_mask": b["attention_mask"][0]}, ["attention_mask has the shape (12,)", "(8, 12)"]),
        (lambda b: {"token_type_ids": b["input_ids"][:, :4] * 0}, ["token_type_ids has the shape (8, 4)", "(8, 12)"]),
        (lambda b: {"position_ids": torch.arange(12)[None] - 1}, ["position_ids hold -1"]),
        (
            lambda b: {k: v[:, None].expand(8, 2, 12) for k, v in b.items()},
            ["three axes, (batch, choices, length)", "multiple choice"],
        ),
    ],
)
def test_texts_that_do_not_fit(bert, change, words):
    message = refusal(bert, [batch | change(batch) for batch in TEXT])
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "name, limit", [("bert", 40), ("distilbert", 40), ("electra", 40), ("roberta", 38), ("camembert", 38)]
)
@pytest.mark.parametrize("function", [narrow, analyze])
def test_texts_beyond_the_positions(name, limit, function):
    model = zoo.make(name, "ForSequenceClassification")

    def of(length):
        ids = torch.randint(5, 60, (4, length))
        return [*TEXT[:2], {"input_ids": ids, "attention_mask": torch.ones_like(ids)}]

    with pytest.raises(CalibrationError) as caught:
        function(model, of(limit + 1), RECIPE, progress=False)
    message = str(caught.value)
    for words in (f"has {limit + 1} tokens", f"positions for {limit}", f"truncation=True, max_length={limit}"):
        assert words in message
    function(model, of(limit), RECIPE, progress=False)  # as the message advises


@pytest.mark.parametrize(
    "pixels, words",
    [
        (torch.randn(8, 3, 8, 8), ["3 channels", "takes 1"]),
        (torch.randn(8, 8, 8, 1), ["seem to be last"]),
        (torch.randn(8, 1, 10, 12), ["10 x 12", "8 x 8", "interpolate_pos_encoding=True"]),
        (torch.randn(1, 8, 8), ["three axes", "one row"]),
        ([torch.randn(1, 8, 8)] * 8, ["'pixel_values'", "a list of 8 (float32 (1, 8, 8)", "collator"]),
    ],
)
def test_images_that_do_not_fit(vit, pixels, words):
    message = refusal(vit, [{"pixel_values": pixels}] * 3)
    assert all(word in message for word in (*words, "pixel_values")), message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_are_found_wherever_they_are(vit, bert, value):
    pixels = IMAGES[3]["pixel_values"].clone()
    pixels[5, 0, 1, 2:4] = value
    message = refusal(vit, [*IMAGES[:3], {"pixel_values": pixels}])
    assert "pixel_values of calibration batch 3" in message and "2 values are NaN or infinite" in message
    message = refusal(bert, [{"inputs_embeds": torch.full((8, 12, 32), value)}])
    assert "inputs_embeds of calibration batch 0" in message


class Broken(torch.utils.data.Dataset):
    """Rows that grow, and one that cannot be read."""

    def __init__(self, broken: int | None = None):
        self.broken = broken

    def __len__(self):
        return 48

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError("row 21 cannot be read")
        return {"input_ids": torch.arange(5, 9 + (0 if self.broken else index % 3))}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_fails(bert, workers):
    message = refusal(bert, DataLoader(Broken(), batch_size=8, num_workers=workers))
    for words in ("DataLoader", "fails at batch 0", "DataCollatorWithPadding", "equal size"):
        assert words in message
    message = refusal(bert, DataLoader(Broken(21), batch_size=8, num_workers=workers))
    assert "fails at batch 2" in message and "OSError: row 21 cannot be read" in message


def test_a_later_batch_of_another_form_is_tried_before_the_first_pass(vit):
    message = refusal(vit, [*IMAGES[:2], {"pixel_values": torch.randn(8, 1, 10, 10)}])
    assert "cannot run on calibration batch 2" in message


def test_weights_and_data_of_other_precisions():
    model = zoo.make("resnet-basic", "ForImageClassification").double()
    message = refusal(model, zoo.batches("resnet-basic"))
    assert "torch.float32" in message and "torch.float64" in message and "cast" in message


def test_a_part_that_never_runs_is_named(bert):
    data = [{"inputs_embeds": torch.randn(8, 12, 32), "attention_mask": b["attention_mask"]} for b in TEXT]
    assert "bert.embeddings.word_embeddings" in refusal(bert, data)
    narrow(bert, data, RECIPE.replace(sites="intermediate", target_reduction=0.1), progress=False)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda labels: labels * 0 - 100, ["T5ForConditionalGeneration gets nothing but padding", "-100"]),
        (lambda labels: labels.float(), ["labels is float32 (8, 7)", "torch.long"]),
        (lambda labels: labels.tolist(), ["Column 'labels'", "a list of 8 (a list of 7", "collator"]),
        (lambda labels: labels * 0 - 1, ["labels of the calibration data hold -1", "-100"]),
        (lambda labels: labels + 55, ["labels of the calibration data go up to", "61 outputs"]),
        (lambda labels: labels[:, 0], ["encoder-decoder", "neither labels (one a token)", "DataCollatorForSeq2Seq"]),
        (lambda labels: None, ["encoder-decoder", "DataCollatorForSeq2Seq"]),
    ],
    ids=["all ignored", "floats", "lists", "below 0", "of another tokenizer", "classes", "None"],
)
def test_labels_that_a_decoder_cannot_read(change, words):
    config = tf.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    labels = torch.randint(10, 60, (8, 7))
    data = [batch | {"labels": change(labels)} for batch in TEXT]
    message = refusal(tf.T5ForConditionalGeneration(config).eval(), data, RECIPE.replace(form="factored"))
    assert all(word in message for word in words), message


def test_choices_beyond_the_positions():
    model = tf.BertForMultipleChoice(zoo.CONFIGS["bert"]).eval()
    data = [{"input_ids": torch.randint(5, 60, (4, 2, length))} for length in (12, 41)]
    message = refusal(model, data)
    assert "has 41 tokens" in message and "max_length=40" in message and "three axes" not in message
