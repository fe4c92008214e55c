"""A replayed micro-batch gives what kernel-by-kernel launches give; where nothing can be captured, training goes on without."""

import logging

import pytest
import torch

from megatron_hypenet.config.schema import HeadStageConfig, ParallelConfig
from megatron_hypenet.engine.cuda_graph import LAUNCH_BOUND_TOKENS, CudaGraphs, eligible
from megatron_hypenet.engine.deepspeed import TrainingEngine
from megatron_hypenet.engine.schedule import forward_backward
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.parallel import groups
from megatron_hypenet.stages.finetune import FinetuneStage
from tests.tiny import tiny_model_config
from tests.unit.engine.toy import ToyData, ToyStage, stage_config


def test_without_a_gpu_nothing_is_captured_and_a_failed_capture_runs_eagerly(caplog):
    groups.init_parallel(ParallelConfig())
    stage = ToyStage(torch.bfloat16)
    engine = TrainingEngine(stage, stage_config(), ParallelConfig())
    batch = {"tokens": ToyData().batch(0, 2, 8)}
    if not torch.cuda.is_available():
        assert engine.graphs is None and not eligible(batch)
        graphs = CudaGraphs(engine._forward_backward, engine.sums, several=False)
        with caplog.at_level(logging.WARNING):
            loss, metrics = graphs.replay(batch, first=True)
        assert "no CUDA graph" in caplog.text and not engine.sums.empty
        want, _ = stage(batch)
        assert torch.equal(loss, want.detach()) and set(metrics) == {"align/layer_00", "align/layer_01"}
        assert not graphs.takes(batch)
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_replays_equal_launches(micro_batches):
    found = []
    for cuda_graphs in (True, False):
        groups.init_parallel(ParallelConfig())
        shape = tiny_model_config()
        stage = FinetuneStage(build_model(shape, ParallelConfig(), dtype=torch.bfloat16, seed=3), chunk_tokens=None)
        config = HeadStageConfig(
            train_iters=3,
            seq_length=64,
            micro_batch_size=2,
            global_batch_size=2 * micro_batches,
            lr=1e-3,
            min_lr=1e-3,
            cuda_graphs=cuda_graphs,
        )
        engine, results = TrainingEngine(stage, config, ParallelConfig()), []
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            batches = [{"tokens": torch.randint(0, shape.vocab_size, (2, 65), generator=generator).cuda()} for _ in range(micro_batches)]
            loss, _ = forward_backward(engine, batches)
            results += [float(loss), engine.apply(1e-3)]
        assert (engine.graphs is not None and len(engine.graphs._graphs) == micro_batches) == cuda_graphs
        found.append((results, [parameter.detach().clone() for parameter in stage.parameters()]))
        engine.close()
    (ours, weights), (theirs, wanted) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    for got, want in zip(weights, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-5)


@pytest.mark.gpu
def test_large_or_packed_micro_batches_are_launched():
    large = torch.zeros(1, LAUNCH_BOUND_TOKENS + 2, dtype=torch.long, device="cuda")
    assert eligible({"tokens": large[:, :-1]}) and not eligible({"tokens": large})
    assert not eligible({"tokens": large[:, :9], "document_ids": large[:, :8]})
