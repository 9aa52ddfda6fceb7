# shellcheck shell=bash
# Check recipe, nodes and network before a GPU-hour is spent.

# preflight_commands: the arrays HEAD (here, before), CHECK_RANK (on every rank) and JUDGE (here, after).
preflight_commands() {
    local gpus=0 records=$ATTEMPT/preflight minimum=()
    [[ $DEVICE == cpu ]] || gpus=$PROCESSES_PER_NODE
    [[ -z $MIN_ALL_REDUCE_GBPS ]] || minimum=(--min-bandwidth-gbps "$MIN_ALL_REDUCE_GBPS")
    HEAD=(tools/preflight.py head --recipe "$RECIPE" "${SETS[@]}" --engine "$ENGINE" --nodes "$SLURM_NNODES"
        --processes-per-node "$PROCESSES_PER_NODE" --device "$DEVICE" --records "$records")
    CHECK_RANK=("$PYTHON" tools/preflight.py rank --records "$records" --gpus "$gpus")
    JUDGE=(tools/preflight.py judge --records "$records" --nodes "$NODES" --gpus "$gpus" "${minimum[@]}")
    VERDICT=$records/verdict.json
}

# preflight: sets BAD_NODES. Returns 0 where all is well, 2 where a check failed; it has said which and what to do.
preflight() {
    local code=0
    BAD_NODES=
    preflight_commands
    python_here "${HEAD[@]}" || return 2
    # A rank that fails has written why; JUDGE reads it, so the step's own code says nothing more.
    FAILURES='' "${STEP[@]}" --job-name=preflight slurm/lib/rank.sh "${CHECK_RANK[@]}" || true
    python_here "${JUDGE[@]}" || code=2
    [[ ! -f $VERDICT ]] || BAD_NODES=$(tr -d ' \n"' <"$VERDICT" | sed -n 's/.*bad_nodes:\[\([^]]*\)\].*/\1/p')
    return "$code"
}
