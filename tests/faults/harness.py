"""Kills a run at a chosen moment, and lets the same command go on.

Each run is a fork of this process, which has everything imported: a fresh one would take seconds to begin. A kill is
SIGKILL that the run sends to itself at its n-th file event below its folder, or its n-th pass through a module.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from optimum_rmtkd.checkpoints import fault_of


RUN_LIMIT = 600  # seconds
EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


@dataclass(frozen=True)
class Kill:
    """SIGKILL at the `at`-th `kind` ("event", "pass"), counted from 1, of process `rank`."""

    kind: str
    at: int
    rank: int = 0


class Watch:
    """Counts what happens in this process from here on, and kills it."""

    def __init__(self, folder: Path, kill: Kill | None):
        self.folder, self.kill = f"{folder}{os.sep}", kill
        self.events: list[str] = []
        self.passes = 0
        sys.addaudithook(self._heard)
        torch.nn.modules.module.register_module_forward_pre_hook(self._passed)
        self._watch_native_writers()

    def event(self, what: str) -> None:
        self.events.append(what.replace(self.folder, ""))
        self._kill_at("event", len(self.events))

    def _kill_at(self, kind: str, count: int) -> None:
        if self.kill is not None and self.kill.kind == kind and self.kill.at == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def _passed(self, module, inputs) -> None:
        self.passes += 1
        self._kill_at("pass", self.passes)

    def _heard(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            if isinstance(path, (str, os.PathLike)) and self._ours(path) and (flags or 0) & (os.O_WRONLY | os.O_RDWR):
                self.event(f"open {path}")
        elif event in EVENTS and self._ours(args[0]):
            self.event(f"{event} {args[0]}")

    def _ours(self, path) -> bool:
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(self.folder)

    def _watch_native_writers(self) -> None:
        """They open files without Python: an event before, one with half of the bytes written, and one after."""
        import accelerate.utils.other
        import safetensors.torch
        import transformers.modeling_utils

        save_file, save = safetensors.torch.save_file, torch.save

        def tensors(values, file, *args, **kwargs):
            return self._written("safetensors", file, lambda: save_file(values, file, *args, **kwargs))

        def pickled(value, file, *args, **kwargs):
            return self._written("torch.save", file, lambda: save(value, file, *args, **kwargs))

        safetensors.torch.save_file = tensors
        transformers.modeling_utils.safe_save_file = accelerate.utils.other.safe_save_file = tensors
        torch.save = pickled

    def _written(self, how: str, file, write: Callable[[], object]) -> object:
        if not isinstance(file, (str, os.PathLike)) or not self._ours(file):
            return write()
        self.event(f"{how} before {file}")
        result = write()
        if self.kill == Kill("event", len(self.events) + 1, 0 if self.kill is None else self.kill.rank):
            os.truncate(file, os.path.getsize(file) // 2)
        self.event(f"{how} half {file}")
        self.event(f"{how} after {file}")
        return result


def start(run: Callable[[Path], None], out: Path, kill: Kill | None = None, processes: int = 1) -> list[int]:
    """Run to the end, or to the kill; exit codes. `out`.log gets what was printed, `out`.json what happened in each
    process. Where one is killed, all are, as by a scheduler."""
    port = _free_port()
    children = {}
    for rank in range(processes):
        child = os.fork()
        if not child:
            _be_a_run(run, out, kill if kill is not None and kill.rank == rank else None, rank, processes, port)
        children[child] = rank
    codes: dict[int, int] = {}
    end = time.monotonic() + RUN_LIMIT
    while len(codes) < processes:
        for child, rank in children.items():
            if rank not in codes and (status := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(status[1])
        if any(codes.values()) or time.monotonic() > end:
            for child, rank in children.items():
                if rank not in codes:
                    os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [codes[rank] for rank in range(processes)]


def _be_a_run(run, out: Path, kill: Kill | None, rank: int, processes: int, port: int) -> None:
    code = 1
    try:
        log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        _processes(rank, processes, port)
        watch = Watch(out, kill)
        run(out)
        Path(f"{out}.{rank}.json").write_text(json.dumps({"events": watch.events, "passes": watch.passes}))
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _processes(rank: int, processes: int, port: int) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):  # of this process before it was forked
        state._shared_state.clear()
    if processes > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ.update({name: str(value) for name, value in (places | {"MASTER_PORT": port}).items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def happened(out: Path, rank: int = 0) -> dict:
    """{"events", "passes"} of a run that came to its end."""
    return json.loads(Path(f"{out}.{rank}.json").read_text())


def digest(out: Path) -> str:
    """Of the weights that a run ended with."""
    return hashlib.sha256((out / "final" / "model.safetensors").read_bytes()).hexdigest()


def log(out: Path) -> str:
    """All that was printed."""
    return Path(f"{out}.log").read_text(encoding="utf8", errors="replace")


def assert_goes_on(run, out: Path, kill: Kill, expected: str, processes: int = 1) -> None:
    """Killed there, no checkpoint is half; the same command goes on, ends with the same bits, and leaves nothing."""
    codes = start(run, out, kill, processes)
    assert codes[kill.rank] == -signal.SIGKILL, (kill, codes, log(out)[-3000:])
    half = {str(path): fault for path in _checkpoints(out) if (fault := fault_of(path)) is not None}
    assert not half, (kill, half)
    codes = start(run, out, processes=processes)
    assert codes == [0] * processes, (kill, codes, log(out)[-3000:])
    assert digest(out) == expected, (kill, log(out)[-3000:])
    left = [str(path) for path in out.rglob(".*") if path.name.endswith((".partial", ".old"))]
    assert not left, (kill, left)


def _checkpoints(out: Path) -> list[Path]:
    kinds = ("checkpoint-*", "step_*", "last", "runs/checkpoint-*")
    return [path for kind in kinds for path in out.glob(kind) if path.is_dir()]
