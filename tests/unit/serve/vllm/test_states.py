"""Requests of a step as vLLM describes them, and slots that several requests have in turn."""

import pytest
import torch

from tests import vllm_engine as vllm

BUILD = """
import torch
from types import SimpleNamespace as Some
from megatron_hypenet.serve.vllm import states

config = Some(
    scheduler_config=Some(max_num_seqs=4),
    compilation_config=Some(max_cudagraph_capture_size=8),
    cache_config=Some(mamba_cache_mode="none"),
)
builder = states.RequestsBuilder(Some(block_size=16), ["layer"], config, "cpu")

def step(starts, lengths, slots):
    starts = torch.tensor(starts)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    return Some(
        num_reqs=len(lengths), seq_lens=lengths, seq_lens_cpu_upper_bound=None,
        block_table_tensor=torch.tensor(slots, dtype=torch.int32)[:, None],
        query_start_loc=starts, query_start_loc_cpu=starts, num_actual_tokens=int(starts[-1]),
        max_query_len=int(starts.diff().max()),
    )

one = builder.build(0, step([0, 1, 2, 7, 10], [9, 1, 5, 20], [3, 1, 2, 7]))
found = [one.num_decodes, one.slots.tolist(), one.new_decodes.tolist()]
found += [[p.request, p.start, p.stop, p.is_new] for p in one.prefills]
# rows that fill up a CUDA graph have no tokens, and the block that they had before
two = builder.build(0, step([0, 1, 2, 2, 2], [6, 7, 0, 0], [5, 4, 6, 6]))
found += [[two.num_decodes, two.slots.tolist(), len(two.prefills)]]
found += [one.slots.data_ptr() == two.slots.data_ptr()]

cache = torch.arange(12.0).view(3, 2, 2)
new = torch.tensor([True, False])
found += [states.read_states(cache, torch.tensor([0, 2]), new).flatten().tolist()]
found += [states.read_states(cache, torch.tensor([1]), True).flatten().tolist()]
states.write_states(cache, torch.tensor([1]), torch.ones(1, 2, 2, dtype=torch.float64))
found += [cache.flatten().tolist()]
answer(found)
"""


@pytest.mark.slow
def test_requests_of_a_step():
    assert vllm.inside(BUILD) == [
        2,
        [3, 1, 2, 7],
        [False, True, False, False],
        [2, 2, 7, True],
        [3, 7, 10, False],
        [4, [5, 4, 0, 0], 0],
        True,
        [0.0] * 4 + [8.0, 9.0, 10.0, 11.0],
        [0.0] * 4,
        [0.0, 1.0, 2.0, 3.0] + [1.0] * 4 + [8.0, 9.0, 10.0, 11.0],
    ]


@pytest.mark.slow
def test_without_a_prefix_cache_slots_are_used_again(same_tokens):
    options = {"enable_prefix_caching": False, "max_num_seqs": 2}
    assert same_tokens("lightning-attn", options) == [0] * len(vllm.PROMPT_TOKENS)


@pytest.mark.slow
def test_preempted_and_aborted_requests_leave_the_others_their_states(tmp_path):
    """Twelve blocks of 64 tokens hold the prompts and not what is generated: requests lose their
    slots and are computed again, and slots of aborted ones are taken over."""
    folder = vllm.write_folder(tmp_path / "folder", "lightning-attn")
    generator = torch.Generator().manual_seed(3)
    prompts = [
        torch.randint(127, (length,), generator=generator).tolist()
        for length in (120, 250, 60, 190)
    ]
    right = vllm.reference(folder, prompts)
    small = {"num_gpu_blocks_override": 12, "disable_log_stats": False}
    found = vllm.engine(tmp_path, folder, [prompts, prompts[::-1]], aborted=(1, 2), **small)
    assert found["tokens"] == [right, right[::-1]]
    assert found["preempted"] > 0
