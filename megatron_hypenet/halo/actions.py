"""The actions of HALO's tasks. The table in tasks.py has their order and inputs.

Import and export of Hugging Face folders are passed in as functions, because this package works on
checkpoints only.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_hypenet.checkpoint.load import (
    read_manifest,
    read_model_config,
    resolve,
    tokenizer_dir,
)
from megatron_hypenet.checkpoint.manifest import TEACHER_LICENSE
from megatron_hypenet.checkpoint.retention import finish
from megatron_hypenet.config.schema import GATES, STAGES, RunConfig
from megatron_hypenet.errors import CheckpointError, QualityError
from megatron_hypenet.halo import build_stage, datasets, gate, layer_selection, tracking
from megatron_hypenet.halo.report import (
    read_report,
    row_line,
    student_row,
    write_report,
)
from megatron_hypenet.halo.report_data import run_data
from megatron_hypenet.halo.report_page import write_page
from megatron_hypenet.halo.run_folder import RunFolder
from megatron_hypenet.halo.task_runner import Runner, Step
from megatron_hypenet.halo.tasks import from_init, halo_steps, required_checkpoint, starts_from
from megatron_hypenet.model.fp8_layers import fp8_divergence
from megatron_hypenet.model.hypenet import HypeNetModel
from megatron_hypenet.model.memory import release_memory
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.agreement import from_first
from megatron_hypenet.parallel.cpu import device
from megatron_hypenet.stages.base import StageModule
from megatron_hypenet.stages.head import HeadStage
from megatron_hypenet.stages.selection.ranking import load_selection
from megatron_hypenet.stages.spec import stage_spec
from megatron_hypenet.supervision.heartbeat import PROGRESS
from megatron_hypenet.training.loop import train
from megatron_hypenet.training.metrics import StepRecord
from megatron_hypenet.training.tags import EVAL, LM_LOSS, TEACHER

TEACHER_SCORES = "teacher_scores"
"""The entry of the probe's record with what `Measure.quick` found of the teacher."""


@dataclass(frozen=True, kw_only=True)
class Halo:
    """The actions of every task of one run."""

    run: RunConfig
    folder: RunFolder
    import_teacher: Callable[[Path, Path], None]
    """(source, checkpoint folder): make a committed teacher checkpoint of a Hugging Face folder or
    of a checkpoint."""
    export_student: Callable[[Path, Path], None]
    """(checkpoint, Hugging Face folder): write the finished model."""
    note_figures: Callable[[Path, Mapping[str, Any]], None] = lambda folder, report: None
    """(Hugging Face folder, content of report.json): put the results into its model card."""
    on_step: Callable[[StepRecord], None] = lambda record: None
    """Called with every optimizer step of a training stage."""
    on_part: Callable[[str, int, int], None] = lambda step, count, total: None
    """(task, parts done, number of parts): called with the progress of other long tasks."""
    on_pause: Callable[[str, float], None] = lambda kind, seconds: None
    """("evaluate" or "save", seconds): called when training paused for it."""
    log: Callable[[str], None] = lambda text: None
    """Called with the lines of the training loop."""

    def steps(self) -> list[Step]:
        """Return all tasks in order."""
        return halo_steps(self.run, self.folder, self._action)

    def _action(self, step: str) -> Callable[[], dict[str, Any]]:
        if step in STAGES:
            return partial(self.do_stage, step)
        if step in GATES:
            return partial(self.do_gate, GATES[step])
        action: Callable[[], dict[str, Any]] = getattr(self, f"do_{step}")
        return action

    def train_from(self, runner: Runner, name: str, init: Path | None) -> Path:
        """Run training stage `name` and the tasks that it needs, from the run's own results or from
        `init`; returns its final checkpoint."""
        if init is not None:
            start = resolve(init, fall_back=False)
            runner.steps[name] = replace(
                from_init(runner.steps[name], start),
                action=lambda: self.do_training(name, teacher=self.folder.teacher, init=start),
            )
        runner.run_through(name)
        return required_checkpoint(self.run, self.folder, name)

    def _of(self, step: str) -> Path:
        """Return the checkpoint that a finished task left."""
        return required_checkpoint(self.run, self.folder, step)

    def do_teacher(self) -> dict[str, Any]:
        """Import the teacher."""
        self.import_teacher(self.run.teacher, self.folder.teacher)
        config = read_model_config(self.folder.teacher)
        return {
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
        }

    def do_data(self) -> dict[str, Any]:
        """Make token files of the text with the teacher's tokenizer."""
        return datasets.prepare(self.run, self.folder, self.log)

    def do_probe(self) -> dict[str, Any]:
        """Stop a run whose teacher cannot predict text, because random or unloaded weights would be
        distilled, or whose text is too short for a stage."""
        datasets.check_lengths(self.run, self.folder)  # lengths may change after the data was made
        teacher = build_stage.load_teacher(self.run, self.folder.teacher)
        vocab_size = teacher.model_config.vocab_size
        found = datasets.measure(self.run, self.folder).quick(
            teacher, partial(self.on_part, "probe")
        )
        loss = found[LM_LOSS]
        limit = self.run.guard.max_teacher_loss or 0.9 * math.log(vocab_size)
        if not loss < limit:
            raise CheckpointError(
                f"teacher {self.run.teacher} looks untrained, or its weights were not loaded: "
                f"its loss on held-out text is {loss:.3f} nats "
                f"per token, the limit is {limit:.3f} (guessing costs {math.log(vocab_size):.3f}). "
                "Check the teacher's folder and that its "
                "tokenizer belongs to it; guard.max_teacher_loss sets the limit"
            )
        return {
            "teacher_loss": loss,
            "limit": limit,
            TEACHER_SCORES: found,
            **(self._fp8_effect(teacher) if self.run.fp8.teacher else {}),
        }

    def _fp8_effect(self, teacher: HypeNetModel) -> dict[str, float]:
        """Measure what FP8 does to the teacher's predictions on held-out text; QualityError where
        it is more than the run's bound."""
        settings = self.run.eval
        text = datasets.measure(self.run, self.folder).heldout(
            settings.quick_sequences, settings.seq_length
        )
        # whole logits of two batches exist at a time
        kl, same = fp8_divergence(teacher, text[:, :-1].to(device()).split(1))
        self.log(
            f"fp8.teacher: KL {kl:.2e} nats per token from the teacher in "
            f"{str(teacher.config.params_dtype).removeprefix('torch.')}, the same first choice for "
            f"{same:.2%} of {text[:, :-1].numel()} tokens"
        )
        limit = self.run.guard.max_fp8_kl
        if not kl <= limit:
            raise QualityError(
                f"the teacher in FP8 (fp8.teacher=true) predicts other text than itself: its KL on "
                f"held-out text is {kl:.2e} nats per token, the limit is {limit:.2e} "
                f"(guard.max_fp8_kl), and {same:.2%} of its first choices are the same; set "
                "fp8.teacher=false, or the limit higher if the student's own KL will be far above"
            )
        return {"fp8_kl": kl, "fp8_same_choice": same}

    def do_stage(self, name: str) -> dict[str, Any]:
        """Train one stage from the run's own results."""
        spec = stage_spec(name)
        return self.do_training(
            name,
            teacher=self.folder.teacher if spec.needs_teacher(self.run.stage(name)) else None,
            init=self._of(starts_from(self.steps())[name]) if spec.through_head else None,
        )

    def do_training(
        self, name: str, *, teacher: Path | None = None, init: Path | None = None
    ) -> dict[str, Any]:
        """Train one stage to its end."""
        constant = self._teacher_scores() if stage_spec(name).through_head else {}
        stage = build_stage.build_stage(name, self.run, teacher=teacher, init=init)
        self.log(build_stage.parameter_table(stage))
        self.folder.stage(name).mkdir(exist_ok=True)
        final = train(
            stage,
            datasets.training_data(self.run, self.folder),
            self.run.stage(name),
            self.run,
            self.folder.stage(name),
            trackers=partial(tracking.of_stage, self.run, self.folder, name, stage.layout),
            tokenizer_dir=tokenizer_dir(self.folder.teacher),
            extra={
                **self._noted_by_teacher(),
                "pipeline_layout": list(stage.layout),
            },
            on_step=self.on_step,
            on_pause=self.on_pause,
            evaluate=self._evaluation_of(stage, constant),
            log=self.log,
        )
        del stage
        release_memory()
        if self.run.checkpoint.finished == "weights":
            if groups.rank() == 0:
                finish(final.parent)
            groups.barrier()
        return {"checkpoint": str(final.relative_to(self.folder.root))}

    def _noted_by_teacher(self) -> dict[str, Any]:
        """Return the entries of the teacher's manifest that an export of the student needs."""
        manifest = read_manifest(resolve(self.folder.teacher))
        stated = manifest.extra.get(TEACHER_LICENSE)
        return {
            "hf_config": manifest.hf_config,
            **({} if stated is None else {TEACHER_LICENSE: stated}),
        }

    def _evaluation_of(
        self, stage: StageModule, teacher: Mapping[str, float]
    ) -> Callable[[int], dict[str, float]]:
        """Return the function whose values the training loop reports at every evaluation: the
        stage's loss on held-out text, and what the student can do beside the `teacher`."""
        measure = datasets.measure(self.run, self.folder)
        seq_length = self.run.stage(stage.name).seq_length
        names = stage_spec(stage.name).quantities(self.run.stage(stage.name))

        def evaluate(_step: int) -> dict[str, float]:
            student = measure.quick(stage) if isinstance(stage, HeadStage) else {}
            values = {EVAL + name: value for name, value in student.items()}
            if names[0] not in student:
                found = measure.stage_values(stage, seq_length, names)
                values |= {EVAL + name: found[name] for name in names if name not in student}
            return values | {EVAL + TEACHER + name: value for name, value in teacher.items()}

        return evaluate

    def _teacher_scores(self) -> Mapping[str, float]:
        """Return what the probe found of the teacher; measured now where it did not run, or ran
        under an older version."""
        found: Mapping[str, float] | None = from_first(
            self.folder.records().get("probe", {}).get(TEACHER_SCORES)
        )
        if found is None:
            PROGRESS.note("evaluate")
            teacher = build_stage.load_teacher(self.run, self.folder.teacher)
            found = datasets.measure(self.run, self.folder).quick(teacher)
            del teacher
            release_memory()
        return found

    def do_gate(self, stage: str) -> dict[str, Any]:
        """Measure the student after a training stage and stop a run that fell below the bounds of
        `eval.gate`. QualityError."""
        bounds = self.run.eval.gate.after(stage)
        PROGRESS.note("evaluate")
        return gate.check(
            stage,
            bounds,
            datasets.measure(self.run, self.folder),
            teacher=lambda: build_stage.load_teacher(self.run, self.folder.teacher),
            student=(
                partial(self._student, stage)
                if stage_spec(stage).through_head
                else self._all_converted
            ),
            kept=self._of(stage),
        )

    def do_select(self) -> dict[str, Any]:
        """Measure every layer by the run's method, then rank; an interrupted task continues."""
        layer_selection.measure(
            self.run,
            self.folder,
            self._of("align"),
            progress=lambda done, total: self.on_part("select", done, total),
        )
        release_memory()
        groups.barrier()
        scores, selection = layer_selection.chosen(self.run, self.folder)
        self.log(layer_selection.cost_line(scores))
        if groups.rank() == 0:
            layer_selection.write_choice(self.run, self.folder, scores, selection)
        return {
            "attention_layers": list(selection.attention_layers),
            "method": scores.method,
            "tokens": scores.tokens,
            "scoring_seconds": scores.seconds,
        }

    def do_assemble(self) -> dict[str, Any]:
        """Write the student that stage 2 starts from."""
        num_layers = read_model_config(self.folder.teacher).num_layers
        selection = load_selection(self.folder.mixers_file, num_layers=num_layers)
        build_stage.assemble(
            self.run,
            self.folder.teacher,
            self._of("align"),
            selection.mixer_types,
            self.folder.assembled,
        )
        return {"attention_layers": list(selection.attention_layers)}

    def do_export(self) -> dict[str, Any]:
        """Write the Hugging Face folder."""
        self.export_student(self._of("finetune"), self.folder.export)
        return {"attn_logits_scaling": self.run.export.attn_logits_scaling}

    def do_report(self) -> dict[str, Any]:
        """Evaluate teacher and students, write the results and draw them."""
        start = time.monotonic()
        rows = []
        measure = datasets.measure(self.run, self.folder)
        models = self._reported_models()
        total = measure.num_parts() * len(models)
        done = iter(range(1, total + 1))

        def part_done(count: int) -> None:
            PROGRESS.note("evaluate")
            self.on_part("report", count, total)

        for name, make in models.items():
            model = make()
            rows.append(measure.row(name, model, lambda: part_done(next(done))))
            self.log(row_line(rows[-1]))
            del model
            release_memory()
        if groups.rank() == 0:
            write_report(self.run, self.folder, rows, report_seconds=time.monotonic() - start)
            label = self.folder.root.absolute().name
            write_page(
                [run_data(self.folder, self.run, label)],
                self.folder.report_page,
                self.folder.report_plot,
            )
            tracking.show_report(self.run, self.folder)
            if self.folder.export.is_dir():
                self.note_figures(self.folder.export, read_report(self.folder))
        return {}

    def _reported_models(self) -> dict[str, Callable[[], HypeNetModel]]:
        """Return the models of the report in order, each built when it is called."""
        return {
            "teacher": lambda: build_stage.load_teacher(self.run, self.folder.teacher),
            "all layers converted": self._all_converted,
            **{
                student_row(stage): partial(self._student, stage)
                for stage in STAGES
                if stage_spec(stage).through_head
            },
        }

    def _student(self, stage: str) -> HypeNetModel:
        """Return a student as it will be exported: with logit scaling."""
        student = build_stage.load_hypenet(self.run, self._of(stage))
        student.set_attn_logits_scaling(self.run.export.attn_logits_scaling)
        return student

    def _all_converted(self) -> HypeNetModel:
        """Return the teacher with every layer's attention replaced by its aligned RNN mixer:
        alignment without selection or distillation."""
        teacher = build_stage.load_teacher(self.run, self.folder.teacher)
        for layer, mixer in build_stage.load_aligned(teacher, self._of("align")).items():
            teacher.set_mixer(layer, mixer)
        return teacher
