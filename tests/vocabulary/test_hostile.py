"""Tokenizers and models with something unusual about them: each is trimmed as promised, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from optimum_rmtkd import trim_vocabulary
from optimum_rmtkd.errors import RMTKDError, UnsupportedArchitectureError
from optimum_rmtkd.vocabulary import texts as texts_module
from optimum_rmtkd.vocabulary.pieces import pieces_of
from optimum_rmtkd.vocabulary.texts import in_batches

from .conftest import BYTES, DOMAIN, ELSEWHERE, tiny


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def bert(tokenizer, rows: int | None = None, **changes) -> BertModel:
    return BertModel(BertConfig(vocab_size=rows or len(tokenizer), **SMALL, **changes)).eval()


def fast(model, **options) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


# -- texts ------------------------------------------------------------------------------------------------------------


def test_a_batch_ends_with_the_text_that_brings_its_characters(monkeypatch):
    monkeypatch.setattr(texts_module, "CHARACTERS", 10)
    monkeypatch.setattr(texts_module, "BATCH", 3)
    given = ["a", "b", "c", "d", "x" * 50, ["e" * 4, "f" * 4, "g" * 4], "h"]
    assert list(map(len, in_batches(given))) == [3, 2, 3, 1]
    assert [text for batch in in_batches(given) for text in batch] == [*given[:5], *given[5], "h"]


def test_a_frame_is_not_read_as_the_names_of_its_columns(tokenizers):
    import pandas as pd

    tokenizer = tokenizers("wordpiece")
    frame = pd.DataFrame({"text": DOMAIN})
    with pytest.raises(RMTKDError, match=r"texts is a DataFrame.*frame\['text'\]"):
        trim_vocabulary(bert(tokenizer), tokenizer, frame)
    found = [trim_vocabulary(bert(tokenizer), tokenizer, t)[1].get_vocab() for t in (frame["text"], np.array(DOMAIN))]
    assert found[0] == found[1] == trim_vocabulary(bert(tokenizer), tokenizer, DOMAIN)[1].get_vocab()


# -- limits -----------------------------------------------------------------------------------------------------------


def test_used_tokens_that_have_no_room_are_counted(tokenizers):
    tokenizer = tokenizers("wordpiece")
    model = bert(tokenizer)
    full = trim_vocabulary(model, tokenizer, DOMAIN)[2]
    cut = trim_vocabulary(model, tokenizer, DOMAIN, max_size=full.rows_after - 7)[2]
    assert (full.left_out, cut.left_out) == (0, 7)
    assert "7 tokens that occur in the texts went" in cut.table() and "went:" not in full.table()


def test_a_multiple_takes_no_used_token_away(tokenizers):
    tokenizer = tokenizers("wordpiece")
    model = bert(tokenizer)
    everything = list(tokenizer.get_vocab())
    with pytest.raises(RMTKDError, match=f"{len(tokenizer)} rows stay.*no multiple of 64 lies between"):
        trim_vocabulary(model, tokenizer, everything, always=everything, pad_to_multiple_of=64)


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_added_tokens_in_the_middle_and_normalizers_follow(tokenizers):
    """Special and plain added tokens among the pieces, one of them in capitals that the normalizer lowers."""
    vocab = {
        piece: i for i, piece in enumerate(["[UNK]", "a", "##a", "b", "##b", "<mid>", "ab", "abb", "ba", "[PAD]"])
    }
    tokenizer = fast(models.WordPiece(vocab, unk_token="[UNK]"), unk_token="[UNK]", pad_token="[PAD]")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.add_tokens(["<mid>", "New York"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    model = bert(tokenizer)
    small, cut, report = trim_vocabulary(model, tokenizer, ["AB <mid> Ａ"])
    assert report.rows_after == report.rows_before - 2  # abb and ba
    for text in ("AB<mid>new yorkab", "ａｂ <|end|> New York b"):
        ours, theirs = tokenizer(text)["input_ids"], cut(text)["input_ids"]
        assert cut.convert_ids_to_tokens(theirs) == tokenizer.convert_ids_to_tokens(ours)
        with torch.no_grad():
            out = [m(torch.tensor([i])).last_hidden_state for m, i in ((model, ours), (small, theirs))]
        assert torch.equal(*out)
    assert cut.tokenize("abb") == ["ab", "##b"]


def test_ids_of_every_post_processor_follow(tokenizers):
    tokenizer = tokenizers("gpt2")
    odd, token = len(tokenizer) - 1, tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    template = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, odd)]
    )
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    cut = trim_vocabulary(tiny("gpt2", tokenizer), tokenizer, DOMAIN[:1])[1]
    for args in ((DOMAIN[0],), (DOMAIN[0], DOMAIN[0])):
        ours, theirs = (t.convert_ids_to_tokens(t(*args)["input_ids"]) for t in (tokenizer, cut))
        assert ours == theirs and ours[0] == token


def test_an_id_that_only_the_post_processor_has_is_a_row_or_refused(tokenizers):
    tokenizer = tokenizers("gpt2")
    beyond = len(tokenizer) + 2
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(single="<odd> $A", special_tokens=[("<odd>", beyond)])
    with pytest.raises(RMTKDError, match=f"ids up to {beyond}"):
        trim_vocabulary(tiny("gpt2", tokenizer), tokenizer, DOMAIN[:1])
    small, cut, _ = trim_vocabulary(tiny("gpt2", tokenizer, rows=beyond + 1), tokenizer, DOMAIN[:1])
    assert cut(DOMAIN[0])["input_ids"][0] == small.config.vocab_size - 1


def test_truncation_and_padding_in_the_file_do_not_shorten_what_is_counted(tokenizers):
    tokenizer = tokenizers("wordpiece")
    free = set(trim_vocabulary(bert(tokenizer), tokenizer, DOMAIN)[1].get_vocab())
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=8, pad_id=tokenizer.pad_token_id, pad_token="[PAD]")
    assert set(trim_vocabulary(bert(tokenizer), tokenizer, DOMAIN)[1].get_vocab()) == free


def test_a_tokenizer_without_an_unknown_token_is_trimmed(tokenizers):
    """It ends in an error of its own where a text holds something unknown; the texts that it can cut are as before."""
    vocab = [("[PAD]", 0.0), ("a", -1.0), ("b", -1.5), ("ab", -1.7), ("ba", -9.0)]
    tokenizer = fast(models.Unigram(vocab), pad_token="[PAD]")
    small, cut, report = trim_vocabulary(bert(tokenizer), tokenizer, ["ab", "aZb"], validation_texts=["abab", "Z"])
    assert cut.tokenize("abab") == tokenizer.tokenize("abab") and report.held_out.lost == 0
    words = {piece: i for i, piece in enumerate(["[PAD]", "a", "##a", "b", "##b", "ab", "ba"])}
    tokenizer = fast(models.WordPiece(words, unk_token="[UNK]"), pad_token="[PAD]")
    _, cut, report = trim_vocabulary(bert(tokenizer), tokenizer, ["ab", "Z"])
    assert cut.tokenize("ab") == ["ab"] and report.rows_after == 6


def test_what_is_lost_is_counted_by_the_unknown_token_of_the_model(tokenizers):
    """The wrapper may name none, or another."""
    tokenizer = tokenizers("word_level")
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    assert plain.unk_token_id is None
    lost = [
        trim_vocabulary(bert(t), t, DOMAIN, validation_texts=ELSEWHERE)[2].held_out.lost for t in (tokenizer, plain)
    ]
    assert lost[0] == lost[1] > 0


def test_bytes_take_what_is_no_piece_and_the_caution_says_so():
    vocab = [["<unk>", 0.0], *([b, -20.0] for b in BYTES), ["a", -1.0], ["az", -2.0]]
    unigram = {"type": "Unigram", "vocab": vocab, "unk_id": 0}
    assert "1 pieces hold a character" in pieces_of(unigram).loses({0, *range(1, 257)})
    assert pieces_of(unigram | {"byte_fallback": True}).loses(set()) is None
    assert "pieces hold" in pieces_of(unigram | {"byte_fallback": True, "vocab": vocab[5:]}).loses(set())


def test_words_that_are_looked_up_whole_stay_where_a_character_would_be_lost():
    vocab = {piece: i for i, piece in enumerate(["<unk>", "a", "b", "ab", "az", "ba"])}
    model = {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]], "unk_token": "<unk>", "ignore_merges": True}
    assert pieces_of(model).fixed() == {0, 1, 2, 4}  # "z" is no piece; "ba" falls into "b" and "a"
    assert pieces_of(model | {"ignore_merges": False}).fixed() == {0, 1, 2}
    tokenizer = fast(models.BPE(vocab, [("a", "b")], unk_token="<unk>", ignore_merges=True), unk_token="<unk>")
    _, cut, report = trim_vocabulary(bert(tokenizer), tokenizer, ["ab"], validation_texts=["az", "ba", "abab"])
    assert cut.tokenize("az") == ["az"] and cut.tokenize("ba") == ["b", "a"] and report.held_out.lost == 0


def test_random_merges_are_refused(tokenizers):
    tokenizer = tokenizers("gpt2")
    tokenizer.backend_tokenizer.model.dropout = 0.3
    with pytest.raises(RMTKDError, match="leaves out merges at random .dropout is 0.3"):
        trim_vocabulary(tiny("gpt2", tokenizer), tokenizer, DOMAIN)


def test_always_takes_words_of_several_pieces_and_spaces(tokenizers):
    for kind in ("wordpiece", "gpt2", "byte_fallback", "unigram"):
        tokenizer = tokenizers(kind)
        word = next(w for w in ("zezebatokelisi", "vuvunonosi") if len(tokenizer.tokenize(w)) > 1)
        cut = trim_vocabulary(bert(tokenizer), tokenizer, DOMAIN[:1], always=[word, "bake limo"])[1]
        for text in (word, f"{DOMAIN[0]} {word}", "bake limo"):
            assert cut.tokenize(text) == tokenizer.tokenize(text)


# -- models -----------------------------------------------------------------------------------------------------------


def test_no_memory_is_told_as_such_and_not_as_other_inputs(tokenizers, monkeypatch):
    tokenizer = tokenizers("wordpiece")
    model = bert(tokenizer)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ):

        def forward(self, *args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(BertModel, "forward", forward)
        with pytest.raises(RMTKDError, match="No memory is left to compare the outputs of BertModel"):
            trim_vocabulary(model, tokenizer, DOMAIN)


def test_a_model_that_wants_more_than_ids_is_trimmed_and_the_report_says_that_nothing_was_compared(tokenizers):
    tokenizer = tokenizers("wordpiece")

    class Boxed(BertModel):
        def forward(self, input_ids=None, *, boxes, **kwargs):
            return super().forward(input_ids, **kwargs)

    _, _, report = trim_vocabulary(Boxed(bert(tokenizer).config), tokenizer, DOMAIN)
    assert report.difference is None and "boxes" in report.uncompared
    assert "were not compared: Boxed does not run on token ids alone" in report.table()


def test_an_adapter_is_refused_by_name(tokenizers):
    peft = pytest.importorskip("peft")
    tokenizer = tokenizers("wordpiece")
    config = peft.LoraConfig(target_modules=["query"])
    wrapped = peft.get_peft_model(bert(tokenizer), config)
    with pytest.raises(RMTKDError, match="got PeftModel.*merge_and_unload"):
        trim_vocabulary(wrapped, tokenizer, DOMAIN)
    model = bert(tokenizer)
    model._hf_peft_config_loaded = True  # as model.add_adapter leaves it, which needs a later PEFT
    with pytest.raises(UnsupportedArchitectureError, match="BertModel carries an adapter of PEFT"):
        trim_vocabulary(model, tokenizer, DOMAIN)
    merged = wrapped.merge_and_unload()
    assert trim_vocabulary(merged, tokenizer, DOMAIN)[2].difference == 0.0


def test_no_id_of_padding_and_lists_of_ids(tokenizers):
    tokenizer = tokenizers("gpt2")
    model = tiny("gpt2", tokenizer)
    model.config.pad_token_id, odd = None, len(tokenizer) - 1
    token = tokenizer.convert_ids_to_tokens(odd)
    model.generation_config.suppress_tokens = [-1, odd]
    model.generation_config.eos_token_id = [odd, 0]
    model.config.task_specific_params = {"x": {"decoder_start_token_id": odd}}
    small, cut, _ = trim_vocabulary(model, tokenizer, DOMAIN[:1])
    at = cut.convert_tokens_to_ids(token)
    assert small.config.pad_token_id is None
    assert small.generation_config.suppress_tokens == [-1, at]
    assert small.generation_config.eos_token_id == [at, 0]
    assert small.config.task_specific_params == {"x": {"decoder_start_token_id": at}}
    assert model.generation_config.suppress_tokens == [-1, odd]


def test_tables_of_nested_configs_and_ids_beside_them_follow(tokenizers):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = tokenizers("byte_fallback")
    odd = len(tokenizer) - 1
    token, size = tokenizer.convert_ids_to_tokens(odd), SMALL | {"num_hidden_layers": 1}
    text = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=2, **size)
    sight = CLIPVisionConfig(image_size=16, patch_size=8, **size)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=sight, image_token_index=odd))
    small, cut, report = trim_vocabulary(model.eval(), tokenizer, DOMAIN)
    assert small.config.text_config.vocab_size == small.get_output_embeddings().out_features == len(cut)
    assert small.config.image_token_index == cut.convert_tokens_to_ids(token)
    assert small.config.text_config.pad_token_id == small.model.language_model.config.pad_token_id == 2
    assert report.difference is not None and model.config.text_config.vocab_size == len(tokenizer)


def test_an_encoder_and_a_decoder_of_one_tokenizer_are_both_trimmed(tokenizers, tmp_path):
    from transformers import EncoderDecoderConfig, EncoderDecoderModel

    tokenizer = tokenizers("wordpiece")
    parts = [BertConfig(vocab_size=len(tokenizer), **SMALL) for _ in range(2)]
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.decoder_start_token_id, config.pad_token_id = tokenizer.cls_token_id, tokenizer.pad_token_id
    small, cut, report = trim_vocabulary(EncoderDecoderModel(config).eval(), tokenizer, DOMAIN)
    assert small.config.encoder.vocab_size == small.config.decoder.vocab_size == len(cut)
    assert not [name for name, p in small.named_parameters() if report.rows_before in p.shape]
    assert small.config.decoder_start_token_id == cut.cls_token_id
    small.save_pretrained(tmp_path)
    again = EncoderDecoderModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters(), strict=True))
