#!/usr/bin/env bash
# Export a finished run where that is still to do, and evaluate it beside its base:  sbatch slurm/evaluate.sh RECIPE
# OVERRIDES as of the run. Results in the run folder's evaluation/; what is done already is kept.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
[[ -f slurm/lib/task.sh ]] || { echo "error: $PWD is not the root of the repository; cd there, then sbatch again" >&2; exit 2; }
source slurm/lib/task.sh
begin_task slurm/evaluate.sh RECIPE 1 "$@"

recipe_facts "$1"
[[ $FINISHED == yes ]] || die "$RUN_FOLDER: not finished, it is at step $STEP_NOW; sbatch the training again, then this"
export_folder=$RUN_FOLDER/export
if [[ ! -f $export_folder/config.json ]]; then # ds_train.py exports itself, Megatron's checkpoints are converted
    alone tools/megatron_to_hf.py --input "$RUN_FOLDER/checkpoints" --output "$export_folder" --resume
fi
tasks=distance text=()
if [[ -n $EVALUATION_TEXT ]]; then
    # shellcheck disable=SC2206  # patterns and several files
    tasks=distance,perplexity,needle text=(--text $EVALUATION_TEXT)
fi
device=cpu
[[ $DEVICE == cpu ]] || device=cuda:all
# shellcheck disable=SC2086  # several options
alone tools/evaluate.py --model base="$MODEL_PATH" --model extended="$export_folder" --tasks "$tasks" "${text[@]}" --device "$device" \
    --target-length "$TARGET_LENGTH" --original-length "$ORIGINAL_LENGTH" --output "$RUN_FOLDER/evaluation" $EVALUATION_OPTIONS
say "$RUN_FOLDER/evaluation/report.md"
