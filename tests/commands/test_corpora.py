"""Texts of files: one after the other, packed or not, in little memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pytest

from optimum_rmtkd.commands import streams
from optimum_rmtkd.commands.corpora import check_texts, text_columns, texts_of
from optimum_rmtkd.errors import RMTKDError

from .hostile import parquet


ROWS = [{"a": "the film", "b": 'says "no"', "n": 1}, {"a": "the plot", "b": "two\nlines", "n": 2}]
CSV = 'a,b,n\nthe film,"says ""no""",1\nthe plot,"two\nlines",2\n'


def texts(path, columns=None) -> list:
    check_texts([str(path)])
    return list(texts_of([str(path)], text_columns([str(path)], columns)))


def written(path, text: str):
    path.write_bytes((gzip.compress if path.suffix == ".gz" else bytes)(text.encode()))
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("rows.csv", CSV),
        ("rows.csv.gz", CSV),
        ("rows.tsv", CSV.replace(",", "\t")),
        ("rows.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("rows.jsonl.gz", "\n\n" + "\n\n".join(map(json.dumps, ROWS)) + "\n"),
        ("lines.json", "\n".join(map(json.dumps, ROWS))),
        ("list.json", json.dumps(ROWS)),
        ("pretty.json", "\n " + json.dumps(ROWS, indent=2)),
        ("columns.json", json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]})),
        ("columns.json.gz", json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}, indent=1)),
    ],
)
def test_every_form_of_a_table_gives_the_same_texts(tmp_path, monkeypatch, name, text):
    monkeypatch.setattr(streams, "CHUNK", 7)  # no element of a list fits
    path = written(tmp_path / name, text)
    assert texts(path) == ["the film", 'says "no"', "the plot", "two\nlines"]
    assert texts(path, ["b"]) == ['says "no"', "two\nlines"]
    with pytest.raises(RMTKDError, match="has no column 'x'; it has a, b, n"):
        text_columns([str(path)], ["x"])


def test_bytes_of_a_parquet_file_that_are_no_text(tmp_path):
    parquet(tmp_path / "rows.parquet", [0, 1], texts=[b"the film", b"gr\xe9at"])
    with pytest.raises(RMTKDError, match=r"rows\.parquet: it is no UTF-8 text .byte 0xe9"):
        texts(tmp_path / "rows.parquet")


def test_parquet_gives_its_strings_and_named_nested_columns(tmp_path):
    from datasets import Dataset

    talk = [[{"role": "user", "content": "hello"}], []]
    Dataset.from_list(ROWS).add_column("talk", talk).to_parquet(str(tmp_path / "rows.parquet"))
    assert texts(tmp_path / "rows.parquet") == ["the film", 'says "no"', "the plot", "two\nlines"]
    assert texts(tmp_path / "rows.parquet", ["talk"]) == talk[:1]
    with pytest.raises(RMTKDError, match="column 'n' holds no texts"):
        text_columns([str(tmp_path / "rows.parquet")], ["n"])


def test_lines_are_texts_and_blank_ones_pass_by(tmp_path):
    for name in ("a.txt", "a.txt.gz"):
        assert texts(written(tmp_path / name, "\ufeffone\r\n\r\ntwo")) == ["one", "two"]


def test_numbers_of_a_csv_are_texts_where_they_are_named(tmp_path):
    path = written(tmp_path / "rows.csv", "a,n\nx,1\nNA,2\n7,\n")
    assert texts(path) == ["x", "NA", "7"]
    assert texts(path, ["n"]) == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "a,b\nx,y\nz\n", "line 3 ends a row of 1 fields"),
        ("a.csv", "a,b\n1,2\n", "no column holds texts"),
        ("a.csv", "a,b\n", "holds no rows"),
        ("a.jsonl", '{"a": "x"}\n{"a": \n', "line 2 is no JSON"),
        ("a.jsonl", '{"a": "x"}\n[1]\n', "row 2 is a list; expected an object"),
        ("a.json", '[{"a": "x"}, {"a": ]', "row 2 is no JSON"),
        ("a.json", '[{"a": "x"}] more', "something follows the end of its list"),
        ("a.json", '{"a": ["x"], "b": ["x", "y"]}', "differ in length"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", "[" * 5000, "nested too deeply"),
        ("a.txt.gz", "", "is empty"),
        ("a.doc.gz", "x", "unknown kind of file '.doc'"),
        ("a.parquet.gz", "x", "unknown kind of file '.parquet'"),
    ],
)
def test_what_cannot_be_read_is_said_before_a_text_is_used(tmp_path, name, text, message):
    path = written(tmp_path / name, text)
    with pytest.raises(RMTKDError, match=message):
        check_texts([str(path)])
        text_columns([str(path)])


def test_a_file_that_is_not_packed_as_it_says_is_named(tmp_path):
    for suffix in (".gz", ".bz2", ".xz"):
        (tmp_path / f"a.txt{suffix}").write_text("plain\n")
        with pytest.raises(RMTKDError, match=f"Cannot read .*a.txt{suffix}"):
            check_texts([str(tmp_path / f"a.txt{suffix}")])
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b'{"a": "x"}\n' * 5000)[:-20])
    with pytest.raises(RMTKDError, match="Cannot read .*cut.jsonl.gz"):
        text_columns([str(cut)])


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "list.json"])
def test_a_table_is_never_held_in_memory(tmp_path, name):
    rows = [{"a": f"text number {i} " * 10} for i in range(30_000)]  # more than 5 MB
    if name.endswith("csv"):
        text = "a\n" + "\n".join(row["a"] for row in rows)
    else:
        text = json.dumps(rows) if name.startswith("list") else "\n".join(map(json.dumps, rows))
    path = written(tmp_path / name, text)
    del rows, text
    tracemalloc.start()
    found = text_columns([str(path)])
    read = sum(1 for _ in texts_of([str(path)], found))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == 30_000 and path.stat().st_size > 5e6
    assert peak < 4e6
