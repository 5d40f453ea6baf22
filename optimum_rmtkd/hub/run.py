"""The record of a run: small JSON files beside the model, from which card and report are made, now or later.

config.json           of the model: spec, recipe, provenance
rmtkd_stages.json     what happened at each cut, all metrics         (trainer, compress)
rmtkd_spectra.json    the spectra behind each cut                    (trainer, compress)
rmtkd_results.json    data set, metric, sizes, vocabulary, log       (trainer, compress, trim)
rmtkd_bench.json      latency, throughput, memory, energy            (bench)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RMTKDError
from ..files import read_text, write_text
from .record import check_config, check_record


__all__ = ["BENCH", "RESULTS", "SPECTRA", "STAGES", "Run", "first", "public_name", "write_results", "write_spectra"]

STAGES, SPECTRA, RESULTS, BENCH = (
    "rmtkd_stages.json",
    "rmtkd_spectra.json",
    "rmtkd_results.json",
    "rmtkd_bench.json",
)
TASKS = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForConditionalGeneration": "text-generation",
    "ForImageClassification": "image-classification",
    "Model": "feature-extraction",
}
SIGNIFICANT = 7  # digits of a number in the record: eigenvalues are most of it


@dataclass(frozen=True)
class Trimming:
    """A trimming of the vocabulary.

    Attributes:
        narrowed: whether layers had been narrowed before.
        notes: sentences about it.
    """

    narrowed: bool
    notes: list[str]

    @property
    def when(self) -> str:
        """A sentence."""
        moment = "After the layers were narrowed" if self.narrowed else "Before any layer was narrowed"
        return f"{moment}, tokens that the texts do not use were dropped from the table and the tokenizer."


@dataclass(frozen=True)
class Run:
    """Everything that is known about a finished reduction.

    Attributes:
        name: of its folder.
        config: of the model, or {} where the folder holds none.
        stages: records of the cuts (`Stage.to_dict`), in order.
        spectra: {index of the stage: SpectralReport.to_dict()}.
        results: what `write_results` was given, or {}.
        bench: what `optimum-cli rmtkd bench` wrote, or {}.
        fit: {"steps", "share", "why"} of the fine-tuning before the first cut, or {}.
        journal_recipe: the recipe as the journal of the stages has it, or {}.
        metrics: {"before": ..., "after": ...}, all metrics of the evaluations then, or {}.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    stages: tuple[dict[str, Any], ...] = ()
    spectra: dict[int, dict[str, Any]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    bench: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)
    journal_recipe: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path, name: str | None = None) -> Run:
        """The record in `folder`: what `compress` or an `RMTKDTrainer` wrote.

        Raises:
            RMTKDError: no such folder, no record in it, or a file of it is no JSON object or holds what no run writes.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise RMTKDError(f"{folder}: no such folder; expected the output of compress or of an RMTKDTrainer.")
        found = {file: _load(folder / file) for file in ("config.json", STAGES, SPECTRA, RESULTS, BENCH)}
        trimmed = found[RESULTS].get("vocabulary")
        if (
            not any(found[file] for file in (STAGES, SPECTRA))
            and not found["config.json"].get("rmtkd")
            and not trimmed
        ):
            raise RMTKDError(
                f"{folder} holds no record of a reduction (neither {STAGES}, {SPECTRA} nor a reduced model's "
                "config.json): expected the output folder of optimum-cli rmtkd compress, or the output_dir of an "
                "RMTKDTrainer."
            )
        check_config(found["config.json"], str(folder / "config.json"))
        names = (STAGES, SPECTRA, RESULTS, BENCH)
        check_record(*[found[file] for file in names], files=tuple(str(folder / file) for file in names))
        spectra = {int(index): report for index, report in found[SPECTRA].get("stages", {}).items()}
        return cls(
            name=name or folder.absolute().name,
            config=found["config.json"],
            stages=tuple(found[STAGES].get("stages", ())),
            spectra=dict(sorted(spectra.items())),
            results=found[RESULTS],
            bench=found[BENCH],
            fit=found[STAGES].get("fit") or {},
            journal_recipe=found[STAGES].get("recipe") or {},
            metrics=found[STAGES].get("metrics") or {},
        )

    @property
    def narrowed(self) -> bool:
        """Whether layers were narrowed; else the vocabulary alone was trimmed."""
        return bool(self.config.get("rmtkd") or self.stages or self.spectra)

    @property
    def plain(self) -> bool:
        """Whether the model is one of a stock class, which transformers alone loads."""
        if not self.config:  # the model lies nowhere yet
            return bool(self.results.get("architecture")) and not self.results.get("auto_class")
        return not self.config.get("rmtkd")

    @property
    def vocabulary(self) -> list[Trimming]:
        """The trimmings of the vocabulary, in their order."""
        from ..vocabulary import VocabularyReport

        found = []
        for known in (*self.results.get("earlier_vocabularies", []), self.results.get("vocabulary")):
            if known:
                report = VocabularyReport.from_dict(known)
                rows = [f"{what}: {before} before, {after} after" for what, before, after in report.rows()]
                found.append(Trimming(report.narrowed, [*rows, *report.notes()]))
        return found

    @property
    def recipe(self) -> dict[str, Any]:
        """Fields of the `RMTKDConfig`."""
        return (self.config.get("rmtkd") or {}).get("recipe") or self.results.get("recipe") or self.journal_recipe

    @property
    def parameters(self) -> tuple[int, int] | None:
        """Before the first cut and after the last; None where unknown."""
        known = self.results.get("parameters")
        if known:
            return tuple(known)
        standing = [stage for stage in self.stages if stage["status"] in ("open", "accepted")]
        return (self.stages[0]["parameters_before"], standing[-1]["parameters_after"]) if standing else None

    @property
    def metric(self) -> tuple[str, float | None, float | None] | None:
        """(name, before, after) of the validation metric; None where nothing was measured."""
        if known := self.results.get("metric"):
            return known["name"], known["before"], known["after"]
        measured = [s for s in self.stages if s.get("metric_name")]
        if not measured:
            return None
        standing = [s for s in measured if s["status"] in ("open", "accepted")]
        after = standing[-1]["metric_after"] if standing else None
        return measured[0]["metric_name"].removeprefix("eval_"), measured[0]["metric_before"], after

    @property
    def history(self) -> list[dict[str, Any]]:
        """Lines of the training log."""
        return self.results.get("log_history", [])

    @property
    def base_model(self) -> str:
        """Name of the uncut model: a repository, or the last part of a path; "" where unknown."""
        return public_name(self._base or "")

    @property
    def _base(self) -> str | None:
        provenance = (self.config.get("rmtkd") or {}).get("provenance") or {}
        return self.results.get("base_model") or provenance.get("base_model")

    @property
    def base_repository(self) -> str | None:
        """`base_model` where it is the name of a repository of the Hub."""
        return self._base if self._base and _is_repository(self._base) else None

    @property
    def architecture(self) -> str:
        """Class of the model, for example RMTKDBertForSequenceClassification; "" where unknown."""
        return (self.config.get("architectures") or [self.results.get("architecture") or ""])[0]

    @property
    def task(self) -> str | None:
        """The Hub's name of the model's task."""
        return next((task for suffix, task in TASKS.items() if self.architecture.endswith(suffix)), None)

    @property
    def auto_class(self) -> str:
        """The Auto class that loads it."""
        names = [name for name in self.config.get("auto_map") or {} if name != "AutoConfig"]
        names = names or [self.results.get("auto_class") or "AutoModel"]
        return next((name for name in names if name != "AutoModel"), "AutoModel")


def write_spectra(folder: str | Path, index: int, report: Any) -> None:
    """Add the `SpectralReport` of a stage to the record; a later run of the same stage replaces it."""
    path = Path(folder) / SPECTRA
    values = _load(path) or {"version": 1, "stages": {}}
    kept = {key: value for key, value in values["stages"].items() if int(key) < index}
    _write(path, values | {"stages": kept | {str(index): report.to_dict()}})


def write_results(folder: str | Path, **results: Any) -> None:
    """Add to the results of a run: `base_model`, `parameters` and `bytes` (before, after), `metric` {name, before,
    after}, `dataset` {id, name, config, split, rows, on_hub}, `log_history`, `training`, `recipe`; `architecture` and
    `auto_class` of a model that lies nowhere yet. What is None is left as it was."""
    path = Path(folder) / RESULTS
    given = {key: value for key, value in results.items() if value is not None}
    _write(path, {"version": 1} | _load(path) | given)


def public_name(name: str) -> str:
    """A repository's name as it is, a path's last part: paths of somebody's machine do not belong into a card."""
    return name if _is_repository(name) else Path(name).name


def first(values: str | Sequence[str] | None) -> str | None:
    """transformers takes one name or several."""
    return values if values is None or isinstance(values, str) else next(iter(values), None)


def _is_repository(name: str) -> bool:
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).exists()


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise RMTKDError(f"{path} is not JSON ({error}): it was cut short or edited; repeat the run.") from error
    if not isinstance(values, dict):
        raise RMTKDError(f"{path} holds a JSON {type(values).__name__}; expected an object.")
    return values


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_plain(values)) + "\n")


def _plain(value: Any) -> Any:
    """JSON has no NaN, and needs no sixteen digits; nor has it arrays (a confusion matrix among the metrics), or
    whatever else an evaluation may have put into the log."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if value.is_integer() else float(f"{value:.{SIGNIFICANT}g}")  # counts stay exact
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)
