"""`hypenet convert import` and `hypenet score` as a user starts them, against the reference
implementation's logits."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from megatron_hypenet.cli.main import run

from .cases import CASES

LIMITS = {"float64": 1e-6, "float32": 1e-5, "bfloat16": 5e-2}
"""Relative error of logits and of losses; measured 3e-8, 1e-6 and 2e-2. The reference's RoPE tables
are fp32."""


def hypenet(*words):
    assert run(list(map(str, words))) == 0


def relative(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize(
    ("kind", "logits"), [("hypenet", "student_logits"), ("qwen3", "teacher_logits")]
)
@pytest.mark.parametrize("case", CASES, ids=lambda path: path.name)
def test_scores_are_the_reference_s(case, kind, logits, tmp_path):
    golden = load_file(case / "golden.safetensors")
    ids = golden["input_ids"]
    want = golden[logits].double()
    want_nll = F.cross_entropy(
        want[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view_as(ids[:, 1:])
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    hypenet("convert", "import", case / kind, tmp_path / "ckpt")
    for dtype in LIMITS if kind == "hypenet" else ["float64"]:
        out = tmp_path / f"{dtype}.safetensors"
        hypenet(
            "score",
            tmp_path / "ckpt",
            "--tokens",
            tmp_path / "ids.safetensors",
            "--out",
            out,
            "--dtype",
            dtype,
        )
        got = load_file(out)
        assert got["logits"].dtype == got["nll"].dtype == getattr(torch, dtype)
        assert (
            relative(got["logits"], want) < LIMITS[dtype]
            and relative(got["nll"], want_nll) < LIMITS[dtype]
        ), dtype
