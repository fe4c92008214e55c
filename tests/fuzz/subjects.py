"""The kinds of files that are damaged: how a whole one is made, what reads it, and the independent
rule for what may be accepted."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.fuzz import mutations as m
from tests.fuzz.checkpoints import (
    exported_as_torch_reads_it,
    make_checkpoint,
    make_training_state,
    nothing_is_accepted,
    read_train_state,
    says_what_the_file_says,
    write_hashes,
)
from tests.fuzz.configurations import (
    hosts_are_the_lines,
    make_config,
    read_cluster,
    read_hosts,
    read_model,
    settings_are_the_files,
)
from tests.fuzz.hf_folders import (
    encoded,
    encoded_as_ids,
    imported_as_it_says,
    make_model,
    make_model_with_tokenizer,
    tokenizer_works,
)
from tests.fuzz.megatron import imported_as_torch_reads_it, make_megatron
from tests.fuzz.reading import TOKENIZER, call, verb
from tests.fuzz.run_folders import (
    make_run_folder,
    make_scores,
    mixers_are_the_files,
    read_mixers,
    read_run_folder,
    run_folder_is_plain,
    scores_are_numbers,
)
from tests.fuzz.token_files import (
    as_megatron_reads_it,
    documents_are_the_lines,
    ids_are_the_files,
    make_ids,
    make_text,
    make_tokens,
    read_token_ids,
)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One kind of file. The folder that `make` fills is copied for every input, and one of `files`
    in it is damaged."""

    make: Callable[[Path], None]
    files: dict[str, tuple]
    """File, relative to the folder -> its mutations."""
    read: Callable[[Path, Path], int]
    """Read the folder and write into a place that does not exist: the exit code, with the error on
    stderr."""
    accepted: Callable[[Path, Path, str, Path], object]
    """Asserts that an accepted input was harmless: (folder, what was written, what was printed, the
    undamaged folder)."""
    mend: Callable[[Path, str], None] = lambda folder, name: None
    """What whoever damaged the file on purpose would do next, as writing hashes anew."""


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
    "config.json": Subject(
        make=make_model, files={"config.json": JSON}, read=IMPORT, accepted=imported_as_it_says
    ),
    "generation_config": Subject(
        make=make_model,
        files={"generation_config.json": JSON},
        read=IMPORT,
        accepted=imported_as_it_says,
    ),
    "safetensors": Subject(
        make=make_model,
        files={"model.safetensors": WEIGHTS},
        read=IMPORT,
        accepted=imported_as_it_says,
    ),
    "index": Subject(
        make=partial(make_model, index=True),
        files={"model.safetensors.index.json": JSON, "part1.safetensors": WEIGHTS},
        read=IMPORT,
        accepted=imported_as_it_says,
    ),
    "tokenizer": Subject(
        make=make_model_with_tokenizer,
        files=dict.fromkeys(TOKENIZER_JSON, JSON) | {"merges.txt": (m.change_lines, *m.ANY)},
        read=IMPORT,
        accepted=tokenizer_works,
    ),
    "tokenizer of a user": Subject(
        make=make_model_with_tokenizer,
        files=dict.fromkeys(TOKENIZER_JSON, JSON),
        read=call(encoded),
        accepted=encoded_as_ids,
    ),
    "checkpoint": Subject(
        make=make_checkpoint,
        read=EXPORT,
        accepted=nothing_is_accepted,
        files={
            "manifest.json": JSON,
            "model.json": JSON,
            "COMMITTED": m.BYTES[:1] + m.BYTES[2:6] + m.ANY[-1:],
            "weights/.metadata": PICKLE,
            "weights/__0_0.distcp": ZIP,
            "weights/metadata.json": JSON,
        },
    ),
    "rehashed checkpoint": Subject(
        make=make_checkpoint,
        read=EXPORT,
        accepted=exported_as_torch_reads_it,
        mend=write_hashes,
        files={
            "manifest.json": JSON,
            "model.json": JSON,
            "weights/.metadata": PICKLE,
            "weights/__0_0.distcp": ZIP,
            "weights/common.pt": ZIP,
        },
    ),
    "megatron": Subject(
        make=make_megatron,
        read=verb("convert", "from-megatron", "FOLDER", "OUT"),
        accepted=imported_as_torch_reads_it,
        files={
            "latest_checkpointed_iteration.txt": m.ANY,
            "release/.metadata": PICKLE,
            "release/__0_0.distcp": ZIP,
            "release/common.pt": ZIP,
            "release/metadata.json": JSON,
        },
    ),
    "train_state": Subject(
        make=make_training_state,
        files={"train_state.json": JSON},
        read=call(read_train_state),
        mend=write_hashes,
        accepted=partial(says_what_the_file_says, "train_state.json"),
    ),
    "token files": Subject(
        make=make_tokens,
        files={"text.idx": (m.change_index_number,) * 6 + m.ANY, "text.bin": m.ANY},
        read=verb("data", "inspect", "FOLDER/text", "--json"),
        accepted=as_megatron_reads_it,
    ),
    "jsonl": Subject(
        make=make_text,
        files={"text.jsonl": (m.change_lines,) * 6 + m.ANY},
        read=PREPARE,
        accepted=documents_are_the_lines,
    ),
    "token ids": Subject(
        make=make_ids,
        files={"ids.safetensors": WEIGHTS},
        read=call(read_token_ids),
        accepted=ids_are_the_files,
    ),
    "scores": Subject(
        make=make_scores, files={"scores.json": JSON}, read=RANK, accepted=scores_are_numbers
    ),
    "mixers": Subject(
        make=make_scores,
        files={"mixers.json": JSON},
        read=call(read_mixers),
        accepted=mixers_are_the_files,
    ),
    "run folder": Subject(
        make=make_run_folder,
        files=dict.fromkeys(RUN_JSON, JSON) | {"losses.jsonl": (m.change_lines, *m.ANY)},
        read=call(read_run_folder),
        accepted=run_folder_is_plain,
    ),
    "report": Subject(
        make=make_run_folder,
        files={"report/report.json": JSON},
        read=verb("report", "FOLDER"),
        accepted=lambda *_: None,
    ),
    "run yaml": Subject(
        make=make_config,
        files={"run.yaml": CONFIG},
        read=verb("config", "show", "FOLDER/run.yaml", "--json"),
        accepted=partial(settings_are_the_files, "run.yaml"),
    ),
    "cluster yaml": Subject(
        make=make_config,
        files={"cluster.yaml": CONFIG},
        read=call(read_cluster),
        accepted=partial(settings_are_the_files, "cluster.yaml"),
    ),
    "model yaml": Subject(
        make=make_config,
        files={"model.yaml": CONFIG},
        read=call(read_model),
        accepted=partial(settings_are_the_files, "model.yaml"),
    ),
    "hostfile": Subject(
        make=make_config,
        files={"hosts": (m.change_lines,) * 3 + m.ANY},
        read=call(read_hosts),
        accepted=hosts_are_the_lines,
    ),
}
"""Kind -> how it is tested."""
