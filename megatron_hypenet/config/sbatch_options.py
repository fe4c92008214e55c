"""Options of sbatch and srun that a cluster profile may not add, because the job script sets them
or would no longer work with them.

SLURM's commands read options with getopt: long ones may be shortened as long as they are
unambiguous, short ones may be joined (`-Qa1-3`), and a value may follow as the next word.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

_SET_BY_SCRIPT = "the job script sets it"
_LOGS = "`hypenet logs` looks for the logs where the job script puts them, in the run folder"
_PRINTS = "sbatch only prints then, and submits nothing"

SBATCH: Mapping[str, str] = {
    "array a": "tasks of an array would write over each other in one run folder; "
    "jobs start again by "
    "themselves, as often as cluster.requeue.limit says, and --chain gives each stage a job",
    "wrap": "the job script is what runs",
    "requeue": "jobs start again by themselves; cluster.requeue.limit=0 never does",
    "no-requeue": "the job script starts the job again; cluster.requeue.limit=0 never does",
    "signal": "runs are warned before their end by cluster.grace_seconds",
    "output o": _LOGS,
    "error e": _LOGS,
    "open-mode": _LOGS,
    "chdir D": "relative paths count from the folder that you submit from",
    "job-name J": "the name follows from the run folder; --comment is yours",
    "nodes N": "use cluster.nodes or --nodes, which the layout is checked with",
    "ntasks n": "use cluster.nodes and cluster.tasks_per_node, which the layout is checked with",
    "ntasks-per-node": "use cluster.tasks_per_node, which the layout is checked with",
    "tasks-per-node": "use cluster.tasks_per_node, which the layout is checked with",
    "gpus-per-node": "use cluster.gpus_per_node and cluster.gpu_type",
    "cpus-per-task c": "use cluster.cpus_per_task, which srun gets, too",
    "mem": "use cluster.memory",
    "time t": "use cluster.time, which grace_seconds is checked with",
    "partition p": "use cluster.partition or --partition",
    "account A": "use cluster.account or --account",
    "qos q": "use cluster.qos or --qos",
    "exclude x": "use cluster.exclude, which `hypenet requeue --exclude` adds to",
    "export": "use cluster.environment for variables of your shell, cluster.variables for values",
    "export-file": "use cluster.variables",
    "dependency d": "use --after JOBID; --chain makes the jobs of a run wait for each other",
    "kill-on-invalid-dep": "`hypenet submit` sets it for jobs that wait for another",
    "clusters M": "set SLURM_CLUSTERS in your shell, which `hypenet status`, "
    "`cancel` and `requeue` "
    "need, too",
    "no-kill k": "a job that has lost a node would stay, and its processes wait for ever",
    "parsable": "`hypenet submit` sets it",
    "wait W": "`hypenet submit` returns at once; `hypenet status` shows how far the run is",
    "test-only": "use `hypenet submit --test-only`",
    "help h": _PRINTS,
    "usage": _PRINTS,
    "version V": _PRINTS,
}
"""Name and letter of each refused option of sbatch, and what to do instead."""

SRUN: Mapping[str, str] = {
    "nodes N": "use cluster.nodes",
    "ntasks n": "use cluster.tasks_per_node",
    "ntasks-per-node": "use cluster.tasks_per_node",
    "tasks-per-node": "use cluster.tasks_per_node",
    "cpus-per-task c": "use cluster.cpus_per_task",
    "output o": _LOGS,
    "error e": _LOGS,
    "label l": _LOGS,
    "chdir D": "relative paths count from the folder that you submit from",
    "export": "use cluster.environment or cluster.variables",
    "kill-on-bad-exit K": "a task that fails has to end the others, which wait for it",
    "no-kill k": "a step that has lost a node would stay, and its processes wait for ever",
    "wait W": "tasks leave at their own pace",
    "time t": "use cluster.time: a step that ends before its job is not warned",
    "relative r": "rank 0 has to be on the first node, where the others look for it",
    "jobid": _SET_BY_SCRIPT,
    "het-group": "all processes of a run are in one step",
    "multi-prog": "all processes of a run do the same command",
    "pty": "a job has no terminal",
    "no-allocate Z": "the step belongs to its job",
    "clusters M": "the step belongs to its job",
    "test-only": "srun only prints then, and starts nothing",
    "help h": "srun only prints then, and starts nothing",
    "usage": "srun only prints then, and starts nothing",
    "version V": "srun only prints then, and starts nothing",
}
"""Name and letter of each refused option of srun, and what to do instead."""

_WITHOUT_VALUE = "EHOQXsuv"  # letters of both commands after which another letter may follow


def words_of(option: str) -> list[str]:
    """Return the words of one entry of sbatch_args, quoted as in a shell: `--comment="a b" -C gpu`.
    Raises ValueError."""
    try:
        return shlex.split(option)
    except ValueError as error:
        raise ValueError(f"{option!r}: {error}") from None


def check_options(words: Sequence[str], refused: Mapping[str, str]) -> None:
    """Raise ValueError that names the first of `words` that is among the `refused` options, or is
    no option, and says what to do."""
    takes_value = False
    for word in words:
        if word.startswith("--") and word != "--":
            name, equals, _ = word[2:].partition("=")
            _refuse(word, [key for key in refused if key.split()[0].startswith(name)], refused)
            takes_value = not equals
        elif word.startswith("-") and word not in ("-", "--"):
            takes_value = _check_letters(word, refused)
        elif takes_value:
            takes_value = False
        else:
            raise ValueError(
                f"{word!r} is not an option; write --name=value, and quote a value with spaces: "
                "'--comment=\"a b\"'"
            )


def _check_letters(word: str, refused: Mapping[str, str]) -> bool:
    """Raise ValueError as `check_options` does; return whether the next word is the value of this
    one."""
    for place, letter in enumerate(word[1:], start=1):
        _refuse(word, [key for key in refused if key.split()[1:] == [letter]], refused)
        if letter not in _WITHOUT_VALUE:
            return place == len(word) - 1
    return False


def _refuse(word: str, keys: Sequence[str], refused: Mapping[str, str]) -> None:
    if keys:
        raise ValueError(f"{word!r} is not possible (--{keys[0].split()[0]}): {refused[keys[0]]}")
