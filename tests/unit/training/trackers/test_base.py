"""A tracker that fails is not used again, and the run goes on."""

from megatron_hypenet.training.trackers.base import Guarded, Tracker


class Broken(Tracker):
    """Fails at the second point."""

    name = "Broken Service"

    def __init__(self):
        self.calls = []

    def scalars(self, step, values):
        self.calls.append(step)
        if step == 2:
            raise OSError("no route to host")

    def text(self, tag, text, step=0):
        self.calls.append(tag)

    def image(self, tag, png):
        self.calls.append(tag)

    def results(self, settings, metrics):
        self.calls.append("results")

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


def test_a_failure_is_said_once_and_ends_its_use(caplog):
    broken = Broken()
    guarded = Guarded(broken)
    guarded.text("run/config", "x")
    guarded.image("report/figure", b"")
    guarded.flush()
    guarded.results({}, {})
    for step in (1, 2, 3):
        guarded.scalars(step, {})
    guarded.close()
    assert broken.calls == ["run/config", "report/figure", "flush", "results", 1, 2]
    (message,) = caplog.messages
    assert "Broken Service gets no more values" in message and "no route to host" in message
    assert "metrics.jsonl" in message


def test_a_tracker_that_works_is_closed_once():
    broken = Broken()
    guarded = Guarded(broken)
    guarded.close()
    guarded.close()
    assert broken.calls == ["close"]
