from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_rmtkd.checkpoints import MANIFEST
from optimum_rmtkd.errors import IncompleteCheckpointError, RMTKDError
from optimum_rmtkd.surgery import count_parameters
from optimum_rmtkd.trainer.checkpoint import STATE, TENSORS, read_process_state, write_process_state
from optimum_rmtkd.trainer.stages import JOURNAL

from ..surgery import zoo
from ..tables import SLOW
from .conftest import tiny_bert


ROUNDS = {"target_reduction": 0.6, "rounds": 2, "stage_share": 0.5}  # cuts at steps 0 and 3 of 6
SAVING = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 16}


def folder(trainer, step):
    return Path(trainer.args.output_dir) / f"checkpoint-{step}"


def losses(trainer):
    return {(e["step"], k): v for e in trainer.state.log_history for k, v in e.items() if k.startswith("loss")}


@pytest.mark.parametrize(
    ("recipe", "step"),
    [
        ({}, 2),  # between the cuts: the second one happens again
        SLOW({}, 3),  # saved at the step of the second cut, just after it
        SLOW({}, 5),  # in the second epoch
        SLOW({"disable_dropout": False}, 2),
        ({"teacher": "previous"}, 4),  # its teacher lies in the checkpoint
        SLOW({"teacher": "previous"}, 2),  # its teacher is the uncut model
        ({"teacher": "ema", "ema_decay": 0.5}, 4),
        SLOW({"importance": "fisher"}, 1),
        ({"max_metric_drop": -1.0}, 2),  # rolled back at step 3, after the resumption
        ({"max_metric_drop": 5.0}, 4),  # the model before the stage lies in the checkpoint
        SLOW({"shape": "native"}, 2),
        ({"shape": "native", "teacher": "previous"}, 4),
    ],
)
def test_a_resumed_run_ends_with_the_same_bits(make_trainer, weights, recipe, step):
    whole = make_trainer(recipe=ROUNDS | recipe, out="whole", **SAVING)
    expected = whole.train()
    resumed = make_trainer(recipe=ROUNDS | recipe, out="resumed", **SAVING)
    torch.rand(
        100
    )  # the other process may have drawn numbers; transformers derives the data order from the seed alone
    output = resumed.train(resume_from_checkpoint=str(folder(whole, step)))
    assert type(resumed.model) is type(whole.model)
    ours, theirs = weights(resumed.model), weights(whole.model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert losses(resumed) == losses(whole)
    assert output.metrics["reduction"] == expected.metrics["reduction"]
    assert [s.to_dict() for s in resumed.stages] == [s.to_dict() for s in whole.stages]
    journals = [json.loads((Path(t.args.output_dir) / JOURNAL).read_text()) for t in (whole, resumed)]
    assert journals[0] == journals[1]


def test_the_same_trainer_can_go_back_to_its_own_checkpoint(make_trainer, weights):
    trainer = make_trainer(recipe=ROUNDS, **SAVING)
    trainer.train()
    end = weights(trainer.model)
    trainer.train(resume_from_checkpoint=str(folder(trainer, 2)))
    assert all(torch.equal(tensor, end[name]) for name, tensor in weights(trainer.model).items())


def test_checkpoints_do_not_hold_the_initial_teacher(make_trainer):
    trainer = make_trainer(recipe=ROUNDS, **SAVING)
    trainer.train()
    checkpoint = folder(trainer, 6)
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "rmtkd_bert"
    values = json.loads((checkpoint / STATE).read_text())
    assert [s["status"] for s in values["agenda"]["stages"]] == ["accepted", "open"] and values["before"] is None
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / TENSORS)
    narrow = {name for name in tensors if name.startswith("after_cut/")}  # while the stage is open, it may come back
    assert len(narrow) == len(trainer.model.state_dict())
    assert set(tensors) - narrow <= {"projection/hidden", "projection_before/hidden", "objective/hidden/variance"}
    assert sum(tensors[name].numel() for name in narrow) < 0.6 * count_parameters(trainer.run.initial)


def test_another_model_than_the_run_started_from_is_refused(make_trainer):
    first = make_trainer(recipe=ROUNDS, **SAVING)
    first.train()
    other = make_trainer(tiny_bert(seed=9), recipe=ROUNDS, out="other", **SAVING)
    with pytest.raises(RMTKDError, match="must be the same: pass the uncut model"):
        other.train(resume_from_checkpoint=str(folder(first, 4)))


@pytest.mark.parametrize("step", [1, SLOW(4)])  # in the fit, and after the cut
def test_a_run_that_fits_first_is_taken_up_with_another_random_head(make_trainer, weights, step):
    """Scripts that load their model before anything is seeded draw the head anew each time."""
    recipe = {"fit_share": 0.4, "target_reduction": 0.4}
    whole = make_trainer(recipe=recipe, out="whole", **SAVING)
    whole.train()
    model = tiny_bert()
    torch.nn.init.normal_(model.classifier.weight)
    resumed = make_trainer(model, recipe=recipe, out="resumed", **SAVING)
    resumed.train(resume_from_checkpoint=str(folder(whole, step)))
    ours, theirs = weights(resumed.model), weights(whole.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [s.to_dict() for s in resumed.stages] == [s.to_dict() for s in whole.stages]
    assert resumed.run.fingerprint == whole.run.fingerprint  # of the model that the run started from
    for other in (tiny_bert(num_labels=3), tiny_bert().double()):
        with pytest.raises(RMTKDError, match="other tensors, by name, shape or dtype"):
            make_trainer(other, recipe=recipe, out="other", **SAVING).train(
                resume_from_checkpoint=str(folder(whole, step))
            )


def test_a_reduced_checkpoint_without_state_is_refused(make_trainer):
    first = make_trainer(recipe=ROUNDS, save_only_model=True, **SAVING)
    first.train()
    assert not (folder(first, 4) / STATE).exists()
    with pytest.raises(RMTKDError, match="save_only_model"):
        make_trainer(recipe=ROUNDS, out="other", **SAVING).train(resume_from_checkpoint=str(folder(first, 4)))


def vit_and_data():
    """Transformers stores the tensors of ViT under other names than they have in memory."""
    torch.manual_seed(0)
    model = zoo.make("vit", "ForImageClassification")
    pixels = [row for batch in zoo.batches("vit") for row in batch["pixel_values"]]
    data = [{"pixel_values": x, "labels": int(x.mean() > 0)} for x in pixels]
    return model, {"train_dataset": data, "eval_dataset": data[:16]}


def test_what_is_no_checkpoint_of_such_a_run_is_refused(make_trainer, tmp_path):
    whole = make_trainer(recipe=ROUNDS, out="whole", **SAVING)
    whole.train()
    state = folder(whole, 2) / STATE
    text = state.read_text(encoding="utf8")
    for change, said in (
        (lambda: state.write_text(text[:100], encoding="utf8"), "rmtkd_state.json cannot be read"),
        (state.unlink, "holds no rmtkd_state.json.*by another trainer"),
    ):
        change()
        with pytest.raises(RMTKDError, match=said):
            make_trainer(recipe=ROUNDS, out="other", **SAVING).train(resume_from_checkpoint=str(folder(whole, 2)))


def test_a_resumed_run_of_a_model_with_other_names_on_disk(make_trainer, weights):
    model, data = vit_and_data()
    whole = make_trainer(model=model, recipe=ROUNDS, out="whole", trainer_kwargs=data, **SAVING)
    whole.train()
    model, data = vit_and_data()
    resumed = make_trainer(model=model, recipe=ROUNDS, out="resumed", trainer_kwargs=data, **SAVING)
    resumed.train(resume_from_checkpoint=str(folder(whole, 4)))
    ours, theirs = weights(resumed.model), weights(whole.model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_best_model_is_loaded_whatever_its_names_on_disk(make_trainer):
    model, data = vit_and_data()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1}
    best |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the best is then an early one
    trainer = make_trainer(model=model, recipe={"target_reduction": 0.4}, trainer_kwargs=data, **SAVING | best)
    trainer.train()
    reached = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert trainer.state.best_global_step < 6  # or the test shows nothing
    assert trainer.evaluate()["eval_loss"] == pytest.approx(reached[trainer.state.best_global_step], rel=1e-5)


def test_another_recipe_than_the_run_follows_is_refused(make_trainer):
    whole = make_trainer(recipe=ROUNDS, out="whole", **SAVING)
    whole.train()
    other = make_trainer(recipe=ROUNDS | {"target_reduction": 0.5}, out="other", **SAVING)
    with pytest.raises(RMTKDError, match="target_reduction=0.6; this one has target_reduction=0.5"):
        other.train(resume_from_checkpoint=str(folder(whole, 4)))


OTHER_PARTS = [
    ({"objectives": {"kl": {"temperature": 4.0}}}, '"temperature": 1.0.*"temperature": 4.0'),
    ({"transforms": "embedding_mixup"}, "had the transforms none"),
    ({"reparameterization": {"name": "mpo", "num_tensors": 3, "lr_scale": 9}}, '"lr_scale": 0.5.*"lr_scale": 9'),
    ({"teacher_model": tiny_bert(seed=8)}, "the teacher"),
    ({"teacher_model": [tiny_bert(seed=7)]}, "FrozenTeacher.*WeightedTeachers"),
    ({"teacher_model": None}, "this one has none"),
]


def test_other_parts_than_the_run_has_are_refused(make_trainer):
    def make(out, objectives=("kl",), teacher_model=tiny_bert(seed=7), reparameterization="mpo", transforms=None):
        parts = {"reparameterization": reparameterization, "transforms": transforms}
        saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
        recipe = {"schedule": "none", "target_reduction": None}
        return make_trainer(
            recipe=recipe, out=out, objectives=objectives, teacher_model=teacher_model, trainer_kwargs=parts, **saving
        )

    whole = make("whole")
    whole.train()
    make("same").train(resume_from_checkpoint=str(folder(whole, 1)))
    for change, said in OTHER_PARTS:
        with pytest.raises(RMTKDError, match=said):
            make("other", **change).train(resume_from_checkpoint=str(folder(whole, 1)))


def test_the_same_recipe_is_the_same_after_json(make_trainer):
    """JSON knows no tuples and no numbers as keys."""
    own = {"reparameterization": {"name": "mpo", "modes": {32: [8, 1, 4]}}, "objectives": {"attention_relation": {}}}
    own["objectives"]["attention_relation"]["relations"] = ("qk",)
    whole = make_trainer(recipe=own, max_steps=2, save_strategy="steps", save_steps=1)
    whole.train()
    again = make_trainer(recipe=own, max_steps=2, out="again")
    assert again.train(resume_from_checkpoint=str(folder(whole, 1))).global_step == 2


def test_a_checkpoint_that_lacks_tensors_is_refused(make_trainer):
    whole = make_trainer(recipe=ROUNDS, out="whole", **SAVING)
    whole.train()
    file = folder(whole, 4) / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("classifier.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    again = make_trainer(recipe=ROUNDS, out="again", **SAVING)
    with pytest.raises(IncompleteCheckpointError, match=r"model.safetensors has \d+ bytes, \d+ were written"):
        again.train(resume_from_checkpoint=str(folder(whole, 4)))
    (folder(whole, 4) / MANIFEST).unlink()  # as a checkpoint from before there were manifests
    with pytest.raises(RMTKDError, match="classifier.weight"):
        again.train(resume_from_checkpoint=str(folder(whole, 4)))


def test_states_of_processes_are_dealt_out_again(tmp_path, caplog):
    def read(rank, count):
        return float(read_process_state(tmp_path, rank, count)["transform/0/values"])

    for rank in range(2):
        write_process_state(tmp_path, rank, 2, {"transform/0/values": torch.full((1,), float(rank))})
    assert [read(rank, 2) for rank in range(2)] == [0.0, 1.0] and not caplog.text
    assert [read(rank, 3) for rank in range(3)] == [0.0, 1.0, 0.0] and read(0, 1) == 0.0
    assert "the state of 2 processes; process 2 of 3 takes rmtkd_process_0_of_2" in caplog.text
    write_process_state(tmp_path / "none", 0, 1, {})
    assert read_process_state(tmp_path / "none", 0, 1) == {} and not (tmp_path / "none").exists()


def test_states_of_processes_that_are_missing_or_stale(tmp_path):
    state = {"transform/0/values": torch.ones(1)}
    write_process_state(tmp_path, 1, 2, state)
    assert read_process_state(tmp_path, 1, 2) == state  # on a disk of its own node
    assert read_process_state(tmp_path, 0, 2) == {}  # that process had none
    with pytest.raises(
        RMTKDError, match="holds rmtkd_process_1_of_2.safetensors: expected the states of all processes"
    ):
        read_process_state(tmp_path, 0, 4)
    write_process_state(tmp_path, 0, 4, state)
    with pytest.raises(RMTKDError, match="of one run"):
        read_process_state(tmp_path, 0, 3)
    write_process_state(tmp_path, 1, 4, {})
    assert [file.name for file in tmp_path.iterdir()] == ["rmtkd_process_0_of_4.safetensors"]
