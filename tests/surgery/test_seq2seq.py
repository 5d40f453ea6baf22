"""Encoder-decoders of every family: exact where they are only rotated, alone and together, generating and reloaded."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

from optimum_rmtkd import (
    RMTKDConfig,
    SpecMismatchError,
    UnsupportedArchitectureError,
    count_parameters,
    narrow,
)
from optimum_rmtkd.batches import run
from optimum_rmtkd.distillation import DistillationStep, HiddenStateLoss
from optimum_rmtkd.distillation.projections import compose
from optimum_rmtkd.models import outline
from optimum_rmtkd.surgery import block_paths, narrow_to, reduce
from optimum_rmtkd.surgery.calibration import observed
from optimum_rmtkd.surgery.norms import norm_of
from optimum_rmtkd.surgery.prices import directional_prices
from optimum_rmtkd.surgery.sites import Point, get_module
from optimum_rmtkd.surgery.surgeon import Surgeon, anatomy_of

from ..tables import some_slow
from . import seq2seq_zoo as zoo
from .rotations import rotated


RECIPE = RMTKDConfig(target_reduction=0.3, round_to=4, min_width=4, calibration_samples=48)
QUICK = ("bart",)
ALL = some_slow([*zoo.CONFIGS, *zoo.KIN], QUICK)
TURNING = some_slow([n for n in (*zoo.CONFIGS, *zoo.KIN) if n not in zoo.NORMED], ["t5-untied", "pegasus", "whisper"])


def load(folder, name):
    """The model that is saved in `folder`, through its auto class."""
    auto = "AutoModelForSpeechSeq2Seq" if name == "whisper" else "AutoModelForSeq2SeqLM"
    return getattr(transformers, auto).from_pretrained(folder)


def groups_of_ties(model) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


@pytest.mark.parametrize("name", TURNING)
def test_a_rotation_of_the_stream_changes_nothing(name):
    model, batch = zoo.make(name).double(), zoo.batches(name, count=1)[0]
    anatomy = anatomy_of(model, RECIPE)
    if any(unit.tied and unit.through for unit in anatomy.units):  # a scale a coordinate does not commute
        norm = norm_of(get_module(model, anatomy.last_norm))
        norm.set_scale(torch.full_like(norm.scale, 1.3))
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    before, after = zoo.logits(model, batch), zoo.logits(rotated(model, RECIPE), batch)
    bound = 1e-12 if name in zoo.EXACT else 2e-6  # RMS norms compute in fp32
    assert (before - after).abs().max() < bound * before.abs().max()


@pytest.mark.parametrize("name", ALL)
def test_full_width_changes_nothing(name):
    model, data = zoo.make(name), zoo.batches(name)
    full = {site.couple: site.group_width for site in anatomy_of(model, RECIPE).sites.values()}
    same = narrow_to(model, data, full, RECIPE, progress=False)
    before, after = zoo.logits(model, data[0]), zoo.logits(same, data[0])
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


@torch.no_grad()
def without_effect(model):
    """The anatomy of the model, which has lost the effect of its first eight neurons and of two features of each head,
    among the queries and among the values, layer by layer."""
    anatomy = anatomy_of(model, RECIPE)
    for site in anatomy.sites.values():
        reader = next((get_module(model, u.path) for u in anatomy.units if u.reads == site.name), None)
        if site.kind == "intermediate":
            reader.weight[:, :8] = 0
        elif site.kind == "attention_vo":
            reader.weight.unflatten(1, (site.groups, -1))[..., :2] = 0
        elif site.kind == "attention_qk":
            query = get_module(model, next(u.path for u in anatomy.units if u.writes == site.name))
            for parameter in query.parameters():
                parameter.unflatten(0, (site.groups, -1))[:, :2] = 0
    return anatomy


@pytest.mark.parametrize("kind, less", [("attention_qk", 2), ("intermediate", 8)])
@pytest.mark.parametrize("name", some_slow(zoo.CONFIGS, []))
def test_what_has_no_effect_goes_first_and_costs_nothing(name, kind, less):
    model, data = zoo.make(name), zoo.batches(name)
    sites = [site for site in without_effect(model).sites.values() if site.kind == kind]
    widths = {site.couple: site.group_width - less for site in sites}
    small = narrow_to(model, data, widths, RECIPE.replace(refit=False), progress=False)
    assert count_parameters(small) < count_parameters(model)
    before, after = zoo.logits(model, data[0]), zoo.logits(small, data[0])
    assert (before - after).abs().max() < 1e-3 * before.abs().max()


@torch.no_grad()
def assert_generates_alike(model, batch):
    """From a cache, without one, and with beams."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "forced_eos_token_id": None}
    for beams in (1, 3):
        expected = model.generate(**inputs, **options, num_beams=beams, use_cache=False)
        assert torch.equal(model.generate(**inputs, **options, num_beams=beams), expected)
    return expected


@pytest.mark.parametrize("name", ALL)
def test_life_cycle(name, tmp_path):
    model, data = zoo.make(name), zoo.batches(name)
    before = copy.deepcopy(model.state_dict())
    found = reduce(model, data, RECIPE, progress=False)
    small = found.model
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert abs(1 - count_parameters(small) / count_parameters(model) - 0.3) < 0.02
    assert found.report.planned_parameters == count_parameters(small)
    assert groups_of_ties(small) == groups_of_ties(model)
    written = assert_generates_alike(small, data[0])
    small.save_pretrained(tmp_path / "small")
    again = load(tmp_path / "small", name)
    assert type(again).__name__ == "RMTKD" + type(model).__name__
    assert groups_of_ties(again) == groups_of_ties(model)
    torch.testing.assert_close(zoo.logits(again, data[0]), zoo.logits(small, data[0]), atol=1e-5, rtol=1e-5)
    assert torch.equal(assert_generates_alike(again, data[0]), written)
    bare = transformers.AutoModel.from_pretrained(tmp_path / "small")
    assert bare.get_input_embeddings().weight.shape == small.get_input_embeddings().weight.shape
    twice = narrow(again, data, RECIPE.replace(target_reduction=0.45), progress=False)
    assert count_parameters(twice) < count_parameters(small) and groups_of_ties(twice) == groups_of_ties(model)
    twice.save_pretrained(tmp_path / "twice")
    third = load(tmp_path / "twice", name)
    torch.testing.assert_close(zoo.logits(third, data[0]), zoo.logits(twice, data[0]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", some_slow([*zoo.CONFIGS, *zoo.KIN], ["marian"]))
def test_a_narrow_stream_alone(name, tmp_path):
    """Positions that a class computes from the width are those of the file."""
    model, data = zoo.make(name), zoo.batches(name)
    small = narrow_to(model, data, {"hidden": 24}, RECIPE, progress=False)
    assert small.get_input_embeddings().weight.shape == (61, 24)
    assert groups_of_ties(small) == groups_of_ties(model)
    small.save_pretrained(tmp_path)
    again = load(tmp_path, name)
    torch.testing.assert_close(zoo.logits(again, data[0]), zoo.logits(small, data[0]), atol=1e-5, rtol=1e-5)
    assert torch.equal(assert_generates_alike(again, data[0]), assert_generates_alike(small, data[0]))
    ours, theirs = (torch.cat([zoo.logits(m, batch) for batch in data]).log_softmax(-1) for m in (small, model))
    lost, most = (
        (theirs.exp() * (theirs - ours)).sum(-1).mean(),
        (theirs.exp() * (theirs + math.log(61))).sum(-1).mean(),
    )
    assert lost < 0.7 * most  # of what there is to know


@pytest.mark.parametrize(
    "name, attention, number, others",
    [
        ("t5", "@.decoder.block.0.layer.1.EncDecAttention", "key_value_proj_dim", {"inner_dim": 16}),
        ("bart", "@.decoder.layers.0.encoder_attn", "head_dim", {"embed_dim": 16}),
    ],
)
def test_heads_that_their_layers_do_not_fit_are_refused_by_name(name, attention, number, others):
    """In the config of whoever wrote it: the same tensors would load, and compute something else."""
    spec = {"attrs": {attention: {number: 4}}}
    with pytest.raises(SpecMismatchError, match="rmtkd.spec.attrs.*the entry 'scaling' as well, which its code reads"):
        outline(zoo.make(name), {"version": 3, "spec": spec})
    spec["attrs"][attention] |= {"scaling": 1.0} | others
    with pytest.raises(SpecMismatchError, match="rmtkd.spec.attrs.*heads that the layer '[qk]"):
        outline(zoo.make(name), {"version": 3, "spec": spec})


FRESH = """
import sys, torch, transformers
from safetensors.torch import load_file
sys.modules["optimum_rmtkd"] = None
stored = load_file(sys.argv[2])
logits = stored.pop("logits")
model = transformers.AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(model(**stored).logits, logits, atol=1e-5, rtol=1e-5)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5-untied", "marian"])
def test_a_fresh_process_without_the_package(name, tmp_path):
    data = zoo.batches(name)
    small = narrow_to(zoo.make(name), data, {"hidden": 24, "decoder.0.cross_attention": 4}, RECIPE, progress=False)
    small.save_pretrained(tmp_path / "small")
    inputs = {"input_ids": data[0]["input_ids"], "decoder_input_ids": data[0]["input_ids"][:, :5].clone()}
    with torch.no_grad():
        save_file({**inputs, "logits": small(**inputs).logits.contiguous()}, tmp_path / "x.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "small"), str(tmp_path / "x.safetensors")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub")},
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


@pytest.mark.parametrize("name", some_slow(["t5", "mt5-gated", "bart", "mbart", "pegasus", "whisper"], []))
def test_each_layer_is_fitted_to_what_the_one_before_it_lost(name):
    """The decoder to that of the encoder, too: the refit of both stacks brings the answers nearer."""
    model, data = zoo.make(name), zoo.batches(name)
    lost = [reduce(model, data, RECIPE.replace(refit=fitted), progress=False).divergence for fitted in (False, True)]
    assert lost[1] < 0.9 * lost[0]


@pytest.mark.parametrize("name", some_slow(["t5", "t5-untied", "mt5-gated", "umt5"], []))
def test_the_native_shape_is_a_plain_checkpoint(name, tmp_path):
    """The output layer is divided by the root of a width that is another one now."""
    model, data = zoo.make(name), zoo.batches(name)
    plain = narrow(model, data, RECIPE.replace(shape="native"), progress=False)
    assert type(plain) is type(model) and 0.6 < count_parameters(plain) / count_parameters(model) < 0.73
    assert plain.config.d_model < 32 or plain.config.d_kv < 8 or plain.config.d_ff < 48
    plain.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = load(tmp_path, name)
    assert type(again) is type(model) and groups_of_ties(again) == groups_of_ties(model)
    torch.testing.assert_close(zoo.logits(again, data[0]), zoo.logits(plain, data[0]), atol=1e-5, rtol=1e-5)
    assert_generates_alike(again, data[0])


def test_a_native_stream_is_that_of_the_free_shape():
    model, data = zoo.make("t5"), zoo.batches("t5")
    recipe = RECIPE.replace(sites="hidden", target_reduction=0.2, refit=False)
    free = narrow(model, data, recipe, progress=False)
    plain = narrow(model, data, recipe.replace(shape="native"), progress=False)
    assert plain.config.d_model == free.config.d_model < 32
    torch.testing.assert_close(zoo.logits(plain, data[0]), zoo.logits(free, data[0]), atol=1e-4, rtol=1e-4)


def test_a_native_head_that_is_not_divided_stays_so():
    config = copy.deepcopy(zoo.CONFIGS["t5"][1])
    config.num_labels = 2
    model = zoo.enlivened(transformers.T5ForQuestionAnswering(config))
    data = [{key: value for key, value in batch.items() if key != "labels"} for batch in zoo.batches(count=2)]
    recipe = RECIPE.replace(shape="native", sites=("hidden",), target_reduction=0.2, importance="auto", refit=False)
    assert type(narrow(model, data, recipe, progress=False)) is transformers.T5ForQuestionAnswering


def test_a_native_shape_that_no_config_states_is_refused():
    with pytest.raises(UnsupportedArchitectureError, match="shape='native'.*MarianMTModel.*Use shape='free'"):
        narrow(zoo.make("marian"), zoo.batches(), RECIPE.replace(shape="native"), progress=False)


def test_tokens_of_two_stacks_are_no_terms_of_one_sum():
    """Sources and targets of one length: a price adds the norms of each stack alone, token by token."""
    anatomy = anatomy_of(zoo.make("t5"), RECIPE)
    stacks = [anatomy.stack_of(point.path) for point in anatomy.sites["hidden"].points]
    assert stacks == [0] * 5 + [1] * 7 and anatomy.stack_of("lm_head") == 1
    model, data = zoo.make("t5"), zoo.batches("t5", lengths=(9, 9))
    surgeon = Surgeon(model, data, RECIPE.replace(refit=False), progress=False)
    found = surgeon.directions_of(surgeon.anatomy.sites["hidden"])
    found = {"hidden": dataclasses.replace(found, damage=torch.zeros_like(found.damage))}  # without the product rule
    args = surgeon.teacher, surgeon.batches, found, 0
    apart, together = (directional_prices(*args, *more)["hidden"].damage for more in ((surgeon.anatomy.stack_of,), ()))
    alone = [
        directional_prices(*args[:2], {"hidden": _seen_in(found["hidden"], anatomy, stack)}, 0)["hidden"].damage
        for stack in (0, 1)
    ]
    assert apart[0] == pytest.approx(float(sum(alone)[0]), rel=1e-5)  # at other widths it falls no lower than before
    assert not torch.allclose(apart, together, rtol=1e-2)


def test_prices_count_the_positions_of_their_own_stack():
    """Long sources, short targets: what the product rule says is near what the data says, in both."""
    data = zoo.batches("t5", count=2, lengths=(60, 4))
    data = [batch | {"attention_mask": torch.ones_like(batch["input_ids"])} for batch in data]
    surgeon = Surgeon(zoo.make("t5"), data, RECIPE.replace(refit=False), progress=False)
    for name in ("encoder.0.intermediate", "decoder.0.intermediate"):
        found = surgeon.directions_of(surgeon.anatomy.sites[name])
        bare = {name: dataclasses.replace(found, damage=torch.zeros_like(found.damage))}
        priced = directional_prices(surgeon.teacher, surgeon.batches, bare, 0)[name]
        assert 0.5 < found.damage[24] / priced.damage[24] < 2


def test_hidden_states_of_a_stream_that_keeps_its_axes_are_compared_as_they_are():
    model, data = zoo.make("whisper"), zoo.batches("whisper", count=2)
    found = reduce(model, data, RECIPE.replace(sites=("hidden",), target_reduction=0.1), progress=False)
    assert set(found.projections) == {"model.decoder.layers.0", "model.decoder.layers.1"}
    objective = HiddenStateLoss()
    objective.setup(found.model, model, found.projections)
    seen = [_outputs_of(m, block_paths(m), data[0]) for m in (found.model, model)]
    loss = objective(DistillationStep(data[0], student_features=seen[0], teacher_features=seen[1]))
    assert 0 < loss < 1 and len(seen[0]) == 4
    again = {name: torch.zeros(matrix.shape[1], 20) for name, matrix in found.projections.items()}
    both = compose(found.projections, again)
    assert {name: tuple(matrix.shape) for name, matrix in both.items()} == dict.fromkeys(again, (32, 20))


def test_what_the_encoder_gives_stays_where_its_stream_is_not_turned():
    for name, couple in (("whisper", {"hidden": 24}), ("pegasus", {"decoder.0.intermediate": 24})):
        model, data = zoo.make(name), zoo.batches(name, count=2)
        sites = ("hidden",) if name == "whisper" else ("intermediate",)
        small = narrow_to(model, data, couple, RECIPE.replace(sites=sites), progress=False)
        given = {key: value for key, value in data[0].items() if key.startswith("input")}
        with torch.no_grad():
            ours, theirs = (m.get_encoder()(**given).last_hidden_state for m in (small, model))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def _outputs_of(model, paths, batch):
    found = {}

    def keep(point, x):
        found[point.path] = x

    with observed(model, [Point(path) for path in paths], keep), torch.no_grad():
        run(model, batch)
    return found


def _seen_in(found, anatomy, stack):
    """Directions that are priced in one stack, from the data alone."""
    points = tuple(point for point in found.site.points if anatomy.stack_of(point.path) == stack)
    return dataclasses.replace(found, priced_at=points)


HEADS = {
    "t5": ("Model", "EncoderModel", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"),
    "bart": ("Model", "ForSequenceClassification", "ForQuestionAnswering"),
}


@pytest.mark.parametrize(
    "name, task",
    some_slow(
        [(name, task) for name, tasks in HEADS.items() for task in tasks], [("bart", "ForSequenceClassification")]
    ),
)
def test_other_heads(name, task, tmp_path):
    _, config = zoo.CONFIGS[name]
    config = type(config)(**config.to_dict() | {"num_labels": 2 if task == "ForQuestionAnswering" else 3})
    torch.manual_seed(0)
    cls = getattr(transformers, type(config).__name__.removesuffix("Config") + task)
    model = zoo.enlivened(cls(config))
    end = config.eos_token_id
    data = [{key: value for key, value in batch.items() if key != "labels"} for batch in zoo.batches(name)]
    for batch in data:  # a classifier reads the end of the text
        batch["input_ids"].masked_fill_(batch["input_ids"] == end, 7)[:, 10] = end
    if task == "Model" and name == "t5":
        data = [batch | {"decoder_input_ids": batch["input_ids"][:, :7].clone()} for batch in data]
    small = narrow(model, data, RECIPE.replace(importance="auto"), progress=False)
    assert abs(1 - count_parameters(small) / count_parameters(model) - 0.3) < 0.02
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        ours, theirs = again(**data[0]), small(**data[0])
    for name_of, value in theirs.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(ours[name_of], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", ["BartForCausalLM", "MarianForCausalLM"])
def test_a_decoder_without_its_encoder_is_refused_by_name(head):
    """Its layers hold a cross-attention that never runs."""
    name = head.removesuffix("ForCausalLM").lower()
    model = getattr(transformers, head)(copy.deepcopy(zoo.CONFIGS[name][1]))
    data = [{"input_ids": batch["input_ids"]} for batch in zoo.batches()]
    with pytest.raises(UnsupportedArchitectureError, match="has nothing at '@.encoder.layers'.*form='factored'"):
        narrow(model, data, RECIPE, progress=False)


@pytest.mark.slow
def test_half_precision():
    model, data = zoo.make("t5").bfloat16(), zoo.batches()
    small = narrow(model, data, RECIPE, progress=False)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert zoo.logits(small, data[0]).isfinite().all()
