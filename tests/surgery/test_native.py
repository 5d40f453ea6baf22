"""shape="native": a cut whose result the config of the base states, so that stock transformers loads it."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig

from optimum_rmtkd import RMTKDConfig, count_parameters, narrow
from optimum_rmtkd.errors import RMTKDError, UnsupportedArchitectureError
from optimum_rmtkd.models import uncut_parameters
from optimum_rmtkd.surgery import narrow_to, reduce
from optimum_rmtkd.surgery.budget import couple_grid
from optimum_rmtkd.surgery.native import native_anatomy, plain_form
from optimum_rmtkd.surgery.surgeon import Surgeon

from . import conv_zoo, zoo


HEADS = {
    "bert": zoo.TEXT_TASKS[:4],
    "roberta": zoo.TEXT_TASKS[:4],
    "distilbert": zoo.TEXT_TASKS[:4],
    "electra": zoo.TEXT_TASKS[:4],
    "electra-projected": ("ForSequenceClassification",),
    "xlm-roberta": ("ForSequenceClassification",),
    "vit": zoo.IMAGE_TASKS,
    "deit": zoo.IMAGE_TASKS,
    "mpnet": zoo.TEXT_TASKS[:4],
    "deberta-v2": zoo.TEXT_TASKS[:4],
    "deberta-v3": ("ForSequenceClassification",),
    "albert": zoo.TEXT_TASKS[:4],
    "dinov2": zoo.IMAGE_TASKS,
    "dinov2-registers": ("ForImageClassification",),
    "beit": zoo.IMAGE_TASKS,
    "beit-first": ("ForImageClassification",),
    "clip-text": zoo.OTHER_TASKS["clip-text"],
    "clip-images": zoo.OTHER_TASKS["clip-images"],
}
MODELS = [(name, task) for name, tasks in HEADS.items() for task in tasks]
QUICK = [("bert", "ForSequenceClassification"), ("roberta", "ForSequenceClassification"), ("vit", "Model")]
QUICK += [("distilbert", "ForTokenClassification"), ("electra-projected", "ForSequenceClassification")]
RECIPE = RMTKDConfig(target_reduction=0.5, shape="native", round_to=4, min_width=4, calibration_samples=48)
PLAIN = """
import sys, torch
sys.modules["optimum_rmtkd"] = None  # an import of it would fail
import transformers
folder, name = sys.argv[1:]
model = getattr(transformers, name).from_pretrained(folder).eval()
with torch.no_grad():
    torch.save(model(**torch.load(folder + "/batch.pt", weights_only=True))[0], folder + "/found.pt")
"""


def cut(name, task, recipe=RECIPE):
    model = zoo.make(name, task)
    return model, narrow(model, zoo.batches(name), recipe, progress=False)


@pytest.mark.parametrize(
    "name, task", [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow) for pair in MODELS]
)
def test_the_result_is_a_plain_model_of_the_size_asked_for(name, task, tmp_path):
    model, small = cut(name, task)
    assert type(small) is type(model)
    removed = 1 - count_parameters(small) / count_parameters(model)
    assert removed >= 0.5 and removed < 0.62  # widths of so small a model are coarse
    small.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert not {"auto_map", "rmtkd"} & set(said) and said["model_type"] == model.config.model_type
    assert not list(tmp_path.glob("*.py"))
    batch = zoo.batches(name)[0]
    again = type(model).from_pretrained(tmp_path).eval()
    assert zoo.same(again, small, batch)
    assert uncut_parameters(again) == count_parameters(model)


def test_a_process_without_this_library_loads_it(tmp_path):
    _, small = cut("bert", "ForSequenceClassification")
    small.save_pretrained(tmp_path)
    batch = zoo.batches("bert")[0]
    torch.save(batch, tmp_path / "batch.pt")
    command = [sys.executable, "-c", PLAIN, str(tmp_path), "BertForSequenceClassification"]
    subprocess.run(command, check=True, timeout=300)
    assert torch.allclose(torch.load(tmp_path / "found.pt", weights_only=True), small(**batch)[0], atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_at_half_of_its_widths_it_is_the_free_cut_with_these_widths(name):
    """Same directions, same refit: the plain form alone is another, so the outputs are those of the free model."""
    task = "ForImageClassification" if zoo.is_image(name) else "ForSequenceClassification"
    model, data = zoo.make(name, task), zoo.batches(name)
    surgeon = Surgeon(model, data, RECIPE, progress=False)
    plan = surgeon.plan()
    plain = surgeon.operate(plan.couples)[0]
    sites = {site.name: plan.couples[site.couple] * site.groups for site in surgeon.sites}
    free = Surgeon(model, data, RECIPE.replace(shape="free", sites=("hidden", "intermediate", "attention_vo")))
    widths = {s.couple: sites[s.name] // s.groups for s in free.sites if s.name in sites}
    other = free.operate(widths)[0]
    assert count_parameters(plain) == count_parameters(other)
    assert torch.allclose(zoo.outputs(plain, data[0]), zoo.outputs(other, data[0]), rtol=1e-3, atol=1e-4)


def test_heads_and_stream_are_tied_where_the_config_ties_them():
    bert, vit = (native_anatomy(zoo.make(name, "Model")) for name in ("bert", "vit"))
    assert {site.couple for site in bert.sites.values()} == {"hidden", "intermediate"}
    assert bert.sites["hidden"].group_width == bert.sites["layer.0.attention_qk"].group_width == 8
    assert {site.couple for site in vit.sites.values()} == {"hidden", "heads", "intermediate"}
    assert "embedding" not in bert.sites and not any(unit.factor for unit in bert.units if "word" in unit.path)


def test_the_stream_is_a_multiple_of_round_to():
    hidden = native_anatomy(zoo.make("bert", "Model")).sites["hidden"]
    floor, step, _ = couple_grid(hidden, RMTKDConfig(round_to=8, min_width=8))
    assert (floor * hidden.groups % 8, step * hidden.groups) == (0, 8)


def test_it_is_narrowed_again_and_counts_from_the_first_model(tmp_path):
    model, small = cut("bert", "ForSequenceClassification")
    smaller = narrow(small, zoo.batches("bert"), RECIPE.replace(target_reduction=0.7), progress=False)
    assert type(smaller) is type(model) and uncut_parameters(smaller) == count_parameters(model)
    assert count_parameters(smaller) <= 0.3 * count_parameters(model)
    smaller.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).uncut_parameters == count_parameters(model)


def test_sites_can_be_left_out():
    model, small = cut(
        "bert", "ForSequenceClassification", RECIPE.replace(target_reduction=0.2, sites=["intermediate"])
    )
    assert small.config.hidden_size == model.config.hidden_size
    assert small.config.intermediate_size < model.config.intermediate_size


@pytest.mark.parametrize("allocation", ["edge", "uniform"])
def test_the_other_allocations(allocation):
    model, small = cut("bert", "ForSequenceClassification", RECIPE.replace(allocation=allocation))
    assert type(small) is type(model) and count_parameters(small) <= 0.5 * count_parameters(model)


def test_bf16_stays_bf16():
    model = zoo.make("bert", "ForSequenceClassification").to(torch.bfloat16)
    small = narrow(model, zoo.batches("bert"), RECIPE, progress=False)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    assert type(small) is type(model)


def test_a_loop_that_computes_in_half_precision_changes_nothing():
    model, data = zoo.make("bert", "ForSequenceClassification"), zoo.batches("bert")
    expected = narrow(model, data, RECIPE, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        small = narrow(model, data, RECIPE, progress=False)
    assert small.config.hidden_size == expected.config.hidden_size


def test_a_width_of_heads_that_the_config_states_follows():
    model = zoo.make("vit", "ForImageClassification")
    stated = type(model.config).from_dict(model.config.to_dict() | {"head_dim": 8})
    model = type(model)(stated).eval()
    small = narrow(model, zoo.batches("vit"), RECIPE, progress=False)
    heads = small.vit.layers[0].attention.q_proj.out_features
    assert small.config.head_dim * small.config.num_attention_heads == heads < 32


def test_a_table_as_wide_as_the_stream_follows_it():
    model, small = cut("electra", "ForSequenceClassification")
    assert small.config.embedding_size == small.config.hidden_size < model.config.hidden_size


def test_what_the_instance_carries_comes_along():
    model = zoo.make("bert", "ForSequenceClassification")
    model.config.id2label = {0: "no", 1: "yes", 2: "perhaps"}
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    small = narrow(model, zoo.batches("bert"), RECIPE, progress=False)
    assert small.config.id2label == model.config.id2label and small.config.num_labels == 3
    assert not small.bert.embeddings.word_embeddings.weight.requires_grad


def test_the_report_knows_the_widths():
    model = zoo.make("bert", "ForSequenceClassification")
    done = reduce(model, zoo.batches("bert"), RECIPE, progress=False)
    widths = {site.name: site.width_after for site in done.sites}
    assert widths["hidden"] == done.model.config.hidden_size == widths["layer.0.attention_qk"]
    assert widths["layer.1.intermediate"] == done.model.config.intermediate_size
    assert done.projections["hidden"].shape == (32, widths["hidden"])
    assert done.parameters_after == count_parameters(done.model)


def test_what_no_config_can_state_is_refused_before_the_data_is_read():
    def data():
        raise AssertionError("the data was read")
        yield

    def refused(model, match, kind=UnsupportedArchitectureError):
        with pytest.raises(kind, match=match):
            narrow(model, data(), RECIPE, progress=False)

    refused(zoo.make("bert", "ForMaskedLM"), "tied to the word table")
    refused(conv_zoo.make("convnext"), "no field for the widths")
    _, free = cut("bert", "ForSequenceClassification", RECIPE.replace(shape="free"))
    refused(free, "free shape already", RMTKDError)
    odd = zoo.make("bert", "ForSequenceClassification")
    odd.bert.encoder.layer[1].output.LayerNorm.eps = 1e-3
    refused(odd, r"numbers of their own.*eps", RMTKDError)


def test_a_head_that_the_config_cannot_narrow_is_refused():
    torch.manual_seed(0)
    model = transformers.BertForPreTraining(zoo.CONFIGS["bert"])
    with pytest.raises(UnsupportedArchitectureError, match="shape='native'"):
        narrow(model, zoo.batches("bert"), RECIPE, progress=False)


def test_a_site_that_follows_the_stream_is_not_cut_alone():
    """BERT's heads are as wide as its stream together."""
    model = zoo.make("bert", "ForSequenceClassification")
    with pytest.raises(RMTKDError, match="'attention_vo' has no width of its own in this shape.*'hidden'"):
        narrow(model, zoo.batches("bert"), RECIPE.replace(shape="native", sites=("intermediate", "attention_vo")))


def test_contradictory_recipes():
    with pytest.raises(RMTKDError, match="word table in two factors"):
        RMTKDConfig(shape="native", sites=("hidden", "embedding"))
    for other in ({"form": "factored"}, {"schedule": "layerwise"}):
        with pytest.raises(RMTKDError, match="one width for all layers"):
            RMTKDConfig(shape="native", **other)


def test_heads_that_fit_by_rounding_alone_are_refused_by_name():
    """ALBERT's layer behind the heads is as wide as the stream: 22 // 4 = 5 says nothing of it."""
    model, data = zoo.make("albert", "ForSequenceClassification"), zoo.batches("albert", 2)
    couples = {"hidden": 22, "layer.0.heads": 5, "layer.1.heads": 5}
    small = narrow_to(model, data, couples, RMTKDConfig(refit=False), progress=False)
    with pytest.raises(RMTKDError, match="4 heads of width 5 on a stream of 22"):
        plain_form(small, data[0], pad=True)
