"""The life cycle of every family and head: exact at full width, narrow, save, load in a fresh process, narrow
again."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import save_file

import optimum_rmtkd  # noqa: F401  registers the reduced classes
from optimum_rmtkd import RMTKDConfig, UnsupportedArchitectureError, analyze, narrow
from optimum_rmtkd.surgery import block_paths, count_parameters, narrow_to, reduce, stage_sites
from optimum_rmtkd.surgery.bases import Projection, rotate_onto_ones
from optimum_rmtkd.surgery.directions import _before_norms
from optimum_rmtkd.surgery.narrowing import Cuts, build_student, fold_norms, initialise
from optimum_rmtkd.surgery.sites import get_module
from optimum_rmtkd.surgery.surgeon import Surgeon, anatomy_of

from ..tables import some_slow
from . import zoo


RECIPE = RMTKDConfig(target_reduction=0.4, round_to=4, min_width=4, calibration_samples=48)


def quiet(function, *arguments, **options):
    return function(*arguments, progress=False, **options)


@pytest.mark.parametrize("name, task", zoo.ONE_EACH)
def test_full_width_changes_nothing(name, task):
    model, data = zoo.make(name, task), zoo.batches(name)
    full = {site.couple: site.group_width for site in anatomy_of(model, RECIPE).sites.values()}
    same = quiet(narrow_to, model, data, full, RECIPE)
    before, after = zoo.outputs(model, data[0]), zoo.outputs(same, data[0])
    assert (before - after).abs().max() < 1e-5 * max(1.0, before.abs().max().item())


def test_a_bare_model_keeps_its_output_where_the_stream_is_not_cut():
    model, data = zoo.make("vit", "Model"), zoo.batches("vit")
    with torch.no_grad():
        model.layernorm.weight.uniform_(0.5, 2.0)
        model.layernorm.bias.normal_()
    full = {s.couple: s.group_width for s in anatomy_of(model, RECIPE).sites.values() if s.kind == "intermediate"}
    same = quiet(narrow_to, model, data, full, RECIPE.replace(sites=("intermediate",)))
    with torch.no_grad():
        before, after = model(**data[0]), same(**data[0])
    for name in ("last_hidden_state", "pooler_output"):
        torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-5)


def test_a_bare_model_gives_its_output_in_the_coordinates_of_the_cut():
    """The scale of the last norm does not commute with a rotation: the output is fitted, all before it is exact."""
    model, data = zoo.make("vit", "Model"), zoo.batches("vit")
    with torch.no_grad():
        model.layernorm.weight.uniform_(0.5, 2.0)
    found = quiet(reduce, model, data, RECIPE.replace(target_reduction=0.3, sites=("hidden",)))
    with torch.no_grad():
        before, after = model(**data[0])[0], found.model(**data[0])[0]
    aim = before @ found.projections["hidden"]
    assert after.shape == aim.shape and after.shape[-1] < before.shape[-1]
    lost = (after - aim).square().sum() / (aim - aim.mean((0, 1))).square().sum()
    assert lost < 0.1  # 0.03 on this model, whose random stream is not of low rank


def turned(model):
    """The same model in another basis of its stream: random, but for the all-ones direction that layer norms
    subtract; the axes in another order, where a norm stands between tables and stream."""
    anatomy = anatomy_of(model, RECIPE)
    teacher, width = fold_norms(model, anatomy), anatomy.sites["hidden"].width
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=torch.manual_seed(3)))[0]
    basis = rotate_onto_ones(basis, basis.T @ torch.full((width,), width**-0.5, dtype=torch.float64))
    if any(unit.behind for unit in anatomy.units):
        basis = torch.eye(width, dtype=torch.float64)[torch.randperm(width)]
    cuts = Cuts({"hidden": {"": Projection(basis, basis), **_before_norms(teacher, anatomy, basis)}})
    student = build_student(teacher, anatomy, {"hidden": anatomy.sites["hidden"].group_width}, {}, {})
    initialise(student, teacher, anatomy, cuts)
    student.tie_weights()
    return student


@pytest.mark.parametrize(
    "name, task",
    some_slow(
        [(name, "ForImageClassification") for name in ("vit", "dinov2", "dinov2-gated", "dinov2-registers", "beit")]
        + [(name, "ModelWithProjection") for name in ("clip-text", "clip-images")]
        + [("modernbert", "ForSequenceClassification")],
        [("dinov2", "ForImageClassification"), ("modernbert", "ForSequenceClassification")],
    ),
)
def test_a_turned_stream_changes_nothing(name, task):
    model = zoo.make(name, task).double()
    batch = {key: x.double() if x.is_floating_point() else x for key, x in zoo.batches(name)[0].items()}
    with torch.no_grad():
        before, after = (next(iter(each(**batch).values())) for each in (model, turned(model)))
    bound = 2e-6 if name == "modernbert" else 1e-11  # rotary positions are applied in fp32
    assert (before - after).abs().max() < bound * before.abs().max()


SCALED = dict.fromkeys(("mpnet", "deberta-v2", "deberta-v3", "albert"), "ForSequenceClassification")
SCALED |= {"clip-text": "ModelWithProjection", "clip-images": "ModelWithProjection", "beit": "ForImageClassification"}


@pytest.mark.parametrize("name", some_slow(SCALED, ["mpnet"]))
def test_halves_of_heads_keep_the_scale_of_whole_ones(name):
    """Heads of which half have no effect: their halves give the same logits, though code may divide otherwise."""
    model, data = zoo.make(name, SCALED[name]), zoo.batches(name)
    with torch.no_grad():
        for unit in anatomy_of(model, RECIPE).units:
            if (unit.writes or "").rpartition(".")[2] in ("attention_qk", "attention_vo"):
                layer = get_module(model, unit.path)
                for tensor in layer.parameters():
                    tensor.unflatten(0, (4, 8))[:, 4:] = 0
    small = quiet(narrow_to, model, data, {"layer.0.heads": 4, "layer.1.heads": 4}, RECIPE.replace(refit=False))
    before, after = zoo.outputs(model, data[0]), zoo.outputs(small, data[0])
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


def test_scales_behind_layers_are_folded_into_them():
    model, data = zoo.make("dinov2", "ForImageClassification"), zoo.batches("dinov2")
    small = quiet(narrow_to, model, data, {"hidden": 24}, RECIPE)
    assert all(bool((layer.layer_scale1.lambda1 == 1).all()) for layer in small.dinov2.encoder.layer)
    assert small.dinov2.encoder.layer[0].layer_scale2.lambda1.shape == (24,)
    assert small.classifier.in_features == 48  # the class token, and the mean of all others


def test_shared_layers_are_counted_and_cut_once():
    model, data = zoo.make("albert", "ForSequenceClassification"), zoo.batches("albert")
    anatomy = anatomy_of(model, RECIPE)
    assert len(anatomy.blocks) == 2 and anatomy.repeats == 2
    small = quiet(narrow_to, model, data, {"layer.0.intermediate": 40, "layer.1.intermediate": 24}, RECIPE)
    removed = (2 * 32 + 1) * (24 + 40)
    assert count_parameters(model) - count_parameters(small) == removed
    expected, errors = zoo.outputs(model, data[0]), []
    for fitted in (True, False):
        small = quiet(narrow_to, model, data, {"hidden": 24}, RECIPE.replace(refit=fitted))
        errors.append((zoo.outputs(small, data[0]) - expected).norm())
    assert errors[0] < 0.5 * errors[1]  # 0.25 of it: each layer is fitted to all its calls


def test_what_a_class_does_not_run_is_refused_by_name():
    config = transformers.DebertaV2Config(**zoo.TEXT, **zoo.BODY, **zoo.RELATIVE, conv_kernel_size=3)
    with pytest.raises(UnsupportedArchitectureError, match="config.conv_kernel_size=3"):
        quiet(narrow, transformers.DebertaV2ForSequenceClassification(config), zoo.batches("deberta-v2"), RECIPE)


@pytest.mark.parametrize("name", some_slow(zoo.HEADED, ["dinov2"]))
def test_two_steps_of_distillation_and_half_precision(name, tmp_path):
    model, data = zoo.make(name, zoo.HEADED[name]), zoo.batches(name)
    small = quiet(narrow, model, data, RECIPE)
    before = {key: value.clone() for key, value in small.state_dict().items()}
    optimizer = torch.optim.SGD(small.parameters(), 1e-4)
    for _ in range(2):
        (small(**data[0])[0] - zoo.outputs(model, data[0])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    cut = [key for key, value in model.state_dict().items() if value.shape != before[key].shape]
    changed = [key for key in cut if not torch.equal(before[key], small.state_dict()[key])]
    assert len(changed) > 0.5 * len(cut)  # the steps are small: gradients near zero are lost in rounding
    assert all(value.isfinite().all() for value in small.state_dict().values())
    small.save_pretrained(tmp_path)
    assert zoo.same(type(small).from_pretrained(tmp_path).eval(), small, data[0])
    halves = [{k: x.bfloat16() if x.is_floating_point() else x for k, x in batch.items()} for batch in data]
    half = quiet(narrow, model.to(torch.bfloat16), halves, RECIPE)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert zoo.outputs(half, halves[0]).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("plugin", [True, False], ids=["plugin", "remote code"])
def test_fresh_process_of_later_families(plugin, tmp_path):
    jobs = []
    for name, task in zoo.HEADED.items():
        if task == "ModelWithProjection":  # no Auto class stands for it
            task = "Model"
        model, data = zoo.make(name, task), zoo.batches(name)
        small = quiet(narrow, model, data, RECIPE.replace(importance="variance"))
        small.save_pretrained(tmp_path / name)
        with torch.no_grad():
            outputs = small(**data[0])[0].contiguous()
        save_file({**data[0], "outputs": outputs}, tmp_path / name / "x.safetensors")
        jobs.append((str(tmp_path / name), f"AutoModel{task}".replace("ModelModel", "Model")))
    command = [sys.executable, "-c", FRESH, json.dumps([plugin, jobs])]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(tmp_path))
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


@pytest.mark.slow
def test_two_towers_are_narrowed_inside_their_blocks(tmp_path):
    texts, images = zoo.batches("clip-text"), zoo.batches("clip-images")
    model, data = zoo.make("clip", "Model"), [a | b for a, b in zip(texts, images, strict=True)]
    with pytest.raises(UnsupportedArchitectureError, match="'hidden' is not cut.*texts and images"):
        quiet(narrow, model, data, RECIPE.replace(sites=("hidden",)))
    small = quiet(narrow, model, data, RECIPE.replace(target_reduction=0.3))
    assert 0.29 < 1 - count_parameters(small) / count_parameters(model) < 0.31
    small.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected, found = (each(**data[0]).logits_per_image for each in (small, again))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name, task", zoo.SOME_SLOW)
def test_life_cycle(name, task, tmp_path):
    model, data = zoo.make(name, task), zoo.batches(name)
    untouched = {key: value.clone() for key, value in model.state_dict().items()}
    target = 0.12 if "resnet" in name else 0.4
    found = quiet(reduce, model, data, RECIPE.replace(target_reduction=target))
    assert all(torch.equal(value, untouched[key]) for key, value in model.state_dict().items())
    small = found.model
    assert abs(1 - count_parameters(small) / count_parameters(model) - target) < 0.01
    assert found.report.planned_parameters == found.parameters_after == count_parameters(small)
    small.save_pretrained(tmp_path / "small")
    auto = {"Model": "AutoModel"}.get(task, "AutoModel" + task)
    load = getattr(getattr(transformers, auto, type(small)), "from_pretrained")
    again = load(tmp_path / "small")
    assert type(again).__name__ == "RMTKD" + type(model).__name__
    assert zoo.same(again, small, data[0])
    if name != "clip":  # whose bare model has another tower as well
        bare = transformers.AutoModel.from_pretrained(tmp_path / "small")
        assert bare.config.hidden_size == small.config.hidden_size if hasattr(small.config, "hidden_size") else True
    twice = quiet(narrow, again, data, RECIPE.replace(target_reduction=0.16 if "resnet" in name else 0.52))
    assert count_parameters(twice) < count_parameters(small)
    twice.save_pretrained(tmp_path / "twice")
    third = load(tmp_path / "twice")
    assert zoo.same(third, twice, data[0])


FRESH = """
import copy, json, sys, torch, transformers
from safetensors.torch import load_file
plugin, jobs = json.loads(sys.argv[1])
if plugin:
    import optimum_rmtkd
else:
    sys.modules["optimum_rmtkd"] = None
for folder, auto in jobs:
    stored = load_file(folder + "/x.safetensors")
    outputs = stored.pop("outputs")
    auto = getattr(transformers, auto)
    model = copy.deepcopy(auto.from_pretrained(folder, trust_remote_code=not plugin))
    with torch.no_grad():
        values = model(**stored)
    found = values.logits if "logits" in values else values[0]
    close = found.shape == outputs.shape and torch.allclose(found, outputs, rtol=1e-5, atol=1e-5)
    assert close, "outputs moved: " + folder
print("equal")
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """[(folder, auto class)]: narrowed models, each with a batch and what it made of it."""
    jobs = []
    for name in ("bert", "vit"):
        task = dict(zoo.CLASSIFIERS)[name]
        jobs.append((name, quiet(narrow, zoo.make(name, task), zoo.batches(name), RECIPE), zoo.batches(name), task))
    for name, (model_class, config) in OTHERS.items():
        model, data = model_class(config).eval(), zoo.batches("bert")
        if name == "t5":
            data = [batch | {"decoder_input_ids": batch["input_ids"][:, :7].clone()} for batch in data]
        small = quiet(narrow, model, data, RECIPE.replace(form="factored", target_reduction=0.2))
        jobs.append((name, small, data, OTHER_TASKS[name]))
    folders = []
    for name, small, data, task in jobs:
        folder = tmp_path_factory.mktemp(name)
        small.save_pretrained(folder)
        with torch.no_grad():
            values = small(**data[0])
        outputs = (values.logits if "logits" in values else values[0]).contiguous()
        save_file({**data[0], "outputs": outputs}, folder / "x.safetensors")
        folders.append((str(folder), f"AutoModel{task}"))
    return folders


@pytest.mark.parametrize("plugin", [True, False], ids=["plugin", "remote code"])
def test_fresh_process(saved, plugin, tmp_path):
    command = [sys.executable, "-c", FRESH, json.dumps([plugin, saved])]
    done = subprocess.run(command, capture_output=True, text=True, env=_environment(tmp_path))
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


def _environment(tmp_path):
    import os

    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub")}


@pytest.mark.parametrize("name, task", [("vit", "ForImageClassification"), ("bert", "ForMaskedLM")])
@pytest.mark.parametrize("form", ["factored"])
def test_factored_form(name, task, form, tmp_path):
    model, data = zoo.make(name, task), zoo.batches(name)
    small = quiet(narrow, model, data, RECIPE.replace(form=form, target_reduction=0.3))
    small.save_pretrained(tmp_path)
    auto = getattr(transformers, "AutoModel" + task)
    assert zoo.same(auto.from_pretrained(tmp_path), small, data[0])


def test_factored_form_serves_unknown_architectures():
    config = transformers.FNetConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, intermediate_size=64, max_position_embeddings=40
    )
    model = transformers.FNetForSequenceClassification(config).eval()
    with pytest.raises(UnsupportedArchitectureError, match="form='factored'"):
        quiet(narrow, model, zoo.batches("bert"), RECIPE)
    small = quiet(narrow, model, zoo.batches("bert"), RECIPE.replace(form="factored", target_reduction=0.2))
    assert count_parameters(small) < 0.81 * count_parameters(model)


OTHERS = {
    "gpt2": (  # linear layers whose weight is transposed
        transformers.GPT2ForSequenceClassification,
        transformers.GPT2Config(vocab_size=61, n_positions=40, n_embd=32, n_layer=2, n_head=4, pad_token_id=0),
    ),
    "t5": (  # what the decoder reads is made of the labels
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            vocab_size=61, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
        ),
    ),
}
OTHER_TASKS = {"gpt2": "ForSequenceClassification", "t5": "ForSeq2SeqLM"}


@pytest.mark.parametrize("name", OTHERS)
def test_factored_form_of_other_architectures_reloads(name, tmp_path):
    model_class, config = OTHERS[name]
    torch.manual_seed(0)
    model, data = model_class(config).eval(), zoo.batches("bert")
    if name == "t5":
        data = [batch | {"labels": batch["input_ids"][:, :7].clone()} for batch in data]
    small = quiet(narrow, model, data, RECIPE.replace(form="factored", target_reduction=0.2))
    assert count_parameters(small) < 0.82 * count_parameters(model)
    small.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert zoo.close(again(**data[0]).logits, small(**data[0]).logits)


def test_factored_form_without_a_target_never_grows():
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    recipe = RECIPE.replace(form="factored", target_reduction=None, edge_estimator="fixed", fixed_rank=30)
    assert count_parameters(quiet(narrow, model, data, recipe)) == count_parameters(model)
    assert count_parameters(quiet(narrow, model, data, recipe.replace(fixed_rank=8))) < count_parameters(model)


def test_multiple_choice_is_narrowed_without_its_padding():
    torch.manual_seed(0)
    model = transformers.BertForMultipleChoice(zoo.CONFIGS["bert"]).eval()
    flat = zoo.batches("bert")
    choices = [{k: v.reshape(4, 2, -1) for k, v in batch.items()} for batch in flat]
    noisy = [b | {"input_ids": torch.where(b["attention_mask"] > 0, b["input_ids"], 60)} for b in choices]
    recipe = RECIPE.replace(importance="variance", calibration_samples=24)
    ours, theirs = (quiet(reduce, model, data, recipe) for data in (choices, noisy))
    assert [s.width_after for s in ours.sites] == [s.width_after for s in theirs.sites]
    assert [s.edge for s in ours.sites] == pytest.approx([s.edge for s in theirs.sites], rel=1e-6)
    assert ours.model(**choices[0]).logits.shape == (4, 2)


def test_a_table_thicker_than_the_next_stream_is_multiplied_out(tmp_path):
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    first = quiet(narrow_to, model, data, {"embedding": 20}, RECIPE)
    assert first.bert.embeddings.word_embeddings.rank == 20
    second = quiet(narrow_to, first, data, {"hidden": 16}, RECIPE)
    table = second.bert.embeddings.word_embeddings
    assert type(table) is torch.nn.Embedding and table.weight.shape == (61, 16)
    direct = quiet(narrow_to, first, data, {"hidden": 16, "embedding": 12}, RECIPE)
    assert direct.bert.embeddings.word_embeddings.rank == 12
    second.save_pretrained(tmp_path)
    assert zoo.same(type(second).from_pretrained(tmp_path).eval(), second, data[0])


def test_paths_and_stages():
    model = zoo.make("bert", "ForSequenceClassification")
    assert block_paths(model) == ("bert.encoder.layer.0", "bert.encoder.layer.1")
    assert stage_sites(model, RECIPE)[0] == ["hidden", "embedding"]
    assert stage_sites(model, RECIPE)[2] == ["layer.1.attention_qk", "layer.1.attention_vo", "layer.1.intermediate"]


@torch.no_grad()
def test_keys_that_positions_share_keep_their_mean():
    """Softmax does not see what all keys have in common, but positions are multiplied with it, too."""
    model, data = zoo.make("deberta-v3", "ForSequenceClassification"), zoo.batches("deberta-v3", 2)
    attention = model.deberta.encoder.layer[0].attention.self
    attention.key_proj.weight.mul_(0.02)
    attention.key_proj.bias.normal_(0, 3.0)
    recipe = RECIPE.replace(sites=("attention_qk", "attention_vo"))
    small = quiet(narrow_to, model, data, {"layer.0.heads": 4}, recipe)
    ours, theirs = (m(**data[0], output_attentions=True).attentions[0] for m in (small, model))
    assert (ours - theirs).abs().sum(-1).mean() < 0.02


def test_positions_add_to_what_the_root_of_a_score_is_taken_of():
    assert set(anatomy_of(zoo.make("deberta-v3", "Model"), RECIPE).softmax_scales.values()) == {(3 * 8) ** -0.5}
    assert set(anatomy_of(zoo.make("bert", "Model"), RECIPE).softmax_scales.values()) == {8**-0.5}


def test_a_stream_costs_the_same_whether_blocks_are_shared_or_alike():
    models = []
    for groups in (1, 4):
        config = copy.deepcopy(zoo.CONFIGS["albert"])
        config.num_hidden_groups = groups
        models.append(zoo.enlivened(transformers.AlbertForSequenceClassification(config).eval()))
    shared, alike = models
    names = {name: re.sub(r"groups\.\d", "groups.0", name) for name in alike.state_dict()}
    alike.load_state_dict({name: shared.state_dict()[own] for name, own in names.items()})
    surgeons = [Surgeon(model, zoo.batches("albert"), RECIPE, progress=False) for model in models]
    prices = [surgeon.directions_of(surgeon.anatomy.sites["hidden"]).damage[0] for surgeon in surgeons]
    assert 0.7 < prices[0] / prices[1] < 1.4


def test_a_head_of_other_code_is_refused_by_name():
    config = copy.deepcopy(zoo.CONFIGS["deberta-v3"])
    config.legacy = False
    model = transformers.DebertaV2ForMaskedLM(config).eval()
    with pytest.raises(UnsupportedArchitectureError, match="DebertaV2ForMaskedLM with a head 'lm_predictions'"):
        anatomy_of(model, RECIPE)
    assert anatomy_of(transformers.DebertaV2Model(config), RECIPE).sites


def test_report_reads(tmp_path):
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    report = quiet(analyze, model, data, RECIPE)
    table = report.table()
    assert "layer.1.intermediate" in table and "k screenot" in table and "k dpa" in table
    report.to_json(tmp_path / "report.json")
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert report.budget[-1].cost == report.planned_parameters
    losses = [point.predicted_loss for point in report.budget]
    assert losses == sorted(losses)


CHOICE = ["bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"]


@pytest.mark.parametrize("name", some_slow([*CHOICE, "mpnet", "deberta-v3", "albert", "modernbert"], CHOICE))
def test_heads_of_multiple_choice(name, tmp_path):
    torch.manual_seed(0)
    model = getattr(transformers, zoo.stem(name) + "ForMultipleChoice")(copy.deepcopy(zoo.CONFIGS[name])).eval()
    data = [{key: value.reshape(4, 2, -1) for key, value in batch.items()} for batch in zoo.batches(name)]
    found = quiet(narrow_to, model, data, {"hidden": 20}, RECIPE)
    narrow_head = found.head.dense if name == "modernbert" else found.classifier
    assert narrow_head.in_features == 20
    found.save_pretrained(tmp_path)
    assert zoo.same(type(found).from_pretrained(tmp_path), found, data[0])
