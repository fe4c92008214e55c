"""Every example in a help text, and every `hypenet` line of the README and of the tutorial, runs
as it is printed.

All commands run in this process, in one folder. Only what no test can have is replaced, by the
tables below: models of gigabytes by tiny ones, folders at / by folders here, hours of training by
one step. What needs GPUs, several machines or vLLM is checked by --dry-run; SLURM's commands are
those of tests/unit/cli/slurm_answers.py (tests/integration/slurm has a real SLURM).
"""

import contextlib
import contextvars
import importlib
import io
import json
import re
import shlex
import shutil

import pytest
import torch
import typer
import zstandard
from safetensors.torch import save_file

from megatron_hypenet.cli import main
from megatron_hypenet.config.bundled import REPO_ROOT
from tests.tiny import tiny_teacher_config
from tests.tiny_run import write_teacher
from tests.unit.cli.slurm_answers import Answers, run_with_jobs

NAMES = {
    "/data/part0 /data/part1": "build/sample build/sample",
    # what has no folder of its own in a test
    "/models/": "models/",
    "/data/": "data/",
    "/corpora/fineweb_edu": "corpus",
    "/scratch/": "scratch/",
    "/shared/": "shared/",
    # stands for names of the user's
    "teacher=... data=...": "teacher=models/Qwen3-1.7B data=corpus",
    " ...": " teacher=models/Qwen3-1.7B data=corpus",
    # runs that the examples suppose
    "runs/my_run": "runs/quickstart",
    "--compare runs/longer": "--compare runs/quickstart",
    "runs/distill_06b": "runs/quickstart",
    "runs/other/distill": "runs/quickstart/distill",
    "runs/a/": "runs/quickstart/",
    "runs/b/": "runs/quickstart/",
    "iter_0000120": "iter_0000001",
    "requeue runs/demo": "requeue submitted",
    ".venv-vllm/bin/vllm": "bin/vllm",
}
"""Text of an example -> text that is run."""

ONE_STEP = (
    *(f"{stage}.{key}" for stage in ("align", "distill", "finetune") for key in (
        "train_iters=1", "warmup_iters=0", "seq_length=64", "micro_batch_size=1",
        "global_batch_size=1",
    )),
    *(f"{part}.{key}" for part in ("select", "eval") for key in (
        "recall_sequences=1", "heldout_sequences=1", "seq_length=64", "batch_size=1",
        "recall_pairs=2",
    )),
    "data.recall_pairs=2", "eval.length_multiples=[1]", "guard.max_teacher_loss=20",
    "data.heldout_fraction=0.3",
)  # fmt: skip
SHORT = ("--probes", "needle", "--count", "1", "--depths", "0.5", "--loss-count", "1")
DRY = ("--dry-run",)
SERVE = ("--dry-run", "--vllm", "bin/vllm")

MORE = {
    # a run of their own, because the training of another one would be done again
    "train configs/run/quickstart.yaml teacher": (*ONE_STEP, "output_dir=runs/first"),
    "train configs/run/quickstart.yaml --stage align": (*ONE_STEP, "output_dir=runs/second"),
    "train configs/run/quickstart.yaml --stage 3": (*ONE_STEP, "output_dir=runs/third"),
    "run quickstart teacher=/models/Qwen3-0.6B data=/data/fineweb_edu": (
        *ONE_STEP,
        "output_dir=runs/tutorial",
    ),
    "run quickstart": ONE_STEP,
    "run distill_06b": DRY,
    "run configs/run/quickstart.yaml": ONE_STEP,
    "select configs/run/quickstart.yaml teacher=/models/Qwen3-0.6B data=corpus.txt select.method": (
        *ONE_STEP,
        "select.gates.train_iters=1",
        "output_dir=runs/gates",
    ),
    "select configs/run/quickstart.yaml": ONE_STEP,
    "demo --out runs/longer": DRY,  # minutes
    "demo": (*ONE_STEP[:-1], "data.train=[corpus.txt]", "data.heldout=corpus.txt"),
    "run configs/run/distill_2b.yaml": DRY,
    "train configs/run/distill_2b.yaml": DRY,
    "score runs/demo/finetune --tokens ids.safetensors --out out.safetensors --cp": DRY,
    "convert verify runs/demo/export": DRY,
    "eval": (*SHORT, "--lengths", "128"),
    "submit configs/run/quickstart.yaml": ("output_dir=runs/sent",),
    "serve": SERVE,
    "data prepare 'crawl": ("--workers", "1"),
}
"""Beginning of an example -> words that are added; the first that fits counts."""

AGAIN = {
    "score": ["out.safetensors"],
    "select rank": ["mixers.json"],
    "eval": ["eval", "runs/demo/eval"],
    "convert from-megatron": ["teacher"],
    "data prepare crawl": ["data/crawl.bin", "data/crawl.idx"],
}
"""Beginning of an example -> results of others that it would not replace."""

WRITES = {
    "convert import": ["teacher"],
    "convert export": ["out"],
    "convert to-megatron": ["megatron_teacher"],
    "data prepare": ["build"],
    "data merge": ["data/all.bin", "data/all.idx"],
    "config copy": ["my_cluster.yaml"],
}
"""Command -> results of its example, removed before it is run once more."""

NO_GPU = {"doctor --kernels": "kernels: run it where the training will run"}
"""Example -> the end of its error on a machine without a GPU, with exit code 4."""

SSH = """while [ "$1" = -o ]; do shift 2; done
if [ "$1" = -G ]; then echo "hostname 10.0.0.${2#worker-}"; exit; fi
shift
eval "$@"
"""
"""In the place of ssh: two hosts, whose commands are done here."""

FIRST = ("demo", "run quickstart teacher=/models/Qwen3-0.6B data=corpus.txt")
"""Examples that the others suppose to have been run."""


def pages():
    """Yield the words of every help page: the top, each verb, and the commands of verbs that have
    some."""
    yield ()
    for verb in main.VERBS:
        module = importlib.import_module(f"megatron_hypenet.cli.{verb}")
        command = typer.main.get_command(module.app)
        yield (verb,)
        yield from ((verb, name) for name in getattr(command, "commands", ()))


def printed(page):
    """Return the text of a help page."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main.run([*page, "--help"]) == 0
    return out.getvalue()


def examples_in(text):
    """Yield command lines without `hypenet`: lines that begin with it, and in the README with its
    path."""
    joined = text.replace("\\\n", " ")
    lines = re.findall(r"^ +(?:\$ )?(?:\.venv/bin/)?hypenet (\S.*)$", joined, re.MULTILINE)
    for line in lines:
        yield " ".join(re.sub(r"\s+(# .*|> \S+)$", "", line).split())


GROUPS = {page[:1] for page in pages() if len(page) == 2}
"""Verbs that have commands."""
BY_PAGE = {page: list(examples_in(printed(page))) for page in pages()}
README = [
    example
    for page in ("README.md", "docs/tutorial.md")
    for example in examples_in((REPO_ROOT / page).read_text())
]
ALL = list(dict.fromkeys([*FIRST, *(one for found in BY_PAGE.values() for one in found), *README]))


def words_of(example, *added):
    """Return the words that are run for an example."""
    more = next((words for start, words in MORE.items() if example.startswith(start)), ())
    for text, instead in NAMES.items():
        example = example.replace(text, instead)
    words = shlex.split(example)
    # what follows -- belongs to another program
    place = words.index("--") if "--" in words else len(words)
    return [*words[:place], *more, *added, *words[place:]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Provide the folder in which the examples run, with what they read."""
    root = tmp_path_factory.mktemp("world")
    bundled = REPO_ROOT / "assets" / "tiny-qwen3"
    text = (bundled / "sample.txt").read_text()[:60_000]
    shape = tiny_teacher_config(
        2, vocab_size=2048, num_attention_heads=4, num_query_groups=2, rotary_base=1e4
    )
    for name in ("Qwen3-0.6B", "Qwen3-1.7B"):
        write_teacher(root / "models" / name, shape=shape)
        for file in bundled.iterdir():
            if file.name.startswith(("tokenizer", "vocab", "merges")):
                shutil.copy(file, root / "models" / name)
    for name in ("corpus.txt", "corpus/part.txt", "held_out.txt", "book.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text if "corpus" in name else text[:2_000])
    lines = "".join(json.dumps({"text": part, "content": part}) + "\n" for part in text.split("\n"))
    (root / "crawl").mkdir()
    (root / "crawl" / "a.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (root / "crawl" / "b.jsonl").write_text(lines * 8)
    question = {"question": "Which?", "choices": ["this", "that"], "answer": 0}
    (root / "mmlu.jsonl").write_text(json.dumps(question))
    (root / "hosts").write_text("worker-1 slots=4\nworker-2 slots=4\n")
    (root / "my.yaml").write_text(
        "nodes: 1\ngpus_per_node: 0\ntasks_per_node: 1\ntime: '01:00:00'\n"
    )
    layers = {str(layer): {"recall": 1 / (layer + 1), "commonsense": 0.5} for layer in range(9)}
    (root / "scores.json").write_text(json.dumps({"layers": layers}))
    save_file({"input_ids": torch.arange(20).reshape(2, 10)}, root / "ids.safetensors")
    (root / "scratch" / "runs").mkdir(parents=True)
    (root / "shared" / "runs").mkdir(parents=True)
    run_with_jobs(root / "submitted", (7, "run"))
    return root


def remove(path):
    """Delete a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@pytest.fixture
def run(world, monkeypatch):
    """Provide a function from words of a command line to its exit code; SLURM's commands are
    stand-ins."""
    monkeypatch.chdir(world)
    shutil.rmtree(world / "bin", ignore_errors=True)
    answers = Answers(world, monkeypatch)
    answers["sbatch"] = f"wc -l < {world}/calls"
    answers["srun"] = answers["vllm"] = answers["pdsh"] = "true"
    answers["ssh"] = SSH
    monkeypatch.setattr("sys.stdin", io.StringIO())
    export, published = world / "runs" / "demo" / "export", world / "models" / "HypeNet-2B"
    if export.is_dir() and not published.is_dir():
        shutil.copytree(export, published)
        (published / "chat_template.jinja").write_text("{{ messages[-1].content }}")

    def call(example, *added):
        for name in next((AGAIN[start] for start in AGAIN if example.startswith(start)), ()):
            remove(world / name)
        # what one command remembers of its options is nothing to the next
        return contextvars.copy_context().run(main.run, words_of(example, *added))

    return call


def test_every_page_has_an_example_of_its_own():
    # `sweep` may be left out, and its example does; `eval` and others have one command only
    for page, found in BY_PAGE.items():
        words = " ".join(page).removesuffix(" sweep")
        assert any(one.startswith(words) for one in found), page
    assert len(README) > 25


@pytest.mark.parametrize("example", ALL)
def test_an_example_runs(example, run, capsys):
    code = run(example)
    err = capsys.readouterr().err
    assert code == (4 if example in NO_GPU else 0), err
    assert err.rstrip().endswith(NO_GPU.get(example, "")), err


LEAVES = {page: found[0] for page, found in BY_PAGE.items() if page and page not in GROUPS}


@pytest.mark.parametrize("page", LEAVES, ids=" ".join)
def test_with_json_stdout_is_one_object(page, run, world, capsys):
    for name in WRITES.get(" ".join(page), ()):
        remove(world / name)
    assert run(LEAVES[page], *([] if "--json" in LEAVES[page] else ["--json"])) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)
