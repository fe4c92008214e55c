"""Each rule alone; what messages look like and which ways out are offered stands in
test_checks.py."""

import pytest

from megatron_hypenet.config.layout import Layout
from megatron_hypenet.config.layout_rules import RULES
from megatron_hypenet.config.schema import AlignConfig
from tests import toy_mixer
from tests.unit.config.test_checks import MODEL, STAGE, axes, run


@pytest.mark.parametrize(
    ("rule", "parallel", "world"),
    [
        ("tensor-slices", axes(tp=3), None),
        ("sequence-parallel", axes(sequence_parallel=True), None),
        ("pipeline-layers", axes(pp=5), None),
        ("pipeline-layout", axes(pp=2, pipeline_layout=[4, 0]), None),
        ("pipeline-layers", axes(pp=2, virtual_pipeline_model_parallel_size=3), None),
        (
            "pipeline-layout",
            axes(pp=2, virtual_pipeline_model_parallel_size=2, pipeline_layout=[2, 2]),
            None,
        ),
        ("interleaved-stages", axes(virtual_pipeline_model_parallel_size=2), None),
        ("pipeline-zero", axes(pp=2, zero_stage=3), None),
        ("pipeline-offload", axes(pp=2, offload_optimizer=True), None),
        ("whole-replicas", axes(tp=2, pp=2), 6),
        ("sequence-split", axes(cp=3), None),
        ("global-batch", axes(), 3),
    ],
)
def test_each_rule_is_reported_alone(rule, parallel, world):
    layout = Layout(MODEL, run(parallel), world)
    assert [name for name, ask in RULES.items() if list(ask(layout))] == [rule]


def test_a_short_convolution_reads_from_the_chunk_before_only():
    settings = run(axes(cp=2))
    align = AlignConfig.model_validate(
        {**STAGE, "mixer": toy_mixer.NAME, "mixer_settings": {"conv_size": 30}}
    )
    layout = Layout(MODEL, settings.model_copy(update={"align": align}))
    found = [finding for finding in RULES["chunk-halo"](layout) if finding.where == "align"]
    assert (
        "align.seq_length=64 gives chunks of 16 tokens" in found[0].says
        and {"align.seq_length": 116} in found[0].proposals
    )
    assert list(RULES["chunk-halo"](Layout(MODEL, settings))) == []


def test_chunks_need_whole_rounds_of_micro_batches():
    chunked = axes(pp=2, virtual_pipeline_model_parallel_size=2)
    three = {**STAGE, "global_batch_size": 6}
    layout = Layout(MODEL, run(chunked, distill=three))
    assert [name for name, ask in RULES.items() if list(ask(layout))] == [
        "interleaved-micro-batches"
    ]
    (finding,) = RULES["interleaved-micro-batches"](layout)
    assert finding.where == "distill" and "distill has 3 micro-batches per step" in finding.says
    assert finding.proposals == (
        {"distill.micro_batch_size": 1},
        {"distill.global_batch_size": 4},
        {"distill.global_batch_size": 8},
        {"parallel.virtual_pipeline_model_parallel_size": 1},
    )
    assert list(RULES["interleaved-micro-batches"](Layout(MODEL, run(chunked)))) == []


def test_every_rule_is_explained_to_users(repo_root):
    page = (repo_root / "docs" / "errors.md").read_text(encoding="utf-8")
    assert [name for name in RULES if f"| `{name}` |" not in page] == []
    assert all(rule.__doc__ for rule in RULES.values())


def test_rules_about_stages_name_each_stage_that_breaks_them():
    layout = Layout(
        MODEL,
        run(axes(cp=2), distill={**STAGE, "seq_length": 62}, finetune={**STAGE, "seq_length": 2}),
        None,
    )
    assert [finding.where for finding in RULES["sequence-split"](layout)] == ["distill", "finetune"]


@pytest.mark.parametrize(
    ("size", "broken"), [("num_query_groups", 3), ("vocab_size", 513), ("ffn_hidden_size", 129)]
)
def test_every_size_that_is_sliced_is_looked_at(size, broken):
    heads = {"num_attention_heads": 6} if size == "num_query_groups" else {}
    (finding,) = RULES["tensor-slices"](
        Layout(MODEL.replace(**{size: broken}, **heads), run(axes(tp=2)))
    )
    assert finding.says.endswith(f"does not divide the model's {size}={broken}")


ENGINE = {"transformer_impl": "transformer_engine"}


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("transformer-engine-zero", {"parallel": {"zero_stage": 3}, "model": ENGINE}),
        ("fp8-sizes", {"model": ENGINE, "fp8": {"student": "blockwise"}}),
        (
            "fp8-tokens",
            {
                "model": ENGINE,
                "fp8": {"student": "current"},
                "distill": {**STAGE, "micro_batch_size": 1, "seq_length": 24},
            },
        ),
        (
            "fp8-recompute",
            {
                "model": ENGINE,
                "fp8": {"student": "delayed"},
                "finetune": {**STAGE, "recompute": "selective"},
            },
        ),
    ],
)
def test_what_does_not_combine_with_fp8_is_named_with_a_way_out(rule, changes):
    layout = Layout(MODEL, run(**changes))
    found = list(RULES[rule](layout))
    assert [name for name, ask in RULES.items() if list(ask(layout))] == [rule]
    lifted = [
        change for change in found[0].proposals if not list(RULES[rule](layout.changed(change)))
    ]
    assert len(lifted) >= 2


def test_rules_about_fp8_leave_other_runs_and_stage_1_alone():
    odd = {**STAGE, "micro_batch_size": 1, "seq_length": 24}
    assert list(RULES["fp8-tokens"](Layout(MODEL, run(distill=odd)))) == []
    aligned = run(model=ENGINE, fp8={"student": "current"}, align=odd)
    assert list(RULES["fp8-tokens"](Layout(MODEL, aligned))) == []
    narrow = MODEL.replace(hidden_size=72)
    assert list(RULES["fp8-sizes"](Layout(narrow, run()))) == []
    (found,) = RULES["fp8-sizes"](Layout(narrow, run(fp8={"teacher": True})))
    assert found.says.startswith("fp8.teacher=True needs") and "hidden_size 72" in found.says
