"""The experiments on SmolLM2-135M: which settings each one changes, and how it is evaluated.

`python tools/evidence/experiments.py` prints the table; run.py runs them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from megatron_hypenet.config.schema import STAGES  # noqa: E402

CONFIG = "configs/run/smollm2_135m.yaml"
STEPS = dict(zip(STAGES, (763, 3357, 229), strict=True))
"""Optimizer steps of the main line by stage: 25, 110 and 15 M tokens."""
TOKENS_PER_STEP = dict(zip(STAGES, (64 * 512, 64 * 512, 8 * 8192), strict=True))


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run with its evaluation, which fits into 25 minutes of one H100."""

    name: str
    question: str
    words: tuple[str, ...] = ()
    """Settings that differ from the configuration, as `hypenet run` takes them."""
    after: str | None = None
    """An experiment whose finished run this one continues from a copy of."""
    loss_lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    needle_lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    needle_count: int = 2
    """Needle documents for each of five depths."""
    with_teacher: bool = False
    """Measure the teacher too: once is enough."""


def scaled(share: float) -> tuple[str, ...]:
    """Return settings that take this share of the main line's steps, in all stages."""
    words = []
    for stage, steps in STEPS.items():
        count = max(4, round(steps * share))
        words += [f"{stage}.train_iters={count}", f"{stage}.warmup_iters={min(50, count // 8)}"]
    return tuple(words)


def tokens(words: Iterable[str] = ()) -> int:
    """Return the training tokens of the main line with these settings."""
    steps = dict(STEPS)
    for word in words:
        stage, dot, rest = word.partition(".train_iters=")
        if dot:
            steps[stage] = int(rest)
    return sum(TOKENS_PER_STEP[stage] * count for stage, count in steps.items())


def _seed(number: int) -> tuple[str, ...]:
    return (f"seed={number}", f"data.seed={number}")


EXPERIMENTS = (
    Experiment(
        name="main",
        question="the whole recipe: loss by length and needles, teacher beside student",
        loss_lengths=(512, 2048, 8192, 32768, 131072, 524288),
        needle_lengths=(512, 2048, 8192, 32768, 65536),
        needle_count=4,
        with_teacher=True,
    ),
    Experiment(name="main_seed2", question="another seed of weights and data", words=_seed(2)),
    Experiment(name="main_seed3", question="a third seed", words=_seed(3)),
    *(
        Experiment(
            name=f"tokens_{millions}m",
            question=f"the main line with {millions} M tokens in all",
            words=scaled(millions / 150),
        )
        for millions in (5, 15, 50)
    ),
    Experiment(
        name="no_logits_scale",
        question="softmax layers without s_t at inference",
        words=("export.attn_logits_scaling=null",),
        after="main",
    ),
    Experiment(
        name="no_alignment",
        question="mixers start from attention's weights, not from stage 1",
        words=(
            "align.train_iters=1",
            "align.warmup_iters=0",
            "align.lr=1e-12",
            "align.min_lr=0",
            "select.method=uniform",
        ),
    ),
    *(
        Experiment(
            name=f"select_{method}",
            question=f"softmax layers chosen by the method {method}",
            words=(f"select.method={method}",),
        )
        for method in ("uniform", "kl", "gates")
    ),
    *(
        Experiment(
            name=mixer,
            question=f"{title} in the place of Lightning Attention",
            words=(f"align.mixer={mixer}",),
        )
        for mixer, title in (
            ("gated_delta_net", "Gated DeltaNet"),
            ("kimi_delta_attention", "Kimi Delta Attention"),
        )
    ),
)
"""no_alignment is compared with select_uniform: mixers that were not aligned cannot be scored."""


def experiment(name: str) -> Experiment:
    """Return the experiment of this name; KeyError with the known names."""
    for one in EXPERIMENTS:
        if one.name == name:
            return one
    raise KeyError(f"{name}: known experiments are {', '.join(e.name for e in EXPERIMENTS)}")


def main() -> None:
    """Print the experiments as a table."""
    print("| experiment | question | M tokens | settings |\n|---|---|---|---|")
    for one in EXPERIMENTS:
        count = 0.0 if one.after else tokens(one.words) / 1e6
        settings = " ".join(f"`{word}`" for word in one.words)
        print(f"| {one.name} | {one.question} | {count:.0f} | {settings} |")


if __name__ == "__main__":
    main()
