import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hypenet.config.checks import (
    check_layout,
    check_model_fits_selection,
    divisors_near,
    multiples_near,
    refuse_unbuilt_axes,
)
from megatron_hypenet.config.model import ModelConfig
from megatron_hypenet.config.schema import ParallelConfig, RunConfig
from megatron_hypenet.errors import ConfigError, LayoutError

STAGE = {"train_iters": 10, "seq_length": 64, "micro_batch_size": 2, "global_batch_size": 8, "lr": 1e-3, "min_lr": 1e-5}
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
    values = {"output_dir": "x", "teacher": "t", "data": {"train": ["a"]}, "align": STAGE, "distill": STAGE, "finetune": STAGE}
    return RunConfig.model_validate({**values, "parallel": parallel or {}, **changes})


def layout(tp=1, pp=1, cp=1, **more):
    return {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "context_parallel_size": cp, **more}


@pytest.mark.parametrize(
    ("parallel", "world"),
    [
        (layout(), 1),
        (layout(), 4),
        (layout(tp=8), 8),
        (layout(tp=2, pp=2, cp=2), 16),
        (layout(pp=4, zero_stage=1), 4),
        (layout(tp=2, sequence_parallel=True), 2),
        (layout(zero_stage=3), 2),
    ],
)
def test_valid_layouts_pass(parallel, world):
    check_layout(MODEL, run(parallel), world)


@pytest.mark.parametrize(
    ("parallel", "world", "says"),
    [
        (layout(tp=3), 3, r"tensor_model_parallel_size=3 does not divide model num_attention_heads=16.*vocab_size=512.*; use 2 or 4"),
        (layout(tp=16), 16, r"tensor_model_parallel_size=16 does not divide model num_query_groups=8; use 4 or 8"),
        (layout(sequence_parallel=True), 1, r"sequence_parallel=true .* use a size of 2 or more, or sequence_parallel=false"),
        (layout(pp=2, zero_stage=2), 2, r"zero_stage=2 with .*pipeline_model_parallel_size=2.*; use zero_stage 0 or 1"),
        (layout(pp=8), 8, r"pipeline_model_parallel_size=8 exceeds the model's num_layers=4; use 2 or 4"),
        (layout(tp=2), 3, r"3 processes cannot be divided into replicas of 2.*; start 2 or 4 processes"),
        (layout(cp=3), 3, r"align.seq_length=64 is not a multiple of 6.*; use 60 or 66"),
        (layout(), 8, r"align.global_batch_size=8 is not a multiple of .*= 16; use 16 or 32"),
    ],
)
def test_broken_rule_names_values_and_two_ways_out(parallel, world, says):
    with pytest.raises(LayoutError, match=says):
        check_layout(MODEL, run(parallel), world)


def test_sequence_parallel_splits_what_context_parallel_left():
    stage = {**STAGE, "seq_length": 6}
    with pytest.raises(LayoutError, match=r"seq_length=6 is not a multiple of 4.*sequence_parallel.*; use 4 or 8"):
        check_layout(MODEL, run(layout(tp=4, sequence_parallel=True), align=stage, distill=STAGE, finetune=STAGE), 4)
    # tp=2, cp=3: chunks need 6, splitting needs 6
    check_layout(MODEL, run(layout(tp=2, cp=3, sequence_parallel=True), align=stage, distill=stage, finetune=stage), 6)


def test_all_problems_at_once():
    with pytest.raises(LayoutError) as caught:
        check_layout(MODEL, run(layout(tp=3, pp=8, zero_stage=3)), 24)
    text = str(caught.value)
    assert text.startswith("3 problems") and "does not divide" in text and "exceeds" in text and "zero_stage" in text


def test_only_the_stages_that_run_are_checked():
    odd = run(finetune={**STAGE, "global_batch_size": 6})
    check_layout(MODEL, odd, 4, stages=("align",))
    with pytest.raises(LayoutError, match="finetune.global_batch_size"):
        check_layout(MODEL, odd, 4)


def test_axes_not_yet_built_are_refused_by_name():
    refuse_unbuilt_axes(ParallelConfig(zero_stage=3), "train")
    with pytest.raises(LayoutError, match=r"tensor_model_parallel_size=2, .*context_parallel_size=4 is not available yet for hypenet run"):
        refuse_unbuilt_axes(ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=4), "run")
    with pytest.raises(LayoutError, match=r"pipeline_model_parallel_size=2 is not available yet for hypenet score; use 1$"):
        refuse_unbuilt_axes(ParallelConfig(pipeline_model_parallel_size=2), "score")


def test_selection_cannot_keep_more_layers_than_there_are():
    check_model_fits_selection(MODEL, run(select={"num_attention_layers": 4}))
    with pytest.raises(ConfigError, match="num_attention_layers=5 exceeds"):
        check_model_fits_selection(MODEL, run(select={"num_attention_layers": 5}))


@given(value=st.integers(1, 5000), wanted=st.integers(1, 200))
def test_proposed_divisors_divide(value, wanted):
    found = divisors_near(value, wanted)
    assert 1 <= len(found) <= 2 and all(value % size == 0 for size in found) and found == sorted(found)


@given(unit=st.integers(1, 300), wanted=st.integers(1, 10000))
def test_proposed_multiples_are_multiples(unit, wanted):
    low, high = multiples_near(unit, wanted)
    assert low > 0 and low % unit == 0 and high == low + unit


@given(tp=st.integers(2, 20), heads=st.sampled_from([4, 8, 12, 16]))
def test_proposed_tensor_sizes_are_valid_themselves(tp, heads):
    model = MODEL.replace(num_attention_heads=heads, num_query_groups=heads // 2)
    try:
        check_layout(model, run(layout(tp=tp)), tp)
    except LayoutError as error:
        proposed = re.search(r"does not divide .*; use (\d+)(?: or (\d+))?", str(error))
        assert proposed
        for size in filter(None, proposed.groups()):
            check_layout(model, run(layout(tp=int(size))), int(size))
