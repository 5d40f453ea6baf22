"""SIGTERM: who listens, and who is left alone."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace

import pytest

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


def test_where_no_step_ends_soon_the_process_ends(capfd):
    termination = Termination(lambda: "checkpoint-4 is whole")
    with pytest.raises(Terminated):
        with termination.listening():
            termination.soon = True
            with termination.busy():
                terminate()
            pytest.fail("training went on")
    assert "checkpoint-4 is whole" in capfd.readouterr().err


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
