"""The examples around trainers of other libraries, started as a user starts them, on tiny models and tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from .workshop import ROOT, as_options, journal, start, weights


pytestmark = pytest.mark.slow

STEPS = {"max_steps": 10, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 5}
STEPS |= {"save_strategy": "no", "use_cpu": True, "report_to": "none", "disable_tqdm": True}
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "<sep>"}
WORDS = [f"w{number}" for number in range(40)]


def save_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL.values(), *WORDS]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **SPECIAL).save_pretrained(folder)
    return len(words)


def save_llama(folder: Path, width: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def sentences(samples: int, seed: int) -> list[list[str]]:
    """Counting on from a random word."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 40, (samples,), generator=generator).tolist()
    return [[WORDS[(start + k) % 40] for k in range(4 + start % 7)] for start in starts]


def save_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return path


def run(example: str, options: dict, folder: Path) -> str:
    done = start(ROOT / "examples" / f"{example}.py", as_options(STEPS | options), folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


@pytest.fixture
def texts(tmp_path):
    """Options of a script that name its tables."""
    return {
        f"{split}_file": save_rows(tmp_path / f"{split}.json", [{"text": " ".join(s)} for s in sentences(64, seed)])
        for seed, split in enumerate(("train", "validation"))
    }


def test_a_language_model_is_fine_tuned_cut_and_distilled(tmp_path, texts):
    pytest.importorskip("trl", reason="needs the extra trl")
    save_llama(tmp_path / "base", 64)
    out = tmp_path / "out"
    told = run("sft", {"model": tmp_path / "base", "output_dir": out, "max_length": 32} | texts, tmp_path)
    (stage,) = journal(out)["stages"]
    assert stage["step"] == 4, "the teacher is a base model that has not seen the data"
    assert journal(out)["reduction"] == pytest.approx(0.2, abs=0.05) and "removed " in told and "eval_loss" in told
    assert sum(tensor.numel() for tensor in weights(out).values()) == journal(out)["parameters_after"]


def test_a_language_model_learns_from_a_larger_one(tmp_path, texts):
    pytest.importorskip("trl", reason="needs the extra trl")
    save_llama(tmp_path / "base", 32)
    save_llama(tmp_path / "large", 64)
    out = tmp_path / "out"
    options = {"model": tmp_path / "base", "teacher": tmp_path / "large", "output_dir": out, "max_length": 32}
    told = run("sft", options | texts, tmp_path)
    assert "removed 0.0%" in told and not journal(out)["stages"]


def test_a_sentence_encoder_is_narrowed(tmp_path):
    st = pytest.importorskip("sentence_transformers", reason="needs the extra embeddings")
    from sentence_transformers.sentence_transformer import modules
    from transformers import BertConfig, BertModel

    inner = tmp_path / "inner"
    size = save_tokenizer(inner)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=size, max_position_embeddings=64, **sizes)).save_pretrained(inner)
    encoder = [modules.Transformer(str(inner)), modules.Pooling(64, "mean")]
    st.SentenceTransformer(modules=encoder, device="cpu").save(str(tmp_path / "encoder"))
    tables = {}
    for seed, split in enumerate(("train", "validation")):
        one, other = sentences(64, seed), sentences(64, seed + 5)
        rows = [
            {"sentence1": " ".join(a), "sentence2": " ".join(a[: i % 3] + b), "label": (i % 3) / 2}
            for i, (a, b) in enumerate(zip(one, other, strict=True))
        ]
        tables[f"{split}_file"] = save_rows(tmp_path / f"{split}.json", rows)
    out = tmp_path / "out"
    told = run("sentence_trainer", {"model": tmp_path / "encoder", "output_dir": out} | tables, tmp_path)
    assert journal(out)["reduction"] == pytest.approx(0.5, abs=0.05) and "dev_spearman_cosine" in told
    features = st.SentenceTransformer(str(out), device="cpu").encode("w1 w2").shape[-1]
    assert f"{features} features an embedding" in told


@pytest.mark.parametrize("unlabelled", [False, True])
def test_a_language_model_on_text(tmp_path, texts, unlabelled):
    save_llama(tmp_path / "base", 64)
    out, options = tmp_path / "out", {"form": "factored", "target_reduction": 0.2, "block_size": 16}
    options |= {"model": tmp_path / "base", "output_dir": out, "unlabelled": unlabelled}
    told = run("language_modeling", options | texts, tmp_path)
    figures = json.loads((out / "all_results.json").read_text())
    assert figures["reduction"] == pytest.approx(0.2, abs=0.05) and "after_perplexity" in told
    assert sum(tensor.numel() for tensor in weights(out).values()) == journal(out)["parameters_after"]


def test_a_masked_language_model_on_lines(tmp_path):
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    size = save_tokenizer(tmp_path / "base")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "base")
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    tokenizer.save_pretrained(tmp_path / "base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertForMaskedLM(BertConfig(vocab_size=size + 1, max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(" ".join(words) for words in sentences(256, 0)))
    out, options = tmp_path / "out", {"target_reduction": 0.3, "block_size": 16, "train_file": lines}
    options |= {"model": tmp_path / "base", "output_dir": out}
    told = run("language_modeling", options, tmp_path)
    assert journal(out)["reduction"] == pytest.approx(0.3, abs=0.05) and "after_perplexity" in told
    options = as_options(STEPS | options | {"unlabelled": True})
    refused = start(ROOT / "examples" / "language_modeling.py", options, tmp_path)
    assert refused.returncode == 2 and "--unlabelled: the words that a masked model guesses" in refused.stderr
