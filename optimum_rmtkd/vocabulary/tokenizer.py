"""The tokenizer with fewer tokens: everything in `tokenizers`' JSON that holds an id follows."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from ..errors import RMTKDError
from .pieces import Pieces, pieces_of


__all__ = ["Vocabulary", "vocabulary_of"]

ROLES = ("system", "user", "assistant", "tool", "developer")


class Vocabulary:
    """A tokenizer of `transformers` as `tokenizers`' JSON describes it.

    Attributes:
        tokenizer: the tokenizer, untouched.
        pieces: those of its model.
        added: {token: id} of the tokens added to the model's.
        names: {id: token} of all.
        written: ids that the post-processor and the padding of its file write.
        backend: a copy that neither cuts nor pads, and knows no error.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.json: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        self.pieces: Pieces = pieces_of(self.json["model"])
        self.added = {token["content"]: token["id"] for token in self.json["added_tokens"]}
        self.ids = self.pieces.ids | self.added
        self.names = {i: token for token, i in self.ids.items()}
        self.written = _ids_of(self.json["post_processor"])
        if self.json["padding"]:
            self.written.add(self.json["padding"]["pad_id"])
        bare = {"truncation": None, "padding": None, "model": self.pieces.counting()}
        self.backend = Tokenizer.from_str(json.dumps(self.json | bare))

    @property
    def size(self) -> int:
        """Highest id + 1."""
        return max(*self.names, *self.written, 0) + 1

    def needs(self, i: int) -> set[int]:
        """Ids of the pieces without which that of this id would not be built."""
        token = self.names.get(i)
        return self.pieces.needs(token) if token in self.pieces.ids else set()

    def required(self) -> set[int]:
        """Ids of special, added and chat-template tokens, single bytes and characters, and what the model needs."""
        special = set(self.tokenizer.all_special_ids) & set(self.names)
        said = self._of_texts(_template_texts(self.tokenizer))
        return self.pieces.fixed() | set(self.added.values()) | special | self.written | said

    def named(self, always: Iterable[str | int]) -> set[int]:
        """Ids of what a user names: an id, a token, or a text, all tokens of which stay, at the beginning of a text
        and behind a space.

        Raises:
            RMTKDError: an id or a text that the tokenizer does not know.
        """
        if isinstance(always, str):
            raise RMTKDError(f"always is the string {always!r}; expected a list of tokens, words or ids.")
        found: set[int] = set()
        for item in always:
            if isinstance(item, str):
                ids = self._of_texts([item, f" {item}"]) | ({self.ids[item]} if item in self.ids else set())
                known = bool(item) and (item in self.ids or (bool(ids) and self.pieces.unknown not in ids))
            else:
                known = type(item) is int and item in self.names
                ids = {item} if known else set()
            if not known:
                raise RMTKDError(
                    f"always names {item!r}, which the tokenizer does not know; expected its tokens, words made of "
                    f"them, or ids below {self.size}."
                )
            found |= ids
        return found

    def _of_texts(self, texts: Iterable[str]) -> set[int]:
        rows = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return {i for row in rows for i in row.ids}

    def trimmed(self, new: Mapping[int, int]) -> PreTrainedTokenizerBase:
        """A tokenizer of the tokens in `new` alone, {old id: new id}: as it loads once it is saved, since many classes
        compute more ids from those of their file.

        Raises:
            RMTKDError: `tokenizers` gives a token another id than the model's table will have for it.
        """
        changed = copy.copy(self.tokenizer)
        changed._tokenizer = Tokenizer.from_str(json.dumps(self._renumbered(new)))
        changed.init_kwargs = {k: v for k, v in self.tokenizer.init_kwargs.items() if k not in FROM_FILES}
        with tempfile.TemporaryDirectory() as folder:
            changed.save_pretrained(folder)
            made = type(self.tokenizer).from_pretrained(folder)
        made.init_kwargs["name_or_path"] = self.tokenizer.name_or_path
        for name in SET_LATER:
            setattr(made, name, getattr(self.tokenizer, name))
        backend = made.backend_tokenizer
        kept = [(token, new[i]) for token, i in self.ids.items() if i in new]
        wrong = [(token, i, backend.token_to_id(token)) for token, i in kept if backend.token_to_id(token) != i]
        if wrong or backend.get_vocab_size() != len(kept):
            token, expected, found = wrong[0] if wrong else ("(more tokens)", len(kept), backend.get_vocab_size())
            raise RMTKDError(
                f"{type(self.tokenizer).__name__} gives {token!r} the id {found} when it is loaded anew, where the "
                f"table has its row at {expected}: its class does not follow its files. Load it as "
                "PreTrainedTokenizerFast.from_pretrained(...) and trim that one."
            )
        return made

    def _renumbered(self, new: Mapping[int, int]) -> dict[str, Any]:
        changed = self.json | {"model": self.pieces.renumbered(new)}
        changed["added_tokens"] = [token | {"id": new[token["id"]]} for token in self.json["added_tokens"]]
        changed["post_processor"] = _with_ids(self.json["post_processor"], new)
        if self.json["padding"]:
            padding = self.json["padding"]
            changed["padding"] = padding | {"pad_id": new[padding["pad_id"]]}
        return changed


# what a tokenizer remembers of the files it was loaded from: they describe the old vocabulary
FROM_FILES = (
    "vocab",
    "merges",
    "vocab_file",
    "merges_file",
    "tokenizer_file",
    "tokenizer_object",
    "added_tokens_decoder",
)

# what users set on a tokenizer that is loaded, and files keep only in part
SET_LATER = (
    "name_or_path",
    "padding_side",
    "truncation_side",
    "model_max_length",
    "model_input_names",
    "split_special_tokens",
    "clean_up_tokenization_spaces",
)


def _with_ids(processor: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with its ids renumbered: of templates {"special_tokens": {name: {"ids"}}}, of BERT and RoBERTa
    {"cls": [token, id], "sep": [token, id]}, and of several in a sequence."""
    if not isinstance(processor, dict):
        return processor
    changed = dict(processor)
    for name in ("cls", "sep"):
        if isinstance(changed.get(name), list):
            token, i = changed[name]
            changed[name] = [token, new[i]]
    if isinstance(changed.get("special_tokens"), dict):
        changed["special_tokens"] = {
            name: part | {"ids": [new[i] for i in part["ids"]]} for name, part in changed["special_tokens"].items()
        }
    if isinstance(changed.get("processors"), list):
        changed["processors"] = [_with_ids(part, new) for part in changed["processors"]]
    return changed


def _ids_of(processor: Any) -> set[int]:
    """All ids in a post-processor."""
    found: set[int] = set()

    class Noted(dict):
        def __missing__(self, i: int) -> int:
            found.add(i)
            return i

    _with_ids(processor, Noted())
    return found


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """
    Raises:
        RMTKDError: no tokenizer, or one without a fast backend.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase) and getattr(tokenizer, "is_fast", False):
        return Vocabulary(tokenizer)
    name = type(tokenizer).__name__
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        raise RMTKDError(
            f"{name} is a slow tokenizer, written in Python: which pieces it needs is known to its code alone. "
            "Expected one with a backend of the library tokenizers (is_fast): convert it first, see "
            "transformers.convert_slow_tokenizer, and load the tokenizer.json that it gives."
        )
    inner = getattr(tokenizer, "tokenizer", None)
    cure = "Pass the tokenizer inside it, .tokenizer." if isinstance(inner, PreTrainedTokenizerBase) else ""
    raise RMTKDError(f"Expected a tokenizer of transformers, got {name}. {cure}".rstrip())


# -- chat templates ---------------------------------------------------------------------------------------------------


def _template_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """What chat templates write: their literals, the names of roles, and short conversations set in them."""
    templates = tokenizer.chat_template or {}
    templates = templates if isinstance(templates, dict) else {"default": templates}
    texts = []
    for template in templates.values():
        texts += _literals(template) + [role + ending for role in ROLES for ending in ("", "\n")]
        for roles in (("system", "user", "assistant"), ("user", "assistant"), ("user",)):
            talk = [{"role": role, "content": "."} for role in roles]
            try:
                texts.append(
                    tokenizer.apply_chat_template(
                        talk, chat_template=template, tokenize=False, add_generation_prompt=roles[-1] == "user"
                    )
                )
            except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
                continue  # a template may refuse such a conversation; its literals stay all the same
    return texts


def _literals(template: str) -> list[str]:
    try:
        tokens = list(jinja2.Environment(trim_blocks=True, lstrip_blocks=True).lex(template))
    except jinja2.TemplateSyntaxError:  # blocks of transformers' own ({% generation %}) are no errors here
        return [template]
    raw = [value[1:-1] for _, kind, value in tokens if kind == "string"]
    # as jinja2 reads them: "\\n" in a template is a line break
    strings = [text.encode("ascii", "backslashreplace").decode("unicode-escape") for text in raw]
    return strings + [value for _, kind, value in tokens if kind == "data"]
