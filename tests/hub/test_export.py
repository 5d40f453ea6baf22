"""Exports give the same outputs, need nothing of the package, and refuse what they cannot express."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers

from optimum_rmtkd import RMTKDConfig, RMTKDError, count_parameters
from optimum_rmtkd.batches.examples import example_inputs
from optimum_rmtkd.hub.loading import load_model
from optimum_rmtkd.hub.native import to_native
from optimum_rmtkd.surgery import narrow_to

from ..surgery import zoo


RECIPE = RMTKDConfig(round_to=4, min_width=4, calibration_samples=16, importance="variance")
UNIFORM = {"hidden": 24, **{f"layer.{i}.heads": 6 for i in (0, 1)}, **{f"layer.{i}.intermediate": 40 for i in (0, 1)}}
UNEVEN = {"hidden": 24, "layer.0.heads": 5, "layer.1.heads": 3, "layer.0.intermediate": 40, "layer.1.intermediate": 12}
CUT_STREAM = ("bert", "vit", "deit")  # the others build a layer of their head, or a norm, that no field describes
ENCODERS = [pair for pair in zoo.CLASSIFIERS if "resnet" not in pair[0]]


def reduced(name="bert", task="ForSequenceClassification", widths=UNEVEN):
    return narrow_to(zoo.make(name, task), zoo.batches(name, count=2), widths, RECIPE, progress=False)


def of_family(name, widths):
    """The widths, without the stream and with whole heads where the base could not say so."""
    if name in CUT_STREAM:
        return widths
    kept = {key: width for key, width in widths.items() if key != "hidden"}
    return kept if widths is UNEVEN else {key: width for key, width in kept.items() if not key.endswith("heads")}


def logits(model, inputs):
    with torch.no_grad():
        return copy.deepcopy(model)(**inputs)[0]


@pytest.mark.parametrize("name, task", ENCODERS)
def test_uniform_widths_are_plain_without_padding(name, task, tmp_path):
    model = reduced(name, task, of_family(name, UNIFORM))
    found = to_native(model)
    assert found.padded == {} and found.parameters_after == found.parameters_before == count_parameters(model)
    assert type(found.model) is getattr(transformers, zoo.stem(name) + task)
    found.model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "rmtkd" not in (tmp_path / "config.json").read_text()
    again = type(found.model).from_pretrained(tmp_path).eval()
    inputs = example_inputs(model, 4, 12, seed=5)
    assert torch.allclose(logits(again, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, task", ENCODERS)
def test_padding_changes_no_output(name, task):
    model = reduced(name, task, of_family(name, UNEVEN))
    with pytest.raises(RMTKDError, match=r"With --pad .* cost of \+[\d,]+ parameters"):
        to_native(model)
    found = to_native(model, pad=True)
    assert found.padded["layer.1.intermediate"] == (12, 40)
    assert found.parameters_after == count_parameters(found.model) > found.parameters_before
    inputs = example_inputs(model, 4, 12, seed=5)
    assert torch.allclose(logits(found.model, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)


def test_a_factored_table_is_multiplied_out():
    model = reduced(widths=UNIFORM | {"embedding": 8})
    assert hasattr(model.bert.embeddings.word_embeddings, "up")
    found = to_native(model, pad=True)
    assert found.padded == {"embedding": (8, 24)}
    assert found.model.bert.embeddings.word_embeddings.weight.shape == (61, 24)
    inputs = example_inputs(model, 4, 12, seed=5)
    assert torch.allclose(logits(found.model, inputs), logits(model, inputs), rtol=1e-5, atol=1e-5)


def test_heads_are_added_where_the_stream_divides_only_so():
    model = reduced(widths={"hidden": 20, "layer.0.heads": 3, "layer.1.heads": 3})
    model_of_five = to_native(reduced(widths={"hidden": 30, "layer.0.heads": 6, "layer.1.heads": 6}), pad=True).model
    assert model_of_five.config.num_attention_heads == 5
    assert to_native(model, pad=True).model.config.num_attention_heads == 4


def test_what_has_no_plain_form_is_refused():
    with pytest.raises(RMTKDError, match="not reduced"):
        to_native(zoo.make("bert", "ForSequenceClassification"))
    with pytest.raises(RMTKDError, match="one width for all layers"):
        to_native(reduced("resnet-basic", "ForImageClassification", {"stage.0.0.channels.0": 8}))
    with pytest.raises(RMTKDError, match="two factors"):
        to_native(reduced("bert", "ForMaskedLM", {"hidden": 24}), pad=True)
    with pytest.raises(RMTKDError, match=r"classifier.dense.weight is \(32, 24\).* builds it as \(24, 24\)"):
        to_native(reduced("roberta", widths=UNIFORM))
    coarse = reduced("distilbert", widths=UNIFORM)
    for module in coarse.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    with pytest.raises(RMTKDError, match="epsilon"):
        to_native(coarse)
    with pytest.raises(RMTKDError, match="heads of width 8 on a stream of 12.*--sites intermediate"):
        to_native(reduced(widths={"hidden": 12}), pad=True)


def test_epsilons_that_no_variance_comes_near_may_differ():
    assert to_native(reduced("distilbert", widths=UNIFORM)).difference < 1e-5


def test_half_precision(tmp_path):
    model = reduced().to(torch.bfloat16)
    found = to_native(model, pad=True)
    assert found.model.dtype == torch.bfloat16 and found.difference < 0.05


def test_load_model_refuses_what_is_no_model(tmp_path):
    with pytest.raises(RMTKDError, match="Cannot load model"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForNothing"]}))
    with pytest.raises(RMTKDError, match="BertForNothing"):
        load_model(tmp_path)


# Graphs


def test_torch_export_is_dynamic():
    model = reduced()
    inputs = example_inputs(model, 2, 8)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=40)
    shapes = {name: {0: batch, 1: length} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False).module()
    for size in ((1, 5), (3, 12)):
        other = example_inputs(model, *size, seed=2)
        with torch.no_grad():
            assert torch.allclose(program(**other).logits, logits(model, other), atol=1e-6)


@pytest.mark.slow
def test_torch_compile_takes_the_whole_graph():
    model = reduced()
    compiled = torch.compile(model, fullgraph=True)
    inputs = example_inputs(model, 2, 8)
    with torch.no_grad():
        assert torch.allclose(compiled(**inputs).logits, logits(model, inputs), atol=1e-5)


def onnx_pieces():
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


def test_onnx_of_a_decoder_has_no_cache(tmp_path):
    onnx_pieces()
    from optimum_rmtkd.hub.onnx import to_onnx

    torch.manual_seed(0)
    body = {"n_positions": 40, "n_embd": 32, "n_layer": 1, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=61, **body)).eval()
    assert to_onnx(model, tmp_path) <= 1e-4
    assert model.config.use_cache is True


@pytest.mark.parametrize("name, task", [("bert", "ForSequenceClassification"), ("vit", "ForImageClassification")])
def test_onnx(name, task, tmp_path):
    onnx_pieces()
    import onnxruntime

    from optimum_rmtkd.hub.onnx import to_onnx

    model = reduced(name, task, UNEVEN | ({"embedding": 8} if name == "bert" else {}))
    assert to_onnx(model, tmp_path) <= 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert [item.name for item in session.get_outputs()] == ["logits"]
    inputs = example_inputs(model, 7, 9, seed=3)  # a shape that the export has not seen
    (found,) = session.run(None, {key: value.numpy() for key, value in inputs.items()})
    assert torch.allclose(torch.from_numpy(found), logits(model, inputs), atol=1e-4)


def test_a_wrong_onnx_file_is_not_kept(tmp_path, monkeypatch):
    onnx_pieces()
    from optimum_rmtkd.hub import onnx as room

    monkeypatch.setattr(room, "_difference", lambda *args: 1e-3)
    with pytest.raises(RMTKDError, match="differ from PyTorch's by 0.001"):
        room.to_onnx(reduced().to(torch.bfloat16), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_exported_model_stays_as_it_is(tmp_path):
    onnx_pieces()
    from optimum_rmtkd.hub.onnx import to_onnx

    model = reduced().to(torch.bfloat16).train()
    to_onnx(model, tmp_path)
    assert model.dtype == torch.bfloat16 and model.training
