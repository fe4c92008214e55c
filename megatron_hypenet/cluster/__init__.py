"""Nodes and jobs: checks of an allocation, sbatch scripts, SLURM's answers, and the first error of
a job of many processes."""
