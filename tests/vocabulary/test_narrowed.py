"""Narrowed models are trimmed, trimmed models are narrowed; either way they reload, and the target counts both."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from optimum_rmtkd import RMTKDConfig, count_parameters, narrow, trim_vocabulary
from optimum_rmtkd.modeling_rmtkd import LowRankEmbedding
from optimum_rmtkd.models import uncut_parameters

from ..surgery import zoo
from .conftest import DOMAIN, tiny


def batches(tokenizer, texts=DOMAIN):
    encoded = [dict(tokenizer(texts[i : i + 12], padding=True, return_tensors="pt")) for i in range(0, len(texts), 12)]
    return [batch | {"labels": torch.arange(len(batch["input_ids"])) % 2} for batch in encoded]


def recipe(**options) -> RMTKDConfig:
    return RMTKDConfig(round_to=1, min_width=4, **options)


def logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tokenizer(DOMAIN[:8], padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize(("kind", "family"), [("wordpiece", "bert"), ("byte_level", "roberta")])
def test_a_narrowed_model_with_a_factorised_table_is_trimmed_and_reloads(kind, family, tokenizers, tmp_path):
    tokenizer = tokenizers(kind)
    model = tiny(family, tokenizer, max_position_embeddings=64)
    student = narrow(model, batches(tokenizer), recipe(target_reduction=0.2, sites=("embedding",)))
    assert any(isinstance(m, LowRankEmbedding) for m in student.modules())
    small, cut, report = trim_vocabulary(student, tokenizer, DOMAIN)
    assert type(small) is type(student) and report.rows_after < report.rows_before
    assert torch.equal(logits(student, tokenizer), logits(small, cut))
    small.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert zoo.close(logits(again, cut), logits(small, cut))
    assert uncut_parameters(again) == count_parameters(model)


@pytest.mark.slow
def test_a_narrowed_masked_model_is_trimmed_and_reloads(tokenizers, tmp_path):
    tokenizer = tokenizers("wordpiece")
    model = tiny("bert_mlm", tokenizer, max_position_embeddings=64)
    data = [b | {"labels": b["input_ids"]} for b in batches(tokenizer)]
    student = narrow(model, data, recipe(target_reduction=0.3))
    small, cut, _ = trim_vocabulary(student, tokenizer, DOMAIN)
    small.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert zoo.close(logits(again, cut), logits(small, cut))
    assert logits(again, cut).shape[-1] == len(cut)


def test_a_target_counts_what_trimming_removed(tokenizers):
    tokenizer = tokenizers("wordpiece")
    model = tiny("bert", tokenizer, max_position_embeddings=64)
    small, cut, report = trim_vocabulary(model, tokenizer, DOMAIN)
    student = narrow(small, batches(cut), recipe(target_reduction=0.5))
    left = count_parameters(student) / count_parameters(model)
    assert left == pytest.approx(0.5, abs=0.03)
    assert report.removed_share > 0.05
    assert uncut_parameters(student) == count_parameters(model)
    assert student.config.rmtkd["provenance"]["parameters_before"] == count_parameters(model)
