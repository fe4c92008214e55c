"""A run that changes its layout at every stop goes on with the losses of one that was never
stopped."""

import json

import pytest

from megatron_hypenet.checkpoint.load import read_weights
from megatron_hypenet.checkpoint.state import TrainState
from tests.distributed.layouts import start, write_models
from tests.losses import read_losses

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TP = "tensor_model_parallel_size"
PP = "pipeline_model_parallel_size"
CP = "context_parallel_size"
CHUNKS = "virtual_pipeline_model_parallel_size"
JOURNEY = (
    {TP: 2, PP: 1},
    {TP: 1, PP: 2},
    {PP: 2, CHUNKS: 2},
    {CP: 2, "zero_stage": 1},
    {"zero_stage": 3},
    {TP: 2, "sequence_parallel": True, "zero_stage": 2, "offload_optimizer": True},
)
STEPS = 2 * len(JOURNEY)


@pytest.mark.parametrize("stage", ["align", "distill", "finetune"])
def test_losses_go_on_as_if_never_stopped(tmp_path, stage):
    write_models(tmp_path)
    changes = {"stage": stage, "stage_changes": {"train_iters": STEPS, "clip_grad": 0.5}}
    straight = [{**changes, "name": "straight", "parallel": {}}]
    moving = [
        {**changes, "name": "moving", "parallel": parallel, "stop_after": 2 * number}
        for number, parallel in enumerate(JOURNEY, start=1)
    ]
    for processes, cases in ((1, straight), (2, moving)):
        result = start(processes, str(tmp_path), json.dumps(cases))
        assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    assert result.stderr.count("resumed from") == len(JOURNEY) - 1
    want, got = (
        read_losses(tmp_path / name / stage / "losses.jsonl") for name in ("straight", "moving")
    )
    apart = {
        key: max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(want, got, strict=True))
        for key in ("loss", "grad_norm", "lr")
    }
    print(stage, apart)
    assert (
        len(got) == STEPS
        and apart["loss"] <= 1e-5
        and apart["grad_norm"] <= 2e-4
        and apart["lr"] == 0
    )
    finals = [tmp_path / name / stage / "checkpoints" for name in ("straight", "moving")]
    states = [TrainState.read(folder / f"iter_{STEPS:07d}") for folder in finals]
    assert [(state.samples, state.tokens, state.adam_step) for state in states] == [
        (4 * STEPS, 4 * 16 * STEPS, STEPS)
    ] * 2
    assert set(read_weights(finals[0])) == set(read_weights(finals[1]))
