"""SIGTERM: who listens, and who is left alone."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from optimum_rmtkd.signals import Terminated, Termination, terminable


ALONE = SimpleNamespace(num_processes=1)


@pytest.fixture(autouse=True)
def nobody_listens():
    earlier = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, earlier)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_near_the_end_of_a_step_it_is_noted_and_a_second_one_is_the_systems(capfd):
    termination = Termination(lambda: "kept")
    with pytest.raises(Terminated) as caught:
        with termination.listening():
            termination.soon = True
            terminate()
            assert termination.agreed(ALONE) and termination.leaving
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert caught.value.code == 143 and "end of this step" in capfd.readouterr().err


def test_nobody_who_hears_it_is_no_reason_to_lose_the_run(capfd):
    """`python train.py 2>&1 | tee log`: a SIGTERM to the group ends the tee first."""
    reading, writing = os.pipe()
    os.close(reading)
    kept = os.dup(2)
    os.dup2(writing, 2)
    termination = Termination(lambda: "kept")
    try:
        with pytest.raises(Terminated):
            with termination.listening():
                termination.soon = True
                terminate()
                assert termination.agreed(ALONE)  # the step went on to its end
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(writing)


def test_where_no_step_ends_soon_the_process_ends(capfd):
    termination = Termination(lambda: "checkpoint-4 is whole")
    with pytest.raises(Terminated):
        with termination.listening():
            termination.soon = True
            with termination.busy():
                terminate()
            pytest.fail("training went on")
    assert "checkpoint-4 is whole" in capfd.readouterr().err


@pytest.mark.parametrize("then", ["busy", "over", "nothing"])
def test_one_that_comes_when_all_have_agreed_to_go_on_is_not_forgotten(then, capfd):
    """Between the question at the end of a step and a cut, the end of training, or the end of all."""
    termination = Termination(lambda: "checkpoint-4 is whole")
    with pytest.raises(Terminated):
        with termination.listening():
            termination.soon = True
            assert not termination.agreed(ALONE)
            terminate()
            if then == "busy":
                with termination.busy(False):
                    pass
                with termination.busy():
                    pytest.fail("the cut was made")
            if then == "over":
                termination.over()
                pytest.fail("the last stage was judged")
    assert "checkpoint-4 is whole" in capfd.readouterr().err


def test_what_is_due_and_left_to_the_next_run_ends_nothing():
    termination = Termination(str)
    with pytest.raises(Terminated):
        with termination.listening():
            termination.soon = True
            terminate()
            assert termination.agreed(ALONE)
            with termination.busy():
                saved = True
    assert saved


class Pair:
    """Two processes that do the same; the other one may have got a SIGTERM."""

    num_processes, device = 2, "cpu"

    def __init__(self):
        self.asked, self.other = 0, 0

    def reduce(self, tensor, how):
        self.asked += 1
        return 2 * tensor + torch.tensor([self.other, 0])


@pytest.mark.parametrize(("milliseconds", "most"), [(1, 64), (40, 13), (700, 1)])
def test_several_processes_ask_each_other_every_half_second(monkeypatch, milliseconds, most):
    clock = [0.0]
    monkeypatch.setattr("optimum_rmtkd.signals.time", SimpleNamespace(monotonic=lambda: clock[0]))
    pair, termination = Pair(), Termination(str)

    def step(**how):
        clock[0] += milliseconds / 1000
        return termination.agreed(pair, **how)

    assert not any(step(now=False) for _ in range(1000))
    assert 1000 / most <= pair.asked <= 1000 / most + 12  # it begins with each step
    pair.other = 1
    waited = next(number for number in range(1, 1001) if step(now=False))
    assert waited <= most
    pair.other = 0
    assert not step(now=True)
    pair.other = 1
    assert step(now=True)  # something long is due: nothing is put off


def test_the_earlier_handler_comes_back():
    termination = Termination(str)
    with termination.listening():
        assert signal.getsignal(signal.SIGTERM) == termination._come
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_handler_of_the_users_own_stays():
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    termination = Termination(str)
    with termination.listening(), terminable():
        terminate()
    assert heard == [1] and not termination.asked


def test_other_threads_listen_to_nothing():
    done = []

    def train():
        with Termination(str).listening(), terminable():
            done.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert done == [signal.SIG_DFL]


def test_training_listens_in_place_of_the_command_around_it():
    with pytest.raises(Terminated):
        with terminable():
            termination = Termination(str)
            with termination.listening():
                termination.soon = True
                terminate()
                assert termination.asked
