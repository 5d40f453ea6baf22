"""Cuts whose models, moments and factors lie in files: the same result, in less memory."""

from __future__ import annotations

import copy
import errno
import json
import os

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, LlamaForCausalLM

from optimum_rmtkd import DiskFullError, RMTKDConfig, RMTKDError, narrow, narrow_streamed
from optimum_rmtkd.models import Scratch, in_files, scratch
from optimum_rmtkd.surgery import likelihood
from optimum_rmtkd.surgery.surgeon import Surgeon

from . import conv_zoo, decoder_zoo, zoo


RECIPE = RMTKDConfig(target_reduction=0.3, calibration_samples=64, min_width=8, round_to=1)


@pytest.fixture
def everything(monkeypatch):
    """Also what is small goes into files."""
    monkeypatch.setattr(scratch, "LEAST", 64)
    monkeypatch.setattr(scratch, "SMALLEST", 2**14)


def texts() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(5, 61, (64, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[::3, 20:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(8), mask.split(8), strict=True)]


def decoder(name: str, dtype: torch.dtype = torch.float32):
    cls, config = decoder_zoo.CONFIGS[name]
    torch.manual_seed(0)
    return cls(copy.deepcopy(config)).eval().to(dtype)


def same(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in found.modules())


@pytest.mark.parametrize(
    "name",
    [
        "llama-tied",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("gpt2", "opt", "gemma2", "gptj", "mixtral", "phi3", "biogpt")
        ),
    ],
)
def test_a_cut_in_files_is_the_cut_in_memory(name, everything, tmp_path):
    if name not in decoder_zoo.CONFIGS:
        pytest.skip("another list of families")
    model, data = decoder(name), texts()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    in_memory = narrow(model, data, RECIPE, progress=False)
    same(narrow(model, data, RECIPE, progress=False, scratch=tmp_path), in_memory)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())
    assert not os.listdir(tmp_path)  # files without names


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "vit", "resnet basic"])
def test_other_models_can_be_cut_in_files(name, everything, tmp_path):
    if name in conv_zoo.CONFIGS:
        model, data = conv_zoo.make(name), conv_zoo.batches()
    else:
        task = "ForSequenceClassification" if name == "bert" else "ForImageClassification"
        model, data = zoo.make(name, task), zoo.batches(name, 8)
    recipe = RMTKDConfig(target_reduction=0.3, calibration_samples=64, min_width=4, round_to=1)
    in_memory = narrow(model, data, recipe, progress=False)
    same(narrow(model, data, recipe, progress=False, scratch=tmp_path), in_memory)


def test_blocks_are_priced_in_files_as_in_memory(everything, tmp_path):
    model, data = decoder("llama-tied"), texts()
    recipe = RECIPE.replace(sites=("block", "intermediate"), target_reduction=0.2)
    in_memory = narrow(model, data, recipe, progress=False)
    released = []
    files = Scratch(tmp_path)
    files.release = lambda: released.append(1)
    surgeon = Surgeon(model, data, recipe, progress=False, scratch=files)
    prices = [float(couple.damage[0]) for couple in surgeon.couples() if couple.is_block]
    alone = Surgeon(model, data, recipe, progress=False)
    assert prices == pytest.approx([float(c.damage[0]) for c in alone.couples() if c.is_block], rel=1e-3)
    blocks = len(surgeon.anatomy.blocks)
    surgeon.blocks, before = None, len(released)
    surgeon.couples()
    assert len(released) - before > blocks * blocks
    same(narrow(model, data, recipe, progress=False, scratch=tmp_path), in_memory)


def test_from_a_folder_of_shards_to_another_one(everything, tmp_path):
    source, out = tmp_path / "llama", tmp_path / "new" / "small"
    decoder("llama-tied", torch.bfloat16).save_pretrained(source, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    bytes_before = {path.name: path.read_bytes() for path in source.iterdir()}
    found = narrow_streamed(source, out, texts(), RECIPE, max_shard_size="8KB", progress=False)
    whole = LlamaForCausalLM.from_pretrained(source, dtype="auto").eval()
    same(found, narrow(whole, texts(), RECIPE, progress=False))
    assert found.dtype == torch.bfloat16 and found.lm_head.weight is found.model.embed_tokens.weight
    shards = {path.name for path in out.glob("*.safetensors")}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(shards) > 1 and set(index["weight_map"].values()) == shards
    assert {path.name: path.read_bytes() for path in source.iterdir()} == bytes_before
    assert sorted(os.listdir(tmp_path)) == ["llama", "new"] and os.listdir(tmp_path / "new") == ["small"]


def test_a_model_of_several_streams_is_streamed_too(everything, tmp_path):
    torch.manual_seed(0)
    body = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    text = body | {"vocab_size": 61, "max_position_embeddings": 24, "pad_token_id": 0, "eos_token_id": 60}
    config = CLIPConfig(text_config=text, vision_config=body | {"image_size": 8, "patch_size": 4}, projection_dim=16)
    model = CLIPModel(config).eval()
    data = [batch | {"pixel_values": torch.randn(8, 3, 8, 8)} for batch in texts()]
    recipe = RMTKDConfig(target_reduction=0.1, calibration_samples=64, min_width=4, round_to=1)
    model.save_pretrained(tmp_path / "clip")
    found = narrow_streamed(tmp_path / "clip", tmp_path / "small", data, recipe, progress=False)
    same(found, narrow(model, data, recipe, progress=False))


def test_a_model_whose_files_have_older_names_is_narrowed_and_read_again(tmp_path):
    """Swin's layers are renamed while it is loaded, and renamed back when it is saved."""
    model, data = zoo.make("swin", "ForImageClassification"), zoo.batches("swin", 8)
    recipe = RMTKDConfig(target_reduction=0.1, calibration_samples=64, min_width=4, round_to=1)
    model.save_pretrained(tmp_path / "swin")
    found = narrow_streamed(tmp_path / "swin", tmp_path / "small", data, recipe, progress=False)
    same(found, narrow(model, data, recipe, progress=False))


def test_what_cannot_be_streamed_is_refused_before_anything_is_loaded(tmp_path):
    source = tmp_path / "llama"
    decoder("llama").save_pretrained(source)
    with pytest.raises(RMTKDError, match="choose another folder"):
        narrow_streamed(source, source, texts(), RECIPE)
    (tmp_path / "file").write_text("")
    with pytest.raises(RMTKDError, match="is a file"):
        narrow_streamed(source, tmp_path / "file", texts(), RECIPE)
    with pytest.raises(RMTKDError, match="tolerance tries several sizes"):
        narrow_streamed(source, tmp_path / "out", texts(), RMTKDConfig(tolerance=1.0))
    native = RECIPE.replace(shape="native")
    with pytest.raises(RMTKDError, match="shape='native' with models in files"):
        narrow_streamed(source, tmp_path / "out", texts(), native)
    with pytest.raises(RMTKDError, match="shape='native' with models in files"):
        narrow(decoder("llama"), texts(), native, scratch=tmp_path)
    with pytest.raises(RMTKDError, match="is no folder"):
        narrow(decoder("llama"), texts(), RECIPE, scratch=tmp_path / "nowhere")


def test_values_outlive_the_release_of_their_memory_and_files_go_with_their_tensors(everything, tmp_path):
    files = Scratch(tmp_path)
    other = files.part()
    kept = [files.keep(torch.arange(5000.0) + i, torch.float64) for i in range(4)]
    apart = other.zeros((3, 1000), torch.int64)
    assert kept[0].dtype == torch.float64 and not bool(apart.any())
    apart += 7
    files.release()
    for i, tensor in enumerate(kept):
        torch.testing.assert_close(tensor, torch.arange(5000.0, dtype=torch.float64) + i)
    assert bool((apart == 7).all())
    mapped = len(files._maps)
    del apart, other
    assert len(files._maps) == mapped - 1


def test_ties_survive_the_way_into_files(everything, tmp_path):
    model = in_files(decoder("llama-tied"), Scratch(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    expected = decoder("llama-tied").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_full_disk_is_named_before_anything_is_mapped(everything, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=f"could not be reserved in .*{tmp_path.name}"):
        Scratch(tmp_path).zeros((1000, 1000), torch.float32)


def test_the_likelihood_of_a_draw_has_the_gradient_that_torch_makes(monkeypatch):
    monkeypatch.setattr(likelihood, "DRAWN_AT_ONCE", 30)  # rows in several chunks
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    uniforms = torch.rand(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.arange(10.0, dtype=torch.float64).reshape(2, 5)
    found = likelihood._drawn(logits, uniforms)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    log = logits.log_softmax(-1)
    index = (log.exp().cumsum(-1) < uniforms[..., None]).sum(-1)
    expected = log.gather(-1, index[..., None])[..., 0]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * weights).sum(), logits)[0])
