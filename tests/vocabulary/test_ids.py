"""Ids in configs follow."""

from __future__ import annotations

from transformers import BertConfig, GenerationConfig, LlamaConfig

from optimum_rmtkd.vocabulary.ids import configs_in, renumber, token_ids


NEW = {0: 0, 3: 1, 5: 2, 7: 3, 9: 4}


def test_every_form_of_an_id_follows_and_nothing_else_does():
    config = GenerationConfig(
        pad_token_id=0,
        eos_token_id=[5, 9],
        decoder_start_token_id=3,
        forced_bos_token_id=7,
        suppress_tokens=[-1, 5],
        begin_suppress_tokens=[9],
        bad_words_ids=[[3, 5], [9]],
        sequence_bias=[[[5, 7], -2.0]],
        max_length=5,
        num_beams=3,
        top_k=7,
    )
    config.forced_decoder_ids = [[1, 5], [3, None]]
    config.lang_to_id = {"<|de|>": 7}
    config.no_timestamps_token_id = 9
    assert token_ids(config, 10) == {0, 3, 5, 7, 9}
    renumber(config, NEW)
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, [2, 4], 1)
    assert (config.forced_bos_token_id, config.suppress_tokens, config.begin_suppress_tokens) == (3, [-1, 2], [4])
    assert (config.bad_words_ids, config.sequence_bias) == ([[1, 2], [4]], [[[2, 3], -2.0]])
    assert (config.forced_decoder_ids, config.lang_to_id) == ([[1, 2], [3, None]], {"<|de|>": 3})
    assert config.no_timestamps_token_id == 4
    assert (config.max_length, config.num_beams, config.top_k) == (5, 3, 7)


def test_defaults_beyond_the_table_are_no_ids_of_it():
    config = LlamaConfig(vocab_size=10, pad_token_id=-1, eos_token_id=50256, bos_token_id=3)
    assert token_ids(config, 10) == {3}
    renumber(config, NEW)
    assert (config.pad_token_id, config.eos_token_id, config.bos_token_id) == (-1, 50256, 1)


def test_configs_inside_and_ids_of_tasks_are_found():
    config = BertConfig(vocab_size=10, pad_token_id=5)
    config.task_specific_params = {"summarization": {"decoder_start_token_id": 9, "max_length": 5}}
    config.text_config = BertConfig(vocab_size=10, pad_token_id=7)
    assert len(list(configs_in(config))) == 2
    assert token_ids(config, 10) >= {5, 9}
    renumber(config, NEW)
    assert config.task_specific_params == {"summarization": {"decoder_start_token_id": 4, "max_length": 5}}
