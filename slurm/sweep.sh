#!/usr/bin/env bash
# A job array, one run for each line of a table:  bash slurm/sweep.sh slurm/sweeps/lengths.txt [OPTIONS OF SBATCH]
# A line is NAME RECIPE FIELD=VALUE ...; its run is RUNS/sweep_<table>/NAME. Four at a time (--array=0-4%2 says otherwise).
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
set -euo pipefail
[[ -f slurm/lib/extend.sh ]] || { echo "error: $PWD is not the root of the repository; cd there, then sbatch again" >&2; exit 2; }
source slurm/lib/extend.sh
table=${1:-}
[[ -f $table ]] || die "usage: bash slurm/sweep.sh slurm/sweeps/TABLE.txt; there are $(echo slurm/sweeps/*.txt)"
mapfile -t lines < <(grep -vE '^[[:space:]]*(#|$)' "$table")

if ! in_job; then
    load_config
    need_sbatch
    job=$(submit --array="0-$((${#lines[@]} - 1))%4" "${@:2}" slurm/sweep.sh "$table") || die "sbatch refused; the line above says why"
    say "submitted job $job: ${#lines[@]} runs"
    exit 0
fi
listen
index=${SLURM_ARRAY_TASK_ID:?submit it with: bash slurm/sweep.sh $table}
((index < ${#lines[@]})) || die "$table: has ${#lines[@]} lines, this is run $index; submit the sweep again"
read -r name recipe fields <<<"${lines[index]}"
load_config
sweep=$(basename "$table" .txt)
OVERRIDES="$fields name=${sweep}_$name output.directory=$RUNS/sweep_$sweep/$name $OVERRIDES"
extend "$recipe" deepspeed "$0"
