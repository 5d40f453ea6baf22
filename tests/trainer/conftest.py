"""A tiny BERT, a learnable toy task, and a trainer around them."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification

from optimum_rmtkd.config import RMTKDConfig
from optimum_rmtkd.trainer import RMTKDTrainer, RMTKDTrainingArguments


BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
RECIPE = {
    "target_reduction": 0.3,
    "fit_share": 0,
    "calibration_samples": 32,
    "min_width": 4,
    "round_to": 4,
}


def tiny_bert(seed=0, cls=BertForSequenceClassification, **changes):
    torch.manual_seed(seed)
    return cls(BertConfig(**(BERT | changes)))


def toy_data(samples=64, length=10, seed=1):
    """Does the first token lie in the upper half? The last tokens of every second sample are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (samples, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, -3:] = 0
    return [{"input_ids": i, "attention_mask": m, "labels": int(i[0] > 32)} for i, m in zip(ids, mask, strict=True)]


def ragged(samples=64, length=12, kind="sequence", seed=3):
    """Rows of very different lengths, padded on the right; labels a sequence, a token, or the tokens themselves."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(samples):
        ids = torch.randint(5, 60, (length,), generator=generator)
        real = int(torch.randint(2, length + 1, (), generator=generator))
        mask = (torch.arange(length) < real).long()
        labels = {
            "sequence": int(ids[0] > 32),
            "three": int(ids[0] % 3),
            "regression": float(ids[0] / 60),
            "token": torch.where(mask == 1, (ids % 3), -100),
            "causal": torch.where(mask == 1, ids, -100),
        }[kind]
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-exact comparisons need one order of summation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer(model=None, recipe={...}, out="out", train_dataset=..., teacher_model=..., **training
    arguments)."""

    def make(
        model=None,
        recipe=None,
        out="out",
        teacher_model=None,
        objectives=None,
        trainer_kwargs=None,
        trainer_class=RMTKDTrainer,
        **arguments,
    ):
        arguments = {
            "max_steps": 8,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "seed": 0,
        } | arguments
        recipe = {"distil_learning_rate": arguments["learning_rate"]} | (recipe or {})  # what is known of rates was
        # measured on real models; a toy of a few steps learns at its own
        given = {"train_dataset": toy_data(), "eval_dataset": toy_data(16, seed=2)} | (trainer_kwargs or {})
        trainer = trainer_class(
            model=tiny_bert() if model is None else model,
            args=RMTKDTrainingArguments(str(tmp_path / out), **arguments),
            rmtkd_config=RMTKDConfig(**(RECIPE | recipe)),
            teacher_model=teacher_model,
            objectives=objectives,
            **given,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    return make


@pytest.fixture
def weights():
    """Copies of a model's tensors."""

    def take(model):
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    return take
