#!/usr/bin/env bash
# What every slurm/extend_*.sh does: check, train, survive, and hand on to export and evaluation.
source slurm/lib/config.sh
source slurm/lib/world.sh
source slurm/lib/preflight.sh
source slurm/lib/train.sh
source slurm/lib/render.sh

# extend RECIPE ENGINE [SCRIPT ARGUMENTS]. ENGINE and OVERRIDES ("training.steps=100 seed=7") of the environment change engine
# and fields of the recipe for one job.
extend() {
    ! in_job || listen
    ENGINE=${ENGINE:-$2}
    load_config
    [[ $ENGINE == megatron || $ENGINE == deepspeed ]] || die "ENGINE: $ENGINE is neither megatron nor deepspeed; choose one"
    in_job || outside_a_job "$@"
    recipe_facts "$1"
    run_job
}

run_job() {
    describe_world
    say "job $JOB, restart $RESTART, on $NODES: $RECIPE with $ENGINE"
    [[ -z $SBATCH_PARTITION || ",$SBATCH_PARTITION," == *",$SLURM_JOB_PARTITION,"* ]] ||
        say "note: this is partition $SLURM_JOB_PARTITION, $CONFIG says $SBATCH_PARTITION: source $CONFIG before sbatch"
    ATTEMPT=$RUN_FOLDER/attempts/$SLURM_JOB_ID-$RESTART
    ACTION=
    eval "$(python_here tools/cluster_job.py begin --recipe "$RECIPE" "${SETS[@]}" --job "$SLURM_JOB_ID" --restart "$RESTART" \
        --nodes "$NODES" --max-restarts "$MAX_RESTARTS" --max-idle "$MAX_IDLE")"
    case $ACTION in
    go) say "$REASON" ;;
    finished)
        # Where the attempt that finished it did not live to hand on.
        [[ -f $RUN_FOLDER/evaluation/report.md ]] || finished
        say "$REASON"
        exit 0
        ;;
    *)
        say "given up: ${REASON:-the line above says why}"
        exit 1
        ;;
    esac
    HUNG=
    preflight || conclude
    training_command
    train "${TRAIN[@]}"
    conclude
}

training_command() {
    case $ENGINE in
    deepspeed) TRAIN=("$PYTHON" ds_train.py --recipe "$RECIPE" "${SETS[@]}") ;;
    megatron) TRAIN=("$PYTHON" -m megatron_patches.train --recipe "$RECIPE" "${SETS[@]}") ;;
    esac
}

finished() {
    local job
    say "$REASON"
    # A pipeline has queued it already.
    [[ $EVALUATE == yes && -z ${IN_PIPELINE:-} ]] || return 0
    if job=$(submit slurm/evaluate.sh "$RECIPE"); then
        say "export and evaluation: job $job"
    else
        say "export and evaluation could not be submitted; by hand: sbatch slurm/evaluate.sh $RECIPE"
    fi
}

# outside_a_job RECIPE ENGINE SCRIPT [--render | --check [--nodes=N] | OPTIONS OF SBATCH]
outside_a_job() {
    local job nodes
    case ${4:-} in
    --render) render "$@" ;;
    --check)
        recipe_facts "$1"
        nodes=$(sbatch_option "$3" nodes)
        [[ ${5:-} != --nodes=* ]] || nodes=${5#--nodes=}
        python_here tools/preflight.py head --recipe "$RECIPE" "${SETS[@]}" --engine "$ENGINE" --nodes "$nodes" \
            --processes-per-node "${PROCESSES_PER_NODE:-$(sbatch_option "$3" gpus-per-node)}" --device "$DEVICE" --gpu "$GPU"
        ;;
    *)
        need_sbatch
        job=$(submit "${@:4}" "$3") || die "sbatch refused; the line above says why"
        say "submitted job $job"
        ;;
    esac
    exit 0
}

sbatch_option() { sed -n "s/^#SBATCH --$2=//p" "$1"; }
