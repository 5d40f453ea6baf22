"""Loss and gradients do not depend on how a batch is split, however ragged its rows are."""

from __future__ import annotations

import pytest
import torch
from transformers import BertForMaskedLM, BertForTokenClassification, GPT2Config, GPT2LMHeadModel

from optimum_rmtkd.batches import padding_mask
from optimum_rmtkd.distillation.counts import UNITS, count_units, total_units
from optimum_rmtkd.distillation.objectives import objective_names
from optimum_rmtkd.distillation.step import DistillationStep

from ..tables import covering
from .conftest import ragged, tiny_bert


# Not a mean over samples or tokens: its own docstring and test.
EXCEPT = {"tensor_alignment"}
ARGUMENTS = {
    "correlation": {"dim": "class"},
    "projected_feature": {"projection": {"name": "pca", "energy": 0.9}, "layers": "uniform"},
}


def tiny_gpt2(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**(sizes | {"bos_token_id": 1, "eos_token_id": 2} | changes)))


def student_and_teacher(kind):
    if kind == "token":
        return [tiny_bert(seed, BertForTokenClassification, num_labels=3) for seed in (0, 1)]
    if kind == "causal":
        return [tiny_gpt2(seed) for seed in (0, 1)]
    if kind == "regression":
        return [tiny_bert(seed, num_labels=1, problem_type="regression") for seed in (0, 1)]
    return [tiny_bert(seed, num_labels=3) for seed in (0, 1)]


def run(make_trainer, weights, kind, objective, batch, accumulation, data=None):
    student, teacher = student_and_teacher(kind)
    for model in (student, teacher):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    trainer = make_trainer(
        student,
        recipe={"schedule": "none", "target_reduction": None},
        out=f"{batch}",
        teacher_model=teacher if objective != "hidden" else None,
        objectives=[{"name": objective, "weight": 1.0, **ARGUMENTS.get(objective, {})}],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        optim="sgd",
        learning_rate=0.05,
        trainer_kwargs={"train_dataset": data or ragged(kind=kind), "eval_dataset": None},
    )
    trainer.train()
    history = [(e["loss"], e["grad_norm"], e[f"loss/{objective}"]) for e in trainer.state.log_history if "loss" in e]
    return torch.tensor(history), weights(trainer.model)


# refused or left out there: tests/trainer/test_combinations.py
WITHOUT = [("regression", "correlation"), ("causal", "attention_relation"), ("causal", "hidden")]


@pytest.mark.parametrize(
    ("kind", "objective"),
    covering(["three", "token", "causal", "regression"], sorted(set(objective_names()) - EXCEPT), WITHOUT, times=2),
)
def test_eight_rows_at_once_are_four_times_two(make_trainer, weights, kind, objective):
    (whole, ours), (parts, theirs) = (
        run(make_trainer, weights, kind, objective, *split) for split in ((8, 1), (2, 4))
    )
    if objective == "hidden":  # the student starts as its teacher: loss 0 in the first step
        assert whole[0, 0] == 0 and whole[1, 0] == 0
        return
    assert whole[0, 0] > 0
    assert torch.allclose(whole, parts, rtol=2e-4, atol=1e-6), (whole, parts)
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=2e-6), name


@pytest.mark.parametrize("kind", ["token", "causal"])
def test_unlabelled_rows_too(make_trainer, weights, kind):
    data = [{k: v for k, v in row.items() if k != "labels"} for row in ragged(kind=kind)]
    (whole, _), (parts, _) = (run(make_trainer, weights, kind, "kl", *split, data) for split in ((8, 1), (2, 4)))
    assert whole[0, 0] > 0 and torch.allclose(whole, parts, rtol=2e-4), (whole, parts)


def test_hidden_states_too_once_the_student_was_cut(make_trainer, weights):
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tiny_bert(),
            objectives=["hidden"],
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            optim="sgd",
            learning_rate=0.1,
            trainer_kwargs={"train_dataset": ragged(), "eval_dataset": None},
        )
        trainer.train()
        losses = torch.tensor([e["loss"] for e in trainer.state.log_history if "loss" in e])
        results.append((losses, weights(trainer.model)))
    (whole, ours), (parts, theirs) = results
    assert whole.min() > 0 and torch.allclose(whole, parts, rtol=1e-5)
    off = {name: float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items()}
    assert max(off.values()) < 2e-5, off  # the cut is calibrated in batches of the training's size


def test_units():
    labels = torch.tensor([[-100, 4, 5, -100], [7, -100, -100, -100]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    batch = {"input_ids": torch.ones(2, 4), "attention_mask": mask, "labels": labels}
    assert count_units(batch).tolist() == [2, 4, 3, 3]
    assert count_units(batch, shifted=True).tolist() == [2, 4, 2, 2]
    assert count_units({"input_ids": torch.ones(2, 4), "labels": torch.ones(2)}).tolist() == [2, 8, 8, 8]
    del batch["labels"]  # the answers at real tokens, of causal models those that another follows
    assert count_units(batch).tolist() == [2, 4, 4, 4] and count_units(batch, shifted=True).tolist() == [2, 4, 2, 2]
    batch["labels"] = labels
    images = {"pixel_values": torch.ones(3, 1, 2, 2), "labels": torch.ones(3, 5)}
    assert count_units(images).tolist() == [3, 0, 0, 0]
    assert total_units([batch, batch]).tolist() == [4, 8, 6, 6]


def test_shares_add_up_to_the_number_of_parts():
    rows = ragged(8, kind="token")
    batches = [
        {k: torch.stack([torch.as_tensor(r[k]) for r in rows[i : i + 2]]) for k in rows[0]} for i in range(0, 8, 2)
    ]
    totals = total_units(batches)
    for unit in UNITS:
        shares = [DistillationStep(b, totals=totals, parts=4).share(unit) for b in batches]
        assert sum(shares) == pytest.approx(4)
    assert DistillationStep(batches[0]).share("tokens") == 1.0


def test_masks_of_multiple_choice_are_flattened():
    mask = torch.tensor([[[1, 1, 0], [1, 0, 0]]])
    assert padding_mask({"input_ids": torch.ones(1, 2, 3), "attention_mask": mask}).tolist() == [
        [True, True, False],
        [True, False, False],
    ]
    # (batch, tokens, tokens) says who looks at whom: no mask of tokens
    assert padding_mask({"input_ids": torch.ones(1, 3), "attention_mask": torch.ones(1, 3, 3)}) is None


def test_a_micro_batch_without_labels_counts_nothing(make_trainer):
    """Half of the rows have no label at all: a mean over them would be NaN."""
    data = [
        dict(r, labels=torch.full((12,), -100) if i % 2 else r["labels"]) for i, r in enumerate(ragged(kind="token"))
    ]
    trainer = make_trainer(
        tiny_bert(cls=BertForMaskedLM),
        recipe={"schedule": "none", "target_reduction": None},
        objectives=["task", "kl"],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps=3,
        trainer_kwargs={"train_dataset": data, "eval_dataset": None},
    )
    trainer.train()
    assert all(torch.isfinite(torch.tensor(e["loss"])) for e in trainer.state.log_history if "loss" in e)
