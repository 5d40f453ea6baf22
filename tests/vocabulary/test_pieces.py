"""What each kind of tokenizer model needs, by hand."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, models

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.vocabulary.pieces import pieces_of


def numbered(*pieces: str) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(pieces)}


def names(pieces, ids) -> set[str]:
    of = {i: piece for piece, i in pieces.ids.items()}
    return {of[i] for i in ids}


def bpe(vocab: dict[str, int], merges: list, **more):
    return pieces_of({"type": "BPE", "vocab": vocab, "merges": merges, **more})


def test_a_piece_keeps_the_derivation_that_is_carried_out():
    vocab = numbered("a", "b", "c", "ab", "bc", "abc", "bca")
    pieces = bpe(vocab, [["b", "c"], ["a", "b"], ["ab", "c"], ["a", "bc"], ["bc", "a"]])
    # "ab" + "c" has the lower rank, but "b" + "c" was merged before it could come about
    assert names(pieces, pieces.needs("abc")) == {"bc", "abc"}
    assert names(pieces, pieces.needs("bca")) == {"bc", "bca"}
    assert pieces.needs("a") == set()
    assert names(pieces, pieces.fixed()) == {"a", "b", "c"}


def test_marks_of_places_in_a_word_are_part_of_a_derivation():
    pieces = bpe(numbered("a", "b", "b</w>", "ab</w>", "ab"), [["a", "b</w>"], ["a", "b"]], end_of_word_suffix="</w>")
    assert names(pieces, pieces.needs("ab</w>")) == {"ab</w>"}
    assert names(pieces, pieces.fixed()) == {"a", "b", "b</w>"}
    pieces = bpe(
        numbered("a", "##b", "##c", "##bc", "abc"), [["##b", "##c"], ["a", "##bc"]], continuing_subword_prefix="##"
    )
    assert names(pieces, pieces.needs("abc")) == {"##bc", "abc"}


def test_a_piece_that_its_characters_do_not_give_keeps_all_that_may_lead_to_it():
    pieces = bpe(numbered("<0xE2>", "<0x82>", "x", "<0xE2><0x82>"), [["<0xE2>", "<0x82>"]], byte_fallback=True)
    assert names(pieces, pieces.needs("<0xE2><0x82>")) == {"<0xE2>", "<0x82>"}
    assert {"<0xE2>", "<0x82>"} <= names(pieces, pieces.fixed())


def test_merges_among_the_kept_stay_in_their_order_and_no_others():
    pieces = bpe(numbered("a", "b", "c", "ab", "bc", "abc"), ["b c", "a b", "ab c", "a bc"])
    small = pieces.renumbered({0: 0, 1: 1, 2: 2, 3: 3, 5: 4})
    assert small["vocab"] == {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
    assert small["merges"] == [["a", "b"], ["ab", "c"]]


@pytest.mark.parametrize("seed", range(20))
def test_random_merges_keep_every_word_whose_pieces_stay(seed):
    """Against `tokenizers` itself: any merges in any order, several ways to a piece, any set that is closed under
    `needs`."""
    draw = random.Random(seed)
    vocab, merges = list("abcd"), []
    while len(merges) < 40:
        left, right = draw.choice(vocab), draw.choice(vocab)
        if len(left + right) <= 6 and [left, right] not in merges:
            merges.append([left, right])
            vocab += [left + right] if left + right not in vocab else []
    draw.shuffle(merges)
    pieces = bpe(numbered(*vocab), merges)
    old = Tokenizer(models.BPE(pieces.ids, [tuple(pair) for pair in merges]))
    words = ["".join(draw.choices("abcd", k=draw.randint(1, 9))) for _ in range(400)]
    cut = {word: old.encode(word).tokens for word in words}
    wanted = {piece for word in words[:8] for piece in cut[word]}
    kept = pieces.fixed() | {pieces.ids[p] for p in wanted}
    kept |= {i for p in wanted for i in pieces.needs(p)}
    new = {i: n for n, i in enumerate(sorted(kept))}
    small = pieces.renumbered(new)
    now = Tokenizer(models.BPE(small["vocab"], [tuple(pair) for pair in small["merges"]]))
    same = [word for word in words if all(pieces.ids[p] in kept for p in cut[word])]
    assert len(same) >= 8
    assert [now.encode(word).tokens for word in same] == [cut[word] for word in same]
    assert len(small["vocab"]) < len(vocab)
    assert all("".join(now.encode(word).tokens) == word for word in words)


def test_word_pieces_keep_both_roles_of_a_character_and_pieces_with_a_missing_one():
    pieces = pieces_of(
        {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "vocab": numbered("[UNK]", "a", "##a", "b", "##b", "ab", "##ab", "ax", "##xa", "ba"),
        }
    )
    assert names(pieces, pieces.fixed()) == {"[UNK]", "a", "##a", "b", "##b", "ax", "##xa"}
    assert "2 pieces" in pieces.loses({0})


def test_a_unigram_model_keeps_its_lowest_score_and_all_up_to_the_unknown_token():
    vocab = [
        ["<pad>", 0.0],
        ["<x>", 0.0],
        ["<unk>", 0.0],
        ["a", -3.0],
        ["b", -3.0],
        ["ab", -9.0],
        ["ba", -4.0],
        ["az", -5.0],
    ]
    pieces = pieces_of({"type": "Unigram", "vocab": vocab, "unk_id": 2})
    assert names(pieces, pieces.fixed()) == {"<pad>", "<x>", "<unk>", "a", "b", "ab", "az"}
    small = pieces.renumbered({i: n for n, i in enumerate([0, 1, 2, 3, 4, 5, 7])})
    assert [piece for piece, _ in small["vocab"]] == ["<pad>", "<x>", "<unk>", "a", "b", "ab", "az"]
    assert small["unk_id"] == 2


@pytest.mark.parametrize("seed", range(10))
def test_random_unigrams_keep_every_text_whose_pieces_stay(seed):
    """Scores with many ties, and characters that are unknown."""
    draw = random.Random(seed)
    found = dict.fromkeys("abc") | dict.fromkeys("".join(draw.choices("abc", k=draw.randint(2, 5))) for _ in range(40))
    vocab = [["<unk>", 0.0], *([piece, -float(draw.randint(1, 4))] for piece in found)]
    pieces = pieces_of({"type": "Unigram", "vocab": vocab, "unk_id": 0})
    old = Tokenizer(models.Unigram([tuple(entry) for entry in vocab], 0))
    texts = ["".join(draw.choices("abcz", (8, 8, 8, 1), k=draw.randint(1, 12))) for _ in range(400)]
    kept = pieces.fixed() | {i for text in texts[:4] for i in old.encode(text).ids}
    small = pieces.renumbered({i: n for n, i in enumerate(sorted(kept))})
    now = Tokenizer(models.Unigram([tuple(entry) for entry in small["vocab"]], small["unk_id"]))
    same = [text for text in texts if set(old.encode(text).ids) <= kept]
    assert len(same) >= 4 and len(kept) < len(vocab)
    assert [now.encode(text).tokens for text in same] == [old.encode(text).tokens for text in same]


def test_an_unknown_kind_and_words_without_an_unknown_token_are_refused():
    with pytest.raises(RMTKDError, match="'Magic'; expected one of BPE"):
        pieces_of({"type": "Magic"})
    with pytest.raises(RMTKDError, match="without an unknown token"):
        pieces_of({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}).fixed()
