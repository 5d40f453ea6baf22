"""Names that somebody else chose (of models, data sets, sites, metrics) as plain text of a card or a figure.

Each function is for one place: what is harmless in a sentence breaks a table, a shell command or a formula.
"""

from __future__ import annotations

import json
import keyword
import re
import shlex


__all__ = ["code_span", "figure_text", "identifier", "markdown", "one_line", "python_string", "shell_word"]

MARKS = re.compile(r"([\\`*\[\]<>|~$]|(?<![^\W_])_|_(?![^\W_]))")  # an underscore inside a word marks nothing
LONGEST = 200  # characters of a name


def one_line(text: object) -> str:
    """Without line breaks and control characters, which begin new Markdown; without halves of characters, which no
    file can hold; not endless."""
    words = str(text).encode("utf8", "replace").decode("utf8").split()
    line = "".join(c if c.isprintable() or c == " " else " " for c in " ".join(words)).strip()
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def markdown(text: object) -> str:
    """As text of a paragraph or of a cell of a table (GitHub Flavored Markdown, "Backslash escapes")."""
    return MARKS.sub(r"\\\1", one_line(text))


def code_span(text: object) -> str:
    """As code inside a sentence. Backticks, which would end it (or begin a block, at the start of a line), become
    apostrophes."""
    return "`" + one_line(text).replace("`", "'") + "`"


def python_string(text: object) -> str:
    """As a literal of Python. What JSON escapes, Python reads alike."""
    return json.dumps(one_line(text), ensure_ascii=False)


def shell_word(text: object) -> str:
    """As one word of a POSIX shell."""
    return shlex.quote(one_line(text))


def identifier(text: object, default: str) -> str:
    """A name of Python as it is, anything else as `default`."""
    name = str(text)
    plain = name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and len(name) < LONGEST
    return name if plain else default


def figure_text(text: object) -> str:
    r"""As text of matplotlib, which reads what stands between dollars as a formula, unless they are written "\$"."""
    return one_line(text).replace("$", r"\$")
