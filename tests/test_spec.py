"""The schema of a narrowed model's config: whatever it says, a model is built from it, or an error names the entry."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, initialization

from optimum_rmtkd import RMTKDConfig, SpecMismatchError, TernaryConfig, compress_head, modeling_rmtkd, narrow
from optimum_rmtkd import loading_rmtkd as loading
from optimum_rmtkd.modeling_rmtkd import check_spec
from optimum_rmtkd.spec_rmtkd import MOST_DRAWN, check_network, check_rmtkd, shown
from optimum_rmtkd.surgery import narrow_to
from optimum_rmtkd.ternary.configuration_ternary import TernaryMLPConfig
from optimum_rmtkd.ternary.modeling_ternary import TernaryMLPForClassification

from .fuzz import many
from .surgery import zoo


RECIPE = RMTKDConfig(round_to=4, min_width=4, calibration_samples=16, refit=False, importance="variance")
WIDTHS = {"hidden": 20, "embedding": 8, "layer.0.heads": 6, "layer.0.intermediate": 24}
FFN = "@.encoder.layer.0.intermediate.dense"


@pytest.fixture(scope="module")
def small():
    return narrow_to(
        zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert", count=2), WIDTHS, RECIPE, progress=False
    )


@pytest.fixture(scope="module")
def part(small):
    """With a ternary part besides."""
    return compress_head(small, "classifier", zoo.batches("bert", count=2), TernaryConfig(hidden=(64, 32)))[0]


def plain(model) -> dict:
    """The config as its file holds it."""
    return json.loads(json.dumps(model.config.to_dict()))


@contextlib.contextmanager
def as_when_loading(tensors: int = 60):
    """On the meta device, without initial values, and no larger than a file of so many tensors."""
    token = loading._LOADING.set(loading._Load(None, False, tensors))
    try:
        with torch.device("meta"), initialization.no_init_weights():
            yield
    finally:
        loading._LOADING.reset(token)


def built(values: dict, cls=None):
    cls = cls or modeling_rmtkd.RMTKDBertForSequenceClassification
    with as_when_loading():
        return cls(cls.config_class(**copy.deepcopy(values)))


# What is written today


@pytest.mark.parametrize("name, task", [("bert", "ForMaskedLM"), ("vit", "Model"), ("resnet-basic", "Model")])
@pytest.mark.parametrize("form", ["absorbed", "factored"])
def test_what_is_written_is_valid_for_every_head(name, task, form):
    """A spec names layers of heads that a model lacks; each head of the family takes it."""
    recipe = RECIPE.replace(form=form, target_reduction=0.005, round_to=1)
    model = narrow(zoo.make(name, task), zoo.batches(name, count=2), recipe, progress=False)
    spec = check_rmtkd(plain(model)["rmtkd"])
    assert spec["modules"]
    for other in zoo.tasks_of(name):
        cls = getattr(modeling_rmtkd, f"RMTKD{zoo.stem(name)}{other}")
        values = plain(model) | ({"num_labels": 2} if other == "ForQuestionAnswering" else {})
        values.pop("id2label")
        built(values, cls)


def test_layers_without_a_declared_family():
    config = GPT2Config(vocab_size=61, n_positions=40, n_embd=32, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config).eval()
    recipe = RECIPE.replace(form="factored", target_reduction=0.1, round_to=1)
    small = narrow(model, [b | {"labels": b["input_ids"]} for b in zoo.batches("bert", count=2)], recipe)
    delta = next(iter(plain(small)["rmtkd"]["spec"]["modules"].items()))
    with pytest.raises(SpecMismatchError, match=r"\.rank: got 129, expected at most 128"):
        built(with_entry(small, delta[0], rank=129), type(small))


def with_entry(model, path: str, **delta) -> dict:
    values = plain(model)
    values["rmtkd"]["spec"]["modules"].setdefault(path, {}).update(delta)
    return values


# What is refused


def test_the_message_names_entry_value_and_what_is_expected(small):
    with pytest.raises(SpecMismatchError) as caught:
        built(with_entry(small, FFN, out=10**6))
    assert str(caught.value).startswith(
        "config.json, rmtkd.spec.modules['@.encoder.layer.0.intermediate.dense'].out: got 1000000, expected at most "
        "64, as in the dense layer."
    )


def test_nothing_is_changed_where_a_part_does_not_fit(small):
    spec = plain(small)["rmtkd"]["spec"]
    spec["attrs"]["@.encoder.layer"] = {"scaling": 0.5}
    skeleton = zoo.make("bert", "ForSequenceClassification")
    before = {name: p.shape for name, p in skeleton.named_parameters()}
    with pytest.raises(SpecMismatchError, match="'scaling'"):
        modeling_rmtkd.apply_spec(skeleton, spec)
    assert {name: p.shape for name, p in skeleton.named_parameters()} == before


@pytest.mark.parametrize(
    "path", ["@.nothing", "classifiers", "@.encoder.layer.2.output.dense", "@.encoder", "bert.encoder.layer.0.output"]
)
def test_a_path_that_no_head_has(path):
    with torch.device("meta"):
        skeleton = zoo.make("bert", "ForSequenceClassification")
    with pytest.raises(SpecMismatchError, match=f"modules\\['{path}'\\]"):
        check_spec(skeleton, {"modules": {path: {"out": 4}}})
    check_spec(skeleton, {"modules": {"qa_outputs": {"in": 4}, "cls.predictions.transform.dense": {"in": 4}}})


def test_one_module_under_two_names(small):
    same = FFN.replace("@", "bert")
    with pytest.raises(SpecMismatchError, match="is the same one"):
        built(with_entry(small, same, out=24))


def test_weights_that_follow_from_a_seed_are_bounded():
    network = {"in_features": 2**13, "hidden": [2**12], "activations": [{"name": "relu"}], "storage": "seed"}
    check_network(network)
    assert 2**13 * 2**12 == MOST_DRAWN
    with pytest.raises(SpecMismatchError, match="network.hidden"):
        check_network(network | {"hidden": [2**12 + 1]})
    check_network(network | {"hidden": [2**12 + 1], "storage": "base3"})


def test_building_stops_at_what_the_files_can_fill(small):
    values = plain(small) | {"num_hidden_layers": 9000}
    with pytest.raises(SpecMismatchError, match="the checkpoint holds 60 tensors"):
        built(values)


def test_any_value_is_shown_on_a_short_line():
    for value in (None, True, 3, 10**6000, 1.5, "x\ny\ud800" * 100, [], [1] * 10, {}, {"a": 1}, object):
        assert len(shown(value)) < 80 and shown(value).isascii() and "\n" not in shown(value)


# Headers


def file_of(folder, header: bytes, content: bytes = b""):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)
    return path


def test_a_header_is_read_without_its_tensors(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "F16", "shape": [3], "data_offsets": [16, 22]},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "c": {"dtype": "NEW", "shape": [9], "data_offsets": [22, 23]},
    }
    assert loading.read_header(file_of(tmp_path, json.dumps(header).encode(), bytes(23))) == {
        "a": (2, 2),
        "b": (3,),
        "c": (9,),
    }
    with pytest.raises(SpecMismatchError, match="describes 23 bytes of tensors, and there are 22"):
        loading.read_header(file_of(tmp_path, json.dumps(header).encode(), bytes(22)))


@given(header=st.binary(max_size=60) | st.text(max_size=60).map(str.encode), content=st.binary(max_size=9))
@many(300)
def test_any_bytes_are_a_header_or_a_named_error(header, content, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    try:
        loading.read_header(file_of(folder, header, content))
    except SpecMismatchError as error:
        assert "no whole safetensors checkpoint" in str(error)


# Fuzz

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 70)
    | st.sampled_from([10**6, 10**9, 10**12, 10**18, 2**63, -(2**63), 10**30])
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["relu", "base3", "seed", "Linear", "hidden_size", "float16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
NAMES = st.text(max_size=4) | st.sampled_from(
    """in out rank dim eps scaling attention_head_size all_head_size _modules forward __class__ config training
    hidden_size vocab_size classifier qa_outputs @.encoder @.nothing @.pooler.dense bert.pooler.dense name mean levels
    thresholds slopes storage version spec _attn_implementation_internal""".split()
)
CHANGES = st.lists(
    st.tuples(st.integers(0, 10**6), st.sampled_from(["replace", "replace", "delete", "add", "rename"]), JSON, NAMES),
    min_size=1,
    max_size=3,
)


def places(tree) -> list[tuple]:
    """(container, key) of every entry of a JSON value."""
    if not isinstance(tree, (dict, list)):
        return []
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    return [place for key in keys for place in [(tree, key), *places(tree[key])]]


def changed(values: dict, changes: list[tuple], below: str | None = None) -> dict:
    """A copy with other entries; only those below the one of this name, where there is one."""
    values = copy.deepcopy(values)
    tree = values if below is None else {below: values.pop(below)}
    for number, action, value, name in changes:
        if not (found := places(tree)):
            break
        container, key = found[number % len(found)]
        if action == "add" and isinstance(container[key], dict):
            container[key][name] = value
        elif action == "delete" and isinstance(container, dict):
            del container[key]
        elif action == "rename" and isinstance(container, dict):
            container[name] = container.pop(key)
        else:
            container[key] = value
    return values | tree


def shapes(model) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_config(values: dict, cls) -> bool:
    """Whether a model is built; then its config, saved and read, builds the same one."""
    try:
        model = built(values, cls)
    except SpecMismatchError as error:
        assert len(str(error)) < 1500 and "\n" not in str(error), str(error)
        return False
    again = built(plain(model), cls)
    assert shapes(again) == shapes(model)
    return True


def run_fuzz(values: dict, cls, count: int, below: str | None = None) -> int:
    accepted = []

    @given(changes=CHANGES)
    @many(count)
    def case(changes):
        accepted.append(check_config(changed(values, changes, below), cls))

    case()
    return sum(accepted)


CI_CASES = 2_000  # of each subject where CI is set
SUBJECTS = {  # the model, what is changed of its config, and cases of a quick run: 15 seconds on a busy core
    "spec": ("part", "rmtkd", 400),  # and ternary options inside it
    "config": ("small", None, 300),
    "network": ("network", "network", 800),
}


@pytest.fixture(scope="module")
def network():
    steps = {"thresholds": [-0.5, 0.5], "levels": [-1.0, 0.0, 1.0], "slopes": [0.5, 0.5]}
    options = {"in_features": 10, "hidden": [16, 8], "activations": [{"name": "relu", "mean": 0.1}, steps]}
    config = TernaryMLPConfig(network=options | {"storage": "base3", "sparsity": 0.5, "seed": 3, "bias": False})
    with torch.device("meta"):
        return TernaryMLPForClassification(config)


def fuzz(request, subject: str, count: int) -> None:
    name, below, _ = SUBJECTS[subject]
    model = request.getfixturevalue(name)
    assert check_config(plain(model), type(model))
    accepted = run_fuzz(plain(model), type(model), count, below)
    assert 0.01 * count < accepted < 0.9 * count  # both ends are seen


@pytest.mark.parametrize("subject", SUBJECTS)
def test_any_config_builds_a_model_or_names_what_is_wrong(request, subject):
    fuzz(request, subject, CI_CASES if os.environ.get("CI") else SUBJECTS[subject][2])


@pytest.mark.slow
@pytest.mark.parametrize("subject", SUBJECTS)
def test_any_of_many_configs_builds_a_model_or_names_what_is_wrong(request, subject):
    fuzz(request, subject, 10_000)


def without_numbers(value):
    """A spec less the numbers that a model may have otherwise: epsilons and scales."""
    if isinstance(value, dict):
        return {key: without_numbers(inner) for key, inner in value.items()}
    return None if isinstance(value, float) else value


@pytest.mark.slow
def test_a_changed_spec_loads_the_same_model_or_is_refused(part, tmp_path):
    """From a folder, with its weights: what is left of a spec that passes describes the very same layers."""
    part.save_pretrained(tmp_path)
    batch, values = zoo.batches("bert", count=1)[0], json.loads((tmp_path / "config.json").read_text())
    wanted, spec, same = zoo.outputs(copy.deepcopy(part), batch), values["rmtkd"]["spec"], []

    @given(changes=CHANGES)
    @many(400)
    def case(changes):
        new = changed(values, changes, "rmtkd")
        (tmp_path / "config.json").write_text(json.dumps(new))
        try:
            model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        except SpecMismatchError:
            return
        found = ((new.get("rmtkd") or {}).get("spec")) or {}
        if without_numbers(found) == without_numbers(spec):
            same.append(torch.equal(zoo.outputs(copy.deepcopy(model), batch), wanted))
        else:
            assert torch.allclose(zoo.outputs(model, batch), wanted, atol=1e-3), found

    case()
    assert same
