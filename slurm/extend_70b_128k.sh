#!/usr/bin/env bash
# LLaMA-3-70B from 8K to 128K on 8 nodes of 8 H100-80GB. The recipe says everything else; tools/plan.py says how long it takes.
#SBATCH --job-name=extend_70b_128k
#SBATCH --nodes=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
[[ -f slurm/lib/extend.sh ]] || { echo "error: $PWD is not the root of the repository; cd there, then sbatch again" >&2; exit 2; }
source slurm/lib/extend.sh
extend recipes/llama3_70b_128k.yaml megatron "$0" "$@"
