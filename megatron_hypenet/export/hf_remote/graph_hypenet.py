"""Single tokens through a CUDA graph: the one-token forward of a model is captured once per cache
and then launched as a whole, because launching its thousand small kernels one by one takes many
times longer than they run.

Shapes: b rows."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_WARM_UP_STEPS = 2
"""Plain steps before a capture: they load kernels, and a shorter text is not worth a capture."""

OneToken = Callable[[Tensor, "Tensor | None"], Tensor]
"""From tokens [b, 1] and the mask [b, 1] of real ones (None: all are) to logits [b, 1, vocab]; on
the device alone, in place."""


class CapturedSteps:
    """Runs the single tokens of one cache: plainly at first, then through a graph, which holds as
    long as every tensor that it reads or writes stays where it is."""

    def __init__(self) -> None:
        """Begin without a captured graph."""
        self.refused = False
        self.forget()

    def __reduce__(self) -> tuple[type[CapturedSteps], tuple[()]]:
        """Copy as a new object: a copy of a cache has other memory, and captures for itself."""
        return CapturedSteps, ()

    def forget(self) -> None:
        """Start anew."""
        self.places: list[int] = []
        self.plain_steps = 0
        self.graph: Any = None
        self.weights: list[Tensor] = []
        self.weight_places: list[int] = []
        self.hooks: list[dict] = []

    def run(
        self,
        model: nn.Module,
        one_token: OneToken,
        ids: Tensor,
        new_real: Tensor | None,
        slots: Sequence[Any],
        padding: Iterable[Tensor | None],
    ) -> Tensor:
        """Run one_token(ids, new_real), through a graph where there is one.

        `slots` and `padding` have all memory of the cache. A graph is left when any of it moved,
        when a weight moved, or when a module got a hook, which a graph would not call."""
        places = [new_real is not None, len(ids), *addresses((*kept(slots), *padding))]
        if places != self.places or (
            self.graph is not None
            and (any(self.hooks) or addresses(self.weights) != self.weight_places)
        ):
            self.forget()
            self.places = places
        if self.graph is None:
            self.plain_steps += 1
            wanted = self.plain_steps > _WARM_UP_STEPS and not self.refused
            if not (wanted and can_be_captured(model, ids)):
                return one_token(ids, new_real)
            if not self._capture(model, one_token, ids, new_real, slots):
                return one_token(ids, new_real)
        self.ids.copy_(ids)
        if new_real is not None:
            self.new_real.copy_(new_real)
        self.graph.replay()
        return self.logits.clone()

    def _capture(
        self,
        model: nn.Module,
        one_token: OneToken,
        ids: Tensor,
        new_real: Tensor | None,
        slots: Sequence[Any],
    ) -> bool:
        """Record the graph; nothing is computed yet. False, with a warning, where it failed."""
        before = [dict(vars(slot)) for slot in slots]
        memory = kept(slots)
        with torch.inference_mode(False):
            self.ids = ids.clone()
            self.new_real = self.ids.bool() if new_real is None else new_real.clone()
        given = None if new_real is None else self.new_real
        reason = "a layer does not update its cache in place"
        try:
            self.graph, self.logits = record(lambda: one_token(self.ids, given))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        if any(a is not b for a, b in zip(kept(slots), memory, strict=True)):
            self.graph = None
        for slot, values in zip(slots, before, strict=True):
            vars(slot).update(values)
        if self.graph is None:
            self.refused = True
            warnings.warn(f"decoding without a CUDA graph, slower: {reason}", stacklevel=2)
            return False
        self.weights = [*model.parameters(), *model.buffers()]
        self.weight_places = addresses(self.weights)
        self.hooks = hooks(model)
        return True


def record(function: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """Capture what `function` launches as a graph, with the tensor that holds its result."""
    graph = torch.cuda.CUDAGraph()
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        # other threads may go on using the GPU
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            result = function()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    return graph, result


def can_be_captured(model: nn.Module, ids: Tensor) -> bool:
    """Return whether a graph of `model` would do what calling it does: all weights on one GPU, only
    modules of torch and of this folder, none of them wrapped, hooked or compiled."""
    if (
        not ids.is_cuda
        or torch.is_autocast_enabled("cuda")
        or torch.cuda.is_current_stream_capturing()
        or not getattr(model, "use_cuda_graph", True)
    ):
        return False
    weights = (*model.parameters(), *model.buffers())
    return is_plain(model) and all(weight.device == ids.device for weight in weights)


def is_plain(model: nn.Module) -> bool:
    """Return whether all modules are torch's or this folder's, without hooks and replaced
    methods."""
    return not any(hooks(model)) and all(
        (
            type(module).__module__.startswith("torch.nn.modules.")
            or type(module).__module__.rpartition(".")[0] == __package__
        )
        and "forward" not in vars(module)
        and getattr(module, "_compiled_call_impl", None) is None
        for module in model.modules()
    )


def hooks(model: nn.Module) -> list[dict]:
    """Return the tables of forward hooks of all modules, which are empty where there are none."""
    return [
        table
        for module in model.modules()
        for table in (module._forward_hooks, module._forward_pre_hooks)
    ]


def kept(slots: Iterable[Any]) -> list[Tensor | None]:
    """Return all tensors of a cache's slots."""
    return [getattr(slot, name) for slot in slots for name in slot.kept]


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """Return the memory addresses of tensors; 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]
