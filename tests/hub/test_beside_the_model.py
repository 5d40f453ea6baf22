"""What lies beside a stranger's model: its code is not run, and what is damaged ends in one line."""

from __future__ import annotations

import ast
import json
import shutil

import pytest

from optimum_rmtkd import RMTKDError
from optimum_rmtkd.commands.inputs import image_tools, load_tokenizer, text_tools
from optimum_rmtkd.hub import loading

from ..commands.conftest import save_bert
from ..conftest import ROOT


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A BERT with a fast tokenizer."""
    return save_bert(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def change(path, **fields) -> None:
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | fields))


EVIL = {  # file, fields, what loads it
    "config": (
        "config.json",
        {"model_type": "evilbert", "auto_map": {"AutoConfig": "evil.Evil"}},
        (loading.load_config, loading.load_model),
    ),
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
        (loading.load_tokenizer, loading.load_processor, lambda name: load_tokenizer(name, None)),
    ),
    "image processor": (
        "preprocessor_config.json",
        {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}},
        (loading.load_image_processor, loading.load_processor, lambda name: image_tools(name, None, "image")),
    ),
}


@pytest.mark.parametrize("kind", EVIL)
def test_nobody_is_asked_to_run_code_of_a_folder(folder, tmp_path, monkeypatch, kind):
    file, fields, loaders = EVIL[kind]
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    touched = tmp_path / "was here"
    (folder / "evil.py").write_text(f"open({str(touched)!r}, 'w')\nclass Evil: pass\n")
    change(folder / file, **fields)
    for load in loaders:
        try:
            load(str(folder))
        except RMTKDError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        assert not touched.exists()
    if kind != "tokenizer":  # a BERT has one of transformers', which is taken
        with pytest.raises(RMTKDError, match="code of its own .auto_map., which is never run here"):
            loaders[0](str(folder))


def test_no_auto_class_is_asked_without_saying_so():
    """Each call of an Auto class in this package says `trust_remote_code=False`."""
    calls = []
    for file in (ROOT / "optimum_rmtkd").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in ("from_pretrained", "from_config") and "auto" in ast.unparse(node.func).lower():
                    said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                    calls.append((file.name, node.lineno, said.get("trust_remote_code")))
    assert len(calls) >= 5
    assert [call for call in calls if call[2] != "False"] == []


def edited(tokenizer: dict, **model) -> dict:
    return tokenizer | {"model": tokenizer["model"] | model}


DAMAGED = {  # tokenizer.json, of a WordPiece
    "model empty": lambda t: t | {"model": {}},
    "model of no kind": lambda t: edited(t, type="Evil"),
    "no model": lambda t: {name: value for name, value in t.items() if name != "model"},
    "version": lambda t: t | {"version": "9.0"},
    "id negative": lambda t: edited(t, vocab={"a": -1}),
    "id of 2^40": lambda t: edited(t, vocab={"a": 2**40}),
    "added id": lambda t: t | {"added_tokens": [{"id": 5 * 10**9, "content": "x"}]},
    "merges": lambda t: t | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
    "unk_id": lambda t: t | {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 5}},
    "regex": lambda t: (
        t | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}}
    ),
    "a panic at once": lambda t: t | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "a panic at a text": lambda t: (
        t
        | {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        }
    ),
    "a list": lambda t: [],
}
ODD = {  # tokenizer_config.json
    "auto_map []": {"auto_map": []},
    "auto_map a number": {"auto_map": 5},
    "class of a model": {"tokenizer_class": "LlamaModel"},  # of 7 billion weights
    "class of no kind": {"tokenizer_class": 5},
    "pad_token a number": {"pad_token": 5},
}


@pytest.mark.parametrize("case", [*DAMAGED, *ODD])
def test_a_damaged_tokenizer_ends_in_one_line(folder, case):
    if case in DAMAGED:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(DAMAGED[case](json.loads(path.read_text()))))
        change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    else:
        change(folder / "tokenizer_config.json", **ODD[case])
    for load in (loading.load_tokenizer, loading.load_processor):
        with pytest.raises(RMTKDError) as caught:
            load(str(folder))
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_tokenizer_that_fails_at_a_text_is_named(folder):
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    path = folder / "tokenizer.json"
    path.write_text(json.dumps(edited(json.loads(path.read_text()), unk_token="nowhere")))
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", unk_token=None)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    _, encode = text_tools(str(folder), model, loading.load_tokenizer(str(folder)), ["text"], 8)
    with pytest.raises(RMTKDError, match=r"tokenizer of '.*model' cannot cut a text .*tokenizer\.json was damaged"):
        encode(Dataset.from_dict({"text": ["the", "unheard"], "labels": [0, 1]}), "training")


def test_trying_out_changes_nothing_that_is_saved(folder, tmp_path):
    path = folder / "tokenizer.json"
    padding = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    truncation = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding": padding, "truncation": truncation}))
    change(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    loading.load_processor(str(folder)).save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "tokenizer.json").read_text())
    assert (again["padding"], again["truncation"]) == (padding, truncation)


def test_all_that_lies_beside_a_model_is_found(folder, tmp_path):
    from transformers import CLIPImageProcessorPil, WhisperFeatureExtractor

    for name, part in (("eyes", CLIPImageProcessorPil(size=8)), ("ears", WhisperFeatureExtractor(feature_size=8))):
        there = shutil.copytree(folder, tmp_path / name)
        part.save_pretrained(there)
        found = loading.load_processors(str(there))
        assert len(found) == 2 and found[1].vocab_size > 0
        (again,) = {type(found[0]), type(loading.load_processor(str(there)))}
        assert issubclass(again, WhisperFeatureExtractor) == (name == "ears")
        for processor in found:
            processor.save_pretrained(tmp_path / "small")
        assert (tmp_path / "small" / "preprocessor_config.json").is_file()
        assert (tmp_path / "small" / "tokenizer_config.json").is_file()
        shutil.rmtree(tmp_path / "small")
    newer = folder / "processor_config.json"  # transformers 5 puts both into one file
    newer.write_text(json.dumps({"feature_extractor": WhisperFeatureExtractor(feature_size=8).to_dict()}))
    assert loading.load_processors(str(folder))[0].feature_size == 8


def test_a_class_whose_package_is_missing_is_no_wrong_class(tmp_path):
    """Without torchvision transformers has a placeholder for a Fast processor, and takes another in its place."""
    from transformers import ViTImageProcessor

    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    change(tmp_path / "preprocessor_config.json", image_processor_type="ViTImageProcessorFast")
    change(tmp_path / "config.json", model_type="vit")
    assert loading.load_image_processor(tmp_path).size == {"height": 8, "width": 8}


def test_a_path_is_answered_as_a_path(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    told = {
        str(tmp_path / "model.safetensors"): f"is a file.*Give the folder that it lies in, {tmp_path} .it has one",
        str(tmp_path / "none"): "There is no folder .*Check the path",
        "./none": "There is no folder ./none here, and no repository of the Hub has such a name",
        f"~/{tmp_path.name}": f"did not expand ~: write {tmp_path}",
    }
    for name, words in told.items():
        with pytest.raises(RMTKDError, match=words) as caught:
            loading.load_config(name)
        assert "Repo id" not in str(caught.value)
