"""A process that ends says why, and the others repeat it instead of "connection closed by peer"."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from optimum_rmtkd.errors import RMTKDError
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
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += ["--monitor-interval", "5"]  # else it may end the other one before that has spoken
    command += ["-m", "tests.trainer.failing", str(tmp_path), driver, str(rank), moment]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    told = [(tmp_path / f"error-{r}.txt").read_text() for r in range(2)]
    assert told[rank] == f"OSError: the {moment} broke"
    assert told[1 - rank] == f"RMTKDError: Another process failed, so all stop. process {rank}: {told[rank]}"
