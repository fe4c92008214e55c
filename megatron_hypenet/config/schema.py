"""Everything that can be set for a run, as frozen pydantic models. Unknown keys are errors; every
field says what it means.

Sections follow the pipeline: what goes in (teacher, data), how it is spread (parallel, precision),
the three training stages and the layer selection between them, then evaluation, checkpoints and
export. The sections of layout, layer selection and objectives are in parallel.py, selection.py and
objective.py.
docs/config.md is generated from the descriptions. A default stands only where one value suits most
runs; whatever depends on the model or the data has none and must be written down.

One file, because it is read as the list of all settings, half of it descriptions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from megatron_hypenet.config.computation import Fp8Config, ModelConfigOfRun
from megatron_hypenet.config.fields import (
    BelowOne,
    Count,
    Fraction,
    Name,
    NotNegative,
    Percent,
    Rate,
    Section,
    Seed,
    check_batches,
)
from megatron_hypenet.config.mixers import MixerSpec, default_mixer, mixer_specs, with_settings
from megatron_hypenet.config.model import (
    LogitsScaling,
    PositiveInt,
    Switch,
    check_logits_scaling,
)
from megatron_hypenet.config.objective import ObjectiveConfig
from megatron_hypenet.config.parallel import ParallelConfig
from megatron_hypenet.config.paths import PathSetting
from megatron_hypenet.config.selection import SelectConfig

Recompute = Literal["none", "selective", "full"]

STAGES = ("align", "distill", "finetune")
"""The training stages in the order HALO runs them; layer selection sits between the first two."""

GATES = {f"{stage}-gate": stage for stage in STAGES}
"""Checks of the student between stages, and the stage that each comes after."""


class SourceConfig(Section):
    """One source of data with settings of its own."""

    path: PathSetting = Field(
        description="A file of text, a folder or pattern of them, or the prefix of a prepared "
        ".bin/.idx pair; docs/data.md has the kinds."
    )
    weight: Rate | None = Field(
        default=None,
        description="Share of the training sequences from this source, in relation to the other "
        "weights; null in all sources reads them as one text.",
    )
    text_key: str = Field(
        default="text", min_length=1, description="Field of a record that holds its text."
    )
    messages_key: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description="Field of a record that holds a conversation, for the tokenizer's chat "
        "template: stages 2 and 3 then learn the answers only. null reads text_key.",
    )


SOURCE_TAG = "source"
"""Stands in the place of an error for a source with settings of its own."""


def _source_tag(value: Any) -> str:
    return SOURCE_TAG if isinstance(value, dict | SourceConfig) else "path"


Source = Annotated[
    Annotated[PathSetting, Tag("path")] | Annotated[SourceConfig, Tag(SOURCE_TAG)],
    Discriminator(_source_tag),
]
"""A path, or a path with settings."""


class DataConfig(Section):
    """What the model reads."""

    train: tuple[Source, ...] = Field(
        min_length=1,
        description="Training data: text files (.txt, .jsonl, .json, .parquet and more, see "
        "docs/data.md), folders or patterns of them, prefixes of prepared .bin/.idx pairs, or "
        "{path, weight, text_key, messages_key}. `data: [...]` is short for it.",
    )
    heldout: Source | None = Field(
        default=None,
        description="Held-out data of the same kinds; null takes heldout_fraction off the training "
        "data.",
    )
    heldout_fraction: BelowOne = Field(
        default=0.02,
        description="Share of the training documents kept for held-out loss when heldout is null.",
    )
    recall_fraction: Fraction = Field(
        default=0.0,
        description="Share of training sequences that are generated key-value recall documents "
        "instead of text.",
    )
    recall_pairs: PositiveInt = Field(
        default=8, description="Key-value pairs in one generated training recall document."
    )
    separate_documents: Switch = Field(
        default=False,
        description="Documents packed into one sequence do not see each other: "
        "attention and RNN state restart after each "
        "end-of-document token (in prepared files without any: at the document boundaries of the "
        ".idx), and "
        "the loss skips predicting across the boundary.",
    )
    seed: Seed = Field(
        default=1234,
        description="Seed of the data order, the held-out split and the recall documents.",
    )

    @model_validator(mode="after")
    def _weights(self) -> Self:
        missing = [str(source.path) for source in self.sources if source.weight is None]
        if 0 < len(missing) < len(self.train):
            raise ValueError(
                f"weight is missing for {', '.join(missing)}; give one to every source of "
                "data.train, or to none"
            )
        if self.heldout_source is not None and self.heldout_source.weight is not None:
            raise ValueError("heldout has no weight: it is one source; leave it out")
        return self

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Return the training data with all settings."""
        return tuple(map(as_source, self.train))

    @property
    def heldout_source(self) -> SourceConfig | None:
        """Return the held-out data with all settings, if it is named."""
        return None if self.heldout is None else as_source(self.heldout)

    @property
    def every_source(self) -> tuple[SourceConfig, ...]:
        """Return the training data, then held-out data."""
        heldout = self.heldout_source
        return self.sources if heldout is None else (*self.sources, heldout)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Return the weights of the sources, or None where they are read as one text."""
        found = [source.weight for source in self.sources if source.weight is not None]
        return tuple(found) or None


def as_source(entry: Path | SourceConfig) -> SourceConfig:
    """Return a path among the sources with the default settings."""
    return entry if isinstance(entry, SourceConfig) else SourceConfig(path=entry)


class StageConfig(Section):
    """One training stage: how long, on what sizes, with which optimizer settings (AdamW)."""

    train_iters: PositiveInt = Field(description="Optimizer steps.")
    seq_length: PositiveInt = Field(
        description="Tokens per sequence, before context-parallel splitting."
    )
    micro_batch_size: PositiveInt = Field(
        description="Sequences per forward pass on one data-parallel process."
    )
    global_batch_size: PositiveInt = Field(
        description="Sequences per optimizer step over all processes."
    )
    lr: Rate = Field(description="Peak learning rate.")
    min_lr: NotNegative = Field(
        description="Learning rate at the end of the cosine; unused with lr_schedule constant."
    )
    lr_schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="Shape of the learning rate after warm-up."
    )
    warmup_iters: Count = Field(default=0, description="Steps of linear warm-up from zero to lr.")
    lr_decay_iters: PositiveInt | None = Field(
        default=None,
        description="Step at which the cosine reaches min_lr, where the learning rate then stays; "
        "null is the last step. A stage is lengthened by a larger train_iters and the former one "
        "here.",
    )
    weight_decay: NotNegative = Field(default=0.0, description="AdamW's decoupled weight decay.")
    adam_betas: tuple[BelowOne, BelowOne] = Field(
        default=(0.9, 0.95), description="AdamW's moment decays."
    )
    clip_grad: NotNegative = Field(
        default=1.0, description="Largest global gradient norm; 0 turns clipping off."
    )
    save_interval: PositiveInt = Field(
        default=1000, description="Steps between checkpoints; the last step is always saved."
    )
    log_interval: PositiveInt = Field(
        default=10, description="Steps between log lines and TensorBoard points."
    )
    eval_interval: PositiveInt | None = Field(
        default=None,
        description="Steps between evaluations on held-out text (eval/... in TensorBoard and the "
        "log); null takes about ten in a stage, fewer where they would cost more than a twentieth "
        "of its time. The last step is always evaluated.",
    )
    cuda_graphs: Switch = Field(
        default=True,
        description="Replay small micro-batches (up to 12,288 tokens) as one CUDA graph instead of "
        "launching every kernel: faster where "
        "launches take longer than they run. Takes effect with bfloat16, zero_stage 0 or 1, "
        "one GPU per replica, recompute none, and "
        "documents not kept apart, without fp8.student=delayed; a replay is compared with launched "
        "kernels first.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_batches(self.micro_batch_size, self.global_batch_size)
        if self.min_lr > self.lr:
            raise ValueError(
                f"min_lr={self.min_lr:g} is above lr={self.lr:g}; the schedule only goes down"
            )
        if self.warmup_iters > self.train_iters:
            raise ValueError(
                f"warmup_iters={self.warmup_iters} is longer than train_iters={self.train_iters}"
            )
        if self.lr_decay_iters is not None and self.lr_schedule == "constant":
            raise ValueError(
                f"lr_decay_iters={self.lr_decay_iters} has no effect with lr_schedule=constant; "
                "leave it out"
            )
        if self.lr_decay_iters is not None and self.lr_decay_iters < self.warmup_iters:
            raise ValueError(
                f"lr_decay_iters={self.lr_decay_iters} is shorter than "
                f"warmup_iters={self.warmup_iters}"
            )
        return self

    @property
    def decay_iters(self) -> int | None:
        """Return the number of steps until the learning rate has reached the end of its cosine;
        None where it is constant."""
        return None if self.lr_schedule == "constant" else self.lr_decay_iters or self.train_iters

    @property
    def tokens_per_step(self) -> int:
        """Return the number of tokens one optimizer step reads."""
        return self.global_batch_size * self.seq_length

    def num_micro_batches(self, dp_size: int) -> int:
        """Forward passes per step on each of `dp_size` data-parallel processes; checks.check_layout
        refuses a remainder."""
        return self.global_batch_size // (self.micro_batch_size * dp_size)


class AlignConfig(StageConfig):
    """HALO stage 1: each RNN mixer learns to give what the attention of its layer gives."""

    mixer: str = Field(
        default=default_mixer().name,
        description="RNN mixer that takes the place of softmax attention.",
    )
    mixer_settings: dict[str, Any] = Field(
        default={}, description="Settings of that mixer, for mixers that have any."
    )

    @model_validator(mode="after")
    def _mixer_exists(self) -> Self:
        names = sorted(name for name, spec in mixer_specs().items() if spec.recurrent)
        if self.mixer not in names:
            raise ValueError(f"mixer={self.mixer!r} is no RNN mixer; known: {', '.join(names)}")
        with_settings(self.mixer, self.mixer_settings)
        return self

    @property
    def spec(self) -> MixerSpec:
        """Return the RNN mixer with its settings."""
        return with_settings(self.mixer, self.mixer_settings)


class HeadStageConfig(StageConfig):
    """HALO stages 2 and 3: the whole student learns through its output head."""

    objective: ObjectiveConfig = Field(
        default=ObjectiveConfig(),
        description="What the student minimises beside its teacher, at temperature 1: a divergence "
        "of their next-token distributions, p of the teacher and q of the student.",
    )
    vocab_chunk_tokens: PositiveInt | None = Field(
        default=None,
        description="Tokens whose logits exist at one time inside the loss; "
        "smaller needs less memory. null takes as many as fill 2 GB "
        "with logits and their gradients on a GPU, 32 MB on a CPU, and at least 128.",
    )
    recompute: Recompute = Field(
        default="none",
        description="Activations computed again in backward instead of kept: none, "
        "selective (layer norms, the MLP's activation, and "
        "recurrent mixers between their projections: saves about a third for a few percent more "
        "time), or full (whole layers: least "
        "memory, a third more work).",
    )


class FinetuneConfig(HeadStageConfig):
    """HALO stage 3: next-token cross entropy on long sequences, perhaps beside the teacher."""

    teacher_weight: Fraction = Field(
        default=0.0,
        description="Weight w of `objective` in the loss (1 - w) * cross entropy + w * objective. "
        "0 needs no teacher; otherwise it runs beside the student at the length of this stage.",
    )

    @model_validator(mode="after")
    def _objective_has_a_weight(self) -> Self:
        if self.teacher_weight == 0 and self.objective != ObjectiveConfig():
            raise ValueError(
                f"objective.kind={self.objective.kind} has no effect with teacher_weight=0; "
                "set teacher_weight, or leave the objective out"
            )
        return self


class GateConfig(Section):
    """Bounds that the student must keep after a training stage; where it does not, the run stops
    with exit code 9. They may change at any time."""

    max_loss_ratio: Rate | None = Field(
        default=None,
        description="Largest held-out loss of the student, as a multiple of the teacher's; null "
        "sets no bound.",
    )
    min_recall: Percent | None = Field(
        default=None,
        description="Least recall of the student in %, at recall_multiple; null sets no bound.",
    )
    recall_multiple: PositiveInt = Field(
        default=1, description="Multiple of eval.seq_length at which recall is measured."
    )

    @model_validator(mode="after")
    def _multiple_is_used(self) -> Self:
        if self.min_recall is None and self.recall_multiple != 1:
            raise ValueError("recall_multiple says where min_recall holds; set min_recall too")
        return self

    @property
    def is_set(self) -> bool:
        """Return whether there is a bound."""
        return self.max_loss_ratio is not None or self.min_recall is not None


class GatesConfig(Section):
    """Bounds after each training stage: after the first, of the teacher with all layers
    converted."""

    align: GateConfig = Field(default=GateConfig(), description="After stage 1.")
    distill: GateConfig = Field(default=GateConfig(), description="After stage 2.")
    finetune: GateConfig = Field(default=GateConfig(), description="After stage 3.")

    def after(self, stage: str) -> GateConfig:
        """Return the bounds after training stage `stage`, one of STAGES."""
        found: GateConfig = getattr(self, stage)
        return found

    @property
    def multiples(self) -> list[int]:
        """Return the multiples of eval.seq_length at which recall has a bound."""
        gates = [self.after(stage) for stage in STAGES]
        return [gate.recall_multiple for gate in gates if gate.min_recall is not None]


class EvalConfig(Section):
    """Measurements during training and at the end of the run."""

    quick_sequences: ClassVar[int] = 16
    """Held-out sequences, and recall documents, of an evaluation during training."""

    seq_length: PositiveInt = Field(
        default=512, description="Tokens per sequence at length multiple 1."
    )
    length_multiples: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 4, 8),
        min_length=1,
        description="Multiples of seq_length at which recall and held-out loss are measured.",
    )
    recall_sequences: PositiveInt = Field(default=64, description="Recall documents per length.")
    recall_pairs: PositiveInt = Field(
        default=8, description="Key-value pairs in one recall document."
    )
    heldout_sequences: PositiveInt = Field(default=64, description="Held-out sequences per length.")
    batch_size: PositiveInt = Field(default=8, description="Sequences per forward pass.")
    gate: GatesConfig = Field(
        default=GatesConfig(),
        description="Bounds that the student must keep after a training stage (after stage 1: the "
        "teacher with all layers converted). Where it does not, the run stops with exit code 9. "
        "Bounds may change at any time.",
    )


class CheckpointConfig(Section):
    """How checkpoints are written and how many stay on disk."""

    keep_last: PositiveInt = Field(
        default=2, description="Newest committed checkpoints kept per stage."
    )
    keep_every: PositiveInt | None = Field(
        default=None, description="Also keep every checkpoint whose step is a multiple of this."
    )
    finished: Literal["all", "weights"] = Field(
        default="all",
        description="What stays of a stage's checkpoints once it is finished: all that are kept, "
        "or the weights of the last one alone (a sixth to a seventh of the bytes in bfloat16; the "
        "stage can then not be made longer).",
    )
    async_save: Switch = Field(
        default=False,
        description="Write checkpoints in the background while training goes on; "
        "needs host memory for one copy.",
    )


class ExportConfig(Section):
    """The Hugging Face folder at the end of a run."""

    attn_logits_scaling: LogitsScaling = Field(
        default="hype 500",
        description="Inference-time logit scaling switched on in the exported config; "
        "null leaves it off.",
    )
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        default="auto", description="Type of the exported weights; auto keeps the checkpoint's."
    )

    @field_validator("attn_logits_scaling", mode="before")
    @classmethod
    def _scaling(cls, value: LogitsScaling) -> LogitsScaling:
        return check_logits_scaling(value)


class GuardConfig(Section):
    """When a run is stopped because it cannot succeed, or does not go on."""

    max_teacher_loss: Rate | None = Field(
        default=None,
        description="Largest teacher loss on held-out text before training starts; "
        "null means 0.9 * ln(vocab_size).",
    )
    max_fp8_kl: Rate = Field(
        default=0.02,
        description="Largest KL(teacher || teacher with fp8.teacher) in nats per token on held-out "
        "text before training starts. A student learns the FP8 teacher, so it cannot come nearer "
        "to the true one than this; the bundled teacher, whose students end at 0.27, has 0.009.",
    )
    max_skipped_steps: Count = Field(
        default=3,
        description="Training steps in a row whose loss or gradient may be not finite: "
        "each is left out (weights and optimizer stay, "
        "its samples count as seen); one more ends the run with exit code 7.",
    )
    hang_timeout_seconds: Rate = Field(
        default=1800.0,
        description="A process that makes no progress for this long (twice as long while it "
        "builds, loads, saves or evaluates) records where it hangs and ends the run with exit code "
        "8. Longer than the slowest micro-batch and the compilation in the first one.",
    )


class WandbConfig(Section):
    """Weights & Biases; WANDB_API_KEY or `wandb login` gives the key."""

    project: Name = Field(description="Project that gets the run's stages, in a group of its name.")
    entity: Name | None = Field(
        default=None, description="User or team; null is the default of the account."
    )
    mode: Literal["online", "offline"] = Field(
        default="online",
        description="offline writes to tb/wandb in the run folder, which `wandb sync` sends later.",
    )


class MlflowConfig(Section):
    """MLflow; MLFLOW_TRACKING_TOKEN, or _USERNAME and _PASSWORD, give access to a server."""

    uri: Name = Field(
        description="Address of a server (https://...), or a folder in which MLflow keeps files."
    )
    experiment: Name = Field(default="hypenet", description="Experiment that gets the run.")

    @model_validator(mode="after")
    def _without_password(self) -> Self:
        if "@" in urlsplit(self.uri).netloc:
            raise ValueError(
                "uri holds a user or password, and the configuration is shown in logs: set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
            )
        return self


class TrackersConfig(Section):
    """Where points go besides TensorBoard and metrics.jsonl; needs the extra `trackers`."""

    wandb: WandbConfig | None = Field(default=None, description="Weights & Biases.")
    mlflow: MlflowConfig | None = Field(default=None, description="MLflow.")


class RunConfig(Section):
    """A whole HALO run: teacher in, Hugging Face HypeNet out."""

    output_dir: PathSetting = Field(
        description="Folder of this run: resolved config, logs, TensorBoard files, checkpoints, "
        "export, report."
    )
    teacher: PathSetting = Field(
        description="Teacher: a Hugging Face folder (dense Qwen3, Llama or Qwen2) or a converted "
        "checkpoint."
    )
    data: DataConfig = Field(
        description="Training and held-out data; on the command line data=PATH sets data.train."
    )
    parallel: ParallelConfig = Field(default=ParallelConfig(), description="Parallel layout.")
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        default="auto",
        description="Type of weights and activations while training; auto is bfloat16 on CUDA, "
        "float32 on CPU.",
    )
    model: ModelConfigOfRun = Field(
        default=ModelConfigOfRun(), description="How the model's layers are computed."
    )
    fp8: Fp8Config = Field(default=Fp8Config(), description="Matrix products in FP8.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where to compute; auto takes CUDA when present."
    )
    seed: Seed = Field(default=1234, description="Seed of freshly initialised weights.")
    align: AlignConfig = Field(description="Stage 1, hidden-state alignment.")
    select: SelectConfig = Field(default=SelectConfig(), description="Layer selection.")
    distill: HeadStageConfig = Field(description="Stage 2, end-to-end distillation.")
    finetune: FinetuneConfig = Field(description="Stage 3, long-context finetuning.")
    eval: EvalConfig = Field(default=EvalConfig(), description="Evaluation.")
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(), description="Checkpoints: writing and retention."
    )
    export: ExportConfig = Field(
        default=ExportConfig(), description="Export to Hugging Face format."
    )
    guard: GuardConfig = Field(default=GuardConfig(), description="Guards.")
    trackers: TrackersConfig = Field(
        default=TrackersConfig(), description="Trackers besides TensorBoard."
    )
    on_event: tuple[str, ...] = Field(
        default=(),
        description="Shell commands that run when a stage is done, the run is done, has "
        "stopped or failed, or a job starts again: they get HYPENET_EVENT (stage_done, run_done, "
        "stopped, failed, requeued), HYPENET_RUN, HYPENET_STEP and HYPENET_MESSAGE.",
    )

    @model_validator(mode="after")
    def _fp8_can_be_computed(self) -> Self:
        if self.fp8.student and self.model.transformer_impl != "transformer_engine":
            raise ValueError(
                f"fp8.student={self.fp8.student} is computed by Transformer Engine; set "
                "model.transformer_impl=transformer_engine too, or fp8.student=null"
            )
        asked = [
            setting
            for setting, is_set in (
                ("fp8.teacher=true", self.fp8.teacher),
                (
                    "model.transformer_impl=transformer_engine",
                    self.model.transformer_impl == "transformer_engine",
                ),
            )
            if is_set
        ]
        if asked and self.device == "cpu":
            raise ValueError(f"{' and '.join(asked)} with device=cpu: both need a GPU")
        if asked and self.precision == "float32":
            raise ValueError(f"{' and '.join(asked)} with precision=float32: use bfloat16 or auto")
        return self

    def stage(self, name: str) -> StageConfig:
        """Return the settings of training stage `name`, one of STAGES."""
        if name not in STAGES:
            raise KeyError(f"no stage {name!r}; stages are {', '.join(STAGES)}")
        config: StageConfig = getattr(self, name)
        return config

    def eval_every(self, stage: StageConfig) -> int:
        """Return the steps between evaluations in `stage`, one of this run's stages.

        Unless it is set, a tenth of the stage, and at least so many that they take less than a
        twentieth of its time: an evaluation sends 3 x quick_sequences sequences forward, a third of
        them through two models, and training takes at least three times as long per token.
        """
        if stage.eval_interval is not None:
            return stage.eval_interval
        evaluated = 3 * self.eval.quick_sequences * self.eval.seq_length
        cheap = -(-20 * 4 * evaluated // (3 * 3 * stage.tokens_per_step))
        return max(-(-stage.train_iters // 10), cheap)
