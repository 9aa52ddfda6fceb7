#!/usr/bin/env bash
# The ranks of a job: how many, where they meet, and the srun that starts one per process.

# describe_world: PROCESSES_PER_NODE, NODES, RESTART, where ranks meet, and STEP.
describe_world() {
    RESTART=${SLURM_RESTART_COUNT:-0}
    # In commands SLURM_JOB_ID would mean the whole array to an array's last task.
    JOB=$SLURM_JOB_ID
    [[ -z ${SLURM_ARRAY_JOB_ID:-} ]] || JOB=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    if [[ -z $PROCESSES_PER_NODE ]]; then
        [[ $DEVICE == cuda ]] || die "$CONFIG: PROCESSES_PER_NODE: is empty, and DEVICE=cpu has no GPUs to count; give a number"
        PROCESSES_PER_NODE=${SLURM_GPUS_ON_NODE:-}
        [[ $PROCESSES_PER_NODE =~ ^[1-9][0-9]*$ ]] || die "$CONFIG: PROCESSES_PER_NODE: SLURM does not say how many GPUs a node has; give a number"
    fi
    NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
    # From job and restart: two jobs may meet on one node, and a requeued one must not find its own old port in TIME_WAIT.
    # Below 32768, where the kernel's own choice begins; even, for the preflight takes the next.
    export MASTER_ADDR=${NODES%%,*} MASTER_PORT=$((20000 + (SLURM_JOB_ID * 7 + RESTART) * 2 % 12000)) PROCESSES_PER_NODE
    step_options
}

# step_options: the array STEP, srun and its options without a name.
step_options() {
    local cpus=$((SLURM_CPUS_ON_NODE / PROCESSES_PER_NODE))
    ((cpus > 0)) || cpus=1
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cpus > 8 ? 8 : cpus))}
    # Until 23.11 srun did not take --cpus-per-task from the job, hence here. The first rank that fails ends the others: they
    # would wait for it in a collective for two hours.
    # block: consecutive ranks share a socket, as the GPUs that they take by number do.
    STEP=(srun --export=ALL --nodes="$SLURM_NNODES" --ntasks="$((SLURM_NNODES * PROCESSES_PER_NODE))" --ntasks-per-node="$PROCESSES_PER_NODE"
        --cpus-per-task="$cpus" --distribution=block:block --kill-on-bad-exit=1 --wait=120 "${CONTAINER[@]}")
}
