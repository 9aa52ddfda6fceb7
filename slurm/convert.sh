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
[[ " to-megatron to-hf " == *" ${1:-} "* ]] || die "usage: sbatch slurm/convert.sh to-megatron|to-hf INPUT OUTPUT [OPTIONS]"
begin_task slurm/convert.sh "to-megatron|to-hf INPUT OUTPUT [OPTIONS]" 3 "$@"

tool=tools/hf_to_megatron.py
[[ $1 == to-megatron ]] || tool=tools/megatron_to_hf.py
[[ ! -e $3 ]] || { say "there already: $3" && exit 0; }
alone "$tool" --input "$2" --output "$3" --resume --workers "$CPUS" "${@:4}"
