"""Megatron-LM checkpoints: how a whole one is made, and what an accepted import must have."""

import json
import shutil

import torch

from megatron_hypenet.cli.main import run
from tests.fuzz.checkpoints import make_checkpoint


def make_megatron(folder):
    ours = folder.with_name("ours")
    make_checkpoint(ours)
    assert run(["convert", "to-megatron", str(ours), str(folder)]) == 0
    shutil.rmtree(ours)


def tensors_of(folder):
    """Return all tensors of a sharded folder as torch's own reader finds them."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    reader = dcp.FileSystemReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.zeros(entry.size) for name, entry in stored.items() if hasattr(entry, "size")
    }
    planner = dcp.DefaultLoadPlanner()
    _load_state_dict(state, storage_reader=reader, planner=planner, no_dist=True)
    return state


def imported_as_torch_reads_it(folder, out, said, whole):
    """Assert that every imported tensor is what torch's own reader finds in the save, in the order
    of rows that Megatron's modules have, and without the padding; where that reader refuses the
    damaged save, what it finds in the undamaged one."""
    from megatron_hypenet.checkpoint.load import read_weights
    from megatron_hypenet.config.model import ModelConfig

    try:
        state = tensors_of(folder / "release")
    except Exception:  # it may insist on what no import needs, such as a memory format
        state = tensors_of(whole / "release")
    config = ModelConfig.model_validate(json.loads((out / "model.json").read_text()))
    found = read_weights(out)
    groups, heads = config.num_query_groups, config.heads_per_group
    for layer in range(config.num_layers):
        ours = {
            name.split(".", 3)[3]: tensor
            for name, tensor in found.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        theirs = {
            name.removeprefix("decoder.layers."): tensor[layer]
            for name, tensor in state.items()
            if name.startswith("decoder.layers.")
        }
        fused = theirs.pop("self_attention.linear_qkv.weight")
        parts = fused.view(groups, heads + 2, -1, config.hidden_size).split([heads, 1, 1], dim=1)
        for letter, part in zip("qkv", parts, strict=True):
            own = ours.pop(f"self_attention.linear_in.weight.{letter}")
            assert torch.equal(own, part.reshape(own.shape)), letter
        # the rest has the same values under other names
        assert sorted(t.double().sum().item() for t in ours.values()) == sorted(
            t.double().sum().item() for t in theirs.values()
        )
    embedding = state["embedding.word_embeddings.weight"][: config.vocab_size]
    assert torch.equal(found["embedding.word_embeddings.weight"], embedding)
