"""What trimming a vocabulary removes, and what it costs.

    python examples/benchmarks/vocabulary.py sst2        a fine-tuned classifier on its own training rows
    python examples/benchmarks/vocabulary.py xlmr        a random model with a Unigram table of 250,002 rows

Data and checkpoints are looked for in RMTKD_SHARED (default ../shared).
"""

from __future__ import annotations

import os
import random
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
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
    sample = train.shuffle(seed=0).select(range(512))
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
        print(
            f"{what}: {report.rows_after:,} rows, {report.removed_share:.1%} of all parameters gone in {seconds:.0f} "
            f"s, accuracy {100 * (after - before):+.2f} points; {held.changed} of {held.texts} dev texts changed, "
            f"{held.lost} unknown; the logits of training rows differ by {moved:.2g} at most"
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.perf_counter() - start:.0f} s, {peak:.1f} GiB at most, with the model and its random start")


if __name__ == "__main__":
    {"sst2": sst2, "xlmr": xlmr}[sys.argv[1]]()
