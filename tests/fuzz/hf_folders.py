"""Hugging Face folders: how a whole one is made, and what an import that accepts one must have."""

import json
import shutil

import torch

from tests.fuzz.reading import TOKENIZER
from tests.tiny_run import write_teacher


def make_model(folder, *, index=False, tokenizer=False):
    write_teacher(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [3, 4], "temperature": 0.6, "do_sample": True})
    )
    if index:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        place = {}
        for number in range(3):
            part = {name: tensors[name] for name in names[number::3]}
            save_file(part, folder / f"part{number}.safetensors", metadata={"format": "pt"})
            place |= dict.fromkeys(part, f"part{number}.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 3}, "weight_map": place})
        )


def make_model_with_tokenizer(folder):
    shutil.copytree(
        TOKENIZER, folder, ignore=shutil.ignore_patterns("sample.txt", "heldout.txt", "README.md")
    )


def tensors_of_model(folder):
    """Return all tensors as the safetensors library reads them."""
    from safetensors.torch import load_file

    files = [folder / "model.safetensors"]
    if not files[0].exists():
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        files = [folder / name for name in sorted(set(index.values()))]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def imported_as_it_says(folder, out, said, whole):
    """The checkpoint has the numbers of config.json and the bits of the weight files."""
    from megatron_hypenet.checkpoint.load import read_weights
    from megatron_hypenet.config.model import ModelConfig
    from megatron_hypenet.export.mapping import entries

    config = json.loads((folder / "config.json").read_text())
    model = json.loads((out / "model.json").read_text())
    names = {
        "num_hidden_layers": "num_layers",
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "vocab_size": "vocab_size",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
        "rms_norm_eps": "layernorm_epsilon",
        "max_position_embeddings": "max_position_embeddings",
        "initializer_range": "init_method_std",
    }
    for theirs, ours in names.items():
        same = model[ours] == config.get(theirs) and config[theirs] is not True
        assert config.get(theirs) is None or same, (
            f"{theirs} = {config[theirs]!r}, model.json has {model[ours]!r}"
        )
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        given = config.get(key)
        assert model[key] == (given[0] if isinstance(given, list) else given), key
    tensors, ours = tensors_of_model(folder), read_weights(out)
    for entry in entries(ModelConfig.model_validate(model)):
        assert torch.equal(torch.cat([tensors[name] for name in entry.hf]), ours[entry.ours]), (
            entry.ours
        )
        assert ours[entry.ours].isfinite().all(), entry.ours
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["hf_config"] == config
    generation = folder / "generation_config.json"
    assert not generation.exists() or manifest["extra"].get("generation_config") == json.loads(
        generation.read_text()
    )


def tokenizer_works(folder, out, said, whole):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    # without tokenizer.json its vocabulary and merges are left, which hold the same
    source = folder if (folder / "tokenizer.json").is_file() else whole
    before = Tokenizer.from_file(str(source / "tokenizer.json"))
    after = AutoTokenizer.from_pretrained(out / "tokenizer")
    for text in ("The quick brown fox", " 12 ä\n"):
        assert (
            before.encode(text, add_special_tokens=False).ids
            == after(text, add_special_tokens=False)["input_ids"]
        )
    for file in (out / "tokenizer").iterdir():
        assert not (folder / file.name).is_symlink()
    imported_as_it_says(folder, out, said, whole)


def encoded(folder):
    """Return ids as `data prepare --tokenizer FOLDER` makes them, and the number of tokens."""
    from megatron_hypenet.data.tokenizer import encode, load_tokenizer

    tokenizer = load_tokenizer(folder)
    return [len(tokenizer), encode(tokenizer, "The quick brown fox")]


def encoded_as_ids(folder, out, said, whole):
    count, ids = json.loads(said)
    assert ids and all(type(number) is int and 0 <= number < max(count, 1 << 20) for number in ids)
