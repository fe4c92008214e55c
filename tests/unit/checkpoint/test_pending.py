"""A save in the background: invisible until its commit, raised at the next edge when it failed,
gone when it is given up."""

import threading

import pytest

from megatron_hypenet.checkpoint import load, save, shard_writer
from megatron_hypenet.checkpoint.state import TrainState
from megatron_hypenet.errors import SetupError


@pytest.fixture
def begin(tmp_path, make_engine, model_config):
    engine = make_engine().randomize(0)

    def start(step, **options):
        state = TrainState(stage="distill", step=step, adam_step=7)
        return save.begin_save(
            tmp_path / f"iter_{step:07d}",
            engine,
            state,
            model_config=model_config,
            kind="distill",
            background=True,
            **options,
        )

    return start


@pytest.fixture
def held(monkeypatch):
    """Make background writers wait for this event before each part."""
    gate = threading.Event()
    write = shard_writer.ShardWrite.write

    def slow(self, **options):
        assert gate.wait(30)
        return write(self, **options)

    monkeypatch.setattr(shard_writer.ShardWrite, "write", slow)
    yield gate
    gate.set()


def test_nothing_is_committed_before_the_edge_that_follows_the_writing(tmp_path, begin, held):
    pending = begin(7)
    assert not pending.ready() and load.newest_of_run(tmp_path / "elsewhere") is None
    assert [entry.name.startswith(".iter_0000007.tmp-") for entry in tmp_path.iterdir()] == [True]
    held.set()
    pending._thread.join()
    assert pending.ready() and not (tmp_path / "iter_0000007").exists()
    assert pending.commit() == tmp_path / "iter_0000007"
    load.verify_files(tmp_path / "iter_0000007", hashes=True)
    assert [entry.name for entry in tmp_path.iterdir()] == ["iter_0000007"]


def test_commit_waits(begin, held):
    pending = begin(7)
    threading.Timer(0.2, held.set).start()
    load.verify_files(pending.commit(), hashes=True)


@pytest.mark.parametrize("where", ["write", "finish"])
def test_full_disk_is_raised_at_the_edge_and_older_saves_stay(tmp_path, begin, monkeypatch, where):
    old = begin(6).commit()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_writer.ShardWrite, where, full)
    pending = begin(7)  # the request succeeds
    pending._thread.join()
    assert pending.ready()
    with pytest.raises(SetupError, match="no space left.*older checkpoints are untouched"):
        pending.commit()
    assert [entry.name for entry in tmp_path.iterdir()] == ["iter_0000006"]
    load.verify_files(old, hashes=True)


def test_a_small_file_that_fails_is_raised_too(tmp_path, begin):
    pending = begin(7, tokenizer_dir=tmp_path / "nowhere")
    with pytest.raises(Exception, match="tokenizer folder"):
        pending.commit()
    assert list(tmp_path.iterdir()) == []


def test_abandoned_save_leaves_nothing_and_stops_early(tmp_path, begin, held):
    pending = begin(7)
    threading.Timer(0.1, held.set).start()
    pending.abandon()
    assert list(tmp_path.iterdir()) == [] and not pending._thread.is_alive()
    pending.abandon()  # harmless
