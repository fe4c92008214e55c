"""Programs in the place of SLURM's, which say what a test wants to be said and note how they were
called."""

import json
import os

SHELL = """#!/bin/sh
printf '%s\\n' "$(basename "$0") $*" >> {calls}
{script}
"""


class Answers:
    """`answers["squeue"] = shell script` decides what squeue says and does."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder / "bin"
        self.folder.mkdir()
        self.file = folder / "calls"
        monkeypatch.setenv("PATH", f"{self.folder}{os.pathsep}{os.environ['PATH']}")
        for name in ("squeue", "sbatch", "scancel", "scontrol"):
            self[name] = "true"

    def __setitem__(self, name, script):
        path = self.folder / name
        path.write_text(SHELL.format(calls=self.file, script=script))
        path.chmod(0o755)

    def queue(self, *rows):
        """squeue knows these jobs: (number, state) or with reason, nodes and time left."""
        lines = ["|".join(map(str, (*row, *("None", "", "")[: 5 - len(row)]))) for row in rows]
        self["squeue"] = "cat <<'END'\n" + "\n".join(lines) + "\nEND" if lines else "true"

    def calls(self, name=""):
        """Return the command lines so far, those of `name` only if it is given."""
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        return [line for line in lines if line.startswith(name)]


def run_with_jobs(folder, *jobs):
    """Make a run folder whose jobs.json has (id, part) each."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("x: 1\n")
    rows = [
        {
            "id": number,
            "part": part,
            "script": f"job_{part}.sbatch",
            "submitted": "2026-11-23T12:00:00+00:00",
            "after": None,
            "exclude": [],
        }
        for number, part in jobs
    ]
    for _, part in jobs:
        (folder / f"job_{part}.sbatch").write_text("#!/bin/bash\n")
    (folder / "jobs.json").write_text(json.dumps({"jobs": rows}))
    return folder


def attempt(folder, job, number=0, *events):
    """Make the folder of a start of a job, with lines in its events."""
    path = folder / "logs" / f"job-{job}" / f"attempt-{number}"
    path.mkdir(parents=True)
    with (path.parent / "events").open("a") as stream:
        stream.writelines(f"{1_700_000_000 + number} {number} {text}\n" for text in events)
    return path
