"""Requests from outside are seen between steps, and the strongest wins."""

import functools
import os
import signal

import pytest

from megatron_hypenet.errors import CheckpointError, SavedAndRequeue
from megatron_hypenet.supervision import signals
from megatron_hypenet.supervision.signals import (
    GO_ON,
    LEAVE,
    SAVE,
    Requests,
    leave_if_stopped,
    leaving_at_once,
)


@pytest.fixture(autouse=True)
def look_every_time(monkeypatch):
    monkeypatch.setattr(signals, "_FILE_CHECK_SECONDS", 0.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_signals_ask_to_leave_and_handlers_are_put_back(tmp_path, number, request):
    # whoever started the tests may ignore it, as nohup does
    request.addfinalizer(functools.partial(signal.signal, number, signal.getsignal(number)))
    signal.signal(number, signal.SIG_DFL)
    before = signal.getsignal(number)
    with Requests([tmp_path]) as requests:
        assert requests.poll() == GO_ON
        os.kill(os.getpid(), number)
        assert requests.poll() == LEAVE and requests.reason == number.name
    assert signal.getsignal(number) is before


def test_ctrl_c_asks_once_and_then_insists(tmp_path, capfd):
    before = signal.getsignal(signal.SIGINT)
    with Requests([tmp_path]) as requests:
        os.kill(os.getpid(), signal.SIGINT)
        assert requests.poll() == LEAVE and requests.reason == "Ctrl-C"
        assert "this step is finished and saved first; Ctrl-C again leaves at once" in (
            capfd.readouterr().err
        )
        # not a handler of ours: Python would only call it between two steps
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(SavedAndRequeue, match="stopped on Ctrl-C; finished steps are kept"):
        with leaving_at_once():
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_was_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with leaving_at_once(), Requests([tmp_path]) as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.poll() == GO_ON
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_save_now_is_answered_once(tmp_path):
    (tmp_path / "SAVE_NOW").touch()
    with Requests([tmp_path / "missing", tmp_path]) as requests:
        assert [requests.poll(), requests.poll()] == [SAVE, GO_ON]
    assert not (tmp_path / "SAVE_NOW").exists()


def test_stop_stays_until_a_person_deletes_it(tmp_path):
    (tmp_path / "STOP").touch()
    (tmp_path / "SAVE_NOW").touch()
    with Requests([tmp_path]) as requests:
        assert [requests.poll(), requests.poll()] == [LEAVE, LEAVE]
        assert f"{tmp_path / 'STOP'} (delete it to continue)" in requests.reason


def test_between_steps_a_stop_file_ends_the_work_as_a_stop(tmp_path):
    leave_if_stopped("stage align", [tmp_path / "missing", tmp_path])
    (tmp_path / "STOP").touch()
    with pytest.raises(
        SavedAndRequeue,
        match=r"stopped before stage align on the file .*STOP; .*delete it and start the same",
    ) as caught:
        leave_if_stopped("stage align", [tmp_path / "missing", tmp_path])
    assert caught.value.exit_code == 75


def test_files_are_not_looked_for_at_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_FILE_CHECK_SECONDS", 60.0)
    with Requests([tmp_path]) as requests:
        assert requests.poll() == GO_ON
        (tmp_path / "SAVE_NOW").touch()
        assert requests.poll() == GO_ON


def test_between_steps_a_signal_ends_the_work_whatever_a_library_makes_of_it():
    before = signal.getsignal(signal.SIGTERM)
    with (
        pytest.raises(
            SavedAndRequeue, match="stopped on SIGTERM.*start the same command again"
        ) as caught,
        leaving_at_once(),
    ):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise CheckpointError("a writer failed") from error
    assert caught.value.exit_code == 75
    with pytest.raises(ZeroDivisionError), leaving_at_once():
        1 / 0  # noqa: B018
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stage_inside_takes_the_signals_over(tmp_path):
    with leaving_at_once():
        with Requests([tmp_path]) as requests:
            os.kill(os.getpid(), signal.SIGTERM)
            assert requests.poll() == LEAVE
