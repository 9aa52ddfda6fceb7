#!/usr/bin/env bash
# One rank of a run: srun starts this once per task, with the Python command to run. It says where the rank stands in the world.
set -uo pipefail

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$PROCESSES_PER_NODE

# USR1 and USR2 would kill a rank that is still importing: Python inherits that they are ignored and listens as soon as it can
# (endprompt/training/stopping.py, stacks.py). train.sh sends USR1 again and again.
trap '' USR1 USR2
exec "$1" -S slurm/lib/supervise.py "$@"
