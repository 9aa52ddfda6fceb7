#!/usr/bin/env bash
# The whole way as dependent jobs, data -> checkpoint -> training -> export and evaluation:
#     bash slurm/pipeline.sh slurm/extend_70b_128k.sh [OPTIONS OF SBATCH for the training job]
# A step whose result is there already ends at once. SOURCE_CHECKPOINT in cluster.env names a Megatron checkpoint from which
# the recipe's Hugging Face checkpoint is made where it is missing; both engines train from the Hugging Face one.
set -euo pipefail
[[ -f slurm/lib/config.sh ]] || { echo "error: $PWD is not the root of the repository; cd there" >&2; exit 2; }
source slurm/lib/config.sh
load_config
need_sbatch
script=${1:-}
[[ -f $script ]] || die "usage: bash slurm/pipeline.sh slurm/extend_8b_64k.sh"
recipe=$(sed -n 's/^extend \([^ ]*\) .*/\1/p' "$script")
[[ -n $recipe ]] || die "$script: trains no recipe; name one of slurm/extend_*.sh"
recipe_facts "$recipe"

after=() cpu=()
[[ -z $CPU_PARTITION ]] || cpu=(--partition="$CPU_PARTITION")
# then_submit NAME OPTIONS: a job that starts once the one before it has succeeded, and is dropped where that cannot be.
then_submit() {
    local name=$1 job
    shift
    job=$(submit "${after[@]}" --kill-on-invalid-dep=yes "$@") || die "$name: sbatch refused; the line above says why"
    printf '%-12s job %s\n' "$name" "$job"
    after=(--dependency="afterok:$job")
}

if [[ ! -f $MODEL_PATH/config.json ]]; then
    [[ -n $SOURCE_CHECKPOINT ]] || die "$MODEL_PATH: no checkpoint; put it there, or name a Megatron one as SOURCE_CHECKPOINT in $CONFIG"
    then_submit convert "${cpu[@]}" slurm/convert.sh to-hf "$SOURCE_CHECKPOINT" "$MODEL_PATH"
fi
then_submit prepare "${cpu[@]}" slurm/prepare.sh "$recipe"
IN_PIPELINE=1 then_submit train "${@:2}" "$script"
then_submit evaluate slurm/evaluate.sh "$recipe"
echo "watch it:    $PYTHON tools/run_status.py $RUN_FOLDER"
