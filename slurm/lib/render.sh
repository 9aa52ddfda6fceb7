#!/usr/bin/env bash
# What a script would do, without doing it: bash slurm/extend_70b_128k.sh --render

# render RECIPE ENGINE SCRIPT: SLURM's options and the commands of a first start, as they would run.
render() {
    local nodes
    nodes=$(sbatch_option "$3" nodes)
    PROCESSES_PER_NODE=${PROCESSES_PER_NODE:-$(sbatch_option "$3" gpus-per-node)} ATTEMPT=$RUNS/RUN/attempts/JOB-0
    recipe_facts "$1"
    ATTEMPT=$RUN_FOLDER/attempts/JOB-0
    SLURM_NNODES=$nodes SLURM_CPUS_ON_NODE=$((12 * PROCESSES_PER_NODE)) NODES=NODES
    step_options
    training_command
    echo "# sbatch"
    grep '^#SBATCH' "$3"
    echo "# on every start"
    rendered "$PYTHON" tools/cluster_job.py begin --recipe "$RECIPE" "${SETS[@]}" --job JOB --restart 0 --nodes NODES
    preflight_commands
    rendered "$PYTHON" "${HEAD[@]}"
    rendered "${STEP[@]}" --time=10 --job-name=preflight slurm/lib/rank.sh "${CHECK_RANK[@]}"
    rendered "$PYTHON" "${JUDGE[@]}"
    rendered "${STEP[@]}" --job-name=train slurm/lib/rank.sh "${TRAIN[@]}"
    rendered "$PYTHON" tools/cluster_job.py end --recipe "$RECIPE" "${SETS[@]}" --job JOB --restart 0 --ranks "$((nodes * PROCESSES_PER_NODE))" --exit-code CODE
    echo "# once finished"
    [[ $EVALUATE == no ]] || rendered sbatch slurm/evaluate.sh "$RECIPE"
}

# rendered WORDS: one command, an option a line.
rendered() {
    local word line=
    for word in "$@"; do
        printf -v word '%q' "$word"
        if [[ $word == --* && -n $line ]]; then
            echo "$line \\"
            line="    $word"
        else
            line+=${line:+ }$word
        fi
    done
    echo "$line"
}
