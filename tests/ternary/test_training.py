"""Straight-through training with a teacher in RMTKDTrainer, from a rounded network to a packed one."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from optimum_rmtkd import (
    RMTKDConfig,
    RMTKDTrainer,
    RMTKDTrainingArguments,
    TernaryConfig,
    compress_head,
    pack_model,
    ternarize,
)
from optimum_rmtkd.distillation.objectives import KLDivergence, TaskLoss
from optimum_rmtkd.layers_rmtkd import TernaryLinear
from optimum_rmtkd.ternary.training import wrap

from ..surgery import zoo
from .test_compress import accuracy, trained_network
from .test_modeling_ternary import data


def arguments(folder, steps: int, **options) -> RMTKDTrainingArguments:
    options = {"learning_rate": 3e-3, "per_device_train_batch_size": 50, "save_strategy": "no"} | options
    return RMTKDTrainingArguments(
        output_dir=str(folder), max_steps=steps, report_to="none", use_cpu=True, disable_tqdm=True, **options
    )


def rows(x, y) -> list[dict]:
    return [{"features": a, "labels": b} for a, b in zip(x, y)]


def agreement(model, teacher, x) -> float:
    """Mean KL divergence from the teacher's answers."""
    with torch.no_grad():
        ours, theirs = (m(x).logits.log_softmax(1) for m in (model, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(1).mean())


@pytest.mark.parametrize("scale", ["matched", "mean_abs"])
def test_network_of_its_own(scale, tmp_path):
    network, (x, y) = trained_network(), data()
    x = x - 5
    teacher = wrap(network, x)
    student = ternarize(network, x, TernaryConfig(weights="trained", scale=scale, sparsity=0.5))[0]
    before = agreement(student, teacher, x), copy.deepcopy(student.mlp.layers[0].trits())
    trainer = RMTKDTrainer(
        model=student,
        args=arguments(tmp_path / "run", steps=80),
        rmtkd_config=RMTKDConfig(schedule="none"),
        teacher_model=teacher,
        objectives=[TaskLoss(0.3), KLDivergence(0.7)],
        train_dataset=rows(x, y),
    )
    output = trainer.train()
    assert output.metrics["reduction"] == 0
    assert agreement(student, teacher, x) < 0.5 * before[0]
    assert not torch.equal(student.mlp.layers[0].trits(), before[1])
    assert all(p.grad is None or p.requires_grad for p in teacher.parameters())
    trainer.save_model(tmp_path / "latent")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "latent")(x).logits, student.eval()(x).logits)
    with torch.no_grad():
        trained = student(x).logits
    pack_model(trainer.model).save_pretrained(tmp_path / "packed")
    again = AutoModel.from_pretrained(tmp_path / "packed")
    assert torch.allclose(again(x).logits, trained, atol=1e-4)
    assert accuracy(again, x, y) > 0.9
    small, large = ((tmp_path / kind / "model.safetensors").stat().st_size for kind in ("packed", "latent"))
    assert small < 0.35 * large


def test_part_of_a_model(tmp_path):
    """The feed-forward network of a block, made to matter; the rest of the model is frozen."""
    model, batches = zoo.make("distilbert", "ForSequenceClassification"), zoo.batches("distilbert", count=12)
    part = "distilbert.transformer.layer.0.ffn"
    with torch.no_grad():
        for parameter in model.get_submodule(part).parameters():
            parameter.mul_(6.0)
    student = compress_head(model, part, batches, TernaryConfig(weights="trained", sparsity=0.3))[0]
    samples = [{k: v[i] for k, v in batch.items()} for batch in batches for i in range(8)]
    samples = [sample | {"labels": torch.tensor(i % 3)} for i, sample in enumerate(samples)]

    def distance(m) -> float:
        ours, theirs = (torch.cat([zoo.outputs(k, b) for b in batches]) for k in (m, model))
        return float((ours - theirs).square().mean())

    before = distance(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name.startswith(part))
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trainer = RMTKDTrainer(
        model=student,
        args=arguments(tmp_path / "run", steps=60, learning_rate=1e-3, per_device_train_batch_size=16),
        rmtkd_config=RMTKDConfig(schedule="none", task_weight=0.0, kl_weight=1.0, hidden_weight=0.0),
        teacher_model=model,
        train_dataset=samples,
    )
    trainer.train()
    assert distance(student.eval()) < 0.5 * before
    pack_model(student).save_pretrained(tmp_path / "packed")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert zoo.same(again, student, batches[0])
    assert {m.storage for m in again.modules() if isinstance(m, TernaryLinear)} == {"base3"}


def test_resumed_run_continues_with_the_same_weights(tmp_path):
    network, (x, y) = trained_network(), data()

    def run(folder, resume=None):
        student = ternarize(network, x, TernaryConfig(weights="trained"))[0]
        trainer = RMTKDTrainer(
            model=student,
            args=arguments(folder, steps=12, save_strategy="steps", save_steps=6),
            rmtkd_config=RMTKDConfig(schedule="none"),
            teacher_model=wrap(network, x),
            objectives=[TaskLoss(0.3), KLDivergence(0.7)],
            train_dataset=rows(x, y),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    whole = run(tmp_path / "run")
    resumed = run(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-6"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name
