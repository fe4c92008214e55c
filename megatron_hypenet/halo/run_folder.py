"""The folder of one run: its paths, its owner, and the record of finished tasks.

    runs/NAME/  config.yaml  manifest.json  logs/  tb/  data/  teacher/  align/
                selection/{scores.json,mixers.json,importance.png}
                assembled/  distill/  finetune/  export/  report/report.{json,html,png}

A step is done when manifest.json records it with the fingerprint of its present inputs and its
result is still there. The record is written after the result, so a step that was interrupted is run
again (and its training continues from its newest checkpoint). What becomes of the results when the
configuration changes is in changes.py.

A newer version may know more settings than the one that began a run. Such a setting counts as set
to its default there: left at that, the run continues and no step is done again, because
manifest.json lists it as added later and fingerprints leave it out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_hypenet import ownership
from megatron_hypenet.atomic_files import is_temporary, sweep, write_json, write_text
from megatron_hypenet.checkpoint import format as fmt
from megatron_hypenet.checkpoint.manifest import FileEntry
from megatron_hypenet.config.loader import dump_config, read_stored
from megatron_hypenet.config.schema import STAGES, RunConfig
from megatron_hypenet.errors import ConfigError, DataError, UsageError
from megatron_hypenet.halo.fingerprints import FORM, flat_settings, removed, settled
from megatron_hypenet.supervision.request_files import stop_file
from megatron_hypenet.untrusted.files import FileKind, has_entry
from megatron_hypenet.untrusted.json_text import read_object, typed

_MANIFEST = FileKind(error=DataError, advice="delete it to run every step again")

_OWN_FOLDERS = (
    "teacher",
    "data",
    *STAGES,
    "selection",
    "assembled",
    "export",
    "report",
    "logs",
    "tb",
    "heartbeat",
    "errors",
)
_OWN_FILES = (
    "config.yaml",
    "manifest.json",
    "jobs.json",
    "faulty_nodes.json",
    "timing.json",
    "start.json",
    "rates.json",
    "job.sbatch",
    *(f"job_{part}.sbatch" for part in (*STAGES, "finish")),
)
"""Files that a run writes in its folder; others are the user's own."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run folder and the record of its finished steps."""

    root: Path
    manifest: Mapping[str, Any] | None = None
    """Records to go by in the place of the file's, for looking only; None reads the file."""

    @property
    def config_file(self) -> Path:
        """Return the file of the resolved configuration."""
        return self.root / "config.yaml"

    @property
    def manifest_file(self) -> Path:
        """Return the record of finished steps and of the software that ran them."""
        return self.root / "manifest.json"

    @property
    def tensorboard(self) -> Path:
        """Return the folder of TensorBoard event files of all stages."""
        return self.root / "tb"

    @property
    def teacher(self) -> Path:
        """Return the folder of the imported teacher."""
        return self.root / "teacher"

    @property
    def data(self) -> Path:
        """Return the folder of token files made of the text."""
        return self.root / "data"

    @property
    def log_file(self) -> Path:
        """Return the file of all output to the screen, with time stamps."""
        return self.root / "logs" / "hypenet.log"

    @property
    def scores_file(self) -> Path:
        """Return the file of per-layer scores of the selection sweep."""
        return self.root / "selection" / "scores.json"

    @property
    def mixers_file(self) -> Path:
        """Return the file of the chosen mixer of every layer."""
        return self.root / "selection" / "mixers.json"

    @property
    def importance_plot(self) -> Path:
        """Return the bar chart of the importances."""
        return self.root / "selection" / "importance.png"

    @property
    def assembled(self) -> Path:
        """Return the folder of the student before stage 2."""
        return self.root / "assembled"

    @property
    def export(self) -> Path:
        """Return the finished Hugging Face folder."""
        return self.root / "export"

    @property
    def report_file(self) -> Path:
        """Return the file of the report's numbers."""
        return self.root / "report" / "report.json"

    @property
    def report_page(self) -> Path:
        """Return the path of the report as one HTML page."""
        return self.root / "report" / "report.html"

    @property
    def report_plot(self) -> Path:
        """Return the file of the report's figure."""
        return self.root / "report" / "report.png"

    def stage(self, name: str) -> Path:
        """Return the folder of the checkpoints of training stage `name`."""
        return self.root / name

    def refuse_stop(self) -> None:
        """Raise UsageError when a STOP file exists; for the start of a command, before it does
        anything."""
        if (stop := stop_file([self.root, *map(self.stage, STAGES)])) is not None:
            raise UsageError(
                f"{stop} asks for a stop, and it was there before this command; "
                "delete it to start or continue the run"
            )

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Own the folder for the block, which may then write into it; made if it is missing.
        Temporary files of killed processes are removed.

        Raises UsageError when the folder holds something that is no run, and when another process
        owns it (ownership.py).
        """
        for place in (self.root, *self.root.parents):
            if place.exists() and not place.is_dir():
                raise UsageError(
                    f"output_dir={self.root}: {place} is a file, not a folder; "
                    "choose another output_dir"
                )
        if not has_entry(self.config_file) and not all(map(is_temporary, self._content())):
            raise UsageError(
                f"{self.root} is not empty and is not a run folder (it has no config.yaml); "
                "choose another output_dir"
            )
        self.root.mkdir(parents=True, exist_ok=True)
        try:
            # `submit` still owns the folder while the first of its jobs may start already
            patience = 60.0 if "SLURM_JOB_ID" in os.environ else 1.0
            with ownership.owning(self.root, inside=True, patience_seconds=patience):
                # before the sweep: a save that only lacks its final name gets it
                for stage in STAGES:
                    fmt.remove_stale(self.stage(stage) / fmt.CHECKPOINTS)
                sweep(self.root, names=(*_OWN_FOLDERS, *_OWN_FILES))
                for name in _OWN_FOLDERS:
                    sweep(self.root / name)
                yield
        finally:
            with contextlib.suppress(OSError):
                self.root.rmdir()  # if it is still empty

    def prepare(self, run: RunConfig, *, overwrite: bool = False) -> None:
        """Make the folder, which this process owns, ready for `run`; writes config.yaml. Whether
        `run` may continue in it is checked before (changes.py).

        Raises ConfigError that names settings which this version does not have.
        """
        if overwrite:
            for entry in self._content():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        else:
            self.check_known(run)
        if added := self.added_settings(run):  # before config.yaml has them, too
            self.write({**self._manifest(), "added_settings": sorted(added)})
        write_text(self.config_file, dump_config(run))

    def _content(self) -> list[Path]:
        """Return the content of the folder besides its owner file."""
        return (
            [entry for entry in self.root.iterdir() if entry.name != ownership.FILE]
            if self.root.is_dir()
            else []
        )

    def check_known(self, run: RunConfig) -> None:
        """Raise ConfigError where the stored configuration has settings that decide results and
        that this version does not have; does nothing for a new folder."""
        stored = self.stored_settings()
        if stored is None:
            return
        present = run.model_dump(mode="json")
        gone = removed(stored, present)
        if gone:
            software = self._manifest().get("software", {})
            raise ConfigError(
                f"{self.root} holds a run with settings that this version of hypenet does not "
                "have:\n  - "
                + "\n  - ".join(gone)
                + f"\nContinue it with the version that it was run with ({_named(software)}), "
                "use another output_dir, or --overwrite to "
                "delete it and start again."
            )

    def added_settings(self, run: RunConfig) -> frozenset[str]:
        """Return the settings of `run`, by dotted key, that the version which began the run in this
        folder did not have; none in a new folder."""
        noted = frozenset(self._manifest().get("added_settings", ()))
        stored = self.stored_settings()
        return (
            noted
            if stored is None
            else noted
            | (settled(run.model_dump(mode="json")).keys() - flat_settings(stored).keys())
        )

    def stored_settings(self) -> Mapping[str, Any] | None:
        """Return the content of config.yaml; None when it does not exist."""
        if not has_entry(self.config_file):
            return None
        try:
            return read_stored(self.config_file)
        except ConfigError as error:
            raise ConfigError(
                f"{error}; use another output_dir, or --overwrite to start again"
            ) from None

    def records(self) -> dict[str, dict[str, Any]]:
        """Return the finished steps by name: fingerprint, seconds, finished, and what the step
        reported."""
        return dict(self._manifest().get("steps", {}))

    def is_done(self, step: str, fingerprint: str, results: Iterable[Path]) -> bool:
        """Return whether `step` finished with these inputs and all its results are still there."""
        record = self.records().get(step)
        return (
            record is not None
            and record.get("fingerprint") == fingerprint
            and all(path.exists() for path in results)
        )

    def record(
        self,
        step: str,
        fingerprint: str,
        *,
        seconds: float,
        software: Mapping[str, Any],
        **details: Any,
    ) -> None:
        """Record that `step` is done; `software` has the versions that ran it."""
        manifest = self._manifest()
        steps = dict(manifest.get("steps", {}))
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        steps[step] = {
            "fingerprint": fingerprint,
            "seconds": round(seconds, 3),
            "finished": finished,
            **details,
        }
        self.write(
            {
                **manifest,
                "fingerprints": _form(manifest),
                "software": dict(software),
                "steps": steps,
            }
        )

    def begin(self, step: str, fingerprint: str) -> None:
        """Record that `step` was started with these inputs, so that another attempt with the same
        inputs may continue it."""
        manifest = self._manifest()
        steps = {name: record for name, record in manifest.get("steps", {}).items() if name != step}
        started = {**manifest.get("started", {}), step: fingerprint}
        self.write(
            {**manifest, "fingerprints": _form(manifest), "started": started, "steps": steps}
        )

    def started(self, step: str) -> str | None:
        """Return the fingerprint with which `step` was last started; None when it never was."""
        fingerprint: str | None = self._manifest().get("started", {}).get(step)
        return fingerprint

    def content(self) -> Mapping[str, Any]:
        """Return the whole record: steps, started, software, and what changes.py keeps in it."""
        return self._manifest()

    def write(self, manifest: Mapping[str, Any]) -> None:
        """Replace the whole record."""
        write_json(self.manifest_file, {**manifest, "format_version": 1})

    def _manifest(self) -> dict[str, Any]:
        if self.manifest is not None:
            return dict(self.manifest)
        if not has_entry(self.manifest_file):
            return {}
        manifest = read_object(_MANIFEST, self.manifest_file)
        typed(_MANIFEST, self.manifest_file, manifest, _Manifest)
        return manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """The entries in the record of a finished step; a step may add its own."""

    fingerprint: str
    seconds: float
    finished: str
    written: dict[str, FileEntry] = field(default_factory=dict)
    """Files that belong to no checkpoint, by their path in the run folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Software:
    """The code and libraries that ran a step."""

    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Manifest:
    """The form of the run's manifest."""

    steps: dict[str, _Step] = field(default_factory=dict)
    started: dict[str, str] = field(default_factory=dict)
    added_settings: list[str] = field(default_factory=list)
    fingerprints: int = 1
    redoing: str = ""
    software: _Software = field(default_factory=_Software)


def _form(manifest: Mapping[str, Any]) -> int:
    """Return the form of a manifest's fingerprints: the present one where it has none yet."""
    new = not (manifest.get("steps") or manifest.get("started"))
    form: int = manifest.get("fingerprints", FORM if new else 1)
    return form


def _named(software: Mapping[str, Any]) -> str:
    """Return the version and commit in a record of `software`, as far as it has them."""
    version = software.get("versions", {}).get("megatron-hypenet")
    commit = software.get("git_commit")
    return (
        ", ".join(
            filter(None, (version and f"megatron-hypenet {version}", commit and f"commit {commit}"))
        )
        or "which is not recorded"
    )
