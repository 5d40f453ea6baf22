"""Whole blocks that go: prices, the budget, the cut, saving and loading, and what comes after."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import transformers as tf
from transformers import AutoConfig

from optimum_rmtkd import RMTKDConfig, analyze, narrow
from optimum_rmtkd.distillation.layers import layer_pairs
from optimum_rmtkd.distillation.objectives.alignment import _counterparts
from optimum_rmtkd.errors import RMTKDError, UnsupportedArchitectureError
from optimum_rmtkd.models import kept_blocks, uncut_parameters
from optimum_rmtkd.spec_rmtkd import SpecMismatchError, check_rmtkd
from optimum_rmtkd.surgery import narrow_to
from optimum_rmtkd.surgery.block_prices import block_prices
from optimum_rmtkd.surgery.budget import couple_grid, parameters_of, smallest_widths
from optimum_rmtkd.surgery.checks import anatomy_of
from optimum_rmtkd.surgery.sites import select_sites
from optimum_rmtkd.surgery.surgeon import Surgeon

from . import zoo


BODY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": 61, "max_position_embeddings": 40, "num_labels": 3}
WITH = RMTKDConfig(sites=("block", "intermediate", "hidden"), target_reduction=0.5, round_to=4, min_width=4)
FRESH = """
import sys, torch
{imports}
from transformers import {auto}
saved = torch.load(sys.argv[2])
model = {auto}.from_pretrained(sys.argv[1]{trust}).eval()
with torch.no_grad():
    found = model(**saved["batch"])[0]
assert torch.allclose(found, saved["output"], rtol=1e-4, atol=1e-4), (found - saved["output"]).abs().max()
assert {plugin} == ("optimum_rmtkd" in sys.modules)
"""


def deep(kind: str, seed: int = 0) -> tf.PreTrainedModel:
    torch.manual_seed(seed)
    made = {
        "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT, **BODY)),
        "vit": lambda: tf.ViTForImageClassification(
            tf.ViTConfig(**BODY, image_size=8, patch_size=2, num_channels=1, num_labels=3)
        ),
        "llama": lambda: tf.LlamaForCausalLM(
            tf.LlamaConfig(**BODY, vocab_size=61, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
        ),
        "smollm3": lambda: tf.SmolLM3ForCausalLM(
            tf.SmolLM3Config(**BODY, vocab_size=61, num_key_value_heads=2, no_rope_layer_interval=2, pad_token_id=0)
        ),
        "gpt2": lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=61, scale_attn_by_inverse_layer_idx=True)
        ),
        "gpt_neo": lambda: tf.GPTNeoForCausalLM(
            tf.GPTNeoConfig(
                hidden_size=32, num_layers=4, num_heads=4, vocab_size=61, attention_types=[[["global", "local"], 2]]
            )
        ),
    }
    model = made[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def data(kind: str) -> list[dict[str, torch.Tensor]]:
    return zoo.batches("vit" if kind == "vit" else "bert")


def without(model: tf.PreTrainedModel, *depths: int) -> tf.PreTrainedModel:
    """A copy whose blocks at these places give what they get: the slow way to leave them out."""
    model = copy.deepcopy(model)
    for depth in depths:
        block = model.get_submodule(blocks_of(model)[depth])
        alone = model.config.model_type != "gpt_neo"  # whose blocks give a tuple
        block.forward = lambda hidden_states, *_args, **_kwargs: hidden_states if alone else (hidden_states,)
    return model


def blocks_of(model):
    from optimum_rmtkd.surgery import block_paths

    return block_paths(model)


@pytest.mark.parametrize("kind", ["bert", "vit", "llama", "smollm3", "gpt2", "gpt_neo"])
def test_what_is_left_does_what_it_did(kind):
    model, batches = deep(kind), data(kind)
    config = RMTKDConfig(sites=("block",), refit=False)
    small = narrow_to(model, batches, {"layer.0.block": 0, "layer.2.block": 0}, config, progress=False)
    assert small.config.num_hidden_layers == 2
    assert list(kept_blocks(small).values()) == [{"kept": [1, 3], "of": 4}]
    options = {"use_cache": False} if kind not in ("bert", "vit") else {}
    batch = batches[0] | options
    torch.testing.assert_close(
        zoo.outputs(small, batch), zoo.outputs(without(model, 0, 2), batch), atol=1e-4, rtol=1e-4
    )


def silence(model: tf.PreTrainedModel, depth: int) -> None:
    """The block adds exactly zero, which of post-norm models none can."""
    block = model.get_submodule(blocks_of(model)[depth])
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if any(part in name for part in ("o_proj", "fc2", "down_proj")):
                parameter.zero_()


@pytest.mark.parametrize("kind", ["vit", "llama"])
def test_a_block_that_adds_nothing_is_free_and_goes_first(kind):
    model, batches = deep(kind), data(kind)
    silence(model, 2)
    anatomy = anatomy_of(model, WITH)
    prices = block_prices(model, batches, anatomy, 0, nats=True).diagonal()
    assert prices[2] == 0 and prices[[0, 1, 3]].min() > 0
    # as much as the block is, within what a step may go too far
    share = sum(p.numel() for p in model.get_submodule(blocks_of(model)[2]).parameters()) / model.num_parameters()
    small = narrow(model, batches, WITH.replace(target_reduction=share - 0.002), progress=False)
    assert list(kept_blocks(small).values()) == [{"kept": [0, 1, 3], "of": 4}]
    torch.testing.assert_close(zoo.outputs(small, batches[0]), zoo.outputs(model, batches[0]), atol=1e-3, rtol=1e-3)


def test_prices_order_blocks_as_leaving_them_out_does():
    """Four blocks whose outputs are scaled apart: the price follows the true divergence."""
    model, batches = deep("vit"), data("vit")
    with torch.no_grad():
        for depth, scale in enumerate((0.03, 0.002, 0.01, 0.0005)):
            for name, parameter in model.get_submodule(blocks_of(model)[depth]).named_parameters():
                if "o_proj" in name or "fc2" in name:
                    parameter.mul_(scale)
    prices = block_prices(model, batches, anatomy_of(model, WITH), 0, nats=True).diagonal()

    def lost(depth: int) -> float:
        other = without(model, depth)
        with torch.no_grad():
            each = [(model(**b).logits.log_softmax(-1), other(**b).logits.log_softmax(-1)) for b in batches]
        return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in each]).mean())

    true = torch.tensor([lost(depth) for depth in range(4)])
    assert prices.argsort().tolist() == true.argsort().tolist()
    torch.testing.assert_close(prices, true.double(), rtol=0.3, atol=1e-9)  # measured, on a few of the batches


def test_widths_of_a_block_that_is_gone_are_not_counted_twice():
    model, batches = deep("bert"), data("bert")
    surgeon = Surgeon(model, batches, WITH, progress=False)
    alone = surgeon.predicted_loss({"layer.1.block": 0})
    both = surgeon.predicted_loss({"layer.1.block": 0, "layer.1.intermediate": 8})
    assert alone == pytest.approx(both) and alone > 0
    assert surgeon.predicted_loss({"layer.2.intermediate": 8, "layer.1.block": 0}) > alone


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_budget_with_blocks_predicts_no_more_loss_than_one_of_widths(kind):
    model, batches = deep(kind), data(kind)
    surgeon = Surgeon(model, batches, WITH, progress=False)
    for target in (0.3, 0.6):
        plan = surgeon.plan(target)
        found = surgeon.couples
        surgeon.couples = lambda spectra=False, found=found: [c for c in found() if not c.is_block]
        widths = surgeon.plan(target)
        surgeon.couples = found
        assert plan.curve[-1].predicted_loss <= widths.curve[-1].predicted_loss + 1e-12


def test_one_block_stays():
    model, batches = deep("bert"), data("bert")
    with pytest.raises(RMTKDError, match="cannot get below"):
        narrow(model, batches, RMTKDConfig(sites=("block",), target_reduction=0.95), progress=False)
    small = narrow(model, batches, RMTKDConfig(sites=("block",), target_reduction=0.6), progress=False)
    assert small.config.num_hidden_layers >= 1


def fresh(folder, batch, output, plugin: bool, native: bool, auto: str) -> None:
    torch.save({"batch": batch, "output": output}, folder / "expected.pt")
    trust = "" if plugin or native else ", trust_remote_code=True"
    code = FRESH.format(imports="import optimum_rmtkd" if plugin else "", trust=trust, auto=auto, plugin=plugin)
    environment = dict(os.environ) | {"HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", code, str(folder / "model"), str(folder / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
    "llama": "AutoModelForCausalLM",
}


@pytest.mark.parametrize("shape", ["free", pytest.param("native", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["bert", *(pytest.param(k, marks=pytest.mark.slow) for k in ("vit", "llama"))])
def test_a_life_with_fewer_blocks(kind, shape, tmp_path):
    model, batches = deep(kind), data(kind)
    config = WITH.replace(shape=shape)
    heads = anatomy_of(model, config).sites["hidden"].groups
    small = narrow_to(model, batches, {"layer.1.block": 0, "hidden": 24 // heads}, config, progress=False)
    assert uncut_parameters(small) == model.num_parameters()
    assert (shape == "native") == (getattr(small.config, "rmtkd", None) is None)
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    for batch in batches[:2]:
        target = model(**batch).logits.detach()
        optimizer.zero_grad()
        (small(**batch).logits - target).square().mean().backward()
        optimizer.step()
    small.save_pretrained(tmp_path / "model")
    batch = batches[0]
    with torch.no_grad():
        output = small(**batch)[0]
    fresh(tmp_path, batch, output, plugin=False, native=shape == "native", auto=AUTO[kind])
    again = narrow_to(small, batches, {"layer.2.block": 0, "hidden": 16 // heads}, config, progress=False)
    assert list(kept_blocks(again).values()) == [{"kept": [0, 3], "of": 4}]
    assert again.config.num_hidden_layers == 2 and again.config.hidden_size == 16
    assert uncut_parameters(again) == model.num_parameters()
    assert bool(zoo.outputs(again, batch).isfinite().all())


@pytest.mark.parametrize("kind", ["llama", "smollm3"])
def test_generates_with_a_cache_as_without(kind):
    model, batches = deep(kind), data(kind)
    small = narrow_to(model, batches, {"layer.1.block": 0}, RMTKDConfig(sites=("block",)), progress=False)
    ids = batches[0]["input_ids"][:2]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached, uncached = (small.generate(ids, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, uncached)
    for name in ("layer_types", "no_rope_layers"):
        before, after = (getattr(m.config, name, None) for m in (model, small))
        assert after == (before and [before[0], *before[2:]])


def numbers(pairs):
    return [tuple(path.rsplit(".", 1)[1] for path in pair) for pair in pairs]


def test_blocks_are_taught_by_their_own():
    model, batches = deep("bert"), data("bert")
    small = narrow_to(model, batches, {"layer.1.block": 0}, RMTKDConfig(sites=("block",)), progress=False)
    names = [
        (ours.rsplit(".", 1)[1], theirs.rsplit(".", 1)[1]) for ours, theirs in layer_pairs(small, model, "uniform")
    ]
    assert names == [("0", "0"), ("1", "2"), ("2", "3")]
    again = narrow_to(small, batches, {"layer.0.block": 0}, RMTKDConfig(sites=("block",)), progress=False)
    names = [
        (ours.rsplit(".", 1)[1], theirs.rsplit(".", 1)[1]) for ours, theirs in layer_pairs(again, small, "uniform")
    ]
    assert names == [("0", "1"), ("1", "2")]


def test_frozen_blocks_stay_the_ones_that_were_frozen():
    model, batches = deep("bert"), data("bert")
    for parameter in model.bert.encoder.layer[2].parameters():
        parameter.requires_grad_(False)
    small = narrow_to(model, batches, {"layer.0.block": 0}, RMTKDConfig(sites=("block",)), progress=False)
    frozen = [not any(p.requires_grad for p in layer.parameters()) for layer in small.bert.encoder.layer]
    assert frozen == [False, True, False]


def test_analysis_tells_of_blocks():
    report = analyze(deep("bert"), data("bert"), WITH.replace(target_reduction=0.7), progress=False)
    assert set(report.blocks) == {f"layer.{i}.block" for i in range(4)}
    assert "blocks: predicted loss without layer.0.block" in report.table()


def test_blocks_are_opt_in_and_refused_where_there_are_none():
    model = deep("bert")
    assert not anatomy_of(model, RMTKDConfig()).block_sites
    conv, batches = zoo.make("resnet-basic", "ForImageClassification"), zoo.batches("resnet-basic")
    with pytest.raises(UnsupportedArchitectureError, match="not one list of equal ones"):
        narrow(conv, batches, RMTKDConfig(sites=("block", "channels"), target_reduction=0.3), progress=False)
    with pytest.raises(RMTKDError, match="no width to share out"):
        RMTKDConfig(sites=("block", "hidden"), schedule="layerwise")
    with pytest.raises(RMTKDError, match="factors leave whole blocks"):
        RMTKDConfig(sites=("block",), form="factored")
    config = RMTKDConfig(sites=("linear", "layer.1.block"), form="factored", target_reduction=0.2, round_to=4)
    assert narrow(model, data("bert"), config, progress=False).config.num_hidden_layers == 4


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"kept": [], "of": 4}, "kept"),
        ({"kept": [1, 1], "of": 4}, r"kept\[1\]"),
        ({"kept": [0, 4], "of": 4}, r"kept\[1\]"),
        ({"kept": [0, True], "of": 4}, r"kept\[1\]"),
        ({"kept": [0], "of": 10**9}, "of"),
        ({"kept": [0], "of": 4, "how": 1}, "how"),
        ({"kept": "01", "of": 4}, "kept"),
    ],
)
def test_a_spec_that_says_odd_things_of_blocks_is_refused(entry, named):
    with pytest.raises(SpecMismatchError, match=named):
        check_rmtkd({"version": 4, "spec": {"blocks": {"@.encoder.layer": entry}}})


def test_a_spec_and_a_number_of_layers_that_contradict_each_other(tmp_path):
    model, batches = deep("bert"), data("bert")
    small = narrow_to(model, batches, {"layer.1.block": 0}, RMTKDConfig(sites=("block",)), progress=False)
    assert small.config.rmtkd["version"] == 4
    small.config.rmtkd["spec"]["blocks"]["@.encoder.layer"]["kept"] = [0, 1]
    small.save_pretrained(tmp_path)
    with pytest.raises(SpecMismatchError, match="as many as the config says, 3"):
        type(small)(AutoConfig.from_pretrained(tmp_path))


def test_of_blocks_that_all_go_too_far_the_cheapest_goes():
    """One block is more than was asked for; all are equally large."""
    model, batches = deep("vit"), data("vit")
    silence(model, 2)
    small = narrow(model, batches, RMTKDConfig(sites=("block",), target_reduction=0.1), progress=False)
    assert list(kept_blocks(small).values()) == [{"kept": [0, 1, 3], "of": 4}]


def test_one_block_and_the_narrowest_widths_are_within_reach():
    model = deep("bert")
    config = WITH.replace(round_to=1, refit=False)
    anatomy = anatomy_of(model, config)
    cost, sites = parameters_of(model, anatomy), select_sites(anatomy, config.sites)
    least = cost(smallest_widths(sites, cost, config))
    names = {site.couple: couple_grid(site, config)[0] for site in sites}
    assert least == min(cost({**names, f"layer.{depth}.block": 1}) for depth in range(4))


@pytest.mark.parametrize("kind", ["dinov2", "beit"])
def test_a_config_that_names_its_stages_follows(kind):
    config = {"dinov2": tf.Dinov2Config, "beit": tf.BeitConfig}[kind]
    model = {"dinov2": tf.Dinov2ForImageClassification, "beit": tf.BeitForImageClassification}[kind]
    shape = BODY if kind == "beit" else {k: v for k, v in BODY.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
    stochastic = {"drop_path_rate": 0.1}  # which differs from block to block
    model = model(config(**shape, **stochastic, image_size=8, patch_size=2, num_channels=1, num_labels=3)).eval()
    recipe = RMTKDConfig(sites=("block",), refit=False)
    small = narrow_to(model, data("vit"), {"layer.1.block": 0}, recipe, progress=False)
    assert small.config.stage_names == ["stem", "stage1", "stage2", "stage3"]
    assert small.config.out_features == ["stage3"] and small.config.out_indices == [3]
    batch = data("vit")[0]
    torch.testing.assert_close(zoo.outputs(small, batch), zoo.outputs(without(model, 1), batch), atol=1e-4, rtol=1e-4)


def test_a_block_that_the_class_would_make_otherwise_is_not_offered():
    """ModernBERT's first has no norm in front of its attention."""
    body = {"global_attn_every_n_layers": 2, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    body |= {"bos_token_id": 1, "eos_token_id": 2}
    model = tf.ModernBertForSequenceClassification(tf.ModernBertConfig(**BODY, vocab_size=61, num_labels=3, **body))
    anatomy = anatomy_of(model, RMTKDConfig(sites=("block",)))
    assert set(anatomy.block_sites) == {anatomy.blocks[depth] for depth in (1, 2, 3)}
    with pytest.raises(UnsupportedArchitectureError, match="depends on its place. Leave it out"):
        narrow(model, data("bert"), RMTKDConfig(sites=("layer.0.block",), target_reduction=0.1), progress=False)


def test_an_encoder_of_an_encoder_decoder_keeps_its_blocks():
    config = tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=61)
    with pytest.raises(UnsupportedArchitectureError, match="an encoder and a decoder"):
        narrow(tf.T5EncoderModel(config), data("bert"), RMTKDConfig(sites=("block",), target_reduction=0.1))


@pytest.mark.parametrize(
    "entry",
    [
        {"kept": [0, 1, 3], "of": 10**9},
        {"kept": [0, 1, 1], "of": 4},
        {"kept": [1, 0, 3], "of": 4},
        {"kept": [0, 1, 4], "of": 4},
        {"kept": [0, 1], "of": 4},
        {"kept": [0, True, 2], "of": 4},
        {"kept": [0, 1, 2]},
        "all",
    ],
)
def test_a_plain_config_that_says_odd_things_of_blocks_is_refused(entry):
    model = tf.BertForSequenceClassification(tf.BertConfig(**TEXT, **BODY | {"num_hidden_layers": 3}))
    model.config.kept_blocks = {"bert.encoder.layer": entry}
    with pytest.raises(SpecMismatchError, match="kept_blocks"):
        kept_blocks(model)


def test_weights_are_aligned_with_those_of_the_block_they_were_made_from():
    model = deep("bert")
    recipe = RMTKDConfig(sites=("block",), refit=False)
    small = narrow_to(model, data("bert"), {"layer.3.block": 0, "layer.1.block": 0}, recipe, progress=False)
    find = _counterparts(small, model)
    for place, number in enumerate((0, 2)):
        path = "bert.encoder.layer.{}.intermediate.dense"
        assert find(path.format(place)) is model.get_submodule(path.format(number)).weight
