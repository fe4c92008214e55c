"""What a run shows: plain lines with the time left, and a log file with stamps."""

import io

import pytest

from megatron_hypenet.cli.progress import Screen
from megatron_hypenet.planning.eta import Clock
from megatron_hypenet.planning.planned_work import Planned
from megatron_hypenet.training.metrics import StepRecord


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture
def time():
    return [0.0]


def make(tmp_path, time, stream, **kwargs):
    screen = Screen(
        Clock({"data": Planned(), "align": Planned(flops=3.0)}, now=lambda: time[0]),
        tmp_path / "logs" / "x.log",
        stream=stream,
        **kwargs,
    )
    screen.does.update({"data": "tokenize", "align": "stage 1"})
    return screen


def step(number, of=2):
    return StepRecord(
        stage="align",
        step=number,
        train_iters=of,
        loss=1.0,
        grad_norm=1.0,
        lr=1.0,
        tokens_per_second=1.0,
        eta_seconds=1.0,
    )


def test_lines_tell_place_share_and_time_left(tmp_path, time):
    stream = io.StringIO()
    screen = make(tmp_path, time, stream)
    screen.announce("data", "starts")
    time[0] = 10.0
    screen.announce("data", "done in 10.0 s")
    screen.announce("align", "starts")
    screen.train_line("iter 1/8 | loss 1")  # nothing is measured yet
    for number in range(1, 5):
        time[0] += 5.0
        screen.on_step(step(number, of=8))
    screen.train_line("iter 4/8 | loss 1")
    screen.train_line("saved")
    screen.count_only({"align"})
    screen.train_line("iter 4/8 | loss 1")
    screen.close()
    assert stream.getvalue().splitlines() == [
        "[1/2] data: tokenize",
        "[1/2] data: done in 10.0 s",
        "[2/2] align: stage 1",
        "  iter 1/8 | loss 1",
        "  iter 4/8 | loss 1 | whole run: 20s left",
        "  saved",
        "  iter 4/8 | loss 1 | whole command: 20s left",
    ]
    log = (tmp_path / "logs" / "x.log").read_text().splitlines()
    assert len(log) == 7 and log[0].endswith(" [1/2] data: tokenize") and log[0][:2] == "20"


def test_skipped_steps_are_said_and_not_counted(tmp_path, time):
    stream = io.StringIO()
    screen = make(tmp_path, time, stream)
    screen.announce("data", "skipped")
    screen.train_line("iter 1/2")
    screen.close()
    assert stream.getvalue() == "[1/2] data: done before, skipped\n  iter 1/2\n"


def test_other_processes_are_silent(tmp_path, time):
    stream = io.StringIO()
    screen = make(tmp_path, time, stream, is_main=False)
    screen.announce("align", "starts")
    screen.on_step(step(2))
    screen.close()
    assert stream.getvalue() == "" and not (tmp_path / "logs").exists()


def test_a_terminal_gets_a_bar_and_keeps_the_lines(tmp_path, time):
    stream = Terminal()
    screen = make(tmp_path, time, stream)
    screen.announce("align", "starts")
    time[0] = 5.0
    screen.part("align", 1, 4)
    screen.part("align", 2, 4)
    time[0] = 10.0
    screen.part("align", 3, 4)
    screen.say("[a line with brackets]")
    screen.close()
    assert (
        "[a line with brackets]" in stream.getvalue()
        and "[2/2] align: stage 1" in stream.getvalue()
    )
    assert "align, 5s left" in stream.getvalue()


def test_measurements_are_kept_after_saves_steps_and_at_the_end(tmp_path, time):
    screen = make(tmp_path, time, io.StringIO())
    kept = []
    screen.keep = lambda: kept.append(time[0])
    screen.announce("align", "starts")
    time[0] = 1.0
    screen.pause("evaluate", 1.0)
    screen.pause("save", 1.0)
    time[0] = 2.0
    screen.announce("align", "done in 2.0 s")
    time[0] = 3.0
    screen.close()
    screen.close()
    assert kept == [1.0, 2.0, 3.0]


def test_a_continued_run_keeps_its_log(tmp_path, time):
    for _ in range(2):
        screen = make(tmp_path, time, io.StringIO())
        screen.say("hello")
        screen.close()
    assert len((tmp_path / "logs" / "x.log").read_text().splitlines()) == 2


@pytest.mark.parametrize("surroundings", [{}, {"NO_COLOR": "1"}, {"COLUMNS": "40"}])
@pytest.mark.parametrize("kind", ["dumb", "xterm-256color", None])
def test_a_line_stays_whole_in_every_terminal(tmp_path, time, monkeypatch, kind, surroundings):
    monkeypatch.setenv("TERM", kind or "xterm")
    for name, value in surroundings.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO() if kind is None else Terminal()
    screen = make(tmp_path, time, stream)
    line = "held-out at iter 40/400 | lm-loss 2.315 (teacher 2.25) | " + "recall 87.5 % " * 9
    screen.train_line(line)
    screen.close()
    assert f"  {line}\n" in stream.getvalue()
    assert ("\x1b" in stream.getvalue()) == (kind == "xterm-256color"), "only there is a bar"
    assert line in (tmp_path / "logs" / "x.log").read_text()
