import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_hypenet.config.checks import (
    check_layout,
    check_model_fits_selection,
    check_model_layout,
    check_run,
    layout_problems,
    layout_warnings,
)
from megatron_hypenet.config.layout import Layout
from megatron_hypenet.config.layout_rules import RULES
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig, RunConfig
from megatron_hypenet.errors import ConfigError, LayoutError

STAGE = {
    "train_iters": 10,
    "seq_length": 64,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "lr": 1e-3,
    "min_lr": 1e-5,
}
MODEL = ModelConfig(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=16,
    num_query_groups=8,
    kv_channels=16,
    vocab_size=512,
    share_embeddings_and_output_weights=True,
    mixer_types=("attn",) * 4,
    attn_use_rope=True,
    attn_use_output_gate=False,
)


def run(parallel=None, **changes):
    values = {
        "output_dir": "x",
        "teacher": "t",
        "data": {"train": ["a"]},
        "align": STAGE,
        "distill": STAGE,
        "finetune": STAGE,
    }
    return RunConfig.model_validate({**values, "parallel": parallel or {}, **changes})


def axes(tp=1, pp=1, cp=1, **more):
    return {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        **more,
    }


@pytest.mark.parametrize(
    ("parallel", "world"),
    [
        (axes(), 1),
        (axes(), 4),
        (axes(tp=8), 8),
        (axes(tp=8), None),
        (axes(tp=2, pp=2, cp=2), 16),
        (axes(pp=4, zero_stage=1), 4),
        (axes(pp=2, zero_stage=0, pipeline_layout=[1, 3]), 2),
        (axes(tp=2, sequence_parallel=True), 2),
        (axes(zero_stage=3, offload_optimizer=True), 2),
        (axes(cp=2, context_parallel_method="ring"), 2),
    ],
)
def test_valid_layouts_pass(parallel, world):
    check_layout(MODEL, run(parallel), world)


@pytest.mark.parametrize(
    ("parallel", "world", "says"),
    [
        (
            axes(tp=3),
            None,
            r"tensor-slices: parallel.tensor_model_parallel_size=3 does not divide the model's "
            r"num_attention_heads=16, num_query_groups=8, "
            r"vocab_size=512, ffn_hidden_size=128; use parallel.tensor_model_parallel_size=2 or 4$",
        ),
        (
            axes(tp=16),
            None,
            r"does not divide the model's num_query_groups=8; "
            r"use parallel.tensor_model_parallel_size=8 or 4$",
        ),
        (axes(tp=16), 16, r"use parallel.tensor_model_parallel_size=8 or 4$"),
        (
            axes(sequence_parallel=True),
            None,
            r"sequence-parallel: .* use parallel.sequence_parallel=false, "
            r"or parallel.tensor_model_parallel_size=2$",
        ),
        (
            axes(pp=8),
            None,
            r"pipeline-layers: .*=8 exceeds the model's num_layers=4; "
            r"use parallel.pipeline_model_parallel_size=4 or 3$",
        ),
        (
            axes(pp=2, pipeline_layout=[2, 1, 1]),
            None,
            r"has 3 entries for .*=2; use parallel.pipeline_layout=\[2, 2\] or null$",
        ),
        (
            axes(pp=2, pipeline_layout=[2, 1]),
            None,
            r"places 3 layers of the model's num_layers=4; use .*=\[2, 2\] or null$",
        ),
        (
            axes(pp=3, pipeline_layout=[2, 0, 2]),
            None,
            r"pipeline-layout: .* leaves stage 1 without layers; use .*=\[2, 1, 1\] or null$",
        ),
        (
            axes(pp=2, virtual_pipeline_model_parallel_size=3),
            None,
            r"pipeline-layers: .*=2 \* .*=3 chunks exceed the model's num_layers=4; "
            r"use parallel.virtual_pipeline_model_parallel_size=2 or 1$",
        ),
        (
            axes(pp=2, virtual_pipeline_model_parallel_size=2, pipeline_layout=[2, 0, 2]),
            None,
            r"has 3 entries for .*=2 \* .*virtual.*=2 and leaves chunk 1 without layers; "
            r"use parallel.pipeline_layout=\[1, 1, 1, 1\] or null$",
        ),
        (
            axes(virtual_pipeline_model_parallel_size=2),
            None,
            r"interleaved-stages: .*=2 with .*=1: there are no .*; use "
            r"parallel.virtual_pipeline_model_parallel_size=1, "
            r"or parallel.pipeline_model_parallel_size=2$",
        ),
        (
            axes(pipeline_layout=[2, 2]),
            None,
            r"use parallel.pipeline_layout=null, or parallel.pipeline_model_parallel_size=2$",
        ),
        (
            axes(pp=2, zero_stage=2),
            2,
            r"pipeline-zero: .*zero_stage=2 with .*=2: .*; use parallel.zero_stage=1, "
            r"or parallel.pipeline_model_parallel_size=1$",
        ),
        (
            axes(pp=2, offload_optimizer=True),
            2,
            r"pipeline-offload: .*; use parallel.offload_optimizer=false, or .*pipeline.*=1$",
        ),
        (
            axes(tp=2),
            3,
            r"whole-replicas: 3 processes cannot be divided into replicas of 2 .*; "
            r"start 2 or 4 processes$",
        ),
        (axes(tp=4), 2, r"use 4 processes, or parallel.tensor_model_parallel_size=2$"),
        (
            axes(cp=3),
            3,
            r"sequence-split: align.seq_length=64 is not a multiple of 6: .*; "
            r"use align.seq_length=60 or 66",
        ),
        (
            axes(),
            8,
            r"global-batch: align.global_batch_size=8 is not .*= 16; use align.micro_batch_size=1, "
            r"or align.global_batch_size=16",
        ),
        (
            axes(),
            3,
            r"align.global_batch_size=8 is not .* 3 data-parallel processes = 6; "
            r"use align.global_batch_size=6 or 12",
        ),
    ],
)
def test_broken_rule_is_named_with_values_and_two_ways_out(parallel, world, says):
    with pytest.raises(LayoutError) as caught:
        check_layout(MODEL, run(parallel), world)
    assert any(re.search(says, line) for line in str(caught.value).splitlines()), str(caught.value)


def test_sequence_parallel_splits_what_context_parallel_left():
    stage = {**STAGE, "seq_length": 6}
    with pytest.raises(
        LayoutError,
        match=r"seq_length=6 is not a multiple of 4: .*sequence_parallel.*; use align.seq_length=4 "
        r"or 8",
    ):
        check_layout(MODEL, run(axes(tp=4, sequence_parallel=True), align=stage), 4)
    # tp=2, cp=3: chunks need 6, splitting needs 6
    check_layout(
        MODEL,
        run(axes(tp=2, cp=3, sequence_parallel=True), align=stage, distill=stage, finetune=stage),
        6,
    )


def test_a_vocabulary_that_nothing_divides_leaves_other_axes():
    model = MODEL.replace(vocab_size=509)
    with pytest.raises(LayoutError) as caught:
        check_layout(model, run(axes(tp=4, sequence_parallel=True)), None)
    off = "parallel.tensor_model_parallel_size=1 with parallel.sequence_parallel=false"
    assert str(caught.value).endswith(
        f"vocab_size=509; use {off}, or {off} with parallel.context_parallel_size=4"
    )


def test_all_problems_at_once():
    with pytest.raises(LayoutError) as caught:
        check_layout(MODEL, run(axes(tp=3, pp=8, zero_stage=3)), 24)
    text = str(caught.value)
    assert (
        text.startswith("3 problems")
        and "does not divide" in text
        and "exceeds" in text
        and "zero_stage" in text
    )


def test_only_the_stages_that_run_are_checked():
    odd = run(finetune={**STAGE, "global_batch_size": 6})
    check_layout(MODEL, odd, 4, stages=("align",))
    with pytest.raises(LayoutError, match="finetune.global_batch_size"):
        check_layout(MODEL, odd, 4)


def test_without_a_model_the_other_rules_hold():
    with pytest.raises(LayoutError) as caught:
        check_layout(None, run(axes(tp=3, pp=8, zero_stage=3, pipeline_layout=[1, 0, 2, 1])), None)
    text = str(caught.value)
    assert text.startswith("2 problems") and "pipeline-zero" in text
    assert "use parallel.pipeline_layout=[1, 1, 1, 1, 1, 1, 1, 1] or null" in text


def test_evaluation_asks_about_the_model_only():
    check_model_layout(MODEL, ParallelConfig(context_parallel_size=3), None)
    with pytest.raises(LayoutError, match="^tensor-slices: "):
        check_model_layout(MODEL, ParallelConfig(tensor_model_parallel_size=3), 3)


def test_an_idle_pipeline_is_a_warning():
    layout = Layout(MODEL, run(axes(pp=4), finetune={**STAGE, "micro_batch_size": 4}), 4)
    assert layout_problems(layout) == []
    (warning,) = layout_warnings(layout)
    assert warning.startswith(
        "finetune: 2 micro-batches per step on 4 pipeline stages leave each stage idle for 60% of "
        "the time"
    )
    assert layout_warnings(Layout(MODEL, run(axes(tp=2)), 3)) == []


def test_selection_cannot_keep_more_layers_than_there_are():
    check_model_fits_selection(MODEL, run(select={"num_attention_layers": 4}))
    with pytest.raises(ConfigError, match="num_attention_layers=5 exceeds"):
        check_model_fits_selection(MODEL, run(select={"num_attention_layers": 5}))


def test_an_objective_leaves_some_tokens_for_the_rest():
    def chosen(k):
        return run(distill={**STAGE, "objective": {"kind": "top_k", "k": k}})

    check_run(MODEL, chosen(MODEL.vocab_size - 1), 1)
    with pytest.raises(ConfigError, match=rf"distill.objective.k={MODEL.vocab_size} is not below"):
        check_run(MODEL, chosen(MODEL.vocab_size), 1)


def test_a_teacher_beyond_its_context_is_warned_of():
    def warnings(known, **changes):
        model = MODEL.replace(max_position_embeddings=known)
        return layout_warnings(Layout(model, run(finetune={**STAGE, **changes}), 1))

    assert warnings(64, teacher_weight=0.5) == warnings(32) == []
    (warning,) = warnings(32, teacher_weight=0.5)
    assert "finetune.seq_length=64 tokens, but its config claims 32" in warning
    alone = Layout(None, run(finetune={**STAGE, "teacher_weight": 0.5}), 1)
    assert layout_warnings(alone) == []


sizes = st.sampled_from([1, 1, 2, 3, 4, 6, 8, 16])


@st.composite
def layouts(draw):
    groups = draw(st.sampled_from([1, 2, 3, 4, 8]))
    layers = draw(st.integers(1, 12))
    model = MODEL.replace(
        num_layers=layers,
        mixer_types=("attn",) * layers,
        num_query_groups=groups,
        num_attention_heads=groups * draw(st.sampled_from([1, 2, 5])),
        vocab_size=draw(st.sampled_from([512, 509, 500, 48, 151936])),
        ffn_hidden_size=draw(st.sampled_from([128, 96, 35])),
    )
    parallel = axes(
        tp=draw(sizes),
        pp=draw(sizes),
        cp=draw(sizes),
        sequence_parallel=draw(st.booleans()),
        zero_stage=draw(st.integers(0, 3)),
        offload_optimizer=draw(st.booleans()),
        pipeline_layout=draw(st.none() | st.lists(st.integers(0, 6), min_size=1, max_size=6)),
        virtual_pipeline_model_parallel_size=draw(st.sampled_from([1, 1, 2, 3])),
    )
    stages = {}
    for name in ("align", "distill", "finetune"):
        micro = draw(st.integers(1, 4))
        sizes_of_stage = {
            "micro_batch_size": micro,
            "global_batch_size": micro * draw(st.integers(1, 24)),
        }
        stages[name] = {**STAGE, "seq_length": draw(st.integers(1, 300)), **sizes_of_stage}
    return Layout(
        draw(st.none() | st.just(model)),
        run(parallel, **stages),
        draw(st.none() | st.integers(1, 64)),
    )


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_every_problem_has_two_ways_out_and_each_lifts_it(layout):
    for problem in layout_problems(layout):
        assert (
            problem.rule in RULES
            and len(problem.ways_out) == 2
            and problem.ways_out[0] != problem.ways_out[1]
        )
        for change in problem.ways_out:
            changed = layout.changed(change)
            # what a user would write is a valid configuration
            RunConfig.model_validate(changed.run.model_dump())
            after = {(other.rule, other.says) for other in layout_problems(changed)}
            assert (problem.rule, problem.says) not in after
            stage = problem.says.split(".")[0]
            assert not any(
                rule == problem.rule and says.split(".")[0] == stage for rule, says in after
            )


def test_a_run_is_checked_for_its_layout_and_where_the_model_is_known_its_selection():
    too_many = run(select={"num_attention_layers": 1000})
    check_run(None, too_many, 4)
    with pytest.raises(ConfigError, match="num_attention_layers=1000"):
        check_run(MODEL, too_many, 4)
    with pytest.raises(LayoutError, match="tensor_model_parallel_size=3"):
        check_run(MODEL, run(axes(tp=3)), 3)
