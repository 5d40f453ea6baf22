"""FSDP2 in real processes, on the CPU: cuts inside sharded training are those of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from .shard_script import parsed, run
from .test_two_processes import launch, widths


SCRIPT = "tests.distributed.shard_script"
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3}


def sharded(out, processes=2, resume=None, plain=False, batch_size=None, double=False, ruined=False, **options):
    """(results, weights) of a run, options by name as JSON."""
    told = [text for name, value in options.items() for text in (f"--{name}", json.dumps(value))]
    told += (
        ["--plain"] * plain
        + ["--double"] * double
        + ["--ruined"] * ruined
        + ([] if resume is None else ["--resume", str(resume)])
    )
    told += ["--batch-size", str(batch_size or 8 // processes)]
    return launch(Path(out), processes, *told, module=SCRIPT)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "out"
    return (*sharded(folder, double=True), folder)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run(parsed([str(folder), "--plain", "--double", "--batch-size", "8"]))
    return json.loads((folder / "result-0.json").read_text())


def same(ours, theirs):
    """Bit for bit."""
    assert list(ours) == list(theirs)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_cuts_inside_sharded_training_are_those_of_one_process(two, one):
    (ours, other), weights, folder = two
    theirs = one
    assert ours["processes"] == 2 and ours["sharded"] and ours["class"].startswith("FSDP")
    assert ours["stages"] == other["stages"] and len(ours["stages"]) == 2
    same(*weights)
    assert [widths(stage) for stage in ours["stages"]] == [widths(stage) for stage in theirs["stages"]]
    for name, spectrum in theirs["spectra"][0].items():
        assert ours["spectra"][0][name] == pytest.approx(spectrum, rel=1e-10, abs=1e-12), name
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5, abs=1e-5)
    assert ours["rates"] == pytest.approx(theirs["rates"])
    assert ours["teachers"] == ["FSDPBertForSequenceClassification"] and ours["alias"]


def test_what_is_saved_is_a_model_of_ours(two):
    from transformers import AutoModelForSequenceClassification

    import optimum_rmtkd  # noqa: F401  (its classes)

    _, weights, folder = two
    for place in (folder / "final", folder / "run" / "checkpoint-4"):
        config = json.loads((place / "config.json").read_text())
        assert config["architectures"] == ["RMTKDBertForSequenceClassification"]
        assert not list(place.glob("*fsdp*.py")) and (place / "modeling_rmtkd.py").is_file()
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "final")
    same({name: weights[0][name] for name in loaded.state_dict()}, loaded.state_dict())


@pytest.fixture(scope="module", params=["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def adam(tmp_path_factory, request):
    """A run with moments, and a checkpoint after each step: before, at, and after cuts."""
    options = {"config": {"state_dict_type": request.param}, "arguments": {**ADAM, "save_steps": 1}}
    folder = tmp_path_factory.mktemp("adam") / "out"
    return (*sharded(folder, **options), folder / "run", options)


@pytest.mark.slow
def test_moments_of_what_did_not_change_go_on_as_in_one_process(adam, tmp_path):
    results, weights, _, options = adam
    (theirs,), _ = sharded(tmp_path / "one", 1, plain=True, arguments=options["arguments"])
    assert [widths(s) for s in results[0]["stages"]] == [widths(s) for s in theirs["stages"]]
    assert results[0]["losses"] == pytest.approx(theirs["losses"], rel=1e-4, abs=1e-5)
    assert results[0]["rates"] == pytest.approx(theirs["rates"])


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_sharded_run_resumes_to_the_same_bits(adam, tmp_path, step):
    results, weights, folder, options = adam
    again, tensors = sharded(tmp_path / "again", resume=folder / f"checkpoint-{step}", **options)
    assert again[0]["stages"] == results[0]["stages"]
    for rank in range(2):
        same(tensors[rank], weights[rank])


@pytest.mark.slow
def test_one_process_takes_up_a_sharded_run(adam, tmp_path):
    results, _, folder, options = adam
    checkpoint = folder / "checkpoint-3"
    (again,), _ = sharded(tmp_path / "again", 1, checkpoint, plain=True, arguments=options["arguments"])
    assert again["processes"] == 1
    assert [widths(s) for s in again["stages"]] == [widths(s) for s in results[0]["stages"]]
    ours, theirs = ({k: v for k, v in r["losses"].items() if int(k[0]) > 3} for r in (again, results[0]))
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_three_processes_take_up_a_run_of_two(adam, tmp_path):
    results, _, folder, options = adam
    again, weights = sharded(tmp_path / "again", 3, folder / "checkpoint-1", **options)
    assert [r["processes"] for r in again] == [3] * 3
    assert [widths(s) for s in again[0]["stages"]][:1] == [widths(s) for s in results[0]["stages"]][:1]
    assert len(again[0]["stages"]) == 2 and again[0]["losses"]["1/loss"] == results[0]["losses"]["1/loss"]
    for other in weights[1:]:
        same(other, weights[0])


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "step"), [(ADAM, 3), (ADAM, 2), ({}, 3)])  # 2: a cut has dropped moments
def test_a_run_of_one_process_goes_on_sharded(tmp_path, optimizer, step):
    arguments = {**optimizer, "save_steps": 1}
    (theirs,), _ = sharded(tmp_path / "one", 1, plain=True, arguments=arguments)
    checkpoint = tmp_path / "one" / "run" / f"checkpoint-{step}"
    results, weights = sharded(tmp_path / "two", 2, checkpoint, arguments=arguments)
    same(*weights)
    assert [widths(s) for s in results[0]["stages"]] == [widths(s) for s in theirs["stages"]]
    ours, losses = ({k: v for k, v in r["losses"].items() if int(k[0]) > step} for r in (results[0], theirs))
    assert ours == pytest.approx(losses, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_bf16(tmp_path):
    results, weights = sharded(tmp_path / "two", arguments={"bf16": True})
    assert len(results[0]["stages"]) == 2
    same(*weights)
    assert all(tensor.dtype == torch.float32 for tensor in weights[0].values() if tensor.is_floating_point())


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"config": {"activation_checkpointing": True}},
        {"arguments": {"gradient_checkpointing": True}},
    ],
)
def test_activation_checkpointing_changes_nothing(tmp_path, two, how):
    results, weights = sharded(tmp_path / "two", double=True, **how)
    assert results[0]["stages"] == two[0][0]["stages"]
    for name, tensor in two[1][0].items():
        assert torch.allclose(weights[0][name], tensor, atol=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_the_best_model_is_loaded_at_the_end(tmp_path, kind):
    arguments = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    arguments |= {"learning_rate": 1.5}  # so that the last step is not the best
    results, weights = sharded(tmp_path / "two", arguments=arguments, config={"state_dict_type": kind})
    same(*weights)
    assert results[0]["best"]
    journal = json.loads((Path(results[0]["best"]) / "trainer_state.json").read_text())
    assert results[0]["evaluated"] == pytest.approx(journal["best_metric"], rel=1e-5)


@pytest.mark.slow
def test_a_stage_is_rolled_back(tmp_path):
    options = {"recipe": {"max_metric_drop": 0.1, "rounds": 1}, "arguments": {**ADAM, "save_steps": 1}}
    results, weights = sharded(tmp_path / "two", ruined=True, **options)
    assert [stage["status"] for stage in results[0]["stages"]] == ["rolled_back"]
    same(*weights)
    assert results[0]["reduction"] == 0.0 and results[0]["class"] == "FSDPBertForSequenceClassification"
    checkpoint = tmp_path / "two" / "run" / "checkpoint-2"
    again, tensors = sharded(tmp_path / "again", resume=checkpoint, ruined=True, **options)
    assert again[0]["stages"] == results[0]["stages"]
    same(tensors[0], weights[0])


@pytest.mark.slow
def test_what_distilling_made_worse_is_put_back(tmp_path):
    """Also after a checkpoint: the weights just after the cut lie whole in it."""
    options = {"recipe": {"rounds": 1}, "arguments": {**ADAM, "max_steps": 12, "save_steps": 1}}
    results, weights = sharded(tmp_path / "two", ruined=True, **options)
    assert "the weights just after the cut stay" in results[0]["stages"][0]["note"]
    same(*weights)
    checkpoint = tmp_path / "two" / "run" / "checkpoint-1"
    again, tensors = sharded(tmp_path / "again", resume=checkpoint, ruined=True, **options)
    assert again[0]["stages"] == results[0]["stages"]
    same(tensors[0], weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["previous", "ema"])
def test_other_teachers_are_sharded_as_well(tmp_path, teacher):
    options = {"recipe": {"teacher": teacher, "ema_decay": 0.5}, "arguments": {**ADAM, "save_steps": 1}}
    results, weights = sharded(tmp_path / "two", **options)
    assert all(name.startswith("FSDP") for name in results[0]["teachers"])
    (theirs,), _ = sharded(tmp_path / "one", 1, plain=True, **options)
    assert results[0]["losses"] == pytest.approx(theirs["losses"], rel=1e-4, abs=1e-5)
    again, tensors = sharded(tmp_path / "again", resume=tmp_path / "two" / "run" / "checkpoint-4", **options)
    same(tensors[0], weights[0])


@pytest.mark.slow
def test_a_teacher_may_stay_whole(tmp_path, two):
    results, weights = sharded(tmp_path / "two", double=True, arguments={"shard_teacher": False})
    assert results[0]["teachers"] == ["BertForSequenceClassification"]
    assert results[0]["losses"] == pytest.approx(two[0][0]["losses"], rel=1e-5, abs=1e-6)


FITTED = {"recipe": {"fit_share": 0.4, "rounds": 1}, "arguments": {**ADAM, "max_steps": 8, "save_steps": 1}}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.mark.slow
def test_a_model_is_fine_tuned_first_as_in_one_process(tmp_path):
    """Without dropout, whose masks each process draws for its own rows: with it the weights that are cut differ by
    what they would differ by under another seed."""
    options = FITTED | {"model": STILL, "double": True}
    results, weights = sharded(tmp_path / "two", **options)
    (theirs,), _ = sharded(tmp_path / "one", 1, plain=True, **options)
    same(*weights)
    (ours,), (stage,) = results[0]["stages"], theirs["stages"]
    assert stage["step"] == ours["step"] == 3 and widths(ours) == widths(stage)
    for name, spectrum in theirs["spectra"][0].items():
        assert results[0]["spectra"][0][name] == pytest.approx(spectrum, rel=1e-10, abs=1e-12), name
    assert results[0]["losses"] == pytest.approx(theirs["losses"], rel=1e-5, abs=1e-5)
    assert results[0]["rates"] == pytest.approx(theirs["rates"])


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 5])  # in the fit, and after the cut
def test_a_run_that_is_fine_tuned_first_resumes_to_the_same_bits(fitted, tmp_path, step):
    weights, folder = fitted
    _, tensors = sharded(tmp_path / "again", resume=folder / f"checkpoint-{step}", **FITTED)
    for rank in range(2):
        assert tensors[rank].keys() == weights[rank].keys()
        same(tensors[rank], weights[rank])


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fitted") / "out"
    return sharded(folder, **FITTED)[1], folder / "run"


@pytest.mark.slow
def test_gradients_of_an_accumulated_batch_are_cleared_after_a_cut_within_an_epoch(tmp_path):
    options = {"arguments": {"gradient_accumulation_steps": 2, "max_steps": 4}}
    results, weights = sharded(tmp_path / "two", batch_size=2, **options)
    (theirs,), _ = sharded(tmp_path / "one", 1, plain=True, batch_size=4, **options)
    assert results[0]["losses"] == pytest.approx(theirs["losses"], rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_a_narrowed_checkpoint_trains_under_plain_fsdp2(two, tmp_path):
    """The documented way for what cannot cut inside training: cut first, train sharded afterwards."""
    script = "tests.distributed.plain_script"
    results, weights = launch(tmp_path / "out", 2, "--model", str(two[2] / "final"), module=script)
    assert results[0]["class"] == "FSDPRMTKDBertForSequenceClassification"
    assert results[0]["losses"][-1] < results[0]["losses"][0]
    same(*weights)
