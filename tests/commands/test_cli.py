"""The commands from outside: help, exit codes, folders, reload."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .conftest import sentence_rows, write_csv


RELOAD = """\
import sys, torch, optimum_rmtkd
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
with torch.inference_mode():
    logits = model(**tokenizer("the film is great", return_tensors="pt")).logits
print(model.config.model_type, sum(p.numel() for p in model.parameters()), tuple(logits.shape), model.dtype)
"""


def reload_fresh(folder):
    done = subprocess.run([sys.executable, "-c", RELOAD, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kind, parameters, rest = done.stdout.strip().splitlines()[-1].split(maxsplit=2)
    return kind, int(parameters), rest


def reload_here(folder):
    from transformers import AutoModelForSequenceClassification

    import optimum_rmtkd  # noqa: F401

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return model.config.model_type, sum(p.numel() for p in model.parameters()), str(model.dtype)


def parameters_of(folder):
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())


@pytest.fixture
def compress(cli, bert, table, validation_table, tmp_path):
    """`compress` with the tiny model and table, into tmp_path/work/out; later options win."""

    def call(*args):
        files = ("--model", bert, "--train-file", table, "--validation-file", validation_table)
        size = ("--target-reduction", 0.5, "--round-to", 1, "--min-width", 4)
        return cli("compress", *files, *size, "-o", tmp_path / "work" / "out", *args)

    return call


@pytest.mark.parametrize("command", [(), ("analyze",), ("compress",), ("demo",)])
def test_help_teaches(cli, command):
    code, out, err = cli(*command, "--help")
    assert code == 0 and err == ""
    assert out.startswith("usage: optimum-cli rmtkd")
    examples = out[out.index("examples:") :]
    assert f"optimum-cli rmtkd {' '.join(command)}" in examples


def test_help_begins_with_what_most_people_want(cli):
    for command in ("analyze", "bench", "compress", "demo", "export", "plan", "report", "ternary", "trim"):
        _, out, _ = cli(command, "--help")
        first = out[out.index("examples:") : out.index("options:")]
        calls = first.count("optimum-cli rmtkd")
        assert calls == 3 or (calls == 2 and "more examples:" not in out), command
    _, out, _ = cli("compress", "--help")
    assert out.index("options:") < out.index("more examples:") < out.index("reload:")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("compress", "--modle", "m"), "unknown option --modle: did you mean --model?"),
        (("demo", "--target-reducton=0.4"), "unknown option --target-reducton: did you mean --target-reduction?"),
        (("trim", "m", "--texts", "t", "-o", "o", "--zzz"), "unknown option --zzz\n"),
        (("report", "one", "two"), "unknown arguments: two"),
    ],
)
def test_a_typo_shows_the_option_that_was_meant_and_the_help_of_its_command(cli, args, said):
    code, out, err = cli(*args)
    assert code == 2 and out == "" and said in err
    assert err.startswith(f"usage: optimum-cli rmtkd {args[0]}")
    assert err.endswith(f"All options: optimum-cli rmtkd {args[0]} --help\n")


def test_what_follows_two_dashes_is_no_option(cli, tmp_path):
    code, _, err = cli("report", "--", "--no-such-folder")
    assert code == 2 and "unknown option" not in err and "--no-such-folder" in err


def test_without_a_command_help_is_printed(cli):
    code, out, _ = cli()
    assert code == 0 and "{analyze,plan,compress,trim,ternary,report,export,families,bench,demo}" in out


@pytest.mark.parametrize(
    "args",
    [("nonsense",), ("demo", "--nonsense"), ("compress",), ("compress", "--model", "m", "-o", "o", "--tau", "x")],
)
def test_wrong_usage_exits_with_2(cli, args):
    code, out, err = cli(*args)
    assert code == 2 and out == "" and "error:" in err


def test_our_errors_are_one_line_and_exit_code_2(compress, tmp_path):
    code, out, err = compress("--train-file", tmp_path / "no.csv")
    assert code == 2
    lines = err.strip().splitlines()
    assert lines[-1] == f"optimum-cli rmtkd compress: error: {tmp_path}/no.csv: no such file or folder."
    assert "Traceback" not in err
    assert not (tmp_path / "work").exists()


def test_the_same_from_a_shell(bert, tmp_path):
    code = "from optimum.commands.optimum_cli import main; main()"
    args = ["rmtkd", "compress", "--model", bert, "--tau", "2", "-o", tmp_path / "out"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("optimum-cli rmtkd compress: error:")
    assert list(tmp_path.iterdir()) == []


def test_recipe_out_of_range_is_refused_before_anything_is_read(compress, tmp_path):
    code, _, err = compress("--target-reduction", 1.2)
    assert code == 2 and "target_reduction=1.2" in err
    assert not (tmp_path / "work").exists()


def test_cut_only(compress, tmp_path, bert):
    code, out, err = compress("--no-train")
    assert code == 0, err
    folder = tmp_path / "work" / "out"
    assert [p.name for p in folder.parent.iterdir()] == ["out"]
    kind, parameters, dtype = reload_here(folder)
    assert kind == "rmtkd_bert" and dtype == "torch.float32"
    before = parameters_of(bert)
    assert parameters == parameters_of(folder) and abs(parameters / before - 0.5) < 0.02
    for word in ("parameters", "bytes on disk", "accuracy", f"{before:,}", f"{parameters:,}"):
        assert word in out
    journal = json.loads((folder / "rmtkd_stages.json").read_text())
    assert journal["parameters_before"] == before and journal["parameters_after"] == parameters
    assert journal["stages"][0]["sites"]
    assert json.loads((folder / "rmtkd_recipe.json").read_text())["target_reduction"] == 0.5


def test_cut_and_distil(compress, tmp_path, bert):
    code, out, err = compress("--max-steps", 2, "--batch-size", 8)
    assert code == 0, err
    folder = tmp_path / "work" / "out"
    kind, parameters, rest = reload_fresh(folder)
    assert kind == "rmtkd_bert" and rest == "(1, 2) torch.float32"
    assert abs(parameters / parameters_of(bert) - 0.5) < 0.02
    assert not (folder / "trainer").exists() and not list(folder.glob("checkpoint*"))
    assert json.loads((folder / "rmtkd_stages.json").read_text())["parameters_after"] == parameters
    assert "saved to" in out


def test_attention_kernel_is_used_and_not_stored(compress, tmp_path, monkeypatch):
    from optimum_rmtkd.commands import task

    kernels, load_task = [], task.load_task

    def watched(*args):
        loaded = load_task(*args)
        kernels.append(loaded.model.config._attn_implementation)
        return loaded

    monkeypatch.setattr(task, "load_task", watched)
    code, _, err = compress("--no-train", "--attn-implementation", "eager")
    assert code == 0, err
    assert kernels == ["eager"]
    assert "attn_implementation" not in (tmp_path / "work" / "out" / "config.json").read_text()


def test_a_reduced_model_can_be_reduced_again(compress, tmp_path):
    assert compress("--no-train", "--target-reduction", 0.3)[0] == 0
    code, out, err = compress("--no-train", "--model", tmp_path / "work" / "out", "-o", tmp_path / "twice")
    assert code == 0, err
    first, second = parameters_of(tmp_path / "work" / "out"), parameters_of(tmp_path / "twice")
    assert abs(second / first - 0.5 / 0.7) < 0.05  # both targets count from the uncut model
    assert "removed of the uncut model" in out
    code, _, err = compress("--target-reduction", 0.2, "--model", tmp_path / "twice", "-o", tmp_path / "thrice")
    assert code == 2 and "already no more than" in err and not (tmp_path / "thrice").exists()


def test_half_precision_is_kept(compress, tmp_path, bert):
    code, _, err = compress("--no-train", "--save-dtype", "float16")
    assert code == 0, err
    _, parameters, dtype = reload_here(tmp_path / "work" / "out")
    assert dtype == "torch.float16"
    assert (tmp_path / "work" / "out" / "model.safetensors").stat().st_size < 2.6 * parameters + 16_384


def test_checkpoints_are_kept_and_continued(compress, tmp_path):
    args = ("--max-steps", 4, "--save-steps", 2, "--checkpoints", tmp_path / "runs", "--batch-size", 8)
    code, _, err = compress(*args)
    assert code == 0, err
    assert (tmp_path / "runs" / "checkpoint-2").is_dir()
    code, _, err = compress(*args, "-o", tmp_path / "again")
    assert code == 0, err
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "work" / "out" / "model.safetensors"
    ).read_bytes()


@pytest.fixture
def no_work(monkeypatch):
    """Loading a model fails the test: the folder must have been refused before."""
    from optimum_rmtkd.commands import task

    monkeypatch.setattr(task, "load_task", lambda *_: pytest.fail("work was started"))


def test_filled_folder_is_refused_before_any_work(compress, tmp_path, no_work):
    folder = tmp_path / "work" / "out"
    folder.mkdir(parents=True)
    (folder / "kept").write_text("")
    code, _, err = compress()
    assert code == 2 and "--overwrite" in err
    assert [p.name for p in folder.iterdir()] == ["kept"]


def test_unwritable_parent_is_refused_before_any_work(compress, tmp_path, no_work):
    (tmp_path / "file").write_text("")
    code, _, err = compress("-o", tmp_path / "file" / "out")
    assert code == 2 and "Cannot write to" in err


def test_overwrite(compress, tmp_path):
    folder = tmp_path / "work" / "out"
    assert compress("--no-train")[0] == 0
    (folder / "mine").write_text("mine")
    before = parameters_of(folder)
    code, out, err = compress("--no-train", "--overwrite", "--target-reduction", 0.3)
    assert code == 0, err
    assert parameters_of(folder) > before and (folder / "mine").read_text() == "mine"
    assert "will be replaced; mine stays" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-reduction", "80"], "target_reduction=80.0: expected a share of the parameters to remove"),
        (["--seed", "-1"], "seed=-1: expected a whole number in [0, 4294967295]"),
        (["--temperature", "inf"], "temperature=inf: expected a number above 0. It has to be finite."),
        (["--max-metric-drop", "nan"], "max_metric_drop=nan: expected a number"),
        (["--round-to", "99999999999999999999"], "It has to fit into 64 bits."),
        (["--objectives", '{"kl": {"weight": NaN}}'], "NaN is no number of JSON"),
        (["--objectives", '{"kl": {"reverse": "no"}}'], "KLDivergence(reverse='no'): expected True or False"),
        (["--recipe", "missing.json"], "missing.json cannot be read"),
        (["--learning-rate", "nan"], "--learning-rate nan: expected a number above 0"),
        (
            ["--gradient-accumulation-steps", "0"],
            "--gradient-accumulation-steps 0: expected a whole number of at least 1",
        ),
        (["--max-train-samples", "-5"], "--max-train-samples -5: expected a whole number of at least 1"),
    ],
)
def test_wrong_values_are_one_line_before_any_work(compress, no_work, options, message):
    code, _, err = compress(*options)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1


def test_unknown_objective_is_refused_before_any_work(compress, no_work):
    code, _, err = compress("--objectives", '{"klx": {}}')
    assert code == 2 and "No objective 'klx'; expected one of attention_relation" in err


def test_objectives_and_a_matrix_product_operator(compress, tmp_path):
    terms = '{"task": {"weight": 0.5}, "skew_kl": {"alpha": 0.2}}'
    code, _, err = compress("--max-steps", 2, "--objectives", terms, "--reparameterization", "mpo")
    assert code == 0, err
    folder = tmp_path / "work" / "out"
    recipe = json.loads((folder / "rmtkd_recipe.json").read_text())
    assert recipe["objectives"]["skew_kl"] == {"alpha": 0.2} and recipe["reparameterization"] == "mpo"
    _, parameters, _ = reload_here(folder)
    assert parameters == parameters_of(folder)


def test_labels_that_do_not_fit_leave_no_folder(compress, tmp_path):
    rows = [row | {"label": i % 3} for i, row in enumerate(sentence_rows(12))]
    code, _, err = compress("--train-file", write_csv(tmp_path / "three.csv", rows))
    assert code == 2 and "the model has 2 classes" in err
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize("options", [(), ("--no-train",)])
def test_a_target_that_cannot_be_reached(compress, options, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_rmtkd.commands.task.evaluate", lambda *_: pytest.fail("evaluated"))
    code, _, err = compress("--target-reduction", 0.999, *options)
    assert code == 2 and "Traceback" not in err and "cannot get below" in err
    assert list((tmp_path / "work").iterdir()) == []


def test_unsupported_architecture_is_named(compress, tmp_path, bert):
    from transformers import ConvBertConfig, ConvBertForSequenceClassification

    folder = tmp_path / "convbert"
    config = ConvBertConfig(
        vocab_size=40,
        hidden_size=16,
        embedding_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    ConvBertForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((bert / name).read_bytes())
    code, _, err = compress("--no-train", "--model", folder)
    assert code == 2 and "ConvBert" in err


def test_several_processes_are_sent_to_the_script(compress, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = compress()
    assert code == 2 and "examples/text_classification.py" in err


def test_analyze_prints_and_writes(cli, bert, table, tmp_path):
    code, out, err = cli("analyze", "--model", bert, "--train-file", table, "--json", tmp_path / "spectra.json")
    assert code == 0, err
    assert "hidden" in out and "intermediate" in out
    assert json.loads((tmp_path / "spectra.json").read_text())


def test_analyze_needs_a_file_it_can_write(cli, bert, table, tmp_path):
    code, _, err = cli("analyze", "--model", bert, "--train-file", table, "--json", tmp_path / "no" / "spectra.json")
    assert code == 2 and "spectra.json" in err


def test_a_cut_alone_has_no_checkpoints(compress, tmp_path, no_work):
    code, _, err = compress("--no-train", "--checkpoints", tmp_path / "runs")
    assert code == 2 and "--checkpoints and --no-train" in err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--objectives", "kl"),
        ("--reparameterization", "mpo"),
        ("--transforms", "embedding_mixup"),
        ("--schedule", "none"),
        ("--rounds", 3),
        ("--round-share", 0.1),
    ],
)
def test_a_cut_alone_trains_with_nothing(cli, bert, table, tmp_path, no_work, option, value):
    files = ("--model", bert, "--train-file", table, "--validation-file", table, "-o", tmp_path / "out")
    search = ("--tolerance", 0.5) if option.startswith("--round") else ()
    code, _, err = cli("compress", *files, "--no-train", option, value, *search)
    assert code == 2 and f"--no-train and {option}" in err


def test_another_metric(compress, tmp_path):
    pytest.importorskip("sklearn")
    code, out, err = compress("--no-train", "--metric", "matthews_correlation", "--eval-batch-size", 8)
    assert code == 0, err
    assert "matthews_correlation" in out and "accuracy" not in out
    code, _, err = compress("--no-train", "--metric", "pearson", "-o", tmp_path / "other")
    assert code == 2 and "expected one of accuracy, f1" in err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "with --checkpoints DIR it could be continued"),
        (("--checkpoints", "runs", "--save-steps", 4), "No checkpoint yet in runs"),
        (("--checkpoints", "runs", "--save-steps", 1), "continues from runs/checkpoint-2"),
    ],
)
def test_interrupted_training_says_how_to_continue(compress, tmp_path, monkeypatch, options, told):
    from transformers import TrainerCallback

    from optimum_rmtkd.trainer import trainer as room

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    made = room.RMTKDTrainer.__init__

    def with_interrupt(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.add_callback(Interrupt())

    monkeypatch.setattr(room.RMTKDTrainer, "__init__", with_interrupt)
    monkeypatch.chdir(tmp_path)
    code, _, err = compress("--max-steps", 8, "--batch-size", 8, *options)
    assert code == 130 and told in err
    assert err.strip().splitlines()[-1] == "optimum-cli rmtkd compress: interrupted, no output was written"


def test_the_native_shape_gives_a_plain_checkpoint(compress, tmp_path):
    out = tmp_path / "work" / "out"
    code, _, err = compress("--shape", "native", "--no-train")
    assert code == 0, err
    assert not list(out.glob("*.py"))
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "bert" and not {"rmtkd", "auto_map"} & set(config)
    card = (out / "README.md").read_text()
    assert "BertForSequenceClassification.from_pretrained" in card and "trust_remote_code" not in card
    kind, parameters, _ = reload_here(out)
    assert kind == "bert" and parameters == parameters_of(out)
