"""Models of strangers: each hostile folder ends in a named error, at once and in little memory, and runs no code."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from optimum_rmtkd import RMTKDConfig, RMTKDError, TernaryConfig, compress_features, compress_head
from optimum_rmtkd.hub.loading import load_model
from optimum_rmtkd.surgery import narrow_to

from . import hostile
from .surgery import zoo


RECIPE = RMTKDConfig(round_to=4, min_width=4, calibration_samples=16, refit=False, importance="variance")
WIDTHS = {"hidden": 20, "embedding": 8, "layer.0.heads": 6, "layer.0.intermediate": 24}
LOADERS = {"narrow": AutoModelForSequenceClassification, "part": AutoModelForSequenceClassification}
# Read by transformers before any code of this package runs; its errors are AttributeErrors, KeyErrors and the like.
STOCK = {name for name in hostile.DAMAGED if name.startswith(("config", "type"))}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    """Folders of a narrowed model, a ternary network, one from its seed, and a narrowed model with a ternary part."""
    root, data = tmp_path_factory.mktemp("good"), zoo.batches("bert", count=2)
    small = narrow_to(zoo.make("bert", "ForSequenceClassification"), data, WIDTHS, RECIPE, progress=False)
    x, y = torch.randn(60, 10), torch.arange(60) % 3
    steps = TernaryConfig(hidden=(64, 48), mode="min_shift")
    models = {
        "narrow": small,
        "part": compress_head(small, "classifier", data, TernaryConfig(hidden=(64,)))[0],
        "network": compress_features(x, y, steps)[0],
        "seed": compress_features(x, y, steps.replace(storage="seed"))[0],
    }
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


def spoiled(good: dict[str, Path], case: str, folder: Path) -> tuple[str, Path]:
    kind, change = hostile.ALL[case]
    shutil.copytree(good[kind], folder / "model")
    change(folder / "model")
    return kind, folder / "model"


def answers(model) -> torch.Tensor:
    if model.main_input_name == "features":
        with torch.no_grad():
            return model(torch.linspace(-1, 1, 20).reshape(2, 10)).logits
    return zoo.outputs(model, zoo.batches("bert", count=1)[0])


def test_the_folders_are_good_before_they_are_spoiled(good):
    for kind, folder in good.items():
        again = LOADERS.get(kind, AutoModel).from_pretrained(folder)
        assert zoo.close(answers(again), answers(load_model(folder))), kind


@pytest.mark.parametrize("case", [*hostile.ABSURD, *hostile.WRONG, *hostile.DAMAGED])
def test_a_hostile_folder_is_refused_by_name(good, case, tmp_path):
    _, folder = spoiled(good, case, tmp_path)
    with pytest.raises(RMTKDError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 2000
    assert not Path("/tmp/rmtkd_was_here").exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in hostile.ALL if case not in STOCK])
def test_an_auto_class_refuses_it_as_well_or_loads_the_same_model(good, case, tmp_path):
    """An Auto class does not ask for the name of the class; missing files are an OSError of transformers'."""
    kind, folder = spoiled(good, case, tmp_path)
    auto = LOADERS.get(kind, AutoModel)
    try:
        model = auto.from_pretrained(folder)
    except (RMTKDError, OSError):
        return
    assert zoo.close(answers(model), answers(auto.from_pretrained(good[kind])))


def test_code_in_the_folder_is_not_run(good, tmp_path):
    shutil.copytree(good["narrow"], tmp_path / "model")
    evil, touched = tmp_path / "model", tmp_path / "was here"
    for file in [*evil.glob("*.py"), evil / "evil.py"]:
        file.write_text(f"open({str(touched)!r}, 'w')")
    hostile.with_fields(
        auto_map={"AutoConfig": "evil.Config", "AutoModelForSequenceClassification": "a/b--evil.Model"}
    )(evil)
    wanted = answers(load_model(good["narrow"]))
    assert zoo.close(answers(load_model(evil)), wanted)
    assert zoo.close(answers(AutoModelForSequenceClassification.from_pretrained(evil)), wanted)
    assert not touched.exists()


MEASURE = """
import resource, sys, time
import optimum_rmtkd
from optimum_rmtkd.hub.loading import load_model

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

good, *folders = sys.argv[1:]
for folder in good.split(","):
    load_model(folder)
for folder in folders:
    before, start = peak(), time.process_time()
    try:
        load_model(folder)
    except optimum_rmtkd.RMTKDError:
        pass
    else:
        print(folder, "was loaded")
    if peak() - before > 100:
        print(folder, f"took {peak() - before:.0f} MB")
    if time.process_time() - start > 5:
        print(folder, f"took {time.process_time() - start:.0f} s")
print("done")
"""


def test_refusing_absurd_sizes_takes_little_memory_and_time(good, tmp_path):
    """In one process, in which each folder may raise the peak by 100 MB."""
    folders = []
    for number, case in enumerate(hostile.ABSURD):
        folders.append(str(spoiled(good, case, tmp_path / f"{number}-{case.replace(' ', '-')}")[1]))
    known = ",".join(str(folder) for folder in good.values())
    done = subprocess.run([sys.executable, "-c", MEASURE, known, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n") == ["done", ""]


def test_a_later_format_says_to_upgrade(good, tmp_path):
    _, folder = spoiled(good, "version 5", tmp_path)
    with pytest.raises(RMTKDError, match=r"rmtkd\.version: got 5, expected 4 at most.*pip install -U"):
        load_model(folder)


def test_a_config_without_a_version_is_of_the_first_format(good, tmp_path):
    shutil.copytree(good["narrow"], tmp_path / "model")
    hostile.edited(lambda config: config["rmtkd"].pop("version"))(tmp_path / "model")
    assert zoo.close(answers(load_model(tmp_path / "model")), answers(load_model(good["narrow"])))


WITHOUT = """
import sys
sys.modules["optimum_rmtkd"] = None
from transformers import AutoModelForSequenceClassification
try:
    AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
except ValueError as error:
    print(type(error).__module__.rpartition(".")[2], type(error).__name__, error)
"""


def test_the_code_of_the_folder_refuses_it_without_this_package(good, tmp_path, monkeypatch):
    _, folder = spoiled(good, "attribute _modules", tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    done = subprocess.run([sys.executable, "-c", WITHOUT, folder], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("spec_rmtkd SpecMismatchError config.json, rmtkd.spec.attrs['@.encoder.layer']")
