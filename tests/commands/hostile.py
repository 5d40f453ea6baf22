"""Data files as users have them by accident, or as somebody else means harm: how they are made, and what is said."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from .conftest import sentence_rows


GOOD = "sentence,label\n" + "".join(f"{row['sentence']},{row['label']}\n" for row in sentence_rows(40))
JUNK = random.Random(0).randbytes(5000)
DEEP = 100_000


def zipped() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("train.csv", GOOD)
    return stream.getvalue()


def table(*cells: str) -> bytes:
    """A csv of these two-column rows, five times over."""
    return ("sentence,label\n" + 5 * "".join(f"{cell}\n" for cell in cells)).encode()


def objects(*labels: str) -> bytes:
    return ("[" + ",".join(f'{{"sentence": "the film", "label": {label}}}' for label in labels) + "]").encode()


HOSTILE = {
    "zip.csv": (zipped(), "it is a zip archive"),
    "gzip.csv": (gzip.compress(GOOD.encode()), "it is a gzip file"),
    "gzip.json": (gzip.compress(b"[]"), "it is a gzip file"),
    "parquet.csv": (b"PAR1" + JUNK, "it is a parquet file"),
    "junk.csv": (JUNK, "it is a binary file"),
    "junk.tsv": (JUNK, "it is a binary file"),
    "junk.json": (JUNK, "it is a binary file"),
    "junk.parquet": (JUNK, "its first bytes do not"),
    "broken.parquet": (b"PAR1" + JUNK + b"PAR1", "Cannot read"),
    "cut.parquet": (b"PAR1" + JUNK, "Cannot read"),
    "deep.json": (b"[" * DEEP, "nested too deeply"),
    "deep_object.json": (b'{"a":' * DEEP, "nested too deeply"),
    "deep_cell.json": (objects("[" * 5000 + "]" * 5000), "nested too deeply"),
    "deep.jsonl": (b'{"sentence": "a", "label": 0}\n' + b'{"a":' * DEEP, "nested too deeply"),
    "latin1.csv": (GOOD.replace("great", "gr\xe9").encode("latin1") + b"\xe9", "no UTF-8 text (byte 0xe9)"),
    "latin1_late.jsonl": (b'{"sentence": "a", "label": 0}\n' * 500 + b'{"sentence": "\xe9"}\n', "no UTF-8 text"),
    "utf16.csv": (GOOD.encode("utf16"), "UTF-16"),
    "empty.csv": (b"", "is empty"),
    "blank.csv": (b"\n\n\n", "is empty"),
    "header.csv": (b"sentence,label\n", "holds no rows"),
    "open_quote.csv": (b'sentence,label\n"the film,1\nthe cast,0\n', "line 3 is not quoted"),
    "swallowed.csv": (b'sentence,label\n"the film,0\nthe "best" cast,1\n', "line 3 is not quoted"),
    "nul.csv": (table("the film,1") * 200 + b"the \0 cast,1\n", "NUL byte"),
    "zeros.csv": (table("the film,007", "the cast,001"), "--label-map 001="),
    "long_row.csv": (b"sentence,label\na,1\nb,1,2\n", "line 3 ends a row of 3 fields"),
    "short_row.csv": (b"sentence,label\na,1\nb\n", "line 3 ends a row of 1 fields"),
    "twice.csv": (b"label,label\na,1\n", "more than one column 'label'"),
    "semicolons.csv": (GOOD.replace(",", ";").encode(), "No label column"),
    "page.csv": (b"<html><body>404</body></html>\n", "holds no rows"),
    "inf.csv": (table("the film,1", "the cast,inf"), "'inf' (first in row 2)"),
    "nan.csv": (table("the film,nan", "the cast,1"), "'nan' (first in row 1)"),
    "half.csv": (table("the film,0.5", "the cast,1"), "holds 0.5 in row 1"),
    "no_label.csv": (table("the film,1", "the cast,"), "5 of 10 rows have no label, the first of them row 2"),
    "no_text.csv": (table("the film,1", ",0"), "holds nothing in 5 of 10 rows, the first of them row 2"),
    "partly.csv": (table("the film,positive", "the cast,neg"), "'neg'"),
    "nan.json": (objects("1", "NaN", "0"), "holds nan in row 2"),
    "inf.json": (objects("1", "Infinity", "0"), "holds inf in row 2"),
    "null.json": (objects("1", "null", "0"), "1 of 3 rows have no label, the first of them row 2"),
    "long_number.json": (objects("9" * 400, "1"), "Cannot read"),
    "longer_number.json": (objects("9" * 5000, "1"), "Cannot read"),
    "mixed.json": (objects('"1"', "1"), "column 'label' mixes int, str"),
    "list_label.json": (objects("[1]", "[0]"), "holds [1] in row 1"),
    "object_label.json": (objects('{"a": 1}', '{"a": 0}'), "holds {'a': 1} in row 1"),
    "surrogate.json": (b'[{"sentence": "\\ud800", "label": 0}]', "Cannot read"),
    "number.json": (b"3", "holds a int"),
    "numbers.json": (b"[1, 2]", "row 1 is a int"),
    "nothing.json": (b"[]", "holds no rows"),
    "uneven.json": (b'{"sentence": ["a", "b"], "label": [0]}', "differ in length"),
    "bad_line.jsonl": (b'{"sentence": "a", "label": 0}\n{"sentence": "b", "label"\n', "line 2 is no JSON"),
    "words.txt": (b"the film\t1\n", "words.txt is plain text, which has no labels"),
    "book.xlsx": (zipped(), "unknown kind of file '.xlsx'"),
    "no_suffix": (GOOD.encode(), "unknown kind of file ''"),
    "utf16.json": (b"[]".decode().encode("utf16"), "UTF-16"),
    "utf16_without_mark.tsv": (GOOD.encode("utf-16-le"), "expected UTF-8 text"),
    "utf32.csv": (GOOD.encode("utf32"), "expected UTF-8 text"),
    "latin1.json": (objects('"gr\xe9"').decode("utf8").encode("latin1"), "Save it as UTF-8"),
    "nul.jsonl": (b'{"sentence": "a\0", "label": 0}\n', "it is a binary file"),
    "mark_alone.csv": (b"\xef\xbb\xbf", "is empty"),
    "commas.csv": (b",,\n,,\n", "No label column"),
    "mixed_names.json": (objects('"pos"', "1"), "column 'label' mixes int, str"),
    "levels.json": (objects("[" * 40 + "]" * 40), "nested too deeply (more than 32 levels)"),
    "huge_label.csv": (table("the film,1", "the cast," + "9" * 400), "holds"),
    "endless_label.csv": (table("the film,1", "the cast," + "x" * 100_000), "holds"),
    "many_digits.json": (objects('"' + "9" * 5000 + '"', '"1"'), "'9999"),
    "long_name.csv": (b"x" * 100_000 + b"\n1\n", "No label column"),
    "many_keys.json": (b"[" + b",".join(b'{"k%d": 1}' % i for i in range(4000)) + b"]", "4000 different keys"),
    "many_columns.csv": (b",".join(b"c%d" % i for i in range(5000)) + b"\n" + 4999 * b"," + b"\n", "No label column"),
    "zeros.csv.link.csv": (lambda path: path.symlink_to("/dev/zero"), "no such file or folder"),
    "circle.csv": (lambda path: path.symlink_to(path), "no such file or folder"),
    "pipe.csv": (os.mkfifo, "no such file or folder"),
    "no_rows.parquet": (lambda path: parquet(path, []), "holds no rows"),
    "levels.parquet": (lambda path: parquet(path, [nested(60)]), "too deeply nested"),
    "latin1.parquet": (lambda path: parquet(path, [0, 1, 0], texts=[b"a", b"gr\xe9at", b"b"]), "no UTF-8 text"),
    "latin1_label.parquet": (lambda path: parquet(path, [b"a", b"gr\xe9at", b"a"], of_bytes=True), "no UTF-8 text"),
    "flipped.parquet": (lambda path: parquet(path, [0, 1] * 50, flipped=True), "Cannot read"),
}


# -- images -----------------------------------------------------------------------------------------------------------


def nested(levels: int) -> list:
    return [nested(levels - 1)] if levels else [1]


def as_text(cells: list[bytes]):
    """Bytes that say that they are text."""
    import pyarrow as pa

    raw = pa.array(cells, pa.binary())
    return pa.StringArray.from_buffers(len(raw), *raw.buffers()[1:])


def parquet(
    path: Path, labels: list, flipped: bool = False, texts: list | None = None, of_bytes: bool = False
) -> None:
    """A table of as many rows; `flipped`: with every bit of its first pages turned."""
    import pyarrow as pa
    from pyarrow import parquet as writer

    sentences = ["the film"] * len(labels) if texts is None else as_text(texts)
    writer.write_table(pa.table({"sentence": sentences, "label": as_text(labels) if of_bytes else labels}), path)
    if flipped:
        data = path.read_bytes()
        path.write_bytes(data[:4] + bytes(255 - byte for byte in data[4:150]) + data[150:])


def folder_of_images(folder: Path) -> None:
    """Two good ones of cat, dog and fish each."""
    from PIL import Image

    for level, name in enumerate(("cat", "dog", "fish")):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (12, 12), (80 * level, 0, i)).save(folder / name / f"{i}.png")


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 40)) -> bytes:
    """Noise, as a file of this kind."""
    from PIL import Image

    image = Image.frombytes(mode, size, random.Random(0).randbytes(size[0] * size[1] * len(mode)))
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def deep_image(path: Path, kind: str) -> None:
    import numpy as np
    from PIL import Image

    Image.fromarray(np.full((12, 12), 3000, kind)).save(path)


def bomb(width: int, height: int) -> bytes:
    """A png that says it is as large, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


def writes(content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content())


def half(kind: str) -> Callable[[Path], None]:
    return writes(lambda: encoded(kind)[: len(encoded(kind)) // 2])


NONE = "it is no image that Pillow knows"
HOSTILE_IMAGES = {
    "cut.png": (half("PNG"), ""),
    "cut.jpg": (half("JPEG"), "OSError: image file is truncated"),
    "cut.bmp": (half("BMP"), "OSError: image file is truncated"),
    "cut.webp": (half("WEBP"), ""),
    "cut.tif": (half("TIFF"), ""),
    "text.png": (writes(lambda: b"no image"), NONE),
    "page.jpg": (writes(lambda: b"<html><body>404</body></html>"), NONE),
    "archive.png": (writes(zipped), NONE),
    "junk.png": (writes(lambda: JUNK), NONE),
    "empty.jpg": (writes(lambda: b""), NONE),
    "link.png": (lambda path: path.symlink_to("/etc/passwd"), NONE),
    "bomb.png": (writes(lambda: bomb(30_000, 30_000)), "DecompressionBombError"),
    "damaged.png": (writes(lambda: encoded("PNG").replace(b"IDAT", b"IDAT\0", 1)), ""),
    "runs.png": (writes(lambda: b"qoif" + struct.pack(">II", 12, 12) + b"\x03\0"), ""),
    "sixteen_bits.png": (lambda path: deep_image(path, "uint16"), "its mode is I;16, which would be cut off at 255"),
    "whole_numbers.tif": (lambda path: deep_image(path, "int32"), "its mode is I,"),
    "floats.tif": (lambda path: deep_image(path, "float32"), "its mode is F,"),
}
