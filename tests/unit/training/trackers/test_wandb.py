"""Weights & Biases' own library, offline: what it would send lies in a file of records."""

import json
import struct

import pytest

from megatron_hypenet.config.schema import WandbConfig
from megatron_hypenet.training.trackers.wandb import Wandb

BLOCK = 1 << 15
HEAD = struct.Struct("<IHB")
"""Checksum, length, and kind of a piece: 1 whole, 2 first, 3 middle, 4 last."""


def records(folder):
    """Return the records of all offline runs in `folder`: protocol buffers in the log format of
    LevelDB, behind 7 bytes that name it. The library has no reader for Python."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        content = file.read_bytes()
        place = 7
        parts = b""
        while place + HEAD.size <= len(content):
            if BLOCK - place % BLOCK < HEAD.size:
                place += BLOCK - place % BLOCK
                continue
            _, length, kind = HEAD.unpack_from(content, place)
            place += HEAD.size
            parts += content[place : place + length]
            place += length
            if kind in (1, 4):
                found.append(wandb_internal_pb2.Record.FromString(parts))
                parts = b""
    return found


def values(record):
    return {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for item in record.history.item
    }


def test_points_texts_and_results_are_kept_for_later(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)  # which no file of the run may hold
    config = WandbConfig(project="trial", mode="offline")
    tracker = Wandb(config, run_id="abc", group="demo", part="distill", folder=tmp_path / "tb")
    tracker.text("run/config", "a: 1")
    for step in (1, 2):
        tracker.scalars(step, {"train/kl": 1 / step})
    tracker.results({"distill.lr": 1e-3}, {"report/lm-loss": 2.5})
    tracker.flush()
    tracker.close()
    found = records(tmp_path / "tb")
    history = [values(one) for one in found if one.WhichOneof("record_type") == "history"]
    points = [{key: one[key] for key in ("step", "train/kl")} for one in history]
    assert points == [{"step": 1, "train/kl": 1.0}, {"step": 2, "train/kl": pytest.approx(0.5)}]
    (run,) = [one.run for one in found if one.WhichOneof("record_type") == "run"]
    assert (run.run_id, run.run_group, run.job_type, run.project) == (
        *("abc", "demo", "distill", "trial"),
    )
    text = str(found)
    assert "run/config" in text and "report/lm-loss" in text and "distill.lr" in text
    for file in (tmp_path / "tb").rglob("*"):
        assert not file.is_file() or b"0" * 40 not in file.read_bytes()
