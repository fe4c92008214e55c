"""A replayed micro-batch gives what kernel-by-kernel launches give; where nothing can be captured,
training goes on without."""

import logging
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from megatron_hypenet.config.schema import HeadStageConfig, ParallelConfig
from megatron_hypenet.engine import cuda_graph
from megatron_hypenet.engine.cuda_graph import LAUNCH_BOUND_TOKENS, CudaGraphs, eligible
from megatron_hypenet.engine.deepspeed.engine import TrainingEngine
from megatron_hypenet.model.hypenet import build_model
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.stages.base import MicroBatch
from megatron_hypenet.stages.finetune import FinetuneStage
from megatron_hypenet.training.schedule import forward_backward
from tests.tiny import tiny_model_config
from tests.unit.engine.toy import ToyData, ToyStage, stage_config


def test_without_a_gpu_nothing_is_captured_and_a_failed_capture_runs_eagerly(caplog):
    groups.init_parallel(ParallelConfig())
    stage = ToyStage(torch.bfloat16)
    engine = TrainingEngine(stage, stage_config(), ParallelConfig())
    batch = MicroBatch(ToyData().batch(0, 2, 8))
    assert engine.graphs is None and not eligible(batch)
    graphs = CudaGraphs(engine._forward_backward, engine.sums, several=False)
    with caplog.at_level(logging.WARNING):
        loss, metrics = graphs.replay(batch, first=True)
    assert "no CUDA graph" in caplog.text and not engine.sums.empty
    want, _ = stage(batch)
    assert torch.equal(loss, want.detach()) and set(metrics) == {
        "align-layers/00",
        "align-layers/01",
    }
    assert not graphs.takes(batch)
    engine.close()


def test_no_node_of_a_weight_outlives_its_graph():
    """A node made on another stream than the captured one, and kept, would end the capture."""
    groups.init_parallel(ParallelConfig())
    stage = ToyStage(torch.bfloat16)
    engine = TrainingEngine(stage, stage_config(), ParallelConfig())

    def marked():
        nodes = [
            torch.autograd.graph.get_gradient_edge(parameter).node
            for parameter in stage.trainable_parameters().values()
        ]
        found = [node.metadata.get("seen", False) for node in nodes]
        for node in nodes:
            node.metadata["seen"] = True
        return found

    assert not any(marked())
    engine._forward_backward(MicroBatch(ToyData().batch(0, 2, 8).to(device())))
    assert not any(marked())
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_replays_equal_launches(micro_batches):
    found = []
    for cuda_graphs in (True, False):
        groups.init_parallel(ParallelConfig())
        shape = tiny_model_config()
        stage = FinetuneStage(
            build_model(shape, ParallelConfig(), dtype=torch.bfloat16, seed=3), chunk_tokens=None
        )
        config = HeadStageConfig(
            train_iters=3,
            seq_length=64,
            micro_batch_size=2,
            global_batch_size=2 * micro_batches,
            lr=1e-3,
            min_lr=1e-3,
            cuda_graphs=cuda_graphs,
        )
        engine = TrainingEngine(stage, config, ParallelConfig())
        results = []
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            batches = [
                MicroBatch(torch.randint(0, shape.vocab_size, (2, 65), generator=generator).cuda())
                for _ in range(micro_batches)
            ]
            loss, _ = forward_backward(engine, batches)
            results += [float(loss), engine.apply(1e-3)]
        assert (
            engine.graphs is not None and len(engine.graphs._graphs) == micro_batches
        ) == cuda_graphs
        found.append((results, [parameter.detach().clone() for parameter in stage.parameters()]))
        engine.close()
    (ours, weights), (theirs, wanted) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    for got, want in zip(weights, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-5)


@pytest.mark.gpu
def test_large_or_packed_micro_batches_are_launched():
    large = torch.zeros(1, LAUNCH_BOUND_TOKENS + 2, dtype=torch.long, device="cuda")
    assert eligible(MicroBatch(large[:, :-1])) and not eligible(MicroBatch(large))
    assert not eligible(MicroBatch(large[:, :9], document_ids=large[:, :8]))


class StandIn:
    """What a CUDA graph does, on a CPU: captures calls without their effects, and runs them again
    into the same memory."""

    recording = None
    free = 2**40

    def __init__(self):
        self.calls = []

    def pool(self):
        return None

    def replay(self):
        for call in self.calls:
            call()


@pytest.fixture
def stand_in(monkeypatch):
    """Replace CUDA's graphs and streams in the module under test; gives a way to wrap an engine's
    micro-step."""

    @contextmanager
    def graph(captured, pool=None, capture_error_mode=None):
        StandIn.recording = captured
        yield
        StandIn.recording = None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "CUDAGraph": StandIn, "graph": graph, "Stream": lambda: stream,
        "current_stream": lambda: stream, "stream": nullcontext,
        "synchronize": lambda: None, "empty_cache": lambda: None, "graph_pool_handle": lambda: None,
        "mem_get_info": lambda: (StandIn.free, 2**40),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_graph, "eligible", lambda batch: True)

    def wrap(engine, factor=1.0):
        def run(batch):
            if StandIn.recording is None:
                return engine._forward_backward(batch)
            marks = engine.sums.marks
            before = [flat.clone() for flat in engine.engine.optimizer.fp32_groups_gradients_flat]
            loss, metrics = engine._forward_backward(batch)
            for flat, old in zip(
                engine.engine.optimizer.fp32_groups_gradients_flat, before, strict=True
            ):
                flat.copy_(old)

            def again():
                engine.sums.set_marks(marks)
                new_loss, new_metrics = engine._forward_backward(batch)
                loss.copy_(new_loss * factor)
                for tag, value in new_metrics.items():
                    metrics[tag].copy_(value)

            StandIn.recording.calls.append(again)
            return loss, metrics

        return run

    return wrap


def trained(wrap, *, factor=1.0, between=lambda engine: None):
    """Return losses, norms and weights of three steps of two micro-batches, and the graphs that ran
    them if there is a way to make some."""
    groups.init_parallel(ParallelConfig())
    stage = ToyStage(torch.bfloat16)
    found = []
    engine = TrainingEngine(stage, stage_config(), ParallelConfig())
    if wrap is not None:
        engine.graphs = CudaGraphs(wrap(engine, factor), engine.sums, several=True)
    for step in range(3):
        loss, metrics = forward_backward(
            engine, [MicroBatch(ToyData().batch(4 * step + at, 2, 8)) for at in (0, 2)]
        )
        found += [float(loss), float(metrics["align-layers/00"]), engine.apply(0.05)]
        between(engine)
    graphs = engine.graphs
    engine.close()
    return found, [parameter.detach().clone() for parameter in stage.parameters()], graphs


def test_replays_add_up_to_the_same_steps(stand_in):
    figures, weights, graphs = trained(stand_in)
    wanted, launched, _ = trained(None)
    assert figures == wanted and all(
        torch.equal(a, b) for a, b in zip(weights, launched, strict=True)
    )
    assert set(graphs._graphs) == {True, False}, "one graph overwrites the sums, one adds to them"


def test_a_replay_that_is_off_is_not_used(stand_in, caplog):
    with caplog.at_level(logging.WARNING):
        figures, weights, graphs = trained(stand_in, factor=1.01)
    wanted, launched, _ = trained(None)
    assert figures == wanted and all(
        torch.equal(a, b) for a, b in zip(weights, launched, strict=True)
    )
    assert "a replay is off launched kernels by 1.0e-02" in caplog.text and graphs._graphs == {}


def test_a_replay_may_be_off_by_what_launches_are_off_among_themselves(
    stand_in, caplog, monkeypatch
):
    figures = CudaGraphs._figures
    for factor, kept in ((1.01, True), (1.02, False)):
        noise = iter([1.0, 1.004, 1.0])  # of two launched passes and the replay
        monkeypatch.setattr(
            CudaGraphs,
            "_figures",
            lambda self, loss, noise=noise: figures(self, loss) * next(noise),
        )
        with caplog.at_level(logging.WARNING):
            assert bool(trained(stand_in, factor=factor)[2]._graphs) == kept
    assert (
        "a replay is off launched kernels by 2.0e-02 in loss or gradients, limit 1.6e-02"
        in caplog.text
    )


@pytest.mark.parametrize(("free", "kept"), [(2**31 - 1, False), (2**31, True)])
def test_graphs_that_leave_no_memory_are_not_used(stand_in, caplog, monkeypatch, free, kept):
    monkeypatch.setattr(StandIn, "free", free)
    with caplog.at_level(logging.WARNING):
        figures, _, graphs = trained(stand_in)
    assert figures == trained(None)[0] and bool(graphs._graphs) == kept
    assert ("it leaves 2.0 GiB of the GPU's memory free, less than 2" in caplog.text) != kept


def test_graphs_make_room_where_memory_is_short(stand_in, monkeypatch):
    """The graphs are dropped, and the next step captures them again."""
    left = []

    def evaluate(engine):
        monkeypatch.setattr(StandIn, "free", 2**40 if not left else 2**32)
        engine.make_room()
        left.append(len(engine.graphs._graphs))

    figures, weights, graphs = trained(stand_in, between=evaluate)
    wanted, launched, _ = trained(None)
    assert left == [2, 0, 0] and graphs.failure is None
    assert figures == wanted and all(
        torch.equal(a, b) for a, b in zip(weights, launched, strict=True)
    )


@pytest.mark.parametrize(("figures", "others", "off"), [
    ([1.0, 2.0], [1.0, 2.002], 1e-3), ([math.nan, 1.0], [math.nan, 1.0], 0.0),
    ([math.nan], [1.0], math.inf), ([1.0], [math.nan], math.inf),
    ([0.0], [0.0], 0.0), ([math.inf], [1.0], math.inf),
])  # fmt: skip
def test_the_difference_of_two_passes(figures, others, off):
    assert cuda_graph._difference(torch.tensor(figures), torch.tensor(others)) == pytest.approx(
        off, rel=2e-3
    )
