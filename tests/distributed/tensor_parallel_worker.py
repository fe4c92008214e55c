"""Run by torchrun: one process saves outputs and gradients of a full model, two processes reproduce
them from their slices."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))
from megatron_hypenet.config.schema import ParallelConfig  # noqa: E402
from megatron_hypenet.model.hypenet import build_model  # noqa: E402
from megatron_hypenet.model.transfer import named_normal  # noqa: E402
from megatron_hypenet.parallel import groups  # noqa: E402
from megatron_hypenet.parallel.vocab_loss import linear_cross_entropy, linear_kl  # noqa: E402
from tests import toy_mixer  # noqa: E402
from tests.tiny import tiny_model_config  # noqa: E402

# the last has parameters of its own, split by heads and replicated
CONFIG = tiny_model_config(
    ("lightning_attn", "attn", toy_mixer.NAME),
    num_attention_heads=6,
    num_query_groups=2,
    vocab_size=62,
)
IDS = torch.randint(0, 62, (2, 20), generator=torch.Generator().manual_seed(0))
TEACHER_HEAD = named_normal("teacher", (62, 24), std=1.0, seed=1, dtype=torch.float64)


def shards(model):
    """Yield this rank's pieces by logical key, with where they lie in the global tensor."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    for entry in model.sharded_state_dict().values():
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else entry
        yield from (
            built.values()
            if isinstance(built, dict)
            else built
            if isinstance(built, list)
            else [built]
        )


def slice_of(full, piece):
    index = tuple(
        slice(offset, offset + size)
        for offset, size in zip(piece.global_offset, piece.local_shape, strict=True)
    )
    return full[index]


def run(sequence_parallel):
    size = int(os.environ["WORLD_SIZE"])
    parallel = ParallelConfig(
        tensor_model_parallel_size=size, sequence_parallel=sequence_parallel and size > 1
    )
    model = build_model(CONFIG, parallel, dtype=torch.float64, seed=1)
    with torch.no_grad():
        for piece in shards(model):
            shift = 1.0 if "norm" in piece.key else 0.0
            full = (
                named_normal(
                    piece.key, tuple(piece.global_shape), std=0.3, seed=4, dtype=torch.float64
                )
                + shift
            )
            piece.data.copy_(slice_of(full, piece).view(piece.data.shape))
    group = model.pg_collection.tp
    rank = dist.get_rank()
    tokens = IDS.numel()
    sp = parallel.sequence_parallel
    head = TEACHER_HEAD.chunk(size)[rank]
    # tokens first, as the hidden states; the last token of a row has no target
    targets = IDS.roll(-1, dims=1).t()
    counted = torch.ones_like(targets, dtype=torch.float64).index_fill_(
        0, torch.tensor([IDS.shape[1] - 1]), 0.0
    )
    tilted = torch.linspace(0.0, 2.0, tokens, dtype=torch.float64)

    def hidden():
        return model.hidden(IDS)

    teacher = hidden().detach()
    kl = linear_kl(
        hidden(),
        model.head_weight(),
        teacher,
        head,
        chunk_tokens=7,
        group=group,
        sequence_parallel=sp,
    )
    kl = kl + linear_kl(
        hidden(),
        model.head_weight(),
        teacher,
        head,
        chunk_tokens=64,
        group=group,
        sequence_parallel=sp,
        token_weights=tilted,
    )
    ce = linear_cross_entropy(
        hidden(),
        model.head_weight(),
        targets,
        chunk_tokens=9,
        group=group,
        sequence_parallel=sp,
        token_weights=counted,
    )
    (kl + 2 * ce).backward()
    out = {"kl": kl.detach(), "ce": ce.detach()}
    if not sp:
        out["hidden"] = teacher
    for name, parameter in model.named_parameters():
        parameter.data = parameter.grad  # the shards now describe gradients
        assert parameter.grad is not None, name
    return out, list(shards(model))


def whole(pieces):
    """Return global tensors from all the pieces of one process (the MLP's gate and up halves share
    a key)."""
    full = {piece.key: torch.zeros(piece.global_shape, dtype=torch.float64) for piece in pieces}
    for piece in pieces:
        slice_of(full[piece.key], piece).copy_(piece.data)
    return full


def main(folder):
    saved = folder / "one.pt"
    for sequence_parallel in (False, True):
        out, grads = run(sequence_parallel)
        if dist.get_world_size() == 1:
            torch.save(
                {**out, **{f"grad/{key}": full for key, full in whole(grads).items()}}, saved
            )
        else:
            want = torch.load(saved, weights_only=True)
            for key, value in out.items():
                torch.testing.assert_close(
                    value, want[key], rtol=1e-10, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}"
                )
            for piece in grads:
                full = slice_of(want[f"grad/{piece.key}"], piece)
                where = f"{piece.key} sp={sequence_parallel}"
                torch.testing.assert_close(
                    piece.data,
                    full,
                    rtol=1e-9,
                    atol=1e-11,
                    msg=lambda m, where=where: f"{where}: {m}",
                )
        groups.destroy_model_groups()
    if dist.get_rank() == 0:
        print("parity", flush=True)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
