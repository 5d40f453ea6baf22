"""Causal language models of every family: exact where they are only rotated, alone and together, generating and
reloaded."""

from __future__ import annotations

import copy
import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from optimum_rmtkd import CalibrationError, RMTKDConfig, UnsupportedArchitectureError, count_parameters, narrow
from optimum_rmtkd.surgery import narrow_to, reduce
from optimum_rmtkd.surgery.directions import _centred
from optimum_rmtkd.surgery.likelihood import answers
from optimum_rmtkd.surgery.norms import norm_of
from optimum_rmtkd.surgery.replay import Replay, Scope
from optimum_rmtkd.surgery.sites import get_module
from optimum_rmtkd.surgery.surgeon import Surgeon, anatomy_of

from . import decoder_zoo as zoo
from .rotations import rotated


RECIPE = RMTKDConfig(target_reduction=0.3, round_to=4, min_width=4, calibration_samples=48)
QUICK = ("llama-tied",)
FAMILIES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in zoo.CONFIGS]
KIN = [pytest.param(name, marks=[pytest.mark.slow]) for name in zoo.KIN]


def heads_of(model):
    """(output layer, word table)."""
    return model.get_output_embeddings(), model.get_input_embeddings()


def is_tied(model) -> bool:
    head, table = heads_of(model)
    return head.weight is table.weight


@pytest.mark.parametrize("name", [*zoo.CONFIGS, *KIN])
def test_a_rotation_of_the_stream_changes_nothing(name):
    model = zoo.make(name)
    if not any("experts" in path for path, _ in model.named_parameters()):  # whose products know no fp64
        model = model.double()
    if is_tied(model):  # a tied head reads the stream through a scale a coordinate, which does not commute
        norm = norm_of(get_module(model, anatomy_of(model, RECIPE).last_norm))
        norm.set_scale(torch.full_like(norm.scale, 1.3))
    batch = zoo.batches(count=1)[0]
    batch["attention_mask"].fill_(1)  # rows of padding alone are NaN in fp64
    before, after = zoo.logits(model, batch), zoo.logits(rotated(model, RECIPE), batch)
    bound = 1e-12 if name in zoo.EXACT else 2e-6  # RMS norms compute in fp32
    assert (before - after).abs().max() < bound * before.abs().max()


def without_effect(model):
    """The model without the effect of its first key-value group and of its first eight neurons, layer by layer."""
    anatomy = anatomy_of(model, RECIPE)
    with torch.no_grad():
        for unit in anatomy.units:
            site = anatomy.sites.get(unit.reads)
            if site is not None and site.kind in ("attention_groups", "intermediate"):
                weight = get_module(model, unit.path).weight
                columns = slice(0, site.groups if site.kind == "attention_groups" else 8)
                (weight if isinstance(get_module(model, unit.path), Conv1D) else weight.T)[columns] = 0
    return anatomy


ALONE = [
    pytest.param(name, kind, id=f"{name}-{kind}", marks=[] if name in QUICK else [pytest.mark.slow])
    for name in zoo.CONFIGS
    for kind in ("attention_groups", "intermediate")
    if (name, kind) not in (("olmo2", "attention_groups"), ("mixtral", "intermediate"))  # see below
]


@pytest.mark.parametrize("name, kind", ALONE)
def test_what_has_no_effect_goes_first_and_costs_nothing(name, kind):
    model, data = zoo.make(name), zoo.batches()
    sites = [site for site in without_effect(model).sites.values() if site.kind == kind]
    less = {site.couple: site.group_width - (1 if kind == "attention_groups" else 8) for site in sites}
    small = narrow_to(model, data, less, RECIPE.replace(refit=False), progress=False)
    assert count_parameters(small) < count_parameters(model)
    before, after = zoo.logits(model, data[0]), zoo.logits(small, data[0])
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


def test_norms_over_all_heads_miss_those_that_went_and_little_else():
    """What a group without effect has given to the mean square of all heads is lost with it."""
    model, data = zoo.make("olmo2"), zoo.batches()
    sites = [site for site in without_effect(model).sites.values() if site.kind == "attention_groups"]
    less, lost = {site.couple: site.group_width - 1 for site in sites}, []
    before = torch.cat([zoo.logits(model, batch) for batch in data]).log_softmax(-1)
    for fitted in (False, True):
        small = narrow_to(model, data, less, RECIPE.replace(refit=fitted), progress=False)
        after = torch.cat([zoo.logits(small, batch) for batch in data]).log_softmax(-1)
        lost.append(float((before.exp() * (before - after)).sum(-1).mean()))
    assert lost[1] < 0.95 * lost[0] < 0.01


def test_the_inner_width_of_experts_is_refused_by_name():
    with pytest.raises(UnsupportedArchitectureError, match="'intermediate' is not cut.*experts.*'attention_groups'"):
        narrow(zoo.make("mixtral"), zoo.batches(), RECIPE.replace(sites=("hidden", "intermediate")), progress=False)


@torch.no_grad()
def generated(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    kept = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **kept)[:, ids.shape[1] :]


def assert_generates_alike(model, static=True):
    """From a cache, without one, from a static one, and behind padding."""
    ids = torch.randint(3, 61, (2, 6), generator=torch.manual_seed(5))
    expected = generated(model, ids, use_cache=False)
    assert torch.equal(generated(model, ids), expected)
    if static:
        assert torch.equal(generated(model, ids, cache_implementation="static"), expected)
    padded, mask = torch.nn.functional.pad(ids, (3, 0)), torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    assert torch.equal(generated(model, padded, mask), expected)


@pytest.mark.parametrize("name", [*FAMILIES, *KIN])
def test_life_cycle(name, tmp_path):
    model, data = zoo.make(name), zoo.batches()
    before = copy.deepcopy(model.state_dict())
    found = reduce(model, data, RECIPE, progress=False)
    small = found.model
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert abs(1 - count_parameters(small) / count_parameters(model) - 0.3) < 0.02
    assert found.report.planned_parameters == count_parameters(small)
    assert is_tied(small) == is_tied(model)
    assert_generates_alike(small, name not in zoo.GROWING)
    small.save_pretrained(tmp_path / "small")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(again).__name__ == "RMTKD" + type(model).__name__ and is_tied(again) == is_tied(model)
    torch.testing.assert_close(zoo.logits(again, data[0]), zoo.logits(small, data[0]), atol=1e-6, rtol=1e-6)
    bare = transformers.AutoModel.from_pretrained(tmp_path / "small")
    assert bare.get_input_embeddings().weight.shape == small.get_input_embeddings().weight.shape
    twice = narrow(again, data, RECIPE.replace(target_reduction=0.45), progress=False)
    assert count_parameters(twice) < count_parameters(small) and is_tied(twice) == is_tied(model)
    twice.save_pretrained(tmp_path / "twice")
    third = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    torch.testing.assert_close(zoo.logits(third, data[0]), zoo.logits(twice, data[0]), atol=1e-6, rtol=1e-6)
    assert_generates_alike(third, name not in zoo.GROWING)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "llama-tied" else [pytest.mark.slow]) for n in zoo.NATIVE]
)
def test_the_native_shape_is_a_plain_checkpoint(name, tmp_path):
    model, data = zoo.make(name), zoo.batches()
    plain = narrow(model, data, RECIPE.replace(shape="native"), progress=False)
    assert type(plain) is type(model) and 0.62 < count_parameters(plain) / count_parameters(model) < 0.73
    plain.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model) and is_tied(again) == is_tied(model)
    torch.testing.assert_close(zoo.logits(again, data[0]), zoo.logits(plain, data[0]), atol=1e-6, rtol=1e-6)
    assert_generates_alike(again)


@pytest.mark.parametrize("name", ["qwen3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3", "olmo2"))])
def test_norms_inside_attention_keep_their_epsilon_in_a_native_shape(name):
    """A config has one epsilon for them and for those that read a narrower stream."""
    cls, config = zoo.CONFIGS[name]
    model = zoo.enlivened(cls(type(config)(**config.to_dict() | {"rms_norm_eps": 0.1})))
    recipe = RECIPE.replace(shape="native", sites="hidden", target_reduction=0.2)
    plain = narrow(model, zoo.batches(), recipe, progress=False)  # compares the outputs
    assert type(plain) is cls and plain.config.hidden_size < 32 and plain.config.rms_norm_eps == 0.1


def test_a_native_shape_that_could_not_be_loaded_is_refused():
    """The config of Phi-3 wants as many factors of its frequencies as a head of width / heads has, whatever head_dim
    says."""
    model, data = zoo.make("phi3-longrope"), zoo.batches()
    with pytest.raises(UnsupportedArchitectureError, match="(?s)short_factor field must have length.*shape='free'"):
        narrow(model, data, RECIPE.replace(shape="native"), progress=False)
    recipe = RECIPE.replace(shape="native", sites="intermediate", target_reduction=0.1)
    assert type(narrow(model, data, recipe, progress=False)) is type(model)


FRESH = """
import sys, torch, transformers
from safetensors.torch import load_file
sys.modules["optimum_rmtkd"] = None
stored = load_file(sys.argv[2])
logits = stored.pop("logits")
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(model(**stored).logits, logits, atol=1e-5, rtol=1e-5)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma", "opt"])
def test_a_fresh_process_without_the_package(name, tmp_path):
    data = zoo.batches()
    small = narrow(zoo.make(name), data, RECIPE, progress=False)
    small.save_pretrained(tmp_path / "small")
    with torch.no_grad():
        save_file({**data[0], "logits": small(**data[0]).logits.contiguous()}, tmp_path / "x.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "small"), str(tmp_path / "x.safetensors")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub")},
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


@pytest.mark.parametrize("name", ["phi3-longrope", "qwen2-dynamic"])
def test_frequencies_that_follow_the_length_are_those_of_the_whole_model(name, tmp_path):
    """Heads are as wide as before, which no config says where the stream is narrower."""
    model, data, long = zoo.make(name), zoo.batches(), torch.randint(3, 61, (1, 24))
    small = narrow_to(model, data, {"hidden": 20}, RECIPE.replace(refit=False), progress=False)
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for ids in (long, long[:, :8]):
        with torch.no_grad():
            outputs = [m(ids).logits for m in (model, small, again, copy.deepcopy(small))]
        frequencies = [m.model.rotary_emb.inv_freq for m in (model, small, again)]
        assert torch.equal(frequencies[0], frequencies[1]) and torch.equal(frequencies[0], frequencies[2])
        assert torch.equal(outputs[1], outputs[2]) and torch.equal(outputs[1], outputs[3])


def test_attention_stays_causal_when_its_implementation_changes():
    """Layers that read numbers of heads from a config of their own hear of the change."""
    model = zoo.make("phi3")
    model.set_attn_implementation("eager")
    small = narrow_to(model, zoo.batches(), {"layer.0.attention": 3}, RECIPE.replace(refit=False), progress=False)
    ids = torch.randint(3, 61, (2, 9))
    with torch.no_grad():
        expected = small(ids).logits
        small.set_attn_implementation("sdpa")
        found = small(ids).logits
    assert small.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_half_precision_is_rounded_once():
    """The cut of bf16 weights is that of the same weights in fp32, rounded."""
    model, data = zoo.make("llama-tied").bfloat16(), zoo.batches()
    widths = {"hidden": 24, "layer.0.attention": 3, "layer.1.intermediate": 40}
    small = narrow_to(model, data, widths, RECIPE.replace(refit=False, importance="variance"), progress=False)
    whole = copy.deepcopy(model).float()
    whole.config.dtype = torch.float32
    exact = narrow_to(whole, data, widths, RECIPE.replace(refit=False, importance="variance"), progress=False)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    for (name, ours), theirs in zip(small.named_parameters(), exact.parameters(), strict=True):
        lost = (ours.float() - theirs).norm() / theirs.norm()
        assert lost < 5e-3, name  # 2**-9 of each entry, and of activations that were rounded in between


def test_flash_attention_is_not_asked_to_compute_in_fp32(monkeypatch):
    """It takes half precision alone; a cut computes in fp32."""
    asked = []

    def flash(module, query, key, value, mask, **options):
        asked.append(query.dtype)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_like", flash)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "flash_like", sdpa_mask)
    model, data = zoo.make("llama").bfloat16(), zoo.batches()
    monkeypatch.setattr(
        transformers.PreTrainedModel, "_check_and_adjust_attn_implementation", lambda _self, name, **_: name
    )  # which looks for a kernel of this name
    model.set_attn_implementation("flash_like")
    small = narrow_to(model, data, {"layer.0.attention": 3}, RECIPE.replace(refit=False), progress=False)
    assert model.config._attn_implementation == small.config._attn_implementation == "flash_like"
    zoo.logits(small, data[0])
    assert asked and set(asked) == {torch.bfloat16}


def test_what_prices_are_made_of_is_not_held_when_they_are_known():
    surgeon = Surgeon(zoo.make("llama"), zoo.batches(), RECIPE, progress=False)
    surgeon.couples()
    assert surgeon.directions and all(found.changes is None for found in surgeon.directions.values())


def test_windows_show_in_batches_longer_than_they_are():
    """The layers of one model have other masks only where a text is longer than the window."""
    model = zoo.make("qwen2-sliding")
    texts = [torch.randint(3, 61, (2, length), generator=torch.manual_seed(length)) for length in (3, 9)]
    whole = Scope(model, lambda i: model(input_ids=texts[i], use_cache=False), [None] * 2)
    replay = Replay(model, ("@.layers.0", "@.layers.1"), whole)
    with torch.no_grad():
        expected = model.model.layers[1].register_forward_hook(lambda _m, _a, out: seen.append(out))
        seen = []
        for index in range(2):
            whole.run(index)
        expected.remove()
        replay.advance()
        found = [replay._call(index) for index in range(2)]
    for one, other in zip(found, seen, strict=True):
        torch.testing.assert_close(one, other if isinstance(other, torch.Tensor) else other[0])


@pytest.mark.parametrize("name, version", [("llama", 2), ("gpt2", 2)])
def test_the_format_of_a_decoder_is_one_that_knows_it(name, version):
    recipe = RECIPE.replace(sites="intermediate", target_reduction=0.1, refit=False)
    small = narrow(zoo.make(name), zoo.batches(), recipe, progress=False)
    assert small.config.rmtkd["version"] == version
    twice = narrow(
        small, zoo.batches(), recipe.replace(form="factored", sites=None, target_reduction=0.2), progress=False
    )
    assert twice.config.rmtkd["version"] == version


def test_answers_are_those_of_the_next_label():
    model = zoo.make("llama")
    batch = {"input_ids": torch.randint(3, 61, (2, 5))}
    labels = torch.tensor([[-100, -100, 7, 8, 9], [5, 6, -100, -100, -100]])
    with torch.no_grad():
        given = answers(model, model(**batch), batch | {"labels": labels})
    expected = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
    assert torch.equal(given.mask, expected)


def test_a_short_text_is_refused():
    model, data = zoo.make("llama"), [{"input_ids": torch.randint(3, 61, (2, 10))}]
    with pytest.raises(CalibrationError, match="calibration text has 20 tokens.*48 features.*expected 384"):
        narrow(model, data, RECIPE, progress=False)


def test_a_text_beyond_the_positions_is_refused():
    data = [{"input_ids": torch.randint(3, 61, (8, 70))}]
    with pytest.raises(CalibrationError, match="has 70 tokens, LlamaForCausalLM has positions for 64"):
        narrow(zoo.make("llama"), data, RECIPE, progress=False)


@pytest.mark.parametrize("field", ["do_layer_norm_before", "layer_norm_elementwise_affine"])
def test_code_that_no_declaration_covers_is_refused_by_name(field):
    config = zoo.CONFIGS["opt"][1].to_dict() | {field: False}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**config)).eval()
    with pytest.raises(UnsupportedArchitectureError, match=f"OPTForCausalLM with config.{field}=False"):
        narrow(model, zoo.batches(), RECIPE, progress=False)


@pytest.mark.parametrize("name, centres", [("stablelm", True), ("llama", False)])
def test_a_stream_without_a_last_norm_asks_its_first(name, centres):
    model = zoo.make(name)
    anatomy = dataclasses.replace(anatomy_of(model, RECIPE), last_norm=None)
    assert _centred(model, anatomy) is centres


class Centring(torch.nn.Module):
    """A layer norm of somebody's own, which computes in the dtype that it gets."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(width)), 1e-5

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_in_half_precision_is_known_for_what_it_is(dtype):
    assert norm_of(Centring(384).to(dtype)).centres
    assert not norm_of(torch.nn.RMSNorm(384).to(dtype)).centres
