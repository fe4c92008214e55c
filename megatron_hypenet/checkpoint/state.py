"""State that continues a run: the train state, and the interface through which an engine's weights
and optimizer state are read and set.

Optimizer state is stored per parameter under the parameter's canonical name, in its global shape:
any parallel layout and any ZeRO stage can read it. `EngineState` is that interface, so that only
engine/deepspeed/ knows DeepSpeed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import KIND, read_listed
from megatron_hypenet.errors import CheckpointError
from megatron_hypenet.untrusted.files import has_entry
from megatron_hypenet.untrusted.json_text import parse_json, typed

LOSS_TAIL = 50

Count = Annotated[int, Field(ge=0, le=1 << 62)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Progress of a training stage; stored as train_state.json."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    stage: str
    """Name of the stage: align, distill, finetune."""
    step: Count = 0
    """Finished optimizer steps."""
    samples: Count = 0
    """Sequences consumed: the data position, because a sample is a pure function of its index."""
    tokens: Count = 0
    """Tokens consumed."""
    adam_step: Count = 0
    """Adam's own step counter, for its bias correction."""
    lr: float = 0.0
    """Learning rate of the last step."""
    seed: int = 0
    """Data seed of the run."""
    losses: tuple[float, ...] = ()
    """Losses of the last steps, newest last."""
    layout: dict[str, int] = field(default_factory=dict)
    """Parallel sizes of the run that wrote the state, for messages; any other layout may read
    it."""
    skipped_steps: Count = 0
    """Steps so far that were skipped because their loss or gradient was not finite; they count in
    `step` and `samples`."""
    skipped_in_row: Count = 0
    """Number of skipped steps since the last step that was not skipped."""

    def skip(self, *, samples: int, tokens: int, lr: float) -> TrainState:
        """Return the state after one more step whose update was refused."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
            lr=lr,
            skipped_steps=self.skipped_steps + 1,
            skipped_in_row=self.skipped_in_row + 1,
        )

    def advance(self, *, samples: int, tokens: int, loss: float, lr: float) -> TrainState:
        """Return the state after one more step."""
        tail = (*self.losses, loss)[-LOSS_TAIL:]
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            tokens=self.tokens + tokens,
            losses=tail,
            lr=lr,
            skipped_in_row=0,
        )

    def write(self, path: Path) -> None:
        """Store as JSON; floats keep every bit."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> TrainState:
        """Read what `write` stored in a committed checkpoint; CheckpointError when it is missing,
        changed or does not fit."""
        path = folder / fmt.TRAIN_STATE
        if not has_entry(path):
            raise CheckpointError(
                f"{folder} has no {path.name}: it holds weights only, and no run can continue from "
                "it; --init starts a stage from such a checkpoint"
            )
        text = KIND.decode(path, read_listed(folder, fmt.TRAIN_STATE))
        return typed(KIND, path, parse_json(KIND, path, text), cls)


class EngineState(Protocol):
    """The interface of an engine for saving and loading. All processes call every method in the
    same order."""

    module: nn.Module
    template: Template
    data_rank: int
    data_size: int

    def gathered(self, parameter: nn.Parameter) -> AbstractContextManager[None]:
        """Return a context in which `parameter` holds its full local value (ZeRO-3 keeps only a
        part otherwise)."""
        ...

    def set_weight(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Overwrite the model weight with the full local value."""
        ...

    def full_state(self, parameter: nn.Parameter, name: str) -> Tensor:
        """Return one of OPTIMIZER_STATES as a full local fp32 tensor; collective over the
        data-parallel group."""
        ...

    def set_full_state(self, parameter: nn.Parameter, name: str, value: Tensor) -> None:
        """Overwrite this process's part of one optimizer state from the full local value."""
        ...

    def init_optimizer_state(self, adam_step: int) -> None:
        """Create Adam's state, so that it can be overwritten, as after `adam_step` steps."""
        ...

    def adam_step(self) -> int:
        """Return Adam's step counter."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One trained parameter: its position in the module, its full local shape, and its sharded
    description without data."""

    index: int
    parameter: nn.Parameter
    shape: tuple[int, ...]
    sharded: Any

    def described(self, value: Tensor, *, prefix: str = "", owned: bool = True) -> Any:
        """Return Megatron's description with `value` as its data, under `prefix`.key; with `owned`
        this process is its data-parallel writer."""
        from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

        sharded = self.sharded
        if owned and isinstance(sharded.replica_id, tuple):
            sharded = replace(sharded, replica_id=(*sharded.replica_id[:-1], 0))
        if prefix:
            return make_sharded_optimizer_tensor(sharded, value.view(self.shape), prefix)
        if hasattr(sharded, "dtype"):
            return replace(sharded, data=value.view(self.shape), dtype=value.dtype)
        return replace(sharded, data=value.view(self.shape))


class Template:
    """Sharded descriptions of a module's trained parameters, taken while they are whole: before
    ZeRO-3 partitions them."""

    def __init__(self, module: nn.Module) -> None:
        sharded = module.sharded_state_dict(prefix="")  # type: ignore[operator]
        described = {id(entry.data): entry for entry in sharded.values() if entry.data is not None}
        self.entries: list[Entry] = []
        left_out = []
        for index, (name, parameter) in enumerate(module.named_parameters()):
            if not parameter.requires_grad:
                continue
            entry = described.pop(id(parameter), None)
            if entry is None:
                left_out.append(name)
                continue
            self.entries.append(
                Entry(index, parameter, tuple(parameter.shape), replace(entry, data=None))
            )
        assert not left_out, f"trained parameters missing in sharded_state_dict: {left_out[:3]}"
        assert not described, (
            "sharded_state_dict names tensors that are no trained parameters: "
            f"{[e.key for e in described.values()][:3]}"
        )

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)


def empty_like_entry(entry: Entry, dtype: torch.dtype) -> Tensor:
    """Return a tensor without storage of the entry's shape: enough to ask a checkpoint for its
    pieces."""
    return torch.empty(entry.shape, dtype=dtype, device="meta")
