"""Vocabulary x tokenizer kind x family: what stays is cut and scored as before, and reloads."""

from __future__ import annotations

import pytest
import torch

from optimum_rmtkd import trim_vocabulary

from .conftest import DOMAIN, ELSEWHERE, TOKENIZERS, WORDS, families, sentences, tiny


PAIRS = [  # each tokenizer kind and each family once; all pairs are slow
    ("wordpiece", "bert"),
    ("wordpiece", "bert_mlm"),
    ("byte_level", "roberta"),
    ("byte_level", "bart"),
    ("gpt2", "gpt2"),
    ("byte_fallback", "llama"),
    ("unigram", "xlm_roberta_mlm"),
    ("unigram", "albert_mlm"),
    ("unigram", "m2m100"),
    ("t5", "t5"),
    ("t5", "t5_untied"),
    ("clip", "distilbert_mlm"),
    ("clip", "electra"),
    ("word_level", "bert_mlm_untied"),
]
ALL = [(kind, family) for kind in TOKENIZERS for family in families()]
FURTHER = [
    ("unigram", "xlm"),
    ("wordpiece", "mobilebert"),
    ("byte_level", "deberta"),
    ("wordpiece", "mpnet"),
    ("unigram", "rembert"),
    ("unigram", "xlnet"),
    ("byte_level", "modernbert"),
    ("gpt2", "gpt_neox"),
    ("gpt2", "opt"),
    ("byte_fallback", "gemma"),
    ("gpt2", "mamba"),
]
SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in (*ALL, *FURTHER) if pair not in PAIRS]


def outputs(model, inputs: dict) -> torch.Tensor:
    inputs = {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        return model(**inputs).logits


def encode(tokenizer, texts: list[str]) -> dict:
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


def assert_same(old, new, kept: torch.Tensor) -> None:
    """Logits over a vocabulary are compared where it stayed. A head multiplies fewer rows, which may round
    otherwise."""
    if old.shape == new.shape:
        assert torch.equal(old, new)
    else:
        torch.testing.assert_close(new, old[..., kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "family"), [*PAIRS, *SLOW])
def test_kept_texts_are_cut_and_scored_as_before_also_after_reloading(kind, family, tokenizers, tmp_path):
    tokenizer = tokenizers(kind)
    model = tiny(family, tokenizer)
    before, file = {k: v.clone() for k, v in model.state_dict().items()}, tokenizer.backend_tokenizer.to_str()
    config = model.config.to_dict()
    small, cut, report = trim_vocabulary(model, tokenizer, DOMAIN, validation_texts=ELSEWHERE)

    assert tokenizer.backend_tokenizer.to_str() == file
    old_ids, new_ids = tokenizer.get_vocab(), cut.get_vocab()
    assert len(new_ids) < len(old_ids)
    assert report.rows_after == small.config.vocab_size == len(new_ids) < report.rows_before
    new_of = {old_ids[token]: i for token, i in new_ids.items()}
    kept = torch.tensor([old for old, _ in sorted(new_of.items(), key=lambda pair: pair[1])])
    assert list(kept) == sorted(kept)

    ours, theirs = encode(tokenizer, DOMAIN), encode(cut, DOMAIN)
    assert torch.equal(torch.tensor([[new_of[int(i)] for i in row] for row in ours["input_ids"]]), theirs["input_ids"])
    old = outputs(model, ours)
    assert_same(old, outputs(small, theirs), kept)

    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    small.save_pretrained(tmp_path)
    cut.save_pretrained(tmp_path)
    again, tokens = type(model).from_pretrained(tmp_path).eval(), type(tokenizer).from_pretrained(tmp_path)
    assert {name: p.shape for name, p in again.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert_same(old, outputs(again, encode(tokens, DOMAIN)), kept)
    assert again.config.uncut_parameters == report.parameters_before == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "word_level"])
def test_no_text_gains_an_unknown_token(kind, tokenizers):
    tokenizer = tokenizers(kind)
    _, cut, report = trim_vocabulary(tiny("bert", tokenizer), tokenizer, DOMAIN, validation_texts=ELSEWHERE)
    assert 0 < report.held_out.changed <= len(ELSEWHERE)
    assert report.held_out.lost == 0
    assert report.held_out.longest_growth > 0
    assert report.held_out.tokens_after > report.held_out.tokens_before
    for text in ELSEWHERE:
        assert cut.unk_token_id not in cut(text, add_special_tokens=False)["input_ids"]
        said = [t.decode(t(text, add_special_tokens=False)["input_ids"]).strip() for t in (tokenizer, cut)]
        assert said[0] == said[1]


def test_a_word_level_tokenizer_says_that_words_become_unknown(tokenizers, caplog):
    tokenizer = tokenizers("word_level")
    _, _, report = trim_vocabulary(tiny("bert", tokenizer), tokenizer, DOMAIN, validation_texts=ELSEWHERE)
    assert report.held_out.lost > 0
    assert "unknown token" in report.caution
    assert "unknown token" in caplog.text


@pytest.mark.parametrize("kind", ["wordpiece", "gpt2", "byte_fallback", "unigram"])
def test_every_single_character_and_byte_stays(kind, tokenizers):
    tokenizer = tokenizers(kind)
    _, cut, _ = trim_vocabulary(tiny("bert", tokenizer), tokenizer, [WORDS[0]])
    small = [t for t in tokenizer.get_vocab() if len(t.removeprefix("##")) == 1 or t.startswith("<0x")]
    assert len(small) > 10
    assert set(small) <= set(cut.get_vocab())
    # so whatever can be written is cut and put together again as before
    for text in ("zezeze", "moba", "li", WORDS[100]):
        said = [t.decode(t(text)["input_ids"], skip_special_tokens=True) for t in (tokenizer, cut)]
        assert said[0] == said[1]


def test_random_corpora_keep_random_texts(tokenizers):
    """The claim behind everything, against a slow oracle: texts whose tokens all stay are cut as before."""
    for kind in TOKENIZERS:
        tokenizer = tokenizers(kind)
        model = tiny("bert", tokenizer)
        for seed in range(5):
            texts = sentences(WORDS, 3, seed)
            _, cut, _ = trim_vocabulary(model, tokenizer, texts)
            kept, checked = set(cut.get_vocab()), 0
            for text in [*texts, *sentences(WORDS, 200, 100 + seed), *WORDS]:
                tokens = tokenizer.tokenize(text)
                if set(tokens) <= kept:
                    assert cut.tokenize(text) == tokens
                    checked += 1
            assert checked >= 3
