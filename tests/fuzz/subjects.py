"""The kinds of files that are damaged: how a whole one is made, what reads it, and the independent rule for what may be accepted."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml

from megatron_hypenet.cli.main import report_fault, run
from tests.fuzz import mutations as m
from tests.tiny_run import TEACHER, write_teacher

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "assets" / "tiny-qwen3"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One kind of file. The folder that `make` fills is copied for every input, and one of `files` in it is damaged."""

    make: Callable[[Path], None]
    files: dict[str, tuple]
    """File, relative to the folder -> its mutations."""
    read: Callable[[Path, Path], int]
    """Read the folder and write into a place that does not exist: the exit code, with the error on stderr."""
    accepted: Callable[[Path, Path, str, Path], object]
    """Asserts that an accepted input was harmless: (folder, what was written, what was printed, the undamaged folder)."""
    mend: Callable[[Path, str], None] = lambda folder, name: None
    """What whoever damaged the file on purpose would do next, as writing hashes anew."""


def verb(*words):
    """A command line; FOLDER and OUT stand for the two places."""

    def read(folder, out):
        return run([word.replace("FOLDER", str(folder)).replace("OUT", str(out)) for word in words])

    return read


def call(function):
    """A function of (folder) as a verb would call it: its result is printed as JSON, its fault as the command would say it."""

    def read(folder, out):
        try:
            print(json.dumps(function(folder), default=str))
        except Exception as fault:
            return report_fault(fault, debug=False)
        return 0

    return read


# Hugging Face folders


def make_model(folder, *, index=False, tokenizer=False):
    write_teacher(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4], "temperature": 0.6, "do_sample": True}))
    if index:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names, place = sorted(tensors), {}
        for number in range(3):
            part = {name: tensors[name] for name in names[number::3]}
            save_file(part, folder / f"part{number}.safetensors", metadata={"format": "pt"})
            place |= dict.fromkeys(part, f"part{number}.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 3}, "weight_map": place}))


def make_model_with_tokenizer(folder):
    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("sample.txt", "heldout.txt", "README.md"))


def tensors_of_model(folder):
    """All tensors as the safetensors library reads them."""
    from safetensors.torch import load_file

    files = [folder / "model.safetensors"]
    if not files[0].exists():
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        files = [folder / name for name in sorted(set(index.values()))]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def imported_as_it_says(folder, out, said, whole):
    """The checkpoint has the numbers of config.json and the bits of the weight files."""
    from megatron_hypenet.checkpoint.load import read_weights
    from megatron_hypenet.config.model import ModelConfig
    from megatron_hypenet.export.mapping import entries

    config, model = json.loads((folder / "config.json").read_text()), json.loads((out / "model.json").read_text())
    names = {
        "num_hidden_layers": "num_layers", "hidden_size": "hidden_size", "intermediate_size": "ffn_hidden_size", "vocab_size": "vocab_size",
        "num_attention_heads": "num_attention_heads", "num_key_value_heads": "num_query_groups", "head_dim": "kv_channels",
        "rms_norm_eps": "layernorm_epsilon", "max_position_embeddings": "max_position_embeddings", "initializer_range": "init_method_std",
    }  # fmt: skip
    for theirs, ours in names.items():
        same = model[ours] == config.get(theirs) and config[theirs] is not True
        assert config.get(theirs) is None or same, f"{theirs} = {config[theirs]!r}, model.json has {model[ours]!r}"
    for key in ("eos_token_id", "bos_token_id", "pad_token_id"):
        given = config.get(key)
        assert model[key] == (given[0] if isinstance(given, list) else given), key
    tensors, ours = tensors_of_model(folder), read_weights(out)
    for entry in entries(ModelConfig.model_validate(model)):
        assert torch.equal(torch.cat([tensors[name] for name in entry.hf]), ours[entry.ours]), entry.ours
        assert ours[entry.ours].isfinite().all(), entry.ours
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["hf_config"] == config
    generation = folder / "generation_config.json"
    assert not generation.exists() or manifest["extra"].get("generation_config") == json.loads(generation.read_text())


def tokenizer_works(folder, out, said, whole):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    before, after = Tokenizer.from_file(str(folder / "tokenizer.json")), AutoTokenizer.from_pretrained(out / "tokenizer")
    for text in ("The quick brown fox", " 12 ä\n"):
        assert before.encode(text, add_special_tokens=False).ids == after(text, add_special_tokens=False)["input_ids"]
    for file in (out / "tokenizer").iterdir():
        assert not (folder / file.name).is_symlink()
    imported_as_it_says(folder, out, said, whole)


# checkpoints


def make_checkpoint(folder):
    make_model(folder.with_name("source"))
    assert run(["convert", "import", str(folder.with_name("source")), str(folder)]) == 0
    shutil.rmtree(folder.with_name("source"))


def write_hashes(folder, name):
    """Make the manifest fit the damaged file, and COMMITTED the manifest."""
    path, manifest = folder / name, folder / "manifest.json"
    if name not in ("manifest.json", "COMMITTED") and path.is_file() and not path.is_symlink() and path.stat().st_size < m.BIG:
        content, record = path.read_bytes(), json.loads(manifest.read_text())
        record["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest.write_text(json.dumps(record))
    if name != "COMMITTED" and manifest.is_file() and not manifest.is_symlink() and manifest.stat().st_size < m.BIG:
        (folder / "COMMITTED").write_text(hashlib.sha256(manifest.read_bytes()).hexdigest() + "\n")


def nothing_is_accepted(folder, out, said, whole):
    same = all((folder / file.relative_to(whole)).read_bytes() == file.read_bytes() for file in whole.rglob("*") if file.is_file())
    assert same, "a file that differs from its hash was accepted"


def exported_as_torch_reads_it(folder, out, said, whole):
    """Every exported tensor is what torch's own reader finds in the checkpoint, and its shape what model.json says."""
    from safetensors.torch import load_file
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    from megatron_hypenet.config.model import ModelConfig
    from megatron_hypenet.export.mapping import entries

    found = load_file(next(out.glob("*.safetensors")))
    config = ModelConfig.model_validate(json.loads((folder / "model.json").read_text()))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == config.vocab_size
    state = {entry.ours: torch.zeros(entry.shape) for entry in entries(config)}
    _load_state_dict(state, storage_reader=dcp.FileSystemReader(folder / "weights"), planner=dcp.DefaultLoadPlanner(), no_dist=True)
    for entry in entries(config):
        assert torch.equal(torch.cat([found[name] for name in entry.hf]), state[entry.ours]), entry.ours
    if not json.loads((folder / "manifest.json").read_text())["kind"]:
        raise AssertionError("a checkpoint of no kind")


def make_training_state(folder):
    from megatron_hypenet.checkpoint.state import TrainState

    make_checkpoint(folder)
    TrainState(stage="align", step=3, samples=12, tokens=700, losses=(0.5, 0.25), layout={"tp": 1}).write(folder / "train_state.json")
    write_hashes(folder, "train_state.json")


def read_train_state(folder):
    from dataclasses import asdict

    from megatron_hypenet.checkpoint.state import TrainState

    return asdict(TrainState.read(folder))


def says_what_the_file_says(name, folder, out, said, whole):
    """What was read is the file's content as a plain parser reads it: same keys, same values; keys that are gone have defaults."""
    printed, plain = json.loads(said), json.loads((folder / name).read_text())
    before = json.loads((whole / name).read_text())
    for key, value in printed.items():
        assert (
            plain.get(key, value) == value
            and isinstance(value, type(before[key]))
            or (isinstance(value, int) and isinstance(before[key], float))
        ), key


# token files, text


def make_tokens(folder):
    from megatron_hypenet.data.indexed import TokenFileWriter

    with TokenFileWriter(folder / "text", vocab_size=1000) as writer:
        for length in (5, 1, 7, 3):
            writer.add(list(range(10, 10 + length)))


def as_megatron_reads_it(folder, out, said, whole):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    data, printed = IndexedDataset(str(folder / "text")), json.loads(said)
    documents = [
        np.concatenate([data[i] for i in range(a, b)] or [[]])
        for a, b in zip(data.document_indices, data.document_indices[1:], strict=False)
    ]
    assert printed["documents"] == len(documents) and printed["tokens"] == sum(map(len, documents))
    assert printed["first_ids"] == np.concatenate(documents)[:64].astype(int).tolist()


def make_text(folder):
    folder.mkdir(exist_ok=True)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"Document {i} has words, ä and more."}) + "\n" for i in range(6)))


def documents_are_the_lines(folder, out, said, whole):
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

    lines = [json.loads(line)["text"] for line in (folder / "text.jsonl").read_bytes().decode().split("\n") if line.strip()]
    data = IndexedDataset(str(out))
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    kept = [line for line in lines if line]
    assert len(data) == len(kept)
    for ids, text in zip(data, kept, strict=True):
        assert (
            ids.tolist()[: len(tokenizer.encode(text, add_special_tokens=False).ids)]
            == tokenizer.encode(text, add_special_tokens=False).ids
        )


def make_ids(folder):
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file({"input_ids": torch.arange(12).view(3, 4), "other": torch.zeros(3)}, folder / "ids.safetensors")


def read_token_ids(folder):
    from megatron_hypenet.cli.score import read_ids

    return read_ids(folder / "ids.safetensors", TEACHER).tolist()


def ids_are_the_files(folder, out, said, whole):
    from safetensors.torch import load_file

    ids = load_file(folder / "ids.safetensors")["input_ids"]
    assert json.loads(said) == ids.tolist() and 0 <= ids.min() and ids.max() < TEACHER.vocab_size


# scores, run folders


def make_scores(folder):
    folder.mkdir(exist_ok=True)
    (folder / "scores.json").write_text(
        json.dumps({"num_layers": 4, "layers": {str(i): {"recall": 50 - i, "commonsense": 40.5 + i} for i in range(4)}})
    )
    (folder / "mixers.json").write_text(json.dumps({"mixer_types": ["attn", "lightning_attn"] * 2, "attention_layers": [0, 2]}))


def scores_are_numbers(folder, out, said, whole):
    layers = json.loads((folder / "scores.json").read_text())["layers"]
    assert sorted(layers, key=int) == [str(i) for i in range(len(layers))]
    for entry in layers.values():
        assert all(
            isinstance(entry[name], int | float) and not isinstance(entry[name], bool) and math.isfinite(entry[name])
            for name in entry
            if name in ("recall", "commonsense")
        )
        assert {"recall", "commonsense"} <= set(entry)
    assert len(json.loads(said)["attention_layers"]) == 1


def read_mixers(folder):
    from megatron_hypenet.stages.select import load_selection

    return load_selection(folder / "mixers.json", num_layers=4).to_json()


def mixers_are_the_files(folder, out, said, whole):
    plain, printed = json.loads((folder / "mixers.json").read_text()), json.loads(said)
    assert printed["mixer_types"] == plain["mixer_types"] and printed["attention_layers"] == sorted(plain["attention_layers"])
    assert all(type(layer) is int for layer in plain["attention_layers"]) and len(plain["mixer_types"]) == 4
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
    job = {"id": 12, "part": "all", "script": "job.sh", "submitted": "2026-01-01T00:00:00+00:00", "after": None, "exclude": ["n1"]}
    (folder / "jobs.json").write_text(json.dumps({"jobs": [job, {**job, "id": 13, "after": 12}]}))
    source = {"source": "x", "prefix": "train_000", "fingerprint": [1, ["x", 2, 3]], "documents": 4, "tokens": 16}
    recall = {"words": [1, 2, 3], "opening": [4], "separator": [], "closing": [5]}
    content = {"vocab_size": 1000, "end_of_document": 0, "train": [source], "heldout": None, "recall": recall}
    (folder / "corpus.json").write_text(json.dumps(content))
    make_tokens(folder)
    for suffix in ("bin", "idx"):
        (folder / f"text.{suffix}").rename(folder / f"train_000.{suffix}")
    (folder / "timing.json").write_text(json.dumps({"grace_seconds": 90, "stages": {"align": {"grace_seconds": 90, "step_seconds": 0.5}}}))
    (folder / "losses.jsonl").write_text(
        "".join(json.dumps({"step": i + 1, "loss": 0.5, "grad_norm": 1.0, "lr": 1e-3}) + "\n" for i in range(4))
    )
    beat = {
        "life": "x", "rank": 0, "host": "n", "pid": 5, "state": "running", "beats": 3, "begun": 1, "stage": "align", "phase": "edge",
        "iteration": 1, "train_iters": 5, "silent_seconds": 0.1,
    }  # fmt: skip
    (folder / "beat.json").write_text(json.dumps(beat))
    record = {"life": "x", "time": 1.5, "host": "n", "rank": 0, "stage": "", "phase": "", "iteration": 0, "train_iters": 0, "type": "E"}
    record |= {"error": "e", "code": 5, "echo": False, "traceback": "t"}
    (folder / "error.json").write_text(json.dumps(record))
    row = {"model": "teacher", "heldout_loss": 1.5, "recall": {"1": 50.0}}
    (folder / "report").mkdir()
    (folder / "report" / "report.png").touch()  # the command draws it anew
    (folder / "report" / "report.json").write_text(json.dumps({"rows": [row], "seq_length": 16, "attention_layers": [0], "seconds": 2.5}))


def read_run_folder(folder):
    from megatron_hypenet.cli.first_error import _from_record
    from megatron_hypenet.cli.jobs import Jobs
    from megatron_hypenet.data.corpus import open_corpus
    from megatron_hypenet.engine import faults, heartbeat, timing
    from megatron_hypenet.engine.metrics import read_losses
    from megatron_hypenet.engine.run_folder import RunFolder

    jobs, place = Jobs(folder), RunFolder(folder)
    for job in jobs.all:
        jobs.events(job), jobs.attempts(job), jobs.log(job)
    for record in place.records().values():
        record["seconds"] + 1.0
    place.started("align")
    corpus = open_corpus(folder, heldout_fraction=0.3, seed=0)
    corpus.heldout_sequences(1, 2)
    losses = [record["step"] + record["loss"] for record in read_losses(folder / "losses.jsonl")]
    beat, fault = heartbeat.read_beat(folder / "beat.json", "x"), faults._read_record(folder / "error.json", "x")
    told = _from_record(folder / "error.json")
    assert beat is None or beat.where()
    return {
        "jobs": len(jobs.all),
        "grace": timing.read(folder).get("grace_seconds"),
        "losses": losses,
        "fault": fault,
        "told": told and told.kind,
    }


def run_folder_is_plain(folder, out, said, whole):
    """What decides anything is in the files as a plain parser reads them."""
    printed, jobs = json.loads(said), json.loads((folder / "jobs.json").read_text())
    assert printed["jobs"] == len(jobs["jobs"]) and all(type(job["id"]) is int for job in jobs["jobs"])
    manifest = json.loads((folder / "manifest.json").read_text())
    assert all(isinstance(step["fingerprint"], str) for step in manifest.get("steps", {}).values())


# configurations


def make_config(folder):
    folder.mkdir(exist_ok=True)
    stage = {"train_iters": 2, "seq_length": 16, "micro_batch_size": 1, "global_batch_size": 2, "lr": 1e-3, "min_lr": 1e-4}
    values = {"output_dir": "run", "teacher": str(TOKENIZER), "data": {"train": ["text.txt"]}, "device": "cpu", "precision": "float32"}
    (folder / "run.yaml").write_text(yaml.safe_dump(values | {"align": stage, "distill": stage, "finetune": stage}))
    shutil.copy(ROOT / "configs" / "cluster" / "h100_infiniband.yaml", folder / "cluster.yaml")
    shutil.copy(ROOT / "configs" / "model" / "hypenet_2b.yaml", folder / "model.yaml")
    (folder / "hosts").write_text("worker-1 slots=8\nworker-2 slots=8\n# a comment\n")


def flat(value, prefix=""):
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {key: leaf for name, inner in value.items() for key, leaf in flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()}


def same_leaf(one, other):
    if isinstance(one, list) or isinstance(other, list):
        one, other = (value if isinstance(value, list) else [value] for value in (one, other))
        return len(one) == len(other) and all(map(same_leaf, one, other))
    try:
        return type(one) is type(other) and one == other or math.isclose(float(one), float(other), rel_tol=1e-12)
    except (TypeError, ValueError, OverflowError):
        return str(one) == str(other) or (isinstance(one, str) and str(other).endswith(one.rstrip("/")))


def settings_are_the_files(name, folder, out, said, whole):
    """Every setting in the file has, in the configuration that was read, the value that PyYAML reads."""
    text = (folder / name).read_text()
    try:
        plain = flat(yaml.safe_load(text))
    except ValueError:  # a number too long for Python is text
        plain = flat(yaml.load(text, yaml.BaseLoader))
    printed = flat(json.loads(said))
    for key, value in plain.items():
        assert not key or (value == {} or same_leaf(value, printed.get(key))), f"{key}: {value!r} in the file, {printed.get(key)!r} read"


def read_cluster(folder):
    from megatron_hypenet.config.cluster import load_cluster_config

    return load_cluster_config(folder / "cluster.yaml").model_dump(mode="json")


def read_model(folder):
    from megatron_hypenet.config.loader import load_model_config

    return load_model_config(folder / "model.yaml").model_dump(mode="json")


def read_hosts(folder):
    from launchers.hostfile import read_hostfile

    return [[host.name, host.slots] for host in read_hostfile(folder / "hosts")]


def hosts_are_the_lines(folder, out, said, whole):
    import re

    lines = [line.partition("#")[0].strip() for line in (folder / "hosts").read_text().split("\n")]
    want = [
        [name, int(slots)] for name, slots in (re.fullmatch(r"([A-Za-z0-9_.-]+)\s+slots=(\d+)", line).groups() for line in lines if line)
    ]
    assert json.loads(said) == want and all(0 < slots < 10_000 for _, slots in want)


JSON = (m.change_json,) * 6 + m.ANY
CONFIG = (m.change_yaml,) * 6 + m.ANY
WEIGHTS = (m.change_safetensors_header,) * 4 + m.ANY
PICKLE = (m.change_pickle,) * 6 + m.ANY
ZIP = (m.change_zip,) * 5 + m.ANY
IMPORT = verb("convert", "import", "FOLDER", "OUT")
EXPORT = verb("convert", "export", "FOLDER", "OUT")
RANK = verb("select", "rank", "--scores", "FOLDER/scores.json", "--num-attention", "1", "--json")
PREPARE = verb("data", "prepare", "FOLDER/text.jsonl", "OUT", "--tokenizer", str(TOKENIZER))
TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "config.json")
RUN_JSON = ("manifest.json", "jobs.json", "corpus.json", "timing.json", "beat.json", "error.json")

SUBJECTS = {
    "config.json": Subject(make=make_model, files={"config.json": JSON}, read=IMPORT, accepted=imported_as_it_says),
    "generation_config": Subject(make=make_model, files={"generation_config.json": JSON}, read=IMPORT, accepted=imported_as_it_says),
    "safetensors": Subject(make=make_model, files={"model.safetensors": WEIGHTS}, read=IMPORT, accepted=imported_as_it_says),
    "index": Subject(
        make=partial(make_model, index=True), files={"model.safetensors.index.json": JSON, "part1.safetensors": WEIGHTS}, read=IMPORT,
        accepted=imported_as_it_says,
    ),
    "tokenizer": Subject(
        make=make_model_with_tokenizer, files=dict.fromkeys(TOKENIZER_JSON, JSON) | {"merges.txt": (m.change_lines, *m.ANY)},
        read=IMPORT, accepted=tokenizer_works,
    ),
    "checkpoint": Subject(
        make=make_checkpoint, read=EXPORT, accepted=nothing_is_accepted,
        files={
            "manifest.json": JSON, "model.json": JSON, "COMMITTED": m.BYTES[:1] + m.BYTES[2:6] + m.ANY[-1:], "weights/.metadata": PICKLE,
            "weights/__0_0.distcp": ZIP, "weights/metadata.json": JSON,
        },
    ),
    "rehashed checkpoint": Subject(
        make=make_checkpoint, read=EXPORT, accepted=exported_as_torch_reads_it, mend=write_hashes,
        files={
            "manifest.json": JSON, "model.json": JSON, "weights/.metadata": PICKLE, "weights/__0_0.distcp": ZIP, "weights/common.pt": ZIP,
        },
    ),
    "train_state": Subject(
        make=make_training_state, files={"train_state.json": JSON}, read=call(read_train_state), mend=write_hashes,
        accepted=partial(says_what_the_file_says, "train_state.json"),
    ),
    "token files": Subject(
        make=make_tokens, files={"text.idx": (m.change_index_number,) * 6 + m.ANY, "text.bin": m.ANY},
        read=verb("data", "inspect", "FOLDER/text", "--json"), accepted=as_megatron_reads_it,
    ),
    "jsonl": Subject(make=make_text, files={"text.jsonl": (m.change_lines,) * 6 + m.ANY}, read=PREPARE, accepted=documents_are_the_lines),
    "token ids": Subject(make=make_ids, files={"ids.safetensors": WEIGHTS}, read=call(read_token_ids), accepted=ids_are_the_files),
    "scores": Subject(make=make_scores, files={"scores.json": JSON}, read=RANK, accepted=scores_are_numbers),
    "mixers": Subject(make=make_scores, files={"mixers.json": JSON}, read=call(read_mixers), accepted=mixers_are_the_files),
    "run folder": Subject(
        make=make_run_folder, files=dict.fromkeys(RUN_JSON, JSON) | {"losses.jsonl": (m.change_lines, *m.ANY)}, read=call(read_run_folder),
        accepted=run_folder_is_plain,
    ),
    "report": Subject(
        make=make_run_folder, files={"report/report.json": JSON}, read=verb("report", "FOLDER"), accepted=lambda *_: None,
    ),
    "run yaml": Subject(
        make=make_config, files={"run.yaml": CONFIG}, read=verb("config", "show", "FOLDER/run.yaml", "--json"),
        accepted=partial(settings_are_the_files, "run.yaml"),
    ),
    "cluster yaml": Subject(
        make=make_config, files={"cluster.yaml": CONFIG}, read=call(read_cluster), accepted=partial(settings_are_the_files, "cluster.yaml"),
    ),
    "model yaml": Subject(
        make=make_config, files={"model.yaml": CONFIG}, read=call(read_model), accepted=partial(settings_are_the_files, "model.yaml"),
    ),
    "hostfile": Subject(
        make=make_config, files={"hosts": (m.change_lines,) * 3 + m.ANY}, read=call(read_hosts), accepted=hosts_are_the_lines,
    ),
}  # fmt: skip
"""Kind -> how it is tested."""
