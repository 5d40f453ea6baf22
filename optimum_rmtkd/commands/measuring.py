"""What a model costs besides time: FLOPs, peak memory, energy. Nothing is estimated where it cannot be measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RMTKDError


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["NOT_MEASURABLE", "count_flops", "energy_meter", "peak_memory"]

NOT_MEASURABLE = "not measurable here"
RAPL = Path("/sys/class/powercap")
ENERGY_SECONDS = 10.0  # of passes of each model: counters tick in milliseconds to a second


def count_flops(model: PreTrainedModel, inputs: dict[str, Tensor]) -> int:
    """Floating-point operations of the products of one forward pass, 2 a multiply-add (torch's own counter)."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Fused attention is not counted on every device; the plain form does the same products.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(**inputs)
    return counter.get_total_flops()


def peak_memory(name: str, batch: int, length: int, dtype: str, device: str) -> int | None:
    """Bytes that loading a model and one forward pass add to a process of its own, at their peak.

    On a GPU: the peak of the allocator. Elsewhere: the growth of the resident set above that with all libraries
    loaded; None where the system does not tell (Windows).

    Raises:
        RMTKDError: the process failed.
    """
    command = [sys.executable, "-m", __name__, name, str(batch), str(length), dtype, device]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"its process ended with code {done.returncode}"]
        raise RMTKDError(f"Cannot measure the memory of '{name}': {said[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _measure_memory(name: str, batch: int, length: int, dtype: str, device: str) -> int | None:
    """What `peak_memory` runs in a fresh process."""
    import torch
    from transformers import AutoModel

    import optimum_rmtkd  # noqa: F401  registers the reduced classes

    from ..batches.examples import example_inputs
    from ..hub.loading import load_config, load_model

    # The modelling code and the libraries of the first product are not the model's.
    with torch.device("meta"):
        AutoModel.from_config(load_config(name), trust_remote_code=False)
    with torch.inference_mode():
        torch.nn.Linear(8, 8).to(device)(torch.zeros(8, 8, device=device))
    _forget_peak()
    base = _resident(peak=False)
    model = load_model(name, getattr(torch, dtype)).to(device)
    inputs = {key: value.to(device) for key, value in example_inputs(model, batch, length).items()}
    if dtype != "float32":
        inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.inference_mode():
        model(**inputs)
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return None if base is None else _resident() - base


def _resident(peak: bool = True) -> int | None:
    """Bytes of the resident set, now or at its peak; None where the system does not tell.

    Linux keeps the peak of `getrusage` over fork and exec, so that a child of a large process would start high.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        field = "VmHWM:" if peak else "VmRSS:"
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    """Let the peak start anew from here, where the system can (Linux): importing takes more memory than it leaves
    behind."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def energy_meter(device: str) -> Callable[[Callable[[], None]], float] | None:
    """A function that runs another one over and over and returns the joules of one run; None where no counter can be
    read.

    GPU: NVML's own energy counter. CPU: codecarbon over RAPL; without RAPL codecarbon would multiply a table's wattage
    by the time, which says nothing about the model that the time does not.

    Raises:
        RMTKDError: the counter is there, codecarbon or nvidia-ml-py (the extra `energy`) is not.
    """
    if device == "cuda":
        return _nvml_meter()
    readable = [path for path in RAPL.glob("*/energy_uj") if _can_read(path)] if RAPL.is_dir() else []
    return _rapl_meter() if readable else None


def _can_read(path: Path) -> bool:
    try:
        path.read_text()
    except OSError:
        return False
    return True


def _repeated(run: Callable[[], None]) -> int:
    """Run for ENERGY_SECONDS; the number of runs."""
    start, runs = time.perf_counter(), 0
    while runs == 0 or time.perf_counter() - start < ENERGY_SECONDS:
        run()
        runs += 1
    return runs


def _rapl_meter() -> Callable[[Callable[[], None]], float]:
    try:
        from codecarbon import OfflineEmissionsTracker
    except ImportError as error:
        raise RMTKDError('--energy needs codecarbon: pip install "optimum-rmtkd[energy]".') from error

    def measure(run: Callable[[], None]) -> float:
        # The country only matters for the carbon, which is not reported.
        tracker = OfflineEmissionsTracker(
            country_iso_code="FRA",
            save_to_file=False,
            log_level="error",
            measure_power_secs=1,
            allow_multiple_runs=True,
        )
        tracker.start()
        runs = _repeated(run)
        tracker.stop()
        # Of the processor alone: the memory's share is a table's wattage times the time.
        return 3.6e6 * tracker.final_emissions_data.cpu_energy / runs

    return measure


def _nvml_meter() -> Callable[[Callable[[], None]], float] | None:
    try:
        import pynvml
    except ImportError as error:
        raise RMTKDError('--energy on a GPU needs nvidia-ml-py: pip install "optimum-rmtkd[energy]".') from error
    import torch

    try:
        pynvml.nvmlInit()
        # by name: CUDA_VISIBLE_DEVICES numbers the devices anew, NVML does not
        name = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(name)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None

    def measure(run: Callable[[], None]) -> float:
        torch.cuda.synchronize()
        start = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        runs = _repeated(run)
        torch.cuda.synchronize()
        return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start) / 1000 / runs

    return measure


if __name__ == "__main__":
    name, batch, length, dtype, device = sys.argv[1:]
    print(json.dumps(_measure_memory(name, int(batch), int(length), dtype, device)))
