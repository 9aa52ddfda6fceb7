#!/usr/bin/env bash
# Text -> the indexed datasets that a recipe names, with its checkpoint's tokenizer:  sbatch slurm/prepare.sh RECIPE
# The text is CORPUS in cluster.env. No GPU; an interrupted job goes on where it was.
#SBATCH --job-name=prepare
#SBATCH --nodes=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
[[ -f slurm/lib/task.sh ]] || { echo "error: $PWD is not the root of the repository; cd there, then sbatch again" >&2; exit 2; }
source slurm/lib/task.sh
begin_task slurm/prepare.sh RECIPE 1 "$@"

recipe_facts "$1"
if [[ -f $TRAIN_DATA.idx && (-z $VALIDATION_DATA || -f $VALIDATION_DATA.idx) ]]; then
    say "there already: $TRAIN_DATA${VALIDATION_DATA:+ and $VALIDATION_DATA}"
    exit 0
fi
[[ $TRAIN_DATA != *" "* ]] || die "$RECIPE: data.train: is a blend; prepare each source with tools/prepare_data.py"
[[ -n $CORPUS ]] || die "$CONFIG: CORPUS: is empty; name the files of the training text"
prefix=$TRAIN_DATA split=()
if [[ -n $VALIDATION_DATA ]]; then # one pass writes both: PREFIX_train and PREFIX_validation
    prefix=${TRAIN_DATA%_train} split=(--validation-documents "$VALIDATION_DOCUMENTS")
    [[ $TRAIN_DATA == "${prefix}_train" && $VALIDATION_DATA == "${prefix}_validation" ]] ||
        die "$RECIPE: data: $TRAIN_DATA and $VALIDATION_DATA are not NAME_train and NAME_validation; rename them, or prepare them by hand"
fi
# shellcheck disable=SC2086  # patterns and several files
alone tools/prepare_data.py --input $CORPUS --tokenizer "$MODEL_PATH" --output "$prefix" "${split[@]}" --workers "$CPUS"
