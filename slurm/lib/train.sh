# shellcheck shell=bash
# The step that trains: asked to save when SLURM wants the nodes back, watched for hanging, its end judged.

# train COMMAND: runs it on every rank. Sets CODE (srun's), ASKED, CANCELLED and HUNG.
train() {
    CODE=0 HUNG=
    if [[ -n $ASKED ]]; then # SLURM wanted the nodes back while the preflight ran
        return
    fi
    FAILURES=$ATTEMPT "${STEP[@]}" --job-name=train slurm/lib/rank.sh "$@" &
    STEP_PID=$!
    watch_step &
    local watcher=$!
    while :; do # a signal that is trapped ends `wait` early: wait again while srun lives
        CODE=0
        wait "$STEP_PID" || CODE=$?
        kill -0 "$STEP_PID" 2>/dev/null || break
    done
    STEP_PID=
    pkill -P "$watcher" 2>/dev/null || true
    kill "$watcher" 2>/dev/null || true
    [[ ! -f $ATTEMPT/hung ]] || HUNG=$(<"$ATTEMPT/hung")
}

# SIGUSR1 comes with #SBATCH --signal=B:USR1@..., before the time limit and before a preemption. Never requeue on TERM:
# scancel sends it, and a cancelled job would come back to life.
listen() {
    ASKED='' CANCELLED='' STEP_PID=''
    trap on_usr1 USR1
    trap on_term TERM
}

on_usr1() {
    [[ -z $ASKED ]] || return 0
    ASKED=1
    say "SLURM wants the nodes back: saving after the current step"
    # Again and again: a rank that is still importing does not listen yet.
    (while [[ -n $STEP_PID ]] && kill -USR1 "$STEP_PID" 2>/dev/null; do sleep 10; done) &
}

on_term() { CANCELLED=1; }

# watch_step: kill the step once the run has written nothing for HANG_TIMEOUT seconds.
watch_step() {
    local reason
    reason=$(python_here tools/cluster_job.py watch --recipe "$RECIPE" "${SETS[@]}" --timeout "$HANG_TIMEOUT") || return 0
    echo "$reason" >"$ATTEMPT/hung"
    say "the run hangs: $reason"
    # The step alone: SIGKILL to the job would cancel it.
    squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format='%i %j' | while read -r step name; do
        [[ $name != train ]] || scancel "$step"
    done
}

# conclude: record how the attempt ended and do what the verdict says. Does not return.
conclude() {
    local arguments=(--job "$SLURM_JOB_ID" --restart "$RESTART" --exit-code "$CODE" --max-restarts "$MAX_RESTARTS" --max-idle "$MAX_IDLE")
    [[ -z $ASKED ]] || arguments+=(--asked)
    [[ -z $CANCELLED ]] || arguments+=(--cancelled)
    [[ -z $HUNG ]] || arguments+=(--hung "$HUNG")
    [[ -z $BAD_NODES ]] || arguments+=(--bad-nodes "$BAD_NODES")
    ACTION=
    eval "$(python_here tools/cluster_job.py end --recipe "$RECIPE" "${SETS[@]}" "${arguments[@]}")"
    case $ACTION in
    finished) finished ;;
    requeue) requeue ;;
    stopped) say "stopped: $REASON" ;;
    give_up)
        say "given up: $REASON"
        exit 1
        ;;
    *) die "no verdict on this attempt; look at the lines above, then submit again: the run goes on from its newest checkpoint" ;;
    esac
    exit 0
}

requeue() {
    # Cancelled a moment ago: leave it so.
    [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) == RUNNING ]] || exit "$CODE"
    say "requeued: $REASON${EXCLUDE:+; from now on without $EXCLUDE}"
    trap '' TERM # SLURM ends this script now; the next line must still run
    scontrol requeue "$SLURM_JOB_ID"
    [[ -z $EXCLUDE ]] || scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$EXCLUDE" || say "could not exclude $EXCLUDE"
    sleep 300
}
