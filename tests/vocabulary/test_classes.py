"""What classes of models and tokenizers keep beside their table."""

from __future__ import annotations

import pytest
import transformers
from tokenizers.processors import TemplateProcessing

from optimum_rmtkd import RMTKDError, trim_vocabulary

from .conftest import DOMAIN, tiny


BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4}
BART |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64}


@pytest.mark.parametrize("shared", [True, False])
def test_a_decoder_that_says_its_size_as_well_follows(tokenizers, shared):
    tokenizer = tokenizers("t5")
    sizes = dict.fromkeys(("vocab_size", "decoder_vocab_size"), len(tokenizer))
    ids = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "forced_eos_token_id": 1}
    kind = {"share_encoder_decoder_embeddings": shared, "tie_word_embeddings": shared}
    config = transformers.MarianConfig(**BART | sizes | ids | kind)
    small, _, report = trim_vocabulary(transformers.MarianMTModel(config).eval(), tokenizer, DOMAIN)
    assert small.config.decoder_vocab_size == small.config.vocab_size == report.rows_after < len(tokenizer)
    assert report.difference < 1e-5


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_classifier_that_reads_the_end_of_a_text_is_compared(tokenizers, family):
    tokenizer = tokenizers("byte_level" if family == "bart" else "t5")
    config = tiny(family, tokenizer).config
    cls = {"bart": transformers.BartForSequenceClassification, "t5": transformers.T5ForSequenceClassification}[family]
    _, _, report = trim_vocabulary(cls(config).eval(), tokenizer, DOMAIN)
    assert report.uncompared is None and report.difference < 1e-5


def test_a_post_processor_that_the_class_would_lose_is_refused(tokenizers):
    tokenizer = tokenizers("wordpiece")
    end = ("[CLS]", tokenizer.cls_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A [CLS]", "$A [CLS] $B [CLS]", [end])
    with pytest.raises(RMTKDError, match="(?s)BertTokenizer puts special tokens.*PreTrainedTokenizerFast"):
        trim_vocabulary(tiny("bert", tokenizer), tokenizer, DOMAIN)
    kept = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]")
    _, small, _ = trim_vocabulary(tiny("bert", kept), kept, DOMAIN)
    text = DOMAIN[0]
    assert small.convert_ids_to_tokens(small(text).input_ids) == kept.convert_ids_to_tokens(kept(text).input_ids)


def test_special_tokens_that_are_split_stay_split(tokenizers):
    tokenizer = tokenizers("wordpiece")
    tokenizer.split_special_tokens = True
    assert len(tokenizer.tokenize("[MASK] ba")) > 2
    _, small, _ = trim_vocabulary(tiny("bert", tokenizer), tokenizer, [*DOMAIN, "[MASK] ba"])
    assert small.tokenize("[MASK] ba") == tokenizer.tokenize("[MASK] ba")
