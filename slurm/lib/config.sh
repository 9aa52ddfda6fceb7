#!/usr/bin/env bash
# cluster.env, read and checked: a wrong field costs one line now and not a night in the queue.

die() {
    echo "error: $*" >&2
    exit 2
}

say() { echo "[$(date '+%F %T')] $*"; }

SETTINGS=(SBATCH_ACCOUNT SBATCH_PARTITION CPU_PARTITION CHECKPOINTS DATA RUNS PYTHON CONTAINER_IMAGE CONTAINER_MOUNTS WANDB_MODE
    HANG_TIMEOUT MAX_IDLE MAX_RESTARTS MIN_ALL_REDUCE_GBPS CORPUS VALIDATION_DOCUMENTS EVALUATION_TEXT EVALUATE EVALUATION_OPTIONS
    SOURCE_CHECKPOINT DEVICE GPU PROCESSES_PER_NODE)

# in_job: whether this is the batch script of a job, and not a shell that somebody has opened in one.
in_job() { [[ -n ${SLURM_JOB_ID:-} && ${SLURM_TASK_PID:-} == "$$" ]]; }

# load_config: everything that the rest of slurm/lib reads, exported to the ranks.
load_config() {
    local name
    ((BASH_VERSINFO[0] > 4 || (BASH_VERSINFO[0] == 4 && BASH_VERSINFO[1] >= 4))) || die "bash $BASH_VERSION: too old; 4.4 or newer is needed"
    CONFIG=${CLUSTER_ENV:-slurm/cluster.env}
    [[ -f $CONFIG ]] || die "$CONFIG: missing; cp slurm/cluster.env.example $CONFIG and fill it in"
    bash -n "$CONFIG" 2>/dev/null || die "$CONFIG: not valid shell ($(bash -n "$CONFIG" 2>&1 | head -n1)); correct the line"
    check_names
    for name in "${SETTINGS[@]}"; do
        [[ $name == SBATCH_* ]] || unset "$name" # only the file speaks, not what the shell that submitted happened to hold
    done
    set +eu -a # `module load` and the like are not written for -e and -u
    # shellcheck disable=SC1090
    source "$CONFIG"
    set -eu +a
    for name in "${SETTINGS[@]}"; do declare -g "$name=${!name:-}"; done
    # sbatch takes an empty partition for the name of one.
    for name in SBATCH_ACCOUNT SBATCH_PARTITION; do [[ -n ${!name} ]] || export -n "${name?}"; done
    : "${PYTHON:=$([[ $CONTAINER_IMAGE ]] && echo python || echo .venv/bin/python)}" "${WANDB_MODE:=disabled}" "${EVALUATE:=yes}"
    : "${HANG_TIMEOUT:=1800}" "${MAX_IDLE:=3}" "${MAX_RESTARTS:=50}" "${DEVICE:=cuda}" "${GPU:=h100-80gb}" "${VALIDATION_DOCUMENTS:=100}"
    : "${OVERRIDES:=}" "${ENGINE:=}"
    export OVERRIDES ENGINE
    check_values
}

# check_names: a name that is almost a setting is a mistake; any other may serve the file's own shell.
check_names() {
    local name near
    while read -r name; do
        [[ " ${SETTINGS[*]} " != *" $name "* ]] || continue
        near=$(printf '%s\n' "${SETTINGS[@]}" | awk -v name="$name" '
            function least(a, b, c) { return a < b ? (a < c ? a : c) : (b < c ? b : c) }
            {   # the edit distance between name and $0
                for (j = 0; j <= length($0); j++) row[j] = j
                for (i = 1; i <= length(name); i++) {
                    corner = row[0]; row[0] = i
                    for (j = 1; j <= length($0); j++) {
                        above = row[j]
                        row[j] = least(above + 1, row[j - 1] + 1, corner + (substr(name, i, 1) != substr($0, j, 1)))
                        corner = above
                    }
                }
                if (length($0) > 4 && row[length($0)] <= 2) { print; exit }
            }')
        [[ -z $near ]] || die "$CONFIG: $name: unknown setting; did you mean $near?"
    done < <(sed -nE 's/^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)=.*/\2/p' "$CONFIG")
}

check_values() {
    local name
    for name in CHECKPOINTS DATA RUNS; do
        [[ -n ${!name:-} ]] || die "$CONFIG: $name: is empty; name a folder that all nodes share"
        [[ ${!name} == /* ]] || die "$CONFIG: $name: ${!name} is no absolute path; nodes must find the same folder"
        [[ -d ${!name} ]] || die "$CONFIG: $name: no folder ${!name}; mkdir -p it, or correct the path"
    done
    # Tried, not asked: root may write anywhere, until the file system says no.
    { (: >"$RUNS/.writable.$$") 2>/dev/null && rm -f "$RUNS/.writable.$$"; } || die "$CONFIG: RUNS: $RUNS cannot be written; choose another folder or get permission"
    for name in HANG_TIMEOUT MAX_IDLE MAX_RESTARTS; do
        [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$CONFIG: $name: ${!name} is no positive whole number; correct it"
    done
    [[ -z $PROCESSES_PER_NODE || $PROCESSES_PER_NODE =~ ^[1-9][0-9]*$ ]] ||
        die "$CONFIG: PROCESSES_PER_NODE: $PROCESSES_PER_NODE is no positive whole number; leave it empty for one per GPU"
    one_of WANDB_MODE disabled offline online
    one_of EVALUATE yes no
    one_of DEVICE cuda cpu
    one_of GPU h100-80gb h200-141gb
    [[ -z $MIN_ALL_REDUCE_GBPS || $MIN_ALL_REDUCE_GBPS =~ ^[0-9]+(\.[0-9]+)?$ ]] ||
        die "$CONFIG: MIN_ALL_REDUCE_GBPS: $MIN_ALL_REDUCE_GBPS is no number; leave it empty for a quarter of what the links can do"
    check_container
    local partitions
    # Where sinfo answers at all: on a laptop there may be none, or one without a cluster.
    if partitions=$(sinfo --all --noheader --format=%R 2>/dev/null); then
        for name in ${SBATCH_PARTITION//,/ } ${CPU_PARTITION//,/ }; do
            grep -qx -- "$name" <<<"$partitions" ||
                die "$CONFIG: SBATCH_PARTITION, CPU_PARTITION: this cluster has no partition $name; sinfo -s lists them"
        done
    fi
}

one_of() {
    local name=$1 value
    shift
    for value in "$@"; do [[ ${!name} == "$value" ]] && return; done
    die "$CONFIG: $name: ${!name} is none of $*; choose one"
}

check_container() {
    local mount
    CONTAINER=()
    if [[ -z $CONTAINER_IMAGE ]]; then
        [[ -z $CONTAINER_MOUNTS ]] || die "$CONFIG: CONTAINER_MOUNTS: is set but CONTAINER_IMAGE is not; name the image or empty it"
        [[ -x $PYTHON ]] || die "$CONFIG: PYTHON: $PYTHON cannot be run; run make setup, or name your environment's python"
        return
    fi
    # A registry image has no file; a squashfs file must be there.
    [[ $CONTAINER_IMAGE != */*.sqsh || -f $CONTAINER_IMAGE ]] || die "$CONFIG: CONTAINER_IMAGE: no file $CONTAINER_IMAGE; docker/README.md makes it"
    ! command -v srun >/dev/null || grep -q -- --container-image <<<"$(srun --help)" ||
        die "$CONFIG: CONTAINER_IMAGE: this cluster's srun has no --container-image (pyxis); empty it and set PYTHON"
    for mount in ${CONTAINER_MOUNTS//,/ }; do
        [[ $mount =~ ^/[^:]+:/[^:]+(:[a-z,]+)?$ ]] || die "$CONFIG: CONTAINER_MOUNTS: $mount is not /host:/container; correct it"
        [[ -e ${mount%%:*} ]] || die "$CONFIG: CONTAINER_MOUNTS: ${mount%%:*} does not exist; correct it"
    done
    local mounts="$PWD:$PWD,$CHECKPOINTS:$CHECKPOINTS,$DATA:$DATA,$RUNS:$RUNS${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}"
    [[ ! -f $HOME/.netrc ]] || mounts+=",$HOME/.netrc:$HOME/.netrc:ro" # the key of wandb
    CONTAINER=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD" --no-container-mount-home --container-mounts="$mounts")
}

# python_here ARGUMENTS: Python beside the batch script, in the container where there is one; outside a job, of the login node.
python_here() {
    if [[ -z $CONTAINER_IMAGE ]]; then
        "$PYTHON" "$@"
    elif in_job; then
        srun --export=ALL --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" --job-name=helper "${CONTAINER[@]}" "$PYTHON" "$@"
    else
        [[ -x .venv/bin/python ]] || die ".venv: missing; run make setup: what runs on the login node does not run in the container"
        .venv/bin/python "$@"
    fi
}

# recipe_facts RECIPE: RUN_FOLDER, MODEL_PATH, ... of it; and SETS, the --set arguments of this job's overrides.
recipe_facts() {
    local override overrides assignments
    RECIPE=$1 SETS=()
    read -ra overrides <<<"${OVERRIDES//$'\n'/ }" # not `for ... in $OVERRIDES`: prompts=[EP_1] is a pattern of file names to the shell
    for override in "${overrides[@]}" wandb.mode="$WANDB_MODE"; do SETS+=(--set "$override"); done
    assignments=$(python_here tools/cluster_job.py facts --recipe "$RECIPE" "${SETS[@]}") || exit 2
    eval "$assignments"
}

# submit OPTIONS: sbatch, without this job's own SLURM_* variables, which would become options and facts of the next.
submit() {
    local name hide=()
    while read -r name; do [[ $name == SLURM_CONF ]] || hide+=(-u "$name"); done < <(compgen -e | grep -E '^(SLURM|SRUN)_')
    env "${hide[@]}" sbatch --parsable "$@"
}

need_sbatch() {
    command -v sbatch >/dev/null || die "sbatch: not found; run this on a login node of the cluster"
}
