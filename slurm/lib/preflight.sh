#!/usr/bin/env bash
# Check recipe, nodes and network before a GPU-hour is spent.

# preflight_commands: the arrays HEAD (here, before), CHECK_RANK (on every rank) and JUDGE (here, after).
preflight_commands() {
    local gpus=0 records=$ATTEMPT/preflight minimum=()
    [[ $DEVICE == cpu ]] || gpus=$PROCESSES_PER_NODE
    [[ -z $MIN_ALL_REDUCE_GBPS ]] || minimum=(--min-bandwidth-gbps "$MIN_ALL_REDUCE_GBPS")
    HEAD=(tools/preflight.py head --recipe "$RECIPE" "${SETS[@]}" --engine "$ENGINE" --nodes "$SLURM_NNODES"
        --processes-per-node "$PROCESSES_PER_NODE" --device "$DEVICE" --gpu "$GPU" --records "$records")
    CHECK_RANK=("$PYTHON" tools/preflight.py rank --records "$records" --gpus "$gpus")
    JUDGE=(tools/preflight.py judge --records "$records" --nodes "$NODES" --gpus "$gpus" "${minimum[@]}")
    VERDICT=$records/verdict.json
}

# preflight: sets BAD_NODES and CODE. Fails where a check failed, which has said what and what to do.
preflight() {
    BAD_NODES='' CODE=2
    preflight_commands
    python_here "${HEAD[@]}" || return 1
    # A rank that fails has written why; JUDGE reads it, so the step's own code says nothing more.
    # Not training's port: what the kernel keeps of one that was closed a moment ago must not be in the way.
    FAILURES='' MASTER_PORT=$((MASTER_PORT + 1)) "${STEP[@]}" --time=10 --job-name=preflight slurm/lib/rank.sh "${CHECK_RANK[@]}" || true
    python_here "${JUDGE[@]}" && return 0
    [[ ! -f $VERDICT ]] || BAD_NODES=$(tr -d ' \n"' <"$VERDICT" | sed -n 's/.*bad_nodes:\[\([^]]*\)\].*/\1/p')
    # What worked an hour ago and has no node to blame is a fault that may pass, a switch for instance: MAX_IDLE bounds it.
    ((RESTART == 0)) || CODE=1
    return 1
}
