import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from megatron_hypenet.checkpoint import load, save, stream
from megatron_hypenet.cli.main import run
from megatron_hypenet.errors import CheckpointError, ConfigError, ConversionError
from megatron_hypenet.export import mapping
from megatron_hypenet.export.from_hf import import_hf
from megatron_hypenet.export.tensors import join
from megatron_hypenet.export.to_hf import export_hf

from .conftest import TOKENIZER

NORM = "model.norm.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


def refused(model, tmp_path, message, error=ConversionError, **options):
    """The import raises `error`, and nothing is left where the checkpoint would be."""
    folder = model.write(tmp_path / "hf")
    with pytest.raises(error, match=message):
        import_hf(folder, tmp_path / "ckpt", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_arrive_bit_for_bit(hf_model, tmp_path, student, tied, shards):
    model = hf_model(student=student, share_embeddings_and_output_weights=tied)
    lines = []
    config = import_hf(
        model.write(tmp_path / "hf", shards=shards), tmp_path / "ckpt", progress=lines.append
    )
    assert config == model.model == load.read_model_config(tmp_path / "ckpt")
    stored = load.read_weights(tmp_path / "ckpt")
    fc1 = torch.cat([model.tensors[GATE], model.tensors["model.layers.0.mlp.up_proj.weight"]])
    assert torch.equal(stored["decoder.layers.0.mlp.linear_fc1.weight"], fc1)
    q = model.tensors["model.layers.2.self_attn.q_proj.weight"]
    assert torch.equal(stored["decoder.layers.2.self_attention.linear_in.weight.q"], q)
    assert ("output_layer.weight" in stored) == (not tied)
    assert load.read_manifest(tmp_path / "ckpt").kind == ("student" if student else "teacher")


def test_everything_an_export_needs_is_kept(hf_model, tmp_path):
    model = hf_model()
    model.config["note"] = "kept"
    model.files = {
        "tokenizer.json": TOKENIZER,
        "merges.txt": "a b",
        "generation_config.json": '{"top_p": 0.9}',
        "README.md": "not kept",
    }
    import_hf(model.write(tmp_path / "hf"), tmp_path / "ckpt")
    manifest = load.read_manifest(tmp_path / "ckpt")
    assert manifest.hf_config == model.config
    assert manifest.extra["generation_config"] == {"top_p": 0.9}
    assert sorted(path.name for path in load.tokenizer_dir(tmp_path / "ckpt").iterdir()) == [
        "merges.txt",
        "tokenizer.json",
    ]


def test_dtype_is_kept_or_converted(hf_model, tmp_path):
    model = hf_model()
    model.tensors = {name: tensor.bfloat16() for name, tensor in model.tensors.items()}
    model.tensors[NORM] = model.tensors[NORM].float()
    folder = model.write(tmp_path / "hf")
    import_hf(folder, tmp_path / "kept")
    import_hf(folder, tmp_path / "float32", dtype="float32")
    kept, wide = load.read_weights(tmp_path / "kept"), load.read_weights(tmp_path / "float32")
    assert kept["decoder.final_layernorm.weight"].dtype == torch.float32
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32, torch.bfloat16}
    assert all(
        tensor.dtype == torch.float32 and torch.equal(tensor, kept[name].float())
        for name, tensor in wide.items()
    )


def test_tied_head_stored_twice_is_accepted_when_equal(hf_model, tmp_path):
    model = hf_model()
    model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"].clone()
    import_hf(model.write(tmp_path / "hf"), tmp_path / "ckpt")
    assert "output_layer.weight" not in load.read_weights(tmp_path / "ckpt")


def test_tied_head_that_differs_is_refused(hf_model, tmp_path):
    model = hf_model()
    model.tensors["lm_head.weight"] = model.tensors["model.embed_tokens.weight"] + 1e-3
    refused(
        model,
        tmp_path,
        "tie_word_embeddings = true, but lm_head.weight .* differs.*set tie_word_embeddings to "
        "false",
    )


def test_untied_model_without_a_head_is_refused(hf_model, tmp_path):
    model = hf_model(share_embeddings_and_output_weights=False)
    del model.tensors["lm_head.weight"]
    refused(model, tmp_path, "1 of 36 tensors are missing, first lm_head.weight")


def test_missing_and_unmapped_tensors_are_counted(hf_model, tmp_path):
    model = hf_model()
    del model.tensors[GATE], model.tensors[NORM]
    model.tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(4)
    refused(
        model,
        tmp_path,
        "2 of 35 tensors are missing, first .*gate_proj.*; 1 tensors do not belong .*first "
        ".*q_proj.bias",
    )


def test_wrong_shape(hf_model, tmp_path):
    model = hf_model()
    model.tensors[GATE] = model.tensors[GATE].T.contiguous()
    refused(model, tmp_path, rf"{GATE} has shape \[32, 48\], the configuration asks for \[48, 32\]")


def test_unsupported_dtype(hf_model, tmp_path):
    model = hf_model()
    model.tensors[GATE] = model.tensors[GATE].to(torch.float8_e4m3fn)
    refused(model, tmp_path, f"{GATE} is stored as F8_E4M3; supported are float32")


def test_two_dtypes_for_one_tensor_need_a_choice(hf_model, tmp_path):
    model = hf_model()
    model.tensors[GATE] = model.tensors[GATE].bfloat16()
    refused(
        model,
        tmp_path,
        "become one tensor but are stored as BF16, F32; choose one: "
        "`hypenet convert import .* --dtype float32`",
    )
    import_hf(tmp_path / "hf", tmp_path / "ckpt", dtype="float32")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(hf_model, tmp_path, value):
    model = hf_model()
    model.tensors[NORM][3] = value
    refused(model, tmp_path, f"{NORM} has 1 of 32 values that are NaN or infinite")


def test_overflow_in_the_asked_dtype(hf_model, tmp_path):
    model = hf_model()
    model.tensors[NORM][3] = 1e6
    refused(
        model,
        tmp_path,
        f"{NORM} as float16 has 1 of 32 values that are NaN or infinite",
        dtype="float16",
    )


def test_unknown_dtype(hf_model, tmp_path):
    refused(hf_model(), tmp_path, "dtype 'fp8' is not supported; use one of float32", dtype="fp8")


def test_unsupported_configuration(hf_model, tmp_path):
    model = hf_model()
    model.config["attention_bias"] = True
    refused(model, tmp_path, "attention_bias", error=ConfigError)


def test_existing_destination(hf_model, tmp_path):
    model = hf_model()
    folder = model.write(tmp_path / "hf")
    import_hf(folder, tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="already exists"):
        import_hf(folder, tmp_path / "ckpt")
    import_hf(folder, tmp_path / "ckpt", overwrite=True, dtype="bfloat16")
    assert (
        load.read_weights(tmp_path / "ckpt")["decoder.final_layernorm.weight"].dtype
        == torch.bfloat16
    )


def test_overwriting_replaces_only_checkpoints(hf_model, tmp_path):
    folder = hf_model().write(tmp_path / "hf")
    with pytest.raises(ConversionError, match="is not a checkpoint, so it is not replaced"):
        import_hf(folder, folder, overwrite=True)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3"


def test_a_failed_overwrite_leaves_the_old_checkpoint(hf_model, tmp_path):
    import_hf(hf_model().write(tmp_path / "hf"), tmp_path / "ckpt")
    broken = hf_model()
    broken.tensors[NORM][0] = torch.nan
    with pytest.raises(ConversionError):
        import_hf(broken.write(tmp_path / "broken"), tmp_path / "ckpt", overwrite=True)
    assert torch.isfinite(
        load.read_weights(tmp_path / "ckpt")["decoder.final_layernorm.weight"]
    ).all()


@pytest.mark.parametrize(
    ("workers", "dtype"), [(1, None), (2, None), (5, None), (2, "bfloat16"), (3, "float64")]
)
@pytest.mark.parametrize("mixer", ["gated_delta_net", "kimi_delta_attention", "lightning_attn"])
def test_bytes_do_not_depend_on_workers(hf_model, tmp_path, monkeypatch, mixer, workers, dtype):
    """In small pieces the files are those of whole tensors, both ways."""
    monkeypatch.setattr(stream, "PIECE_BYTES", 1000)
    model = hf_model(student=True, mixer_types=(mixer, "attn", mixer))
    folder = model.write(tmp_path / "hf", shards=2)
    config = import_hf(folder, tmp_path / "ckpt", dtype=dtype, workers=workers)
    kept = {entry.ours for entry in mapping.entries(model.model) if entry.at_least_float32}
    tensors = {}
    for entry in mapping.entries(model.model):
        whole = join(entry, [model.tensors[name] for name in entry.hf])
        wanted = whole.dtype if dtype is None else getattr(torch, dtype)
        wanted = torch.promote_types(wanted, torch.float32) if entry.ours in kept else wanted
        tensors[entry.ours] = whole.to(wanted)
    save.write_weights(tmp_path / "whole", tensors, config, kind="student")
    for file in (tmp_path / "whole/weights").iterdir():
        assert (tmp_path / "ckpt/weights" / file.name).read_bytes() == file.read_bytes()
    listed = [load.read_manifest(tmp_path / name).files for name in ("ckpt", "whole")]
    assert listed[0] == listed[1]
    if dtype is None:
        for name, count in (("one", 1), ("many", workers)):
            export_hf(tmp_path / "ckpt", tmp_path / name, max_shard_bytes=20_000, workers=count)
        for file in (tmp_path / "one").glob("*.safetensors"):
            assert (tmp_path / "many" / file.name).read_bytes() == file.read_bytes()


KILLED = textwrap.dedent("""
    import os, signal, sys
    from megatron_hypenet.checkpoint import stream
    from megatron_hypenet.cli.main import run

    stream.PIECE_BYTES = 1000
    write = os.pwrite
    count = 0

    def pwrite(*words):
        global count
        count += 1
        if count == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(*words)

    os.pwrite = pwrite
    run(["convert", "import", *sys.argv[1:]])
""")


def test_killed_halfway_the_same_command_starts_clean(hf_model, tmp_path):
    folder = hf_model().write(tmp_path / "hf")
    words = [str(folder), str(tmp_path / "ckpt")]
    done = subprocess.run([sys.executable, "-c", KILLED, *words], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".json"))
    assert len(left) == 2 and left[0].startswith(".ckpt.tmp-") and left[1] == "hf"
    assert run(["convert", "import", *words]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]
    load.verify_files(tmp_path / "ckpt", hashes=True)
