"""More parameters while training, plain weights in everything that is saved; a resumed run ends with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BartConfig, BartModel, BertForSequenceClassification

from optimum_rmtkd.distillation import EMATeacher, TensorAlignment
from optimum_rmtkd.distillation.objectives.alignment import _counterparts
from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.reparameterization import (
    MatrixProductOperator,
    Powerpropagation,
    core_parameters,
    is_reparameterized,
)
from optimum_rmtkd.surgery import count_parameters
from optimum_rmtkd.trainer.checkpoint import TENSORS

from ..tables import SLOW
from .conftest import tiny_bert, toy_data


NONE = {"schedule": "none", "target_reduction": None}
ROUNDS = {"target_reduction": 0.6, "rounds": 2, "stage_share": 0.5}  # cuts at steps 0 and 3 of 6
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 16}


def losses(trainer):
    return {(e["step"], k): v for e in trainer.state.log_history for k, v in e.items() if k.startswith("loss")}


def test_without_a_cut_the_first_loss_is_that_of_the_plain_model(make_trainer, tmp_path):
    seen = {}
    for name in (None, "mpo", {"name": "mpo", "num_tensors": 5}, "powerpropagation"):
        student = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        size, trained = count_parameters(student), []
        trainer = make_trainer(
            student,
            recipe=NONE,
            out=str(name),
            teacher_model=tiny_bert(seed=3),
            objectives=["task", "kl"],
            max_steps=2,
            trainer_kwargs={"reparameterization": name},
        )
        step = trainer.training_step
        trainer.training_step = lambda *a, step=step, t=trained, m=student, **k: (
            t.append(sum(p.numel() for p in m.parameters())),
            step(*a, **k),
        )[1]
        trainer.train()
        seen[str(name)] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        assert not is_reparameterized(student) and count_parameters(student) == size
        assert trainer.run.parameters == size
        assert (trained[0] > size) == ("mpo" in str(name))
        if name == "mpo":
            trainer.save_model(tmp_path / "saved")
            again = BertForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
            batch = trainer.data_collator(toy_data(4))
            with torch.no_grad():
                assert torch.equal(again(**batch).logits, student.eval()(**batch).logits)
    first = [values[0] for values in seen.values()]
    assert first == pytest.approx([first[0]] * 4, rel=1e-4)
    assert len({values[1] for values in seen.values()}) == 4  # but the steps differ


def test_the_tensors_have_a_group_without_decay_and_a_rate_of_their_own(make_trainer):
    trainer = make_trainer(
        recipe=ROUNDS, max_steps=6, weight_decay=0.1, trainer_kwargs={"reparameterization": MatrixProductOperator(5)}
    )
    groups = []
    step = trainer.training_step

    def spy(*positional, **kwargs):
        raw = trainer.optimizer.optimizer
        cores = {id(p) for p in core_parameters(trainer.model).values()}
        held = [{id(p) for p in group["params"]} for group in raw.param_groups]
        groups.append((len(cores), [g["weight_decay"] for g in raw.param_groups]))
        assert held[-1] == cores and not any(h & cores for h in held[:-1])
        assert set.union(*held) == {id(p) for p in trainer.model.parameters()}
        assert raw.param_groups[-1]["lr"] == pytest.approx(raw.param_groups[0]["lr"] / 4)
        return step(*positional, **kwargs)

    trainer.training_step = spy
    output = trainer.train()
    assert len(groups) == 6 and all(count > 0 and decay == [0.1, 0.0, 0.0] for count, decay in groups)
    assert [s.parameters_after for s in trainer.stages][-1] == count_parameters(trainer.model)
    assert output.metrics["reduction"] == pytest.approx(0.6, abs=0.03)
    assert not is_reparameterized(trainer.model)


@pytest.mark.parametrize(
    ("recipe", "how", "objectives", "step"),
    [
        SLOW(ROUNDS, "mpo", None, 2),  # the second cut comes after the resumption
        (ROUNDS, "mpo", ["task", "kl", "tensor_alignment"], 4),
        SLOW(ROUNDS, "powerpropagation", None, 4),
        SLOW(ROUNDS | {"teacher": "ema", "ema_decay": 0.5}, "mpo", None, 4),
        (ROUNDS | {"teacher": "previous"}, "mpo", None, 4),
        SLOW(ROUNDS | {"max_metric_drop": -1.0}, "mpo", None, 2),  # rolled back at step 3
        (NONE, "mpo", ["task", "kl", "tensor_alignment"], 3),
        (NONE, None, ["task", {"name": "projected_feature", "layers": "uniform"}], 3),  # its adapters are trained
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(make_trainer, weights, recipe, how, objectives, step):
    def make(out):
        given = None
        if recipe is NONE:
            given = tiny_bert(seed=4, **({} if how else {"hidden_size": 48}))
        return make_trainer(
            recipe=recipe,
            out=out,
            teacher_model=given,
            objectives=objectives,
            trainer_kwargs={"reparameterization": how},
            **SAVING,
        )

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    torch.rand(100)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / f"checkpoint-{step}"))
    ours, theirs = weights(resumed.model), weights(whole.model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert losses(resumed) == losses(whole)
    assert [s.to_dict() for s in resumed.stages] == [s.to_dict() for s in whole.stages]
    if how is None:
        assert all(
            torch.equal(a, b)
            for a, b in zip(
                resumed.run.tutor.companions.parameters, whole.run.tutor.companions.parameters, strict=True
            )
        )


def test_the_same_trainer_can_go_back_to_its_own_checkpoint(make_trainer, weights):
    trainer = make_trainer(recipe=ROUNDS, trainer_kwargs={"reparameterization": "mpo"}, **SAVING)
    trainer.train()
    end = weights(trainer.model)
    trainer.train(resume_from_checkpoint=str(Path(trainer.args.output_dir) / "checkpoint-4"))
    assert all(torch.equal(tensor, end[name]) for name, tensor in weights(trainer.model).items())


def test_checkpoints_hold_plain_weights_and_beside_them_the_tensors(make_trainer):
    from safetensors.torch import load_file

    trainer = make_trainer(recipe=NONE, trainer_kwargs={"reparameterization": "mpo"}, **SAVING)
    trainer.train()
    folder = Path(trainer.args.output_dir) / "checkpoint-3"
    names = set(load_file(folder / "model.safetensors"))
    assert names == set(BertForSequenceClassification(trainer.model.config).state_dict())
    cores = [name for name in load_file(folder / TENSORS) if name.startswith("core/")]
    assert len(cores) == 2 * 6 * 3
    _, missing = BertForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not missing["missing_keys"] and not missing["unexpected_keys"]


def test_resuming_with_another_setting_is_refused(make_trainer):
    first = make_trainer(recipe=NONE, trainer_kwargs={"reparameterization": "mpo"}, **SAVING)
    first.train()
    checkpoint = str(Path(first.args.output_dir) / "checkpoint-3")
    with pytest.raises(RMTKDError, match="had the reparameterization .*mpo.*; this one has none"):
        make_trainer(recipe=NONE, out="other", **SAVING).train(resume_from_checkpoint=checkpoint)
    other = {"reparameterization": MatrixProductOperator(4)}
    with pytest.raises(RMTKDError, match='"num_tensors": 3.*"num_tensors": 4'):
        make_trainer(recipe=NONE, out="third", trainer_kwargs=other, **SAVING).train(resume_from_checkpoint=checkpoint)


def test_resuming_with_other_objectives_or_transforms_is_refused(make_trainer):
    """They would start unfitted, or silently without what the run had learned."""
    first = make_trainer(recipe=NONE, objectives=["task", "kl"], **SAVING | {"max_steps": 1})
    first.train()
    checkpoint = str(Path(first.args.output_dir) / "checkpoint-1")
    for objectives, transforms, reason in (
        (
            ["task", "kl", "projected_feature"],
            None,
            "this one has .*projected_feature",
        ),
        ([{"name": "kl", "label": "task"}, "kl"], None, 'this one has .*"label": "task"'),
        (["task", "kl"], "embedding_mixup", "had the transforms none; this one has .*embedding_mixup"),
    ):
        other = make_trainer(
            recipe=NONE, out="other", objectives=objectives, trainer_kwargs={"transforms": transforms}, **SAVING
        )
        with pytest.raises(RMTKDError, match=reason):
            other.train(resume_from_checkpoint=checkpoint)


def test_full_eval_in_bf16_leaves_the_trained_model_alone(make_trainer):
    """The last stage is judged after the training, where transformers would cast the model for good."""
    for how in ("mpo", None):
        trainer = make_trainer(
            out=str(how), max_steps=2, bf16_full_eval=True, trainer_kwargs={"reparameterization": how}
        )
        trainer.train()
        assert trainer.stages[-1].metric_after is not None and trainer.model.dtype == torch.float32


def test_a_given_optimizer_is_said_to_miss_the_rate(make_trainer, caplog):
    student = tiny_bert()
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    trainer = make_trainer(
        student,
        recipe=NONE,
        objectives=["task"],
        max_steps=1,
        trainer_kwargs={"reparameterization": "mpo", "optimizers": (optimizer, None)},
    )
    assert "lr_scale=0.5 and" in caplog.text
    before = student.bert.encoder.layer[0].output.dense.weight.detach().clone()
    trainer.train()
    assert (student.bert.encoder.layer[0].output.dense.weight - before).norm() > 1e-4 * before.norm()


def test_the_best_checkpoint_comes_back_plain(make_trainer):
    trainer = make_trainer(
        recipe=NONE,
        max_steps=4,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        trainer_kwargs={"reparameterization": "mpo"},
    )
    trainer.train()
    best = BertForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint).state_dict()
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())


def test_pruned_at_the_end_and_in_checkpoints_only(make_trainer):
    shares = []
    trainer = make_trainer(
        recipe=NONE,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        trainer_kwargs={"reparameterization": Powerpropagation(sparsity=0.5)},
    )

    def zeros(model):
        return float((model.bert.encoder.layer[0].output.dense.weight == 0).float().mean())

    step = trainer.training_step
    trainer.training_step = lambda *a, **k: (shares.append(zeros(trainer.model)), step(*a, **k))[1]
    trainer.train()
    assert max(shares) < 0.01 and zeros(trainer.model) == 0.5
    saved = BertForSequenceClassification.from_pretrained(Path(trainer.args.output_dir) / "checkpoint-2")
    assert zeros(saved) == 0.5


# -- alignment --------------------------------------------------------------------------------------------------------


def aligned(student, teacher, tensors="auxiliary", number=3):
    MatrixProductOperator(number).apply(student)
    objective = TensorAlignment(tensors)
    objective.setup(student, teacher, {})
    return objective


def test_alignment_has_a_gradient_and_is_small_for_near_weights():
    """In the released code of OPDF this term carried no gradient."""
    teacher, student = tiny_bert(), tiny_bert()
    gap = 1e-2
    with torch.no_grad():
        for parameter in student.parameters():
            noise = torch.randn_like(parameter)
            parameter.add_(gap * noise * parameter.norm() / noise.norm())
    objective = aligned(student, teacher)
    from optimum_rmtkd.distillation import DistillationStep

    loss = objective(DistillationStep({}))
    assert 0 < loss.item() <= 1.1 * gap**2
    loss.backward()
    grads = [p.grad for name, p in core_parameters(student).items() if name.endswith(("original0", "original2"))]
    assert grads and all(g is not None and g.abs().sum() > 0 for g in grads)


def test_alignment_refuses_what_it_would_have_to_crop():
    with pytest.raises(RMTKDError, match=r"weight \(32, 32\), the teacher a weight \(48, 48\).*equal shapes"):
        aligned(tiny_bert(), tiny_bert(hidden_size=48))
    with pytest.raises(RMTKDError, match="cached answers have none"):
        aligned(tiny_bert(), None)
    with pytest.raises(RMTKDError, match="the student has none"):
        TensorAlignment().setup(tiny_bert(), tiny_bert(), {})
    fewer = aligned(tiny_bert(num_hidden_layers=1), tiny_bert(num_hidden_layers=2))
    assert len(fewer._aligned) == 6


def test_both_stacks_are_aligned_with_the_uniform_map():
    def bart(layers):
        sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 20}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        return BartModel(BartConfig(encoder_layers=layers, decoder_layers=layers, **sizes, **heads))

    teacher = bart(4)
    find = _counterparts(bart(2), teacher)
    for stack in ("encoder", "decoder"):
        for ours, theirs in ((0, 1), (1, 3)):
            expected = teacher.get_submodule(f"{stack}.layers.{theirs}.fc1").weight
            assert find(f"{stack}.layers.{ours}.fc1") is expected


def test_alignment_of_a_student_just_cut_is_an_anchor(make_trainer):
    trainer = make_trainer(
        objectives=["task", "kl", {"name": "tensor_alignment", "weight": 1.0}],
        max_steps=3,
        trainer_kwargs={"reparameterization": "mpo"},
    )
    trainer.train()
    values = [e["loss/tensor_alignment"] for e in trainer.state.log_history if "loss/tensor_alignment" in e]
    assert values[0] < 1e-9 < values[-1]


def test_a_student_that_came_narrowed_is_anchored_with_a_warning(make_trainer, caplog):
    trainer = make_trainer(max_steps=1, objectives=["kl"])
    trainer.train()
    objective = aligned(trainer.model, tiny_bert())
    assert "no weight of the teacher fits" in caplog.text
    from optimum_rmtkd.distillation import DistillationStep

    assert objective(DistillationStep({})) < 1e-9


def test_an_average_follows_the_plain_weights():
    student = tiny_bert()
    teacher = EMATeacher(student, decay=0.5)
    MatrixProductOperator().apply(student)
    with torch.no_grad():
        for parameter in core_parameters(student).values():
            parameter.mul_(1.1)
    name = "bert.encoder.layer.0.output.dense.weight"
    before = teacher.model.get_parameter(name).clone()
    teacher.update(student)
    now = student.bert.encoder.layer[0].output.dense.weight
    assert torch.allclose(teacher.model.get_parameter(name), 0.5 * before + 0.5 * now, atol=1e-6)
