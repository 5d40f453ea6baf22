"""What a tokenizer's model says of its pieces, kind by kind, read from `tokenizers`' own JSON.

For each kind: which pieces stay whatever the texts hold, which others a piece needs, and the model with fewer pieces.
Each docstring argues why a text whose pieces all stay is cut as before.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

from ..errors import RMTKDError


__all__ = ["KINDS", "BPE", "Pieces", "Unigram", "WordLevel", "WordPiece", "pieces_of"]

BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how byte fallback names a byte


class Pieces:
    """The pieces of one tokenizer model.

    Args:
        model: the part "model" of the JSON of a `tokenizers.Tokenizer`.
    """

    def __init__(self, model: Mapping[str, Any]):
        self.model = model

    @cached_property
    def ids(self) -> dict[str, int]:
        """{piece: its id}."""
        return dict(self.model["vocab"])

    @cached_property
    def prefix(self) -> str:
        """What marks a piece that continues a word; "" where nothing does."""
        return self.model.get("continuing_subword_prefix") or ""

    def fixed(self) -> set[int]:
        """Ids of what stays: the unknown token, single bytes and characters, and what else no text may lose."""
        found = {i for piece, i in self.ids.items() if len(self.bare(piece)) == 1 or BYTE.fullmatch(piece)}
        return found if self.unknown is None else found | {self.unknown}

    @property
    def unknown(self) -> int | None:
        """Id of the piece that stands for what the model does not know; None where it has none."""
        return self.ids.get(self.model.get("unk_token"))

    @cached_property
    def has_all_bytes(self) -> bool:
        """Whether nothing is unknown, because what is no piece falls into bytes."""
        return bool(self.model.get("byte_fallback")) and all(f"<0x{i:02X}>" in self.ids for i in range(256))

    def bare(self, piece: str) -> str:
        """The text that a piece stands for, without the mark of its place in a word."""
        return piece[len(self.prefix) :] if self.prefix and piece.startswith(self.prefix) else piece

    def needs(self, piece: str) -> set[int]:
        """Ids of the pieces without which this one would not be built."""
        return set()

    def loses(self, apart: Collection[int]) -> str | None:
        """What may become unknown although it was not, in words; None where nothing can.

        Args:
            apart: ids of added tokens, which are found before a text is cut into pieces.
        """
        return None

    def counting(self) -> dict[str, Any]:
        """The JSON of the model with some piece for what is unknown where it has none, and would end in an error."""
        return dict(self.model)

    def renumbered(self, new: Mapping[int, int]) -> dict[str, Any]:
        """The JSON of the model with the pieces of `new` alone, {old id: new id}."""
        return {**self.model, "vocab": {piece: new[i] for piece, i in self.ids.items() if i in new}}


class WordLevel(Pieces):
    """One piece a word. There is nothing smaller: a word that goes becomes the unknown token."""

    def fixed(self) -> set[int]:
        if self.unknown is None:
            raise RMTKDError(
                "A word-level tokenizer without an unknown token (unk_token is "
                f"{self.model.get('unk_token')!r}) has nothing to stand for a word that goes: expected one in its "
                "vocabulary. Add it, or keep the vocabulary."
            )
        return super().fixed()

    def loses(self, apart: Collection[int]) -> str | None:
        return "a word-level tokenizer has no smaller pieces: every word that goes becomes the unknown token"


class WordPiece(Pieces):
    """Greedy: at each place of a word the longest piece that fits.

    Where the piece chosen before stays, it still is the longest, since the others only became fewer: a word whose
    pieces all stay is cut as before. Another word is never lost where each character of each piece is a piece by
    itself in the same role (at the beginning, or after it), since all of these stay. A piece with a character that is
    none stays as well.
    """

    @cached_property
    def _stranded(self) -> set[int]:
        """Ids of pieces with a character that is no piece of its own where it stands."""
        found = set()
        for piece, i in self.ids.items():
            bare, inner = self.bare(piece), piece != self.bare(piece)
            marks = [self.prefix if inner or at else "" for at in range(len(bare))]
            if any(mark + character not in self.ids for mark, character in zip(marks, bare, strict=True)):
                found.add(i)
        return found

    def fixed(self) -> set[int]:
        return super().fixed() | self._stranded

    def loses(self, apart: Collection[int]) -> str | None:
        # The longest piece is taken before it is known whether the rest can be cut: "ab" + "##cx" may become "a" +
        # "##bc", and then there is no "##x".
        return _stranded_words(len(self._stranded.difference(apart)))

    def counting(self) -> dict[str, Any]:
        return {
            **self.model,
            "unk_token": self.model["unk_token"] if self.unknown is not None else next(iter(self.ids)),
        }


class Unigram(Pieces):
    """The most probable path of pieces through a text (Viterbi).

    Without some pieces there are fewer paths. Let all pieces of the old best path stay. At each place on it the old
    step scored best, the earliest one among equals (a later one replaces it only if it is strictly better). Its own
    score is what it was, by induction along the path; those of the others can only have fallen: the old step wins
    again. Steps over unknown characters exist where no piece is that single character, and score the lowest score of
    all pieces minus a constant: single characters stay, and so does a piece of the lowest score.
    """

    @cached_property
    def ids(self) -> dict[str, int]:
        return {piece: i for i, (piece, _) in enumerate(self.model["vocab"])}

    @property
    def unknown(self) -> int | None:
        return self.model.get("unk_id")

    @cached_property
    def _stranded(self) -> set[int]:
        return {i for piece, i in self.ids.items() if any(character not in self.ids for character in piece)}

    def fixed(self) -> set[int]:
        scores = [score for _, score in self.model["vocab"]]
        lowest = min(range(len(scores)), key=scores.__getitem__)
        # Classes of transformers write the id of the unknown token into their code: it and those below it stay.
        below = set() if self.unknown is None else set(range(self.unknown + 1))
        return super().fixed() | self._stranded | below | {lowest}

    def loses(self, apart: Collection[int]) -> str | None:
        # Another path through the rest of the text may score better with such a character left over.
        return None if self.has_all_bytes else _stranded_words(len(self._stranded.difference(apart)))

    def counting(self) -> dict[str, Any]:
        return {**self.model, "unk_id": self.unknown or 0}

    def renumbered(self, new: Mapping[int, int]) -> dict[str, Any]:
        return {
            **self.model,
            "vocab": [entry for i, entry in enumerate(self.model["vocab"]) if i in new],
            "unk_id": None if self.unknown is None else new[self.unknown],
        }


def _stranded_words(count: int) -> str | None:
    if not count:
        return None
    return (
        f"{count} pieces hold a character that is no piece by itself; they stay, but a word with such a character may "
        "become the unknown token where other pieces of it go"
    )


class BPE(Pieces):
    """Characters (or bytes) of a word are merged, always the pair of the lowest rank first.

    A merge that is carried out within the span of a final piece is the one that would be carried out there if the
    piece stood alone: pairs across its ends never merge, and the pair of the lowest rank of all is that of the lowest
    rank in its span. So each piece has one derivation, wherever it occurs. It stays with all pieces and merges of its
    derivation (`needs`). Then in a text whose pieces all stay every merge that was carried out is there, and nothing
    competes with it that did not before: by induction over the steps it is cut as before. Words that are pieces
    themselves (`ignore_merges`) are looked up, before and after; those with a character that is no piece stay, since
    that character would be lost. Of all other pieces that are ever produced each character is a piece.

    Merges whose parts and result all stay are kept, whether a derivation uses them or not: a piece that goes then
    falls into the largest parts that the old merges allow.
    """

    @cached_property
    def suffix(self) -> str:
        """What marks the last piece of a word."""
        return self.model.get("end_of_word_suffix") or ""

    @cached_property
    def _merges(self) -> list[tuple[str, str]]:
        pairs = (tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in self.model["merges"])
        return [(left, right) for left, right in pairs]

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        ranks: dict[tuple[str, str], int] = {}
        for rank, pair in enumerate(self._merges):
            ranks[pair] = rank  # of a pair named twice the last rank counts, as in `tokenizers`
        return ranks

    @cached_property
    def _makers(self) -> dict[str, list[tuple[str, str]]]:
        makers: dict[str, list[tuple[str, str]]] = {}
        for pair in self._ranks:
            makers.setdefault(self._merged(*pair), []).append(pair)
        return makers

    def fixed(self) -> set[int]:
        if self.model.get("dropout"):
            raise RMTKDError(
                f"The tokenizer leaves out merges at random (dropout is {self.model['dropout']}): which tokens a text "
                "has cannot be told. Expected none: tokenizer.backend_tokenizer.model.dropout = None."
            )
        looked_up = self.ids.items() if self.model.get("ignore_merges") and not self.has_all_bytes else ()
        stranded = {i for piece, i in looked_up if any(s not in self.ids for s in self._symbols(piece))}
        return super().fixed() | stranded

    def counting(self) -> dict[str, Any]:
        return {**self.model, "unk_token": None if self.unknown is None else self.model["unk_token"]}

    def _merged(self, left: str, right: str) -> str:
        return left + (right[len(self.prefix) :] if self.prefix else right)

    def bare(self, piece: str) -> str:
        piece = super().bare(piece)
        return piece[: -len(self.suffix)] if self.suffix and piece.endswith(self.suffix) else piece

    def _symbols(self, piece: str) -> list[str]:
        """Where the derivation of a piece begins: its characters with the marks of their places."""
        symbols = list(self.bare(piece))
        inner = bool(self.prefix) and piece.startswith(self.prefix)
        symbols = [self.prefix + s if self.prefix and (inner or at) else s for at, s in enumerate(symbols)]
        if symbols and self.suffix and piece.endswith(self.suffix):
            symbols[-1] += self.suffix
        return symbols

    def needs(self, piece: str) -> set[int]:
        symbols, made = self._symbols(piece), set()
        while True:
            # one merge at a time, as in `tokenizers`: it may make a pair of a lower rank than the same merge elsewhere
            ranks = [self._ranks.get(pair, len(self._merges)) for pair in zip(symbols, symbols[1:])]
            best = min(ranks, default=len(self._merges))
            if best == len(self._merges):
                break
            at = ranks.index(best)
            symbols[at : at + 2] = [self._merged(symbols[at], symbols[at + 1])]
            made.add(self.ids[symbols[at]])
        return made if symbols == [piece] else self._any_way(piece)

    def _any_way(self, piece: str) -> set[int]:
        """All that may lead to a piece which its own characters do not give: it is made of bytes, or never by
        merging."""
        found, todo = set(), [piece]
        while todo:
            for pair in self._makers.get(todo.pop(), ()):
                fresh = [part for part in pair if part in self.ids and self.ids[part] not in found]
                found.update(self.ids[part] for part in fresh)
                todo += fresh
        return found

    def renumbered(self, new: Mapping[int, int]) -> dict[str, Any]:
        def stays(*pieces: str) -> bool:
            return all(self.ids.get(piece) in new for piece in pieces)

        merges = [[left, right] for left, right in self._merges if stays(left, right, self._merged(left, right))]
        return {**super().renumbered(new), "merges": merges}


KINDS: dict[str, type[Pieces]] = {kind.__name__: kind for kind in (BPE, Unigram, WordLevel, WordPiece)}


def pieces_of(model: Mapping[str, Any]) -> Pieces:
    """
    Args:
        model: the part "model" of the JSON of a `tokenizers.Tokenizer`.

    Raises:
        RMTKDError: a kind of model that is not known.
    """
    kind = KINDS.get(model.get("type", ""))
    if kind is None:
        raise RMTKDError(
            f"The tokenizer's model is of the kind {model.get('type')!r}; expected one of {', '.join(KINDS)}. A "
            "vocabulary of another kind cannot be trimmed."
        )
    return kind(model)
