"""Scores, mixers and run folders: how whole ones are made, and what their readers must say of
them."""

import json
import math
from dataclasses import asdict

from tests.fuzz.token_files import make_tokens
from tests.tiny_run import TEACHER


def make_scores(folder):
    folder.mkdir(exist_ok=True)
    (folder / "scores.json").write_text(
        json.dumps(
            {
                "num_layers": 4,
                "layers": {str(i): {"recall": 50 - i, "commonsense": 40.5 + i} for i in range(4)},
            }
        )
    )
    (folder / "mixers.json").write_text(
        json.dumps({"mixer_types": ["attn", "lightning_attn"] * 2, "attention_layers": [0, 2]})
    )


def scores_are_numbers(folder, out, said, whole):
    layers = json.loads((folder / "scores.json").read_text())["layers"]
    assert sorted(layers, key=int) == [str(i) for i in range(len(layers))]
    for entry in layers.values():
        assert all(
            isinstance(entry[name], int | float)
            and not isinstance(entry[name], bool)
            and math.isfinite(entry[name])
            for name in entry
            if name in ("recall", "commonsense")
        )
        assert {"recall", "commonsense"} <= set(entry)
    assert len(json.loads(said)["attention_layers"]) == 1


def read_mixers(folder):
    from megatron_hypenet.stages.selection.ranking import load_selection

    return load_selection(folder / "mixers.json", num_layers=4).to_json()


def mixers_are_the_files(folder, out, said, whole):
    plain = json.loads((folder / "mixers.json").read_text())
    printed = json.loads(said)
    assert printed["mixer_types"] == plain["mixer_types"] and printed["attention_layers"] == sorted(
        plain["attention_layers"]
    )
    assert (
        all(type(layer) is int for layer in plain["attention_layers"])
        and len(plain["mixer_types"]) == 4
    )
    TEACHER.replace(num_layers=4, mixer_types=tuple(plain["mixer_types"]))


def make_run_folder(folder):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("output_dir: x\n")
    step = {"fingerprint": "ab", "seconds": 1.5, "finished": "2026-01-01T00:00:00+00:00"}
    software = {"versions": {"torch": "2"}, "git_commit": None}
    (folder / "manifest.json").write_text(
        json.dumps(
            {
                "format_version": 1,
                "steps": {"teacher": step, "data": step},
                "started": {"align": "cd"},
                "added_settings": ["a.b"],
                "software": software,
            }
        )
    )
    job = {
        "id": 12,
        "part": "all",
        "script": "job.sh",
        "submitted": "2026-01-01T00:00:00+00:00",
        "after": None,
        "exclude": ["n1"],
    }
    (folder / "jobs.json").write_text(json.dumps({"jobs": [job, {**job, "id": 13, "after": 12}]}))
    source = {
        "source": "x",
        "prefix": "train_000",
        "fingerprint": [1, ["x", 2, 3]],
        "documents": 4,
        "tokens": 16,
    }
    recall = {"words": [1, 2, 3], "opening": [4], "separator": [], "closing": [5]}
    content = {
        "vocab_size": 1000,
        "end_of_document": 0,
        "train": [source],
        "heldout": None,
        "recall": recall,
    }
    (folder / "corpus.json").write_text(json.dumps(content))
    make_tokens(folder)
    for suffix in ("bin", "idx"):
        (folder / f"text.{suffix}").rename(folder / f"train_000.{suffix}")
    (folder / "timing.json").write_text(
        json.dumps(
            {"grace_seconds": 90, "stages": {"align": {"grace_seconds": 90, "step_seconds": 0.5}}}
        )
    )
    (folder / "losses.jsonl").write_text(
        "".join(
            json.dumps({"step": i + 1, "loss": 0.5, "grad_norm": 1.0, "lr": 1e-3}) + "\n"
            for i in range(4)
        )
    )
    beat = {
        "life": "x",
        "rank": 0,
        "host": "n",
        "pid": 5,
        "state": "running",
        "beats": 3,
        "begun": 1,
        "stage": "align",
        "phase": "edge",
        "iteration": 1,
        "train_iters": 5,
        "silent_seconds": 0.1,
    }
    (folder / "beat.json").write_text(json.dumps(beat))
    record = {
        "life": "x",
        "time": 1.5,
        "host": "n",
        "rank": 0,
        "stage": "",
        "phase": "",
        "iteration": 0,
        "train_iters": 0,
        "type": "E",
    }
    record |= {"error": "e", "code": 5, "echo": False, "traceback": "t"}
    (folder / "error.json").write_text(json.dumps(record))
    row = {"model": "teacher", "heldout_loss": 1.5, "recall": {"1": 50.0}}
    (folder / "report").mkdir()
    for picture in ("report.png", "report.html"):
        (folder / "report" / picture).touch()  # the command writes it anew
    (folder / "report" / "report.json").write_text(
        json.dumps({"rows": [row], "seq_length": 16, "attention_layers": [0], "seconds": 2.5})
    )


def read_run_folder(folder):
    from megatron_hypenet.cluster.first_error import _from_record
    from megatron_hypenet.cluster.jobs import Jobs
    from megatron_hypenet.data.corpus import open_corpus
    from megatron_hypenet.halo.run_folder import RunFolder
    from megatron_hypenet.supervision import heartbeat
    from megatron_hypenet.supervision.fault_record import read_record
    from megatron_hypenet.training import grace_period
    from tests.losses import read_losses

    jobs, place = Jobs(folder), RunFolder(folder)
    for job in jobs.all:
        jobs.events(job), jobs.attempts(job), jobs.log(job)
    for record in place.records().values():
        record["seconds"] + 1.0
    place.started("align")
    corpus = open_corpus(folder, heldout_fraction=0.3, seed=0)
    corpus.heldout_sequences(1, 2)
    losses = [record["step"] + record["loss"] for record in read_losses(folder / "losses.jsonl")]
    beat = heartbeat.read_beat(folder / "beat.json", "x")
    fault = read_record(folder / "error.json")
    told = _from_record(folder / "error.json")
    assert beat is None or beat.where()
    return {
        "jobs": len(jobs.all),
        "grace": grace_period.read(folder).get("grace_seconds"),
        "losses": losses,
        "fault": fault and asdict(fault),
        "told": told and told.kind,
    }


def _content(path):
    """Return what the file holds; nothing where there is none, as in a run that has no jobs or
    steps."""
    return json.loads(path.read_text()) if path.is_symlink() or path.exists() else {}


def run_folder_is_plain(folder, out, said, whole):
    """Check that what decides anything is in the files as a plain parser reads them."""
    printed = json.loads(said)
    jobs = _content(folder / "jobs.json").get("jobs", [])
    assert printed["jobs"] == len(jobs) and all(type(job["id"]) is int for job in jobs)
    manifest = _content(folder / "manifest.json")
    assert all(isinstance(step["fingerprint"], str) for step in manifest.get("steps", {}).values())
