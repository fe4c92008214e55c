"""Run by torchrun: megatron-core's own GPTModel, built from the arguments in a checkpoint, loads it
through `dist_checkpointing`, computes logits, and saves itself again.

The first argument is a folder, the second a list of cases in JSON. megatron-core 0.16 to 0.19 run
the same code.
"""

import argparse
import json
import multiprocessing.util
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.enums import ModelType
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_hypenet.parallel.cpu import enable_cpu


def gpt_model(args: argparse.Namespace, tp: int, pp: int, vocab_rows: int) -> GPTModel:
    """Return the model that Megatron-LM builds for these arguments, in fp32 with random weights."""
    assert args.swiglu
    assert args.normalization == "RMSNorm"
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        kv_channels=args.kv_channels,
        layernorm_epsilon=args.norm_epsilon,
        normalization=args.normalization,
        qk_layernorm=args.qk_layernorm,
        add_bias_linear=args.add_bias_linear,
        gated_linear_unit=args.swiglu,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=args.hidden_dropout,
        attention_dropout=args.attention_dropout,
        rotary_interleaved=args.rotary_interleaved,
        apply_query_key_layer_scaling=args.apply_query_key_layer_scaling,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(
        qk_layernorm=args.qk_layernorm, normalization=args.normalization
    )
    return GPTModel(
        config,
        spec,
        vocab_size=vocab_rows,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
    ).eval()


def sharded(model: GPTModel, **metadata) -> dict:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(prefix="", metadata={"dp_cp_group": group, **metadata})


def stored_arguments(args: argparse.Namespace, case: dict) -> argparse.Namespace:
    """Return what a training with `args` stores on the case's layout, an enumeration among it."""
    sizes = {"tensor_model_parallel_size": case["tp"], "pipeline_model_parallel_size": case["pp"]}
    kind = {"model_type": ModelType.encoder_or_decoder}
    return argparse.Namespace(**{**vars(args), **sizes, **kind, **case["save"]})


@torch.no_grad()
def run(folder: Path, case: dict) -> None:
    tp, pp = case["tp"], case["pp"]
    source = str(folder / case["source"] / "release")
    parallel_state.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    common = dist_checkpointing.load_common_state_dict(source)
    args = common["args"]
    assert common["checkpoint_version"] == 3.0
    assert common["iteration"] == 0
    model = gpt_model(args, tp, pp, case.get("vocab_rows", args.padded_vocab_size))
    loaded = dist_checkpointing.load(sharded(model), source)
    names = set(dict(model.named_parameters()))
    model.load_state_dict({name: loaded[name] for name in names}, strict=False)
    if pp == 1:
        ids = torch.load(folder / "ids.pt")
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        # Megatron makes this mask itself, on "cuda"
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)[None, None]
        logits = model(ids, positions, mask)
        if dist.get_rank() == 0:
            torch.save(logits, folder / f"{case['name']}.logits.pt")
    if "save" in case:
        target = folder / case["name"] / "iter_0000007"
        if dist.get_rank() == 0:
            target.mkdir(parents=True)
            (target.parent / "latest_checkpointed_iteration.txt").write_text("7")
        dist.barrier()
        state = sharded(model, **case.get("metadata", {}))
        if case["save"] is not None:
            state["args"] = stored_arguments(args, case)
            state["iteration"] = 7
        dist_checkpointing.save(state, str(target))
    parallel_state.destroy_model_parallel()


if __name__ == "__main__":
    enable_cpu()
    dist.init_process_group("gloo")
    for each in json.loads(sys.argv[2]):
        run(Path(sys.argv[1]), each)
    dist.barrier()
    sys.stdout.flush()
    # ends Megatron's checkpoint processes, which would outlive this one and hold its output open
    multiprocessing.util._exit_function()
    os._exit(0)
