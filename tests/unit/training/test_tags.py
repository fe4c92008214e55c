"""One quantity a tag; every tag that a chart or a stage names is in the table."""

import fnmatch
import re

from megatron_hypenet.config.schema import AlignConfig, FinetuneConfig, HeadStageConfig
from megatron_hypenet.stages.spec import stage_spec
from megatron_hypenet.training.tags import IMAGES, LAYOUT, TAGS, TEACHER, TEXTS, tag_of

STAGE = {
    "train_iters": 1,
    "seq_length": 8,
    "micro_batch_size": 1,
    "global_batch_size": 1,
    "lr": 1.0,
    "min_lr": 1.0,
}
CONFIGS = [
    ("align", AlignConfig(**STAGE)),
    ("distill", HeadStageConfig(**STAGE)),
    ("distill", HeadStageConfig(**STAGE, objective={"kind": "reverse_kl"})),
    ("distill", HeadStageConfig(**STAGE, objective={"kind": "jensen_shannon"})),
    ("distill", HeadStageConfig(**STAGE, objective={"kind": "top_k", "k": 4})),
    ("finetune", FinetuneConfig(**STAGE)),
    ("finetune", FinetuneConfig(**STAGE, teacher_weight=0.5, objective={"kind": "reverse_kl"})),
]
"""Stages with the settings that decide what they minimise, each another quantity."""


def test_a_tag_stands_for_one_quantity():
    names = [tag.name for tag in TAGS]
    assert len(set(names)) == len(names)
    for name in names:
        assert [other for other in names if fnmatch.fnmatchcase(name, other)] == [name]
    assert {name.split("/")[0] for name in names} == {
        *("train", "eval", "speed", "align-layers", "tasks", "by-length", "report", "selection")
    }
    assert all(tag.unit and tag.meaning for tag in TAGS)


def test_every_stage_reports_its_loss_in_training_and_on_held_out_text():
    minimised = set()
    for config in CONFIGS:
        spec = stage_spec(config[0])
        found = spec.quantities(config[1])
        assert len(set(found)) == len(found) and found[0] == spec.loss(config[1])
        minimised.add(found[0])
        for name in found:
            assert tag_of(f"train/{name}") and tag_of(f"eval/{name}")
            assert tag_of(f"train/{name}").unit == tag_of(f"eval/{name}").unit
    assert len(minimised) == len(CONFIGS)


def test_what_is_known_of_the_teacher_is_known_of_the_student():
    for tag in TAGS:
        if TEACHER in tag.name:
            assert tag_of(tag.name.replace(TEACHER, "")).unit == tag.unit


def test_charts_show_tags_of_the_table_and_all_layers_in_one():
    patterns = [one for charts in LAYOUT.values() for tags in charts.values() for one in tags]
    shown = [tag.name.replace("*", "07") for tag in TAGS]
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in shown), pattern
    assert list(LAYOUT)[0].startswith("1.") and sorted(LAYOUT) == list(LAYOUT)
    (layers,) = [one for one in patterns if one.startswith("align-layers")]
    assert all(re.fullmatch(layers, f"align-layers/{layer:02d}") for layer in (0, 7, 35, 101))


def test_unknown_names_are_not_guessed():
    assert tag_of("loss") is None and tag_of("train/kl/x") is None
    assert tag_of("align-layers/07").name == "align-layers/*"
    assert tag_of("report/recall-8x").unit == "%"


def test_the_documentation_has_the_same_tables(repo_root):
    page = (repo_root / "docs" / "monitoring.md").read_text(encoding="utf-8")
    rows = {line for line in page.splitlines() if line.startswith("|")}
    wanted = [f"| `{tag.name}` | {tag.unit} | {tag.meaning} |" for tag in TAGS]
    wanted += [f"| `{name}` | {meaning} |" for name, meaning in {**TEXTS, **IMAGES}.items()]
    for category, charts in LAYOUT.items():
        for number, (title, tags) in enumerate(charts.items()):
            shown = ", ".join(f"`{tag}`" for tag in tags)
            wanted.append(f"| {category if number == 0 else ''} | {title} | {shown} |")
    assert [row for row in wanted if row not in rows] == []
    assert len(rows) == len(wanted) + 3 + 2, "three headings, two kinds of lines below"
