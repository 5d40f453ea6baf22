"""The model card, and the two roads by which it gets to the Hub."""

from __future__ import annotations

import json

import pytest
import yaml
from huggingface_hub import ModelCard

from optimum_rmtkd.hub import Run, model_card, write_card, write_results
from optimum_rmtkd.hub.card import is_ours

from .server import card_errors
from .test_push_pull import CLIENT, last_line


STAGE = {
    "index": 0,
    "step": 0,
    "sites": [],
    "parameters_before": 1000,
    "parameters_after": 400,
    "metric_name": "eval_accuracy",
    "metric_before": 0.9,
    "metric_cut": 0.7,
    "metric_after": 0.88,
    "status": "accepted",
    "reason": None,
}
CONFIG = {
    "architectures": ["RMTKDBertForSequenceClassification"],
    "auto_map": {
        "AutoConfig": "modeling_rmtkd.RMTKDBertConfig",
        "AutoModel": "modeling_rmtkd.RMTKDBertModel",
        "AutoModelForSequenceClassification": "modeling_rmtkd.RMTKDBertForSequenceClassification",
    },
    "rmtkd": {"recipe": {"target_reduction": 0.6, "seed": 3}, "provenance": {"base_model": "org/base"}},
}


def run(**changes) -> Run:
    return Run(**{"name": "small", "config": CONFIG, "stages": (STAGE,)} | changes)


def metadata(card: ModelCard) -> dict:
    return yaml.safe_load(str(card).split("---")[1])


def test_metadata_says_what_it_is_and_where_it_comes_from():
    results = {"dataset": {"id": "org/data", "name": "Data", "split": "validation", "on_hub": True}}
    found = metadata(model_card(run(results=results), "user/small", license="mit"))
    assert found["base_model"] == "org/base" and found["base_model_relation"] == "finetune"
    assert found["library_name"] == "transformers" and found["pipeline_tag"] == "text-classification"
    assert {"rmtkd", "optimum"} <= set(found["tags"]) and found["license"] == "mit"
    assert found["datasets"] == ["org/data"]
    (result,) = found["model-index"][0]["results"]
    assert found["model-index"][0]["name"] == "small"
    assert result["metrics"] == [{"type": "accuracy", "value": 0.88, "name": "accuracy"}]
    assert result["dataset"] == {"type": "org/data", "name": "Data", "split": "validation"}


def test_text_shows_sizes_stages_loading_recipe_and_limits():
    text = model_card(run(), "user/small").text
    assert "| parameters | 1,000 | 400 | -60.0 % |" in text
    assert "| accuracy | 0.9000 | 0.8800 | -0.0200 |" in text
    assert "| 0 | 0 | 1,000 → 400 | 60.0% | 0.9000 | 0.7000 | 0.8800 | accepted |" in text
    assert text.count('AutoModelForSequenceClassification.from_pretrained("user/small"') == 2
    assert "trust_remote_code=True" in text and "import optimum_rmtkd" in text
    assert json.loads(text.split("```json")[1].split("```")[0]) == CONFIG["rmtkd"]["recipe"]
    assert "## Limits" in text and "Latency was not measured" in text


METRICS = {
    "metrics_before": {"eval_loss": 0.31, "eval_accuracy": 0.9, "eval_f1": 0.91},
    "metrics_cut": {"eval_loss": 0.8, "eval_accuracy": 0.7, "eval_f1": 0.5},
    "metrics_after": {"eval_loss": 0.35, "eval_accuracy": 0.88, "eval_f1": 0.89},
}


def test_every_metric_of_the_evaluations_is_shown_before_and_after():
    stage = STAGE | METRICS | {"predicted_loss": 0.25, "learning_rate": 1e-4, "note": "a note"}
    metrics = {"before": METRICS["metrics_before"], "after": METRICS["metrics_after"]}
    text = model_card(run(stages=(stage,), metrics=metrics), "user/small").text
    comparison, stages = text.split("## Stages")
    for row in ("| accuracy | 0.9000 | 0.8800 | -0.0200 |", "| f1 | 0.9100 | 0.8900 | -0.0200 |"):
        assert comparison.count(row) == 1
    assert "| loss | 0.3100 | 0.3500 | +0.0400 |" in comparison
    assert "| f1 | 0 | 0.9100 | 0.5000 | 0.8900 |" in stages and "| loss | 0 | 0.3100 | 0.8000 | 0.3500 |" in stages
    assert (
        "| added loss, predicted | 0 | - | 0.2500 | - |" in stages
        and "* stage 0: learning rate 0.0001; a note" in stages
    )
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(a.split("|")) in (len(b.split("|")), 6, 7, 10) for a, b in zip(tables, tables[1:], strict=False))


def test_the_fine_tuning_before_the_first_cut_is_told():
    fit = {"steps": 100, "share": 0.4, "why": "its head is newly initialised"}
    text = model_card(run(fit=fit), "user/small").text
    assert (
        "Fine-tuned first: 100 steps, 40% of the training (its head is newly initialised); eval_accuracy 0.9000 at "
        "its end.\n"
    ) in text
    assert "ine-tuned first" not in model_card(run(), "user/small").text


def test_bench_rows_reach_the_card():
    bench = {
        "setting": "CPU, 1 thread, float32",
        "rows": [["latency, batch 1", "9.0 ms", "4.5 ms", "2.00x (1.90 to 2.10)"]],
    }
    text = model_card(run(bench=bench)).text
    assert "| latency, batch 1 | 9.0 ms | 4.5 ms | 2.00x (1.90 to 2.10) |" in text
    assert "CPU, 1 thread, float32" in text and "Latency was not measured" not in text


def test_nothing_is_claimed_that_was_not_measured():
    quiet = STAGE | {"metric_name": None, "metric_before": None, "metric_cut": None, "metric_after": None}
    card = model_card(run(stages=(quiet,)))
    assert "model-index" not in metadata(card) and "accuracy" not in card.text
    assert "not measured" in card.text


def test_paths_of_somebodys_machine_stay_there(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(CONFIG | {"rmtkd": {"provenance": {"base_model": str(tmp_path)}}})
    )
    found = model_card(Run.read(tmp_path), "user/small")
    assert str(tmp_path.parent) not in str(found)
    assert "base_model" not in metadata(found)


@pytest.mark.parametrize(
    "header, complaint",
    [
        ("tags: rmtkd", "tags must be a list"),
        ("base_model_relation: cousin", "unknown"),
        ("model-index:\n- name: x\n  results:\n  - metrics: []", "task.type"),
        ("a: [", "invalid YAML"),
    ],
)
def test_the_validator_can_say_no(header, complaint):
    assert complaint in " ".join(card_errors(f"---\n{header}\n---\n# x"))


def test_a_rejected_value_never_becomes_a_result(tmp_path):
    write_results(tmp_path, metric={"name": "accuracy", "before": 0.9, "after": float("nan")})
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "model-index" not in metadata(model_card(Run.read(tmp_path)))


def test_metadata_is_remembered_when_the_card_is_written_again(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write_card(tmp_path, "user/small", license="mit", language="en", tags=["mine"])
    assert is_ours(tmp_path)
    found = metadata(ModelCard(write_card(tmp_path, language="de").read_text(encoding="utf8")))
    assert (found["license"], found["language"]) == ("mit", "de") and "mine" in found["tags"]
    (tmp_path / "README.md").write_text("# mine")
    assert not is_ours(tmp_path)


def test_distilled_and_repeatable():
    training = {"epochs": 2.0, "batch_size": 16, "gradient_accumulation_steps": 4, "learning_rate": 1e-4, "bf16": True}
    dataset = {"name": "dev", "split": "validation", "rows": 1200}
    cut = model_card(run(results={"dataset": dataset}))
    assert "knowledge-distillation" not in metadata(cut)["tags"] and "--no-train" in cut.text
    card = model_card(
        run(results={"dataset": dataset, "training": training, "log_history": [{"step": 1, "loss": 1.0}]})
    )
    assert "knowledge-distillation" in metadata(card)["tags"]
    assert "--epochs 2 --batch-size 16 --gradient-accumulation-steps 4 --learning-rate 0.0001 --bf16" in card.text
    assert "Data: dev, validation (1,200 rows)." in card.text


def test_license_of_the_base_and_no_network(hub, as_user, workplace):
    """A Hub out of reach must not cost a finished training."""
    there = last_line(as_user(hub, CLIENT, "licenses", workplace))
    assert there == {"user/licensed": "mit", "user/absent": None}
    dead = type("Dead", (), {"url": "http://127.0.0.1:9"})
    assert last_line(as_user(dead, CLIENT, "offline", workplace)) == {"user/licensed": None}


def pushed_card(hub, repository: str) -> tuple[dict, str]:
    text = hub.files(repository)["README.md"].decode()
    assert card_errors(text) == []
    return yaml.safe_load(text.split("---")[1]), text


def test_trainer_push(hub, as_user, workplace):
    last_line(as_user(hub, CLIENT, "trainer", workplace))
    assert any(path == "/api/validate-yaml" for _, path in hub.log) and hub.errors == []
    files = hub.files("user/trained")
    assert {"config.json", "model.safetensors", "modeling_rmtkd.py", "rmtkd_stages.json", "tokenizer.json"} <= set(
        files
    )
    found, text = pushed_card(hub, "user/trained")
    assert "from-the-test" in found["tags"] and found["language"] == "en" and found["datasets"] == ["user/praise"]
    assert found["model-index"][0]["results"][0]["dataset"]["name"] == "Praise and blame"
    assert 'from_pretrained("user/trained")' in text
    assert str(workplace) not in "".join(files[name].decode() for name in files if name.startswith("rmtkd_"))


def test_compress_push(hub, as_user, workplace):
    pytest.importorskip("matplotlib")
    last_line(as_user(hub, CLIENT, "compress", workplace))
    files = hub.files("user/small")
    assert {"config.json", "model.safetensors", "modeling_rmtkd.py", "rmtkd_recipe.json"} <= set(files)
    assert files["figures/widths.png"].startswith(b"\x89PNG")
    found, text = pushed_card(hub, "user/small")
    assert found["model-index"][0]["results"][0]["metrics"][0]["type"] == "accuracy"
    assert not [name for name, content in files.items() if str(workplace).encode() in content]
    assert 'from_pretrained("user/small")' in text and "(figures/widths.png)" in text
    assert hub.errors == []
