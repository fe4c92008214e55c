"""The tags under which a run reports its quantities to TensorBoard and other trackers: one quantity
a tag, with its unit and meaning, and the charts that show them first.

docs/monitoring.md has the same table, which a test compares with this one.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

TRAIN = "train/"
EVAL = "eval/"
SPEED = "speed/"
ALIGN_LAYERS = "align-layers/"
REPORT = "report/"
TASKS = "tasks/"
BY_LENGTH = "by-length/"

SELECTION_KL = "selection/kl"

TEACHER = "teacher-"
"""Begins the name of an evaluated quantity of the teacher, which is constant over a run."""

LM_LOSS = "lm-loss"
ACCURACY = "accuracy"
RECALL = "recall"


@dataclass(frozen=True, slots=True)
class Tag:
    """A quantity."""

    name: str
    """Its tag; `*` stands for a number."""
    unit: str
    meaning: str


TAGS = (
    Tag("train/align-mse", "square of the activations",
        "stage 1: squared difference between the outputs of RNN mixers and of attention, mean over "
        "layers, tokens, channels and the steps since the last point"),
    Tag("train/kl", "nats per token",
        "stage 2, and stage 3 beside a teacher: forward KL divergence of the student's next-token "
        "distribution from the teacher's, whatever is minimised, mean over the steps since the "
        "last point"),
    Tag("train/reverse-kl", "nats per token",
        "the same with objective.kind reverse_kl: reverse KL divergence, which is minimised"),
    Tag("train/jensen-shannon", "nats per token",
        "the same with jensen_shannon: generalised Jensen-Shannon divergence with the run's beta"),
    Tag("train/top-k-kl", "nats per token",
        "the same with top_k: forward KL divergence over the run's k tokens and all others "
        "together"),
    Tag("train/lm-loss", "nats per token",
        "stage 3: next-token cross entropy on training sequences, mean over the steps since the "
        "last point"),
    Tag("train/mixed-loss", "nats per token",
        "stage 3 beside a teacher: (1 - w) * train/lm-loss + w * the objective, which is "
        "minimised; w is finetune.teacher_weight"),
    Tag("train/learning-rate", "1", "of the last step"),
    Tag("train/grad-norm", "1",
        "global gradient norm before clipping, mean over the steps since the last point"),
    Tag("train/tokens-seen", "tokens", "consumed since the stage began"),
    Tag("train/skipped-steps", "steps",
        "of this stage so far that were left out because their loss or gradient was not finite"),
    Tag("align-layers/*", "square of the activations",
        "stage 1: train/align-mse of one layer, counted from 0"),
    Tag("selection/kl", "nats per token",
        "layer selection by gates: KL divergence of the gated model from the teacher on the "
        "sequences of a step, each a mean over the positions that count"),
    Tag("eval/align-mse", "square of the activations", "train/align-mse on held-out text"),
    Tag("eval/kl", "nats per token", "train/kl on held-out text"),
    Tag("eval/reverse-kl", "nats per token", "train/reverse-kl on held-out text"),
    Tag("eval/jensen-shannon", "nats per token", "train/jensen-shannon on held-out text"),
    Tag("eval/top-k-kl", "nats per token", "train/top-k-kl on held-out text"),
    Tag("eval/mixed-loss", "nats per token", "train/mixed-loss on held-out text"),
    Tag("eval/lm-loss", "nats per token",
        "next-token cross entropy of the student on held-out text, without the logit scaling of "
        "the export"),
    Tag("eval/accuracy", "%",
        "share of the tokens of that text which are the student's first choice"),
    Tag("eval/recall", "%",
        "share of facts in held-out recall documents that the student repeats, at the shortest "
        "length of the report"),
    Tag("eval/teacher-lm-loss", "nats per token",
        "the teacher's on the same text: a constant line to compare with"),
    Tag("eval/teacher-accuracy", "%", "the teacher's on the same text, constant"),
    Tag("eval/teacher-recall", "%", "the teacher's on the same documents, constant"),
    Tag("speed/tokens-per-second", "tokens/s",
        "of all processes, since the last point; evaluations and saves are left out"),
    Tag("speed/tokens-per-second-per-gpu", "tokens/s",
        "the same per process, each of which has one GPU (or is one on a CPU)"),
    Tag("speed/tflops-per-gpu", "1e12 operations/s",
        "useful floating-point operations per process (model/flops.py)"),
    Tag("speed/mfu", "between 0 and 1",
        "those over the GPU's dense bf16 peak; only for GPUs whose peak is known"),
    Tag("speed/utilisation", "between 0 and 1",
        "the time of those at the peak of the precision in which each is computed, over the time "
        "taken; only with FP8, whose peak is twice bf16's"),
    Tag("speed/step-time-ms", "ms", "per step, since the last point"),
    Tag("speed/rank-time-min-ms", "ms",
        "of the time each rank spends in its own forward passes per step: the fastest rank's "
        "(training/stragglers.py)"),
    Tag("speed/rank-time-median-ms", "ms",
        "the median of the ranks; those above 1.3 times their peers' in three intervals are named "
        "in the text speed/slow-ranks"),
    Tag("speed/rank-time-max-ms", "ms", "the slowest rank's"),
    Tag("speed/memory-gib", "GiB",
        "peak GPU memory of the stage, or resident memory on a CPU, of the rank where it is "
        "largest"),
    Tag("speed/evaluation-seconds", "s", "of one evaluation on held-out text"),
    Tag("report/lm-loss", "nats per token",
        "held-out loss of the finished student in the report; a column of the HPARAMS page"),
    Tag("by-length/loss", "nats per token",
        "`hypenet eval`: held-out loss; the axis of steps is the context length in tokens"),
    Tag("tasks/*", "%",
        "`hypenet eval`: right answers, mean over depths; the axis of steps is the context length "
        "in tokens, 0 for questions"),
    Tag("report/recall-*x", "%",
        "recall of the finished student in the report, at a multiple of eval.seq_length; a column "
        "of the HPARAMS page"),
)  # fmt: skip
"""Every scalar of a run."""

TEXTS = {
    "run/config": "the resolved configuration, as in config.yaml",
    "run/layout": "processes, the axes they are spread over, layers per pipeline stage, device",
    "run/versions": "version and commit of this package, versions of its libraries",
    "report/selection": "method, tokens and time of layer selection",
    "speed/slow-ranks": "ranks that slow the others down, with their nodes",
}
"""Tag -> meaning of every text."""

IMAGES = {
    "report/importance": "importance of each layer's attention; the layers that keep it stand out",
    "tasks/figure": "`hypenet eval`: eval.png, right answers by context length and depth",
    "report/figure": "report.png: curves, losses and recall by length",
}
"""Tag -> meaning of every image."""

LAYOUT: dict[str, dict[str, tuple[str, ...]]] = {
    "1. What the student can do": {
        "held-out language loss, student and teacher": (
            "eval/lm-loss",
            "eval/teacher-lm-loss",
        ),
        "held-out recall in %, student and teacher": ("eval/recall", "eval/teacher-recall"),
    },
    "2. What the stages minimise": {
        "stage 1: alignment error": ("train/align-mse", "eval/align-mse"),
        "stage 1: alignment error of every layer": ("align-layers/.*",),
        "stages 2 and 3: forward KL from the teacher": ("train/kl", "eval/kl"),
        "stages 2 and 3: other objectives": (
            "train/reverse-kl",
            "eval/reverse-kl",
            "train/jensen-shannon",
            "eval/jensen-shannon",
            "train/top-k-kl",
            "eval/top-k-kl",
        ),
        "stage 3: language loss": ("train/lm-loss",),
        "stage 3: weighted sum beside a teacher": ("train/mixed-loss", "eval/mixed-loss"),
    },
    "3. Optimiser and speed": {
        "gradient norm": ("train/grad-norm",),
        "learning rate": ("train/learning-rate",),
        "tokens per second": ("speed/tokens-per-second",),
        "memory (GiB)": ("speed/memory-gib",),
    },
}
"""The page CUSTOM SCALARS: category -> chart -> regular expressions of the tags in it."""


def tag_of(name: str) -> Tag | None:
    """Return the quantity that is reported as `name`; None for a name that no tag covers, as a
    stage under development may have."""
    return next((tag for tag in TAGS if fnmatch.fnmatchcase(name, tag.name)), None)


def layer_tag(layer: int) -> str:
    """Return the tag of one layer's alignment error; `layer` counts from 0."""
    return f"{ALIGN_LAYERS}{layer:02d}"
