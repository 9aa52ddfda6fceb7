#!/usr/bin/env bash
# One rank of a run: srun starts this once per task, with the command to run. It says where the rank stands in the world,
# and leaves a line in $FAILURES when the rank fails: the first of these names the node to suspect.
set -uo pipefail

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$PROCESSES_PER_NODE

# SLURM sends a signal to every process of a step. USR1 would kill a rank that is still importing: Python inherits that it
# is ignored and listens as soon as it can (endprompt/training/stopping.py); slurm/lib/train.sh sends it again.
trap '' USR1
trap : TERM USR2

"$@"
code=$?
case $code in
0 | 75) exit 0 ;; # 75: saved on request. As a failure it would make srun kill the ranks that are still closing.
esac
if [[ -n ${FAILURES:-} ]]; then
    printf '{"time": %s, "node": "%s", "rank": %d, "exit_code": %d}\n' "$(date +%s.%N)" "$SLURMD_NODENAME" "$RANK" "$code" \
        >"$FAILURES/.rank-$RANK.tmp" && mv "$FAILURES/.rank-$RANK.tmp" "$FAILURES/rank-$RANK.json"
fi
exit "$code"
