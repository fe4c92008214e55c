"""What a loop runs on is built in order, and closed however it ends."""

import json

import pytest
import torch

from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import ConfigError, LayoutError
from megatron_hypenet.parallel import groups
from megatron_hypenet.supervision import faults
from megatron_hypenet.supervision.faults import Place
from megatron_hypenet.supervision.signals import Requests
from megatron_hypenet.training import loop, opening
from megatron_hypenet.training.opening import Job, opened
from tests.unit.engine.toy import ToyData, ToyStage, run_config, stage_config


@pytest.fixture(autouse=True)
def parallel():
    groups.init_parallel(ParallelConfig())


def job(root, *, run=None, lines=None, **changes):
    return Job(
        stage=ToyStage(),
        data=ToyData(),
        config=stage_config(**changes),
        run=run or run_config(root),
        out_dir=root / "a",
        trackers=lambda step: (),
        tokenizer_dir=None,
        extra={},
        log=(lines if lines is not None else []).append,
    )


def requests(root):
    return Requests([root])


class Closed:
    """Notes what is closed, in order."""

    def __init__(self, monkeypatch):
        self.names = []
        for owner in (opening.Saver, opening.TrainingEngine, opening.Recorder):
            close = owner.close
            monkeypatch.setattr(
                owner,
                "close",
                lambda this, close=close, name=owner.__name__: (
                    self.names.append(name),
                    close(this),
                ),
            )


def test_everything_is_there_inside_and_closed_after(tmp_path, monkeypatch):
    closed = Closed(monkeypatch)
    with opened(job(tmp_path), requests(tmp_path)) as parts:
        assert parts.state.step == 0 and parts.saver.committed is None
        assert closed.names == []
    assert sorted(closed.names) == ["Recorder", "Saver", "TrainingEngine"]


def test_a_fault_is_recorded_before_anything_is_closed(tmp_path, monkeypatch):
    closed = Closed(monkeypatch)
    monkeypatch.setattr(faults._Current, "place", Place(tmp_path, "now", 0, 1))
    record = tmp_path / "errors" / "rank_00000.json"
    seen = []
    monkeypatch.setattr(opening, "record_now", lambda fault: seen.append(list(closed.names)))
    with pytest.raises(ValueError, match="x"), opened(job(tmp_path), requests(tmp_path)):
        raise ValueError("x")
    assert seen == [[]] and len(closed.names) == 3
    monkeypatch.undo()
    monkeypatch.setattr(faults._Current, "place", Place(tmp_path, "now", 0, 1))
    monkeypatch.setattr(opening, "TrainingEngine", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), opened(job(tmp_path), requests(tmp_path)):
        pytest.fail("nothing was built")
    assert json.loads(record.read_text())["type"] == "ZeroDivisionError"


def test_a_full_gpu_leaves_as_advice(tmp_path):
    with (
        pytest.raises(LayoutError, match="align.micro_batch_size"),
        opened(job(tmp_path), requests(tmp_path)),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_chunks_are_part_of_the_layout_where_there_are_several(tmp_path):
    plain = job(tmp_path).layout
    chunks = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    run = run_config(tmp_path).model_copy(update={"parallel": ParallelConfig(**chunks)})
    assert "virtual_pipeline" not in plain
    assert job(tmp_path, run=run).layout == {**plain, "pipeline": 2, "virtual_pipeline": 2}


def test_a_checkpoint_is_continued_and_the_layout_compared(tmp_path):
    loop.train(
        ToyStage(), ToyData(), stage_config(train_iters=3), run_config(tmp_path), tmp_path / "a",
        log=lambda text: None,
    )  # fmt: skip
    lines = []
    with opened(job(tmp_path, lines=lines), requests(tmp_path)) as parts:
        assert parts.state.step == 3 and parts.state.layout == job(tmp_path).layout
    assert lines[0].startswith("resumed from ") and lines[0].endswith("iter_0000003 at iter 3/6")
    said = opening._what_changed(job(tmp_path), {"world": 4, "zero_stage": 1})
    assert said == (
        " on another layout (world 4 -> 1); the global batch stays 4: 2 micro-batches of 2 per "
        "process and step"
    )
    said = opening._what_changed(job(tmp_path), {**job(tmp_path).layout, "virtual_pipeline": 2})
    assert said.startswith(" on another layout (virtual_pipeline 2 -> 1); ")
    other = run_config(tmp_path, data={"train": ["x.txt"], "seed": 7})
    with (
        pytest.raises(ConfigError, match="data.seed=7"),
        opened(job(tmp_path, run=other), requests(tmp_path)),
    ):
        pytest.fail("other samples")
