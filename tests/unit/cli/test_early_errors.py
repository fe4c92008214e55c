"""What is wrong on a command line is said at once: no verb loads torch, or any other library that
takes seconds, before it has checked its options and the places that they name."""

import json
import subprocess
import sys

import pytest
import typer

from megatron_hypenet.cli import main
from tests.unit.cli.test_main import HEAVY

WRONG = """
demo --tp 0
demo align.lr=x
doctor --nodes 3
doctor --slurm --kernels
convert import nowhere out --dtype float7
convert export nowhere out --attn-logits-scaling maybe
convert export nowhere out --dtype float7
convert verify nowhere nowhere --dtype float7
convert to-megatron nowhere out
convert to-megatron TINY out --dtype float7
convert from-megatron nowhere out --dtype float7
train quickstart teacher=x data=y --stage 9
train quickstart teacher=x data=y --init z
train quickstart teacher=x data=y --launcher x
run quickstart teacher=x data=y --hostfile h
run quickstart nothing=1
run quickstart teacher=TINY data=TEXT --tp 5
run quickstart teacher=TINY data=TEXT --redo-from nothing
select rank --scores nowhere --num-attention 2 --mixer x
select sweep quickstart teacher=x --nproc 0
score nowhere --tokens t --out o --dtype x
score nowhere --tokens t --out o
generate nowhere --prompt x --device nothing
generate nowhere --prompt x --dtype nothing
generate nowhere --prompt x
eval nowhere --out o --device nothing
eval nowhere --out o --lengths x
eval nowhere --out o
serve nowhere --vllm /nothing
data prepare nowhere out --tokenizer TINY --part x
data prepare nowhere out --tokenizer TINY --slurm
data merge a
data inspect nowhere --tokens 0
ckpt ls nowhere
ckpt inspect nowhere
ckpt diff nowhere nowhere
ckpt prune nowhere --keep-last 0
report nowhere
config show nowhere
config validate quickstart teacher=x data=y --world-size 0
config list --nothing
config copy nothing
config schema nothing
plan quickstart teacher=x data=y --gpu nothing
submit quickstart teacher=TINY data=TEXT --cluster testcluster cluster.nothing=3
submit quickstart teacher=TINY data=TEXT --cluster testcluster --tp 5
runs nowhere
status nowhere
logs nowhere --rank -1
cancel nowhere
requeue nowhere
""".strip().splitlines()

# one interpreter; each command in a fork of it, which has loaded nothing yet
PROBE = """
import contextlib, io, json, os, sys
from megatron_hypenet.cli import main
commands, heavy = json.load(sys.stdin)
for words in commands:
    read, write = os.pipe()
    if not os.fork():
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(err):
            code = main.run(words)
        loaded = sorted(set(heavy) & {name.split('.')[0] for name in sys.modules} - {'numpy'})
        os.write(write, json.dumps([code, loaded, err.getvalue()]).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        print(answer.read())
    os.wait()
"""


@pytest.fixture(scope="module")
def answers(repo_root, tmp_path_factory):
    """Exit code, heavy modules and output of every command, by command."""
    tiny = repo_root / "assets" / "tiny-qwen3"
    places = {"TINY": str(tiny), "TEXT": str(tiny / "sample.txt")}
    commands = []
    for line in WRONG:
        for name, place in places.items():
            line = line.replace(name, place)
        commands.append(line.split())
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps([commands, HEAVY]),
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path_factory.mktemp("empty"),
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(WRONG, map(json.loads, done.stdout.splitlines()), strict=True))


def test_every_command_is_tried():
    for verb in main.VERBS:
        module = __import__(f"megatron_hypenet.cli.{verb}", fromlist=["app"])
        command = typer.main.get_command(module.app)
        for page in [f"{verb} {name}" for name in getattr(command, "commands", ())] or [verb]:
            assert any(f"{line} ".startswith(f"{page} ") for line in WRONG), page


@pytest.mark.parametrize("line", WRONG)
def test_it_is_refused_before_anything_heavy_is_loaded(answers, line):
    code, loaded, said = answers[line]
    assert code in (2, 3, 4, 5) and loaded == [], said
    assert said.count("error: ") == 1 and "Traceback" not in said and "internal" not in said
