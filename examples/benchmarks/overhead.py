"""What narrowing and training cost beside the work itself, on random weights: nothing is downloaded.

    python examples/benchmarks/overhead.py              both
    python examples/benchmarks/overhead.py narrow       time and peak memory of each phase of a cut, BERT-base (110 M)
    python examples/benchmarks/overhead.py train        RMTKDTrainer at equal width against transformers.Trainer

`--layers 6 --width 384` makes the model smaller, `--save FILE` keeps the widths and weights that come out, `--against
FILE` compares with them. Seconds are processor time of this process, which other work on the machine lengthens little;
seconds on the clock stand beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import logging

from optimum_rmtkd import RMTKDConfig, RMTKDTrainer, count_parameters, narrow
from optimum_rmtkd.objectives import TaskLoss
from optimum_rmtkd.surgery import surgeon


PHASES = {  # printed name: (where it is looked up, its name there); one that runs inside another counts for itself
    "calibration": (surgeon, "calibrate"),
    "plan": (surgeon.Surgeon, "plan"),
    "cut": (surgeon.Surgeon, "operate"),
    "refit": (surgeon, "refit"),
    "divergence": (surgeon.Surgeon, "divergence"),
    "report": (surgeon.Surgeon, "report"),
}
EVERY = 0.02  # seconds between two looks at the memory
STEPS = 8  # training steps of one measured round


@dataclass
class Cost:
    """What one phase took: seconds of the processor and of the clock, and the most bytes resident meanwhile."""

    processor: float = 0.0
    clock: float = 0.0
    peak: int = 0


class Meter:
    """Measures nested phases: each counts for itself, without those inside it."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}
        self._running, self._over = ["other"], threading.Event()
        self._since = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.process_time(), time.perf_counter()

    def _book(self) -> None:
        cost, now = self.costs.setdefault(self._running[-1], Cost()), self._now()
        cost.processor += now[0] - self._since[0]
        cost.clock += now[1] - self._since[1]
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._book()
        self._running.append(name)
        try:
            yield
        finally:
            self._book()
            self._running.pop()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the resident memory until this context ends."""

        def look() -> None:
            while not self._over.wait(EVERY):
                cost = self.costs.setdefault(self._running[-1], Cost())
                cost.peak = max(cost.peak, resident())

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            self._book()
            self._over.set()
            thread.join()


def resident() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@contextlib.contextmanager
def metered(meter: Meter) -> Iterator[None]:
    """Every function of PHASES under the meter."""
    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in PHASES.items()}

    def wrapped(name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            with meter.phase(name):
                return originals[name](*args, **kwargs)

        return call

    for name, (owner, attribute) in PHASES.items():
        setattr(owner, attribute, wrapped(name))
    try:
        with meter.watching():
            yield
    finally:
        for name, (owner, attribute) in PHASES.items():
            setattr(owner, attribute, originals[name])


def bert(layers: int, width: int) -> BertForSequenceClassification:
    """A random BERT of ordinary proportions; 12 layers of 768 features are BERT-base."""
    torch.manual_seed(0)
    shape = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    return BertForSequenceClassification(BertConfig(**shape, num_attention_heads=width // 64)).eval()


def texts(count: int, length: int, batch: int) -> list[dict[str, torch.Tensor]]:
    """Random token ids."""
    ids = torch.randint(1000, 30000, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(batch)]


def widths_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def narrowing(given: argparse.Namespace) -> None:
    """Time and peak memory of each phase of one cut by half."""
    model, data = bert(given.layers, given.width), texts(given.texts, given.length, given.batch)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{count_parameters(model):,} parameters, {size / 1e9:.2f} GB; {given.texts} texts of {given.length} tokens")
    gc.collect()
    start, meter = resident(), Meter()
    config = RMTKDConfig(target_reduction=0.5, calibration_samples=given.texts)
    with metered(meter):
        small = narrow(model, data, config, progress=False)
    print(f"{'':12} {'processor s':>12} {'clock s':>9} {'peak GB':>8}")
    for name, cost in meter.costs.items():
        print(f"{name:12} {cost.processor:12.1f} {cost.clock:9.1f} {cost.peak / 1e9:8.2f}")
    whole = [sum(getattr(cost, key) for cost in meter.costs.values()) for key in ("processor", "clock")]
    peak = max(cost.peak for cost in meter.costs.values())
    print(f"{'all':12} {whole[0]:12.1f} {whole[1]:9.1f} {peak / 1e9:8.2f} (before it: {start / 1e9:.2f})")
    print(f"{count_parameters(small):,} parameters after it")
    if given.save:
        torch.save(small.state_dict(), given.save)
    if given.against:
        compare(small, torch.load(given.against, weights_only=True), data[0])


def compare(small: torch.nn.Module, weights: dict[str, torch.Tensor], batch: dict[str, torch.Tensor]) -> None:
    """Whether a cut gives the widths of another one, and how far its weights and answers are from it."""
    state = small.state_dict()
    same = {name: tuple(t.shape) for name, t in state.items()} == {n: tuple(t.shape) for n, t in weights.items()}
    print("widths: the same" if same else "widths: DIFFERENT")
    if same:
        off = {
            name: float((t - weights[name]).norm() / weights[name].norm().clamp_min(1e-30))
            for name, t in state.items()
            if t.is_floating_point()
        }
        worst = sorted(off, key=off.__getitem__, reverse=True)
        close = sum(share < 1e-3 for share in off.values())
        with torch.no_grad():
            mine = small(**batch).logits
            small.load_state_dict(weights)
            theirs = small(**batch).logits
        print(f"weights: {close} of {len(off)} tensors within 1e-3 of their norm")
        print("others: " + ", ".join(f"{name} {off[name]:.1e}" for name in worst[:6]))
        print(f"logits: {float((mine - theirs).norm() / theirs.norm()):.1e} of their norm")


class Texts(torch.utils.data.Dataset):
    """Random texts with a label each."""

    def __init__(self, count: int, length: int):
        (self.batch,) = texts(count, length, count)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {key: value[i] for key, value in self.batch.items()} | {"labels": torch.tensor(i % 2)}


def training(given: argparse.Namespace) -> None:
    """Both trainers in turn, the same steps on the same data, at full width and without distillation terms."""
    data, ratios = Texts(STEPS * given.batch, given.length), []

    def seconds(kind: type, folder: str, **options: Any) -> float:
        model = bert(given.layers, given.width)
        args = TrainingArguments(
            folder, per_device_train_batch_size=given.batch, max_steps=STEPS, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, seed=0, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = kind(model=model, args=args, train_dataset=data, **options)
        start = time.process_time()
        trainer.train()
        return time.process_time() - start

    with tempfile.TemporaryDirectory() as folder:
        options = {"rmtkd_config": RMTKDConfig(schedule="none"), "objectives": [TaskLoss(1.0)]}
        for number in range(given.rounds + 1):
            plain, ours = seconds(Trainer, folder), seconds(RMTKDTrainer, folder, **options)
            if number:  # the first round warms up
                ratios.append(ours / plain)
                print(f"round {number}: Trainer {plain:.2f} s, RMTKDTrainer {ours:.2f} s, ratio {ratios[-1]:.3f}")
    print(f"median ratio over {len(ratios)} rounds of {STEPS} steps: {statistics.median(ratios):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["narrow", "train"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", help="file for the weights that come out")
    parser.add_argument("--against", help="file that --save wrote, to compare with")
    given = parser.parse_args()
    logging.set_verbosity_error()
    if given.part != "train":
        narrowing(given)
    if given.part != "narrow":
        training(given)


if __name__ == "__main__":
    main()
