"""The train state survives its file exactly; the template describes every trained parameter
once."""

import json

import pytest
import torch

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import write_manifest
from megatron_hypenet.checkpoint.shards import tensor_pieces
from megatron_hypenet.checkpoint.state import LOSS_TAIL, Template, TrainState
from megatron_hypenet.errors import CheckpointError
from tests.reseal import reseal


def test_advance_counts_and_keeps_a_tail():
    state = TrainState(stage="align")
    for step in range(LOSS_TAIL + 5):
        state = state.advance(samples=4, tokens=64, loss=float(step), lr=0.5)
    assert (state.step, state.samples, state.tokens, state.lr) == (55, 220, 3520, 0.5)
    assert len(state.losses) == LOSS_TAIL and state.losses[-1] == 54.0


def committed(folder, state):
    with fmt.staged(folder) as temporary:
        state.write(temporary / fmt.TRAIN_STATE)
        write_manifest(temporary, kind="align")
    return folder


def test_file_keeps_every_bit(tmp_path):
    state = TrainState(
        stage="distill", step=3, losses=(0.1 + 0.2, 1e-310), lr=1 / 3, layout={"world": 2}
    )
    assert TrainState.read(committed(tmp_path / "ck", state)) == state


def test_missing_and_foreign_files_are_checkpoint_errors(tmp_path):
    with pytest.raises(CheckpointError, match="weights only"):
        TrainState.read(tmp_path)
    folder = committed(tmp_path / "ck", TrainState(stage="align"))
    good = json.loads((folder / fmt.TRAIN_STATE).read_text())
    for change in (
        {"losses": 5},
        {"layout": "x"},
        {"tokens": {}},
        {"step": -1},
        {"iteration": 3},
        {"lr": "1e-3"},
        {"stage": None},
    ):
        (folder / fmt.TRAIN_STATE).write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=f"train_state.json: {next(iter(change))}"):
            TrainState.read(reseal(folder, fmt.TRAIN_STATE))


def test_template_names_pieces_of_weights_and_states(fused_model):
    entries = {entry.index: entry for entry in Template(fused_model)}
    assert [entry.shape for entry in entries.values()] == [(11, 8), (6, 8), (8,)]
    pieces = tensor_pieces(entries[1].described(torch.ones(6, 8), prefix="optim.exp_avg"))
    assert [(piece.key, tuple(piece.data.shape)) for piece in pieces] == [
        ("optim.exp_avg.linear.weight.q", (4, 8)),
        ("optim.exp_avg.linear.weight.k", (2, 8)),
    ]
    assert tensor_pieces(entries[2].described(torch.ones(8)))[0].dtype == torch.float32


def test_template_refuses_a_parameter_without_a_name(fused_model):
    fused_model.extra = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(AssertionError, match="extra"):
        Template(fused_model)
