import json
import os
import subprocess
import sys

import pytest

from megatron_hypenet import errors
from megatron_hypenet.cli import main as cli
from megatron_hypenet.errors import ConfigError, SavedAndRequeue

HEAVY = ("torch", "transformers", "megatron", "deepspeed", "numpy", "matplotlib", "tensorboard")


def invoke(capsys, *words):
    code = cli.run(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_lists_verbs_in_pipeline_order(capsys):
    code, out, _ = invoke(capsys, "--help")
    places = [out.index(f"\n  {verb} ") for verb in cli.VERBS]
    assert code == 0 and places == sorted(places)


def test_help_of_a_verb(capsys):
    shown = invoke(capsys, "help", "config", "show")
    assert shown == invoke(capsys, "config", "show", "--help") and shown[0] == 0
    assert invoke(capsys, "help")[:2] == invoke(capsys, "--help")[:2]
    assert invoke(capsys, "help", "nothing")[0] == 2


def test_nothing_at_all_shows_help_and_is_a_usage_fault(capsys):
    code, out, _ = invoke(capsys)
    assert code == 2 and "Usage: hypenet VERB" in out


def test_version_names_the_libraries(capsys):
    code, out, _ = invoke(capsys, "--version")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "hypenet",
        "torch",
        "megatron-core",
        "deepspeed",
        "transformers",
    ]


def test_version_of_a_missing_library(capsys, monkeypatch):
    monkeypatch.setattr(cli, "VERSIONED", ("no-such-library",))
    assert "no-such-library not installed" in invoke(capsys, "--version")[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "unknown verb 'trian'; did you mean 'train'?"),
        (["qqq"], "unknown verb 'qqq'\nverbs are demo, doctor"),
        (["--frobnicate"], "unknown option '--frobnicate' before the verb"),
        (["config", "validate"], "Missing argument 'CONFIG'"),
        (["config", "shwo"], "No such command 'shwo'"),
        (["config", "show", "--nope"], "see hypenet config show --help"),
    ],
)
def test_usage_faults_exit_2_with_one_block(capsys, words, says):
    code, out, err = invoke(capsys, *words)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and says in err and "Traceback" not in err


def raising(monkeypatch, fault):
    def stand_in(verb, args):
        raise fault

    monkeypatch.setattr(cli, "run_verb", stand_in)


@pytest.mark.parametrize(
    "name",
    [
        "HypenetError",
        "ConfigError",
        "LayoutError",
        "SetupError",
        "CheckpointError",
        "VerificationError",
        "DivergedError",
        "HangError",
        "SavedAndRequeue",
    ],
)
def test_exit_code_comes_from_the_class(capsys, monkeypatch, name):
    cls = getattr(errors, name)
    raising(monkeypatch, cls("what, where, fix"))
    code, _, err = invoke(capsys, "train")
    assert code == cls.exit_code and err == "error: what, where, fix\n"


def test_unforeseen_fault_is_one_line_and_a_hint(capsys, monkeypatch):
    raising(monkeypatch, ZeroDivisionError("division by zero\nmore"))
    code, _, err = invoke(capsys, "train")
    assert code == 1 and "Traceback" not in err
    assert (
        err.splitlines()[0] == "error: internal: ZeroDivisionError: division by zero"
        and "--debug" in err
    )


@pytest.mark.parametrize("words", [["--debug", "train"], ["train", "--debug"]])
def test_debug_shows_the_traceback(capsys, monkeypatch, words):
    raising(monkeypatch, ConfigError("bad"))
    code, _, err = invoke(capsys, *words)
    assert code == 3 and "Traceback" in err and err.endswith("error: bad\n")


def test_debug_after_two_dashes_is_left_alone():
    assert cli.split_debug(["score", "--", "--debug"]) == (["score", "--", "--debug"], False)
    assert cli.split_debug(["--debug", "score", "--", "x"]) == (["score", "--", "x"], True)


def test_current_folder_that_was_deleted_is_named(capsys, monkeypatch, tmp_path):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, _, err = invoke(capsys, "runs", ".")
    assert code == 4 and err.startswith("error: the current folder was deleted; ")


def test_interrupt_exits_130(capsys, monkeypatch):
    raising(monkeypatch, KeyboardInterrupt())
    assert invoke(capsys, "run")[0] == 130


def test_requeue_code_reaches_the_shell(monkeypatch):
    raising(monkeypatch, SavedAndRequeue("saved"))
    monkeypatch.setattr(sys, "argv", ["hypenet", "run"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 75


PAGES = [
    *cli.VERBS,
    "convert import",
    "convert export",
    "convert verify",
    "convert to-megatron",
    "convert from-megatron",
    "select rank",
    "select sweep",
    "data prepare",
    "data merge",
    "data inspect",
    "ckpt ls",
    "ckpt inspect",
    "ckpt diff",
    "config show",
    "config validate",
    "config schema",
]


@pytest.mark.parametrize("page", PAGES)
def test_help_has_an_example_and_offers_json(page, capsys):
    code, out, _ = invoke(capsys, *page.split(), "--help")
    assert code == 0 and "Example" in out and f"hypenet {page.removesuffix(' sweep')} " in out
    assert "--json" in out or "Commands" in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help_without_heavy_imports(verb):
    """The verbs run in a fresh interpreter, as a user would meet them; processor seconds count,
    because other tests run beside this one."""
    probe = (
        "import sys, time, json\n"
        "from megatron_hypenet.cli.main import run\n"
        f"code = run(['{verb}', '--help'])\n"
        "heavy = sorted({name.split('.')[0] for name in sys.modules} & set(sys.argv[1:]))\n"
        "print(json.dumps([code, heavy, time.process_time()]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, *HEAVY], capture_output=True, text=True, timeout=60
    )
    code, heavy, seconds = json.loads(done.stderr.splitlines()[-1])
    assert code == 0 and heavy == [], done.stderr
    assert f"hypenet {verb}" in done.stdout
    assert seconds < 0.5


def test_module_runs_as_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_hypenet", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "Usage: hypenet VERB" in done.stdout


def test_reader_that_leaves_a_pipe_is_no_fault():
    command = (
        f"{sys.executable} -m megatron_hypenet config schema | head -n 1; exit ${{PIPESTATUS[0]}}"
    )
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode == 0 and "error" not in done.stderr
