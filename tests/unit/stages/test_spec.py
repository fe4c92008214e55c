"""The registry of stages, and what planning asks a stage, over all of them."""

import pytest

from megatron_hypenet.config.computation import Fp8Config
from megatron_hypenet.config.loader import load_model_config
from megatron_hypenet.config.mixers import default_mixer
from megatron_hypenet.config.schema import STAGES, HeadStageConfig, RunConfig
from megatron_hypenet.model.flops import (
    forward_flops,
    head_flops,
    mixer_flops,
    mlp_flops,
    training_flops,
)
from megatron_hypenet.stages.spec import StageSpec, register_stage, stage_spec
from tests.unit.stages.conftest import STUDENT, TEACHER, build

T = 128


class Source:
    """Random models in float64, and a note of what was asked for."""

    mixer = default_mixer()
    seed = 3
    fp8 = Fp8Config()

    def __init__(self):
        self.asked = []

    def teacher(self, *, trunk_only=False):
        self.asked.append(("teacher", trunk_only))
        return build(TEACHER, trunk_only=trunk_only)

    def student(self, *, recompute):
        self.asked.append(("student", recompute))
        return build(STUDENT, seed=1, recompute=recompute)


SETTINGS = {
    "train_iters": 1,
    "micro_batch_size": 2,
    "global_batch_size": 2,
    "lr": 1e-3,
    "min_lr": 1e-3,
}


CONFIGS = {name: RunConfig.model_fields[name].annotation for name in STAGES}


def configured(name, seq_length, **settings):
    """Return settings of a stage."""
    return CONFIGS[name](**SETTINGS, seq_length=seq_length, **settings)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_is_registered_and_its_settings_say_what_trains(name):
    spec = stage_spec(name)
    assert isinstance(spec, StageSpec) and spec.name == name
    assert issubclass(CONFIGS[name], HeadStageConfig) == spec.through_head


def test_an_unknown_or_repeated_stage_is_refused():
    with pytest.raises(KeyError, match="no stage 'warmup'; stages are align, distill, finetune"):
        stage_spec("warmup")
    with pytest.raises(AssertionError, match="twice"):
        register_stage(type(stage_spec("align")))


@pytest.mark.parametrize(
    ("name", "settings", "asked"),
    [
        ("align", {}, [("teacher", True)]),
        ("distill", {"recompute": "full"}, [("student", "full"), ("teacher", False)]),
        ("finetune", {"recompute": "full"}, [("student", "full")]),
        ("finetune", {"teacher_weight": 0.5}, [("student", "none"), ("teacher", False)]),
    ],
)
def test_a_stage_is_built_from_the_models_it_needs(name, settings, asked, batch):
    spec = stage_spec(name)
    source = Source()
    config = configured(name, 11, **settings)
    stage = spec.build(source, config)
    assert source.asked == asked and stage.name == name
    assert spec.needs_teacher(config) == any(kind == "teacher" for kind, _ in asked)
    shape = spec.student_shape(TEACHER, STUDENT, default_mixer())
    assert stage.model_config == shape
    assert stage.flops_per_token(config) == spec.flops(config, TEACHER, shape)
    loss, metrics = stage(batch)
    loss.backward()
    names = {f"train/{quantity}" for quantity in spec.quantities(config)}
    assert names - {tag for tag in metrics if tag.startswith("train/")} <= {"train/align-mse"}


def test_work_of_the_stages():
    every = TEACHER.converted(default_mixer())

    def flops(name, student, **settings):
        return stage_spec(name).flops(configured(name, T, **settings), TEACHER, student)

    finetune = flops("finetune", STUDENT)
    assert finetune == training_flops(STUDENT, T)
    beside = finetune + forward_flops(TEACHER, T)
    assert flops("distill", STUDENT) == beside
    # cross entropy and divergence go through the student's head by themselves
    mixed = flops("finetune", STUDENT, teacher_weight=0.5)
    assert mixed == pytest.approx(beside + 3 * head_flops(STUDENT))
    assert flops("align", every) < sum(mixer_flops(TEACHER, T)) + 2 * mlp_flops(TEACHER) + 3 * sum(
        mixer_flops(every, T)
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [("2b", (5.5, 15.2, 13.1)), ("5b", (15.9, 37.5, 32.8)), ("9b", (27.4, 68.7, 57.0))],
)
def test_published_sizes(repo_root, size, expected):
    """The numbers are GFLOP per token of the three stages at 512, 512 and 16,384 tokens, worked out
    by hand from the layer formulas."""
    student = load_model_config(repo_root / f"configs/model/hypenet_{size}.yaml")
    teacher = student.replace(
        mixer_types=("attn",) * student.num_layers, attn_use_rope=True, attn_use_output_gate=False
    )
    got = []
    for name, length in zip(STAGES, (512, 512, 16384), strict=True):
        spec = stage_spec(name)
        shape = spec.student_shape(teacher, student, default_mixer())
        got.append(spec.flops(configured(name, length), teacher, shape) / 1e9)
    assert got == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("name", "fp8", "models"),
    [
        ("align", Fp8Config(teacher=True, student="current"), "teacher"),
        ("distill", Fp8Config(teacher=True), "teacher"),
        ("distill", Fp8Config(student="current"), "student"),
        ("finetune", Fp8Config(teacher=True, student="current"), "student"),
        ("finetune", Fp8Config(teacher=True), ""),
    ],
)
def test_fp8_computes_the_linear_layers_of_the_models_that_are_in_it(name, fp8, models):
    spec = stage_spec(name)
    teacher, student = TEACHER, STUDENT
    of_teacher, of_student = (
        3 * shape.num_layers * shape.hidden_size * shape.ffn_hidden_size
        + sum(
            parameter.numel
            for kind in shape.mixer_types
            for parameter in shape.spec(kind).parameters(shape)
            if "linear" in parameter.name
        )
        for shape in (teacher, student)
    )
    last_mlp = 3 * teacher.hidden_size * teacher.ffn_hidden_size if name == "align" else 0
    wanted = {
        "": 0,
        "teacher": 2 * (of_teacher - last_mlp),
        "student": 6 * of_student,
    }[models]
    config = configured(name, T)
    assert spec.fp8_flops(config, teacher, student, fp8) == wanted
    assert spec.fp8_flops(config, teacher, student, Fp8Config()) == 0
