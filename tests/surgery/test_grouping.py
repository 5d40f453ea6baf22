"""Texts regrouped by length: the same samples, the same activations, and only where nothing can depend on it."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from optimum_rmtkd import RMTKDConfig, narrow
from optimum_rmtkd.batches import collect_batches
from optimum_rmtkd.surgery.calibration import Calibration, calibrate, points_of
from optimum_rmtkd.surgery.families import FAMILIES
from optimum_rmtkd.surgery.grouping import by_length
from optimum_rmtkd.surgery.surgeon import anatomy_of

from ..tables import some_slow
from . import zoo


RECIPE = RMTKDConfig(sample_unit="token", calibration_samples=48)
TEXT = zoo.batches("bert")


@pytest.fixture
def bert():
    return zoo.make("bert", "ForSequenceClassification")


def points(model):
    anatomy = anatomy_of(model, RECIPE)
    return points_of(anatomy, list(anatomy.sites.values()))


def regrouped(model, data):
    return by_length(model, data, points(model))


def untouched(model, data) -> bool:
    after = regrouped(model, data)
    return len(after) == len(data) and all(a is b for a, b in zip(after, data, strict=True))


def tagged(batches):
    """Batches whose samples carry a number as their label."""
    made, at = [], 0
    for batch in batches:
        size = len(batch["input_ids"])
        made.append(batch | {"labels": torch.arange(at, at + size)})
        at += size
    return made


def test_the_same_samples_in_batches_of_like_length(bert):
    before = tagged(TEXT)
    after = regrouped(bert, before)
    # batches of 8 x 12 positions: ten of length 9 fit, eight of length 12
    assert [tuple(b["input_ids"].shape) for b in after] == [(10, 9), (10, 9), (8, 12), (8, 12), (8, 12), (4, 12)]

    def by_sample(batches):
        return {int(i): row for b in batches for i, row in zip(b["labels"], logits(b), strict=True)}

    def logits(batch):
        return zoo.outputs(bert, {k: v for k, v in batch.items() if k != "labels"})

    mine, theirs = by_sample(before), by_sample(after)
    assert mine.keys() == theirs.keys() == set(range(48))
    assert all(torch.allclose(mine[i], theirs[i], atol=1e-5) for i in mine)


ALIKE = ["bert", "roberta", "distilbert", "electra"]


@pytest.mark.parametrize("name", some_slow([*ALIKE, "mpnet", "albert"], ALIKE))
def test_moments_are_those_of_the_collator_s_batches(name):
    model = zoo.make(name, "ForSequenceClassification")
    hidden = anatomy_of(model, RECIPE).sites["hidden"].points
    batches = regrouped(model, TEXT)
    assert len(batches[0]["input_ids"]) == 10
    ours, theirs = (
        calibrate(model, data, Calibration(points(model), hidden, RECIPE), progress=False) for data in (batches, TEXT)
    )
    for point, moments in ours.moments.items():
        other = theirs.moments[point]
        assert moments.count == other.count
        assert torch.allclose(moments.covariance, other.covariance, rtol=1e-4, atol=1e-5 * other.covariance.max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deberta-v2", "deberta-v3"])
def test_what_is_made_of_relative_positions_is_no_sample(name):
    """It has one row for all samples, or none of its own."""
    assert len(regrouped(zoo.make(name, "ForSequenceClassification"), TEXT)[0]["input_ids"]) == 10


def test_labels_of_tokens_travel_with_their_samples():
    model = zoo.make("bert", "ForTokenClassification")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [11, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": torch.where(ids > 0, ids, -100)}
    after = regrouped(model, [batch, batch])
    assert [b["input_ids"].shape[1] for b in after] == [2, 4]
    for part in after:
        assert torch.equal(part["labels"], torch.where(part["attention_mask"].bool(), part["input_ids"], -100))
    rows = sorted(row[row > 0].tolist() for part in after for row in part["input_ids"])
    assert rows == sorted(2 * [[5, 6, 7, 8], [9, 10], [11]])


def test_batches_of_different_padding_are_put_together(bert):
    short = [{k: v[:, :7] for k, v in batch.items()} for batch in TEXT[:2]]
    # 16 samples of length 7, four of 9 and four of 12; 8 x 12 positions a batch
    shapes = [tuple(b["input_ids"].shape) for b in regrouped(bert, [*short, TEXT[2]])]
    assert shapes == [(13, 7), (8, 12), (3, 12)]


# Where something could depend on the padding or on the grouping


def changed(**values):
    return [batch | {name: make(batch) for name, make in values.items()} for batch in TEXT]


LEFT = [{k: v.flip(1) for k, v in batch.items()} for batch in TEXT]


@pytest.mark.parametrize(
    "data",
    [
        LEFT,
        changed(attention_mask=lambda b: torch.ones(8, 1, 12, 12)),
        changed(attention_mask=lambda b: torch.ones(8, 12, 12)),
        changed(attention_mask=lambda b: b["attention_mask"] * 0.5),
        changed(position_ids=lambda b: torch.arange(12).expand(8, 12)),
        changed(inputs_embeds=lambda b: torch.zeros(8, 12, 32)),
        changed(labels=lambda b: b["input_ids"]),  # labels at padding
        changed(labels=lambda b: torch.rand(8, 12)),  # twelve labels of several at once
        changed(output_attentions=lambda b: True),
        changed(token_type_ids=lambda b: None),
        changed(input_ids=lambda b: b["input_ids"][:, None].expand(8, 2, 12)),
        [{"input_ids": batch["input_ids"]} for batch in TEXT],
        [TEXT[0], {"input_ids": TEXT[1]["input_ids"]}],
        [TEXT[0] | {"labels": torch.zeros(8, 5)}, TEXT[1] | {"labels": torch.zeros(8, 6)}],
        [{"pixel_values": torch.zeros(8, 3, 4, 4), "attention_mask": TEXT[0]["attention_mask"]}],
    ],
    ids=[
        "left padding", "four axes", "who looks at whom", "fractions", "positions", "embeddings", "labels at padding",
        "twelve labels", "flag", "None", "choices", "no mask", "a batch without a mask", "labels of two widths",
        "pixels",
    ],
)  # fmt: skip
def test_other_batches_stay_as_the_collator_made_them(bert, data):
    assert untouched(bert, data)


def test_labels_that_say_nothing_about_padding_are_no_obstacle(bert):
    for labels in (torch.zeros(8, dtype=torch.long), torch.rand(8), torch.rand(8, 3)):
        assert not untouched(bert, [batch | {"labels": labels} for batch in TEXT])
    spans = [batch | {"start_positions": torch.ones(8), "end_positions": torch.ones(8)} for batch in TEXT]
    assert not untouched(zoo.make("bert", "ForQuestionAnswering"), spans)


def test_undeclared_families_keep_their_batches(bert, monkeypatch):
    gpt = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2)).eval()
    assert by_length(gpt, TEXT, []) is TEXT
    family = FAMILIES["bert"]
    monkeypatch.setitem(FAMILIES, "bert", type(family)(family.name, family.model_types, family.layout))
    assert untouched(bert, TEXT)


def test_normalisation_over_a_batch_keeps_the_batches(bert):
    bert.bert.encoder.layer[0].output.add_module("batch_norm", nn.BatchNorm1d(32, track_running_stats=False))
    assert untouched(bert, TEXT)


def test_a_model_that_padding_changes_is_found_out_by_its_activations(bert):
    layer = bert.bert.encoder.layer[0].intermediate
    hook = layer.dense.register_forward_pre_hook(lambda module, args: (args[0] + args[0].mean(1, keepdim=True),))
    assert untouched(bert, TEXT)
    hook.remove()
    assert not untouched(bert, TEXT)


def test_half_precision_is_no_obstacle():
    assert not untouched(zoo.make("bert", "ForSequenceClassification").bfloat16(), TEXT)


@pytest.mark.parametrize("length", [13, 16])
def test_chunked_feed_forward(length):
    torch.manual_seed(0)
    config = tf.BertConfig(**zoo.TEXT, **zoo.BODY, chunk_size_feed_forward=4)
    plain = tf.BertConfig(**zoo.TEXT, **zoo.BODY)
    model, data = tf.BertForSequenceClassification(config).eval(), []
    for number in range(6):
        ids = torch.randint(5, 60, (8, 16))
        mask = (torch.arange(16) < length - number % 3).expand(8, 16).long()
        data.append({"input_ids": ids, "attention_mask": mask})
    same = tf.BertForSequenceClassification(plain).eval()
    same.load_state_dict(model.state_dict())
    recipe = RMTKDConfig(target_reduction=0.3, round_to=4, min_width=4, calibration_samples=48)
    small, other = (narrow(m, data, recipe, progress=False) for m in (model, same))
    assert small.config.chunk_size_feed_forward == 4
    for name, tensor in other.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.allclose(small(**data[0]).logits, other(**data[0]).logits, atol=1e-5)
    with pytest.raises(ValueError, match="chunk"):
        small(input_ids=ids[:, :13])  # as the dense one does


def test_the_collected_batches_are_what_is_regrouped(bert):
    assert len(regrouped(bert, collect_batches(bert, tagged(TEXT), 20))[0]["input_ids"]) == 10
