"""The specification of a training stage: how it is built, what it computes, and what it holds in
memory. There is one per stage, in the stage's own file.

Code that depends on which stage trains (building, planning, remaining time, pipeline layout) asks
the specification, so that only a stage's own file branches on its name."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Protocol

from megatron_hypenet.config.computation import Fp8Config
from megatron_hypenet.config.mixers import MixerSpec
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import STAGES, Recompute, StageConfig
from megatron_hypenet.model.flops import head_flops, mlp_flops
from megatron_hypenet.stages.footprint import Footprint, StageRank

if TYPE_CHECKING:
    from megatron_hypenet.model.hypenet import HypeNetModel
    from megatron_hypenet.stages.base import StageModule


class ModelSource(Protocol):
    """The source of a stage's models: checkpoints (halo/build_stage.py) or random weights
    (tools/bench)."""

    @property
    def mixer(self) -> MixerSpec:
        """Return the RNN mixer that replaces attention."""

    @property
    def seed(self) -> int:
        """Return the seed of fresh weights."""

    @property
    def fp8(self) -> Fp8Config:
        """Return what is computed in FP8; the stage quantises its teacher itself, once nothing
        more is taken from its weights."""

    def teacher(self, *, trunk_only: bool = False) -> HypeNetModel:
        """Return the teacher, perhaps without what follows its last mixer."""

    def student(self, *, recompute: Recompute) -> HypeNetModel:
        """Return the student that the stage starts from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """How often a step of a stage computes each part of one model, in forward passes: 1 forward,
    and in backward 1 each for the gradients of inputs and of weights."""

    model: ModelConfig
    projections: int
    """Input projections of the mixers."""
    core: int
    """Operations between a mixer's projections."""
    output: int
    """Output projections of the mixers."""
    mlp: int
    head: int
    last_mlp: bool = True
    """Whether the last layer's MLP is computed."""
    compared: bool = False
    """Whether every mixer's output is compared with another model's."""
    recomputes: bool = False
    """Whether the stage's `recompute` setting applies: backward computes forward parts again."""
    logit_traffic: float = 0.0
    """Bytes per logit that the loss reads and writes beyond what its kernels on CUDA do, where it
    has none."""

    frozen: bool = False
    """Whether this is the teacher, which may be in FP8 apart from the student."""

    def forward(self) -> Passes:
        """Return the same without backward."""
        once = ("projections", "core", "output", "mlp", "head")
        return replace(self, **{name: min(1, getattr(self, name)) for name in once})

    def flops(self, seq_length: int) -> float:
        """Count the floating-point operations per token, without recomputation."""
        model = self.model
        core = sum(model.spec(name).flops(model, seq_length).core for name in model.mixer_types)
        return self.linear_flops(seq_length) + self.core * core + self.head * head_flops(model)

    def linear_flops(self, seq_length: int) -> float:
        """Count those of the layers' linear modules, which FP8 can compute."""
        model = self.model
        total = (model.num_layers - (not self.last_mlp)) * self.mlp * mlp_flops(model)
        for name in model.mixer_types:
            work = model.spec(name).flops(model, seq_length)
            total += self.projections * work.projections + self.output * work.output
        return total


class StageSpec(ABC):
    """One training stage of HALO."""

    name: ClassVar[str]
    """The stage's name in configs and folders."""
    through_head: ClassVar[bool]
    """Whether a whole student trains through its output head; it then starts from a student."""

    mfu: ClassVar[float] = 0.4
    """Share of a GPU's dense bf16 peak that its steps reach, measured on an H100 (README.md,
    "Speed"); the estimate of time goes by it until a run has measured its own speed."""

    @abstractmethod
    def quantities(self, config: StageConfig) -> tuple[str, ...]:
        """Return the names of the quantities that it reports as train/NAME, and as eval/NAME on
        held-out text: first what it minimises, then its parts and what is computed beside it.
        `lm-loss` is the student's next-token cross entropy."""

    def loss(self, config: StageConfig) -> str:
        """Return the name of the quantity that it minimises."""
        return self.quantities(config)[0]

    @abstractmethod
    def needs_teacher(self, config: StageConfig) -> bool:
        """Return whether the stage needs a frozen teacher."""

    @abstractmethod
    def build(self, source: ModelSource, config: StageConfig) -> StageModule:
        """Build the stage's module with the models of `source`."""

    @abstractmethod
    def student_shape(
        self, teacher: ModelConfig, student: ModelConfig, mixer: MixerSpec
    ) -> ModelConfig:
        """Return the shape that trains, of a run whose finished student has the shape `student`."""

    @abstractmethod
    def passes(
        self, config: StageConfig, teacher: ModelConfig, student: ModelConfig
    ) -> tuple[Passes, ...]:
        """Return what a step computes of each of its models; `student` is what trains
        (`student_shape`)."""

    def flops(self, config: StageConfig, teacher: ModelConfig, student: ModelConfig) -> float:
        """Count the floating-point operations of a training step per token, over all ranks."""
        return sum(
            passes.flops(config.seq_length) for passes in self.passes(config, teacher, student)
        )

    def forward_flops(
        self, config: StageConfig, teacher: ModelConfig, student: ModelConfig
    ) -> float:
        """Count the floating-point operations per token of the stage's loss alone."""
        return sum(
            passes.forward().flops(config.seq_length)
            for passes in self.passes(config, teacher, student)
        )

    def fp8_flops(
        self, config: StageConfig, teacher: ModelConfig, student: ModelConfig, fp8: Fp8Config
    ) -> float:
        """Count those of `flops` that are computed in FP8."""
        return sum(
            passes.linear_flops(config.seq_length)
            for passes in self.passes(config, teacher, student)
            if (fp8.teacher if passes.frozen else fp8.student and self.through_head)
        )

    @abstractmethod
    def layer_costs(
        self, config: StageConfig, teacher: ModelConfig, student: ModelConfig
    ) -> tuple[list[float], float]:
        """Return the FLOPs per token of every layer, and of the head, for balancing a pipeline."""

    @abstractmethod
    def footprint(self, rank: StageRank, teacher: ModelConfig, student: ModelConfig) -> Footprint:
        """Return the memory of the stage on one pipeline stage, for a bf16 model on CUDA."""


_REGISTRY: dict[str, StageSpec] = {}


def register_stage(cls: type[StageSpec]) -> type[StageSpec]:
    """Register the specification of a stage under its name, as a class decorator."""
    assert cls.name in STAGES and cls.name not in _REGISTRY, f"{cls.name} is unknown or twice there"
    _REGISTRY[cls.name] = cls()
    return cls


def stage_spec(name: str) -> StageSpec:
    """Return the specification of training stage `name`, one of STAGES.

    Its file is imported at the first call, because it needs torch, which commands that only show a
    plan do not load."""
    if name not in STAGES:
        raise KeyError(f"no stage {name!r}; stages are {', '.join(STAGES)}")
    if name not in _REGISTRY:
        importlib.import_module(f"megatron_hypenet.stages.{name}")
    return _REGISTRY[name]
