"""A checkpoint belongs to no layout: what TP, PP, CP, ZeRO or offload wrote, others read bit for
bit, and one process reads whole."""

import json

import pytest
import torch

from megatron_hypenet.checkpoint.compare import compare
from megatron_hypenet.checkpoint.load import verify_files
from megatron_hypenet.checkpoint.shards import ShardReader
from megatron_hypenet.export.mapping import entries
from tests.distributed.checkpoint_worker import known
from tests.distributed.layouts import STUDENT, start

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TP = "tensor_model_parallel_size"
PP = "pipeline_model_parallel_size"
CP = "context_parallel_size"
CHUNKS = "virtual_pipeline_model_parallel_size"
LAYOUTS = {
    "tp2-sp-pp2": {TP: 2, PP: 2, "sequence_parallel": True},
    "pp4-uneven": {PP: 4, "pipeline_layout": [1, 2, 1, 1]},
    "pp2-dp2": {PP: 2},
    "cp2-pp2-chunks": {CP: 2, PP: 2, CHUNKS: 2, "pipeline_layout": [1, 1, 2, 1]},
    "tp2-dp2-zero2": {TP: 2, "zero_stage": 2},
    "tp2-cp2-zero3": {TP: 2, CP: 2, "zero_stage": 3},
    "dp4-zero3": {"zero_stage": 3},
    "dp4-zero1-offload": {"zero_stage": 1, "offload_optimizer": True},
}


IN_BFLOAT16 = ("tp2-sp-pp2", "pp2-dp2", "tp2-dp2-zero2", "dp4-zero3")
"""DeepSpeed has another optimizer for each of its stages here: fp32 master weights live
elsewhere."""
CASES = [("float32", name) for name in LAYOUTS] + [("bfloat16", name) for name in IN_BFLOAT16]


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """Provide saves(dtype): one folder per layout, written by four processes and read by them on
    other layouts."""
    done = {}

    def written(dtype):
        if dtype not in done:
            folder = tmp_path_factory.mktemp(dtype)
            layouts = (
                LAYOUTS if dtype == "float32" else {name: LAYOUTS[name] for name in IN_BFLOAT16}
            )
            result = start(
                4,
                str(folder),
                json.dumps(layouts),
                dtype,
                module="tests.distributed.checkpoint_worker",
            )
            assert result.returncode == 0 and "all read" in result.stdout, (
                result.stdout[-2000:] + result.stderr[-6000:]
            )
            done[dtype] = folder
        return done[dtype]

    return written


@pytest.mark.parametrize(("dtype", "name"), CASES)
def test_one_process_reads_every_tensor_whole(saves, dtype, name):
    folder = saves(dtype) / name
    verify_files(folder, hashes=True)
    weights, optimizer = (ShardReader(folder / part) for part in ("weights", "optimizer"))
    shapes = {entry.ours: tuple(entry.shape) for entry in entries(STUDENT)}
    assert {key: weights.shape(key) for key in weights} == shapes
    states = {
        f"optim.{state}.{key}": shape
        for key, shape in shapes.items()
        for state in ("fp32_param", "exp_avg", "exp_avg_sq")
    }
    assert {key: optimizer.shape(key) for key in optimizer} == states
    for reader, stored in ((weights, getattr(torch, dtype)), (optimizer, torch.float32)):
        wrong = []
        for key in reader:
            want = known(key, (0,) * len(reader.shape(key)), reader.shape(key)).to(stored)
            wrong += [] if reader.dtype(key) == stored and torch.equal(reader[key], want) else [key]
        assert wrong == []


def test_all_hold_the_same_and_share_the_writing(saves):
    folder = saves("float32")
    first, *others = LAYOUTS
    assert [name for name in others if not compare(folder / first, folder / name).equal] == []
    for name in LAYOUTS:  # every process has a file of its own, with about its share in it
        sizes = [
            path.stat().st_size for path in sorted((folder / name / "optimizer").glob("*.distcp"))
        ]
        assert len(sizes) == 4 and max(sizes) < 0.6 * sum(sizes), (name, sizes)
