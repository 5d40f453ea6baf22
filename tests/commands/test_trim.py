"""`optimum-cli rmtkd trim` and `compress --trim-vocabulary`."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from .conftest import BAD, GOOD, NOUNS, sentence_rows, write_csv


@pytest.fixture
def letters(tmp_path):
    """A tiny model whose tokenizer has every letter, so that no word is lost."""
    import string

    from transformers import BertTokenizer

    from .conftest import WORDS, save_bert

    words = [*WORDS, "zebra", *string.ascii_lowercase, *(f"##{c}" for c in string.ascii_lowercase)]
    save_bert(tmp_path / "model", vocabulary=len(words))
    (tmp_path / "model" / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf8")
    (tmp_path / "model" / "tokenizer.json").unlink()
    BertTokenizer(vocab=str(tmp_path / "model" / "vocab.txt"), model_max_length=32).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_trim_writes_a_plain_model_its_tokenizer_and_a_card(cli, letters, tmp_path):
    (tmp_path / "corpus.txt").write_text("the film is great\n\nthe plot is dull\n", encoding="utf8")
    held_out = write_csv(tmp_path / "dev.csv", sentence_rows(20))
    out = tmp_path / "out"
    code, said, err = cli(
        "trim",
        letters,
        "--texts",
        tmp_path / "corpus.txt",
        "--validation-texts",
        held_out,
        "--always",
        "warm",
        "-o",
        out,
    )
    assert code == 0, err
    tokens = set(AutoTokenizer.from_pretrained(out).get_vocab())
    assert {"the", "film", "is", "great", "plot", "dull", "warm"} <= tokens
    assert not tokens & ({*NOUNS, *GOOD, *BAD} - {"film", "great", "plot", "dull", "warm"})
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.model_type == "bert" and model.config.vocab_size == len(tokens)
    assert "auto_map" not in model.config.to_dict() and not list(out.glob("*.py"))
    results = json.loads((out / "rmtkd_results.json").read_text())
    assert results["vocabulary"]["rows_after"] == len(tokens)
    assert f"{len(tokens):,}" in said and "of 20 held-out texts" in said
    card = (out / "README.md").read_text()
    assert "BertForSequenceClassification.from_pretrained" in card and "narrowed" not in card
    assert f"{len(tokens):,} after" in card
    code, _, err = cli("report", out)
    assert code == 0, err


def test_trim_takes_tables_columns_and_a_second_corpus(cli, letters, tmp_path):
    rows = [
        {"a": "the film", "b": "great", "c": "awful", "label": 1},
        {"a": "the plot", "b": "warm", "c": "dull", "label": 0},
    ]
    table = write_csv(tmp_path / "rows.csv", rows)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    (tmp_path / "more.txt").write_text("boring boring silly\n", encoding="utf8")
    more = ("--keep-texts", tmp_path / "more.txt", "--keep-size", 1)
    code, _, err = cli("trim", letters, "--texts", table, "--text-column", "a", "b", *more, "-o", tmp_path / "one")
    assert code == 0, err
    tokens = set(AutoTokenizer.from_pretrained(tmp_path / "one").get_vocab())
    assert {"film", "plot", "great", "warm", "boring"} <= tokens and not {"awful", "dull", "silly"} & tokens
    code, _, err = cli("trim", letters, "--texts", tmp_path / "rows.jsonl", "-o", tmp_path / "two")
    assert code == 0, err
    assert {"film", "great", "awful", "dull"} <= set(AutoTokenizer.from_pretrained(tmp_path / "two").get_vocab())


def test_trim_takes_a_decoder(cli, tmp_path):
    from ..vocabulary.conftest import DOMAIN, gpt2, tiny

    tokenizer = gpt2()
    tiny("gpt2", tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "corpus.txt").write_text("\n".join(DOMAIN), encoding="utf8")
    code, _, err = cli("trim", tmp_path / "model", "--texts", tmp_path / "corpus.txt", "-o", tmp_path / "out")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "out")) < len(tokenizer)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "No texts: pass --texts"),
        (("--texts", "missing.txt"), "missing.txt: no such file"),
        (("--texts", "film.doc"), "unknown kind of file '.doc'"),
        (("--texts", "film.txt", "--keep-size", "3"), "--keep-texts and --keep-size belong together"),
        (("--texts", "rows.csv", "--text-column", "nope"), "has no column 'nope'; it has a, label"),
        (("--texts", "film.txt", "--min-count", "0"), "--min-count"),
        (("--texts", "film.txt", "--max-size", "3"), "rows stay in any case"),
    ],
)
def test_wrong_options_end_in_one_line_and_no_folder(cli, bert, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "film.txt").write_text("the film\n", encoding="utf8")
    (tmp_path / "film.doc").write_text("the film\n", encoding="utf8")
    write_csv(tmp_path / "rows.csv", [{"a": "the film", "label": 1}, {"a": "x", "label": 2}])
    code, out, err = cli("trim", bert, *args, "-o", tmp_path / "out")
    assert code == 2 and message in err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_compress_trims_first_and_counts_both(cli, letters, tmp_path):
    table = write_csv(tmp_path / "train.csv", sentence_rows(60))
    out = tmp_path / "out"
    size = ("--target-reduction", 0.5, "--round-to", 1, "--min-width", 4, "--no-train", "--trim-vocabulary")
    data = ("--train-file", table, "--validation-file", table)
    code, said, err = cli("compress", "--model", letters, *data, *size, "-o", out)
    assert code == 0, err
    results = json.loads((out / "rmtkd_results.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(out)
    before, after = results["parameters"]
    assert after == sum(p.numel() for p in model.parameters()) == pytest.approx(before / 2, rel=0.05)
    assert results["vocabulary"]["parameters_before"] == before
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(out)) < results["vocabulary"]["rows_before"]
    assert "rows of the token table" in said and "## Vocabulary" in (out / "README.md").read_text()


def test_trimming_a_narrowed_folder_keeps_its_record_and_tells_the_order(cli, letters, tmp_path):
    """Two trimmings behind a cut: sizes count from the uncut model, and each is told."""
    import shutil

    table = write_csv(tmp_path / "train.csv", sentence_rows(60))
    data = ("--train-file", table, "--validation-file", table)
    size = ("--target-reduction", 0.3, "--round-to", 1, "--min-width", 4, "--no-train")
    code, _, err = cli("compress", "--model", letters, *data, *size, "-o", tmp_path / "small")
    assert code == 0, err
    (tmp_path / "corpus.txt").write_text("the film is great\n", encoding="utf8")
    code, said, err = cli("trim", tmp_path / "small", "--texts", table, "-o", tmp_path / "trimmed")
    assert code == 0, err
    shutil.rmtree(tmp_path / "small")
    code, _, err = cli("trim", tmp_path / "trimmed", "--texts", tmp_path / "corpus.txt", "-o", tmp_path / "again")
    assert code == 0, err

    assert "removed of the uncut model" in said
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    results = json.loads((tmp_path / "again" / "rmtkd_results.json").read_text())
    uncut = sum(p.numel() for p in AutoModelForSequenceClassification.from_pretrained(letters).parameters())
    assert results["base_model"] == "model" and results["metric"]["name"] == "accuracy"
    assert results["parameters"] == [uncut, sum(p.numel() for p in model.parameters())]
    assert results["vocabulary"]["narrowed"] and len(results["earlier_vocabularies"]) == 1
    assert results["earlier_vocabularies"][0]["rows_after"] == results["vocabulary"]["rows_before"]
    assert results["bytes"][0] > results["bytes"][1]
    for file in ("rmtkd_stages.json", "rmtkd_spectra.json", "rmtkd_recipe.json"):
        assert (tmp_path / "again" / file).is_file()
    card = (tmp_path / "again" / "README.md").read_text()
    assert card.count("After the layers were narrowed, tokens") == 2 and "Before any layer" not in card
    assert f"| parameters | {uncut:,} |" in card and "## Stages" in card
    assert card.index("rmtkd compress") < card.index("rmtkd trim OUT")
    assert "again" in card and "AutoModelForSequenceClassification.from_pretrained" in card
    code, _, err = cli("report", tmp_path / "again")
    assert code == 0, err


def test_a_trimmed_folder_trimmed_again_counts_from_the_first(cli, letters, tmp_path):
    table = write_csv(tmp_path / "train.csv", sentence_rows(60))
    (tmp_path / "corpus.txt").write_text("the film is great\n", encoding="utf8")
    assert cli("trim", letters, "--texts", table, "-o", tmp_path / "one")[0] == 0
    code, _, err = cli("trim", tmp_path / "one", "--texts", tmp_path / "corpus.txt", "-o", tmp_path / "two")
    assert code == 0, err
    one, two = (json.loads((tmp_path / n / "rmtkd_results.json").read_text()) for n in ("one", "two"))
    assert two["base_model"] == one["base_model"] == "model"
    assert two["parameters"][0] == one["parameters"][0] and two["parameters"][1] < one["parameters"][1]
    assert (tmp_path / "two" / "README.md").read_text().count("rows of the token table") == 2


def test_the_other_modules_of_sentence_transformers_come_along(cli, letters, tmp_path):
    modules = [{"idx": i, "name": str(i), "path": path, "type": "x"} for i, path in enumerate(("", "1_P", "2_N"))]
    (letters / "modules.json").write_text(json.dumps(modules))
    (letters / "config_sentence_transformers.json").write_text("{}")
    (letters / "1_P").mkdir()
    (letters / "1_P" / "config.json").write_text('{"pooling_mode": "mean"}')
    (tmp_path / "corpus.txt").write_text("the film is great\n", encoding="utf8")
    args = ("--texts", tmp_path / "corpus.txt")
    code, _, err = cli("trim", letters, *args, "-o", tmp_path / "out")
    assert code == 0, err
    for file in ("modules.json", "config_sentence_transformers.json", "1_P/config.json"):
        assert (tmp_path / "out" / file).read_text() == (letters / file).read_text()
    assert (tmp_path / "out" / "2_N").is_dir()
    (letters / "modules.json").write_text(json.dumps([modules[0], {"path": "../../elsewhere"}]))
    code, _, err = cli("trim", letters, *args, "-o", tmp_path / "two")
    assert code == 2 and "a module lies elsewhere" in err


@pytest.mark.slow
def test_a_trimmed_sentence_encoder_is_one(cli, letters, tmp_path):
    import numpy as np

    st = pytest.importorskip("sentence_transformers")
    st.SentenceTransformer(str(letters)).save(str(tmp_path / "encoder"))
    (tmp_path / "corpus.txt").write_text("the film is great\n", encoding="utf8")
    code, _, err = cli("trim", tmp_path / "encoder", "--texts", tmp_path / "corpus.txt", "-o", tmp_path / "out")
    assert code == 0, err
    old, new = (st.SentenceTransformer(str(tmp_path / n)).encode(["the film is great"]) for n in ("encoder", "out"))
    assert np.array_equal(old, new)


def test_compress_refuses_to_trim_for_images(cli, tmp_path):
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    for name in ("LABEL_0", "LABEL_1"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / "data" / name / f"{i}.png")
    data = ("--train-file", tmp_path / "data", "--validation-file", tmp_path / "data", "--target-reduction", 0.3)
    code, _, err = cli("compress", "--model", tmp_path / "vit", *data, "--trim-vocabulary", "-o", tmp_path / "out")
    assert code == 2 and "--trim-vocabulary is for texts" in err
