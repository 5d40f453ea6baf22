"""`optimum-cli rmtkd ternary` from outside."""

from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification

import optimum_rmtkd  # noqa: F401
from optimum_rmtkd.layers_rmtkd import TernaryMLP
from tests.conftest import ROOT


def arrays(rows: int = 400, seed: int = 0, classes: bool = True) -> dict[str, np.ndarray]:
    """Two classes that no line separates: inside and outside a ball."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, 40)) * np.where(np.arange(rows) % 2, 1.0, 1.4)[:, None]
    return {"x": x, "y": np.arange(rows) % 2 if classes else x[:, 0] ** 2}


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "train.npz", **arrays())
    save_file({k: torch.from_numpy(v) for k, v in arrays(200, 1).items()}, tmp_path / "test.safetensors")
    return tmp_path


def test_help_teaches(cli):
    code, out, err = cli("ternary", "--help")
    assert code == 0 and err == "" and "usage: optimum-cli rmtkd ternary" in out
    for part in ("--hidden", "--mode", "--storage", "--target-reduction", "not inference faster", "examples:"):
        assert part in out


def test_features(cli, files):
    small = ("--hidden", 300, 300, "--mode", "weights_only")
    code, out, err = cli(
        "ternary",
        "--features",
        files / "train.npz",
        "--test-features",
        files / "test.safetensors",
        *small,
        "-o",
        files / "out",
    )
    assert code == 0, err
    for part in (
        "weights_only, base3:",
        "bits a hidden weight on disk",
        "this network",
        "dense random network",
        "linear readout",
    ):
        assert part in out
    scores = [float(line.split()[-1]) for line in out.splitlines() if line.startswith(("this", "dense", "linear"))]
    assert scores[0] > 0.8 > scores[2]  # no line separates them
    model = AutoModel.from_pretrained(files / "out")
    test = arrays(200, 1)
    found = model(torch.from_numpy(test["x"])).logits.argmax(1).numpy()
    assert (found == test["y"]).mean() == pytest.approx(scores[0], abs=1e-4)


def test_regression_without_a_test_file(cli, files):
    np.savez(files / "numbers.npz", **arrays(classes=False))
    code, out, _ = cli(
        "ternary", "--features", files / "numbers.npz", "--hidden", 200, "--storage", "seed", "-o", files / "out"
    )
    assert code == 0 and "leave-one-out error" in out
    assert type(AutoModel.from_pretrained(files / "out")).__name__ == "TernaryMLPForRegression"


@pytest.mark.parametrize("extra", [(), ("--target-reduction", 0.3), ("--weights", "trained", "--max-steps", 3)])
def test_part_of_a_model(cli, bert, table, validation_table, tmp_path, extra):
    part = "bert.encoder.layer.0.intermediate" if "trained" in extra else "classifier"
    if "trained" in extra:  # one linear layer and its activation: not a network with a readout
        code, _, err = cli(
            "ternary", "--model", bert, "--module", part, "--train-file", table, "-o", tmp_path / "out", *extra
        )
        assert code == 2 and "calls linear layers 1 time" in err and not (tmp_path / "out").exists()
        return
    data = ("--train-file", table, "--validation-file", validation_table)
    code, out, err = cli(
        "ternary", "--model", bert, "--module", part, *data, "--hidden", 64, "-o", tmp_path / "out", *extra
    )
    assert code == 0, err
    assert "accuracy" in out and "classifier" in out and "bytes on disk" in out
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert isinstance(model.classifier, TernaryMLP)
    assert bool(model.config.rmtkd["spec"].get("modules")) == bool(extra)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_trained_part_of_a_model(cli, table, validation_table, tmp_path):
    from transformers import BertTokenizer, DistilBertConfig, DistilBertForSequenceClassification

    from .conftest import WORDS

    torch.manual_seed(0)
    names = {"label2id": {"negative": 0, "positive": 1}, "id2label": {0: "negative", 1: "positive"}}
    config = DistilBertConfig(vocab_size=len(WORDS), dim=32, n_layers=2, n_heads=4, hidden_dim=64, **names)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf8")
    BertTokenizer(vocab=str(tmp_path / "vocab.txt"), model_max_length=32).save_pretrained(tmp_path / "model")
    data = ("--train-file", table, "--validation-file", validation_table)
    part = ("--module", "distilbert.transformer.layer.1.ffn", "--weights", "trained", "--max-steps", 3)
    kept = ("--checkpoints", tmp_path / "kept", "--save-steps", 2)
    code, out, err = cli("ternary", "--model", tmp_path / "model", *part, *data, *kept, "-o", tmp_path / "out")
    assert code == 0, err
    assert (tmp_path / "kept" / "checkpoint-2" / "model.safetensors").is_file()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.distilbert.transformer.layer[1].ffn.layers[0].storage == "base3"
    assert not (tmp_path / "out" / "trainer").exists()

    halfway = tmp_path / "kept" / "checkpoint-2" / "model.safetensors"
    written = halfway.stat().st_mtime_ns
    for folder in (tmp_path / "kept").glob("checkpoint-*"):
        if folder.name != "checkpoint-2":
            shutil.rmtree(folder)
    code, out, err = cli("ternary", "--model", tmp_path / "model", *part, *data, *kept, "-o", tmp_path / "again")
    assert code == 0, err
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert set(first) == set(again) and all(torch.equal(first[name], again[name]) for name in first)
    assert (
        halfway.stat().st_mtime_ns == written
    )  # it went on from there; a run from the start would have written it again


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("-o", "out"), "either --model"),
        (("--model", "m", "--features", "f", "-o", "out"), "either --model"),
        (("--model", "m", "-o", "out"), "--model needs --module"),
        (("--features", "none.npz", "-o", "out"), "none.npz: no such file"),
        (("--features", "bad.npz", "-o", "out"), "bad.npz cannot be read"),
        (("--features", "other.npz", "-o", "out"), "holds a; expected arrays x"),
        (("--features", "train.npz", "--activation", "swoosh", "-o", "out"), "Unknown activation 'swoosh'"),
        (("--features", "train.npz", "--mode", "min_shift", "--levels", 2, "-o", "out"), "largest residual"),
        (("--features", "train.npz", "--sparsity", 1.5, "-o", "out"), "expected a share of the weights"),
        (("--features", "bare.npy", "-o", "out"), "bare.npy cannot be read"),
        (("--features", "words.npz", "-o", "out"), "words.npz cannot be read"),
        (("--features", "cut.npz", "-o", "out"), "cut.npz cannot be read"),
        (("--features", "empty.npz", "-o", "out"), "n > 0"),
        (("--features", "train.npz", "--test-features", "narrow.npz", "-o", "out"), "expected as many rows of both"),
        (("--features", "train.npz", "--test-features", "numbers.npz", "-o", "out"), "torch.float64; expected"),
        (("--features", "train.npz", "--module", "m", "-o", "out"), "--module has no effect here"),
        (("--features", "train.npz", "--train-file", "t", "-o", "out"), "--train-file has no effect here"),
        (("--features", "train.npz", "--epochs", 2, "-o", "out"), "belongs to --weights trained"),
        (("--features", "train.npz", "--levels", 4, "-o", "out"), "belongs to --mode min_shift"),
        (("--model", "m", "--module", "c", "--test-features", "t", "-o", "out"), "belongs to --features"),
    ],
)
def test_errors_are_one_line(cli, files, monkeypatch, args, match):
    monkeypatch.chdir(files)
    (files / "bad.npz").write_bytes(b"nothing of the kind")
    np.savez(files / "other.npz", a=np.zeros(3))
    good = arrays()
    np.save(files / "bare.npy", good["x"])
    np.savez(files / "words.npz", x=good["x"], y=good["y"].astype(str))
    (files / "cut.npz").write_bytes((files / "train.npz").read_bytes()[:900])
    np.savez(files / "empty.npz", x=good["x"][:0], y=good["y"][:0])
    np.savez(files / "narrow.npz", x=good["x"][:, 1:], y=good["y"])
    np.savez(files / "numbers.npz", x=good["x"], y=good["y"] / 2)
    code, out, err = cli("ternary", *args)
    assert code == 2 and out == "" and not (files / "out").exists()
    line = err.strip().splitlines()[-1]
    assert line.startswith("optimum-cli rmtkd ternary: error: ") and match in line


def test_threads_are_set_without_training_too(cli, bert, files, table, monkeypatch):
    asked = []
    monkeypatch.setattr("optimum_rmtkd.commands.ternary.use_threads", asked.append)
    code, _, err = cli("ternary", "--features", files / "train.npz", "--hidden", 50, "--threads", 1, "-o", files / "a")
    assert code == 0, err
    part = ("--model", bert, "--module", "head", "--train-file", table)  # no such part: nothing is computed
    code, _, err = cli("ternary", *part, "--threads", 2, "-o", files / "b")
    assert code == 2 and "no module 'head'" in err and asked == [1, 2]


def test_wrong_module(cli, bert, table, tmp_path):
    code, _, err = cli("ternary", "--model", bert, "--module", "head", "--train-file", table, "-o", tmp_path / "out")
    assert code == 2 and "no module 'head'; it has bert, classifier" in err


def test_example(bert, table, validation_table, tmp_path):
    script = ROOT / "examples" / "ternary_head.py"
    data = (
        "--train_file",
        table,
        "--test_file",
        validation_table,
        "--text_column",
        "sentence",
        "--output_dir",
        tmp_path / "out",
    )
    done = subprocess.run(
        [sys.executable, script, "--model", bert, *data, "--hidden", "128", "--sparsity", "0.3"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line}
    assert {"ternary", "dense", "linear"} <= set(lines)
    assert AutoModel.from_pretrained(tmp_path / "out").config.recipe["sparsity"] == 0.3
