#!/usr/bin/env bash
# One rank of a run: srun starts this once per task, with the command to run. It says where the rank stands in the world,
# hands signals on, and leaves a line in $FAILURES when the rank fails: the first of these names the node to suspect.
set -uo pipefail

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$PROCESSES_PER_NODE

# With proctrack/cgroup SLURM signals what it has started itself, this shell, and with others every process of a step, so that
# the rank may be told twice, which changes nothing. USR1 and USR2 would kill a rank that is still importing: Python inherits
# that they are ignored and listens as soon as it can (endprompt/training/stopping.py, stacks.py). Bash may lose one of two signals
# that come in the same millisecond, and the code of a rank that ends in it: train.sh leaves 10 s between two.
child=
for name in USR1 USR2 TERM; do
    # shellcheck disable=SC2064 # the name is of now, the child of then
    trap "[[ -z \$child ]] || kill -$name \$child 2>/dev/null" "$name"
done
(
    trap '' USR1 USR2
    trap - TERM
    exec "$@"
) &
child=$!
# A trapped signal ends `wait` early; what the last one gives is the rank's own code.
while wait "$child"; kill -0 "$child" 2>/dev/null; do :; done
trap '' USR1 USR2 TERM
wait "$child"
code=$?
case $code in
0 | 75) exit 0 ;; # 75: saved on request. As a failure it would make srun kill the ranks that are still closing.
esac
if [[ -n ${FAILURES:-} ]]; then
    printf '{"time": %s, "node": "%s", "rank": %d, "exit_code": %d}\n' "$(date +%s.%N)" "$SLURMD_NODENAME" "$RANK" "$code" \
        >"$FAILURES/.rank-$RANK.tmp" && mv "$FAILURES/.rank-$RANK.tmp" "$FAILURES/rank-$RANK.json"
fi
exit "$code"
