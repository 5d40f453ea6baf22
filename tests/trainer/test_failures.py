"""A process that ends says why, and the others repeat it instead of "connection closed by peer"."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from optimum_rmtkd.errors import RMTKDError
from optimum_rmtkd.trainer import failures
from optimum_rmtkd.trainer.failures import NoticeBoard


ROOT = Path(__file__).resolve().parents[2]
LOST = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:21418.")


def board(rank: int, store: dist.Store) -> NoticeBoard:
    made = NoticeBoard(SimpleNamespace(process_index=rank, num_processes=2), store)
    made._store = dist.PrefixStore("one", store)  # that of the same call in the other process
    return made


def fail(board: NoticeBoard, error: BaseException) -> BaseException:
    with pytest.raises(type(error) if not isinstance(error, RuntimeError) else Exception) as caught:
        with board.watching():
            raise error
    return caught.value


def test_the_cause_of_a_lost_connection_is_told():
    store = dist.HashStore()
    ours, theirs = board(0, store), board(1, store)
    mine = ValueError("no\nsuch column")
    assert fail(theirs, mine) is mine
    told = fail(ours, LOST)
    assert isinstance(told, RMTKDError) and told.__cause__ is LOST
    assert str(told) == "Another process failed, so all stop. process 1: ValueError: no such column"


def test_what_a_lost_connection_led_to_is_explained_as_well():
    store = dist.HashStore()
    fail(board(1, store), KeyboardInterrupt())
    wrapped = ValueError("cannot evaluate")
    wrapped.__cause__ = LOST
    assert "process 1: KeyboardInterrupt" in str(fail_with(board(0, store), wrapped))


def fail_with(board: NoticeBoard, error: Exception) -> RMTKDError:
    with pytest.raises(RMTKDError) as caught:
        with board.watching():
            raise error
    return caught.value


def test_an_error_of_ones_own_is_never_replaced():
    store = dist.HashStore()
    fail(board(1, store), ValueError("theirs"))
    for mine in (RuntimeError("the matrix is singular"), KeyError("loss"), ValueError("x"), SystemExit(3)):
        assert fail(board(0, store), mine) is mine


def test_a_lost_connection_that_nobody_explained_stays():
    assert fail(board(0, dist.HashStore()), LOST) is LOST
    alone = NoticeBoard(SimpleNamespace(process_index=0, num_processes=1))
    assert fail(alone, LOST) is LOST


def test_the_first_notice_stands():
    store = dist.HashStore()
    fail(board(0, store), ValueError("first"))
    fail(board(1, store), ValueError("second"))
    assert "first" in str(fail_with(board(0, store), LOST))


class Gone:
    """A store whose process is gone."""

    def __getattr__(self, name):
        def lost(*_):
            raise dist.DistNetworkError("failed to recv, got 0 bytes")

        return lost


def test_a_store_that_is_gone_hides_no_error():
    gone = NoticeBoard(SimpleNamespace(process_index=0, num_processes=2))
    gone._store = Gone()
    for mine in (ValueError("mine"), LOST):
        assert fail(gone, mine) is mine


def both(store: dist.Store, *works) -> list[BaseException | None]:
    """What each process leaves a block with in which it does its work together with the other."""
    boards, left = [board(rank, store) for rank in range(2)], [None, None]

    def part(rank):
        try:
            with boards[rank].together():
                works[rank]()
        except BaseException as error:
            left[rank] = error

    threads = [threading.Thread(target=part, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return left


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize("first", [0, 1])
def test_what_fails_in_one_of_those_that_work_together_fails_in_all(first):
    mine = ValueError("no room")
    works = [lambda: None, lambda: None]
    assert both(dist.HashStore(), *works) == [None, None]
    works[first] = raising(mine)
    left = both(dist.HashStore(), *works)
    assert left[first] is mine
    assert str(left[1 - first]) == f"Another process failed, so all stop. process {first}: ValueError: no room"


def test_who_waits_in_a_collective_operation_is_freed_and_hears_why(monkeypatch):
    """The one that fails breaks the connections before it goes."""
    broken = threading.Event()
    monkeypatch.setattr(failures, "GRACE", 0.1)
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", broken.set)

    def in_a_collective():
        assert broken.wait(10)
        raise LOST

    mine = OSError("full")
    left = both(dist.HashStore(), in_a_collective, raising(mine))
    assert left[1] is mine and isinstance(left[0], RMTKDError) and left[0].__cause__ is LOST
    assert str(left[0]).endswith("process 1: OSError: full")


def test_a_torch_without_its_private_names_breaks_the_default_group_or_says_what_it_cannot(monkeypatch, caplog):
    group = type("Group", (), {"abort": lambda self: broken.append(self)})()
    broken = []
    monkeypatch.setattr(failures.dist, "group", SimpleNamespace(WORLD=group))
    monkeypatch.delattr(dist.distributed_c10d, "_abort_process_group", raising=False)
    failures._break_connections()
    assert broken == [group] and not caplog.records
    monkeypatch.setattr(failures.dist, "group", SimpleNamespace(WORLD=object()))
    failures._break_connections()
    assert "cannot break off a collective operation" in caplog.text
    monkeypatch.delattr(dist.distributed_c10d, "_get_default_store", raising=False)
    assert failures._default_store() is None and "does not give out the store" in caplog.text


def test_each_of_two_that_fail_has_its_own_error():
    errors = [RMTKDError("mine"), RMTKDError("mine as well")]
    assert both(dist.HashStore(), *map(raising, errors)) == errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("driver", "rank", "moment"),
    [
        ("trainer", 0, "journal"),
        ("trainer", 1, "measure"),
        ("trainer", 0, "save"),
        ("trainer", 1, "callback"),
        ("loop", 1, "measure"),
        ("loop", 0, "journal"),
    ],
)
def test_both_processes_of_two_name_the_cause(tmp_path, driver, rank, moment):
    told = told_by_two(tmp_path, driver, rank, moment)
    assert told[rank] == f"OSError: the {moment} broke"
    assert told[1 - rank] == f"RMTKDError: Another process failed, so all stop. process {rank}: {told[rank]}"


def told_by_two(tmp_path, driver: str, rank: int, moment: str) -> list[str]:
    """What each of two processes ends with, of which one breaks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["--monitor-interval", "5"]  # else it may end the other one before that has spoken
    command += ["-m", "tests.trainer.failing", str(tmp_path), driver, str(rank), moment]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert (tmp_path / "error-0.txt").is_file() and (tmp_path / "error-1.txt").is_file(), done.stderr[-3000:]
    return [(tmp_path / f"error-{r}.txt").read_text() for r in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("driver", ["trainer", "loop", "FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_disk_that_is_full_for_one_process_ends_both_in_seconds(tmp_path, driver, rank):
    """Also where the other one waits in a collective operation: the gathering of a whole state dict, the end of
    sharded writing."""
    told = told_by_two(tmp_path, driver, rank, "disk")
    name = "step_2" if driver == "loop" else "checkpoint-2"
    full = f"DiskFullError: Checkpoint {name} could not be written to the end"
    assert told[rank].startswith(full)
    other = f"RMTKDError: Another process failed, so all stop. process {rank}: {full}"
    assert told[1 - rank].startswith((full, other) if driver == "SHARDED_STATE_DICT" else other)
    moments = [json.loads((tmp_path / f"moments-{r}.json").read_text()) for r in range(2)]
    assert max(ends for *_, ends in moments) - moments[rank][0] < 30
    assert [path.name for path in (tmp_path / "run").iterdir() if "2" in path.name] == []
