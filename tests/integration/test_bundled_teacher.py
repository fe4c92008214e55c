"""The bundled teacher does what its README says: it predicts held-out prose, recalls facts inside
its context, and not beyond."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from megatron_hypenet.data.recall import RecallTask
from megatron_hypenet.data.tokenizer import encode, load_tokenizer, recall_vocabulary
from megatron_hypenet.eval.heldout import heldout_loss
from megatron_hypenet.eval.recall import recall_accuracy


@pytest.fixture(scope="module")
def teacher(repo_root):
    from transformers import AutoModelForCausalLM

    folder = repo_root / "assets" / "tiny-qwen3"
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()

    @torch.no_grad()
    def token_scores(ids):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        nll = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return nll, logits.argmax(-1) == ids[:, 1:]

    tokenizer = load_tokenizer(folder)
    tokens = np.array(encode(tokenizer, (folder / "heldout.txt").read_text()[:40_000]))
    return token_scores, tokens, RecallTask(recall_vocabulary(tokenizer), tokens, seed=5)


def test_predicts_heldout_prose(teacher):
    token_scores, tokens, _ = teacher
    windows = torch.from_numpy(tokens[: 32 * 257].reshape(32, 257))
    loss, accuracy = heldout_loss(token_scores, windows, batch_size=8)
    assert loss < 3.25 and accuracy > 34  # README: 3.11 and 36.8 on the whole file


def test_recalls_within_its_context_only(teacher):
    token_scores, _, task = teacher
    within, beyond = (
        recall_accuracy(token_scores, task, count=16, seq_length=length, batch_size=4)
        for length in (256, 1024)
    )
    assert within >= 97 and beyond < 10
