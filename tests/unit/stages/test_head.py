"""What stages 2 and 3 have in common: their forward pass, and their share of a pipeline."""

import torch

from megatron_hypenet.config.schema import FinetuneConfig, HeadStageConfig, ParallelConfig
from megatron_hypenet.parallel.vocab_loss.objectives import TopK, objective_of
from megatron_hypenet.stages.base import MicroBatch, local_tokens
from megatron_hypenet.stages.distill import DistillSpec, DistillStage
from megatron_hypenet.stages.finetune import FinetuneSpec, FinetuneStage
from megatron_hypenet.stages.footprint import StageRank
from megatron_hypenet.stages.head import layer_backward_bytes, loss_bytes
from tests.unit.stages.conftest import STUDENT, TEACHER


class OnePipelineStage:
    """A pipeline of one stage: every micro-batch goes through as it is."""

    train = True

    def __init__(self, *batches):
        self.tokens = [local_tokens(batch) for batch in batches]
        self.losses = []
        self.flows = []

    def flow(self, model, step, finish, *, train=False):
        self.flows.append((model, train))
        for index in range(len(self.tokens)):
            with torch.set_grad_enabled(train):
                finish(index, step(index, 0))

    def working(self):
        import contextlib

        return contextlib.nullcontext()

    def add(self, loss, metrics):
        self.losses.append(loss)


def test_a_pipeline_gives_the_losses_of_forward(student, teacher, batch):
    other = MicroBatch(batch.tokens.flip(0))
    for stage in (
        DistillStage(student, teacher, chunk_tokens=8),
        DistillStage(student, teacher, chunk_tokens=8, objective=TopK(3)),
        FinetuneStage(student, chunk_tokens=8),
        FinetuneStage(student, teacher, chunk_tokens=8, teacher_weight=0.3),
    ):
        pipeline = OnePipelineStage(batch, other)
        stage.pipeline_step(pipeline)
        assert pipeline.losses == [stage(batch)[0], stage(other)[0]]
        assert pipeline.flows[-1] == (student, True)
        assert pipeline.flows[:-1] == ([(teacher, False)] if stage.frozen_teacher else [])


def settings(kind=FinetuneConfig, **changes):
    return kind(
        train_iters=1,
        seq_length=64,
        micro_batch_size=1,
        global_batch_size=8,
        lr=1e-5,
        min_lr=1e-5,
        **changes,
    )


def rank(index=1, stages=(1, 2), **changes):
    return StageRank(settings(**changes), ParallelConfig(), 1, stages, index)


def test_a_teacher_adds_its_weights_its_waiting_states_and_a_second_set_of_logits():
    alone = FinetuneSpec().footprint(rank(), TEACHER, STUDENT)
    beside = DistillSpec().footprint(rank(), TEACHER, STUDENT)
    assert (alone.frozen, beside.frozen) == (0.0, rank().parameters(TEACHER))
    assert beside.activations - alone.activations == 64 * 8 * TEACHER.hidden_size
    assert beside.trained == alone.trained
    one, two = (loss_bytes(rank(), STUDENT, logit_sets=sets) for sets in (1, 2))
    assert one < two


def test_the_loss_is_on_the_last_rank_alone():
    first = FinetuneSpec().footprint(rank(index=0), TEACHER, STUDENT)
    assert first.work == layer_backward_bytes(rank(index=0), STUDENT)
    assert first.activations > 0


def test_layers_cost_more_beside_a_teacher():
    alone, head = FinetuneSpec().layer_costs(settings(), TEACHER, STUDENT)
    beside, heads = DistillSpec().layer_costs(settings(), TEACHER, STUDENT)
    assert all(one < two for one, two in zip(alone, beside, strict=True)) and head < heads
    mixed, both = FinetuneSpec().layer_costs(settings(teacher_weight=0.5), TEACHER, STUDENT)
    assert mixed == beside and both == heads + head


def test_a_teacher_in_stage_3_adds_what_it_adds_in_stage_2_and_one_more_loss():
    mixed = FinetuneSpec().footprint(rank(teacher_weight=0.5), TEACHER, STUDENT)
    beside = DistillSpec().footprint(rank(), TEACHER, STUDENT)
    assert (mixed.frozen, mixed.activations) == (beside.frozen, beside.activations)
    one, two = (loss_bytes(rank(), STUDENT, logit_sets=2, waiting=count) for count in (0, 1))
    tokens = 64
    gradients = 4 * STUDENT.vocab_size + 2 * tokens
    assert two - one == gradients * STUDENT.hidden_size


def test_an_objective_without_kernels_holds_more_logits_and_moves_more_bytes():
    chosen = settings(HeadStageConfig, objective={"kind": "jensen_shannon"})
    plain = settings(HeadStageConfig)
    assert objective_of(chosen.objective).logit_sets > objective_of(plain.objective).logit_sets
    (_, fused), (_, torch_only) = (
        DistillSpec().passes(config, TEACHER, STUDENT) for config in (plain, chosen)
    )
    assert fused.logit_traffic == 0 < torch_only.logit_traffic
    assert fused.flops(64) == torch_only.flops(64)
