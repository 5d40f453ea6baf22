"""DeepSpeed's ZeRO in real processes, on the CPU: cuts inside training are those of one process. (Its first use builds
an operator, which takes minutes.)"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from . import test_two_processes
from .shard_script import parsed, run
from .test_sharded import same
from .test_two_processes import launch, start, widths


SCRIPT = "tests.distributed.shard_script"
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3}
THIRD = 3  # the stage that leaves least to a process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed (an extra) is not installed"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="deepspeed builds an operator, and there is no compiler"),
]


@pytest.fixture(scope="module", autouse=True)
def patience():
    """The operator is built by the first of the scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_two_processes, "LIMIT", 900)
        yield


def told(stage=None, resume=None, batch_size=4, ruined=False, loaded=None, partitioned=False, again=False, **options):
    """Options of the script."""
    words = ["--batch-size", str(batch_size), *["--ruined"] * ruined, *["--partitioned"] * partitioned]
    words += ["--again"] * again
    words += [] if resume is None else ["--resume", str(resume)]
    words += [] if loaded is None else ["--loaded", str(loaded)]
    words += ["--plain"] if stage is None else ["--stage", str(stage)]
    return words + [text for name, value in options.items() for text in (f"--{name}", json.dumps(value))]


def owned(out, stage, **options):
    """(results, weights) of two processes."""
    return launch(Path(out), 2, *told(stage, **options), module=SCRIPT)


def alone(out, **options):
    """The results of one process with the same batches."""
    out.mkdir()
    run(parsed([str(out), *told(batch_size=8, **options)]))
    return json.loads((out / "result-0.json").read_text())


@pytest.fixture(scope="module", params=[2, 3], ids="ZeRO-{}".format)
def stage(request):
    return request.param


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return alone(tmp_path_factory.mktemp("one") / "out")


@pytest.fixture(scope="module")
def two(tmp_path_factory, stage):
    folder = tmp_path_factory.mktemp("two") / "out"
    return (*owned(folder, stage), folder)


def test_cuts_inside_training_are_those_of_one_process(two, one):
    (ours, other), weights, _ = two
    assert ours["processes"] == 2 and ours["engine"] == "DeepSpeedEngine"
    assert ours["class"] == "RMTKDBertForSequenceClassification" and ours["kept"]
    assert ours["stages"] == other["stages"] and len(ours["stages"]) == 2
    same(*weights)
    assert [widths(stage) for stage in ours["stages"]] == [widths(stage) for stage in one["stages"]]
    for name, spectrum in one["spectra"][0].items():
        assert ours["spectra"][0][name] == pytest.approx(spectrum, rel=1e-4, abs=1e-6), name
    assert ours["losses"] == pytest.approx(one["losses"], rel=1e-4, abs=1e-4)
    assert ours["rates"] == pytest.approx(one["rates"])
    assert ours["reduction"] == one["reduction"] and ours["evaluated"] == pytest.approx(one["evaluated"], rel=1e-4)


def test_stage_1_cuts_as_stage_2(tmp_path, one):
    results, weights = owned(tmp_path / "two", 1)
    same(*weights)
    assert [widths(stage) for stage in results[0]["stages"]] == [widths(stage) for stage in one["stages"]]
    assert results[0]["losses"] == pytest.approx(one["losses"], rel=1e-4, abs=1e-4)


def test_what_is_saved_is_a_model_of_ours(two):
    from transformers import AutoModelForSequenceClassification

    import optimum_rmtkd  # noqa: F401  (its classes)

    _, weights, folder = two
    for place in (folder / "final", folder / "run" / "checkpoint-4"):
        config = json.loads((place / "config.json").read_text())
        assert config["architectures"] == ["RMTKDBertForSequenceClassification"]
        assert (place / "modeling_rmtkd.py").is_file() and (place / "model.safetensors").is_file()
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "final")
    same({name: weights[0][name] for name in loaded.state_dict()}, loaded.state_dict())


@pytest.fixture(scope="module")
def adam(tmp_path_factory, stage):
    """A run with moments, and a checkpoint after each step: before, at, and after cuts."""
    options = {"arguments": {**ADAM, "save_steps": 1}}
    folder = tmp_path_factory.mktemp("adam") / "out"
    return (*owned(folder, stage, **options), folder / "run", options)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_run_resumes_to_the_same_bits(adam, stage, tmp_path, step):
    results, weights, folder, options = adam
    again, tensors = owned(tmp_path / "again", stage, resume=folder / f"checkpoint-{step}", **options)
    assert again[0]["stages"] == results[0]["stages"]
    for rank in range(2):
        same(tensors[rank], weights[rank])


def test_another_kind_of_run_refuses_its_checkpoints(adam, stage, tmp_path):
    _, _, folder, options = adam
    options = {"resume": folder / "checkpoint-3", "batch_size": 8, **options}
    said = f"was written under DeepSpeed (ZeRO-{'3' if stage == 3 else '1 or 2'})"
    for number, (processes, other) in enumerate([(1, None), (2, 2 if stage == 3 else 3), (1, stage)]):
        done = start(tmp_path / str(number), processes, *told(other, **options), module=SCRIPT)
        assert done.returncode and said in done.stderr


def test_it_refuses_those_of_a_plain_run(stage, tmp_path):
    alone(tmp_path / "one", arguments={**ADAM, "save_steps": 1})
    checkpoint = tmp_path / "one" / "run" / "checkpoint-3"
    done = start(tmp_path / "two", 2, *told(stage, resume=checkpoint, arguments=ADAM), module=SCRIPT)
    assert done.returncode and "was written without DeepSpeed" in done.stderr


def test_bf16_is_kept_in_fp32(stage, tmp_path, one):
    """Resumed from after a cut, it ends with the same bits."""
    options = {"arguments": {**ADAM, "bf16": True, "save_steps": 1}}
    results, weights = owned(tmp_path / "two", stage, **options)
    assert [widths(s) for s in results[0]["stages"]][:1] == [widths(s) for s in one["stages"]][:1]
    assert len(results[0]["stages"]) == 2
    same(*weights)
    floats = [tensor for tensor in weights[0].values() if tensor.is_floating_point()]
    assert all(tensor.dtype == torch.float32 for tensor in floats)
    assert any((tensor != tensor.bfloat16().float()).any() for tensor in floats)
    again, tensors = owned(tmp_path / "again", stage, resume=tmp_path / "two" / "run" / "checkpoint-4", **options)
    same(tensors[0], weights[0])


def test_a_model_that_was_loaded_in_partitions_is_made_whole(stage, tmp_path, two):
    """Under ZeRO-3 `from_pretrained` leaves each process its part."""
    from ..trainer.conftest import tiny_bert

    tiny_bert().save_pretrained(tmp_path / "model")
    options = {"loaded": tmp_path / "model", "partitioned": stage == 3}
    results, weights = owned(tmp_path / "two", stage, **options)
    assert results[0]["stages"] == two[0][0]["stages"]
    same(weights[0], two[1][0])


@pytest.mark.parametrize("activations", [True, False], ids=["recomputed", "kept"])
def test_gradients_of_an_accumulated_batch_are_those_of_one_process(tmp_path, activations):
    arguments = {"gradient_accumulation_steps": 2, "max_steps": 4, "gradient_checkpointing": activations}
    results, weights = owned(tmp_path / "two", THIRD, batch_size=2, arguments=arguments)
    same(*weights)
    (theirs,), _ = launch(tmp_path / "one", 1, *told(batch_size=4, arguments=arguments), module=SCRIPT)
    assert [widths(s) for s in results[0]["stages"]] == [widths(s) for s in theirs["stages"]]
    assert results[0]["losses"] == pytest.approx(theirs["losses"], rel=1e-4, abs=1e-4)


def test_the_best_model_is_loaded_at_the_end(stage, tmp_path):
    arguments = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    arguments |= {"learning_rate": 1.5}  # so that the last step is not the best
    results, weights = owned(tmp_path / "two", stage, arguments=arguments)
    same(*weights)
    assert results[0]["best"]
    journal = json.loads((Path(results[0]["best"]) / "trainer_state.json").read_text())
    assert results[0]["evaluated"] == pytest.approx(journal["best_metric"], rel=1e-5)


def test_a_stage_is_rolled_back(tmp_path):
    options = {"recipe": {"max_metric_drop": 0.1, "rounds": 1}, "arguments": {**ADAM, "save_steps": 1}}
    results, weights = owned(tmp_path / "two", THIRD, ruined=True, **options)
    assert [s["status"] for s in results[0]["stages"]] == ["rolled_back"]
    same(*weights)
    assert results[0]["reduction"] == 0.0 and results[0]["class"] == "BertForSequenceClassification"
    checkpoint = tmp_path / "two" / "run" / "checkpoint-2"
    again, tensors = owned(tmp_path / "again", THIRD, resume=checkpoint, ruined=True, **options)
    assert again[0]["stages"] == results[0]["stages"]
    same(tensors[0], weights[0])


def test_what_distilling_made_worse_is_put_back(tmp_path):
    """Also after a checkpoint: the weights just after the cut lie whole in it."""
    options = {"recipe": {"rounds": 1}, "arguments": {**ADAM, "max_steps": 12, "save_steps": 1}}
    results, weights = owned(tmp_path / "two", THIRD, ruined=True, **options)
    assert "the weights just after the cut stay" in results[0]["stages"][0]["note"]
    same(*weights)
    checkpoint = tmp_path / "two" / "run" / "checkpoint-1"
    again, tensors = owned(tmp_path / "again", THIRD, resume=checkpoint, ruined=True, **options)
    assert again[0]["stages"] == results[0]["stages"]
    same(tensors[0], weights[0])


@pytest.mark.parametrize("teacher", ["previous", "ema"])
def test_other_teachers(tmp_path, teacher):
    options = {"recipe": {"teacher": teacher, "ema_decay": 0.5}, "arguments": {"save_steps": 1}}
    results, weights = owned(tmp_path / "two", THIRD, **options)
    (theirs,), _ = launch(tmp_path / "one", 1, *told(batch_size=8, **options), module=SCRIPT)
    assert results[0]["losses"] == pytest.approx(theirs["losses"], rel=1e-4, abs=1e-4)
    again, tensors = owned(tmp_path / "again", THIRD, resume=tmp_path / "two" / "run" / "checkpoint-4", **options)
    same(tensors[0], weights[0])


def test_a_model_is_fine_tuned_first(tmp_path):
    options = {"recipe": {"fit_share": 0.4, "rounds": 1}, "arguments": {"max_steps": 8, "save_steps": 1}}
    results, weights = owned(tmp_path / "two", THIRD, **options)
    assert len(results[0]["stages"]) == 1
    same(*weights)
    for step in (2, 5):
        checkpoint = tmp_path / "two" / "run" / f"checkpoint-{step}"
        _, tensors = owned(tmp_path / f"again-{step}", THIRD, resume=checkpoint, **options)
        same(tensors[0], weights[0])


def test_what_is_trained_beside_the_student_is_that_of_one_process(tmp_path):
    script, parts = "tests.distributed.distil_script", ("--parts", "beside")
    (theirs,), (weights,) = launch(tmp_path / "one", 1, "--batch-size", "8", *parts, module=script)
    options = ("--batch-size", "2", "--accumulation", "2", "--stage", str(THIRD))
    results, ranks = launch(tmp_path / "two", 2, *options, *parts, module=script)
    assert results[0]["wrapped"] == "DeepSpeedEngine" and results[0]["adapters"] == results[1]["adapters"]
    assert results[0]["losses"] == pytest.approx(theirs["losses"], rel=2e-3, abs=1e-5)
    assert len(results[0]["adapters"]) == len(theirs["adapters"]) > 2
    for name, tensor in ranks[0].items():
        assert torch.equal(tensor, ranks[1][name]), name
        assert torch.allclose(tensor, weights[name], atol=5e-3), name


def test_a_training_follows_another_and_an_evaluation(tmp_path):
    results, weights = owned(tmp_path / "two", THIRD, again=True)
    same(*weights)
    assert len(results[0]["stages"]) == 2 and results[0]["engine"] == "DeepSpeedEngine"


def test_a_narrowed_checkpoint_trains_under_plain_deepspeed(stage, two, tmp_path):
    """The documented way for what cannot cut inside training: cut first, train sharded afterwards."""
    options = ("--model", str(two[2] / "final"), "--stage", str(stage))
    results, weights = launch(tmp_path / "out", 2, *options, module="tests.distributed.plain_script")
    assert results[0]["class"] == "RMTKDBertForSequenceClassification"
    assert results[0]["losses"][-1] < results[0]["losses"][0]
    same(*weights)
    assert results[0]["reloaded"] == 0.0
