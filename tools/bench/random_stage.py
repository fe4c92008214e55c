"""HALO stages with random weights at any size and on any layout, and synthetic tokens: what the
step benchmarks time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_hypenet.checkpoint.shards import tensor_pieces
from megatron_hypenet.config.computation import Fp8Config, Fp8Recipe, TransformerImpl
from megatron_hypenet.config.loader import load_model_config
from megatron_hypenet.config.mixers import MixerSpec, default_mixer
from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import HeadStageConfig, ParallelConfig, Recompute
from megatron_hypenet.engine.deepspeed.engine import TrainingEngine
from megatron_hypenet.model.hypenet import HypeNetModel, build_model
from megatron_hypenet.model.transfer import named_normal
from megatron_hypenet.parallel import groups
from megatron_hypenet.planning.layer_placement import placed
from megatron_hypenet.planning.layout_search import teacher_and_student
from megatron_hypenet.stages.base import MicroBatch, StageModule
from megatron_hypenet.stages.spec import stage_spec
from megatron_hypenet.training.micro_batches import step_batches
from megatron_hypenet.training.schedule import forward_backward

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class SyntheticTokens:
    """Random tokens that depend on the sample index alone."""

    vocab_size: int

    def batch(self, sample_start: int, count: int, seq_length: int) -> Tensor:
        """Return samples sample_start .. + count - 1: int64 [count, seq_length + 1]."""
        rows = [
            torch.randint(
                0,
                self.vocab_size,
                (seq_length + 1,),
                generator=torch.Generator().manual_seed(sample_start + row),
            )
            for row in range(count)
        ]
        return torch.stack(rows)

    def answers(self, sample_start: int, count: int, seq_length: int) -> Tensor | None:
        """Return None: every token is to be predicted."""
        return None

    def document_ends(self, tokens: Tensor, sample_start: int) -> Tensor:
        """Return that no document ends here: each sample is one document."""
        return torch.zeros_like(tokens, dtype=torch.bool)


def model_config(
    name: str,
    *,
    num_layers: int | None = None,
    mixer: MixerSpec | None = None,
    changes: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Return a student of configs/model, perhaps with its first layers only, another RNN mixer, and
    other `changes` of its shape."""
    config = load_model_config(ROOT / "configs" / "model" / f"{name}.yaml")
    layers = num_layers or config.num_layers
    if mixer is not None:
        types = (name if name == ATTENTION else mixer.name for name in config.mixer_types)
        config = config.with_mixers(types, (mixer,))
    return config.replace(
        num_layers=layers,
        mixer_types=config.mixer_types[:layers],
        attn_logits_scaling=None,
        **(changes or {}),
    )


@dataclass(frozen=True)
class _RandomModels:
    """The models of a stage with random weights, as `StageSpec.build` asks for them."""

    teacher_shape: ModelConfig
    student_shape: ModelConfig
    parallel: ParallelConfig
    by_name: bool
    mixer: MixerSpec
    seed: int = 2
    impl: TransformerImpl = "local"
    fp8: Fp8Config = Fp8Config()

    def teacher(self, *, trunk_only: bool = False) -> HypeNetModel:
        """Build a teacher with weights of seed 1."""
        return self._model(self.teacher_shape, 1, trunk_only=trunk_only)

    def student(self, *, recompute: Recompute) -> HypeNetModel:
        """Build a student with weights of seed 2."""
        return self._model(self.student_shape, self.seed, recompute=recompute, fp8=self.fp8.student)

    def _model(
        self,
        shape: ModelConfig,
        seed: int,
        *,
        trunk_only: bool = False,
        recompute: Recompute = "none",
        fp8: Fp8Recipe | None = None,
    ) -> HypeNetModel:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        built = build_model(
            shape,
            self.parallel,
            dtype=dtype,
            seed=seed,
            trunk_only=trunk_only,
            recompute=recompute,
            impl=self.impl,
            fp8=fp8,
        )
        if self.by_name:
            _fill_by_name(built, seed)
        return built


def build(
    name: str,
    student: ModelConfig,
    config: HeadStageConfig,
    parallel: ParallelConfig,
    *,
    by_name: bool = False,
    mixer: MixerSpec | None = None,
    impl: TransformerImpl = "local",
    fp8: Fp8Config | None = None,
) -> StageModule:
    """Build stage `name` in bfloat16 on CUDA, float32 on a CPU, with `mixer` in place of the
    default RNN mixer. `by_name` draws each weight from its name, the same on every layout
    (slow)."""
    spec = stage_spec(name)
    mixer = mixer or default_mixer()
    teacher, _ = teacher_and_student(student, mixer)
    trained = spec.student_shape(teacher, student, mixer)
    parallel = placed(name, config, parallel, teacher, trained)
    models = _RandomModels(
        teacher, trained, parallel, by_name, mixer, impl=impl, fp8=fp8 or Fp8Config()
    )
    return spec.build(models, config)


@torch.no_grad()
def _fill_by_name(model: HypeNetModel, seed: int) -> None:
    for entry in model.sharded_state_dict().values():
        for piece in tensor_pieces(entry):
            if "norm" in piece.key:
                piece.data.fill_(1.0)
                continue
            whole = named_normal(piece.key, tuple(piece.global_shape), std=0.02, seed=seed)
            index = tuple(
                slice(at, at + size)
                for at, size in zip(piece.global_offset, piece.local_shape, strict=True)
            )
            piece.data.copy_(whole[index])


class TimedSteps:
    """Optimizer steps of a stage, one behind the other as in training: losses and gradient norms of
    all, seconds of each in the last `run`.

    A step ends where its gradient norm reaches the host, which from there on gives the device the
    next one. So a step holds the update of the one before, and the first of a run none."""

    def __init__(
        self, stage: StageModule, config: HeadStageConfig, parallel: ParallelConfig
    ) -> None:
        self.engine = TrainingEngine(stage, config, parallel)
        self.config = config
        self.tokens = SyntheticTokens(stage.model_config.vocab_size)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.seconds: list[float] = []
        stage.train()

    def run(self, steps: int) -> None:
        """Train so many steps more; the device has nothing to do before and afterwards."""
        self.seconds, losses = [], []
        batches = self._batches(0)
        _wait()
        began = time.perf_counter()
        for ahead in range(1, steps + 1):
            losses.append(forward_backward(self.engine, batches)[0].double())
            batches = self._batches(ahead)
            self.norms.append(self.engine.apply(self.config.lr))
            now = time.perf_counter()
            self.seconds.append(now - began)
            began = now
        _wait()
        self.losses += [
            float(groups.sum_over_pipeline(groups.all_reduce_mean(loss))) for loss in losses
        ]

    def _batches(self, ahead: int) -> list[MicroBatch]:
        """Return the micro-batches of the step that is so many behind the last run's last."""
        return step_batches(
            self.tokens, self.config, (len(self.losses) + ahead) * self.config.global_batch_size
        )

    def close(self) -> None:
        """Release the engine."""
        self.engine.close()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(values: Sequence[float]) -> float:
    """Return the middle value."""
    ordered = sorted(values)
    return ordered[len(ordered) // 2]
