"""`vllm serve` on an exported folder, as a user starts it: the server finds the model by itself, in
each of its processes, and completes a text as the exported code does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.to_hf import export_hf
from tests import vllm_engine as vllm

PROMPT = "It is a truth universally acknowledged, that a single man"
OPTIONS = (
    "--dtype=float32",
    "--enforce-eager",
    "--max-model-len=256",
    "--max-num-seqs=2",
    "--kv-cache-memory-bytes=67108864",
    "--served-model-name=hypenet",
)


@pytest.fixture(scope="module")
def folder(repo_root, tmp_path_factory):
    """Provide an exported HypeNet with the bundled teacher's tokenizer, vocabulary and head
    size."""
    root = tmp_path_factory.mktemp("serve")
    sizes = {"vocab_size": 2048, "head_dim": 16, "eos_token_id": 0}
    made = vllm.write_folder(root / "random", "lightning-attn", **sizes)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(repo_root / "assets" / "tiny-qwen3" / name, made)
    import_hf(made, root / "checkpoint")
    export_hf(root / "checkpoint", root / "export")
    return root / "export"


@pytest.fixture
def server(folder, tmp_path):
    """Provide the address of a server of the folder; its processes are gone afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**vllm.environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    command = [vllm.installed("vllm"), "serve", folder, f"--port={port}", "--host=127.0.0.1"]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*command, *OPTIONS],
            env=environment,
            cwd=tmp_path,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(process, address, log)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process, address, log):
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-6000:]
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-6000:])


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_serves_an_export_without_any_other_step(server, folder):
    import torch
    from transformers import AutoTokenizer

    from megatron_hypenet.export.hf_remote.modeling_hypenet import HypeNetForCausalLM

    asked = {"model": "hypenet", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        f"{server}/v1/completions",
        data=json.dumps({**asked, "ignore_eos": True}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        said = json.load(response)["choices"][0]["text"]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = HypeNetForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False, eos_token_id=None)
    assert said == tokenizer.decode(out[0, inputs.input_ids.shape[1] :]) and said
