"""Arguments of `trim_vocabulary`: what stays, what is said, what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import optimum_rmtkd
from optimum_rmtkd import trim_vocabulary
from optimum_rmtkd.errors import BudgetError, RMTKDError, UnsupportedArchitectureError
from optimum_rmtkd.models import uncut_parameters
from optimum_rmtkd.vocabulary import VocabularyReport
from optimum_rmtkd.vocabulary.tokenizer import vocabulary_of

from .conftest import CORPUS, DOMAIN, ELSEWHERE, WORDS, tiny


@pytest.fixture
def bert(tokenizers):
    tokenizer = tokenizers("wordpiece")
    return tiny("bert", tokenizer), tokenizer


def test_texts_are_strings_pairs_rows_or_streams_of_them(bert):
    from datasets import Dataset

    half = len(DOMAIN) // 2
    pairs = list(zip(DOMAIN[:half], DOMAIN[half:]))
    forms = [
        DOMAIN,
        iter(DOMAIN),
        pairs,
        [text.split() for text in DOMAIN],
        [{"text": a, "label": 1, "messages": [{"role": "user", "content": b}]} for a, b in pairs],
        Dataset.from_dict({"a": [a for a, _ in pairs], "b": [b for _, b in pairs], "label": [0] * half}),
        Dataset.from_dict({"a": DOMAIN}).to_iterable_dataset(),
    ]
    found = [set(trim_vocabulary(*bert, texts)[1].get_vocab()) for texts in forms]
    user = set(bert[1].tokenize("user"))  # of the fifth form
    assert all(tokens | user == found[0] | user for tokens in found)


def test_counts_sizes_and_a_second_corpus(bert):
    model, tokenizer = bert
    everything = trim_vocabulary(model, tokenizer, CORPUS)[2]
    domain = trim_vocabulary(model, tokenizer, DOMAIN)[2]
    rare = trim_vocabulary(model, tokenizer, DOMAIN, min_count=15)[2]
    more = trim_vocabulary(model, tokenizer, DOMAIN, keep=(CORPUS, 200))[2]
    assert rare.rows_after < domain.rows_after < more.rows_after <= everything.rows_after <= everything.rows_before
    limited = trim_vocabulary(model, tokenizer, DOMAIN, keep=(CORPUS, 200), max_size=domain.rows_after)
    assert set(limited[1].get_vocab()) == set(trim_vocabulary(model, tokenizer, DOMAIN)[1].get_vocab())
    padded = trim_vocabulary(model, tokenizer, DOMAIN, pad_to_multiple_of=16)
    assert len(padded[1]) == padded[0].config.vocab_size == -(-domain.rows_after // 16) * 16


def test_always_names_tokens_words_and_ids(bert):
    model, tokenizer = bert
    kept = set(trim_vocabulary(model, tokenizer, DOMAIN)[1].get_vocab())
    word, other = [w for w in dict.fromkeys(WORDS) if tokenizer.tokenize(w) == [w] and w not in kept][:2]
    always = (word, tokenizer.convert_tokens_to_ids(other))
    assert {word, other} <= set(trim_vocabulary(model, tokenizer, DOMAIN, always=always)[1].get_vocab())


def test_added_special_and_chat_tokens_stay_and_keep_their_meaning(tokenizers):
    tokenizer = tokenizers("gpt2")
    tokenizer.add_tokens(["covid"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    turn = "{{ '<|im_start|>' + m['role'] + '\\n' }}{{ m['content'] }}<|im_end|>\nkelimonura"
    tokenizer.chat_template = "{% for m in messages %}" + turn + "{% endfor %}"
    model = tiny("gpt2", tokenizer)
    model.generation_config.suppress_tokens = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    small, cut, _ = trim_vocabulary(model, tokenizer, DOMAIN[:2])
    talk = [{"role": "user", "content": DOMAIN[0]}, {"role": "assistant", "content": DOMAIN[1]}]
    ours, theirs = (t.apply_chat_template(talk, tokenize=True, return_dict=False) for t in (tokenizer, cut))
    assert cut.convert_ids_to_tokens(theirs) == tokenizer.convert_ids_to_tokens(ours)
    assert small.generation_config.suppress_tokens == [cut.convert_tokens_to_ids("<|im_end|>")]
    assert cut.tokenize("covid") == ["covid"]
    assert cut.eos_token_id == small.config.eos_token_id == small.config.bos_token_id
    assert set(cut.all_special_tokens) == set(tokenizer.all_special_tokens)


def test_padding_and_truncation_of_the_file_and_its_templates_follow(bert):
    model, tokenizer = bert
    tokenizer.backend_tokenizer.enable_padding(length=12, pad_id=tokenizer.pad_token_id, pad_token="[PAD]")
    small, cut, _ = trim_vocabulary(model, tokenizer, DOMAIN)
    file = json.loads(cut.backend_tokenizer.to_str())
    assert file["padding"]["pad_id"] == cut.pad_token_id
    pair = [t.convert_ids_to_tokens(t(DOMAIN[0], DOMAIN[1])["input_ids"]) for t in (tokenizer, cut)]
    assert pair[0] == pair[1]
    assert pair[0][0] == "[CLS]"


def test_what_the_config_names_stays_and_follows(tokenizers):
    tokenizer = tokenizers("gpt2")
    model, odd = tiny("gpt2", tokenizer), len(tokenizer) - 1
    model.config.sep_token_id = odd
    model.generation_config.bad_words_ids = [[odd - 1, odd]]
    small, cut, _ = trim_vocabulary(model, tokenizer, DOMAIN[:1])
    assert cut.convert_ids_to_tokens(small.config.sep_token_id) == tokenizer.convert_ids_to_tokens(odd)
    named = small.generation_config.bad_words_ids[0]
    assert cut.convert_ids_to_tokens(named) == tokenizer.convert_ids_to_tokens([odd - 1, odd])


def test_an_id_of_padding_at_the_end_of_a_decoders_table_keeps_no_others(tokenizers):
    """Only models that count positions from it (RoBERTa) need all ids up to that of padding."""
    tokenizer = tokenizers("byte_fallback")
    tokenizer.add_special_tokens({"pad_token": "<the padding>"})
    model = tiny("llama", tokenizer, pad_token_id=tokenizer.pad_token_id)
    assert model.config.pad_token_id == len(tokenizer) - 1
    small, cut, report = trim_vocabulary(model, tokenizer, DOMAIN[:1])
    assert report.rows_after < report.rows_before and small.config.vocab_size == len(cut)
    assert cut.convert_ids_to_tokens(small.config.pad_token_id) == "<the padding>"


def test_ids_that_the_file_alone_names_stay(tokenizers):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tokenizers("gpt2")
    odd, pad = len(tokenizer) - 1, len(tokenizer) - 2
    odd_token, pad_token = tokenizer.convert_ids_to_tokens([odd, pad])
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=f"{odd_token} $A", special_tokens=[(odd_token, odd)])
    backend.enable_padding(pad_id=pad, pad_token=pad_token)
    kept = vocabulary_of(tokenizer).required()
    assert {odd, pad} <= kept


def test_rows_beyond_the_tokenizer_go(tokenizers):
    tokenizer = tokenizers("t5")
    model = tiny("t5", tokenizer, rows=len(tokenizer) + 28)
    small, cut, _ = trim_vocabulary(model, tokenizer, DOMAIN)
    assert small.config.vocab_size == len(cut) == small.get_output_embeddings().out_features


def test_what_users_put_on_a_model_comes_along(bert):
    model, tokenizer = bert
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    model.tag = "mine"
    model.train()
    small = trim_vocabulary(model.to(torch.bfloat16), tokenizer, DOMAIN)[0]
    assert small.tag == "mine" and small.training and small.dtype == torch.bfloat16
    assert not small.bert.embeddings.word_embeddings.weight.requires_grad
    assert small.bert.embeddings.word_embeddings.num_embeddings == small.config.vocab_size
    assert small.bert.config is small.config


def test_the_size_before_is_remembered_in_a_plain_config(bert, tmp_path):
    model, tokenizer = bert
    before = uncut_parameters(model)
    small, cut, report = trim_vocabulary(model, tokenizer, DOMAIN)
    again = trim_vocabulary(small, cut, DOMAIN[:3])[0]
    assert uncut_parameters(small) == uncut_parameters(again) == before == report.parameters_before
    again.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["uncut_parameters"] == before
    assert uncut_parameters(type(model).from_pretrained(tmp_path)) == before
    assert not hasattr(model.config, "uncut_parameters")


def test_the_report_is_plain_data_and_a_table(bert):
    _, _, report = trim_vocabulary(*bert, DOMAIN, validation_texts=ELSEWHERE)
    assert VocabularyReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert report.difference == 0.0
    assert report.removed_share == 1 - report.parameters_after / report.parameters_before
    assert f"{report.rows_after:,}" in report.table()
    assert f"{report.held_out.changed} of {len(ELSEWHERE)} held-out texts" in report.table()
    assert dataclasses.is_dataclass(report) and optimum_rmtkd.VocabularyReport is VocabularyReport


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"texts": "one text"}, "texts is a str; expected an iterable"),
        ({"texts": []}, "texts holds no text: expected at least one string, got nothing"),
        ({"texts": [[101, 2054, 102], {"label": 1}]}, "texts holds no text.* got 2 items without a string"),
        ({"texts": ["", " "]}, "texts holds no token: expected texts, got 2 strings that are empty or blank"),
        ({"keep": ([""], 5)}, "keep holds no token"),
        ({"texts": ["a", None]}, "Item 2 of texts is a NoneType"),
        ({"min_count": 0}, "min_count"),
        ({"max_size": 1.5}, "max_size"),
        ({"keep": ["a"]}, r"keep is a list of 1; expected a pair \(texts, n\)"),
        ({"keep": (CORPUS, 0)}, "expected at least 1"),
        ({"always": "word"}, "always is the string 'word'"),
        ({"always": ["Ж"]}, "always names 'Ж', which the tokenizer does not know"),
        ({"always": [10**6]}, "always names 1000000"),
        ({"always": [None]}, "always names None"),
        ({"always": [True]}, "always names True"),
        ({"validation_texts": iter(())}, "validation_texts holds no text"),
    ],
)
def test_wrong_arguments_are_named(bert, given, message):
    with pytest.raises(RMTKDError, match=message):
        trim_vocabulary(*bert, **({"texts": DOMAIN} | given))


def test_a_limit_too_small_is_refused(bert):
    with pytest.raises(BudgetError, match="rows stay in any case"):
        trim_vocabulary(*bert, DOMAIN, max_size=5)


def test_slow_tokenizers_and_foreign_ones_are_refused_by_name(bert, tmp_path):
    from transformers import CanineTokenizer

    model, tokenizer = bert
    with pytest.raises(RMTKDError, match="CanineTokenizer is a slow tokenizer"):
        trim_vocabulary(model, CanineTokenizer(), DOMAIN)
    with pytest.raises(RMTKDError, match="Expected a tokenizer of transformers, got str"):
        trim_vocabulary(model, "bert", DOMAIN)
    small = tiny("bert", tokenizer, rows=20, pad_token_id=0)
    with pytest.raises(RMTKDError, match="the table of BertForSequenceClassification has 20 rows"):
        trim_vocabulary(small, tokenizer, DOMAIN)


def test_models_without_a_table_or_with_another_than_their_config_says_are_refused(bert):
    from transformers import ViTConfig, ViTModel

    model, tokenizer = bert
    vit = ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(UnsupportedArchitectureError, match="ViTModel has no table of tokens"):
        trim_vocabulary(vit, tokenizer, DOMAIN)
    with pytest.raises(RMTKDError, match="Expected a transformers PreTrainedModel, got Linear"):
        trim_vocabulary(torch.nn.Linear(2, 2), tokenizer, DOMAIN)
    model.bert.embeddings.word_embeddings = torch.nn.Embedding(len(tokenizer) + 3, 32)
    with pytest.raises(UnsupportedArchitectureError, match="word_embeddings.weight of Bert.* its config"):
        trim_vocabulary(model, tokenizer, DOMAIN)


def test_a_model_that_does_more_with_ids_than_to_look_them_up_is_refused(tokenizers):
    tokenizer = tokenizers("wordpiece")

    class Counting(BertModel):
        def forward(self, input_ids=None, **kwargs):
            return super().forward(input_ids, position_ids=input_ids % 7, **kwargs)

    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(RMTKDError, match="Counting gives other outputs for the same tokens"):
        trim_vocabulary(Counting(config), tokenizer, DOMAIN)


def test_a_backend_of_its_own_in_a_plain_fast_tokenizer_is_trimmed(tokenizers):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers("wordpiece").backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    )
    _, cut, _ = trim_vocabulary(tiny("bert", tokenizer), tokenizer, DOMAIN)
    assert [cut.tokenize(text) for text in DOMAIN] == [tokenizer.tokenize(text) for text in DOMAIN]
