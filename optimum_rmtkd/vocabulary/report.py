"""What a trimming kept, and what it changed on texts that were not counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


__all__ = ["HeldOut", "VocabularyReport"]


def _known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in values.items() if name in names}


@dataclass(frozen=True)
class HeldOut:
    """Texts that were not counted, before and after.

    Attributes:
        texts: how many there are.
        changed: how many of them are cut into other tokens.
        tokens_before, tokens_after: of all of them, without special tokens.
        longest_growth: the most tokens that one of them gained.
        lost: unknown tokens that the texts gained.
    """

    texts: int
    changed: int
    tokens_before: int
    tokens_after: int
    longest_growth: int
    lost: int

    @property
    def changed_share(self) -> float:
        """Share of the texts that are cut into other tokens."""
        return self.changed / self.texts if self.texts else 0.0


@dataclass(frozen=True)
class VocabularyReport:
    """What `trim_vocabulary` did.

    Attributes:
        tokenizer: kind of the tokenizer's model: WordPiece, BPE, Unigram, WordLevel.
        texts: number of texts that were counted.
        rows_before, rows_after: of the table of tokens.
        used: tokens that occur in the texts often enough.
        required: rows that stay whatever the texts hold: special, added and chat-template tokens, single characters
            and bytes, what `always` and the config name, and their parts.
        left_out: those of the used tokens for which `max_size` had no room.
        parameters_before, parameters_after: of the whole model.
        held_out: what changes on the `validation_texts`; None without.
        caution: what may become the unknown token although it was not; None where nothing can.
        difference: largest difference of an output on one of the texts, over the largest output; None where the
            outputs were not compared.
        uncompared: why they were not.
        narrowed: whether the layers had been narrowed before.
    """

    tokenizer: str
    texts: int
    rows_before: int
    rows_after: int
    used: int
    required: int
    parameters_before: int
    parameters_after: int
    held_out: HeldOut | None = None
    caution: str | None = None
    difference: float | None = None
    uncompared: str | None = None
    left_out: int = 0
    narrowed: bool = False

    @property
    def removed_share(self) -> float:
        """Share of all parameters that went."""
        return 1 - self.parameters_after / self.parameters_before

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VocabularyReport:
        """The inverse of `to_dict`; what a later version wrote beside is left out."""
        held_out = values.get("held_out")
        known = _known(cls, values)
        return cls(**{**known, "held_out": HeldOut(**_known(HeldOut, held_out)) if held_out else None})

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, before, after) in words."""
        found = [
            ("rows of the token table", f"{self.rows_before:,}", f"{self.rows_after:,}"),
            ("parameters", f"{self.parameters_before:,}", f"{self.parameters_after:,}"),
        ]
        if (held := self.held_out) is not None:
            found += [
                (f"tokens in {held.texts:,} held-out texts", f"{held.tokens_before:,}", f"{held.tokens_after:,}"),
            ]
        return found

    def notes(self) -> list[str]:
        """Sentences about what was kept and what changes."""
        found = [
            f"{self.used:,} tokens occur in the {self.texts:,} texts; {self.required:,} rows stay whatever they hold",
            f"{self.removed_share:.1%} of all parameters are gone",
        ]
        if self.left_out:
            found.append(f"{self.left_out:,} tokens that occur in the texts went: there was no room for more rows")
        if (held := self.held_out) is not None:
            found.append(
                f"{held.changed:,} of {held.texts:,} held-out texts ({held.changed_share:.2%}) are cut into other "
                f"tokens, none grows by more than {held.longest_growth}; {held.lost:,} tokens became unknown"
            )
        if self.caution:
            found.append(f"caution: {self.caution}")
        if self.uncompared:
            found.append(f"the outputs of both models were not compared: {self.uncompared}")
        return found

    def table(self) -> str:
        """Plain text of several lines."""
        cells = [("", "before", "after"), *self.rows()]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        lines = [f"{a.ljust(widths[0])}  {b.rjust(widths[1])}  {c.rjust(widths[2])}".rstrip() for a, b, c in cells]
        return "\n".join([*lines, *self.notes()])
