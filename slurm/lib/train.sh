#!/usr/bin/env bash
# The step that trains: asked to save when SLURM wants the nodes back, watched for hanging, its end judged.

SAVE_SECONDS=530
# How long ranks may take to save once asked: #SBATCH --signal gives 600 s, and SLURM's own end, TERM, is final.

# listen: first of all in a job. A signal that nobody has trapped would end it for good.
# SIGUSR1 comes with #SBATCH --signal=B:USR1@..., before the time limit and before a preemption. Never requeue on TERM: scancel
# sends it, and a cancelled job would come back to life.
listen() {
    ASKED='' CANCELLED='' STEP_PID='' TRAINED=''
    trap on_usr1 USR1
    trap on_term TERM
}

on_usr1() {
    [[ -z $ASKED ]] || return 0
    ASKED=1
    say "SLURM wants the nodes back"
    [[ -z $STEP_PID ]] || ask_to_save
}

on_term() { CANCELLED=1; }

# train COMMAND: runs it on every rank. Sets CODE (srun's), TRAINED and HUNG.
train() {
    CODE=0 HUNG=
    [[ -z $ASKED ]] || return 0 # wanted back while the preflight ran
    TRAINED=1
    FAILURES=$ATTEMPT ENDPROMPT_STACKS=$ATTEMPT/stacks "${STEP[@]}" --job-name=train slurm/lib/rank.sh "$@" &
    STEP_PID=$!
    [[ -z $ASKED ]] || ask_to_save # asked between the last two lines
    watch_step &
    local watcher=$!
    while :; do # a signal that is trapped ends `wait` early: wait again while srun lives
        CODE=0
        wait "$STEP_PID" || CODE=$?
        kill -0 "$STEP_PID" 2>/dev/null || break
    done
    STEP_PID=
    kill "$watcher" 2>/dev/null || true
    pkill -P "$watcher" 2>/dev/null || true
    [[ ! -s $ATTEMPT/hung ]] || HUNG=$(<"$ATTEMPT/hung")
}

# ask_to_save: USR1 to every rank, again and again, for one that is still importing does not listen yet. Ranks that have not
# saved in time are ended, so that the job is requeued from its newest checkpoint and not ended by its time limit.
ask_to_save() {
    say "saving after the current step"
    (
        for ((waited = 0; waited < SAVE_SECONDS; waited += 10)); do
            kill -USR1 "$STEP_PID" 2>/dev/null || exit 0
            sleep 10
        done
        say "no checkpoint within $SAVE_SECONDS s"
        show_stacks
        end_step
    ) &
}

# watch_step: end the step once the run has written nothing for HANG_TIMEOUT seconds.
watch_step() {
    # Not into a variable: the process would be a grandchild, and stay behind when this one is killed.
    python_here tools/cluster_job.py watch --recipe "$RECIPE" "${SETS[@]}" --timeout "$HANG_TIMEOUT" >"$ATTEMPT/hung" || return 0
    say "the run hangs: $(<"$ATTEMPT/hung")"
    show_stacks
    end_step
}

# show_stacks: have every rank write where it stands; conclude sums it up, once the step has ended and all files are closed.
show_stacks() {
    kill -USR2 "$STEP_PID" 2>/dev/null || return 0 # srun hands it on to the ranks
    sleep 5
}

# end_step: cancel the step that trains, of this job alone; after five minutes leave its processes to SLURM, which drains a
# node that cannot be rid of them.
end_step() {
    local try step name
    for ((try = 0; try < 30; try++)); do
        # The step and not the job: SIGKILL to the job would cancel it. An array's tasks are listed together.
        while read -r step name; do
            [[ $name != train || $step != "$JOB".* ]] || scancel "$step"
        done < <(squeue --noheader --steps --jobs="$JOB" --format='%i %j')
        sleep 10
        kill -0 "$STEP_PID" 2>/dev/null || return 0
    done
    kill -KILL "$STEP_PID" 2>/dev/null || true
}

# conclude: record how the attempt ended and do what the verdict says. Does not return.
conclude() {
    local try arguments=(--job "$SLURM_JOB_ID" --restart "$RESTART" --exit-code "$CODE" --max-restarts "$MAX_RESTARTS" --max-idle "$MAX_IDLE"
        --ranks "$((SLURM_NNODES * PROCESSES_PER_NODE))")
    [[ -z $ASKED ]] || arguments+=(--asked)
    [[ -z $CANCELLED ]] || arguments+=(--cancelled)
    [[ -z $TRAINED ]] || arguments+=(--trained)
    [[ -z $HUNG ]] || arguments+=(--hung "$HUNG")
    [[ -z $BAD_NODES ]] || arguments+=(--bad-nodes "$BAD_NODES")
    ACTION=
    for try in 1 2 3; do
        eval "$(python_here tools/cluster_job.py end --recipe "$RECIPE" "${SETS[@]}" "${arguments[@]}")"
        [[ -z $ACTION ]] || break
        say "no verdict, try $try"
        sleep 20
    done
    case $ACTION in
    finished) finished ;;
    requeue) requeue ;;
    stopped)
        say "stopped: $REASON"
        exit 3 # not 0: what waits for a finished run (afterok) must not start
        ;;
    give_up)
        say "given up: $REASON"
        exit 1
        ;;
    *) die "no verdict on this attempt; look at the lines above, then submit again: the run goes on from its newest checkpoint" ;;
    esac
    exit 0
}

requeue() {
    local state='' try
    for try in 1 2 3 4 5 6; do # a controller that restarts answers in a minute
        state=$(squeue --noheader --jobs="$JOB" --format=%T) && break
        sleep 20
    done
    if [[ $state != RUNNING ]]; then # cancelled a moment ago: leave it so
        say "not requeued: SLURM says the job is ${state:-gone}"
        exit 1
    fi
    say "requeued: $REASON"
    trap '' TERM # SLURM ends this script now; the next lines must still run
    for try in 1 2 3 4 5 6; do
        scontrol requeue "$JOB" && break
        sleep 20
    done
    [[ -z $EXCLUDE ]] || exclude "$EXCLUDE"
    exit 0
}

# exclude NODES: besides those that the job avoids already, and only while enough are left for it.
exclude() {
    local before nodes left
    before=$(scontrol --oneliner show job "$JOB" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    [[ -n $before && $before != "(null)" ]] && before=$(scontrol show hostnames "$before" | paste -sd,) || before=
    nodes=$(tr , '\n' <<<"$before,$1" | sort -u | sed '/^$/d' | paste -sd,)
    left=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --states=idle,alloc,mix,comp --format=%N | sort -u |
        grep -vcxF -f <(tr , '\n' <<<"$nodes")) || true
    if ((left < SLURM_NNODES)); then
        say "not excluded, $left nodes would be left: $1"
    elif scontrol update JobId="$JOB" ExcNodeList="$nodes"; then
        say "from now on without $nodes"
    else
        say "could not exclude $1"
    fi
}
