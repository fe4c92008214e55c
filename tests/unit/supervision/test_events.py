"""Commands of the user hear what happens to a run, and cannot harm it."""

import logging

import pytest

from megatron_hypenet.errors import CheckpointError, SavedAndRequeue
from megatron_hypenet.supervision.events import STAGE_DONE, commands_at_end, run_commands

NOTE = 'echo "$HYPENET_EVENT|$HYPENET_RUN|$HYPENET_STEP|$HYPENET_MESSAGE" >> {place}'


def test_a_command_gets_event_run_step_and_message(tmp_path):
    place = tmp_path / "heard"
    run_commands(
        [NOTE.format(place=place)] * 2,
        STAGE_DONE,
        root=tmp_path,
        step="align",
        message="it's; done $HOME",
    )
    line = f"stage_done|{tmp_path}|align|it's; done $HOME\n"
    assert place.read_text() == 2 * line


def test_a_command_that_fails_or_hangs_is_a_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run_commands(["echo no >&2; exit 3", "sleep 30"], STAGE_DONE, root=tmp_path, timeout=0.5)
    assert "ended with code 3: no" in caplog.text and "timed out" in caplog.text


@pytest.mark.parametrize(
    ("fault", "event"),
    [
        (SavedAndRequeue("stopped at iter 5"), "stopped"),
        (CheckpointError("it is damaged"), "failed"),
        (KeyboardInterrupt(), "failed"),
    ],
)
def test_an_end_is_told_with_its_reason(tmp_path, fault, event):
    place = tmp_path / "heard"
    with pytest.raises(type(fault)), commands_at_end([NOTE.format(place=place)], tmp_path):
        raise fault
    assert place.read_text().startswith(f"{event}|") and str(fault) in place.read_text()


def test_an_end_without_a_fault_is_not_told(tmp_path):
    with commands_at_end([f"touch {tmp_path / 'heard'}"], tmp_path):
        pass
    assert not (tmp_path / "heard").exists()
