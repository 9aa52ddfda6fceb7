#!/usr/bin/env bash
# Convert a checkpoint on one node, without a GPU:  sbatch slurm/convert.sh to-megatron|to-hf INPUT OUTPUT [OPTIONS]
# Options go to tools/hf_to_megatron.py or tools/megatron_to_hf.py. A requeued job goes on where it was.
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
[[ -f slurm/lib/task.sh ]] || { echo "error: $PWD is not the root of the repository; cd there, then sbatch again" >&2; exit 2; }
source slurm/lib/task.sh
begin_task slurm/convert.sh "to-megatron|to-hf INPUT OUTPUT [OPTIONS]" 3 "$@"

case $1 in
to-megatron) tool=tools/hf_to_megatron.py ;;
to-hf) tool=tools/megatron_to_hf.py ;;
*) die "slurm/convert.sh: $1: unknown direction; to-megatron or to-hf" ;;
esac
[[ ! -e $3 ]] || { say "there already: $3" && exit 0; }
alone "$tool" --input "$2" --output "$3" --resume --workers "$CPUS" "${@:4}"
