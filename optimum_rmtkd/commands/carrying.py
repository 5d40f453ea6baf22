"""What the folder of a trimmed model takes over from the one it was made of: the record of earlier reductions, and the
other modules of sentence-transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import RMTKDError


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..hub import Run
    from ..vocabulary import VocabularyReport

__all__ = ["Origin", "carry_modules", "carry_record", "origin_of"]

MODULES = "modules.json"
MODULE_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
ROOT_FILES = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
ABOUT_THE_FOLDER = ("card_sha256", "repository")  # of the old one


@dataclass(frozen=True)
class Origin:
    """The model that a card compares with.

    Attributes:
        name: Hub name, or last part of a path.
        parameters: of it.
        size: bytes of its weight files; None where unknown.
    """

    name: str
    parameters: int
    size: int | None


def carry_record(name: str, folder: Path) -> Run | None:
    """Copy the record of the reductions that made a model into `folder`, with its cuts, spectra, recipe and results. A
    benchmark is left behind, since it measured another model.

    Args:
        name: Hub name or folder of the model.

    Returns:
        The record; None where there is none.

    Raises:
        RMTKDError: a file of it is damaged.
    """
    from ..hub import Run, write_results
    from ..hub.run import RESULTS, SPECTRA, STAGES
    from .compress import RECIPE_NAME

    found = [file for file in (STAGES, SPECTRA, RESULTS, RECIPE_NAME) if _copy(name, file, folder)]
    if not {STAGES, SPECTRA, RESULTS} & set(found):
        return None
    run = Run.read(folder)
    results = {key: value for key, value in run.results.items() if key not in ABOUT_THE_FOLDER}
    if (last := results.pop("vocabulary", None)) is not None:
        results["earlier_vocabularies"] = [*results.get("earlier_vocabularies", []), last]
    (folder / RESULTS).unlink(missing_ok=True)
    write_results(folder, **results)
    return run


def origin_of(name: str, run: Run | None, model: PreTrainedModel, report: VocabularyReport, size: int) -> Origin:
    """What a trimmed model comes from in the end: of a model that was reduced before, the one before its first
    reduction, as far as the record or the config remember it.

    Args:
        run: the record beside the model.
        model: before trimming.
        size: bytes of its weight files.
    """
    from ..hub.run import public_name
    from ..models import provenance_of, uncut_parameters

    if run is not None and run.base_model and run.parameters:
        base = run.results.get("base_model") or run.base_model
        return Origin(base, run.parameters[0], run.results.get("bytes", [None])[0])
    if base := provenance_of(model).get("base_model"):
        return Origin(public_name(base), uncut_parameters(model), None)
    uncut = uncut_parameters(model)
    return Origin(public_name(name), uncut, size if uncut == report.parameters_before else None)


def carry_modules(name: str, folder: Path) -> list[str]:
    """Copy what sentence-transformers keeps beside a transformer: the list of its modules, those that come behind it,
    and its own settings.

    Returns:
        Names of the modules behind the transformer, [] where the model is none of sentence-transformers.

    Raises:
        RMTKDError: the list is damaged, or the transformer is not where the model was loaded from.
    """
    listing = _file(name, MODULES)
    if listing is None:
        return []
    try:
        places = _places(json.loads(listing.read_text(encoding="utf8")), name)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RMTKDError(f"{MODULES} of '{name}' is no JSON ({error}): save the model anew.") from error
    for file in (*ROOT_FILES, *(f"{place}/{file}" for place in places for file in MODULE_FILES)):
        _copy(name, file, folder)
    for place in places:
        (folder / place).mkdir(parents=True, exist_ok=True)  # a module without settings is an empty folder
    return places


def _places(listing: Any, name: str) -> list[str]:
    """Folders of the modules behind the first, which lies in the root."""
    wrong = f"{MODULES} of '{name}' is no list of modules of sentence-transformers"
    modules = listing if isinstance(listing, list) else [None]
    if not all(isinstance(module, dict) and isinstance(module.get("path"), str) for module in modules):
        raise RMTKDError(f"{wrong}: expected objects with a path. Load and save the model anew.")
    places = [module["path"] for module in modules]
    if not places or places[0]:
        raise RMTKDError(
            f"{wrong} whose transformer lies in the root of the folder, got {places}: trim the folder of the "
            "transformer, and put the result in its place."
        )
    if any(PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts for place in places):
        raise RMTKDError(f"{wrong} inside it, got {places}: a module lies elsewhere.")
    return places[1:]


def _copy(name: str, file: str, folder: Path) -> bool:
    """Whether the file is there."""
    path = _file(name, file)
    if path is None:
        return False
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / file)
    return True


def _file(name: str, file: str) -> Path | None:
    from transformers.utils import cached_file

    lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    found = cached_file(name, file, **lenient)
    return None if found is None else Path(found)
