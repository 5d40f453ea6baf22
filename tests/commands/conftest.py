"""A tiny classifier with a tokenizer, tables of sentences, and a way to call optimum-cli in this process."""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

import pytest


NOUNS = "film plot cast score ending song scene idea story actor".split()
GOOD = "great lovely fine warm bright funny clever moving fresh sweet".split()
BAD = "awful dull poor cold dark boring silly weak stale bitter".split()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "is", "and", *NOUNS, *GOOD, *BAD]


def sentence_rows(count: int, seed: int = 0) -> list[dict]:
    """Sentences such as "the film is great and warm" with label 1 for praise, 0 otherwise."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = GOOD if i % 2 else BAD
        text = f"the {draw.choice(NOUNS)} is {' and '.join(draw.choices(words, k=draw.randint(1, 3)))}"
        rows.append({"sentence": text, "label": i % 2})
    return rows


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """Tables are cached by datasets: keep that out of the user's cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def save_bert(folder: Path, vocabulary: int = len(WORDS), **changes) -> Path:
    """A random BERT of 2 layers, width 32, and the tokenizer of `WORDS`."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    torch.manual_seed(0)
    options = {"label2id": {"negative": 0, "positive": 1}, "id2label": {0: "negative", 1: "positive"}}
    options |= {"hidden_size": 32, "intermediate_size": 64} | changes
    config = BertConfig(
        vocab_size=vocabulary,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,
        **options,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf8")
    BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


def save_vit(folder: Path) -> Path:
    """A random ViT for images of a cat, a dog or a fish, and its processor."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    names = ("fish", "dog", "cat")
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> Path:
    return save_vit(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def table(tmp_path_factory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table") / "train.csv", sentence_rows(96))


@pytest.fixture(scope="session")
def validation_table(tmp_path_factory) -> Path:
    return write_csv(tmp_path_factory.mktemp("table") / "validation.csv", sentence_rows(40, seed=1))


@pytest.fixture
def cli(monkeypatch, capsys):
    """Call `optimum-cli rmtkd ARGS` in this process; returns (exit code, stdout, stderr)."""

    def call(*args) -> tuple[int, str, str]:
        from optimum.commands import optimum_cli

        monkeypatch.setattr(sys, "argv", ["optimum-cli", "rmtkd", *map(str, args)])
        code = 0
        try:
            optimum_cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return call
