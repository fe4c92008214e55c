"""The environment in which SLURM's commands are called."""

from __future__ import annotations

from collections.abc import Mapping

_INPUTS = (
    "SLURM", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "PMI_", "PMIX_",
)  # fmt: skip
_SAY_WHICH_CLUSTER = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})


def own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return `environment` without the variables that SLURM's commands take for options, except
    those that say which cluster to ask.

    A shell inside an allocation is full of them. sbatch prefers them to the script and hands all
    SLURM_* to the job, where srun would obey them.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in _SAY_WHICH_CLUSTER or not name.startswith(_INPUTS)
    }
