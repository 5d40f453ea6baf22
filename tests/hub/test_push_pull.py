"""A reduced model on the Hub is as ordinary as any other: pushed and pulled by the real client over HTTP."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

import optimum_rmtkd

from .server import card_data, card_errors


REMOTE = ["layers_rmtkd.py", "loading_rmtkd.py", "modeling_rmtkd.py", "resizing_rmtkd.py", "spec_rmtkd.py"]
CLIENT = "client.py"
HARMLESS = {
    "collections",
    "contextlib",
    "contextvars",
    "copy",
    "fractions",
    "functools",
    "json",
    "math",
    "pathlib",
    "re",
    "sys",
}
HARMLESS |= {"inspect", "threading", "types", "warnings", "zlib"}


def last_line(done) -> dict:
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def pushed(hub, as_user, workplace):
    last_line(as_user(hub, CLIENT, "push", workplace))
    return hub


@pytest.fixture(scope="module")
def pulled(pushed, as_user, workplace):
    """What somebody with the plugin found."""
    return last_line(as_user(pushed, CLIENT, "pull", workplace))


@pytest.fixture(scope="module")
def strangers(pushed, pulled, as_user, workplace):
    """What somebody without the plugin found."""
    return last_line(as_user(pushed, CLIENT, "stranger", workplace, cache="strangers"))


def test_a_push_brings_weights_config_and_the_files_of_code(pushed):
    files = pushed.files("user/reduced")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
    assert sorted(name for name in files if name.endswith(".py")) == REMOTE
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".pickle"))]
    config = json.loads(files["config.json"])
    assert config["model_type"] == "rmtkd_bert"
    assert config["auto_map"]["AutoConfig"] == "modeling_rmtkd.RMTKDBertConfig"
    assert (
        config["auto_map"]["AutoModelForSequenceClassification"] == "modeling_rmtkd.RMTKDBertForSequenceClassification"
    )


def test_a_push_brings_a_card_of_the_model(pushed):
    text = pushed.files("user/reduced")["README.md"].decode()
    assert card_errors(text) == [] and pushed.errors == []
    assert {"rmtkd", "optimum", "from-the-test"} <= set(card_data(text)["tags"])
    assert card_data(text)["pipeline_tag"] == "text-classification"
    assert text.count('AutoModelForSequenceClassification.from_pretrained("user/reduced"') == 2
    assert "| parameters |" in text and '"target_reduction": 0.5' in text
    assert "## Stages" not in text and "--no-train" not in text and "not known to it" in text


def test_a_card_that_is_there_stays(pushed, pulled):
    assert pushed.files("user/again")["README.md"] == b"---\ntags:\n- mine\n---\n\n# Mine\n"


def test_a_push_in_shards(pushed):
    shards = [name for name in pushed.files("user/sharded") if name.startswith("model-")]
    assert len(shards) > 2 and "model.safetensors" not in pushed.files("user/sharded")


def test_large_files_go_through_lfs_and_small_ones_do_not(pushed):
    shards = [name for name in pushed.files("user/sharded") if name.startswith("model-")]
    assert len({path for method, path in pushed.log if method == "PUT" and path.startswith("/_lfs/")}) == len(shards)


def test_with_the_plugin_logits_are_bit_equal(pulled):
    assert pulled["user/reduced"] is True
    assert pulled["user/sharded"] is True


def test_pipeline_by_name(pulled, strangers):
    assert pulled["pipeline"] == pulled["expected"] == strangers["pipeline"]


def test_load_save_push_keeps_the_code(pushed, pulled):
    first, again = pushed.files("user/reduced"), pushed.files("user/again")
    assert [again[name] for name in REMOTE] == [first[name] for name in REMOTE]
    assert json.loads(again["config.json"])["auto_map"] == json.loads(first["config.json"])["auto_map"]


def test_without_the_plugin_logits_are_bit_equal(strangers):
    assert strangers["plugin"] is False
    for name in ("user/reduced", "user/sharded", "user/again"):
        assert strangers[name] is True, name


def test_strangers_push_what_others_can_load(pushed, strangers):
    assert strangers["user/strangers"] is True
    files = pushed.files("user/strangers")
    assert [files[name] for name in REMOTE] == [pushed.files("user/reduced")[name] for name in REMOTE]
    # transformers marks code of another repository as "user/reduced--module.Class"
    assert "modeling_rmtkd.RMTKDBertConfig" in json.loads(files["config.json"])["auto_map"]["AutoConfig"]


def test_without_plugin_and_without_trust_nothing_is_loaded(strangers):
    assert strangers["without trust"] != "loaded"
    assert "trust_remote_code" in strangers["without trust"] or "rmtkd_bert" in strangers["without trust"]


@pytest.mark.parametrize("file", REMOTE)
def test_the_pushed_code_is_the_reviewed_file_and_imports_torch_and_transformers_alone(pushed, file):
    source = pushed.files("user/reduced")[file]
    assert source == (Path(optimum_rmtkd.__file__).parent / file).read_bytes()
    imported, called = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in REMOTE
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called.add(node.func.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called.add(node.func.attr)
            if node.func.attr == "open":  # headers are read, nothing is written
                assert [argument.value for argument in node.args] == ["rb"]
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers"}
    assert imported & set(sys.stdlib_module_names) <= HARMLESS
    assert not called & {
        "eval",
        "exec",
        "__import__",
        "import_module",
        "system",
        "write_text",
        "write_bytes",
        "unlink",
    }
