"""An encoder-decoder is cut and distilled by the trainer that generates."""

from __future__ import annotations

import torch
from transformers import AutoModelForSeq2SeqLM, Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

from optimum_rmtkd import RMTKDConfig, RMTKDSeq2SeqTrainer, count_parameters
from optimum_rmtkd.trainer.swap.architecture import skeleton

from .conftest import RECIPE


T5 = {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}


def copies(samples=48):
    """A text, of which the first words are to be said again."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, 60, (samples, 8), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[:4].clone()} for row in rows]


def test_what_a_checkpoint_holds_apart_stays_apart_in_a_model_that_is_read():
    """FLAN-T5: the config says that all tables are tied, and the file holds an output layer of its own."""
    model = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0))
    model.lm_head.weight = torch.nn.Parameter(torch.randn(60, 32))
    model.all_tied_weights_keys.pop("lm_head.weight")
    fresh = skeleton(model, model.config.to_dict())
    assert fresh.lm_head.weight is not fresh.shared.weight
    assert fresh.encoder.embed_tokens.weight is fresh.decoder.embed_tokens.weight is fresh.shared.weight


def test_a_run_with_generation(tmp_path):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0))
    whole, seen = count_parameters(model), []
    args = Seq2SeqTrainingArguments(
        str(tmp_path / "out"),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        eval_strategy="no",
        save_strategy="no",
        report_to=[],
        predict_with_generate=True,
        generation_max_length=6,
        generation_num_beams=2,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = RMTKDSeq2SeqTrainer(
        rmtkd_config=RMTKDConfig(**RECIPE),
        model=model,
        args=args,
        train_dataset=copies(),
        eval_dataset=copies(8),
        compute_metrics=lambda found: seen.append(found.predictions.shape) or {"rows": len(found.predictions)},
    )
    trainer.train()
    assert abs(1 - count_parameters(trainer.model) / whole - 0.3) < 0.02
    assert trainer.evaluate()["eval_rows"] == 8 and seen[-1][0] == 8
    trainer.save_model(str(tmp_path / "small"))
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "small")
    assert type(again).__name__ == "RMTKDT5ForConditionalGeneration"
    assert again.lm_head.weight is again.shared.weight is again.encoder.embed_tokens.weight
