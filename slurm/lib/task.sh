#!/usr/bin/env bash
# Jobs of one process: prepare, convert, evaluate.
source slurm/lib/config.sh

# begin_task SCRIPT USAGE COUNT [ARGUMENTS]: the settings, inside a job; outside one, check the arguments and submit SCRIPT.
begin_task() {
    local job script=$1 usage=$2 count=$3
    shift 3
    load_config
    (($# >= count)) || die "usage: sbatch $script $usage"
    if ! in_job; then
        need_sbatch
        job=$(submit "$script" "$@") || die "sbatch refused; the line above says why"
        say "submitted job $job"
        exit 0
    fi
    CPUS=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-1}}
    say "job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}, on $SLURM_JOB_NODELIST: $script $*"
}

# alone COMMAND: Python on the job's node with all that the job has there.
alone() {
    srun --export=ALL --nodes=1 --ntasks=1 --cpus-per-task="$CPUS" "${CONTAINER[@]}" "$PYTHON" "$@"
}
