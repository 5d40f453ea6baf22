"""Narrowed causal models of every family in half precision and under adapters."""

from __future__ import annotations

import pytest
import torch
import transformers

from optimum_rmtkd import CalibrationError, RMTKDConfig, RMTKDError, narrow
from optimum_rmtkd.surgery import narrow_to
from optimum_rmtkd.surgery.surgeon import Surgeon, anatomy_of

from . import decoder_zoo as zoo


RECIPE = RMTKDConfig(calibration_samples=48, refit=False)
QUICK = ("gemma2",)
FAMILIES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in zoo.CONFIGS]


def widths_of(model):
    """Each site of the model narrower, those of its layers in one of them alone."""
    sites = {site.name: site for site in anatomy_of(model, RECIPE).sites.values()}
    chosen = [sites.get(name) for name in ("hidden", "layer.0.attention", "layer.1.intermediate")]
    return {site.couple: 3 * site.group_width // 4 for site in chosen if site is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_saved_and_come_back(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, data = zoo.make(name), zoo.batches()
    small = narrow_to(model, data, widths_of(model), RECIPE, progress=False)
    small.save_pretrained(tmp_path / "small")
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    before = zoo.logits(small, data[0])
    adapted = peft.get_peft_model(small, config).eval()
    adapted(**data[0], labels=data[0]["input_ids"]).loss.backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora_" in name]
    assert gradients and all(g is not None and bool(g.isfinite().all()) for g in gradients)
    after = zoo.logits(adapted, data[0])
    assert (after - before).abs().max() > 1e-2 * before.abs().max()
    adapted.save_pretrained(tmp_path / "adapter")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(zoo.logits(again, data[0]), after, atol=1e-5, rtol=1e-5)
    merged = again.merge_and_unload()
    torch.testing.assert_close(zoo.logits(merged, data[0]), after, atol=1e-4, rtol=1e-4)


def in_half(model):
    """As it is loaded in bf16: rotary frequencies, which are buffers, stay fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.config.dtype = torch.bfloat16
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_is_cut_as_full_precision_is(name, tmp_path):
    """In bf16 from end to end, refitted, saved and loaded."""
    model, data = in_half(zoo.make(name)), zoo.batches()
    widths, recipe = widths_of(model), RECIPE.replace(refit=True)
    small = narrow_to(model, data, widths, recipe, progress=False)
    exact = narrow_to(in_half(zoo.make(name)).float(), data, widths, recipe, progress=False)
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    ours, theirs = zoo.logits(small, data[0]).float(), zoo.logits(exact, data[0])
    assert (ours - theirs).norm() < 0.1 * theirs.norm()
    small.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(zoo.logits(again, data[0]).float(), ours)


@pytest.mark.parametrize("name", ["Gemma2", pytest.param("Olmo2", marks=pytest.mark.slow)])
def test_layers_before_a_norm_are_priced_where_they_land_in_classifiers_too(name):
    torch.manual_seed(0)
    config = zoo.CONFIGS[name.lower()][1].to_dict() | {"num_labels": 3}
    model = getattr(transformers, f"{name}ForSequenceClassification")(getattr(transformers, f"{name}Config")(**config))
    surgeon = Surgeon(model.eval(), zoo.batches(), RECIPE, progress=False)
    lands = {unit.lands for unit in surgeon.anatomy.units if unit.behind is not None}
    assert len(lands) == 4 and lands <= surgeon.calibration.gradients
    assert all(surgeon.calibration.moments[point].gradient_moment.trace() > 0 for point in lands)
    small, _ = surgeon.operate({"hidden": 24, "layer.0.attention": 3, "layer.1.intermediate": 40})
    assert small(**zoo.batches()[0]).logits.shape == (8, 3)


def test_the_work_of_experts_is_not_counted():
    with pytest.raises(RMTKDError, match="target_flops: the experts of MixtralForCausalLM.*target_reduction"):
        narrow(zoo.make("mixtral"), zoo.batches(), RECIPE.replace(target_flops=0.3), progress=False)


def test_a_classifier_without_a_padding_token_is_told_so():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**zoo.PAIRED | {"pad_token_id": None}, num_labels=3)
    model = transformers.LlamaForSequenceClassification(config).eval()
    with pytest.raises(CalibrationError, match="config.pad_token_id is not set"):
        narrow(model, zoo.batches(), RECIPE.replace(target_reduction=0.3), progress=False)
