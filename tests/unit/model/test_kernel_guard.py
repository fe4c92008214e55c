"""What passes stays, what fails is replaced on all ranks, loudly and once. Kernels run in Triton's
interpreter where there is no GPU."""

import inspect
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from megatron_hypenet.config.mixers import mixer_specs
from megatron_hypenet.errors import ConfigError, SetupError
from megatron_hypenet.model import kernel_guard
from megatron_hypenet.model.kernel_guard import families_of, guard, use_of
from megatron_hypenet.ops import fp8_linear, kernels, selftest
from megatron_hypenet.ops.gated_norm import triton as gated_norm_kernels
from megatron_hypenet.ops.kernels import KernelUse
from megatron_hypenet.ops.lightning_attn import selftest as lightning_selftest
from megatron_hypenet.parallel import groups
from megatron_hypenet.parallel.vocab_loss import selftest as vocab_selftest
from megatron_hypenet.parallel.vocab_loss import triton_terms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIXERS = frozenset({"attn", "lightning_attn"})
OTHERS = {
    family
    for name, spec in mixer_specs().items()
    if name not in MIXERS
    for family in spec.kernel_families
}
"""Families of mixers that the model here does not have; their kernels are not this package's."""
EVERY = set(kernels.FAMILIES) - OTHERS - {"fp8_rows"}
"""Without those of a teacher in FP8, whose kernel a use has to ask for."""
MODULES = (selftest, lightning_selftest, vocab_selftest)
CHECKS = {
    name: (module, check)
    for module in MODULES
    for name, check in vars(module).items()
    if name.startswith("check_") and not name.endswith("_use")
}
GPU = "Imaginary GPU 9000"
USE = KernelUse(
    torch.float32,
    head_dim=32,
    width=64,
    hidden=512,
    ffn=80,
    vocab_rows=150,
    tensor_ranks=1,
    context_ranks=1,
    documents=False,
)
USE = replace(USE, mixers=MIXERS)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, caplog):
    monkeypatch.setattr(kernels, "_enabled", dict.fromkeys(kernels.FAMILIES, True))
    monkeypatch.setattr(kernel_guard, "_looked_at", set())
    caplog.set_level(logging.INFO, logger="megatron_hypenet")
    if DEVICE.type == "cuda":
        return
    monkeypatch.setattr(triton_terms, "TILE", 256)
    for name, (module, check) in CHECKS.items():
        if "tokens" in inspect.signature(check).parameters:  # few: the interpreter is slow
            monkeypatch.setattr(
                module,
                name,
                lambda *args, check=check, **kwargs: check(*args, **{**kwargs, "tokens": 48}),
            )


def enabled():
    return [family for family in kernels.FAMILIES if family in EVERY and kernels.enabled(family)]


def test_good_kernels_stay_and_one_line_says_so(caplog):
    guard(USE, DEVICE, GPU)
    assert set(enabled()) == EVERY
    (record,) = caplog.records
    assert (
        record.levelno == logging.INFO
        and GPU in record.message
        and all(family in record.message for family in EVERY)
    )


def test_a_kernel_with_wrong_numbers_is_replaced_and_named(monkeypatch, caplog):
    right = gated_norm_kernels.backward
    monkeypatch.setattr(
        gated_norm_kernels, "backward", lambda *args: tuple(x * 1.02 for x in right(*args))
    )
    guard(USE, DEVICE, GPU)
    assert set(enabled()) == EVERY - {"gated_norm", "lightning_mix"}
    warning, line = caplog.records
    assert warning.levelno == logging.WARNING
    assert all(
        word in warning.message
        for word in (
            GPU,
            "gated_norm width 64 float32",
            "off by 2.0e-02",
            "limit 1.0e-05",
            "rank 0",
        )
    )
    assert "gated_norm" not in line.message and "norm_rope" in line.message


def test_a_kernel_that_does_not_compile_is_replaced(monkeypatch, caplog):
    def broken(*args):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(triton_terms, "ce_stats", broken)
    guard(USE, DEVICE, GPU)
    assert (
        "vocab_loss" not in enabled()
        and "RuntimeError: PassManager::run failed" in caplog.records[0].message
    )


def test_one_use_is_looked_at_once(monkeypatch):
    calls = []
    right = selftest.check_norm_rope
    monkeypatch.setattr(
        selftest,
        "check_norm_rope",
        lambda *args, **kwargs: calls.append(1) or right(*args, **kwargs),
    )
    guard(USE, DEVICE, GPU)
    guard(USE, DEVICE, GPU)
    assert len(calls) == 1


def test_the_failure_of_any_rank_decides_for_all(monkeypatch, caplog):
    """This one of two ranks passes everything; the other fails in lightning_attn and, because that
    needs it, in lightning_mix."""
    order = sorted(EVERY)
    others = iter([float(not name.startswith("lightning")) for name in order])
    monkeypatch.setattr(groups, "gather_numbers", lambda own: [own, next(others)])
    guard(USE, DEVICE, GPU)
    assert set(enabled()) == EVERY - {"lightning_attn", "lightning_mix"}
    assert "lightning_attn does not run on ranks [1]" in caplog.records[0].message


def test_a_family_disabled_by_hand_is_not_run_and_off_for_all(monkeypatch):
    """Every rank still takes part in the same collectives, or the ranks would wait for each
    other."""
    gathered = []
    monkeypatch.setattr(groups, "gather_numbers", lambda own: gathered.append(own) or [own, 1.0])
    monkeypatch.setattr(
        selftest, "check_norm_rope", lambda *args, **kwargs: pytest.fail("it is disabled")
    )
    kernels.disable("norm_rope")
    guard(USE, DEVICE, GPU)
    wanted = [float(name not in ("norm_rope", "lightning_mix")) for name in sorted(EVERY)]
    assert gathered == wanted and "norm_rope" not in enabled()


@pytest.mark.parametrize(
    ("change", "families"),
    [
        ({"dtype": torch.float64}, set()),
        ({"head_dim": 48}, EVERY - {"norm_rope", "lightning_mix"}),
        ({"head_dim": 512}, EVERY - {"lightning_attn", "lightning_mix"}),
        ({"tensor_ranks": 2}, EVERY - {"gated_norm", "lightning_mix"}),
        ({"width": 32768}, EVERY - {"gated_norm", "lightning_mix"}),
        ({"hidden": 256}, EVERY - {"rms_norm"}),
        ({"fp8": True}, EVERY),  # float32: FP8 goes with bfloat16
        (
            {"mixers": frozenset({"attn"})},
            EVERY - {"lightning_attn", "lightning_mix", "gated_norm"},
        ),
    ],
)
def test_only_kernels_that_will_run_are_checked(change, families):
    assert {family.name for family in families_of(replace(USE, **change))} == families


def test_a_wrong_name_in_the_environment_stops_a_run_on_any_device(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "norm")
    with pytest.raises(
        ConfigError, match="norm is no family of kernels; choose from adamw, .*gated_norm"
    ):
        kernel_guard.guard_kernels(model())


def test_a_broken_device_ends_the_run_with_a_way_out(monkeypatch):
    def dead(where):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(
        SetupError,
        match="illegal memory access was encountered; set HYPENET_DISABLE_KERNELS=norm_rope",
    ):
        kernel_guard._still_usable(torch.device("cuda"), "norm_rope", GPU)


def model(**parallel):
    sizes = {"tensor_model_parallel_size": 1, "context_parallel_size": 1} | parallel
    return SimpleNamespace(
        config=SimpleNamespace(params_dtype=torch.bfloat16),
        model_config=SimpleNamespace(
            kv_channels=128,
            query_size=2048,
            hidden_size=1024,
            ffn_hidden_size=6144,
            vocab_size=151_936,
            mixer_types=("attn",),
        ),
        parallel=SimpleNamespace(**sizes),
    )


def test_sizes_are_those_of_one_rank():
    use = use_of(
        model(tensor_model_parallel_size=4, context_parallel_size=2),
        documents=True,
        mixers=("lightning_attn",),
    )
    assert use.mixers == {"attn", "lightning_attn"}
    assert (use.width, use.hidden, use.ffn, use.vocab_rows) == (512, 1024, 1536, 37_984)
    assert (use.tensor_ranks, use.context_ranks, use.documents) == (4, 2, True)


def test_a_cpu_pays_nothing_and_a_gpu_is_looked_at(monkeypatch):
    seen = []
    monkeypatch.setattr(
        kernel_guard, "guard", lambda use, where, gpu: seen.append((use.head_dim, where.type, gpu))
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: GPU)
    for kind in ("cpu", "cuda"):
        monkeypatch.setattr(kernel_guard, "device", lambda kind=kind: torch.device(kind))
        kernel_guard.guard_kernels(model())
    assert seen == [(128, "cuda", GPU)]


@pytest.mark.gpu
def test_every_kernel_is_right_on_this_gpu():
    wrong = [
        str(found) for found in kernel_guard.check_all_kernels(torch.device("cuda")) if not found.ok
    ]
    assert not wrong, wrong


def test_the_doctor_sees_every_family_in_every_dtype(monkeypatch):
    seen = []
    # as on a GPU that has FP8
    monkeypatch.setattr(fp8_linear, "kernel_fits", lambda dtype: dtype == torch.bfloat16)
    for name, (module, _) in CHECKS.items():
        monkeypatch.setattr(
            module, name, lambda where, dtype, name=name, **kwargs: seen.append((name, dtype))
        )
    assert len(list(kernel_guard.check_all_kernels(DEVICE))) == len(seen) == 37
    assert {name for name, _ in seen} == set(CHECKS) and len(set(seen)) == 31
