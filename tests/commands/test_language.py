"""compress and bench of language models, on plain text."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from optimum_rmtkd.commands.data import DataArguments
from optimum_rmtkd.commands.generation import compare_decoding
from optimum_rmtkd.commands.language import LanguageTask, is_plain_text, token_stream
from optimum_rmtkd.distillation.perplexity import Perplexity
from optimum_rmtkd.errors import RMTKDError

from .conftest import WORDS, sentence_rows, write_csv


def save_llama(folder, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    given = {"vocab_size": len(WORDS), "max_position_embeddings": 32, "initializer_range": 0.2, "pad_token_id": None}
    LlamaForCausalLM(LlamaConfig(**(sizes | given | changes))).save_pretrained(folder)
    return save_tokenizer(folder)


def save_tokenizer(folder, **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "eos_token": "[SEP]"} | special
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=32, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "train.jsonl"
    lines = [json.dumps({"story": row["sentence"], "number": i}) for i, row in enumerate(sentence_rows(200))]
    path.write_text("\n".join(lines) + "\n", encoding="utf8")
    return path


@pytest.fixture(scope="module")
def txt(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "train.txt"
    path.write_text("\n".join(row["sentence"] for row in sentence_rows(200)) + "\n\n", encoding="utf8")
    return path


@pytest.fixture
def compress(cli, llama, jsonl, tmp_path):
    def call(*args, model=None, **changes):
        options = {"--train-file": jsonl, "--text-column": "story", "--max-length": 16, "--form": "factored"}
        options |= {"--target-reduction": 0.3, "--min-width": 4, "--round-to": 4, "-o": tmp_path / "out"} | changes
        given = [part for pair in options.items() if pair[1] is not None for part in pair]
        return cli("compress", "--model", model or llama, *given, *args)

    return call


def test_a_causal_model_is_cut_and_its_perplexity_told(compress, tmp_path, jsonl):
    code, out, err = compress("--no-train")
    assert code == 0, err
    assert f"stays a causal language model: cut, distilled and measured on the texts in story of {jsonl}" in out
    (row,) = [line for line in out.splitlines() if line.startswith("perplexity")]
    before, after = (float(cell) for cell in row.split()[1:3])
    journal = json.loads((tmp_path / "out" / "rmtkd_stages.json").read_text())
    assert journal["metrics"]["before"]["eval_perplexity"] == pytest.approx(before, abs=1e-3)
    from transformers import AutoModelForCausalLM

    import optimum_rmtkd  # noqa: F401
    from optimum_rmtkd.distillation.perplexity import perplexity

    ids = [word for line in jsonl.read_text().splitlines() for word in (*json.loads(line)["story"].split(), "[SEP]")]
    ids = torch.tensor([WORDS.index(word) for word in ids])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert perplexity(again, ids[-round(0.1 * len(ids)) :], 16).value == pytest.approx(after, rel=1e-3)


def test_a_masked_model_on_lines_is_cut_and_distilled(compress, tmp_path, txt, bert):
    from transformers import BertForMaskedLM

    model = tmp_path / "mlm"
    shutil.copytree(bert, model)
    BertForMaskedLM.from_pretrained(bert).save_pretrained(model)
    options = {"--train-file": txt, "--text-column": None, "--form": "absorbed"}
    code, out, err = compress("--max-steps", 4, "--batch-size", 8, model=model, **options)
    assert code == 0, err
    journal = json.loads((tmp_path / "out" / "rmtkd_stages.json").read_text())
    assert journal["stages"][0]["metric_name"] == "eval_loss" and journal["reduction"] == pytest.approx(0.3, abs=0.05)
    assert "perplexity" in out


@pytest.mark.slow
def test_a_causal_model_is_distilled(compress, tmp_path, txt):
    options = {"--train-file": txt, "--text-column": None}
    code, out, err = compress("--max-steps", 20, "--batch-size", 8, "--logits-chunk", 5, **options)
    assert code == 0, err
    assert "perplexity" in out and json.loads((tmp_path / "out" / "rmtkd_stages.json").read_text())["stages"]


FAULTS = {
    "a column that is absent": ({"--text-column": "text"}, "has no column 'text'"),
    "beyond the positions": ({"--max-length": 64}, "has positions for 32 tokens"),
    "blocks of nothing": ({"--max-length": 4}, "at least 8 tokens"),
    "more blocks than there are": ({"--max-train-samples": 5000}, "--max-train-samples 5000 blocks"),
    "more calibration than there is": (
        {"--calibration-samples": 5000},
        "--calibration-samples 5000: the training text",
    ),
    "a metric of classifiers": ({"--metric": "f1"}, "measured by its perplexity"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_told_before_anything_is_computed(compress, tmp_path, fault, monkeypatch):
    monkeypatch.setattr("optimum_rmtkd.commands.language.LanguageTask.measure", lambda *_: pytest.fail("computed"))
    changes, told = FAULTS[fault]
    code, _, err = compress(**changes)
    assert code == 2 and told in err and not (tmp_path / "out").exists()


def test_faults_of_models(compress, tmp_path, llama, jsonl):
    no_eos = tmp_path / "no_eos"
    shutil.copytree(llama, no_eos)
    save_tokenizer(no_eos, eos_token=None)
    code, _, err = compress(model=no_eos)
    assert code == 2 and "has no eos token" in err
    quantised = tmp_path / "quantised"
    shutil.copytree(llama, quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (quantised / "config.json").write_text(json.dumps(config))
    code, _, err = compress(model=quantised)
    assert code == 2 and "quantised (gptq)" in err
    short = tmp_path / "short.txt"
    short.write_text("the film is great")
    code, _, err = compress(**{"--train-file": short, "--text-column": None})
    assert code == 2 and "The training text has 4 tokens; expected at least 32" in err
    code, _, err = compress("--trim-vocabulary")
    assert code == 2 and "Trim it first" in err


def test_a_table_is_for_a_classifier_unless_its_texts_are_named(compress, tmp_path, monkeypatch):
    monkeypatch.setattr("optimum_rmtkd.commands.language.LanguageTask.measure", lambda *_: pytest.fail("computed"))
    rows = [{"review": row["sentence"], "sentiment": "good"} for row in sentence_rows(40)]
    reviews = write_csv(tmp_path / "reviews.csv", rows)
    table = write_csv(tmp_path / "table.csv", sentence_rows(40))
    for file in (reviews, table):
        code, _, err = compress(**{"--train-file": file, "--text-column": None})
        assert code == 2 and "ForSequenceClassification" in err and "name its --text-column" in err
    for column in (None, "review"):
        code, _, err = compress("--fit", **{"--train-file": reviews, "--text-column": column})
        assert code == 2 and "No label column" in err and "Pass --label-column" in err


def test_which_tables_are_plain_text(tmp_path):
    one = str(write_csv(tmp_path / "one.csv", [{"story": "the film is great"}]))
    two = str(write_csv(tmp_path / "two.csv", [{"story": "the film is great", "mood": "good"}]))
    for fit in (False, True):
        assert is_plain_text(DataArguments(train_file=one), fit)
        assert not is_plain_text(DataArguments(train_file=two), fit)
        assert is_plain_text(DataArguments(train_file=two, text_column=["story", "mood"]), fit)
        assert is_plain_text(DataArguments(train_file=two, text_column=["story"]), fit) != fit
        assert not is_plain_text(DataArguments(train_file=one, label_column="label"), fit)


def test_blank_lines_belong_to_a_running_text(tmp_path):
    read = []

    def tokenizer(text, **_):
        read.append(text)
        return {"input_ids": [[1]] if isinstance(text, list) else [1]}

    path = tmp_path / "wiki.txt"
    path.write_text("\n = Title = \n\nthe film\n\n\nthe plot\n")
    list(token_stream([str(path)], {}, tokenizer))
    assert read[-1] == path.read_text()
    list(token_stream([str(path)], {}, tokenizer, "masked"))
    assert read[-1] == [" = Title = ", "the film", "the plot"]


def test_half_a_character_in_a_text_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "the film"}\n{"text": "great \\ud83d"}\n')
    with pytest.raises(RMTKDError, match=r"rows\.jsonl: a text holds half a character .'\\ud83d', behind 'great '"):
        list(token_stream([str(path)], {str(path): ["text"]}, lambda text, **_: {"input_ids": [[1]]}))


def test_a_model_is_measured_on_the_accelerator(monkeypatch):
    found = []

    def perplexity(model, *_, **__):
        found.append(next(model.parameters()).device.type)
        return Perplexity(1.0, 1)

    monkeypatch.setattr("optimum_rmtkd.distillation.perplexity.perplexity", perplexity)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("meta"))
    model = torch.nn.Linear(2, 2)
    LanguageTask(model, None, None, None, "causal", torch.arange(9), 8).measure(model, 1)
    assert found == ["meta"]


def test_decoding_behind_a_prompt_that_fills_the_positions():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval()
    inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    assert compare_decoding(model, model, inputs, repeats=1).before > 0


def test_bench_of_a_model_that_writes(llama, jsonl, tmp_path, cli, monkeypatch):
    from optimum_rmtkd.commands.bench import BenchOptions, compare

    monkeypatch.setattr("optimum_rmtkd.commands.bench.peak_memory", lambda *args: 1000)
    small = save_llama(tmp_path / "small", num_key_value_heads=2)
    texts = {"texts": [str(jsonl)], "text_column": ["story"], "window": 16, "text_tokens": 200}
    options = BenchOptions(batch_sizes=[2], lengths=[8], repeats=2, **texts)
    found = compare(str(llama), str(small), options)
    values, rows = {v["what"]: v for v in found["values"]}, {row[0]: row for row in found["rows"]}
    cache = values["cache, batch 2, length 8"]
    assert (cache["before"], cache["after"]) == (2 * 2 * 2 * 8 * 32 * 4, 2 * 2 * 2 * 8 * 16 * 4)
    assert values["perplexity"]["before"] > 1 and "e" not in rows["perplexity"][1]
    for name in ("prefill, batch 2, length 8", "decoding, batch 2, length 8"):
        assert values[name]["unit"] == "tokens/s" and values[name]["low"] <= values[name]["high"]
        assert rows[name][1].endswith("tokens/s")
    code, _, err = cli("bench", small, "--against", llama, "--texts", jsonl, "--window", 64)
    assert code == 2 and "at most 32 tokens" in err
