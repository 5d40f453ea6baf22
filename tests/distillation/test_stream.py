"""Answers made a few positions at a time: the same values and gradients as from whole logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from optimum_rmtkd.distillation import JensenShannonDivergence, KLDivergence, SkewKLDivergence, TaskLoss, cached
from optimum_rmtkd.distillation.heads import Finish, Heads, Postponed, known_numbers
from optimum_rmtkd.distillation.sparse import sparse_kl
from optimum_rmtkd.distillation.stream import AnswerStream


SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
DECODER = SIZES | {"vocab_size": 50, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**DECODER, final_logit_softcapping=2.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**DECODER, logits_scaling=7.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**DECODER, logit_scale=0.0625)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, vocab_size=50)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, vocab_size=50)),
}


def ids(rows=2, tokens=6, words=50):
    return torch.randint(2, words, (rows, tokens), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_a_head_is_found_without_knowing_the_model(name):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    for parameter in model.parameters():  # logits that a cap is felt by
        parameter.data.mul_(3)
    head = Heads().of(model, {"input_ids": ids()})
    expected = model(input_ids=ids()).logits
    with Postponed().around(head.layer) as kept:
        last = model(input_ids=ids()).logits
    assert last.shape == (2, 1, 50) and kept.hidden.shape == (2, 6, 16)
    assert torch.allclose(head(kept.hidden), expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(last, expected[:, -1:], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.0625, None), (1 / 7, None), (1.0, 30.0), (2.5, 50.0)])
def test_scale_and_cap_are_read_from_known_numbers(scale, cap):
    numbers = known_numbers(48, torch.zeros(1))
    found = Finish.of(numbers, Finish(scale, cap)(numbers))
    assert found.scale == pytest.approx(scale, rel=1e-5)
    assert found.cap == (None if cap is None else pytest.approx(cap, rel=1e-5))


@pytest.mark.parametrize("change", [lambda x: x + 1, lambda x: x.clamp(-5, 5), torch.zeros_like, lambda x: x.flip(0)])
def test_what_is_neither_scale_nor_cap_is_not_taken_for_one(change):
    numbers = known_numbers(48, torch.zeros(1))
    assert Finish.of(numbers, change(numbers)) is None


def test_a_model_that_does_more_with_its_logits_keeps_them_whole():
    class Shifting(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits.roll(1, -1)
            return outputs

    assert "neither a scale nor a cap" in Heads().of(Shifting(LlamaConfig(**DECODER)), {"input_ids": ids()})


TERMS = [
    KLDivergence(temperature=2.0),
    KLDivergence(reverse=True),
    SkewKLDivergence(),
    JensenShannonDivergence(),
    TaskLoss(),
]


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_values_and_gradients_do_not_depend_on_chunks(chunk):
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 5), torch.randn(11, 5)
    theirs, labels = torch.randn(7, 11), torch.randint(0, 11, (7,))
    labels[2] = -100
    compared = torch.ones(7, dtype=torch.bool)
    compared[5] = False

    def both(source, chunk):
        hidden_, weight_ = source(hidden), source(weight)
        stream = AnswerStream(
            lambda part: F.linear(hidden_[part], weight_), lambda part: theirs[part], 7, labels, compared, TERMS, chunk
        )
        values = torch.stack([stream.mean(term) for term in TERMS])
        return values, torch.autograd.grad((values * torch.arange(1.0, 6.0)).sum(), (hidden_, weight_))

    values, gradients = both(lambda tensor: tensor.clone().requires_grad_(), chunk)
    ours, reference = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    logits = F.linear(ours, reference)
    log_q, log_p = logits[compared].log_softmax(-1), theirs.double()[compared].log_softmax(-1)
    soft_q, soft_p = (logits[compared] / 2).log_softmax(-1), (theirs.double()[compared] / 2).log_softmax(-1)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1).mean()  # noqa: E731
    skew, half = (0.1 * log_p.exp() + 0.9 * log_q.exp()).log(), (0.5 * log_p.exp() + 0.5 * log_q.exp()).log()
    expected = torch.stack(
        [
            4 * kl(soft_p, soft_q),
            kl(log_q, log_p),
            kl(log_p, skew),
            0.5 * kl(log_p, half) + 0.5 * kl(log_q, half),
            F.cross_entropy(logits, labels, ignore_index=-100),
        ]
    )
    wanted = torch.autograd.grad((expected * torch.arange(1.0, 6.0)).sum(), (ours, reference))
    assert torch.allclose(values.double(), expected, rtol=1e-5)
    for got, want in zip(gradients, wanted, strict=True):
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-6)


def test_no_position_at_all_is_zero_with_a_gradient():
    hidden = torch.randn(0, 5, requires_grad=True)
    weight = torch.randn(11, 5, requires_grad=True)
    nothing = torch.zeros(0, dtype=torch.bool)
    stream = AnswerStream(
        lambda part: F.linear(hidden[part], weight), lambda part: torch.zeros(0, 11), 0, None, nothing, TERMS[:1], 4
    )
    stream.mean(TERMS[0]).backward()
    assert stream.mean(TERMS[0]).item() == 0 and bool((weight.grad == 0).all())


@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_sparse_kl_is_that_of_the_expanded_answers(k, temperature):
    torch.manual_seed(0)
    teacher, ours = torch.randn(6, 11), torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    sparse = cached._largest(teacher, k)
    log_q = (ours / temperature).log_softmax(-1)
    log_p = (sparse.dense().double() / temperature).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    found = sparse_kl(sparse, log_q, temperature)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    gradients = [torch.autograd.grad(value.sum(), ours, retain_graph=True)[0] for value in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-6)
    if k == 11:
        assert torch.allclose(sparse.dense(), teacher)


def test_answers_are_cached_in_chunks_where_there_are_many(monkeypatch):
    import datasets

    torch.manual_seed(0)
    model = MODELS["gemma2"]().eval()
    rows = datasets.Dataset.from_dict(
        {"input_ids": ids(5).tolist(), "attention_mask": [[1] * 6] * 4 + [[1] * 4 + [0] * 2]}
    )

    def collate(samples):
        return {name: torch.tensor([sample[name] for sample in samples]) for name in samples[0]}

    def kept(numbers):
        monkeypatch.setattr(cached, "CHUNK_NUMBERS", numbers)
        monkeypatch.setattr(cached, "chunk_of", lambda vocabulary: 4)
        return cached.cache_answers(model, rows, collate, k=3, batch_size=3, progress=False)

    few, many = kept(10**9), kept(1)
    assert [len(row) for row in many["teacher_rest"]] == [6, 6, 6, 6, 4]
    assert many["teacher_indices"] == few["teacher_indices"]
    for one, other in zip(many["teacher_values"], few["teacher_values"], strict=True):
        assert torch.allclose(torch.tensor(one), torch.tensor(other), atol=1e-5)
