"""Ids of tokens in configs: which there are, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig


__all__ = ["configs_in", "renumber", "token_ids"]

ENDINGS = ("_token_id", "_token_ids", "_token_index", "_tokens_ids")
NAMES = frozenset(
    "suppress_tokens begin_suppress_tokens bad_words_ids force_words_ids forced_decoder_ids sequence_bias "
    "lang_to_id task_to_id lang_code_to_id bos_index eos_index pad_index unk_index mask_index image_start_id "
    "image_end_id image_patch_id slice_start_id slice_end_id im_start_id im_end_id im_newline_id".split()
)
Turn = Callable[[int], int]


def configs_in(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A config and all those inside it (text_config, decoder, ...)."""
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from configs_in(value)


def token_ids(config: PreTrainedConfig | GenerationConfig, rows: int) -> set[int]:
    """All ids below `rows` that a config names; -1 and ids of defaults beyond the table are none."""
    found: set[int] = set()

    def note(i: int) -> int:
        found.add(i)
        return i

    _turned(vars(config), note)
    return {i for i in found if 0 <= i < rows}


def renumber(config: PreTrainedConfig | GenerationConfig, new: Mapping[int, int]) -> None:
    """Put new ids in the place of old ones, in place; what `new` does not know stays."""
    for name, value in _turned(vars(config), lambda i: new.get(i, i)).items():
        setattr(config, name, value)


def _turned(fields: Mapping[str, Any], turn: Turn) -> dict[str, Any]:
    """The fields that name ids, with each id turned."""
    found = {}
    for name, value in fields.items():
        if not isinstance(name, str) or name.startswith("_"):
            continue
        if name.endswith(ENDINGS) or name in NAMES:
            found[name] = SPECIAL.get(name, _each)(value, turn)
        elif isinstance(value, dict) and (inside := _turned(value, turn)):  # task_specific_params
            found[name] = value | inside
    return found


def _each(value: Any, turn: Turn) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return turn(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_each(item, turn) for item in value)
    if isinstance(value, dict):
        return {key: _each(item, turn) for key, item in value.items()}
    return value


def _behind_positions(value: Any, turn: Turn) -> Any:
    """[[position, id], ...]"""
    return [[position, _each(i, turn)] for position, i in value] if value else value


def _with_bias(value: Any, turn: Turn) -> Any:
    """{ids: bias} or [[ids, bias], ...]"""
    if isinstance(value, dict):
        return {_each(ids, turn): bias for ids, bias in value.items()}
    return [[_each(ids, turn), bias] for ids, bias in value] if value else value


SPECIAL = {"forced_decoder_ids": _behind_positions, "sequence_bias": _with_bias}
