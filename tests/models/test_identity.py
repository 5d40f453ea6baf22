"""A model that its class and config do not describe is refused before anything is computed, in words that help."""

from __future__ import annotations

import threading
import types

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn.utils import parametrizations, prune

from optimum_rmtkd import CalibrationError, RMTKDConfig, RMTKDError, UnsupportedArchitectureError, narrow
from optimum_rmtkd.models import check_behaviour, check_structure
from optimum_rmtkd.models.behaviour import _values

from ..surgery import zoo


RECIPE = RMTKDConfig(target_reduction=0.4, round_to=4, min_width=4, calibration_samples=16)


class Untouchable:
    """Calibration data that must not be asked for."""

    def __iter__(self):
        raise AssertionError("data was read before the model was looked at")


def refused(model, error=UnsupportedArchitectureError) -> str:
    """The message with which `narrow` refuses a model before it reads any data."""
    with pytest.raises(error) as caught:
        narrow(model, Untouchable(), RECIPE, progress=False)
    return str(caught.value)


def refused_on_data(model, name="bert") -> str:
    """The same, on the first batch."""
    with pytest.raises(UnsupportedArchitectureError) as caught:
        narrow(model, zoo.batches(name, count=1), RECIPE, progress=False)
    return str(caught.value)


@pytest.fixture
def bert():
    return zoo.make("bert", "ForSequenceClassification")


# What is accepted


@pytest.mark.parametrize("name, task", zoo.ONE_EACH)
def test_stock_models_are_what_they_say(name, task):
    model = zoo.make(name, task)
    check_structure(model)
    check_behaviour(model, zoo.batches(name)[0])


def test_narrowed_models_are_what_they_say(bert):
    small = narrow(bert, zoo.batches("bert", count=2), RECIPE, progress=False)
    check_structure(small)
    check_behaviour(small, zoo.batches("bert", count=1)[0])


@pytest.mark.parametrize("tied", [True, False])
def test_ties_follow_the_config(tied):
    config = tf.BertConfig(**zoo.TEXT, **zoo.BODY, tie_word_embeddings=tied)
    check_structure(tf.BertForMaskedLM(config))


def test_a_change_that_the_config_states_is_accepted(bert):
    bert.classifier = nn.Linear(32, 5)
    bert.config.num_labels = bert.num_labels = 5
    bert.bert.encoder.layer = bert.bert.encoder.layer[:1]
    bert.config.num_hidden_layers = 1
    assert narrow(bert, zoo.batches("bert", count=2), RECIPE, progress=False).classifier.out_features == 5


def test_modules_without_effect_may_differ(bert):
    bert.dropout = nn.Identity()
    bert.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.GELU()
    bert.criterion = nn.CrossEntropyLoss()
    small = narrow(bert, zoo.batches("bert", count=2), RECIPE, progress=False)
    assert isinstance(small.dropout, nn.Identity) and isinstance(small.criterion, nn.CrossEntropyLoss)


def test_the_mode_of_every_module_is_left_alone(bert):
    bert.train()
    bert.bert.embeddings.eval()
    before = {name: module.training for name, module in bert.named_modules()}
    narrow(bert, zoo.batches("bert", count=1), RECIPE, progress=False)
    assert {name: module.training for name, module in bert.named_modules()} == before


# Classes


def test_a_class_that_borrows_a_name():
    class ElectraModel(tf.ElectraModel):
        pass

    message = refused(ElectraModel(zoo.CONFIGS["electra"]))
    assert "not the class of that name in transformers" in message and "transformers.ElectraModel" in message


def test_a_class_of_another_name():
    class Mine(tf.ViTForImageClassification):
        pass

    message = refused(Mine(zoo.CONFIGS["vit"]))
    assert "Mine is no class of transformers" in message and "transformers.ViTForImageClassification" in message


def test_a_class_of_a_users_own_around_a_stock_model():
    class Around(tf.ViTPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.vit, self.head = tf.ViTModel(config), torch.nn.Linear(config.hidden_size, 2)

    message = refused(Around(zoo.CONFIGS["vit"]))
    assert "Narrow the model of transformers inside by itself" in message and "ViTPreTrainedModel" not in message


def test_a_user_class_named_like_a_narrowed_one():
    class RMTKDBertModel(tf.BertModel):
        pass

    assert "not the class of that name" in refused(RMTKDBertModel(zoo.CONFIGS["bert"]))


def test_what_is_no_model_of_transformers(bert):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(bert, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    assert "merge_and_unload()" in refused(adapted, RMTKDError)
    merged = adapted.merge_and_unload()
    check_structure(merged)
    assert "model.module" in refused(nn.DataParallel(bert), RMTKDError)
    assert "got Linear" in refused(nn.Linear(2, 2), RMTKDError)


def test_an_adapter_inside_a_model(bert):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["query", "value"]), bert)  # as add_adapter does
    assert "carries an adapter" in refused(bert)


# Weights


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
        (lambda layer: prune.ln_structured(layer, "weight", 0.5, 2, 0), "pruning masks"),
        (lambda layer: parametrizations.weight_norm(layer), "remove_parametrizations"),
        (lambda layer: parametrizations.orthogonal(layer), "parametrizations"),
        (lambda layer: nn.utils.weight_norm(layer), "remove_weight_norm"),
        (lambda layer: nn.utils.spectral_norm(layer), "remove_spectral_norm"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_computed_from_others(bert, change, words):
    change(bert.bert.encoder.layer[1].intermediate.dense)
    message = refused(bert)
    assert words in message and "bert.encoder.layer.1.intermediate.dense" in message


def test_weights_that_the_class_itself_computes_from_others():
    sizes = {"conv_dim": [8], "conv_kernel": [4], "conv_stride": [2], "num_feat_extract_layers": 1}
    config = tf.Wav2Vec2Config(**zoo.BODY, **sizes, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    model = tf.Wav2Vec2ForCTC(config).eval()
    check_structure(model)
    check_behaviour(model, {"input_values": torch.randn(2, 200)})


def test_masks_that_were_made_permanent_are_plain_weights(bert):
    layer = bert.bert.encoder.layer[1].intermediate.dense
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.remove(layer, "weight")
    check_structure(bert)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_weights(bert):
    quantised = torch.ao.quantization.quantize_dynamic(bert, {nn.Linear}, dtype=torch.qint8)
    message = refused(quantised)
    assert "quantised" in message and "without quantization_config" in message


def test_weights_quantised_by_torchao(bert):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(bert, torchao.Int8WeightOnlyConfig())
    assert "quantised" in refused(bert)


def test_offloaded_weights(bert, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.disk_offload(bert, str(tmp_path))
    message = refused(bert)
    assert "offloaded" in message and "device_map=None" in message


def test_untied_weights():
    model = zoo.make("bert", "ForMaskedLM")
    decoder = model.cls.predictions.decoder
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    message = refused(model)
    assert "do not share" in message and "tie_word_embeddings = False" in message


def test_weights_tied_by_hand():
    config = tf.BertConfig(**zoo.TEXT, **zoo.BODY, tie_word_embeddings=False)
    model = tf.BertForMaskedLM(config)
    model.cls.predictions.decoder.weight = model.bert.embeddings.word_embeddings.weight
    assert "tie_word_embeddings = True" in refused(model)


# Modules


def other_labels(model):
    model.classifier = nn.Linear(32, 5)


def fewer_layers(model):
    model.bert.encoder.layer = model.bert.encoder.layer[:1]


def more_layers(model):
    model.bert.encoder.layer.append(type(model.bert.encoder.layer[0])(model.config))


def more_words(model):
    old = model.bert.embeddings.word_embeddings
    model.bert.embeddings.word_embeddings = nn.Embedding(70, old.embedding_dim, padding_idx=old.padding_idx)


@pytest.mark.parametrize(
    "change, where, cure",
    [
        (other_labels, "classifier", "model.config.num_labels = 5"),
        (fewer_layers, "bert.encoder.layer.1 is missing", "model.config.num_hidden_layers = 1"),
        (more_layers, "bert.encoder.layer.2", "model.config.num_hidden_layers = 3"),
        (more_words, "bert.embeddings.word_embeddings", "model.config.vocab_size = 70"),
    ],
)
def test_a_change_that_the_config_could_state(bert, change, where, cure):
    change(bert)
    message = refused(bert)
    assert where in message and cure in message


class Attention(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize(
    "change, where",
    [
        (
            lambda m: setattr(m, "classifier", nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 3))),
            "classifier",
        ),
        (lambda m: setattr(m, "classifier", nn.Linear(32, 3, bias=False)), "classifier"),
        (lambda m: setattr(m, "extra", nn.Linear(32, 2)), "extra"),
        (lambda m: m.bert.register_parameter("prompt", nn.Parameter(torch.zeros(4, 32))), "bert"),
        (lambda m: setattr(m.bert, "pooler", None), "bert.pooler"),
        (
            lambda m: setattr(m.bert.encoder.layer[0], "attention", Attention(m.bert.encoder.layer[0].attention)),
            "bert.encoder.layer.0.attention is a Attention",
        ),
        (
            lambda m: setattr(m.bert.encoder.layer[0].attention.output, "LayerNorm", nn.RMSNorm(32)),
            "bert.encoder.layer.0.attention.output.LayerNorm",
        ),
        (lambda m: setattr(m.bert.encoder.layer[1].attention.self, "is_causal", True), "is_causal=True"),
    ],
)
def test_a_change_that_no_config_states(bert, change, where):
    change(bert)
    message = refused(bert)
    assert where in message and "put the change on the result" in message


def test_a_model_changed_inside_the_trainer_is_refused_there(bert, tmp_path):
    from optimum_rmtkd import RMTKDTrainer, RMTKDTrainingArguments

    fewer_layers(bert)
    args = RMTKDTrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    with pytest.raises(UnsupportedArchitectureError, match="num_hidden_layers = 1"):
        RMTKDTrainer(model=bert, args=args, rmtkd_config=RECIPE, train_dataset=Untouchable())


# Behaviour


def relu(model):
    for layer in model.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = nn.ReLU()


def test_another_activation_is_said_with_its_field(bert):
    relu(bert)
    message = refused_on_data(bert)
    assert "intermediate_act_fn" in message and "model.config.hidden_act = 'relu'" in message


def test_another_activation_in_one_layer_has_no_field(bert):
    bert.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()
    message = refused_on_data(bert)
    assert "bert.encoder.layer.1.intermediate.intermediate_act_fn is a ReLU" in message and "on the result" in message


def test_an_activation_taken_out(bert):
    bert.bert.pooler.activation = nn.Identity()
    assert "bert.pooler.activation is a Identity, the class builds a Tanh" in refused_on_data(bert)


def test_a_function_in_place_of_an_activation():
    model = zoo.make("distilbert", "ForSequenceClassification")
    model.distilbert.transformer.layer[0].ffn.activation = nn.SiLU()
    assert "distilbert.transformer.layer.0.ffn.activation" in refused_on_data(model, "distilbert")


def scaled(self, *args, **kwargs):
    outputs = type(self).forward(self, *args, **kwargs)
    outputs.logits = 3 * outputs.logits
    return outputs


def test_a_bound_forward_that_computes_something_else(bert):
    bert.forward = types.MethodType(scaled, bert)
    message = refused_on_data(bert)
    assert "has a forward of its own (scaled)" in message


def test_a_forward_that_is_no_method_of_the_instance(bert):
    original = bert.forward
    bert.forward = lambda *args, **kwargs: original(*args, **kwargs)
    message = refused(bert)
    assert "no method of it" in message and "types.MethodType" in message


def test_a_patched_forward_of_a_part(bert):
    pooler = bert.bert.pooler
    original = pooler.forward
    pooler.forward = lambda states: 2 * original(states)
    assert "bert.pooler (BertPooler)" in refused(bert)


def test_a_hook_that_changes_an_output(bert):
    def steer(module, args, output):
        return output + 1.0

    bert.bert.encoder.layer[0].output.dense.register_forward_hook(steer)
    message = refused_on_data(bert)
    assert "bert.encoder.layer.0.output.dense" in message and "steer" in message


def test_a_model_that_needs_its_hooks_to_run(bert):
    def cast(module, args):
        return (args[0].double(),)

    bert.classifier.double().register_forward_pre_hook(cast)
    message = refused_on_data(bert)
    assert "cannot run the batch" in message and "classifier has hooks" in message


def test_a_buffer_that_is_not_saved(bert):
    bert.bert.embeddings.position_ids = bert.bert.embeddings.position_ids.flip(-1)
    assert "position_ids" in refused_on_data(bert)


def test_statistics_of_batch_norm_are_weights_like_others():
    model = zoo.make("resnet-basic", "ForImageClassification")
    check_behaviour(model, zoo.batches("resnet-basic", count=1)[0])


# Models as users have them


def test_an_index_of_padding_that_was_set_later(bert):
    bert.config.pad_token_id = 3  # as Trainer does, where the tokenizer has another
    narrow(bert, zoo.batches("bert", count=2), RECIPE, progress=False)
    roberta = zoo.make("roberta", "ForSequenceClassification")
    roberta.config.pad_token_id = 3  # its position ids count from it
    message = refused_on_data(roberta, "roberta")
    assert "padding_idx" in message and "model.config.pad_token_id = 1" in message


def test_one_activation_for_all_layers(bert):
    shared = nn.GELU()
    for layer in bert.bert.encoder.layer:
        layer.intermediate.intermediate_act_fn = shared
    check_structure(bert)
    check_behaviour(bert, zoo.batches("bert", count=1)[0])
    narrow(bert, zoo.batches("bert", count=2), RECIPE, progress=False)


def test_outputs_that_are_compared_do_not_stay_in_memory():
    output = torch.randn(64, 1000, 8)
    (kept,) = _values(output)
    assert kept.untyped_storage().nbytes() <= 4 * 4096
    before = kept.clone()
    output.zero_()  # as a layer that works in place does
    assert torch.equal(kept, before)


def test_one_layer_twice(bert):
    bert.bert.encoder.layer[1] = bert.bert.encoder.layer[0]
    assert "share" in refused(bert)


@pytest.mark.parametrize("part", ["", "bert.pooler", "bert.encoder.layer.0.output.dense"])
def test_a_bound_forward_that_runs_the_layers_of_the_original(bert, part):
    module = bert.get_submodule(part)
    held = [module.forward]
    module.forward = types.MethodType(lambda self, *args, **kwargs: held[0](*args, **kwargs), module)
    message = refused_on_data(bert)
    assert (part or "The model") in message and "type(self).forward(self" in message


def test_a_bound_forward_that_needs_what_the_user_put_on_the_model(bert):
    bert.calls = []

    def forward(self, *args, **kwargs):
        self.calls.append(self)
        return type(self).forward(self, *args, **kwargs)

    bert.forward = types.MethodType(forward, bert)
    found = narrow(bert, zoo.batches("bert", count=2), RECIPE, progress=False)
    assert set(map(id, bert.calls)) == {id(bert)} and found.forward.__self__ is found


def test_compiled_models(bert):
    assert "model._orig_mod" in refused(torch.compile(bert), RMTKDError)
    bert.bert.encoder.compile(backend="eager")  # hooks inside would not be called
    call = bert.bert.encoder._compiled_call_impl
    narrow(bert, zoo.batches("bert", count=2), RECIPE, progress=False)
    assert bert.bert.encoder._compiled_call_impl is call
    bert.bert.pooler = torch.compile(bert.bert.pooler)
    assert "model.bert.pooler = model.bert.pooler._orig_mod" in refused(bert)


def test_a_tuned_prompt_cannot_be_merged(bert):
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(bert, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))
    message = refused(tuned, RMTKDError)
    assert "get_base_model()" in message and "merge_and_unload" not in message
    inside = tuned.get_base_model()
    assert "model.classifier = model.classifier.modules_to_save['default']" in refused(inside)
    inside.classifier = inside.classifier.modules_to_save["default"]
    check_structure(inside)


def test_a_model_that_a_merged_adapter_left_frozen(bert, tmp_path):
    from optimum_rmtkd import RMTKDTrainer, RMTKDTrainingArguments

    args = RMTKDTrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    trainer = RMTKDTrainer(bert.requires_grad_(False), args=args, rmtkd_config=RECIPE, train_dataset=[{}])
    with pytest.raises(RMTKDError, match=r"requires_grad_\(True\)"):
        trainer.train()


def test_inference_mode(bert):
    with torch.inference_mode():
        assert "inference_mode" in refused(bert)
        made = zoo.make("bert", "ForSequenceClassification")
    assert "inference_mode" in refused(made)


def test_weights_of_eight_bits(bert):
    weight = bert.classifier.weight.detach().to(torch.float8_e4m3fn)
    bert.classifier.weight = nn.Parameter(weight, requires_grad=False)
    assert "quantised" in refused(bert)


def test_weights_that_are_not_finite(bert):
    bert.classifier.weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"classifier\.weight"):
        narrow(bert, Untouchable(), RECIPE, progress=False)


def test_a_config_that_cannot_be_copied(bert):
    bert.config.lock = threading.Lock()
    assert "attribute of the model" in refused(bert)


def test_a_field_of_a_strict_config_is_tried_without_a_crash():
    sizes = {"num_key_value_heads": 2, "vocab_size": 61, "pad_token_id": None}
    model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**zoo.BODY, **sizes))
    model.score = nn.Linear(32, 7, bias=False)
    model.model.layers[0].self_attn.is_causal = None
    assert "score" in refused(model)
