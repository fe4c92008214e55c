"""Stages that train a whole student through its output head, perhaps beside a frozen teacher:
HALO's stages 2 and 3."""

from __future__ import annotations

from abc import abstractmethod
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from megatron_hypenet.config.computation import Fp8Config
from megatron_hypenet.config.mixers import MixerSpec
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import HeadStageConfig, StageConfig
from megatron_hypenet.model.flops import BACKWARD, head_flops
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.model.pipeline_layout import layer_costs
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.vocab_loss import linear_divergence
from megatron_hypenet.parallel.vocab_loss.gradients import CHUNKS_PER_PRODUCT, chunk_size
from megatron_hypenet.parallel.vocab_loss.objectives import ForwardKL, Objective, objective_of
from megatron_hypenet.stages.base import (
    LocalTokens,
    MicroBatch,
    PipelineRun,
    StageModule,
    finite_or_nan,
    local_tokens,
)
from megatron_hypenet.stages.footprint import (
    ACCUMULATION_BYTES,
    COMPUTE_BYTES,
    Footprint,
    StageRank,
)
from megatron_hypenet.stages.spec import Passes, StageSpec

FORWARD_KL = ForwardKL()
"""What a student minimises beside its teacher unless the settings say otherwise."""


class HeadStage(StageModule):
    """The module of a stage that trains through the output head.

    `head_loss` runs where the last layers are; under pipeline parallelism the schedule calls it on
    the last stage."""

    student: HypeNetModel

    def __init__(
        self,
        student: HypeNetModel,
        teacher: HypeNetModel | None = None,
        *,
        chunk_tokens: int | None,
        objective: Objective = FORWARD_KL,
        fp8: Fp8Config | None = None,
    ) -> None:
        """Take the models, the largest number of tokens whose logits exist at one time, what the
        student minimises beside a teacher, and what is computed in FP8."""
        super().__init__(student.model_config, fp8)
        self.student = student
        self.chunk_tokens = chunk_tokens
        self.objective = objective
        self.__dict__["teacher"] = None
        if teacher is not None:
            self.attach_frozen("teacher", teacher)

    @property
    def frozen_teacher(self) -> HypeNetModel | None:
        """Return the teacher whose final hidden states `head_loss` takes, if there is one."""
        teacher: HypeNetModel | None = self.__dict__["teacher"]
        return teacher

    @property
    def layout(self) -> tuple[int, ...]:
        """Return the layers per chunk of the pipeline, the same for student and teacher."""
        return self.student.layout

    @property
    def teacher_shape(self) -> ModelConfig:
        """Return the shape of the teacher; the student's own where there is none."""
        teacher = self.student if self.frozen_teacher is None else self.frozen_teacher
        return teacher.model_config

    @property
    def replayable(self) -> bool:
        """Return false for FP8's delayed scales, which every step changes."""
        config = self.student.config
        return not (config.fp8 and config.fp8_recipe == "delayed")

    @abstractmethod
    def head_loss(
        self, tokens: LocalTokens, hidden: Tensor, teacher_hidden: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (loss, metrics) as `forward` gives them, from final hidden states [t, b, h] of
        student and teacher."""

    def divergence(
        self, tokens: LocalTokens, hidden: Tensor, teacher_hidden: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the objective between the next-token distributions of teacher and student, and the
        metrics: its value, and forward KL beside it.

        It is the mean over every input token, or over those before an answer's; labels are not
        used. Logits exist for `chunk_tokens` tokens at a time only, inside the loss; the teacher's
        own head never runs."""
        assert self.frozen_teacher is not None and teacher_hidden is not None, (
            "a divergence needs a teacher"
        )
        loss, kl = linear_divergence(
            hidden,
            self.student.head_weight(),
            teacher_hidden,
            self.frozen_teacher.head_weight(),
            objective=self.objective,
            chunk_tokens=self.chunk_tokens,
            group=groups.tensor_group(),
            sequence_parallel=self.student.config.sequence_parallel,
            token_weights=None if tokens.answer_weights is None else tokens.answer_weights.t(),
        )
        found = {FORWARD_KL.quantity: kl, self.objective.quantity: loss.detach()}
        return loss, {f"train/{name}": value for name, value in found.items()}

    def forward(
        self, batch: MicroBatch, *, scores: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Map tokens [b, t + 1] -> (loss, metrics); with `scores`, what `token_scores` returns."""
        if scores:
            nll, correct = self.student.token_scores(batch.tokens)
            return nll.mean(), {"nll": nll, "correct": correct}
        tokens = local_tokens(batch)
        teacher_hidden = None
        if self.frozen_teacher is not None:
            with torch.no_grad():
                teacher_hidden = self.frozen_teacher.hidden(tokens.inputs, tokens.document_ids)
        return self.head_loss(
            tokens, self.student.hidden(tokens.inputs, tokens.document_ids), teacher_hidden
        )

    def token_scores(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Score tokens by the student as `HypeNetModel.token_scores` does, on any layout, while the
        engine trains it.

        It goes through the call of this module, for which ZeRO-3 gathers the output head."""
        _, found = self(MicroBatch(input_ids), scores=True)
        return found["nll"], found["correct"]

    def pipeline_step(self, pipeline: PipelineRun) -> None:
        """Run the teacher forward for all micro-batches and keep its hidden states on the last
        rank; then run the student by 1F1B, with the loss on the last rank."""
        tokens = pipeline.tokens
        waiting: list[Tensor | None] = [None] * len(tokens)
        teacher = self.frozen_teacher
        if teacher is not None:

            def keep(index: int, hidden: Tensor) -> None:
                waiting[index] = hidden

            def teacher_step(index: int, chunk: int) -> Tensor:
                part = tokens[index]
                return teacher.hidden(part.inputs, part.document_ids, chunk=chunk)

            pipeline.flow(teacher, teacher_step, keep)

        def student_step(index: int, chunk: int) -> Tensor:
            part = tokens[index]
            with pipeline.working():
                return self.student.hidden(part.inputs, part.document_ids, chunk=chunk)

        def loss_of(index: int, hidden: Tensor) -> Tensor:
            loss, metrics = self.head_loss(tokens[index], hidden, waiting[index])
            pipeline.add(loss, metrics)
            waiting[index] = None
            return loss * finite_or_nan(loss)

        pipeline.flow(self.student, student_step, loss_of, train=pipeline.train)

    def replicated_over_pipeline(self) -> list[nn.Parameter]:
        """Return the student's tied embedding, on the pipeline stages that share it."""
        return self.student.replicated_over_pipeline()

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        """Return the sharded state of the whole student."""
        return self.student.sharded_state_dict(prefix)


class HeadSpec(StageSpec):
    """What both stages have in common; a teacher runs beside the student where one is needed."""

    through_head = True

    def student_shape(
        self, teacher: ModelConfig, student: ModelConfig, mixer: MixerSpec
    ) -> ModelConfig:
        """Return the student as it is."""
        return student

    @abstractmethod
    def num_losses(self, config: StageConfig) -> int:
        """Return the number of losses that go through the student's head by themselves."""

    def passes(
        self, config: StageConfig, teacher: ModelConfig, student: ModelConfig
    ) -> tuple[Passes, ...]:
        """Return the student forward and backward, after the teacher forward where there is one."""
        frozen = Passes(model=teacher, projections=1, core=1, output=1, mlp=1, head=1, frozen=True)
        beside = self.needs_teacher(config)
        trained = Passes(
            model=student,
            projections=3,
            core=3,
            output=3,
            mlp=3,
            head=3 * self.num_losses(config),
            recomputes=True,
            logit_traffic=_objective(config).traffic if beside else 0.0,
        )
        return (frozen, trained) if beside else (trained,)

    def layer_costs(
        self, config: StageConfig, teacher: ModelConfig, student: ModelConfig
    ) -> tuple[list[float], float]:
        """Count the FLOPs of the layers and heads of both models, the student's forward and
        backward."""
        costs = [(1 + BACKWARD) * cost for cost in layer_costs(student, config.seq_length)]
        heads = self.num_losses(config) * (1 + BACKWARD) * head_flops(student)
        if not self.needs_teacher(config):
            return costs, heads
        frozen = layer_costs(teacher, config.seq_length)
        return [
            before + cost for before, cost in zip(frozen, costs, strict=True)
        ], heads + head_flops(teacher)

    def footprint(self, rank: StageRank, teacher: ModelConfig, student: ModelConfig) -> Footprint:
        """Count the memory of the whole student's training; on the last rank the loss takes the
        head's gradient and chunks of logits."""
        saved = sum(rank.saved_activations(student, layer, rank.recompute) for layer in rank.layers)
        waiting = 0.0
        # with several pipeline stages the teacher has seen all micro-batches before the student
        # begins
        beside = self.needs_teacher(rank.config)
        if beside and rank.last:
            waiting = rank.stream(teacher) * (rank.micro_batches if rank.stages > 1 else 1)
        return Footprint(
            trained=rank.parameters(student),
            frozen=rank.parameters(teacher) if beside else 0.0,
            frozen_fp8=rank.linear_parameters(teacher) if beside and rank.fp8.teacher else 0.0,
            activations=rank.tokens * (saved * rank.in_flight + waiting)
            + rank.held_in_fp8(student),
            work=max(
                layer_backward_bytes(rank, student),
                loss_bytes(
                    rank,
                    student,
                    logit_sets=_objective(rank.config).logit_sets if beside else 1,
                    waiting=self.num_losses(rank.config) - 1,
                )
                if rank.last
                else 0.0,
            ),
        )


def divergences(config: StageConfig) -> tuple[str, ...]:
    """Return the names of what `HeadStage.divergence` reports: the objective's value, and forward
    KL."""
    return tuple(dict.fromkeys((_objective(config).quantity, FORWARD_KL.quantity)))


def _objective(config: StageConfig) -> Objective:
    assert isinstance(config, HeadStageConfig), "a student learns through its head"
    return objective_of(config.objective)


def layer_backward_bytes(rank: StageRank, student: ModelConfig) -> float:
    """Return the peak bytes of the backward of one layer, with what it recomputes."""
    recomputed = {
        "none": 0.0,
        "selective": student.ffn_hidden_size / rank.tensor + 2 * student.hidden_size,
        "full": 0.0,
    }[rank.recompute]
    if rank.recompute == "full":
        recomputed = max(rank.saved_activations(student, layer, "none") for layer in rank.layers)
    matrix = 2 * student.ffn_hidden_size * student.hidden_size / rank.tensor
    tied = student.share_embeddings_and_output_weights and rank.first
    vocab_rows = student.vocab_size / rank.tensor
    return COMPUTE_BYTES * (
        rank.tokens * (rank.mlp_work(student) + recomputed)
        + matrix
        + (vocab_rows * student.hidden_size if tied else 0.0)
    )


def loss_bytes(
    rank: StageRank, student: ModelConfig, *, logit_sets: int, waiting: int = 0
) -> float:
    """Return the bytes of the loss: the head's gradient in fp32, a chunk of logits and their
    gradients (later a bf16 copy), gradient of hidden. The gradients of `waiting` other losses are
    there already."""
    vocab_rows = ceil(student.vocab_size / rank.tensor)
    limit = rank.config.vocab_chunk_tokens if isinstance(rank.config, HeadStageConfig) else None
    per_token = vocab_rows * (logit_sets * ACCUMULATION_BYTES + CHUNKS_PER_PRODUCT * COMPUTE_BYTES)
    chunk = chunk_size(rank.tokens, limit, per_token, torch.device("cuda")) * per_token
    head = vocab_rows * student.hidden_size
    gradients = ACCUMULATION_BYTES * head + COMPUTE_BYTES * rank.tokens * student.hidden_size
    return (1 + waiting) * gradients + max(chunk, COMPUTE_BYTES * head)
