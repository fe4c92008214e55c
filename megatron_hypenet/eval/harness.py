"""Tasks of lm-eval (the harness of EleutherAI) with a model of an evaluation: likelihoods and text
come from the two functions by which `suite.py` sees models.

lm-eval reads the tasks' data with the library datasets; everything here runs without a network, so
data are local files or in the cache of that library."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_hypenet.errors import DataError, SetupError, UsageError
from megatron_hypenet.eval.suite import Model, Row

INSTALL = 'pip install "megatron-hypenet[eval]" (or `.[eval]` in a checkout)'
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
SHARES = ("acc", "exact_match", "em", "f1", "contains", "pass@")
"""Beginnings of metrics that are shares, shown in %; others keep the unit that the task has."""


class Tasks:
    """Tasks by name, of a folder of YAML files or of those that lm-eval brings."""

    def __init__(self, names: Sequence[str], include_path: Path | None) -> None:
        """Find the tasks. SetupError without lm-eval; UsageError for a name that is no task."""
        for name, value in OFFLINE.items():
            os.environ.setdefault(name, value)
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise SetupError(f"--tasks needs lm-eval, and {error}; {INSTALL}") from error
        self.names = list(names)
        # the index of all the tasks that lm-eval brings takes seconds
        self.manager: Any = None
        if include_path is not None:
            self.manager = TaskManager(include_path=str(include_path), include_defaults=False)
        if self.manager is None or self._unknown():
            given = None if include_path is None else str(include_path)
            self.manager = TaskManager(include_path=given)
        if unknown := self._unknown():
            place = "" if include_path is None else f" or in {include_path}"
            raise UsageError(
                f"--tasks {','.join(unknown)}: no task of lm-eval{place} has this name; "
                "`lm_eval ls tasks` lists them"
            )

    def _unknown(self) -> list[str]:
        known = set(self.manager.all_tasks)
        return [name for name in self.names if name not in known]

    def rows(
        self,
        model: Model,
        name: str,
        *,
        fewshot: int | None = None,
        limit: int | None = None,
        chat: bool = False,
    ) -> list[Row]:
        """Evaluate one task, or a group of them, and return a row per task and metric. `fewshot`
        None leaves the number of examples to the task; `limit` bounds the documents of a task;
        `chat` asks through the chat template, examples as turns of the conversation. DataError when
        its data cannot be had, or it asks for what the model cannot do."""
        from lm_eval.evaluator import simple_evaluate

        if chat and model.chat is None:
            raise DataError("the model's tokenizer has no chat template; leave out --chat")
        with _one_message(name):
            found = simple_evaluate(
                model=language_model(model),
                tasks=[name],
                num_fewshot=fewshot,
                limit=limit,
                task_manager=self.manager,
                log_samples=False,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                bootstrap_iters=0,
            )
        return [
            row
            for task, results in found["results"].items()
            for row in metric_rows(task, results, found["n-samples"].get(task, {}))
        ]


def metric_rows(task: str, results: Mapping[str, Any], samples: Mapping[str, Any]) -> list[Row]:
    """Return rows of the results of a task, which lm-eval names `metric,filter`."""
    rows = []
    for key, value in results.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        share = metric.startswith(SHARES)
        way = metric if chosen == "none" else f"{metric}, {chosen}"
        score = float(100 * value if share else value)
        rows.append(
            {"task": task, "way": way, "score": score, "count": int(samples.get("effective", 0))}
        )
    return rows


@contextmanager
def _one_message(name: str) -> Iterator[None]:
    """Say in one message why a task does not run."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        # a file that is not there, data that are not in the cache, a metric's library
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"task {name} of lm-eval does not run: {first}; its data must be local files, or in "
            "the cache of the library datasets, because nothing is downloaded"
        ) from error


def language_model(model: Model) -> Any:
    """Return an lm_eval.api.model.LM that asks `model`."""
    from lm_eval.api.model import TemplateLM

    if not model.end_tokens:
        raise DataError("the model names no end token, which lm-eval puts before a text")

    class AskedModel(TemplateLM):  # type: ignore[misc]
        """One request after the other."""

        @property
        def eot_token_id(self) -> int:
            """Return the token that ends a text."""
            return model.end_tokens[0]

        def tok_encode(self, string: str, **_options: Any) -> list[int]:
            """Encode without special tokens."""
            return model.encode(string)

        @property
        def tokenizer_name(self) -> str:
            """Return a name by which lm-eval keeps prompts apart; it keeps none here."""
            return ""

        def apply_chat_template(
            self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
        ) -> str:
            """Write a conversation with the tokenizer's template."""
            assert model.chat is not None, "asked for only where there is one"
            return model.chat(chat_history, add_generation_prompt)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            return [_likelihood(model, before, text) for _, before, text in requests]

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            """Return the log-likelihood of whole texts, of any length."""
            start = [self.eot_token_id]
            return [
                _likelihood(model, start, model.encode(request.args[0]))[0] for request in requests
            ]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            """Continue texts by the likeliest tokens, up to a text of `until`."""
            return [_continued(model, *request.args) for request in requests]

    return AskedModel()


def _likelihood(model: Model, before: Sequence[int], text: Sequence[int]) -> tuple[float, bool]:
    """Return the log-likelihood of `text` behind `before`, and whether it is what a greedy model
    says."""
    losses, first = model.score(torch.tensor([[*before, *text]]))
    place = len(before) - 1
    return -float(losses[0, place:].double().sum()), bool(first[0, place:].all())


def _continued(model: Model, text: str, asked: Mapping[str, Any]) -> str:
    """Return the answer to a request. DataError for one that asks for samples."""
    if asked.get("do_sample") and asked.get("temperature", 1.0) > 0:
        raise ValueError("it asks for samples (do_sample), and answers here are greedy")
    until = asked.get("until") or []
    most = int(asked.get("max_gen_toks", asked.get("max_new_tokens", 256)))
    answer = model.answer(model.encode(text) or [model.end_tokens[0]], most)
    for end in [until] if isinstance(until, str) else until:
        answer = answer.partition(end)[0] if end else answer
    return answer
