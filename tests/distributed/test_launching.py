"""`accelerate launch` in its configurations for CPUs. (With `--num_processes 2` it runs one process there, unless MPI
is installed; torchrun runs two: `test_two_processes`.)"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from .test_two_processes import ROOT


def launched(out, *options: str, module: str):
    """The script under `accelerate launch`, to its end."""
    out.mkdir()
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command = [sys.executable, *launch, *options, "-m", f"tests.distributed.{module}", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train_script", "loop_script"])
@pytest.mark.parametrize(
    "options",
    [
        ("--mixed_precision", "no"),
        ("--mixed_precision", "bf16"),
        ("--dynamo_backend", "eager"),
        ("--mixed_precision", "bf16", "--dynamo_backend", "eager"),
    ],
    ids=" ".join,
)
def test_it_trains_and_is_cut(tmp_path, options, module):
    done = launched(tmp_path / "out", *options, module=module)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads((tmp_path / "out" / "result-0.json").read_text())
    assert len(result["stages"]) == 2 and {stage["status"] for stage in result["stages"]} == {"accepted"}
    tensors = torch.load(tmp_path / "out" / "weights-0.pt")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert (result["wrapped"] == "OptimizedModule") == ("eager" in options)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train_script", "loop_script"])
def test_half_precision_without_a_gpu_is_refused(tmp_path, module):
    done = launched(tmp_path / "out", "--mixed_precision", "fp16", module=module)
    assert done.returncode != 0 and "fp16 mixed precision requires a GPU" in done.stderr
    assert not list((tmp_path / "out").glob("result-*"))
