"""`optimum-cli rmtkd trim`: the rows of a token table that a domain needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from ..errors import RMTKDError
from ..validation import Count, Length, check_fields
from .base import Command, set_help
from .carrying import carry_modules, carry_record, origin_of
from .corpora import check_texts, text_columns, texts_of
from .options import add_options, from_options, option
from .output import OVERWRITE, comparison, format_table, weight_bytes, writing_beside


if TYPE_CHECKING:
    from ..vocabulary import VocabularyReport

__all__ = ["TrimCommand", "TrimOptions"]

USAGE = "optimum-cli rmtkd trim MODEL --texts FILE ... -o OUT [options]"

DESCRIPTION = """\
Drop the rows of a model's token table that the texts of a domain do not use, and the tokens that go with them.
Nothing is trained. A text whose tokens all stay is cut into the same tokens and gets the same outputs; other words
are cut into smaller pieces. For any model with a table of tokens and a fast tokenizer (WordPiece, BPE, Unigram):
encoders, decoders, encoder-decoders, reduced models. The result is of the same class, and needs nothing of this
package if the model did not.
"""

EPILOG = """\
examples:
  a classifier on the texts it was trained on
    optimum-cli rmtkd trim ./my-bert --texts train.csv --validation-texts dev.csv -o ./my-bert-trimmed
  a multilingual model for one language: a large corpus, and no token that occurs less than five times
    optimum-cli rmtkd trim xlm-roberta-base --texts portuguese.txt --min-count 5 -o ./xlmr-pt
  the texts of the domain, and the 20,000 most frequent tokens of a larger corpus
    optimum-cli rmtkd trim ./my-bert --texts train.csv --keep-texts wiki.txt --keep-size 20000 -o ./my-bert-trimmed

Files: .txt (a text a line), csv, tsv, json, jsonl, parquet (all columns of strings, or --text-column, also of nested
values such as messages); all but parquet also packed as .gz, .bz2 or .xz. None is held in memory.
reload:
  model = AutoModelForSequenceClassification.from_pretrained("./my-bert-trimmed")
  tokenizer = AutoTokenizer.from_pretrained("./my-bert-trimmed")

Next: compress --model ./my-bert-trimmed --target-reduction 0.8 ... counts from the untrimmed model; compress
--trim-vocabulary does both at once.
"""


@dataclass(frozen=True)
class TrimOptions:
    """Which tokens stay.

    Raises:
        RMTKDError: options that do not go together.
    """

    texts: Annotated[list[str], Length(1)] | None = option(None, "Files of texts of the domain.")
    text_column: Annotated[list[str], Length(1)] | None = option(
        None, "Columns of texts in tables. None: all that hold strings."
    )
    min_count: Count = option(1, "Tokens that occur less often in the texts go.")
    max_size: Count | None = option(None, "At most so many rows stay; the rarest tokens go. None: no limit.")
    keep_texts: Annotated[list[str], Length(1)] | None = option(
        None, "Files of a second, larger corpus, whose most frequent tokens stay as well."
    )
    keep_size: Count | None = option(None, "How many of those stay.")
    always: Annotated[list[str], Length(1)] | None = option(None, "Tokens or words that stay.")
    validation_texts: Annotated[list[str], Length(1)] | None = option(
        None, "Files of held-out texts; the table says how many of them are cut otherwise."
    )
    pad_to_multiple_of: Count = option(1, "Make the number of rows a multiple of this, with tokens that would go.")

    def __post_init__(self):
        check_fields(self, as_options=True)
        if self.texts is None:
            raise RMTKDError("No texts: pass --texts FILE ... (.txt, csv, json, parquet).")
        if (self.keep_texts is None) != (self.keep_size is None):
            raise RMTKDError("--keep-texts and --keep-size belong together: files, and how many of their tokens stay.")

    @property
    def files(self) -> list[str]:
        """All files that are read."""
        return [*self.texts, *(self.keep_texts or ()), *(self.validation_texts or ())]


class TrimCommand(Command):
    @staticmethod
    def parse_args(parser):
        set_help(parser, DESCRIPTION, EPILOG, USAGE)
        parser.add_argument("model", metavar="MODEL", help="Hub name or local folder of a model and its tokenizer.")
        parser.add_argument("-o", "--output", required=True, metavar="OUT", help="Folder of the trimmed model.")
        parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
        add_options(parser, TrimOptions, "vocabulary")

    def execute(self) -> None:
        args, options = self.args, from_options(TrimOptions, self.args)
        check_texts(options.files)
        inputs = [("the model", args.model), *(("the texts", file) for file in options.files)]
        with writing_beside(args.output, args.overwrite, inputs) as folder:
            columns = text_columns(options.files, options.text_column)
            table = _trim(args.model, options, columns, folder, Path(args.output).absolute().name)
        print(table)
        print(f"saved to {args.output}")


def _trim(name: str, options: TrimOptions, columns: dict[str, list[str]], folder: Path, title: str) -> str:
    """Fill `folder` with the trimmed model and return what was done."""
    from ..hub import write_card, write_results
    from ..hub.loading import load_model, load_tokenizer, tokenizing
    from ..vocabulary import trim_vocabulary
    from .task import weights_folder

    tokenizer = load_tokenizer(name)
    carry_modules(name, folder)
    run = carry_record(name, folder)
    model = load_model(name)
    keep = held_out = None
    if options.keep_texts is not None:
        keep = (texts_of(options.keep_texts, columns), options.keep_size)
    if options.validation_texts is not None:
        held_out = texts_of(options.validation_texts, columns)
    with tokenizing(name):
        small, tokens, report = trim_vocabulary(
            model,
            tokenizer,
            texts_of(options.texts, columns),
            keep=keep,
            min_count=options.min_count,
            max_size=options.max_size,
            always=options.always or (),
            validation_texts=held_out,
            pad_to_multiple_of=options.pad_to_multiple_of,
        )
    small.save_pretrained(folder)
    tokens.save_pretrained(folder)
    sizes = weight_bytes(weights_folder(name)), weight_bytes(folder)
    report = dataclasses.replace(report, narrowed=report.narrowed or (run is not None and run.narrowed))
    origin = origin_of(name, run, model, report, sizes[0])
    write_results(
        folder,
        base_model=origin.name,
        parameters=(origin.parameters, report.parameters_after),
        bytes=None if origin.size is None else (origin.size, sizes[1]),
        vocabulary=report.to_dict(),
    )
    write_card(folder, title)
    return told(report, sizes, origin.parameters)


def told(report: VocabularyReport, sizes: tuple[int, int], uncut: int) -> str:
    """The table before / after, and what it means.

    Args:
        sizes: bytes of the weight files before and after.
        uncut: parameters before the first reduction.
    """
    counts = report.parameters_before, report.parameters_after
    rows = comparison(counts, sizes, "", (None, None))
    if uncut > counts[0]:
        rows.insert(1, ("removed of the uncut model", *(f"{1 - count / uncut:.1%}" for count in counts), ""))
    rows += [(*row, "") for row in report.rows() if row[0] != "parameters"]
    return "\n".join([format_table(("", "before", "after", "change"), rows), *report.notes()])
