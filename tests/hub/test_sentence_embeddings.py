"""The example that distils a sentence encoder without labels."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from optimum_rmtkd import RMTKDConfig

from ..conftest import ROOT


def run(*arguments) -> str:
    script = ROOT / "examples" / "sentence_embeddings.py"
    quiet = ("--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True", "--use_cpu")
    done = subprocess.run([sys.executable, script, *map(str, arguments), *quiet], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_few_steps(tmp_path):
    pytest.importorskip("scipy")
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    from ..commands.conftest import WORDS, sentence_rows, write_csv

    torch.manual_seed(0)
    body = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, **body)).save_pretrained(
        tmp_path / "dense"
    )
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf8")
    BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"), model_max_length=32).save_pretrained(tmp_path / "dense")
    texts = [row["sentence"] for row in sentence_rows(60)]
    write_csv(tmp_path / "texts.csv", [{"sentence": text} for text in texts])
    pairs = [{"a": a, "b": b, "score": i % 5 + 0.5} for i, (a, b) in enumerate(zip(texts, reversed(texts)))]
    write_csv(tmp_path / "pairs.csv", pairs)
    data = ("--train_files", tmp_path / "texts.csv", "--pairs_file", tmp_path / "pairs.csv")
    RMTKDConfig(round_to=4, min_width=4).to_json_file(tmp_path / "recipe.json")
    size = ("--target-reduction", 0.5, "--recipe", tmp_path / "recipe.json", "--max_steps", 3)
    said = run("--model", tmp_path / "dense", *data, *size, "--output_dir", tmp_path / "out")
    removed, width = re.search(r"removed ([\d.]+)%, embedding width (\d+)", said).groups()
    assert abs(float(removed) - 50) < 2 and int(width) <= 32
    assert re.search(r"Spearman -?[\d.]+ -> -?[\d.]+", said)
    if (tmp_path / "out" / "sentence-transformers").is_dir():
        from sentence_transformers import SentenceTransformer

        import optimum_rmtkd  # noqa: F401

        encoder = SentenceTransformer(str(tmp_path / "out" / "sentence-transformers"), device="cpu")
        assert encoder.encode(["the film is great"]).shape == (1, int(width))


@pytest.mark.slow
def test_half_the_encoder_keeps_the_correlation(shared, tmp_path):
    pytest.importorskip("scipy")
    data = (
        "--train_files",
        shared / "data/stsb_train.parquet",
        "--pairs_file",
        shared / "data/stsb_validation.parquet",
    )
    training = ("--num_train_epochs", 2, "--learning_rate", 5e-4, "--per_device_train_batch_size", 64)
    schedule = ("--lr_scheduler_type", "linear", "--warmup_steps", 20, "--target-reduction", 0.5)
    model = ("--model", shared / "models/all_minilm_l6_v2", "--output_dir", tmp_path / "out")
    said = run(*model, *data, *training, *schedule)
    before, after = map(float, re.search(r"Spearman ([\d.]+) -> ([\d.]+)", said).groups())
    assert float(re.search(r"removed ([\d.]+)%", said)[1]) >= 49.5
    assert before - after <= 1.5, said
