"""HALO in Python, on the bundled teacher: align RNN mixers, keep one attention layer, distil.

    python examples/distil_toy.py                    # under a minute on two CPU cores
    python examples/distil_toy.py --steps 300 --out runs/distil_toy --mixer gated_delta_net

This is what `hypenet run` does, without run folder, restarts and layer selection: it keeps softmax
attention in the last layer instead of ranking them. The settings are those of `hypenet demo`."""

import argparse
import tempfile
from pathlib import Path

from megatron_hypenet.checkpoint.load import read_model_config, tokenizer_dir
from megatron_hypenet.config.loader import load_run_config
from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.config.mixers.softmax_attn import ATTENTION
from megatron_hypenet.config.schema import RunConfig
from megatron_hypenet.data.blend import TrainData
from megatron_hypenet.data.corpus import open_corpus, prepare_corpus
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.halo.build_stage import assemble, build_stage
from megatron_hypenet.parallel.groups import destroy_parallel
from megatron_hypenet.training.loop import train
from megatron_hypenet.training.metrics import StepRecord

REPOSITORY = Path(__file__).resolve().parents[1]


def settings(out: Path, steps: int, mixer: str) -> RunConfig:
    """Return the demo's configuration with `steps` optimizer steps in each of stages 1 and 2, and
    the RNN mixer `mixer`."""
    changes = [f"output_dir={out}", f"align.mixer={mixer}"]
    for stage in ("align", "distill"):
        changes += [f"{stage}.train_iters={steps}", f"{stage}.save_interval={steps}"]
        changes += [f"{stage}.warmup_iters={min(5, steps)}"]
    return load_run_config(REPOSITORY / "configs" / "run" / "demo.yaml", changes)


def text_of(run: RunConfig, teacher: Path, folder: Path) -> TrainData:
    """Tokenize the run's text with the teacher's tokenizer and open it as training sequences."""
    shape = read_model_config(teacher)
    prepare_corpus(
        run.data.train,
        run.data.heldout,
        tokenizer_dir(teacher),
        folder,
        vocab_size=shape.vocab_size,
        model_end=shape.eos_token_id,
    )
    corpus = open_corpus(folder, heldout_fraction=run.data.heldout_fraction, seed=run.data.seed)
    return corpus.training_data(
        recall_fraction=run.data.recall_fraction, recall_pairs=run.data.recall_pairs
    )


def distil(out: Path, steps: int, mixer: str) -> dict[str, list[float]]:
    """Train a student in `out`; the loss of every optimizer step by stage."""
    run = settings(out, steps, mixer)
    losses: dict[str, list[float]] = {"align": [], "distill": []}
    teacher = out / "teacher"
    import_hf(run.teacher, teacher)
    data = text_of(run, teacher, out / "data")

    def train_stage(name: str, init: Path | None) -> Path:
        """Train a stage from checkpoints to a checkpoint."""

        def note(record: StepRecord) -> None:
            losses[name].append(record.loss)

        stage = build_stage(name, run, teacher=teacher, init=init)
        return train(stage, data, run.stage(name), run, out / name, on_step=note)

    # stage 1: an RNN mixer beside the attention of every layer, trained to give the same output
    aligned = train_stage("align", None)
    # the student: RNN mixers everywhere but in the last layer
    mixers = [run.align.mixer] * read_model_config(teacher).num_layers
    mixers[-1] = ATTENTION
    assemble(run, teacher, aligned, tuple(mixers), out / "assembled")
    # stage 2: the whole student learns the teacher's distribution over the next token
    train_stage("distill", out / "assembled")
    destroy_parallel()
    return losses


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    """Distil and print the losses at the beginning and the end of each stage."""
    parser = argparse.ArgumentParser(description="Distil a toy student from the bundled teacher.")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each stage")
    parser.add_argument("--out", type=Path, help="default: a temporary folder")
    parser.add_argument("--mixer", default=default_mixer().name, help="RNN mixer by its name")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        losses = distil(options.out or Path(scratch), options.steps, options.mixer)
    for stage, values in losses.items():
        print(f"{stage:<8} loss {values[0]:.4f} at step 1, {values[-1]:.4f} at step {len(values)}")
    return losses


if __name__ == "__main__":
    main()
