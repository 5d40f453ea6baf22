"""What an instance has beyond its class and config is there again after a cut."""

from __future__ import annotations

import copy
import functools
import threading
import types

import pytest
import torch
import transformers as tf
from torch import nn

from optimum_rmtkd import (
    RMTKDConfig,
    RMTKDTrainer,
    RMTKDTrainingArguments,
    TernaryConfig,
    compress_head,
    narrow,
)
from optimum_rmtkd.models import copied, match_precision, twin_of, widest_dtype
from optimum_rmtkd.models.carrying import own_forward
from optimum_rmtkd.trainer.swap import skeleton

from ..surgery import zoo


RECIPE = RMTKDConfig(target_reduction=0.5, round_to=4, min_width=4, calibration_samples=16)


def small(model, name="bert"):
    return narrow(model, zoo.batches(name, count=2), RECIPE, progress=False)


def trained(model, folder, resume=None, recipe=RECIPE, scores=None, **options):
    """The same object, cut inside a Trainer; `scores` are what its evaluations give."""
    rows = [{k: v[0] for k, v in b.items()} | {"labels": i % 3} for i, b in enumerate(zoo.batches("bert", 12, 1))]
    args = RMTKDTrainingArguments(
        str(folder), **{"max_steps": 2, "report_to": [], "use_cpu": True, "save_strategy": "no"} | options
    )
    validation = {"eval_dataset": rows, "compute_metrics": lambda _: {"score": next(scores)}} if scores else {}
    trainer = RMTKDTrainer(model=model, args=args, rmtkd_config=recipe, train_dataset=rows, **validation)
    trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.fixture
def bert():
    return zoo.make("bert", "ForSequenceClassification")


@pytest.fixture(params=["narrow", "train"])
def cut(request, tmp_path):
    """Both ways to a narrow model."""
    return small if request.param == "narrow" else lambda model: trained(model, tmp_path)


def test_the_twin_shares_the_memory_of_the_model(bert):
    twin = twin_of(bert)
    assert twin is not bert and type(twin) is type(bert)
    for (name, ours), (other, theirs) in zip(bert.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other and ours is not theirs and ours.data_ptr() == theirs.data_ptr()


@pytest.mark.parametrize("name, task", [("bert", "ForMaskedLM"), ("electra", "ForMaskedLM"), ("deit", "Model")])
def test_the_twin_computes_the_same(name, task):
    model = zoo.make(name, task)
    assert zoo.same(twin_of(model), model, zoo.batches(name, 1)[0])


def test_the_twin_has_none_of_the_users_things(bert):
    bert.note, bert.forward = "mine", types.MethodType(lambda self, *a, **k: 1 / 0, bert)
    twin = twin_of(bert)
    assert not hasattr(twin, "note")
    twin(**zoo.batches("bert", 1)[0])


def test_frozen_parameters_stay_frozen(bert, cut):
    bert.bert.embeddings.requires_grad_(False)
    bert.bert.encoder.layer[0].requires_grad_(False)
    bert.bert.pooler.dense.bias.requires_grad_(False)
    found = cut(bert)
    for name, parameter in found.named_parameters():
        frozen = name.startswith(("bert.embeddings", "bert.encoder.layer.0.")) or name == "bert.pooler.dense.bias"
        assert parameter.requires_grad is not frozen, name


def test_factors_of_a_frozen_layer_are_frozen(bert):
    bert.bert.encoder.layer[0].requires_grad_(False)
    found = narrow(bert, zoo.batches("bert", 2), RECIPE.replace(form="factored", target_reduction=0.2), progress=False)
    layer = found.bert.encoder.layer
    assert any(hasattr(m, "down") for m in layer[0].modules())
    assert not any(p.requires_grad for p in layer[0].parameters())
    assert all(p.requires_grad for p in layer[1].parameters())


def my_loss(logits, labels, **kwargs):
    return logits.sum()


def test_things_on_the_model(bert, cut):
    bert.loss_function = my_loss
    bert.add_model_tags(["mine"])
    bert.note, bert.table, bert._private = "kept", {"a": [1]}, 7
    bert.bert.encoder.layer[1].name = "second"
    found = cut(bert)
    assert found.loss_function is my_loss and found.model_tags == ["mine"]
    assert (found.note, found.table, found._private) == ("kept", {"a": [1]}, 7)
    assert found.bert.encoder.layer[1].name == "second"


def test_lists_are_not_shared_with_the_old_model(bert):
    bert.seen = []
    found = small(bert)
    found.seen.append(1)
    assert bert.seen == []


def test_rates_of_dropout(bert, cut):
    bert.dropout.p = 0.37
    bert.bert.encoder.layer[0].output.dropout = nn.Dropout(0.42)
    found = cut(bert)
    assert found.dropout.p == 0.37 and found.bert.encoder.layer[0].output.dropout.p == 0.42


def test_generation_config():
    model = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=61, n_positions=32))
    model.generation_config.max_new_tokens = 7
    data = [{"input_ids": torch.randint(0, 61, (4, 8))}]
    found = narrow(model, data, RECIPE.replace(form="factored", target_reduction=0.1), progress=False)
    assert found.generation_config.max_new_tokens == 7
    assert found.generation_config is not model.generation_config


def test_buffers_of_the_users(bert, cut):
    bert.register_buffer("class_weights", torch.tensor([1.0, 5.0, 1.0]))
    bert.bert.register_buffer("scratch", torch.ones(2), persistent=False)
    found = cut(bert)
    assert torch.equal(found.class_weights, torch.tensor([1.0, 5.0, 1.0]))
    assert torch.equal(found.bert.scratch, torch.ones(2))
    assert "class_weights" in found.state_dict() and "bert.scratch" not in found.state_dict()
    assert found.class_weights.data_ptr() != bert.class_weights.data_ptr() or found is bert


def test_hooks_that_look_on(bert, cut):
    seen = []
    bert.register_forward_hook(lambda module, args, output: seen.append(("model", module)))
    bert.bert.encoder.layer[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(("layer", module)), with_kwargs=True
    )
    found = cut(bert)
    seen.clear()
    with torch.no_grad():
        found(**zoo.batches("bert", 1)[0])
    assert seen == [("layer", found.bert.encoder.layer[1]), ("model", found)]


def test_hooks_do_not_run_in_calibration(bert):
    calls = []
    bert.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: calls.append(module))
    counts = []
    for size in (16, 48):
        calls.clear()
        narrow(bert, zoo.batches("bert", 6), RECIPE.replace(calibration_samples=size), progress=False)
        counts.append(len(calls))
    assert set(calls) == {bert.bert.encoder.layer[0]}
    assert counts[0] == counts[1]  # looks at the model and at the data, and no more with more data


def numbers_of(model):
    return {
        f"{path}.{name}": vars(module)[name]
        for path, module in model.named_modules()
        for name in ("eps", "scaling", "momentum")
        if name in vars(module)
    }


@pytest.mark.parametrize("site", ["intermediate", "hidden"])
def test_numbers_of_layers_that_no_config_states(bert, site, tmp_path):
    for layer in bert.bert.encoder.layer:
        layer.attention.self.scaling = 0.11
        layer.output.LayerNorm.eps = 0.02
    bert.bert.embeddings.LayerNorm.eps = 0.05
    data, recipe = zoo.batches("bert", 2), RECIPE.replace(sites=site)
    once = narrow(bert, data, recipe.replace(target_reduction=0.15), progress=False)
    twice = narrow(once, data, recipe.replace(target_reduction=0.25), progress=False)
    for found in (once, twice):
        assert {layer.attention.self.scaling for layer in found.bert.encoder.layer} == {0.11}
        width = found.config.hidden_size
        assert (width < 32) is (site == "hidden")
        assert found.bert.embeddings.LayerNorm.eps == pytest.approx(0.05 * 32 / width)
        found.save_pretrained(tmp_path)
        again = type(found).from_pretrained(tmp_path)
        assert numbers_of(again) == numbers_of(found)
        assert zoo.same(again, found, data[0])


def test_epsilons_of_batch_norms_are_reloaded(tmp_path):
    model = zoo.make("resnet-basic", "ForImageClassification")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.3
    found = narrow(model, zoo.batches("resnet-basic", 2), RECIPE.replace(target_reduction=0.1), progress=False)
    found.save_pretrained(tmp_path)
    again = type(found).from_pretrained(tmp_path)
    assert {m.eps for m in again.modules() if isinstance(m, nn.BatchNorm2d)} == {0.3}
    assert zoo.same(again, found, zoo.batches("resnet-basic", 1)[0])


def test_a_bound_method_is_bound_anew(bert):
    def width(self):
        return self.config.hidden_size

    def forward(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    bert.width, bert.forward = types.MethodType(width, bert), types.MethodType(forward, bert)
    found = small(bert)
    assert found.forward.__self__ is found and found.width() == found.config.hidden_size
    with torch.no_grad():
        found(**zoo.batches("bert", 1)[0])


@pytest.mark.parametrize("part", ["", "bert.encoder.layer.0.output.dense"])
def test_a_forward_that_closes_over_the_one_it_replaces_is_bound_anew(bert, part):
    module = bert.get_submodule(part)

    def patch(original, calls):
        @functools.wraps(type(module).forward)
        def patched(self, *args, loud=False, **kwargs):
            calls.append(self)
            return original(*args, **kwargs)

        return types.MethodType(patched, module)

    calls = []
    module.forward = patch(module.forward, calls)
    found = small(bert)
    seen = []
    handle = bert.register_forward_hook(lambda *_: seen.append("the old model ran"))
    layers = [m.register_forward_hook(lambda *_: seen.append("an old layer ran")) for m in bert.modules()]
    calls.clear()
    batch = zoo.batches("bert", 1)[0]
    with torch.no_grad():
        patched = found(**batch).logits
        assert calls == [found.get_submodule(part)] and not seen
        del found.get_submodule(part).forward
        assert torch.equal(patched, found(**batch).logits)
    for hook in (handle, *layers):
        hook.remove()


def test_a_bound_forward_stays_where_accelerate_wraps_it(bert, tmp_path):
    @functools.wraps(type(bert).forward)
    def own(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    bert.forward, size = types.MethodType(own, bert), bert.num_parameters()
    trained(bert, tmp_path, bf16=True)  # each step under autocast, which is a forward around the forward
    assert bert.num_parameters() < size and bert.forward.__func__ is not own
    assert own_forward(bert).__func__ is own


def test_things_that_cannot_be_copied_are_no_hindrance(bert):
    bert.lock = threading.Lock()
    assert small(bert).lock is bert.lock


def test_hooks_on_parameters_are_said_to_be_lost(bert, caplog):
    bert.classifier.weight.register_hook(lambda gradient: gradient)
    small(bert)
    assert "classifier.weight" in caplog.text and "Register them again" in caplog.text


@pytest.mark.parametrize("form", ["absorbed", "factored"])
def test_precision_of_every_parameter(bert, form):
    bert = bert.to(torch.bfloat16)
    for module in bert.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    recipe = RECIPE.replace(form=form, target_reduction=0.3)
    found = narrow(bert, zoo.batches("bert", 2), recipe, progress=False)
    for name, parameter in found.named_parameters():
        assert parameter.dtype == (torch.float32 if "LayerNorm" in name else torch.bfloat16), name


def test_a_resumed_run_has_the_precision_of_the_first(bert, tmp_path):
    for module in bert.to(torch.bfloat16).modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    start = copy.deepcopy(bert)
    options = {"save_strategy": "steps", "save_steps": 1}
    whole = trained(bert, tmp_path, **options)
    again = trained(start, tmp_path, resume=str(tmp_path / "checkpoint-1"), **options)
    for (name, ours), theirs in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), name


def test_precision_by_name_and_by_relatives():
    reference = nn.ModuleDict({"a": nn.Linear(2, 2).double(), "b": nn.Linear(2, 2).bfloat16()})
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"down": nn.Linear(2, 1), "up": nn.Linear(1, 2)})})
    match_precision(model, reference)
    assert {p.dtype for p in model["a"].parameters()} == {torch.float64}
    assert {p.dtype for p in model["b"].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "dtypes, widest",
    [
        ([torch.float32], torch.float32),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.bfloat16], torch.bfloat16),
        ([torch.bfloat16, torch.float16], torch.float32),
        ([torch.float16, torch.float64], torch.float64),
    ],
)
def test_the_widest_precision(dtypes, widest):
    assert widest_dtype(nn.ModuleList(nn.Linear(1, 1, dtype=dtype) for dtype in dtypes)) == widest


def test_a_second_cut_carries_on(bert):
    bert.note = "kept"
    bert.bert.embeddings.requires_grad_(False)
    once = small(bert)
    twice = narrow(once, zoo.batches("bert", 2), RECIPE.replace(target_reduction=0.6), progress=False)
    assert twice.note == "kept" and not twice.bert.embeddings.word_embeddings.weight.requires_grad


def test_the_old_model_is_left_bit_identical(bert):
    bert.note = ["mine"]
    before, things = copy.deepcopy(bert.state_dict()), dict(vars(bert))
    small(bert)
    assert all(torch.equal(value, before[name]) for name, value in bert.state_dict().items())
    assert vars(bert) == things


@pytest.mark.parametrize("trained", ["bias", "weight"])
def test_factors_are_frozen_as_the_tensors_they_replace(bert, trained):
    for name, parameter in bert.named_parameters():
        parameter.requires_grad_(name.endswith(trained))  # "bias": BitFit
    found = narrow(bert, zoo.batches("bert", 2), RECIPE.replace(form="factored", target_reduction=0.2), progress=False)
    assert any(name.endswith("up.bias") for name, _ in found.named_parameters())
    assert {n for n, p in found.named_parameters() if p.requires_grad is not n.endswith(trained)} == set()


def test_attributes_of_parameters(bert, cut):
    bert.classifier.bias.no_weight_decay = True
    assert cut(bert).classifier.bias.no_weight_decay


def test_a_criterion_with_weights_of_classes(bert, cut):
    bert.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))
    bert.register_buffer("unset", None)
    found = cut(bert)
    assert found.criterion.weight.tolist() == [1.0, 2.0, 5.0] and "unset" in found._buffers


def test_attributes_that_refer_to_parts_of_the_model(bert, cut):
    def width(self, times=1):
        return times * self.config.hidden_size

    bert.watched, bert.by_name = [bert.bert.encoder.layer[1], (bert,)], {"head": bert.classifier}
    bert.width = types.MethodType(width, bert)
    bert.twice = functools.partial(bert.width, times=2)
    found = cut(bert)
    assert found.watched == [found.bert.encoder.layer[1], (found,)] and found.by_name["head"] is found.classifier
    assert found.width.__self__ is found and found.twice() == 2 * found.config.hidden_size


def test_hooks_keep_the_way_they_are_called(bert, cut):
    calls = []
    layer = bert.bert.encoder.layer[0]
    layer.register_forward_hook(lambda *args: calls.append("always"), always_call=True)
    layer.register_state_dict_pre_hook(lambda *args: calls.append("before saving"))
    layer.register_state_dict_post_hook(lambda *args: calls.append("after saving"))
    layer.register_load_state_dict_pre_hook(lambda *args: calls.append("before loading"))
    layer.register_load_state_dict_post_hook(lambda *args: calls.append("after loading"))
    found = cut(bert)
    layer = found.bert.encoder.layer[0]
    assert len(layer._forward_hooks_always_called) == 1
    calls.clear()
    found.load_state_dict(found.state_dict())
    assert calls == ["before saving", "after saving", "before loading", "after loading"]


def test_handles_of_hooks_remove_the_hooks_of_the_new_model(bert, cut):
    bert.enable_input_require_grads()
    found = cut(bert)
    assert found.get_input_embeddings()._forward_hooks
    found.disable_input_require_grads()
    assert not found.get_input_embeddings()._forward_hooks


def test_hooks_are_there_once_after_several_cuts(bert, tmp_path):
    class Probe:
        calls = 0

        def __call__(self, *args):
            Probe.calls += 1

        def method(self, *args):
            Probe.calls += 1

    for hook in (Probe(), Probe().method):
        bert.bert.pooler.register_forward_hook(hook)
    recipe = RECIPE.replace(rounds=2, target_reduction=0.6, max_metric_drop=0.5)
    trained(
        bert, tmp_path, recipe=recipe, max_steps=4, metric_for_best_model="score", scores=iter([0.9, 0.8] + 9 * [0.1])
    )
    Probe.calls = 0
    with torch.no_grad():
        bert(**zoo.batches("bert", 1)[0])
    assert Probe.calls == 2


def test_numbers_of_layers_after_a_cut_was_taken_back(bert, tmp_path):
    bert.bert.embeddings.LayerNorm.eps, bert.note = 0.3, "kept"
    recipe = RECIPE.replace(max_metric_drop=0.5)
    trained(bert, tmp_path, recipe=recipe, metric_for_best_model="score", scores=iter([0.9, 0.8] + 9 * [0.1]))
    assert type(bert) is tf.BertForSequenceClassification
    assert bert.bert.embeddings.LayerNorm.eps == 0.3 and bert.note == "kept"


def test_skeletons_of_the_uncut_model_have_its_numbers(bert):
    bert.bert.embeddings.LayerNorm.eps = 0.3
    assert skeleton(bert, bert.config.to_dict()).bert.embeddings.LayerNorm.eps == 0.3
    once = narrow(bert, zoo.batches("bert", 2), RECIPE.replace(sites="hidden", target_reduction=0.3), progress=False)
    again = skeleton(bert, once.config.to_dict())
    assert again.bert.embeddings.LayerNorm.eps == once.bert.embeddings.LayerNorm.eps != 0.3


def test_hooks_that_rename_what_is_saved(bert):
    def rename(module, state, prefix, metadata):
        for name in list(state):
            state[f"other.{name}"] = state.pop(name)

    bert.register_state_dict_post_hook(rename)
    head, _ = compress_head(bert, "classifier", zoo.batches("bert", 2), TernaryConfig(hidden=(8,)))
    with torch.no_grad():
        ours, theirs = (m.bert(**zoo.batches("bert", 1)[0])[0] for m in (head, bert))
    assert torch.equal(ours, theirs)


def test_what_cannot_be_copied_is_shared_with_a_teacher(bert, tmp_path):
    bert.lock, bert.kept = threading.Lock(), bert(**zoo.batches("bert", 1)[0]).logits
    bert.head = types.MethodType(lambda self: self.classifier, bert)
    twin = copied(bert)
    assert twin.lock is bert.lock and twin.head() is twin.classifier is not bert.classifier
    lock = bert.lock
    assert trained(bert, tmp_path).lock is lock


def test_frequencies_that_followed_the_length_of_a_batch(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    sizes = {"num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 16}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**zoo.BODY, **sizes, rope_parameters=rope)).eval()
    batch = {"input_ids": torch.randint(0, 61, (8, 40), generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        model(**batch)
    found = narrow(model, [batch], RECIPE.replace(form="factored", target_reduction=0.2), progress=False)
    found.save_pretrained(tmp_path)
    again = type(found).from_pretrained(tmp_path)
    torch.testing.assert_close(zoo.outputs(found, batch), zoo.outputs(again, batch))
