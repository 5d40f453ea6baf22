"""Teacher terms do not depend on how far a batch is padded."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from optimum_rmtkd.distillation.counts import answers_that_count, count_units, masked_labels
from optimum_rmtkd.distillation.objectives.answers import Answers

from ..tables import covering, some_slow
from .conftest import tiny_bert


NONE = {"schedule": "none", "target_reduction": None}


def gpt2(seed):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32))


def llama(seed):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, max_position_embeddings=64))


def bart(seed):
    torch.manual_seed(seed)
    sizes = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(
        vocab_size=60, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32, **sizes
    )
    return BartForConditionalGeneration(config)


MODELS = {
    "gpt2": gpt2,
    "llama": llama,
    "masked": lambda seed: tiny_bert(seed, BertForMaskedLM),
    "tokens": lambda seed: tiny_bert(seed, BertForTokenClassification, num_labels=5),
    "bart": bart,
}
DIVERGENCES = ["kl", "jensen_shannon", "skew_kl", "correlation"]
FEATURES = [{"name": "projected_feature", "projection": None}, "attention_relation"]
CASES = covering(
    list(MODELS), DIVERGENCES + FEATURES, without=[("gpt2", "attention_relation")], times=2
)  # it has no projections


def silent(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def texts(kind, length, left=False, counted=True):
    """Eight rows of 4 to 11 tokens, padded with zeros to `length`; labels are padded likewise, and so they count."""
    generator, rows = torch.Generator().manual_seed(5), []
    for i in range(8):
        ids = torch.randint(5, 60, (4 + i,), generator=generator)
        labels = ids % 5 if kind == "tokens" else ids.clone()
        room = (length - len(ids), 0) if left else (0, length - len(ids))
        row = {"input_ids": F.pad(ids, room), "attention_mask": F.pad(torch.ones_like(ids), room)}
        if kind == "bart":
            row["decoder_attention_mask"] = row["attention_mask"]
        rows.append(row | {"labels": F.pad(labels, room, value=0 if counted else -100)})
    return rows


def term(make_trainer, kind, objective, rows, out):
    trainer = make_trainer(
        silent(MODELS[kind](0)),
        recipe=NONE,
        out=out,
        teacher_model=MODELS[kind](1),
        objectives=[objective],
        max_steps=1,
        trainer_kwargs={"train_dataset": rows, "eval_dataset": None},
    )
    trainer.train()
    return next(e["loss"] for e in trainer.state.log_history if "loss" in e)


@pytest.mark.parametrize(("kind", "objective"), CASES)
def test_padding_further_changes_no_teacher_term(make_trainer, kind, objective):
    short, long, clean = (
        term(make_trainer, kind, objective, texts(kind, length, counted=counted), f"{length}{counted}")
        for length, counted in ((12, True), (24, True), (12, False))
    )
    assert short > 0 and short == pytest.approx(long, rel=1e-3) and short == pytest.approx(clean, rel=1e-3)


@pytest.mark.parametrize("objective", some_slow(DIVERGENCES, ["kl", "correlation"]))
def test_padding_on_the_left(make_trainer, objective):
    """Llama's positions are relative: its answers do not depend on the side. The pad before the first token answers
    for it, and does not count."""
    right, left, far = (
        term(make_trainer, "llama", objective, texts("llama", length, left), f"{length}{left}")
        for length, left in ((12, False), (12, True), (24, True))
    )
    assert right > 0 and left == pytest.approx(right, rel=1e-3) and far == pytest.approx(right, rel=1e-3)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_padded_labels_and_accumulation(make_trainer, accumulation):
    """A mean over all answers that count, however the rows are dealt out: rows of 4 to 11 tokens have 3 to 10."""
    trainer = make_trainer(
        silent(gpt2(0)),
        recipe=NONE,
        teacher_model=gpt2(1),
        objectives=["kl"],
        max_steps=1,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        trainer_kwargs={"train_dataset": texts("gpt2", 24), "eval_dataset": None},
    )
    student, teacher = trainer.model.eval(), gpt2(1).eval()
    total = 0.0
    with torch.no_grad():
        for row in texts("gpt2", 11):
            ids = row["input_ids"][row["attention_mask"].bool()][None]
            p, q = (model(ids).logits[:, :-1].log_softmax(-1) for model in (teacher, student))
            total += float((p.exp() * (p - q)).sum())
    trainer.train()
    found = next(e["loss/kl"] for e in trainer.state.log_history if "loss" in e)
    assert found == pytest.approx(total / sum(range(3, 11)), rel=1e-3)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_labels_of_padding_draw_one_warning(make_trainer, caplog, kind):
    for counted in (True, False):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer = make_trainer(
                MODELS[kind](0),
                recipe=NONE,
                out=str(counted),
                objectives=["task"],
                max_steps=2,
                trainer_kwargs={"train_dataset": texts(kind, 12, counted=counted), "eval_dataset": None},
            )
            trainer.train()
        assert caplog.text.count("Set such labels to -100") == int(counted)


def test_which_answers_count():
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1]])
    labels = torch.tensor([[7, -100, 8, 0], [0, 0, 9, 9]])
    batch = {"input_ids": labels.clamp_min(0), "attention_mask": mask, "labels": labels}
    assert answers_that_count(batch, shifted=False).int().tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    # position i answers for label i + 1: both have to be real
    assert answers_that_count(batch, shifted=True).int().tolist() == [[0, 1, 0], [0, 0, 1]]
    assert masked_labels(batch, shifted=False) == 3 and masked_labels(batch, shifted=True) == 2
    assert count_units(batch, shifted=True).tolist() == [2, 5, 5, 2]
    # the encoder's mask says nothing of a decoder's labels
    assert answers_that_count(batch, shifted=False, decoding=True).int().tolist() == [[1, 0, 1, 1], [1, 1, 1, 1]]
    batch["decoder_attention_mask"] = mask
    assert answers_that_count(batch, shifted=False, decoding=True).int().tolist() == [[1, 0, 1, 0], [0, 0, 1, 1]]
    # labels of other positions than the mask's
    batch = {"attention_mask": torch.ones(2, 9), "labels": labels}
    assert answers_that_count(batch, shifted=False).int().tolist() == [[1, 0, 1, 1], [1, 1, 1, 1]]
    assert masked_labels(batch, shifted=False) == 0


def test_whose_labels_are_a_decoders():
    from transformers import T5Config, T5ForTokenClassification

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    tagger = T5ForTokenClassification(T5Config(vocab_size=60, **sizes))
    assert tagger.config.is_encoder_decoder is not None
    assert Answers.of(bart(0)).decoding and not Answers.of(tagger).decoding and not Answers.of(gpt2(0)).decoding
