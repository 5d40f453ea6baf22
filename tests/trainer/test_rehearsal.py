"""Models without answers that can be compared: said before anything is trained or cut, not after it."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import (
    BertForPreTraining,
    ViTConfig,
    ViTForMaskedImageModeling,
    XLNetConfig,
    XLNetForQuestionAnswering,
    default_data_collator,
)

from optimum_rmtkd import RMTKDError
from optimum_rmtkd.distillation import CorrelationDistance, KLDivergence, TaskLoss

from .conftest import tiny_bert, toy_data
from .test_own_loss import terms


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def masked_images(samples=16, masked=True):
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.rand(3, 16, 16, generator=generator)} for _ in range(samples)]
    for row in rows if masked else ():
        row["bool_masked_pos"] = torch.rand(16, generator=generator) < 0.5
    return rows


def vit():
    torch.manual_seed(0)
    return ViTForMaskedImageModeling(ViTConfig(image_size=16, patch_size=4, encoder_stride=4, **SIZES))


def xlnet():
    torch.manual_seed(0)
    return XLNetForQuestionAnswering(
        XLNetConfig(vocab_size=60, d_model=32, n_layer=2, n_head=4, d_inner=64, start_n_top=2, end_n_top=2)
    )


def spans(samples=16):
    return [
        {k: v for k, v in row.items() if k != "labels"} | {"start_positions": 2, "end_positions": 4}
        for row in toy_data(samples)
    ]


def sentence_pairs(samples=16):
    return [row | {"labels": row["input_ids"], "next_sentence_label": row["labels"]} for row in toy_data(samples)]


CASES = {
    "masked images": (vit, masked_images, {}),
    "a beam of spans": (xlnet, spans, {"form": "factored"}),
    "two heads": (lambda: tiny_bert(cls=BertForPreTraining), sentence_pairs, {}),
}
SLOW = [pytest.param(name, marks=() if name == "masked images" else pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("case", SLOW)
def test_they_train_on_the_terms_that_are_left(make_trainer, case, caplog):
    model, rows, recipe = CASES[case]
    given = {"train_dataset": rows(), "eval_dataset": rows(8), "data_collator": default_data_collator}
    trainer = make_trainer(model(), recipe=recipe, max_steps=4, trainer_kwargs=given)
    trainer.train()
    assert "KLDivergence is left out" in caplog.text and trainer.stages[0].accepted
    last = terms(trainer)[-1]
    assert "loss/task" in last and "loss/kl" not in last
    assert "loss/hidden" in last or case == "a beam of spans"


@pytest.mark.parametrize("term", [KLDivergence, CorrelationDistance])
def test_a_term_that_was_named_is_refused_at_once(make_trainer, term):
    given = {"train_dataset": masked_images(), "eval_dataset": None, "data_collator": default_data_collator}
    trainer = make_trainer(vit(), objectives=[TaskLoss(0.5), term()], trainer_kwargs=given)
    with pytest.raises(RMTKDError, match="needs logits; the student returned .*reconstruction"):
        trainer.train()
    assert trainer.state.global_step == 0 and not trainer.stages


def test_a_teacher_without_such_answers_is_refused_at_once(make_trainer):
    class Wider(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_bert(3, num_labels=5)

        def forward(self, input_ids, attention_mask=None):
            return dict(self.inner(input_ids, attention_mask))

    trainer = make_trainer(recipe={"fit_share": 0.5}, teacher_model=Wider())
    with pytest.raises(RMTKDError, match=r"Logits of the student are \(4, 2\), of the teacher \(4, 5\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_data_from_which_no_loss_can_be_computed_are_refused_at_once(make_trainer):
    rows = masked_images(masked=False)
    given = {"train_dataset": rows, "eval_dataset": None, "data_collator": default_data_collator}
    trainer = make_trainer(vit(), trainer_kwargs=given)
    with pytest.raises(RMTKDError, match="returns no loss on a batch of pixel_values, but reconstruction"):
        trainer.train()


def test_a_head_that_answers_loses_no_term(make_trainer, caplog):
    trainer = make_trainer(max_steps=2)
    with caplog.at_level(logging.INFO, logger="optimum_rmtkd"):
        trainer.train()
    assert "left out" not in caplog.text and "loss/kl" in terms(trainer)[-1]
