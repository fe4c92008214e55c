import pytest
import torch

from megatron_hypenet.ops.lightning_attn.triton_plan import (
    H100,
    Gpu,
    choose_segment,
    float32_precision,
    make_plan,
    power_of_two,
    round_up,
)

SMALL = Gpu(46, 99 * 1024)


@pytest.mark.parametrize(
    ("dim", "block"), [(1, 16), (16, 16), (17, 32), (80, 128), (128, 128), (200, 256)]
)
def test_blocks_hold_their_columns(dim, block):
    assert power_of_two(dim) == block


def test_round_up():
    assert [round_up(x, 64) for x in (1, 64, 65)] == [64, 64, 128]


@pytest.mark.parametrize("tokens", [1, 63, 64, 100, 4096, 131072, 131073])
@pytest.mark.parametrize("sequences", [1, 16, 32, 128, 256])
def test_segments_are_whole_chunks_and_cover_the_sequence(sequences, tokens):
    segment = choose_segment(sequences, tokens, 64, H100.processors)
    assert segment % 64 == 0 and segment > 0
    plan = make_plan(
        batch=1,
        tokens=tokens,
        heads=sequences,
        dim_k=128,
        dim_v=128,
        dtype=torch.bfloat16,
        gpu=H100,
    )
    assert (
        plan.num_segments * plan.segment_tokens
        >= tokens
        > (plan.num_segments - 1) * plan.segment_tokens
    )


def test_a_long_sequence_fills_the_gpu_and_many_sequences_stay_whole():
    assert 131072 // choose_segment(16, 131072, 64, H100.processors) == 8  # 128 of 132 processors
    assert choose_segment(128, 512, 64, H100.processors) == 512
    assert choose_segment(256, 16384, 64, H100.processors) == 16384


@pytest.mark.parametrize(
    ("dim", "dtype", "fused"),
    [(128, torch.bfloat16, True), (256, torch.bfloat16, False), (128, torch.float32, False)],
)
def test_dk_and_dv_share_a_program_where_the_state_fits(dim, dtype, fused):
    plan = make_plan(batch=1, tokens=512, heads=4, dim_k=dim, dim_v=dim, dtype=dtype, gpu=H100)
    assert (plan.dkdv is not None) == fused


def test_a_gpu_with_little_shared_memory_gets_smaller_programs():
    shape = {"batch": 1, "tokens": 512, "heads": 4, "dtype": torch.bfloat16, "gpu": SMALL}
    assert make_plan(dim_k=128, dim_v=128, **shape).dkdv is None
    assert make_plan(dim_k=64, dim_v=64, **shape).dkdv is not None
    assert make_plan(dim_k=256, dim_v=256, **shape).scan.stages == 1


def test_fp32_products_follow_torchs_switch():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert float32_precision() == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert float32_precision() == "tf32x3"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_an_old_triton_on_hopper_gets_only_products_it_compiles(dim):
    """Found by compiling every kernel for sm_90: 8 warps of a narrow type fail with Triton 3.2 and
    3.3, TF32 with 3.2."""
    shape = {
        "batch": 1,
        "tokens": 512,
        "heads": 4,
        "dim_k": dim,
        "dim_v": dim,
        "gpu": Gpu(132, 227 * 1024, all_products=False),
    }
    plan = make_plan(dtype=torch.bfloat16, **shape)
    before = torch.get_float32_matmul_precision()
    assert (plan.scan.warps, plan.states.warps) == (4, 4) and (
        plan.dkdv is None or plan.dkdv.warps == 4
    )
    try:
        torch.set_float32_matmul_precision("high")
        assert make_plan(dtype=torch.float32, **shape).precision == "tf32x3"
    finally:
        torch.set_float32_matmul_precision(before)


def test_wide_fp32_heads_fit_a_gpu_with_little_shared_memory():
    shape = {
        "batch": 1,
        "tokens": 512,
        "heads": 4,
        "dim_k": 128,
        "dim_v": 128,
        "dtype": torch.float32,
    }
    small, large = (make_plan(gpu=gpu, **shape).scan for gpu in (SMALL, H100))
    assert (small.columns, small.stages) == (64, 1) and (large.columns, large.stages) == (128, 2)
