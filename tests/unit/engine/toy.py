"""A stage small enough for many training runs in one process, and data for it."""

import torch
from torch import nn

from megatron_hypenet.config.schema import ParallelConfig, RunConfig, StageConfig
from megatron_hypenet.stages.base import StageModule
from tests.tiny import tiny_model_config

VOCAB = 13


class ToyStage(StageModule):
    """Predicts the next token from the present one; `poison` makes the loss NaN when that token
    appears."""

    name = "align"
    layout = (1,)

    def __init__(self, dtype=torch.float32, poison=None):
        super().__init__(tiny_model_config())
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCAB, 7, generator=generator).to(dtype))
        self.head = nn.Parameter(torch.randn(VOCAB, 7, generator=generator).to(dtype))
        self.bias = nn.Parameter(torch.zeros(VOCAB, dtype=dtype))
        self.poison = poison
        self.poison_gradient = False

    def forward(self, batch):
        tokens = batch.tokens
        logits = (self.table[tokens[:, :-1]] @ self.head.T + self.bias).float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        if self.poison is not None and (tokens == self.poison).any():
            loss = loss * (Trap.apply(loss) if self.poison_gradient else float("nan"))
        return loss, {"align-layers/00": loss.detach() * 2, "align-layers/01": loss.detach() * 0}

    def flops_per_token(self, config):
        return 1e6

    def sharded_state_dict(self, prefix=""):
        from megatron_hypenet.parallel import groups

        assert groups.is_initialized()
        from megatron.core.dist_checkpointing.mapping import ShardedTensor

        return {
            name: ShardedTensor.from_rank_offsets(name, parameter)
            for name, parameter in self.named_parameters()
        }


class Trap(torch.autograd.Function):
    """One forward, NaN backward: a finite loss with a gradient that is not."""

    @staticmethod
    def forward(ctx, x):
        return torch.ones_like(x)

    @staticmethod
    def backward(ctx, grad):
        return torch.full_like(grad, float("nan"))


class ToyData:
    """Tokens of a sample depend on its index alone; sample `bad` holds token VOCAB - 1."""

    def __init__(self, bad=None, end_of_document=0):
        self.bad = bad
        self.end_of_document = end_of_document

    def answers(self, sample_start, count, seq_length):
        return None

    def document_ends(self, tokens, sample_start):
        return tokens == self.end_of_document

    def batch(self, sample_start, count, seq_length):
        rows = []
        for index in range(sample_start, sample_start + count):
            row = torch.randint(
                0, VOCAB - 1, (seq_length + 1,), generator=torch.Generator().manual_seed(index)
            )
            if index == self.bad:
                row[0] = VOCAB - 1
            rows.append(row)
        return torch.stack(rows)


def stage_config(**changes) -> StageConfig:
    base = {
        "train_iters": 6,
        "seq_length": 8,
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "lr": 0.05,
        "min_lr": 0.01,
        "warmup_iters": 2,
        "save_interval": 3,
        "log_interval": 2,
    }
    return StageConfig.model_validate(base | changes)


def run_config(out, *, zero_stage=1, **changes) -> RunConfig:
    stage = stage_config().model_dump()
    base = {
        "output_dir": str(out),
        "teacher": "teacher",
        "data": {"train": ["x.txt"]},
        "parallel": ParallelConfig(zero_stage=zero_stage),
        "align": stage,
        "distill": stage,
        "finetune": stage,
    }
    return RunConfig.model_validate(base | changes)
