"""Perplexity by a sliding window, against one pass a token."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optimum_rmtkd.distillation.perplexity import Perplexity, perplexity, windows
from optimum_rmtkd.errors import RMTKDError


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, initializer_range=0.5, **sizes)).eval()


@pytest.mark.parametrize(("tokens", "window", "stride"), [(5, 8, 4), (8, 8, 4), (9, 8, 4), (23, 8, 4), (40, 8, 3)])
def test_every_token_but_the_first_is_predicted_once(tokens, window, stride):
    found = windows(tokens, window, stride)
    predicted = []
    for first, start in found:
        end = min(first + window, tokens)
        assert start >= first + 1 and (first == 0 or start - first >= window - stride)
        predicted += range(start, end)
    assert predicted == list(range(1, tokens))


@pytest.mark.parametrize(("tokens", "window"), [(7, 16), (30, 8)])
def test_it_is_what_one_pass_a_token_gives(llama, tokens, window):
    ids = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(0))
    losses = []
    for first, start in windows(tokens, min(window, tokens), window // 2):
        for position in range(start, min(first + window, tokens)):
            with torch.no_grad():
                answer = llama(input_ids=ids[None, first:position]).logits[0, -1]
            losses.append(-answer.log_softmax(-1)[ids[position]].item())
    found = perplexity(llama, ids, window, batch_size=3)
    assert found.tokens == tokens - 1 and found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.value == pytest.approx(math.exp(found.loss))


def test_what_has_none():
    with pytest.raises(RMTKDError, match="1 token"):
        perplexity(None, torch.zeros(1, dtype=torch.long), 8)
    assert Perplexity(1e4, 1).value == math.inf
