"""The model card of a reduced model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ..errors import RMTKDError
from ..files import is_ours as is_our_file
from ..files import picture_metadata, read_text, write_text
from ..pages.escaping import code_span, identifier, markdown, python_string, shell_word
from .measures import fit_text, is_number, metric_changes, number, stage_measures, stage_notes
from .run import RESULTS, Run, write_results


if TYPE_CHECKING:
    from huggingface_hub import ModelCard


__all__ = ["CARD", "comparison_rows", "measure_rows", "model_card", "stage_rows", "write_card"]

CARD = "README.md"
FIGURES = "figures"
LOOKUP_SECONDS = 10
TAGS = ("optimum", "rmtkd", "model-compression")
logger = logging.getLogger(__name__)
TEMPLATES = {True: "card.md.jinja", False: "trimmed.md.jinja"}  # by whether layers were narrowed
TRAINING_OPTIONS = (
    "epochs",
    "max_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
)


def write_card(folder: str | Path, repository: str | None = None, **metadata: Any) -> Path:
    """Write the card of the run in `folder`, and its figures where matplotlib is installed.

    Args:
        repository: name that the card's code loads, remembered for the next card; default: the one remembered, else
            the folder's.
        metadata: further fields of `huggingface_hub.ModelCardData`, for example license, language, tags; remembered as
            well.

    Returns:
        Path of the card.

    Raises:
        RMTKDError: the folder holds no record of a reduction, or a card or figure that somebody else wrote or changed.
    """
    folder = Path(folder)
    Run.read(folder)  # refused before anything is written
    if is_foreign(folder):
        raise RMTKDError(
            f"{folder / CARD} was written or changed by somebody else: it stays. Move it away for a new card."
        )
    write_results(folder, repository=repository)
    run = Run.read(folder)
    metadata = run.results.get("card", {}) | {key: value for key, value in metadata.items() if value is not None}
    if "license" not in metadata and (found := license_of(run.base_repository)):
        metadata["license"] = found
    card = str(model_card(run, run.results.get("repository"), figures=_figures(run, folder), **metadata))
    kept = {key: value for key, value in metadata.items() if key != "eval_results"}  # objects, not JSON
    write_text(folder / CARD, card)
    write_results(folder, card=kept, card_sha256=_digest(card))
    return folder / CARD


def is_ours(folder: str | Path) -> bool:
    """Whether the card in `folder` is as `write_card` left it."""
    folder = Path(folder)
    known = Run.read(folder).results.get("card_sha256") if (folder / RESULTS).is_file() else None
    return known is not None and (folder / CARD).is_file() and known == _digest(read_text(folder / CARD))


def is_foreign(folder: str | Path) -> bool:
    """Whether `folder` holds a card that `write_card` did not write, or that was changed since."""
    return (Path(folder) / CARD).exists() and not is_ours(folder)


def card_files(folder: str | Path) -> list[str]:
    """Names of the files that `write_card` writes, as far as they are there."""
    from .plots import FIGURE_NAMES

    folder = Path(folder)
    figures = [f"{FIGURES}/{name}.png" for name in FIGURE_NAMES]
    ours = [name for name in figures if (folder / name).is_file() and is_our_file(folder / name)]
    return [*(name for name in (CARD, RESULTS) if (folder / name).is_file()), *ours]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf8")).hexdigest()


def model_card(
    run: Run, repository: str | None = None, figures: tuple[dict[str, str], ...] = (), **metadata: Any
) -> ModelCard:
    """The card of a run.

    Args:
        figures: {"text", "path"} of pictures beside the card.
        metadata: as in `write_card`; `tags` are added to our own.
    """
    from huggingface_hub import ModelCard

    title = (repository or run.name).split("/")[-1]
    metric = run.metric
    trained = bool(run.history)
    known = run.parameters
    return ModelCard.from_template(
        card_data(run, title, **metadata),
        template_path=str(Path(__file__).parent / "templates" / TEMPLATES[run.narrowed or not run.vocabulary]),
        title=markdown(title),
        repository=python_string(repository or run.name),
        base_model=_linked(run),
        base_word=shell_word(run.base_model or "BASE_MODEL"),
        removed=f"{1 - known[1] / known[0]:.1%}" if known else "",
        trained=trained,
        comparison=_cells(comparison_rows(run)),
        measured=markdown(run.bench.get("setting", "")),
        has_metric=metric is not None,
        has_latency=bool(run.bench),
        metric_name=markdown(metric[0]) if metric else "",
        stages=_cells(stage_rows(run)),
        measures=_cells(measure_rows(run)),
        notes=[markdown(note) for note in stage_notes(run.stages)],
        fitted=markdown(sentence(fit_text(run.fit, run.stages))),
        figures=figures,
        plain=run.plain,
        auto_class=identifier(run.auto_class, "AutoModel"),
        loaded_as=identifier(run.architecture or run.auto_class, "AutoModel"),
        vocabulary=[
            {"when": trimming.when, "notes": [markdown(note) for note in trimming.notes]}
            for trimming in run.vocabulary
        ],
        trimmed_last=any(trimming.narrowed for trimming in run.vocabulary),
        recipe=json.dumps(run.recipe, indent=2),
        training_options=_training_options(run),
        dataset=markdown(_dataset(run)),
        seed=run.recipe.get("seed") if is_number(run.recipe.get("seed")) else None,
    )


def _linked(run: Run) -> str:
    """The uncut model in Markdown: a link where it is a repository."""
    if run.base_repository:
        return f"[{markdown(run.base_model)}](https://huggingface.co/{quote(run.base_repository)})"
    return code_span(run.base_model) if run.base_model else ""


def _cells(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[markdown(cell) for cell in row] for row in rows]


def card_data(run: Run, name: str, **metadata: Any) -> Any:
    """`ModelCardData` of a run: base model and relation, tags, data set, `model-index` under `name`."""
    from huggingface_hub import EvalResult, ModelCardData

    given = {key: value for key, value in metadata.items() if value is not None}
    tags = given.pop("tags", [])
    tags = [tags] if isinstance(tags, str) else list(tags)
    dataset = run.results.get("dataset", {})
    results = []
    if run.metric and is_number(run.metric[2]) and run.task:
        metric, _, value = run.metric
        results.append(
            EvalResult(
                task_type=run.task,
                dataset_type=dataset.get("id") or "unknown",
                dataset_name=dataset.get("name") or "validation data",
                dataset_config=dataset.get("config"),
                dataset_split=dataset.get("split"),
                metric_type=metric,
                metric_name=metric,
                metric_value=round(value, 6),
            )
        )
    fields = {
        "library_name": "transformers",
        "pipeline_tag": run.task,
        "tags": list(dict.fromkeys([*TAGS, *(["knowledge-distillation"] if run.history else []), *tags])),
        "base_model": run.base_repository,
        "datasets": [dataset["id"]] if dataset.get("on_hub") else None,
        "metrics": [run.metric[0]] if results else None,
        "eval_results": results or None,
        "model_name": name if results else None,
    }
    if run.base_repository:
        fields["base_model_relation"] = "finetune"
    return ModelCardData(**fields | given)


def license_of(repository: str | None) -> str | None:
    """What the card of the uncut model says; None where there is no such card, or no network."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # failed connections, too

    if repository is None:
        return None
    try:
        data = HfApi().model_info(repository, timeout=LOOKUP_SECONDS).card_data
    except (HTTPError, OSError, ValueError):
        return None
    return data.get("license") if data else None


def comparison_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """Rows (what, before, after, change): size, the metric that judged, all others, and what the bench measured."""
    rows = []
    if run.parameters:
        rows.append(_counted("parameters", *run.parameters))
    if size := run.results.get("bytes"):
        rows.append(_counted("bytes on disk", *size))
    if run.metric and is_number(run.metric[1]) and is_number(run.metric[2]):
        name, before, after = run.metric
        rows.append((name, number(before), number(after), f"{after - before:+.4f}"))
    rows += metric_changes(run.metrics.get("before"), run.metrics.get("after"), {name for name, *_ in rows})
    rows += [tuple(row) for row in run.bench.get("rows", []) if row[0] not in {name for name, *_ in rows}]
    return rows


def stage_rows(run: Run) -> list[tuple[str, ...]]:
    """One row a stage, as in the template."""
    rows = []
    for stage in run.stages:
        removed = 1 - stage["parameters_after"] / run.stages[0]["parameters_before"]
        metrics = [number(stage[key]) for key in METRICS]
        status = stage["status"].replace("_", " ") + (f" ({stage['reason']})" if stage.get("reason") else "")
        size = f"{stage['parameters_before']:,} → {stage['parameters_after']:,}"
        rows.append((str(stage["index"]), str(stage["step"]), size, f"{removed:.1%}", *metrics, status))
    return rows


METRICS = ("metric_before", "metric_cut", "metric_after")


def measure_rows(run: Run) -> list[tuple[str, ...]]:
    """Rows (what, stage, before, just cut, after) of all that was measured beside the metric of `stage_rows`."""
    return [
        (what.removeprefix("eval_"), str(index), *map(number, values))
        for what, index, *values in stage_measures(run.stages)
    ]


def sentence(text: str) -> str:
    """With a capital and a full stop; "" stays."""
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _counted(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, f"{before:,}", f"{after:,}", f"{100 * (after / before - 1):+.1f} %" if before else "-"


def _training_options(run: Run) -> str:
    training = run.results.get("training", {})
    given = [
        f"--{name.replace('_', '-')} {training[name]:g}" for name in TRAINING_OPTIONS if is_number(training.get(name))
    ]
    given += ["--fit"] if training.get("fit") else []
    given += ["--bf16"] if training.get("bf16") else []
    if not run.history:
        return " --no-train" if run.results and run.stages else ""
    return " \\\n    " + " ".join(given) if given else ""


def _dataset(run: Run) -> str:
    dataset = run.results.get("dataset", {})
    parts = [dataset.get("name"), dataset.get("config"), dataset.get("split")]
    text = ", ".join(str(part) for part in parts if part)
    return f"{text} ({dataset['rows']:,} rows)" if text and is_number(dataset.get("rows")) else text


def _figures(run: Run, folder: Path) -> tuple[dict[str, str], ...]:
    """PNG files of the run's figures, in a folder of their own; none without matplotlib, or without a narrowing."""
    if not run.narrowed:
        return ()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return ()
    from .plots import figures_of

    (folder / FIGURES).mkdir(exist_ok=True)
    made = []
    for name, text, figure in figures_of(run):
        path = folder / FIGURES / f"{name}.png"
        if path.exists() and not is_our_file(path):
            logger.warning("%s was made by somebody else; it stays, and the card goes without it.", path)
            continue
        figure.savefig(path, dpi=110, facecolor="white", metadata=picture_metadata(path))
        made.append({"text": text, "path": f"{FIGURES}/{name}.png"})
    return tuple(made)
