"""Reduced checkpoints behave like any other: every way of loading, other heads, resizing, pickling, and loud
refusals."""

from __future__ import annotations

import ast
import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertTokenizerFast,
    pipeline,
)

from optimum_rmtkd import RMTKDConfig, RMTKDError, SpecMismatchError, modeling_rmtkd, narrow
from optimum_rmtkd.modeling_rmtkd import LowRankConv2d, LowRankEmbedding, LowRankLinear
from optimum_rmtkd.surgery import narrow_to

from .surgery import zoo


RECIPE = RMTKDConfig(round_to=4, min_width=4, calibration_samples=16, refit=False, importance="variance")
REMOTE_FILES = ["layers_rmtkd.py", "loading_rmtkd.py", "modeling_rmtkd.py", "resizing_rmtkd.py", "spec_rmtkd.py"]
WIDTHS = {"hidden": 20, "layer.0.heads": 6, "layer.0.intermediate": 24, "layer.1.intermediate": 40}
MLM_WIDTHS = {"hidden": 20, "layer.1.intermediate": 40}


def reduced(task="ForSequenceClassification", widths=None, name="bert"):
    """A reduced model whose layers all have widths of their own."""
    return narrow_to(zoo.make(name, task), zoo.batches(name, count=2), widths or WIDTHS, RECIPE, progress=False)


@pytest.fixture(scope="module")
def batch():
    return zoo.batches("bert", count=1)[0]


@pytest.fixture(scope="module")
def small():
    """Reduced, with a factorised table besides. Tests must not change it."""
    model = reduced(widths=WIDTHS | {"embedding": 8})
    assert isinstance(model.bert.embeddings.word_embeddings, LowRankEmbedding)
    assert model.bert.encoder.layer[0].attention.self.query.weight.shape == (24, 20)
    return model


@pytest.fixture
def saved(small, tmp_path):
    small.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def assert_same_weights(model, other, prefix=""):
    mine, theirs = ({k: v for k, v in m.state_dict().items() if k.startswith(prefix)} for m in (model, other))
    assert mine.keys() == theirs.keys() and mine
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def outputs(model, batch):
    """Weights read from a file lie at odd addresses, where the same sum may be taken in another order: copies do
    not."""
    return zoo.outputs(copy.deepcopy(model), batch)


def edit_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# Every way of loading


def test_sharded_files(small, batch, tmp_path):
    small.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same_weights(again, small)
    assert zoo.close(outputs(again, batch), outputs(small, batch))


def test_bfloat16(small, saved, batch):
    again = AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert_same_weights(again, copy.deepcopy(small).to(torch.bfloat16))
    wanted = outputs(small, batch)
    assert (outputs(again, batch) - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_from_config(small, saved):
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(saved))
    shapes = {key: value.shape for key, value in small.state_dict().items()}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    assert model.bert.encoder.layer[0].attention.self.attention_head_size == 6
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    assert 0.01 < weight.std() < 0.03  # initialised as transformers does, not as torch does


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map(small, saved, batch, device_map):
    again = AutoModelForSequenceClassification.from_pretrained(saved, device_map=device_map)
    if device_map != "auto":
        assert again.device.type == "cpu"
    again = again.to("cpu")
    assert zoo.close(outputs(again, batch), outputs(small, batch))


def test_bare_model_from_a_task_checkpoint(small, saved, batch):
    bare = AutoModel.from_pretrained(saved)
    assert type(bare).__name__ == "RMTKDBertModel"
    assert_same_weights(bare.encoder, small.bert.encoder)
    with torch.no_grad():
        found, wanted = bare(**batch).last_hidden_state, small.bert(**batch).last_hidden_state
    assert torch.equal(found, wanted)
    assert found.shape[-1] == bare.config.hidden_size == 20


@pytest.mark.parametrize("name, task", [("bert", "Model"), ("distilbert", "Model"), ("vit", "Model")])
def test_hidden_size_is_the_output_width(name, task, tmp_path):
    model = reduced(task, {"hidden": 20}, name)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert outputs(model, zoo.batches(name)[0]).shape[-1] == config.hidden_size == 20


# Other heads


def test_another_number_of_labels(small, saved, batch):
    model = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=5, ignore_mismatched_sizes=True)
    assert_same_weights(model.bert, small.bert)
    assert outputs(model, batch).shape == (8, 5)
    assert model.classifier.weight.shape == (5, 20)
    assert 0 < model.classifier.weight.std() < 0.1


def test_another_number_of_labels_must_be_asked_for(saved):
    with pytest.raises(SpecMismatchError, match=r"classifier.* has shape \(3.* expects \(5"):
        AutoModelForSequenceClassification.from_pretrained(saved, num_labels=5)


def test_another_head(small, saved, batch):
    model, info = AutoModelForTokenClassification.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"]
    assert {key.split(".")[1] for key in info["unexpected_keys"]} == {"pooler"}
    assert_same_weights(model.bert.encoder, small.bert.encoder)
    assert_same_weights(model.bert.embeddings, small.bert.embeddings)
    assert model.classifier.in_features == 20
    with torch.no_grad():
        assert model(**batch).logits.shape == (8, 12, 3)


def test_a_classifier_on_a_masked_lm_checkpoint(batch, tmp_path):
    """What a masked LM never had, pooler and classifier, is new, in the narrow width; the rest is not."""
    small = reduced("ForMaskedLM", MLM_WIDTHS)
    small.save_pretrained(tmp_path)
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert {key.removeprefix("bert.").split(".")[0] for key in info["missing_keys"]} == {"pooler", "classifier"}
    assert model.bert.pooler.dense.weight.shape == (20, 20)
    assert_same_weights(model.bert.encoder, small.bert.encoder)
    assert outputs(model, batch).shape == (8, 3)


def test_pipeline(small, saved, tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt")).save_pretrained(saved)
    classify = pipeline("text-classification", model=str(saved), tokenizer=str(saved), device="cpu", top_k=None)
    texts = ["a good film", "bad films"]
    batch = classify.tokenizer(texts, padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[2, 5, 6, 8, 3], [2, 7, 8, 9, 3]]
    wanted = outputs(small, dict(batch.items())).softmax(-1)
    for result, row in zip(classify(texts), wanted, strict=True):
        scores = {entry["label"]: entry["score"] for entry in result}
        assert [scores[f"LABEL_{i}"] for i in range(3)] == pytest.approx(row.tolist(), abs=1e-5)


# Life after loading


def test_copies_and_pickles(small, batch):
    wanted = outputs(small, batch)
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert type(twin) is type(small)
        assert torch.equal(outputs(twin, batch), wanted)
        assert twin.config.rmtkd == small.config.rmtkd
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert pickle.loads(pickle.dumps(type(small))) is type(small)


def resized(model, folder, auto, size=70):
    """The model with another vocabulary, and what comes back from disk."""
    model = copy.deepcopy(model)
    before = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    assert torch.equal(model.get_input_embeddings().weight[: min(size, 61)], before[: min(size, 61)])
    model.save_pretrained(folder)
    return model, auto.from_pretrained(folder)


@pytest.mark.parametrize("size", [50, 70])
def test_resizing_a_table(tmp_path, size):
    ids = {"input_ids": torch.tensor([[5, 6, size - 1]])}
    model, again = resized(reduced(), tmp_path, AutoModelForSequenceClassification, size)
    assert again.config.vocab_size == again.get_input_embeddings().num_embeddings == size
    assert zoo.close(outputs(again, ids), outputs(model, ids))


@pytest.mark.parametrize("size", [50, 70])
def test_resizing_a_factorised_table(small, batch, tmp_path, size):
    ids = {"input_ids": torch.tensor([[5, 6, 49]])}
    model, again = resized(small, tmp_path, AutoModelForSequenceClassification, size)
    assert torch.equal(outputs(model, ids), outputs(small, ids))
    table = again.get_input_embeddings()
    assert isinstance(table, LowRankEmbedding) and table.weight.shape == (size, 8)
    assert_same_weights(again, model)
    last = {"input_ids": torch.tensor([[5, 6, size - 1]])}
    assert zoo.close(outputs(again, last), outputs(model, last))


def decoder_weight(model):
    decoder = model.get_output_embeddings()
    return decoder.up.weight if isinstance(decoder, LowRankLinear) else decoder.weight


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_tie_survives_reload(name, tmp_path):
    batch = zoo.batches(name)[0]
    model = reduced("ForMaskedLM", MLM_WIDTHS, name)
    assert decoder_weight(model) is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert decoder_weight(again) is again.get_input_embeddings().weight
    assert decoder_weight(again).shape == (61, 20)
    assert zoo.close(outputs(again, batch), outputs(model, batch))
    with torch.no_grad():  # one tensor, not two of equal values
        again.get_input_embeddings().weight.zero_()
    assert decoder_weight(again).abs().max() == 0


@pytest.mark.parametrize("size", [50, 70])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_resizing_keeps_a_tied_decoder(name, size, tmp_path):
    small = reduced("ForMaskedLM", MLM_WIDTHS, name)
    model, again = resized(small, tmp_path, AutoModelForMaskedLM, size)
    assert decoder_weight(model) is model.get_input_embeddings().weight
    assert decoder_weight(again) is again.get_input_embeddings().weight
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    logits = outputs(again, ids)
    assert logits.shape == (1, 3, size)
    assert torch.equal(logits, outputs(model, ids))
    assert torch.allclose(logits[..., :50], outputs(small, ids)[..., :50], atol=1e-5)


def test_gradient_checkpointing(small, batch):
    def gradients(checkpointing):
        model = copy.deepcopy(small).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        layer, passes = model.bert.encoder.layer[0].intermediate.dense, []
        layer.register_forward_pre_hook(lambda *_: passes.append(1))
        model(**batch, labels=torch.zeros(8, dtype=torch.long)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}, len(passes)

    (plain, once), (again, twice) = gradients(False), gradients(True)
    assert (once, twice) == (1, 2)  # the layer was really computed a second time
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        assert torch.allclose(gradient, again[name], atol=1e-6), name


# Refusals


QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def widen(config):
    config["rmtkd"]["spec"]["modules"]["@.encoder.layer.0.intermediate.dense"]["out"] = 28
    config["rmtkd"]["spec"]["modules"]["@.encoder.layer.0.output.dense"]["in"] = 28


def forget(config):
    del config["rmtkd"]["spec"]["modules"]["@.encoder.layer.1.output.dense"]


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification])
@pytest.mark.parametrize(
    "change, match",
    [
        pytest.param(widen, r"layer\.0\.intermediate\.dense\.bias has shape \(24,\), .* expects \(28,\)", id="wider"),
        pytest.param(forget, r"layer\.1\.output\.dense\.(bias|weight) has shape \(20.* expects \(32", id="forgotten"),
    ],
)
def test_widths_that_do_not_fit_the_tensors(saved, change, match, auto, ignore):
    edit_config(saved, change)
    with pytest.raises(SpecMismatchError, match=match) as caught:
        auto.from_pretrained(saved, ignore_mismatched_sizes=ignore)
    assert isinstance(caught.value, RMTKDError)
    assert "save them again together" in str(caught.value)


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_missing_tensor_of_the_backbone(saved, auto, ignore):
    edit_tensors(saved, lambda tensors: tensors.pop(QUERY))
    with pytest.raises(SpecMismatchError, match=r"lacks 1 tensor.*layer\.0\.attention\.self\.query\.weight"):
        auto.from_pretrained(saved, ignore_mismatched_sizes=ignore)


def test_missing_factor(saved):
    edit_tensors(saved, lambda tensors: tensors.pop("bert.embeddings.word_embeddings.up.weight"))
    with pytest.raises(SpecMismatchError, match=r"word_embeddings\.up\.weight"):
        AutoModelForSequenceClassification.from_pretrained(saved)


@pytest.mark.parametrize("key", ["bert.pooler.dense.weight", "classifier.weight"])
def test_missing_tensor_of_the_same_head(saved, key):
    """A checkpoint of this very class lacks nothing: a random pooler or classifier would spoil it silently."""
    edit_tensors(saved, lambda tensors: tensors.pop(key))
    with pytest.raises(SpecMismatchError, match=key):
        AutoModelForSequenceClassification.from_pretrained(saved)


def test_pooler_that_does_not_fit(saved):
    """The pooler belongs to the backbone: another number of labels is no reason to initialise it anew."""
    edit_config(saved, lambda config: config["rmtkd"]["spec"]["modules"]["@.pooler.dense"].update(out=24))
    with pytest.raises(SpecMismatchError, match=r"pooler\.dense\.(weight|bias) has shape"):
        AutoModelForSequenceClassification.from_pretrained(saved, ignore_mismatched_sizes=True)


def test_nothing_is_reinitialised(small, saved):
    model, info = AutoModelForSequenceClassification.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert_same_weights(model, small)


# The file itself


def test_save_load_save_keeps_the_file(small, saved, batch, tmp_path):
    again = AutoModelForSequenceClassification.from_pretrained(saved)
    again.save_pretrained(tmp_path / "twice")
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (saved, tmp_path / "twice"))
    assert first == second
    assert second["model_type"] == "rmtkd_bert"
    assert second["architectures"] == ["RMTKDBertForSequenceClassification"]
    assert second["auto_map"]["AutoConfig"] == "modeling_rmtkd.RMTKDBertConfig"
    assert (
        second["auto_map"]["AutoModelForSequenceClassification"] == "modeling_rmtkd.RMTKDBertForSequenceClassification"
    )
    assert sorted(file.name for file in (tmp_path / "twice").glob("*.py")) == REMOTE_FILES
    for name in REMOTE_FILES:
        source = Path(modeling_rmtkd.__file__).with_name(name).read_text(encoding="utf8")
        assert (tmp_path / "twice" / name).read_text(encoding="utf8") == source
    third = AutoModelForSequenceClassification.from_pretrained(tmp_path / "twice")
    assert zoo.close(outputs(third, batch), outputs(small, batch))


@pytest.mark.parametrize("file", REMOTE_FILES)
def test_files_import_torch_transformers_and_each_other_alone(file):
    tree = ast.parse(Path(modeling_rmtkd.__file__).with_name(file).read_text(encoding="utf8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and f"{node.module}.py" in REMOTE_FILES, "transformers copies files beside this one"
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert {"torch", "transformers"} <= imported
    assert imported <= {"torch", "transformers"} | set(sys.stdlib_module_names)


def test_unknown_names_are_no_attributes():
    for name in ("RMTKDNoSuchModel", "BertModel"):
        with pytest.raises(AttributeError, match=name):
            getattr(modeling_rmtkd, name)
    assert modeling_rmtkd.RMTKDBertModel is modeling_rmtkd.reduced_class(transformers.BertModel)
    assert modeling_rmtkd.reduced_class(modeling_rmtkd.RMTKDBertModel) is modeling_rmtkd.RMTKDBertModel


# Factored layers


@pytest.mark.parametrize("bias", [True, False])
def test_low_rank_linear_is_a_product(bias):
    layer, x = LowRankLinear(6, 5, 2, bias=bias), torch.randn(3, 7, 6)
    dense = nn.functional.linear(x, layer.up.weight @ layer.down.weight, layer.up.bias)
    assert torch.allclose(layer(x), dense, atol=1e-6)
    assert layer(x).shape == (3, 7, 5) and (layer.bias is None) != bias
    assert layer.weight is layer.up.weight


@pytest.mark.parametrize("stride", [1, 2])
def test_low_rank_convolution_is_a_product(stride):
    layer, x = LowRankConv2d(6, 5, 2, stride=stride), torch.randn(3, 6, 8, 8)
    weight = torch.einsum("or,ri->oi", layer.up.weight[..., 0, 0], layer.down.weight[..., 0, 0])[..., None, None]
    dense = nn.functional.conv2d(x, weight, layer.bias, stride=stride)
    assert layer(x).shape == (3, 5, 8 // stride, 8 // stride)
    assert torch.allclose(layer(x), dense, atol=1e-6)


def test_low_rank_embedding_is_a_product():
    table = LowRankEmbedding(11, 3, 7, padding_idx=0)
    ids = torch.tensor([[1, 0, 10], [4, 4, 2]])
    dense = nn.functional.embedding(ids, table.weight @ table.up.weight.T)
    assert table(ids).shape == (2, 3, 7)
    assert torch.allclose(table(ids), dense, atol=1e-6)
    assert torch.equal(table(ids)[0, 1], torch.zeros(7))


def test_rows_from_elsewhere_are_projected_by_the_tables_factor():
    """What PEFT does with its own rows: rows * embed_scale."""
    table, rows = LowRankEmbedding(11, 3, 7), torch.randn(2, 5, 3)
    factor = table.embed_scale
    assert isinstance(factor, torch.Tensor) and factor.numel() == 1
    assert torch.equal(rows * factor.to(rows.dtype), table.up(rows))
    half = table.bfloat16()
    assert (rows * half.embed_scale.to(rows.dtype)).dtype == torch.float32
    assert "embed_scale" not in table.state_dict() and "output_dim=7" in repr(table)


def test_factored_models_hold_factored_layers(tmp_path):
    model, data = zoo.make("resnet-bottleneck", "ForImageClassification"), zoo.batches("resnet-bottleneck", count=2)
    small = narrow(model, data, RECIPE.replace(form="factored", target_reduction=0.2), progress=False)
    kinds = {type(module) for module in small.modules()}
    assert LowRankConv2d in kinds
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert_same_weights(again, small)
    assert zoo.close(outputs(again, data[0]), outputs(small, data[0]))
