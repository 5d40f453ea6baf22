"""Runs that are ended from outside, disks that are full, and checkpoints that are not whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal

import pytest
import torch
import transformers
from transformers import TrainerCallback

from optimum_rmtkd import newest_checkpoint
from optimum_rmtkd.checkpoints import MANIFEST, fault_of
from optimum_rmtkd.errors import DiskFullError, IncompleteCheckpointError, RMTKDError
from optimum_rmtkd.signals import Terminated

from ..tables import SLOW
from .looping import looped, prepared, train
from .test_resume import ROUNDS, SAVING, folder


@pytest.fixture(autouse=True)
def nobody_listens():
    earlier = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, earlier)


class TerminateAt(TrainerCallback):
    """SIGTERM when a step begins."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def same(ours, theirs) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("recipe", "step"),
    [({}, 2), SLOW({}, 1), SLOW({"teacher": "ema"}, 2), SLOW({"fit_share": 0.5}, 2)],
)
def test_sigterm_saves_a_checkpoint_and_the_run_goes_on_from_it(make_trainer, capfd, recipe, step):
    """At a step like others, just before the second cut, and at the end of the fit: what is due is done later."""
    saving = SAVING | {"save_steps": 100}
    whole = make_trainer(recipe=ROUNDS | recipe, out="whole", **saving)
    whole.train()
    broken = make_trainer(recipe=ROUNDS | recipe, out="broken", **saving)
    broken.add_callback(TerminateAt(step))
    with pytest.raises(Terminated) as caught:
        broken.train()
    assert caught.value.code == 143
    told = capfd.readouterr().err
    assert f"training stopped after step {step + 1}" in told and f"checkpoint-{step + 1} is whole" in told
    assert len(broken.stages) == len([stage for stage in whole.stages if stage.step <= step])
    again = make_trainer(recipe=ROUNDS | recipe, out="broken", **saving)
    again.train(resume_from_checkpoint=True)
    assert same(again.model, whole.model)
    assert [stage.to_dict() for stage in again.stages] == [stage.to_dict() for stage in whole.stages]


def test_sigterm_in_a_cut_is_not_made_to_wait(make_trainer, monkeypatch, capfd):
    trainer = make_trainer(recipe=ROUNDS, **SAVING)
    cut = trainer.run._cut

    def terminated(*given):
        if given[1]:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the cut went on")
        cut(*given)

    monkeypatch.setattr(trainer.run, "_cut", terminated)
    with pytest.raises(Terminated):
        trainer.train()
    assert "no step ends soon" in (told := capfd.readouterr().err) and "checkpoint-2 is whole" in told
    assert not list(folder(trainer, 3).parent.glob("*checkpoint-3*"))


class TerminateAfter(TrainerCallback):
    """SIGTERM in the evaluation, or when the checkpoint has its name, after step 2."""

    def __init__(self, moment: str):
        self.moment = moment

    def _come(self, moment, state):
        if self.moment == moment and state.global_step == 2:
            self.moment = None
            os.kill(os.getpid(), signal.SIGTERM)

    def on_prediction_step(self, args, state, control, **kwargs):
        self._come("evaluation", state)

    def on_save(self, args, state, control, **kwargs):
        self._come("checkpoint", state)


@pytest.mark.parametrize(("moment", "every"), [("evaluation", 100), ("checkpoint", 2)])
def test_after_an_evaluation_or_a_checkpoint_no_further_step_is_made(make_trainer, capfd, moment, every):
    options = {"eval_strategy": "steps", "eval_steps": 2} | SAVING | {"save_steps": every}
    whole = make_trainer(recipe=ROUNDS, out="whole", **options)
    whole.train()
    broken = make_trainer(recipe=ROUNDS, out="broken", **options)
    broken.add_callback(TerminateAfter(moment))
    with pytest.raises(Terminated):
        broken.train()
    told = capfd.readouterr().err
    assert "training stopped after step 2" in told and "checkpoint-2 is whole" in told
    assert [entry["step"] for entry in broken.state.log_history if "eval_loss" in entry] == [2]
    again = make_trainer(recipe=ROUNDS, out="broken", **options)
    again.train(resume_from_checkpoint=True)
    assert same(again.model, whole.model)


def test_sigterm_between_the_question_and_a_cut_is_not_forgotten(make_trainer, monkeypatch, capfd):
    trainer = make_trainer(recipe=ROUNDS, **SAVING)
    agreed, termination = trainer._termination.agreed, trainer._termination

    def and_then_it_comes(accelerator, now=True):
        answer = agreed(accelerator, now)
        if trainer.stages and trainer.run.is_due(trainer.state.global_step):
            os.kill(os.getpid(), signal.SIGTERM)
        return answer

    monkeypatch.setattr(termination, "agreed", and_then_it_comes)
    with pytest.raises(Terminated):
        trainer.train()
    assert "no step ends soon" in capfd.readouterr().err and len(trainer.stages) == 1


@pytest.mark.parametrize("moment", ["before", "within"])
def test_sigterm_in_the_end_of_a_loop_ends_it(capfd, moment):
    script = prepared()
    loop = looped(script, ROUNDS)
    loop.should_stop()
    train(script, loop, end=False)
    if moment == "before":
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        loop._host.evaluate = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Terminated):
        loop.end()
    assert "The last checkpoint holds" in capfd.readouterr().err


def test_sigterm_without_checkpoints_saves_none(make_trainer, capfd):
    trainer = make_trainer(recipe=ROUNDS, max_steps=6)
    trainer.add_callback(TerminateAt(1))
    with pytest.raises(Terminated):
        trainer.train()
    assert "holds no checkpoint to continue from" in capfd.readouterr().err


def test_a_loop_that_asks_hears_of_sigterm(tmp_path):
    whole = prepared()
    train(whole, looped(whole, ROUNDS))
    script = prepared()
    loop = looped(script, ROUNDS)
    assert not loop.should_stop()
    train(script, loop, stop_at=2, end=False)
    os.kill(os.getpid(), signal.SIGTERM)
    assert loop.should_stop()
    script.accelerator.save_state(str(tmp_path / "step_2"))
    other = prepared()
    train(other, looped(other, ROUNDS), resume=newest_checkpoint(tmp_path))
    assert same(other.model, whole.model)


def test_the_newest_whole_checkpoint_is_taken_and_a_half_one_named(make_trainer, caplog):
    whole = make_trainer(recipe=ROUNDS, out="whole", **SAVING)
    whole.train()
    (folder(whole, 6) / "rng_state.pth").unlink()
    os.truncate(folder(whole, 5) / "model.safetensors", 1000)
    resumed = make_trainer(recipe=ROUNDS, out="whole", **SAVING)
    with pytest.raises(
        IncompleteCheckpointError, match=r"rng_state.pth missing. Resume from .*checkpoint-4, the newest"
    ):
        resumed.train(resume_from_checkpoint=str(folder(whole, 6)))
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is passed over (rng_state.pth missing)" in caplog.text
    assert "checkpoint-5 is passed over (model.safetensors cannot be read" in caplog.text
    assert same(resumed.model, whole.model)
    assert fault_of(folder(whole, 6)) is None and fault_of(folder(whole, 5)) is None  # written again


def test_where_no_checkpoint_is_whole_the_reason_is_named(make_trainer):
    whole = make_trainer(recipe=ROUNDS, out="whole", **SAVING | {"save_steps": 6})
    whole.train()
    (folder(whole, 6) / "optimizer.pt").unlink()
    with pytest.raises(IncompleteCheckpointError, match="no checkpoint in .* checkpoint-6: optimizer.pt missing"):
        make_trainer(recipe=ROUNDS, out="whole", **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_earlier_version_is_continued(make_trainer):
    whole = make_trainer(recipe=ROUNDS, out="whole", **SAVING)
    whole.train()
    for step in range(1, 7):
        (folder(whole, step) / MANIFEST).unlink()
    for step in (4, 5, 6):
        (folder(whole, step) / "trainer_state.json").unlink()
    resumed = make_trainer(recipe=ROUNDS, out="whole", **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert same(resumed.model, whole.model)


def test_the_best_checkpoint_is_remembered_by_its_name(make_trainer):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_total_limit": 1}
    trainer = make_trainer(recipe={"target_reduction": 0.3}, **SAVING | best)
    trainer.train()
    step = trainer.state.best_global_step
    assert trainer.state.best_model_checkpoint == str(folder(trainer, step)) and folder(trainer, step).is_dir()
    newest = max(path for path in folder(trainer, step).parent.glob("checkpoint-*"))
    stored = json.loads((newest / "trainer_state.json").read_text())
    assert stored["best_model_checkpoint"] == str(folder(trainer, stored["best_global_step"]))


def test_a_disk_that_fills_while_a_checkpoint_is_written(make_trainer, monkeypatch):
    """Nothing of it stays, earlier ones are intact, and the run goes on once there is room."""
    trainer = make_trainer(recipe=ROUNDS, **SAVING)
    save, written = torch.save, []

    def full(value, file, *args, **kwargs):
        written.append(str(file))
        save(value, file, *args, **kwargs)
        if "checkpoint-3" in str(file) and "optimizer" in str(file):
            os.truncate(file, 100)
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 151360 vs 151252")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(DiskFullError, match="Checkpoint checkpoint-3 could not be written.*the disk mounted at"):
        trainer.train()
    assert any("checkpoint-3" in name for name in written)
    out = folder(trainer, 1).parent
    names = sorted(path.name for path in out.iterdir() if "checkpoint" in path.name)
    assert names == ["checkpoint-1", "checkpoint-2"]
    monkeypatch.setattr(torch, "save", save)
    again = make_trainer(recipe=ROUNDS, **SAVING)
    again.train(resume_from_checkpoint=True)
    whole = make_trainer(recipe=ROUNDS, out="whole", **SAVING)
    whole.train()
    assert same(again.model, whole.model)


def test_a_disk_without_room_is_named_before_a_checkpoint_is_begun(make_trainer, monkeypatch):
    trainer = make_trainer(recipe=ROUNDS, **SAVING)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1_000_000))
    with pytest.raises(DiskFullError, match=r"No room for checkpoint checkpoint-1: it takes at least .*1.0 MB free"):
        trainer.train()
    assert not list(folder(trainer, 1).parent.glob("*checkpoint*"))


@pytest.mark.parametrize("narrowed", [True, False])
def test_a_model_that_does_not_fit_the_disk_leaves_no_folder_without_weights(make_trainer, monkeypatch, narrowed):
    trainer = make_trainer(recipe=ROUNDS, max_steps=2)
    if narrowed:
        trainer.train()
    final = folder(trainer, 1).with_name("final")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    saves = [lambda: trainer.save_model(str(final))]
    saves += [lambda: trainer.model.save_pretrained(final)] if narrowed else []
    for save in saves:
        with monkeypatch.context() as patch:
            patch.setattr(transformers.modeling_utils, "safe_save_file", full)
            with pytest.raises(DiskFullError, match="The model in .*final could not be written"):
                save()
        assert not final.exists()
        save()
        before = (final / "model.safetensors").read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(transformers.modeling_utils, "safe_save_file", full)
            with pytest.raises(DiskFullError):
                save()
        assert (final / "model.safetensors").read_bytes() == before and (final / "config.json").is_file()
        shutil.rmtree(final)


def test_what_is_uploaded_or_sharded_is_written_whole_first(make_trainer, monkeypatch):
    """An upload begins when the model is in its place; shards of one process appear together."""
    trainer = make_trainer(recipe=ROUNDS, max_steps=2)
    trainer.train()
    model, final, uploads = trainer.model, folder(trainer, 1).with_name("final"), []
    monkeypatch.setattr(type(model), "push_to_hub", lambda self, **told: uploads.append(told))

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "safe_save_file", full)
        patch.setattr(type(model), "save_distributed_checkpoint", full)
        for how in ({"push_to_hub": True}, {"distributed_checkpoint": True}):
            with pytest.raises(DiskFullError, match="The model in .*final could not be written"):
                model.save_pretrained(final, **how)
            assert not final.exists() and not uploads
    model.save_pretrained(final, push_to_hub=True, commit_message="first", token="t")
    assert (final / "model.safetensors").is_file()
    assert uploads == [{"repo_id": "final", "commit_message": "first", "token": "t"}]


def test_a_half_checkpoint_of_a_loop_is_refused_and_older_ones_go_last(tmp_path):
    from accelerate.utils import ProjectConfiguration

    script = prepared()
    script.accelerator.project_configuration = ProjectConfiguration(
        str(tmp_path), automatic_checkpoint_naming=True, total_limit=2
    )
    loop = looped(script, ROUNDS)
    accelerator = script.accelerator
    done = 0
    for batch in script.train:
        accelerator.backward(loop.loss(batch))
        script.optimizer.step()
        script.scheduler.step()
        script.optimizer.zero_grad()
        done += 1
        if done in (2, 3, 4):
            accelerator.save_state()
    places = tmp_path / "checkpoints"
    assert sorted(path.name for path in places.iterdir()) == ["checkpoint_1", "checkpoint_2"]
    aside = places / ".checkpoint_2.ab12cd34.old"  # a run was killed between the two renames that replace it
    aside.mkdir()
    (places / "checkpoint_2").rename(aside / "checkpoint_2")
    accelerator.load_state(str(places / "checkpoint_2"))
    assert loop._host.step == 4 and not aside.exists()
    os.truncate(places / "checkpoint_2" / "optimizer.bin", 100)
    with pytest.raises(IncompleteCheckpointError, match=r"optimizer.bin has 100 bytes.*Resume from .*checkpoint_1"):
        accelerator.load_state(str(places / "checkpoint_2"))
    accelerator.load_state()
    assert loop._host.step == 3
    shutil.rmtree(places)
    with pytest.raises(RMTKDError, match="holds no whole checkpoint"):
        accelerator.load_state()
