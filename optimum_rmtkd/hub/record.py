"""The form of the files of a record: anybody may have written or edited them, and card and report read them."""

from __future__ import annotations

import numbers
import typing
from collections.abc import Mapping
from typing import Any

from ..errors import RMTKDError
from ..validation import check_value
from ..validation.wording import a_kind, shown


__all__ = ["check_config", "check_record"]

NUMBER = numbers.Real | None  # NaN and infinities, too: a training may have diverged
NAME = str | None
CUT_SITE = {"name": str, "width_before": int, "width_after": int}
MOMENTS = ("before", "cut", "after")
STAGE = {"index": int, "step": int, "status": str, "parameters_before": int, "parameters_after": int}
STAGE_MAY = {"metric_name": NAME, "note": NAME, "reason": NAME, "learning_rate": NUMBER, "predicted_loss": NUMBER}
STAGE_MAY |= {"divergence": NUMBER, "divergence_after": NUMBER, "sites": list[dict]}
STAGE_MAY |= {f"metric_{moment}": NUMBER for moment in MOMENTS}
STAGE_MAY |= {f"metrics_{moment}": dict[str, NUMBER] | None for moment in MOMENTS}
SPECTRUM = {"name": str, "kind": str, "width": int, "planned": int, "spectral_rank": int, "eigenvalues": list[NUMBER]}
SPECTRUM |= {"ranks": dict[str, NUMBER], "warnings": list[str]}
REPORT = {"parameters": int, "planned_parameters": int, "recipe": dict, "sites": list[dict], "budget": list[dict]}
POINT = {"cost": numbers.Real, "predicted_loss": NUMBER}
FIT = {"steps": int | None, "share": NUMBER, "why": NAME, "metrics": dict | None}
RESULTS = {"base_model": NAME, "parameters": list[int], "bytes": list[int], "metric": dict, "dataset": dict}
RESULTS |= {"architecture": NAME, "auto_class": NAME}
RESULTS |= {"log_history": list[dict[str, Any]], "training": dict, "recipe": dict, "card": dict}
RESULTS |= {"vocabulary": dict | None, "earlier_vocabularies": list[dict]}
TRIMMED = dict.fromkeys(("texts", "rows_before", "rows_after", "used", "required"), int)
TRIMMED |= {"tokenizer": str, "parameters_before": int, "parameters_after": int}
TRIMMED_MAY = {"held_out": dict | None, "caution": NAME, "difference": NUMBER, "uncompared": NAME, "left_out": int}
TRIMMED_MAY |= {"narrowed": bool}
HELD_OUT = dict.fromkeys(("texts", "changed", "tokens_before", "tokens_after", "longest_growth", "lost"), int)
METRIC = {"name": str, "before": NUMBER, "after": NUMBER}
BENCH = {"setting": str, "rows": list[list], "values": list[dict]}
BENCH_ROW = 4  # what, before, after, change
CONFIG = {"rmtkd": dict | None, "auto_map": dict | None}


def check_config(config: Mapping[str, Any], file: str) -> None:
    """Refuse the fields of a config.json that card and report read, where they could not.

    Raises:
        RMTKDError: names the file, the entry, what it holds and what was expected.
    """
    _check(config, {}, CONFIG, file)
    if config.get("architectures") is not None:
        _check(config, {}, {"architectures": list[str]}, file)
    rmtkd = config.get("rmtkd") or {}
    _check(rmtkd, {}, {"recipe": dict | None, "provenance": dict | None}, f"{file}: rmtkd")
    _check(rmtkd.get("provenance") or {}, {}, {"base_model": NAME}, f"{file}: rmtkd.provenance")


def check_record(
    stages: Mapping[str, Any],
    spectra: Mapping[str, Any],
    results: Mapping[str, Any],
    bench: Mapping[str, Any],
    files: tuple[str, str, str, str],
) -> None:
    """Refuse values of a record that card and report could not read.

    Args:
        stages, spectra, results, bench: contents of the four files.
        files: their names, for errors.

    Raises:
        RMTKDError: names the file, the entry, what it holds and what was expected.
    """
    may = {"stages": list[dict], "fit": dict | None, "metrics": dict | None, "recipe": dict | None}
    _check(stages, {}, may, files[0])
    for index, stage in enumerate(stages.get("stages", [])):
        where = f"{files[0]}: stages[{index}]"
        _check(stage, STAGE, STAGE_MAY, where)
        for number, site in enumerate(stage.get("sites") or []):
            _check(site, CUT_SITE, {}, f"{where}.sites[{number}]")
    _check(stages.get("fit") or {}, {}, FIT, f"{files[0]}: fit")
    _check(stages.get("metrics") or {}, {}, dict.fromkeys(("before", "after"), dict | None), f"{files[0]}: metrics")
    _check(spectra, {}, {"stages": dict[str, dict]}, files[1])
    for index, report in spectra.get("stages", {}).items():
        where = f"{files[1]}: stages[{index!r}]"
        if not index.isdecimal():
            raise RMTKDError(f"{where}: expected the number of a stage. Repeat the run, or take its own files.")
        _check(report, REPORT, {"note": NAME, "steps": NAME}, where)
        _check(report["recipe"], {"edge_estimator": str}, {}, f"{where}.recipe")
        for number, site in enumerate(report["sites"]):
            _check(site, SPECTRUM, {"edge": NUMBER, "n": NUMBER, "n_eff": NUMBER}, f"{where}.sites[{number}]")
        for number, point in enumerate(report["budget"]):
            _check(point, POINT, {}, f"{where}.budget[{number}]")
    _check(results, {}, RESULTS, files[2])
    _check(results.get("metric") or {}, METRIC if results.get("metric") else {}, {}, f"{files[2]}: metric")
    trimmings = [("vocabulary", results.get("vocabulary"))]
    trimmings += [(f"earlier_vocabularies[{n}]", v) for n, v in enumerate(results.get("earlier_vocabularies", []))]
    for where, trimmed in trimmings:
        if trimmed:
            _check(trimmed, TRIMMED, TRIMMED_MAY, f"{files[2]}: {where}")
            if trimmed.get("held_out"):
                _check(trimmed["held_out"], HELD_OUT, {}, f"{files[2]}: {where}.held_out")
    _check(bench, {}, BENCH, files[3])
    for number, row in enumerate(bench.get("rows", [])):
        if len(row) != BENCH_ROW or not all(isinstance(cell, str) for cell in row):
            raise RMTKDError(
                f"{files[3]}: rows[{number}] is {shown(row)}; expected {BENCH_ROW} strings: what, before, after, "
                "change. Repeat the bench, or take its own file."
            )


def _check(values: Mapping[str, Any], needed: Mapping[str, Any], possible: Mapping[str, Any], where: str) -> None:
    missing = [name for name in needed if name not in values]
    if missing:
        raise RMTKDError(
            f"{where} lacks {', '.join(missing)}: it was cut short or edited. Repeat the run, or take its own files."
        )
    for name, hint in (needed | possible).items():
        if name in values:
            check_value(values[name], hint, name, owner=where)
            if typing.get_origin(hint) is list and not isinstance(values[name], list):  # one alone is no list here
                raise RMTKDError(
                    f"{where}({name}={shown(values[name])}): expected a list; got {a_kind(values[name])}."
                )
