from __future__ import annotations

import contextlib
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

from optimum_rmtkd import RMTKDConfig, narrow
from optimum_rmtkd.trainer.chance import frequency_loss
from optimum_rmtkd.trainer.readiness import GAIN, new_head, readiness


BERT = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}

T5 = {
    "vocab_size": 50,
    "d_model": 16,
    "d_ff": 16,
    "d_kv": 8,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}


class Told(BertForSequenceClassification):
    """Answers what a batch says that it should."""

    def forward(self, input_ids=None, attention_mask=None, answer=None, spans=None, labels=None, **kwargs):
        if spans is not None:
            return QuestionAnsweringModelOutput(start_logits=spans, end_logits=spans)
        return SequenceClassifierOutput(logits=answer)


def told(**config):
    model = Told(BertConfig(**BERT | config))
    model.classifier.bias.data.fill_(0.1)  # not a head that might be new
    return model


def batch_of(answer, labels, **more):
    return {"input_ids": torch.ones(len(labels), 3, dtype=torch.long), "answer": answer, "labels": labels} | more


def knowing(labels, classes, certainty):
    """Logits that give the right label the odds `certainty`, those of the others 1."""
    return F.one_hot(labels.clamp_min(0), classes).float() * math.log(certainty)


# -- the loss of knowing nothing --------------------------------------------------------------------------------------


def entropy(*p):
    return -sum(q * math.log(q) for q in p if q)


def test_the_frequency_loss_lies_between_the_counts_own_entropy_and_leaving_one_out():
    labels = [0] * 20 + [1] * 4 + [2] * 2
    slow = 0.0
    for i, label in enumerate(labels):
        others = labels[:i] + labels[i + 1 :]
        slow -= math.log(others.count(label) / len(others)) / len(labels)
    own = entropy(20 / 26, 4 / 26, 2 / 26)
    assert frequency_loss(torch.tensor([20.0, 4.0, 2.0])) == pytest.approx((slow + own) / 2)


def test_labels_seen_once_keep_probability_for_the_unseen():
    # 20 of a, b once: a twentyfirst of the mass is spread over three classes
    a, b = 20 / 21 * 19 / 20 + 1 / 21 / 3, 1 / 21 / 3
    expected = -(20 * math.log(a) + math.log(b)) / 21
    assert frequency_loss(torch.tensor([20.0, 1.0, 0.0])) == pytest.approx((expected + entropy(20 / 21, 1 / 21)) / 2)


def test_the_frequency_loss_of_too_few_labels():
    assert frequency_loss(torch.tensor([2.0, 2.0])) == pytest.approx(math.log(2))  # never above the uniform one
    assert frequency_loss(torch.tensor([5.0, 0.0])) == 0
    assert math.isnan(frequency_loss(torch.tensor([1.0, 0.0])))


@pytest.mark.parametrize("p", [[0.5, 0.2, 0.2, 0.1], [1 / i / 5.187 for i in range(1, 101)]])
def test_the_frequency_loss_is_the_entropy_of_what_labels_were_drawn_from(p):
    p = torch.tensor(p, dtype=torch.float64)
    drawn = [torch.bincount(torch.multinomial(p, 200, replacement=True), minlength=len(p)) for _ in range(300)]
    found = torch.tensor([frequency_loss(counts.double()) for counts in drawn])
    plain = torch.tensor([entropy(*(counts / 200).tolist()) for counts in drawn])
    truth = entropy(*p.tolist())
    assert abs(found.mean() - truth) < 4 * found.std() / len(found) ** 0.5 + 0.2 * (truth - plain.mean())


# -- each kind of task ------------------------------------------------------------------------------------------------


def test_classes_are_judged_by_the_cross_entropy_of_those_that_count():
    labels = torch.tensor([0, 1, 1, 0, 1, -100, 1, 0])
    model, answer = told(), knowing(labels, 2, 9.0)
    found = readiness(model, [batch_of(answer[:5], labels[:5]), batch_of(answer[5:], labels[5:])])
    assert found.loss == pytest.approx(-math.log(0.9)) and found.can_teach
    assert found.chance == pytest.approx(frequency_loss(torch.tensor([3.0, 4.0])))
    assert "7 calibration labels" in found.why and "label frequencies" in found.why
    assert readiness(model, [batch_of(answer, labels[:, None])]).loss == pytest.approx(found.loss)


@pytest.mark.parametrize("certainty", [1.0, 1 / 3])
def test_a_model_that_knows_no_more_than_the_frequencies_cannot_teach(certainty):
    labels = torch.arange(60) % 3
    found = readiness(told(num_labels=3), [batch_of(knowing(labels, 3, certainty), labels)])
    assert not found.can_teach and found.loss >= found.chance - 1e-6
    assert found.chance == pytest.approx(math.log(3))


def test_a_weak_teacher_can_teach_and_one_within_the_noise_cannot():
    labels = torch.arange(200) % 2
    assert readiness(told(), [batch_of(knowing(labels, 2, 1.1), labels)]).can_teach
    assert not readiness(told(), [batch_of(knowing(labels, 2, 1.005), labels)]).can_teach


def test_regression_is_judged_against_the_mean():
    labels = torch.randn(40)
    for problem in (None, "regression"):
        model = told(num_labels=1, problem_type=problem)
        good = readiness(model, [batch_of(labels[:, None] * 0.5, labels)])
        assert good.can_teach and good.loss == pytest.approx(float((0.5 * labels).square().mean()), rel=1e-5)
        assert good.chance == pytest.approx(float(labels.var()), rel=1e-5)
        assert not readiness(model, [batch_of((labels.mean() + 0.2) * torch.ones(40, 1), labels)]).can_teach


def test_regression_of_several_numbers():
    labels = torch.randn(30, 3) * torch.tensor([1.0, 2.0, 3.0])
    model = told(num_labels=3, problem_type="regression")
    found = readiness(model, [batch_of(labels + 0.1, labels)])
    assert found.loss == pytest.approx(0.01, rel=1e-3)
    assert found.chance == pytest.approx(float(labels.var(0).mean()), rel=1e-5)


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_several_labels_are_judged_each_by_its_own_frequency(problem):
    labels = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    found = readiness(told(problem_type=problem), [batch_of((2 * labels - 1) * math.log(9), labels)])
    each = [frequency_loss(torch.tensor(c)) for c in ([3.0, 3.0], [4.0, 2.0])]
    assert found.loss == pytest.approx(-math.log(0.9), rel=1e-5) and found.chance == pytest.approx(sum(each) / 2)


def test_spans_are_judged_against_uniform_ones_over_the_real_tokens():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 0, 0]])
    starts = ends = torch.tensor([3, 1, 9])  # 9: cut off, ignored
    spans = knowing(starts.clamp(max=3), 4, 5.0)
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "attention_mask": mask, "spans": spans}
    batch |= {"start_positions": starts, "end_positions": ends}
    found = readiness(told(), [batch], label_names=("start_positions", "end_positions"))
    assert found.chance == pytest.approx((math.log(4) + math.log(2)) / 2)
    assert found.loss == pytest.approx(-math.log(5 / 8)) and found.can_teach
    batch["spans"] = torch.zeros(3, 4)
    assert not readiness(told(), [batch], label_names=("start_positions", "end_positions")).can_teach


def test_tokens_are_judged_by_their_labels_and_causal_ones_are_shifted():
    ids = torch.randint(0, 50, (4, 12))
    labels = ids.clone()
    labels[:, :3] = -100
    for model in (
        GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)),
        BertForMaskedLM(BertConfig(**BERT)),
        BertForTokenClassification(BertConfig(**BERT, num_labels=50)),
        T5ForConditionalGeneration(T5Config(**T5)),
    ):
        model.eval()
        given = labels if not model.config.is_encoder_decoder else ids
        found = readiness(
            model, [{"input_ids": ids[:2], "labels": given[:2]}, {"input_ids": ids[2:], "labels": given[2:]}]
        )
        with torch.no_grad():
            assert found.loss == pytest.approx(float(model(input_ids=ids, labels=given).loss), rel=1e-4)
        counted = given[:, 1:] if isinstance(model, GPT2LMHeadModel) else given
        counts = torch.bincount(counted[counted != -100].flatten(), minlength=50)
        assert found.chance == pytest.approx(frequency_loss(counts.double())) and not found.can_teach


def test_choices_are_classes():
    ids = torch.randint(0, 50, (6, 4, 5))
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    found = readiness(BertForMultipleChoice(BertConfig(**BERT)), [{"input_ids": ids, "labels": labels}])
    assert found.chance == pytest.approx(frequency_loss(torch.tensor([2.0, 2.0, 1.0, 1.0]))) and not found.can_teach


# -- what cannot be known ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(4, 3, dtype=torch.long)},
        batch_of(torch.zeros(4, 2), torch.zeros(4, 5, 5)),
        batch_of(torch.zeros(4, 2), torch.tensor([0, 1, 2, 3])),  # of another model: refused elsewhere
        batch_of(torch.zeros(4, 2), torch.full((4,), -100)),
    ],
)
def test_where_labels_are_not_known_a_model_is_taken_to_teach_and_it_is_said(batch):
    found = readiness(told(), [batch])
    assert found.can_teach and found.loss is None and found.chance is None and "could not be checked" in found.why


def test_labels_that_are_all_the_same_tell_nothing():
    found = readiness(told(), [batch_of(torch.zeros(4, 2), torch.ones(4, dtype=torch.long))])
    assert found.can_teach and found.chance is None and "all the same" in found.why


def test_no_batch_at_all():
    assert "could not be checked" in readiness(told(), []).why


def test_a_loss_of_the_users_own_excuses_a_model_that_is_worse_than_the_frequencies():
    labels = torch.tensor([0] * 19 + [1])
    answer = knowing(labels, 2, 9.0)
    answer[:19] = torch.tensor([0.0, 1.0])
    assert not readiness(told(), [batch_of(answer, labels)]).can_teach
    assert readiness(told(), [batch_of(answer, labels)], own_loss=True).can_teach


def test_labels_of_another_name():
    labels = torch.arange(8) % 2
    batch = batch_of(knowing(labels, 2, 9.0), labels)
    batch["targets"] = batch.pop("labels")
    assert readiness(told(), [batch], label_names=("targets",)).can_teach


def test_no_more_samples_are_looked_at_than_asked_for():
    labels = torch.arange(12) % 2

    def batches():
        for i in (0, 4):
            yield batch_of(knowing(labels, 2, 9.0)[i : i + 4], labels[i : i + 4])
        raise AssertionError("a third batch was asked for")

    assert "6 calibration labels" in readiness(told(), batches(), samples=6).why


def test_the_model_is_left_as_it_was():
    model = BertForSequenceClassification(BertConfig(**BERT)).train()
    model.bert.encoder.eval()
    batch = {"input_ids": torch.ones(4, 3, dtype=torch.long), "labels": torch.tensor([0, 1, 1, 0])}
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    readiness(model, [batch])
    assert [m.training for m in model.modules()] == modes and model.config.problem_type is None
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())


# -- several processes ------------------------------------------------------------------------------------------------


class Processes:
    """An accelerator of so many processes, of which one runs at a time: an incomplete sum ends the run."""

    device = torch.device("cpu")

    def __init__(self, count):
        self.num_processes, self.sums, self.parts = count, [], []

    def start(self):
        self.calls = 0

    def reduce(self, tensor, reduction):
        assert reduction == "sum"
        self.calls += 1
        if self.calls <= len(self.sums):
            return self.sums[self.calls - 1]
        self.parts.append(tensor.clone())
        if len(self.parts) == self.num_processes:
            self.sums.append(sum(self.parts))
            self.parts = []
        raise InterruptedError


def processes(model, parts):
    """What each process finds."""
    accelerator, found = Processes(len(parts)), []
    while len(found) < len(parts):
        found = []
        for batches in parts:
            accelerator.start()
            with contextlib.suppress(InterruptedError):
                found.append(readiness(model, batches, accelerator=accelerator))
    return found


def test_all_processes_decide_alike_what_one_with_all_data_would():
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    answer = knowing(labels, 2, 3.0)
    answer[:3] = -2 * answer[:3]
    parts = [[batch_of(answer[:3], labels[:3])], [batch_of(answer[3:], labels[3:])], []]
    one, several = readiness(told(), parts[0] + parts[1]), processes(told(), parts)
    assert {(f.can_teach, f.why) for f in several} == {(one.can_teach, one.why)}
    assert several[0].loss == pytest.approx(one.loss) and several[2].chance == pytest.approx(one.chance)


def test_what_one_process_cannot_read_is_known_to_none():
    labels = torch.tensor([0, 1, 0, 1])
    parts = [[batch_of(torch.zeros(4, 2), labels)], [{"input_ids": torch.ones(4, 3, dtype=torch.long)}]]
    assert all("could not be checked" in f.why for f in processes(told(), parts))


# -- new heads --------------------------------------------------------------------------------------------------------

VIT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8}
LLAMA = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "pad_token_id": 0}
MODELS = [
    BertForSequenceClassification(BertConfig(**BERT)),
    BertForMaskedLM(BertConfig(**BERT)),
    BertForQuestionAnswering(BertConfig(**BERT)),
    BertForTokenClassification(BertConfig(**BERT)),
    DistilBertForSequenceClassification(DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2, hidden_dim=16)),
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)),
    LlamaForCausalLM(LlamaConfig(**LLAMA, num_attention_heads=2)),
    LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_attention_heads=2)),
    T5ForConditionalGeneration(T5Config(**T5)),
    ViTForImageClassification(ViTConfig(**VIT, patch_size=4)),
    ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_a_head_that_was_loaded_is_not_new(model, tmp_path):
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    assert new_head(type(model).from_pretrained(tmp_path)) is False


@pytest.mark.parametrize("model", [MODELS[i] for i in (0, 2, 3, 4, 9)], ids=lambda model: type(model).__name__)
def test_a_head_that_was_not_in_the_checkpoint_is_new_until_it_is_trained(model, tmp_path):
    model.base_model.save_pretrained(tmp_path)
    raw = type(model).from_pretrained(tmp_path, num_labels=2).to(torch.float64)
    assert new_head(raw) is True
    for parameter in raw.parameters():
        parameter.data += 1e-5
    assert new_head(raw) is False


def test_a_head_of_another_number_of_labels_is_new(tmp_path):
    BertForSequenceClassification(BertConfig(**BERT)).save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert new_head(model) is True
    found = readiness(model, [{"input_ids": torch.ones(8, 3, dtype=torch.long), "labels": torch.arange(8) % 5}])
    assert not found.can_teach and "newly initialised" in found.why and found.chance is not None


@pytest.mark.parametrize("model", [MODELS[7], MODELS[10]], ids=lambda model: type(model).__name__)
def test_a_head_without_biases_that_start_at_zero_may_be_new(model, tmp_path):
    model.base_model.save_pretrained(tmp_path)
    assert new_head(type(model).from_pretrained(tmp_path)) is None


@pytest.mark.parametrize("labels", [False, True])
def test_a_head_that_was_not_in_the_checkpoint_is_new_where_no_labels_speak_for_it(labels, tmp_path):
    """A reward model from a language model: its head has no bias."""
    MODELS[7].base_model.save_pretrained(tmp_path)
    model = type(MODELS[7]).from_pretrained(tmp_path)
    given = torch.arange(24) % 2
    batch = {"input_ids": 1 + given[:, None].repeat(1, 4)}
    with torch.no_grad():  # it has learnt: the one row gives the one label
        hidden = model.base_model(batch["input_ids"]).last_hidden_state[:, -1]
        model.score.weight.copy_(torch.stack([hidden[0] - hidden[1], hidden[1] - hidden[0]]))
    found = readiness(model, [batch | ({"labels": given} if labels else {})])
    assert found.can_teach is labels
    assert labels or "was not in the checkpoint" in found.why


def test_a_head_that_shows_traces_of_training_is_not_new_without_labels(tmp_path):
    MODELS[0].base_model.save_pretrained(tmp_path)
    model = type(MODELS[0]).from_pretrained(tmp_path)
    model.classifier.bias.data += 0.1
    found = readiness(model, [{"input_ids": torch.ones(4, 3, dtype=torch.long)}])
    assert found.can_teach and not found.checked


def test_a_copy_has_no_marks_and_may_be_new_while_its_biases_are_zero(tmp_path):
    BertModel(BertConfig(**BERT)).save_pretrained(tmp_path)
    model = copy.deepcopy(BertForSequenceClassification.from_pretrained(tmp_path))
    assert new_head(model) is None
    model.classifier.bias.data += 0.1
    assert new_head(model) is False


def test_the_head_of_a_narrowed_model_is_not_new(tmp_path):
    model = MODELS[0].__class__(MODELS[0].config)
    model.classifier.bias.data.fill_(0.1)
    batches = [{"input_ids": torch.randint(0, 50, (16, 8))}]
    recipe = RMTKDConfig(target_reduction=0.2, round_to=4, min_width=4, calibration_samples=16)
    narrow(model, batches, recipe).save_pretrained(tmp_path)
    assert new_head(AutoModelForSequenceClassification.from_pretrained(tmp_path)) is False


def test_a_backbone_alone_has_no_head():
    assert new_head(BertModel(BertConfig(**BERT))) is False


def test_a_head_that_may_be_new_has_to_show_more():
    labels = torch.arange(200) % 2
    model = told()
    batch = batch_of(knowing(labels, 2, 1.1), labels)
    assert readiness(model, [batch]).can_teach
    model.classifier.bias.data.zero_()
    found = readiness(model, [batch])
    assert not found.can_teach and "may be new" in found.why
    assert readiness(model, [batch_of(knowing(labels, 2, 4.0), labels)]).can_teach


# -- real models ------------------------------------------------------------------------------------------------------


def rows_of(shared, file, column, labels, tokenizer, count, size=32):
    """Batches of rows in a fixed random order."""
    from datasets import Dataset

    rows = Dataset.from_parquet(str(shared / "data" / file)).shuffle(seed=0).select(range(count))
    for i in range(0, count, size):
        part = rows[i : i + size]
        batch = dict(tokenizer(part[column], truncation=True, max_length=32, padding=True, return_tensors="pt"))
        given = torch.tensor(part["label"]) if labels else batch["input_ids"]
        yield batch | {"labels": given}


@pytest.mark.slow
@pytest.mark.parametrize("file, classes, column", [("sst2", 2, "sentence"), ("ag_news_sub", 4, "text")])
def test_a_real_encoder_with_a_random_head_cannot_teach_even_without_its_marks(shared, file, classes, column):
    folder = shared / "models" / "all_minilm_l6_v2"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batches = list(rows_of(shared, f"{file}_train.parquet", column, True, tokenizer, 32))
    for seed in range(2):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=classes)
        found = readiness(model, batches)
        assert not found.can_teach and "newly initialised" in found.why
        assert found.loss > (1 - GAIN) * found.chance
        assert not readiness(copy.deepcopy(model), batches).can_teach


def test_real_teachers_can_teach(shared):
    folder = shared / "models" / "minilm_l6_sst2"
    batches = rows_of(shared, "sst2_train.parquet", "sentence", True, AutoTokenizer.from_pretrained(folder), 64)
    found = readiness(AutoModelForSequenceClassification.from_pretrained(folder), batches)
    assert found.can_teach and found.loss < 0.5 * found.chance
    folder = shared / "models" / "stories260k_llama"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batches = rows_of(shared, "tinystories_sub_train.parquet", "text", False, tokenizer, 32)
    found = readiness(AutoModelForCausalLM.from_pretrained(folder), batches)
    assert found.can_teach and found.loss < 0.6 * found.chance
