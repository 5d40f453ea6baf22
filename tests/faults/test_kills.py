"""Whatever kills a run, the same command goes on, and ends where the uninterrupted one would have ended."""

from __future__ import annotations

import random

import pytest

from . import runs
from .harness import Kill, assert_goes_on, digest, happened, log, start


MOMENTS = 20
RUNS = {"trainer": runs.trainer, "loop": runs.loop, "compress": runs.compress}
LAUNCHES = [(name, 1) for name in RUNS] + [("trainer", 2), ("loop", 2)]  # compress runs in one process


class Reference:
    """A run that nothing interrupts."""

    def __init__(self, folder, name: str, processes: int):
        self.run, self.folder, self.processes = (RUNS | {"last": runs.last})[name], folder, processes
        if name == "compress":
            runs.compress_inputs(folder)
        out = folder / "whole"
        codes = start(self.run, out, processes=processes)
        assert codes == [0] * processes, log(out)[-3000:]
        self.digest = digest(out)
        self.happened = [happened(out, rank) for rank in range(processes)]

    def of_a_checkpoint(self, rank: int) -> range:
        """Numbers of the file events of the checkpoint after six steps: written, named, older ones pruned."""
        # under their whole names: those of files that are being written end at random
        kind = "step_" if self.run is runs.loop else "checkpoint-"
        found = range(self.first(rank, f".{kind}6.partial"), self.first(rank, f".{kind}8.partial"))
        assert len(found) > 3, self.happened[rank]["events"]
        return found

    def first(self, rank: int, *words: str) -> int:
        """Number of the first file event that holds these words."""
        events = self.happened[rank]["events"]
        return next(number for number, event in enumerate(events, 1) if all(word in event for word in words))

    def passes(self) -> list[int]:
        """Seeded moments, all over the run."""
        draw = random.Random(f"{self.run.__name__} {self.processes}")
        return sorted(draw.randint(1, self.happened[0]["passes"]) for _ in range(MOMENTS))

    def assert_goes_on(self, kill: Kill) -> None:
        out = self.folder / f"{kill.kind}-{kill.at}-{kill.rank}"
        assert_goes_on(self.run, out, kill, self.digest, self.processes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    made = {}

    def get(name: str, processes: int = 1) -> Reference:
        if (name, processes) not in made:
            made[name, processes] = Reference(tmp_path_factory.mktemp(f"{name}{processes}"), name, processes)
        return made[name, processes]

    return get


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on(reference):
    """The short form: half of the weights, all but the name, and between the name and the pruning of an older one."""
    whole = reference("trainer")
    place = ".checkpoint-6.partial/checkpoint-6"
    for words in (("safetensors half", place), ("os.rename", place), ("os.rename checkpoint-2",)):
        moment = whole.first(0, *words)
        whole.assert_goes_on(Kill("event", moment))


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("name", "processes"), LAUNCHES)
def test_killed_at_every_file_event_of_a_checkpoint(reference, name, processes):
    whole = reference(name, processes)
    for rank in range(processes):
        for moment in whole.of_a_checkpoint(rank):
            whole.assert_goes_on(Kill("event", moment, rank))


@pytest.mark.slow
@pytest.mark.faults
def test_killed_at_every_file_event_of_a_checkpoint_that_replaces_one_of_its_name(reference):
    whole = reference("last")
    events = whole.happened[0]["events"]
    begun = [number for number, event in enumerate(events, 1) if event == "os.mkdir .last.partial"]
    for moment in range(begun[2], begun[3]):
        whole.assert_goes_on(Kill("event", moment))


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize(("name", "processes"), LAUNCHES)
def test_killed_at_seeded_moments_of_a_run(reference, name, processes):
    whole = reference(name, processes)
    for moment in whole.passes():
        whole.assert_goes_on(Kill("pass", moment))


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("name", RUNS)
def test_killed_while_the_result_is_saved(reference, name):
    whole = reference(name)
    events = whole.happened[0]["events"]
    first = next(number for number, event in enumerate(events, 1) if "final" in event)
    for moment in range(first, len(events) + 1, 3):
        whole.assert_goes_on(Kill("event", moment))
