"""Models to be evaluated, by what runs them: the exported code in transformers, vLLM, or the
training model on a parallel layout.

Not a verb: `hypenet eval` uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_hypenet.cli.engines import Engine, vllm_process
from megatron_hypenet.config.schema import ParallelConfig
from megatron_hypenet.errors import UsageError

if TYPE_CHECKING:
    from megatron_hypenet.eval.suite import Model
    from megatron_hypenet.model.hypenet import HypeNetModel

LEAST_LENGTH = 4096
"""Tokens that vLLM makes room for, when no longer texts are asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replaced:
    """One layer of a run's teacher whose attention is replaced by its aligned RNN mixer."""

    layer: int
    aligned: Path
    """The checkpoint of stage 1."""

    @property
    def mixer(self) -> str:
        """Return the name of the RNN mixer."""
        from megatron_hypenet.checkpoint.find import read_model_config

        return read_model_config(self.aligned).mixer_types[0]

    def described(self) -> dict[str, Any]:
        """Return what eval.json says of it."""
        return {"layer": self.layer, "aligned": str(self.aligned)}

    def put_into(self, teacher: HypeNetModel) -> None:
        """Replace the layer, on the pipeline stage that has it."""
        from megatron_hypenet.halo.build_stage import load_aligned

        mixers = load_aligned(teacher, self.aligned)
        if str(self.layer) in mixers.mixers:
            teacher.set_mixer(self.layer, mixers.of_layer(self.layer))


def replaced_in(model: Path, layer: int) -> tuple[Path, Replaced]:
    """Return the teacher of the run that `model` is or lies in, and what is replaced in it.
    UsageError for a layer that it does not have; CheckpointError before stage 1 is done."""
    from megatron_hypenet.checkpoint.find import read_model_config, resolve
    from megatron_hypenet.checkpoint.places import run_of
    from megatron_hypenet.config.schema import STAGES
    from megatron_hypenet.halo.run_folder import RunFolder

    folder = RunFolder(run_of(model))
    aligned = resolve(folder.stage(STAGES[0]), fall_back=False)
    count = read_model_config(folder.teacher).num_layers
    if layer >= count:
        raise UsageError(f"--replace-layer {layer}: the teacher has layers 0 to {count - 1}")
    return folder.teacher, Replaced(layer=layer, aligned=aligned)


@dataclass(frozen=True, kw_only=True, slots=True)
class Runner:
    """What runs the models of an evaluation."""

    engine: Engine = Engine.HF
    dtype: str | None = None
    """None: the dtype of the weights."""
    device: str | None = None
    """None: a GPU if there is one."""
    vllm: Path | None = None
    """Program of an environment that has vLLM."""
    parallel: ParallelConfig | None = None
    """The layout of the training model; None where an engine runs an exported one."""
    longest: int = 0
    """Tokens of the longest text."""
    replaced: Replaced | None = None
    """What differs from the checkpoint of a teacher, on a layout."""

    @contextmanager
    def loaded(self, path: Path) -> Iterator[Model]:
        """Load a checkpoint, a run's model or a Hugging Face folder, until the end of the block."""
        if self.parallel is not None:
            with _on_layout(path, self.parallel, self.dtype, self.replaced) as model:
                yield model
            return
        from megatron_hypenet.export.hf_model import as_hf_folder

        by_engine = self._by_vllm if self.engine is Engine.VLLM else self._by_transformers
        with as_hf_folder(path) as folder, by_engine(folder) as model:
            yield model

    @contextmanager
    def _by_transformers(self, folder: Path) -> Iterator[Model]:
        from megatron_hypenet.data.tokenizer import encode, load_tokenizer
        from megatron_hypenet.eval.suite import Model
        from megatron_hypenet.export import hf_model
        from megatron_hypenet.export.generate import Sampling, end_tokens, generate
        from megatron_hypenet.export.token_scores import token_scores

        config = hf_model.read_config(folder)
        tokenizer = load_tokenizer(folder)
        loaded = hf_model.load_model(
            folder, config, self.dtype, self.device or hf_model.default_device()
        )
        yield Model(
            score=lambda ids: token_scores(loaded, ids),
            answer=lambda ids, most: generate(loaded, tokenizer, ids, Sampling(most)).text,
            encode=lambda words: encode(tokenizer, words),
            end_tokens=end_tokens(loaded),
            chat=chat_of(tokenizer),
        )

    @contextmanager
    def _by_vllm(self, folder: Path) -> Iterator[Model]:
        import torch

        from megatron_hypenet.data.tokenizer import encode, load_tokenizer, model_end_of
        from megatron_hypenet.eval.suite import NEW_TOKENS, Model
        from megatron_hypenet.export import hf_model

        config = hf_model.read_config(folder)
        tokenizer = load_tokenizer(folder)
        ends = model_end_of(folder) or []
        claimed = min(config.max_position_embeddings, LEAST_LENGTH)
        longest = max(self.longest + NEW_TOKENS + 1, claimed)
        dtype = self.dtype or hf_model.weights_dtype(folder)
        with vllm_process(self.vllm) as process:
            process.start(folder, dtype, max_model_len=longest)

            def score(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                found = process.score(ids.tolist())
                losses = -torch.tensor([logprobs for logprobs, _ in found])
                return losses, torch.tensor([likeliest for _, likeliest in found])

            def answer(ids: Sequence[int], most: int) -> str:
                found = process.continued([ids], most, ends)[0]["tokens"]
                text: str = tokenizer.decode(found, skip_special_tokens=True)
                return text

            yield Model(
                score, answer, lambda words: encode(tokenizer, words), ends, chat_of(tokenizer)
            )


@contextmanager
def _on_layout(
    path: Path, parallel: ParallelConfig, dtype: str | None, replaced: Replaced | None
) -> Iterator[Model]:
    """Build the training model of a checkpoint on all processes of a layout. An answer computes the
    whole text again for every token, because there is no cache."""
    import torch

    from megatron_hypenet.checkpoint.load import (
        load_model,
        read_whole_config,
        resolve,
        tokenizer_dir,
    )
    from megatron_hypenet.data.tokenizer import encode, load_tokenizer, model_end_of
    from megatron_hypenet.eval.suite import Model
    from megatron_hypenet.model.hypenet import build_model
    from megatron_hypenet.model.inference import first_choices
    from megatron_hypenet.model.kernel_guard import guard_kernels
    from megatron_hypenet.parallel.cpu import device
    from megatron_hypenet.parallel.groups import destroy_parallel

    folder = checked_checkpoint(path)
    folder = resolve(folder)
    place = tokenizer_dir(folder)
    if place is None:
        raise UsageError(f"{folder} has no tokenizer files; import the model with its tokenizer")
    tokenizer = load_tokenizer(place)
    config = read_whole_config(folder)
    ends = model_end_of(place) or ([] if config.eos_token_id is None else [config.eos_token_id])
    try:
        model = build_model(config, parallel, dtype=getattr(torch, dtype or _stored_dtype(folder)))
        guard_kernels(model, mixers=() if replaced is None else (replaced.mixer,))
        load_model(model, folder)
        if replaced is not None:
            replaced.put_into(model)
        model.eval()

        def score(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            losses, first = model.token_scores(ids.to(device()))
            return losses.cpu(), first.cpu()

        def answer(ids: Sequence[int], most: int) -> str:
            given = torch.tensor([list(ids)], device=device())
            new: list[int] = []
            while len(new) < most and (not new or new[-1] not in ends):
                following = first_choices(model, given)[:, -1:]
                new.append(int(following))
                given = torch.cat([given, following], dim=1)
            text: str = tokenizer.decode(new, skip_special_tokens=True)
            return text

        yield Model(score, answer, lambda words: encode(tokenizer, words), ends, chat_of(tokenizer))
    finally:
        destroy_parallel()


def chat_of(tokenizer: Any) -> Callable[[list[dict[str, str]], bool], str] | None:
    """Return the function `Model.chat` of a tokenizer."""
    if not getattr(tokenizer, "chat_template", None):
        return None

    def chat(messages: list[dict[str, str]], answers: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=answers,
            continue_final_message=not answers,
        )
        return text

    return chat


def checked_checkpoint(path: Path) -> Path:
    """Return a path that is no Hugging Face folder. UsageError for one, which has no layout."""
    if (path / "config.json").is_file():
        raise UsageError(
            f"{path} is a Hugging Face folder, and a layout is of the training model; import it "
            f"first: hypenet convert import {path} CKPT_DIR"
        )
    return path


def _stored_dtype(folder: Path) -> str:
    """Return the dtype of a checkpoint's weights."""
    from megatron_hypenet.checkpoint.load import open_weights

    reader = open_weights(folder, hashes=False)
    return str(reader.dtype("decoder.final_layernorm.weight")).removeprefix("torch.")
