"""One HALO stage from checkpoints to checkpoint: build the models and load them strictly; also
assemble the student."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_hypenet.checkpoint.load import (
    load_model,
    open_weights,
    read_manifest,
    read_model_config,
    read_whole_config,
    resolve,
    tokenizer_dir,
)
from megatron_hypenet.checkpoint.save import write_weights
from megatron_hypenet.checkpoint.shards import LazyTensor, ShardReader
from megatron_hypenet.config.computation import Fp8Config, Fp8Recipe
from megatron_hypenet.config.mixers import MixerSpec
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig, Recompute, RunConfig
from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.model.fp8_layers import require_fp8_gpu
from megatron_hypenet.model.hypenet import HypeNetModel, build_model
from megatron_hypenet.model.kernel_guard import guard_kernels
from megatron_hypenet.model.transfer import fresh_parameter
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.planning.layer_placement import check_placement, placed, placement_table
from megatron_hypenet.stages.aligned_mixers import AlignedMixers
from megatron_hypenet.stages.assemble import plan_assembly
from megatron_hypenet.stages.base import StageModule
from megatron_hypenet.stages.spec import stage_spec

logger = logging.getLogger(__name__)


def compute_dtype(run: RunConfig) -> torch.dtype:
    """Return the dtype of weights and activations: as configured; `auto` is bfloat16 on CUDA and
    float32 on a CPU."""
    if run.precision == "auto":
        return torch.bfloat16 if device().type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[run.precision]


def load_hypenet(
    run: RunConfig,
    folder: Path,
    *,
    trunk_only: bool = False,
    parallel: ParallelConfig | None = None,
    recompute: Recompute = "none",
    fp8: Fp8Recipe | None = None,
) -> HypeNetModel:
    """Return the model of a checkpoint in the run's dtype and layout, filled strictly; a trunk
    leaves the tensors after the last mixer unread.

    `parallel` is the run's layout with the pipeline stages settled, where they are needed;
    `recompute` and `fp8` are for a model that trains. Raises SetupError where this GPU has no FP8
    products and the run asks for them."""
    if run.fp8.used:
        require_fp8_gpu("fp8.teacher" if run.fp8.teacher else "fp8.student")
    parallel = parallel or run.parallel
    model = build_model(
        read_whole_config(folder),
        parallel,
        dtype=compute_dtype(run),
        seed=run.seed,
        trunk_only=trunk_only,
        recompute=recompute,
        impl=run.model.transformer_impl,
        fp8=fp8,
    )
    check_placement(model)
    guard_kernels(
        model,
        documents=run.data.separate_documents,
        mixers=(run.align.mixer,),
        fp8=run.fp8.teacher,
    )
    load_model(model, folder, allow_unused=trunk_only)
    return model


def load_teacher(
    run: RunConfig,
    folder: Path,
    *,
    trunk_only: bool = False,
    parallel: ParallelConfig | None = None,
) -> HypeNetModel:
    """Load a teacher like `load_hypenet`; CheckpointError when the checkpoint is a HypeNet
    already."""
    read_teacher_config(folder)
    return load_hypenet(run, folder, trunk_only=trunk_only, parallel=parallel)


def read_teacher_config(folder: Path) -> ModelConfig:
    """Read the shape of a teacher; CheckpointError when the checkpoint is a HypeNet already."""
    config = read_model_config(folder)
    if not config.is_teacher:
        raise CheckpointError(
            f"{folder} is not a teacher: a teacher has softmax attention with RoPE and without "
            "output gate in every layer, this has "
            f"{len(config.attention_layers)} softmax layers of {config.num_layers}; "
            "point teacher to a Qwen3, Llama or Qwen2 model"
        )
    return config


def load_aligned(teacher: HypeNetModel, folder: Path) -> AlignedMixers:
    """Return the RNN mixers that stage 1 trained, for the layers of `teacher`."""
    trained = read_model_config(folder)
    # every parameter is read, so that the seed decides nothing
    mixers = AlignedMixers.from_teacher(teacher, trained.spec(trained.mixer_types[0]), seed=0)
    load_model(mixers, folder)
    return mixers


@dataclass(frozen=True, slots=True)
class _Checkpoints:
    """The models of a stage from their checkpoints, as `StageSpec.build` asks for them."""

    run: RunConfig
    parallel: ParallelConfig
    teacher_folder: Path | None
    student_folder: Path | None

    @property
    def mixer(self) -> MixerSpec:
        return self.run.align.spec

    @property
    def seed(self) -> int:
        return self.run.seed

    @property
    def fp8(self) -> Fp8Config:
        return self.run.fp8

    def teacher(self, *, trunk_only: bool = False) -> HypeNetModel:
        assert self.teacher_folder is not None, "the stage has a teacher"
        return load_teacher(
            self.run, self.teacher_folder, trunk_only=trunk_only, parallel=self.parallel
        )

    def student(self, *, recompute: Recompute) -> HypeNetModel:
        assert self.student_folder is not None, "the stage starts from a student"
        return load_hypenet(
            self.run,
            self.student_folder,
            parallel=self.parallel,
            recompute=recompute,
            fp8=self.run.fp8.student,
        )


def build_stage(
    name: str, run: RunConfig, *, teacher: Path | None = None, init: Path | None = None
) -> StageModule:
    """Return the stage module with all weights loaded.

    `teacher` is needed where `StageSpec.needs_teacher` says so, `init` (the student to start from)
    by those with `through_head`. Raises CheckpointError.
    """
    spec = stage_spec(name)
    config = run.stage(name)
    shape = read_teacher_config(teacher) if teacher is not None else None
    assert shape is not None or not spec.needs_teacher(config), f"{name} learns from a teacher"
    if spec.through_head:
        assert init is not None, f"{name} starts from a student"
        start = read_student_config(name, init, teacher, shape)
    else:
        assert shape is not None, f"{name} starts from its teacher"
        start = shape
    student = spec.student_shape(shape or start, start, run.align.spec)
    parallel = placed(name, config, run.parallel, shape, student)
    stage = spec.build(_Checkpoints(run, parallel, teacher, init), config)
    if spec.through_head:
        stage.model_config = trained_at(stage.model_config, config.seq_length)
    return stage


def read_student_config(
    name: str, folder: Path, teacher: Path | None, teacher_shape: ModelConfig | None
) -> ModelConfig:
    """Read the shape of the student that stage `name` starts from; CheckpointError when the
    checkpoint is a teacher's, or its vocabulary is not that of its teacher."""
    student = read_model_config(folder)
    if student.is_teacher:
        raise CheckpointError(
            f"{folder} is a teacher, but stage {name} trains a student; give the assembled student "
            "or the result of stage 2"
        )
    if teacher_shape is not None and teacher_shape.vocab_size != student.vocab_size:
        raise CheckpointError(
            f"teacher {teacher} has vocab_size={teacher_shape.vocab_size}, "
            f"student {folder} {student.vocab_size}; "
            "distillation compares distributions over one vocabulary: use the teacher the student "
            "was made from"
        )
    return student


def trained_at(config: ModelConfig, seq_length: int) -> ModelConfig:
    """Return the shape of a student trained on `seq_length` tokens: it claims that length where the
    teacher's claim is shorter.

    HyPE is made for longer contexts, but lengths that were not trained are measured in the report,
    not claimed by the model."""
    return config.replace(max_position_embeddings=max(config.max_position_embeddings, seq_length))


def assemble(
    run: RunConfig, teacher: Path, aligned: Path, mixer_types: tuple[str, ...], out: Path
) -> ModelConfig:
    """Write the student that stage 2 starts from; one process, one tensor in memory at a time.
    Returns its shape."""
    student = read_model_config(teacher).with_mixers(
        mixer_types, read_model_config(aligned).mixers.values()
    )
    sources = {"teacher": open_weights(teacher), "aligned": open_weights(aligned)}
    plan = plan_assembly(student, sources["teacher"], sources["aligned"])
    tensors: dict[str, Any] = {}
    for source, names in (("teacher", plan.from_teacher), ("aligned", plan.from_aligned)):
        for name in names:
            tensors[name] = _lazy(sources[source], name)
    dtype = tensors[plan.from_teacher[0]].dtype
    for name, parameter in plan.fresh.items():
        tensors[name] = fresh_parameter(name, parameter, seed=run.seed, dtype=dtype)
    origin = read_manifest(resolve(teacher)).hf_config
    extra = {
        "teacher": str(teacher),
        "aligned": str(aligned),
        "attention_layers": list(student.attention_layers),
        "hf_config": origin,
    }
    write_weights(
        out,
        tensors,
        student,
        kind="student",
        tokenizer_dir=tokenizer_dir(teacher),
        extra=extra,
        overwrite=True,
    )
    return student


def _lazy(reader: ShardReader, name: str) -> LazyTensor:
    return LazyTensor(reader.shape(name), reader.dtype(name), lambda: reader[name])


def parameter_table(stage: StageModule) -> str:
    """Return a table of trained and frozen parameters, counted on this process, which shows before
    the first step if a stage trains the wrong ones."""
    trains = sum(parameter.numel() for parameter in stage.trainable_parameters().values())
    lines = [
        f"  {'trains':<18}{len(stage.trainable_parameters()):>5} tensors {trains:>14,} parameters"
    ]
    teacher = stage.__dict__.get("teacher")
    if teacher is not None:
        frozen = sum(parameter.numel() for parameter in teacher.parameters())
        lines.append(
            f"  {'frozen (teacher)':<18}{len(list(teacher.parameters())):>5} tensors {frozen:>14,} "
            "parameters"
        )
    num_stages = groups.pipeline_stage()[1]
    if num_stages > 1:
        lines.append(placement_table(stage.layout, stage.model_config, num_stages))
    return "\n".join(lines)
