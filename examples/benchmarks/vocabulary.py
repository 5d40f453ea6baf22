"""What trimming a vocabulary removes, and what it costs.

    python examples/benchmarks/vocabulary.py sst2        a fine-tuned classifier on its own training rows
    python examples/benchmarks/vocabulary.py xlmr        a random model with a Unigram table of 250,002 rows
    python examples/benchmarks/vocabulary.py characters  whether BERT needs both forms of every character

Data and checkpoints are looked for in RMTKD_SHARED (default ../shared).
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaTokenizer,
)

from optimum_rmtkd import trim_vocabulary


SHARED = Path(os.environ.get("RMTKD_SHARED", "../shared"))
ROWS = 250_002
SAMPLE = 2000  # training rows whose logits are compared


def accuracy(model, tokenizer, rows: Dataset) -> tuple[float, torch.Tensor]:
    """Share of right answers, and the logits."""
    logits = []
    with torch.no_grad():
        for batch in rows.iter(64):
            logits.append(
                model(**tokenizer(batch["sentence"], padding=True, truncation=True, return_tensors="pt")).logits
            )
    found = torch.cat(logits)
    return float((found.argmax(-1) == torch.tensor(rows["label"])).float().mean()), found


def sst2() -> None:
    """Accuracy before and after, with different second corpora; logits of training rows."""
    folder = SHARED / "models/minilm_l6_sst2"
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, model_max_length=128)
    train, dev = (
        Dataset.from_parquet(str(SHARED / f"data/sst2_{split}.parquet")) for split in ("train", "validation")
    )
    sample = train.shuffle(seed=0).select(range(SAMPLE))
    before, _ = accuracy(model, tokenizer, dev)
    _, expected = accuracy(model, tokenizer, sample)
    print(f"before: {len(tokenizer):,} rows, accuracy {100 * before:.2f} %")
    other = Dataset.from_parquet(str(SHARED / "data/ag_news_sub_train.parquet"))
    texts = next(name for name, kind in other.features.items() if getattr(kind, "dtype", "") == "string")
    for what, options in (
        ("training rows", {}),
        ("training rows, min_count=3", {"min_count": 3}),
        ("training rows, the 15,000 most frequent tokens of AG News", {"keep": (other[texts], 15_000)}),
    ):
        start = time.perf_counter()
        small, tokens, report = trim_vocabulary(
            model, tokenizer, train["sentence"][:], validation_texts=dev["sentence"][:], **options
        )
        seconds = time.perf_counter() - start
        after, _ = accuracy(small, tokens, dev)
        _, logits = accuracy(small, tokens, sample)
        held = report.held_out
        moved = float((logits - expected).abs().max())
        unlike = int((logits != expected).any(-1).sum())
        print(
            f"{what}: {report.rows_after:,} rows, {report.removed_share:.1%} of all parameters gone in {seconds:.0f} "
            f"s, accuracy {100 * (after - before):+.2f} points; {held.changed} of {held.texts} dev texts changed, "
            f"{held.lost} unknown; logits of {unlike} of {SAMPLE:,} training rows differ, by {moved:.2g} at most"
        )


def xlmr() -> None:
    """Time and memory of trimming a table of XLM-R's size, random weights."""
    draw = random.Random(0)
    letters = [
        chr(code)
        for start, count in ((97, 26), (945, 25), (1072, 32), (0x4E00, 4000))
        for code in range(start, start + count)
    ]
    pieces = dict.fromkeys(["▁", *letters])
    while len(pieces) < ROWS - 5:
        piece = "".join(draw.choices(letters[:83], k=draw.randint(2, 7)))
        pieces[draw.choice(("▁", "")) + piece] = None
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    scored = [(piece, -8.0 - 10.0 * at / ROWS) for at, piece in enumerate(pieces)]
    tokenizer = XLMRobertaTokenizer(vocab=[*special, *scored, ("<mask>", 0.0)])
    words = [piece.removeprefix("▁") for piece in draw.sample(list(pieces), 20_000)]
    texts = [" ".join(draw.choices(words, k=12)) for _ in range(20_000)]
    model = XLMRobertaForMaskedLM(
        XLMRobertaConfig(vocab_size=ROWS, type_vocab_size=1, max_position_embeddings=514)
    ).eval()
    start = time.perf_counter()
    _, _, report = trim_vocabulary(model, tokenizer, texts, validation_texts=texts[:2000])
    print(report.table())
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f"{seconds:.0f} s, {peak:,.0f} MiB at most, with the model and its random start")


def characters() -> None:
    """How many of both forms of characters ("a" at the beginning of a word, "##a" inside it) any text can reach, and
    what becomes of words if those inside it stay only where the training rows use them."""
    backend = Tokenizer.from_file(str(SHARED / "models/minilm_l6_sst2/tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    model = json.loads(backend.to_str())
    vocab = model["model"]["vocab"]
    first = {piece for piece in vocab if len(piece) == 1}
    inside = {piece for piece in vocab if piece.startswith("##") and len(piece) == 3}
    reached = set()
    points = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for at in range(0, len(points), 5000):
        text = backend.normalizer.normalize_str("".join(f"a{point}a {point}a " for point in points[at : at + 5000]))
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(text):
            reached |= {word[0], *("##" + character for character in word[1:])}
    texts = Dataset.from_parquet(str(SHARED / "data/sst2_train.parquet"))["sentence"][:]
    names = {i: piece for piece, i in vocab.items()}
    used = {names[i] for row in backend.encode_batch_fast(texts, add_special_tokens=False) for i in row.ids}
    special = {token["content"] for token in model["added_tokens"]}
    kept = [*sorted(used | special | first, key=vocab.get)]
    model["model"]["vocab"] = {piece: i for i, piece in enumerate(kept)}
    model["added_tokens"] = [token | {"id": kept.index(token["content"])} for token in model["added_tokens"]]
    model["post_processor"] = None
    small = Tokenizer.from_str(json.dumps(model))
    words = ["a" + piece[2:] for piece in inside & reached - used]
    lost = sum("[UNK]" in small.encode(word).tokens and "[UNK]" not in backend.encode(word).tokens for word in words)
    print(
        f"{len(first)} characters at the beginning of a word and {len(inside)} inside it; no text reaches "
        f"{len(first - reached)} and {len(inside - reached)} of them. With those inside it only where they are used "
        f"{len(kept):,} rows stay instead of {len({*kept} | inside):,}, and of {len(words)} words of an a and one of "
        f"the others that can be reached {lost} become unknown"
    )


if __name__ == "__main__":
    {"sst2": sst2, "xlmr": xlmr, "characters": characters}[sys.argv[1]]()
