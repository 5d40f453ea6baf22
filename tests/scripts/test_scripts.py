"""Scripts in the shape of transformers' own, started as a user starts them: with a plain Trainer, and with the few
lines that make it ours, from a raw checkpoint and from a fine-tuned one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from .declarations import SCRIPTS
from .workshop import RECIPE, TRAINER, Workshop, journal, results, steps_of, tensors, weights


def scripts(*names: str, but: tuple[str, ...] = (), quick: tuple[str, ...] = ()):
    """Parameters: the named scripts (none: all but some); slow unless they are quick."""
    chosen = [s for s in SCRIPTS if (not names or s.name in names) and s.name not in but]
    return [pytest.param(s.name, id=s.name, marks=() if s.name in quick else pytest.mark.slow) for s in chosen]


@pytest.fixture(scope="session")
def workshops(tmp_path_factory):
    """The workshop of a script, by its name; made when first asked for."""
    made: dict[str, Workshop] = {}

    def of(name: str) -> Workshop:
        if name not in made:
            script = next(s for s in SCRIPTS if s.name == name)
            made[name] = Workshop(script, tmp_path_factory.mktemp(name) / "workshop")
        return made[name]

    return of


# -- what must hold after every run -----------------------------------------------------------------------------------


def check_metrics(shop: Workshop, out: Path) -> None:
    """Every metric that the script computes stands in the journal, before the first cut and at the end."""
    stages, final = journal(out)["stages"], results(out)
    computed = {n for n in final if n.startswith(shop.script.kind.prefix)}
    computed -= {"eval_samples", "eval_model_preparation_time"}
    computed = {n for n in computed if not n.endswith(("_runtime", "_per_second"))}
    assert shop.script.judged_by in computed
    for moment in ("metrics_before", "metrics_cut"):
        assert computed <= set(stages[0][moment]), moment
    after = stages[-1]["metrics_after"]
    assert computed <= set(after)
    if shop.script.exact:
        assert {n: after[n] for n in computed} == pytest.approx({n: final[n] for n in computed}, rel=1e-4, abs=1e-6)


def check_model(shop: Workshop, out: Path, target: float) -> None:
    """The saved model has the size that was asked for, and is what a fresh process evaluates alike."""
    told = journal(out)
    assert told["reduction"] == pytest.approx(target, abs=0.02)
    parameters = {name: t for name, t in weights(out).items() if name != "final_logits_bias"}  # a buffer of BART
    assert sum(t.numel() for t in parameters.values()) == told["parameters_after"]
    assert json.loads((out / "config.json").read_text())["model_type"].startswith("rmtkd_")
    again, final = shop.evaluated_again(out), results(out)
    name = shop.script.judged_by
    assert again[name] == pytest.approx(final[name], rel=shop.script.tolerance)


def check_files(shop: Workshop, out: Path) -> None:
    """Nothing half-written: files are what they say they are, and no temporary one is left."""
    for path in out.parent.rglob("*"):
        if "cache" in path.relative_to(out.parent).parts:
            continue
        assert "tmp" not in path.name and not path.name.startswith("."), path
        if path.suffix == ".json" and "data" not in path.parts:
            json.loads(path.read_text())
        if path.suffix == ".safetensors":
            assert tensors(path)
    needed = {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"}
    for checkpoint in shop.checkpoints(out) if shop.script.kind is TRAINER else ():
        assert needed <= {path.name for path in checkpoint.iterdir()}


def check_card(shop: Workshop, out: Path) -> None:
    """The card tells the metric, before and after."""
    card = (out / "README.md").read_text()
    assert shop.script.metric in card and "optimum-rmtkd" in card


def check_all(shop: Workshop, out: Path, target: float = RECIPE["target_reduction"]) -> None:
    check_metrics(shop, out)
    check_model(shop, out, target)
    check_files(shop, out)
    if shop.script.kind is TRAINER:
        check_card(shop, out)


def check_as_good_as_plain(shop: Workshop, out: Path) -> None:
    name, script = shop.script.judged_by, shop.script
    sign = 1 if script.greater_is_better else -1
    ours, theirs, chance = sign * results(out)[name], sign * results(shop.plain)[name], sign * script.chance
    assert theirs > chance + 4 * script.within, f"the toy task is not learnt: {theirs}"
    assert ours >= theirs - script.within


def check_same_weights(ours: Path, theirs: Path) -> None:
    one, two = weights(ours), weights(theirs)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


# -- the runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", scripts(quick=("glue",)))
def test_from_a_raw_checkpoint(workshops, name):
    """It is fine-tuned, cut and distilled in the one `train()`, and ends about where the plain script does."""
    shop = workshops(name)
    assert journal(shop.narrow)["stages"][0]["step"] > 0, "a model that cannot teach was cut at once"
    check_all(shop, shop.narrow)
    check_as_good_as_plain(shop, shop.narrow)


@pytest.mark.parametrize("name", scripts(quick=("qa",)))
def test_from_a_fine_tuned_checkpoint(workshops, name):
    """It is cut at once, and keeps what it can do."""
    shop = workshops(name)
    out = shop.run("tuned", shop.plain, {}, num_train_epochs=2)
    stage, judged = journal(out)["stages"][0], shop.script.judged_by
    assert stage["step"] == 0
    assert stage["metrics_before"][judged] == pytest.approx(results(shop.plain)[judged], rel=shop.script.tolerance)
    check_all(shop, out)
    check_as_good_as_plain(shop, out)


@pytest.mark.parametrize("name", scripts(quick=("glue",)))
def test_resumed_after_the_cut_it_ends_with_the_same_bits(workshops, name):
    shop = workshops(name)
    check_resumed(shop, [c for c in shop.checkpoints(shop.narrow) if steps_of(c) > cut_at(shop.narrow)])


@pytest.mark.slow
@pytest.mark.parametrize("name", scripts())
def test_resumed_in_the_midst_of_fine_tuning_it_ends_with_the_same_bits(workshops, name):
    shop = workshops(name)
    check_resumed(shop, [c for c in shop.checkpoints(shop.narrow) if steps_of(c) < cut_at(shop.narrow)])


def cut_at(out: Path) -> int:
    return journal(out)["stages"][0]["step"]


def check_resumed(shop: Workshop, candidates: list[Path]) -> None:
    """From the first of these checkpoints of the whole run."""
    assert candidates, f"no such checkpoint; the cut was at step {cut_at(shop.narrow)}"
    first = candidates[0]
    out = shop.run(f"from-{steps_of(first)}", shop.raw, {}, resume_from_checkpoint=first, **shop.script.kind.during)
    check_same_weights(out, shop.narrow)
    assert journal(out)["stages"] == journal(shop.narrow)["stages"]


FEW = ("glue_pairs", "glue_loop", "mlm_joined", "classification_multi_label", "classification_regression")
VARIANTS = {
    "bf16": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
    "checkpointing": {"gradient_checkpointing": True},
    "best_model": TRAINER.during | {"load_best_model_at_end": True, "save_total_limit": 2},
    "together": TRAINER.during
    | {"bf16": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True, "load_best_model_at_end": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", scripts(but=FEW))
def test_with_what_trainers_are_given(workshops, name, variant):
    shop = workshops(name)
    options = dict(VARIANTS[variant])
    if "load_best_model_at_end" in options:
        options["metric_for_best_model"] = shop.script.metric
    out = shop.run(f"{variant}-run", shop.raw, {}, **options)
    check_as_good_as_plain(shop, out)
    check_model(shop, out, RECIPE["target_reduction"])
    check_files(shop, out)
    if "load_best_model_at_end" in options:
        check_best_model(shop, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16"},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        {"gradient_checkpointing": True},
    ],
    ids=["bf16", "accumulation", "checkpointing"],
)
def test_a_loop_with_what_loops_are_given(workshops, options):
    shop = workshops("glue_loop")
    out = shop.run(f"{next(iter(options))}-run", shop.raw, {}, **options)
    check_as_good_as_plain(shop, out)
    check_all(shop, out)


def check_best_model(shop: Workshop, out: Path) -> None:
    """The best of the checkpoints after the last cut is what was saved, and the stages were judged by that metric."""
    stages = journal(out)["stages"]
    assert {stage["metric_name"] for stage in stages} == {shop.script.judged_by}
    state = json.loads((out / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    check_same_weights(out, best)
    assert steps_of(best) > stages[-1]["step"]
    later = [line for line in state["log_history"] if line["step"] > stages[-1]["step"]]
    best = max if shop.script.greater_is_better else min
    assert state["best_metric"] == best(line[shop.script.judged_by] for line in later if shop.script.judged_by in line)


@pytest.mark.slow
@pytest.mark.parametrize("name", scripts("glue", "glue_loop", "qa", "summarization", "classification_weighted"))
def test_in_two_processes(workshops, name):
    """As good as in one, and resumed to the same bits."""
    shop = workshops(name)
    halved = shop.script.kind.during | {"per_device_train_batch_size": 8}
    whole = shop.run("two-run", shop.raw, {}, processes=2, **halved)
    check_all(shop, whole)
    check_as_good_as_plain(shop, whole)
    after = next(c for c in shop.checkpoints(whole) if steps_of(c) > cut_at(whole))
    out = shop.run("two-resumed", shop.raw, {}, processes=2, resume_from_checkpoint=after, **halved)
    check_same_weights(out, whole)


@pytest.mark.slow
def test_two_cuts_from_a_raw_checkpoint(workshops):
    """The second one comes when the first has been distilled."""
    shop = workshops("glue")
    out = shop.run("deep-run", shop.raw, {"target_reduction": 0.8, "rounds": 2})
    check_all(shop, out, 0.8)
    check_as_good_as_plain(shop, out)
    first, second = journal(out)["stages"]
    assert 0 < first["step"] < second["step"]


@pytest.mark.slow
@pytest.mark.parametrize("name", scripts("summarization", "summarization_bart"))
def test_a_student_learns_from_a_given_teacher_without_a_cut(workshops, name):
    shop = workshops(name)
    recipe = {"schedule": "none", "form": None, "target_reduction": None}
    out = shop.run("taught-run", shop.raw, recipe, teacher_name_or_path=shop.plain)
    assert not (out / "rmtkd_stages.json").exists() or not journal(out)["stages"]
    assert weights(out).keys() == weights(shop.plain).keys()
    check_as_good_as_plain(shop, out)
    check_files(shop, out)


@pytest.mark.parametrize("name", scripts("glue_regression", "classification_regression"))
def test_an_error_that_judges_is_to_be_small(workshops, name):
    """transformers takes its name for that of a metric to be large: every good stage would be repeated, and undone."""
    shop = workshops(name)
    out = shop.run("judged-run", shop.raw, {}, metric_for_best_model="mse")
    check_all(shop, out)
    check_as_good_as_plain(shop, out)
    (stage,) = journal(out)["stages"]
    assert stage["metric_name"] == "eval_mse" and not stage["note"]
    assert stage["metric_after"] < stage["metric_cut"]


@pytest.mark.slow
def test_the_metric_that_judges_is_the_one_that_was_named(workshops):
    """Of several that an `evaluate` of the user's own gives; the others are recorded beside it."""
    shop = workshops("qa")
    out = shop.run("f1-run", shop.plain, {}, num_train_epochs=2, metric_for_best_model="f1")
    assert {stage["metric_name"] for stage in journal(out)["stages"]} == {"eval_f1"}
    check_metrics(shop, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", scripts("glue", "qa"))
def test_without_validation_data(workshops, name):
    """What the cut costs is predicted where it cannot be measured."""
    shop = workshops(name)
    out = shop.run("blind-run", shop.raw, {}, do_eval=False)
    (stage,) = journal(out)["stages"]
    assert stage["step"] > 0 and stage["metrics_before"] is None and stage["status"] == "accepted"
    assert stage["predicted_loss"] is not None
    assert journal(out)["reduction"] == pytest.approx(RECIPE["target_reduction"], abs=0.02)
    again = shop.evaluated_again(out)[shop.script.judged_by]
    assert again >= results(shop.plain)[shop.script.judged_by] - shop.script.within
