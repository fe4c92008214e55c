"""What a process notes reaches its file, and readers tell the living from the dead and this start
from an earlier one."""

import json
import os
import subprocess
import sys
import time

import pytest

from megatron_hypenet.supervision import heartbeat
from megatron_hypenet.supervision.heartbeat import (
    PHASES,
    ProgressState,
    Writer,
    file_of,
    find_silent_ranks,
    is_dead,
    position,
    read_all,
    read_beat,
)


@pytest.fixture
def progress():
    progress = ProgressState()
    progress.begin("distill", iteration=4, train_iters=9)
    return progress


def writer(folder, progress, attempt_id="now", rank=0, interval=0.02):
    folder.mkdir(exist_ok=True)
    return Writer(
        folder, attempt_id=attempt_id, rank=rank, world_size=2, interval=interval, progress=progress
    )


def test_phases_change_and_return(progress):
    assert progress.phase == "build" and progress.begun == 1
    progress.note("edge")
    before = progress.moved
    with progress.doing("save"):
        assert progress.phase == "save"
    assert progress.phase == "edge" and progress.moved > before
    with pytest.raises(ZeroDivisionError), progress.doing("evaluate"):
        1 / 0  # noqa: B018
    assert progress.phase == "evaluate"  # where the fault was
    progress.finish_step(5, loss=1.5)
    assert (progress.iteration, progress.phase, progress.warm, progress.facts) == (
        5,
        "edge",
        True,
        {"loss": 1.5},
    )


def test_every_documented_field_is_written(tmp_path, progress):
    progress.finish_step(5, loss=1.5, eta_seconds=60.0)
    writer(tmp_path, progress).write()
    content = json.loads(file_of(tmp_path, 0).read_text())
    for name in (
        "life", "rank", "world_size", "host", "pid", "state", "time", "beats", "stage", "phase",
        "iteration", "train_iters", "silent_seconds",
    ):  # fmt: skip
        assert name in content and name in heartbeat.__doc__
    assert (content["iteration"], content["loss"], content["eta_seconds"], content["pid"]) == (
        5,
        1.5,
        60.0,
        os.getpid(),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["rank_00000.json"]


def test_the_thread_beats_until_it_is_stopped(tmp_path, progress):
    beating = writer(tmp_path, progress)
    beating.start()
    deadline = time.monotonic() + 10
    while read_beat(file_of(tmp_path, 0), "now").beats < 4:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    beating.stop("done")
    last = read_beat(file_of(tmp_path, 0), "now")
    time.sleep(0.1)
    assert last.state == "done" and read_beat(file_of(tmp_path, 0), "now") == last


def test_a_disk_that_cannot_be_written_ends_nothing(tmp_path, progress):
    beating = writer(tmp_path / "folder", progress)
    (tmp_path / "folder").rmdir()
    beating.write()
    assert not (tmp_path / "folder").exists()


def test_files_of_an_earlier_start_and_torn_ones_are_not_seen(tmp_path, progress):
    writer(tmp_path, progress, attempt_id="before", rank=0).write()
    writer(tmp_path, progress, rank=1).write()
    assert list(read_all(tmp_path, "now", 3)) == [1]
    file_of(tmp_path, 1).write_text('{"life": "now", "ra')
    assert read_all(tmp_path, "now", 3) == {}


def test_places_are_in_the_order_of_a_run(tmp_path):
    places = []
    progress = ProgressState()
    for stage in ("align", "distill"):
        progress.begin(stage, train_iters=2)
        for step in (1, 2):
            for phase in ("data", "forward-backward", "reduce", "update"):
                progress.note(phase)
                writer(tmp_path, progress).write()
                places.append(read_beat(file_of(tmp_path, 0), "now").place)
            progress.finish_step(step)
    assert places == sorted(set(places)) and list(PHASES).index("data") < list(PHASES).index("save")


def test_position_in_words():
    assert position("distill", "reduce", 4, 9) == "iteration 5/9 of distill, reduce"
    assert position("distill", "save", 9, 9) == "iteration 9/9 of distill, save"
    assert (
        position("export", "alone", 0, 0) == "export, alone"
        and position("", "start", 0, 0) == "start"
    )


def test_the_dead_are_known_on_their_own_machine(tmp_path, progress):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    writer(tmp_path, progress).write()
    content = json.loads(file_of(tmp_path, 0).read_text()) | {"pid": child.pid}
    file_of(tmp_path, 0).write_text(json.dumps(content))
    assert not is_dead(read_beat(file_of(tmp_path, 0), "now"))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(read_beat(file_of(tmp_path, 0), "now"))  # a zombie
    child.wait()
    assert is_dead(read_beat(file_of(tmp_path, 0), "now"))
    file_of(tmp_path, 0).write_text(json.dumps(content | {"host": "elsewhere"}))
    assert not is_dead(read_beat(file_of(tmp_path, 0), "now"))


def test_ranks_that_no_longer_write_are_distinguished(tmp_path, progress):
    one, two = writer(tmp_path, progress, rank=0), writer(tmp_path, progress, rank=1)
    one.write()
    two.write()
    beats, silent = find_silent_ranks(lambda: read_all(tmp_path, "now", 2), one.write)
    assert silent == {1} and beats[0].beats == 2
    two.stop("hung")
    assert find_silent_ranks(lambda: read_all(tmp_path, "now", 2), one.write)[1] == set()
