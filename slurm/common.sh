# shellcheck shell=bash
# What every template shares: the environment, the checks before anything is spent, the launch, and what happens when
# the job is asked to stop. A template names resources, goes to the folder it was submitted from, reads this file there and
# calls `train OPTIONS`. README.md, "On your cluster".
#
# Set these in the environment of sbatch or in slurm/site.sh:
#   DIST_LARS_DATA=DIR     the images: a folder, or packed shards
#   LAUNCHER=auto          srun, mpirun, horovodrun, or auto: srun where its PMI works, else mpirun
#   MPI_TYPE=pmix          what `srun --mpi=` takes here (srun --mpi=list)
#   LAUNCHER_ARGS="..."    more options of the launcher
#   CONTAINER=IMAGE        run in this image: a .sif file by Apptainer; .sqsh or REGISTRY#IMAGE:TAG by Pyxis. It sees the
#                          clone, RUN_DIR, DIST_LARS_DATA, TMPDIR, STAGE, and what options such as --data.path name
#   CONTAINER_ARGS="..."   more options of Apptainer, or of srun under Pyxis
#   VENV=DIR               the environment (.venv in the clone), where there is no container
#   STAGE=DIR              copy packed shards to this folder of each node first; '$SLURM_TMPDIR' is expanded there
#   INTERFACE=ib0          the network between nodes, where a node has several
#   RUN_DIR=DIR            where the run lives (runs/JOBNAME-JOBID, of an array JOBID_TASK): the same one continues the
#                          same run
#   MAX_REQUEUES=20        how often a job may start again
#   PREFLIGHT=yes          no: skip the examination of the nodes; LAUNCHER=auto then takes srun
#   DEBUG=1                let NCCL and Horovod talk

set -euo pipefail

say() { echo "[slurm] $*"; }
refuse() { say "refused: $*" >&2; exit 2; }

# --- what was allocated -----------------------------------------------------------------------------------------------

# Where sbatch was told to hand on no environment, srun would do likewise.
export SLURM_EXPORT_ENV=ALL
if [ -e slurm/site.sh ]; then
    set +u # the functions behind `module` read variables that nobody has set
    trap 'say "refused: slurm/site.sh failed, see above" >&2' ERR
    # shellcheck source=slurm/site.example.sh
    source slurm/site.sh
    trap - ERR
    set -u
fi

LAUNCHER=${LAUNCHER:-auto} MPI_TYPE=${MPI_TYPE:-pmix} MAX_REQUEUES=${MAX_REQUEUES:-20} CONTAINER=${CONTAINER:-}
read -ra LAUNCHER_ARGS <<<"${LAUNCHER_ARGS:-}"
read -ra CONTAINER_ARGS <<<"${CONTAINER_ARGS:-}"

[[ $LAUNCHER =~ ^(srun|mpirun|horovodrun|auto)$ ]] ||
    refuse "LAUNCHER=$LAUNCHER, but it must be srun, mpirun, horovodrun or auto"

# An array job trains one seed per task, each a run of its own; scontrol wants the form with the underscore.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
JOB=${JOB:-$SLURM_JOB_ID}
RUN_DIR=${RUN_DIR:-runs/$SLURM_JOB_NAME-$JOB}
RESTARTS=${SLURM_RESTART_COUNT:-0}
NODES=$SLURM_JOB_NUM_NODES
PER_NODE=${SLURM_NTASKS_PER_NODE:-1}
RANKS=$((NODES * PER_NODE))
GPUS=${SLURM_GPUS_PER_NODE:-0} GPUS=${GPUS##*:} # asked for; "a100:4" is possible, and --exclusive grants more

# Since Slurm 22.05 srun no longer takes this from sbatch: without it every rank gets one core. Open MPI's daemons, one a
# node, come by an srun of mpirun's own: their ranks would share the cores of one.
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
if [ -n "${DEBUG:-}" ]; then export NCCL_DEBUG=INFO HOROVOD_LOG_LEVEL=debug; fi
if [ -n "${INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$INTERFACE HOROVOD_GLOO_IFACE=$INTERFACE
    export GLOO_SOCKET_IFNAME=$INTERFACE OMPI_MCA_btl_tcp_if_include=$INTERFACE PRTE_MCA_prte_if_include=$INTERFACE
fi

# --- where Python is --------------------------------------------------------------------------------------------------

IN_CONTAINER=() # before a command that shall run in the image
PYXIS=()        # options of srun
if [ -z "$CONTAINER" ]; then
    [ -z "${VENV:-}" ] || [ -d "$VENV/bin" ] || refuse "VENV=$VENV, but there is no environment"
    VENV=${VENV:-$SLURM_SUBMIT_DIR/.venv}
    if [ -d "$VENV/bin" ]; then export PATH=$VENV/bin:$PATH; fi
    why=$(python -c 'import dist_lars.cli' 2>&1) || # the clone has dist_lars itself, but not what it stands on
        refuse "$(command -v python || echo no python) cannot run dist_lars (${why##*$'\n'}): run \`make install\` on the" \
            "login node and load the same modules in slurm/site.sh, or name VENV or CONTAINER there"
else
    # What the image must see; a folder that is missing here is left to the checks, which say so better.
    mkdir -p "$(dirname "$RUN_DIR")"
    folders=("${DIST_LARS_DATA:-}" "$(dirname "$RUN_DIR")" "${STAGE:-}" "${TMPDIR:-}") seen=$PWD
    for word in "${folders[@]}" "${@#*=}"; do # of the options, those whose value is a folder or a file: all paths
        if [ -f "$word" ]; then word=$(dirname "$word"); fi
        if [[ $word = /* && ,$seen, != *,$word,* && -d $word ]]; then seen+=,$word; fi
    done
    case $CONTAINER in
    *.sqsh | *'#'*)
        [ "$LAUNCHER" = auto ] && LAUNCHER=srun
        [ "$LAUNCHER" = srun ] || refuse "Pyxis (CONTAINER=$CONTAINER) works with LAUNCHER=srun, not $LAUNCHER"
        # Pyxis takes a word without / for an image of Docker Hub, and only the last list of mounts.
        case $CONTAINER in *.sqsh) [[ $CONTAINER = */* ]] || CONTAINER=./$CONTAINER ;; esac
        mounts=$(sed -E 's/([^,]+)/\1:\1/g' <<<"$seen")
        for word in "${CONTAINER_ARGS[@]}"; do
            case $word in --container-mounts=*) mounts+=,${word#*=} ;; *) PYXIS+=("$word") ;; esac
        done
        PYXIS=(--container-image="$CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD" "${PYXIS[@]}")
        ;;
    *)
        apptainer=$(command -v apptainer || command -v singularity) ||
            refuse "CONTAINER=$CONTAINER needs apptainer or singularity on PATH: load its module in slurm/site.sh"
        [ "$LAUNCHER" != horovodrun ] || refuse "CONTAINER with LAUNCHER=horovodrun: use srun or mpirun"
        IN_CONTAINER=("$apptainer" exec --bind "$seen" --pwd "$PWD")
        [ "$GPUS" -eq 0 ] || IN_CONTAINER+=(--nv)
        IN_CONTAINER+=("${CONTAINER_ARGS[@]}" "$CONTAINER")
        ;;
    esac
fi

# One process on this node, for planning.
single() {
    if [ ${#PYXIS[@]} -gt 0 ]; then
        srun --nodes=1 --ntasks=1 --overlap --mpi=none "${PYXIS[@]}" "$@"
    else
        "${IN_CONTAINER[@]}" "$@"
    fi
}

# --- the ranks --------------------------------------------------------------------------------------------------------

# start_by HOW: LAUNCH becomes the words before a command that start it once per rank, each told by DIST_LARS_RANKS how
# many there must be.
start_by() {
    export DIST_LARS_RANKS=$RANKS
    case $1 in
    srun)
        # All GPUs of the node for each task: bound to one, NCCL cannot reach the others directly.
        LAUNCH=(srun --nodes="$NODES" --ntasks="$RANKS" --ntasks-per-node="$PER_NODE"
            --mpi="$MPI_TYPE" --gpu-bind=none --kill-on-bad-exit=1 --wait=60 --label "${PYXIS[@]}")
        ;;
    mpirun)
        local name
        unset SRUN_CPUS_PER_TASK
        LAUNCH=(mpirun -np "$RANKS" --map-by "ppr:$PER_NODE:node" --bind-to none --tag-output)
        for name in PATH LD_LIBRARY_PATH "${!DIST_LARS_@}" "${!HOROVOD_@}" "${!NCCL_@}" "${!OMP_@}" "${!PYTHON@}"; do
            if [ -n "${!name:-}" ]; then LAUNCH+=(-x "$name"); fi
        done
        ;;
    horovodrun)
        local hosts
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/:$PER_NODE/" | paste -sd,)
        LAUNCH=(horovodrun -np "$RANKS" -H "$hosts" --start-timeout 120)
        ;;
    esac
    LAUNCH+=("${LAUNCHER_ARGS[@]}" "${IN_CONTAINER[@]}")
}

launch() {
    local patience
    start_by "$1"
    read -ra patience <<<"${PATIENCE:-}"
    command -v "${LAUNCH[0]}" >/dev/null || { say "no ${LAUNCH[0]} on PATH: load its module in slurm/site.sh"; exit 127; }
    exec "${patience[@]}" "${LAUNCH[@]}" "${@:2}"
}

# attend COMMAND...: run it and hear signals meanwhile, which bash does only while it waits for a child.
attend() {
    ("$@") &
    hear $!
}

# hear PID: wait for a child, through signals; its exit code.
hear() {
    local code
    while :; do
        interrupted=
        code=0
        wait "$1" || code=$?
        [ -n "$interrupted" ] || return "$code"
    done
}

# --- stopping ---------------------------------------------------------------------------------------------------------

asked='' interrupted=''
WARNED="asked to stop by SIGUSR2" ENDED="ended by SIGTERM"
# SLURM's warning before the time limit, or yours (scancel --batch --signal=USR2 JOB). A file reaches the ranks under
# every launcher, and whatever they are doing; `horovodrun --gloo` hands on no signal, others none that comes too early.
on_warning() {
    interrupted=1 asked=$WARNED
    say "$asked: the run saves at its next step"
    tell_run
}
# scancel and preemption send it to the ranks too; 30 seconds later everything is killed.
on_end() {
    interrupted=1 asked=$ENDED
    say "$asked"
    tell_run
}
tell_run() { if [ -d "$RUN_DIR" ]; then echo "$asked" >"$RUN_DIR/STOP"; fi; }
trap on_warning USR2
trap on_end TERM

# What status.json says, without Python: in the minutes before a time limit no container shall be needed for it.
status() {
    local state step total reason
    state=$(fact state)
    [ -n "$state" ] || return 1
    step=$(fact step) total=$(fact total_steps) reason=$(fact reason)
    echo "$state at step ${step:-0} of ${total:-?} $reason"
}

fact() { sed -nE 's/^ *"'"$1"'": ("(([^"\\]|\\.)*)"|([0-9]+)).*/\2\4/p' "$RUN_DIR/status.json"; }

# again REASON: the same job once more, or an end that says why not.
again() {
    if [ "$RESTARTS" -ge "$MAX_REQUEUES" ]; then
        give_up "$1, and this was start $((RESTARTS + 1)) with MAX_REQUEUES=$MAX_REQUEUES" 75
    fi
    scontrol requeue "$JOB" || give_up "$1, and SLURM refuses to requeue" 75
    say "requeued as job $JOB, which SLURM starts in about two minutes: $1; restart $((RESTARTS + 1)) of at most $MAX_REQUEUES"
    exit 0
}

# --- the job ----------------------------------------------------------------------------------------------------------

# Refuse what would waste the allocation.
check_allocation() {
    local left=$((${SLURM_JOB_END_TIME:-9999999999} - $(date +%s)))
    [ "$left" -gt 480 ] || say "$((left / 60)) minutes until the time limit, and the warning to save comes 5 minutes" \
        "before it: a longer --time, or a later warning (--signal=B:USR2@60)"
    [ "$RESTARTS" -le "$MAX_REQUEUES" ] ||
        refuse "job $JOB was restarted $RESTARTS times, by SLURM itself, and MAX_REQUEUES is $MAX_REQUEUES"
    if [ "$GPUS" -gt 0 ] && [ "$GPUS" -ne "$PER_NODE" ]; then
        refuse "$GPUS GPUs on each node, but $PER_NODE tasks: add --ntasks-per-node=$GPUS"
    fi
}

train() {
    [[ " $* " != *" --run_dir"* ]] || refuse "--run_dir is told before the template: RUN_DIR=runs/mine sbatch ..."
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ] && [[ " $* " != *" --seed"* ]]; then
        set -- "$@" --seed "$SLURM_ARRAY_TASK_ID"
    fi
    if [ -n "${STAGE:-}" ]; then set -- "$@" --data.stage "$STAGE"; fi
    say "job $JOB on $NODES x $PER_NODE tasks ($SLURM_JOB_NODELIST), start $((RESTARTS + 1)): $*"
    check_allocation
    say "the batch on $NODES x $PER_NODE ranks, for the recipe's number of images; the run tells its own:"
    single python -m dist_lars.train "$@" --dry_run --world_size "$RANKS" || exit $?

    claim
    rm -f "$RUN_DIR/STOP" # of an earlier start that ended before it was seen
    set -- "$@" --run_dir "$RUN_DIR"
    preflight "$@"
    if [ "$asked" = "$WARNED" ]; then too_early; fi
    local before code=0
    before=$(cat "$RUN_DIR/status.json" 2>/dev/null) || true
    attend launch "$LAUNCHER" python -m dist_lars.train "$@" || code=$?
    say "the launcher ended with $code"
    if [ "$(cat "$RUN_DIR/status.json" 2>/dev/null)" = "$before" ]; then
        give_up "the run did not begin, for the reason above" "$code"
    fi
    finish "$code"
}

# claim: this job has RUN_DIR; refused while another one does, whose files would be lost.
claim() {
    local other
    mkdir -p "$RUN_DIR" || refuse "RUN_DIR=$RUN_DIR cannot be made"
    if ! (set -o noclobber; echo "$JOB" >"$RUN_DIR/.job") 2>/dev/null; then
        other=$(cat "$RUN_DIR/.job")
        if [ "$other" != "$JOB" ] && [ "$(squeue -h -j "$other" -t RUNNING,SUSPENDED -o %i 2>/dev/null)" ]; then
            refuse "job $other trains in $RUN_DIR: wait for it, stop it (touch $RUN_DIR/STOP), or take another RUN_DIR;" \
                "tasks of an array need none"
        fi
        echo "$JOB" >"$RUN_DIR/.job"
    fi
}

# The next start would come no further.
too_early() {
    give_up "$asked before the run began; before the time limit the warning comes 5 minutes early (--signal): a longer --time" 75
}

# preflight OPTIONS: examine the nodes, and find out which launcher makes one job of all ranks.
preflight() {
    local candidates=("$LAUNCHER") limit=45 code=0
    # Where the ranks wait for each other, both trials together take less than a minute.
    if [ "$LAUNCHER" = auto ]; then candidates=(srun mpirun) limit=22; fi
    LAUNCHER=${candidates[0]}
    if [ "${PREFLIGHT:-yes}" = no ]; then return; fi
    for LAUNCHER in "${candidates[@]}"; do
        say "preflight by $LAUNCHER"
        code=0
        examine "$limit" "$@" || code=$?
        if [ -e "$RUN_DIR/preflight/importing" ]; then
            say "the nodes read the environment for the first time: once more, with five minutes"
            code=0
            examine 300 "$@" || code=$?
            break
        fi
        # A fault that it found would not be mended by another launcher.
        if [ "$code" = 0 ] || [ -e "$RUN_DIR/preflight.json" ]; then break; fi
        if [ "$asked" = "$ENDED" ]; then exit 75; fi
        say "no job of $RANKS ranks by $LAUNCHER (exit code $code)"
    done
    if [ "$code" = 0 ]; then return; fi
    if [ "$asked" = "$WARNED" ]; then too_early; fi
    say "preflight failed: nothing was started (PREFLIGHT=no skips it)"
    [ ! -e "$RUN_DIR/preflight.json" ] || code=3 # launchers change it
    exit "$code"
}

# examine SECONDS OPTIONS: the examination ends itself soon after, unless the launcher hangs.
examine() {
    local most=$(($1 + 45))
    if [ -n "$CONTAINER" ]; then most=600; fi # each node unpacks the image first
    rm -rf "$RUN_DIR/preflight" "$RUN_DIR/preflight.json"
    PATIENCE="timeout --kill-after=10 $most" attend launch "$LAUNCHER" \
        python -m dist_lars.doctor --cluster --limit "$1" "${@:2}"
}

# finish CODE: what the run says of its end decides, for launchers change exit codes.
finish() {
    local outcome
    outcome=$(status) || outcome="unknown, for $RUN_DIR/status.json cannot be read"
    say "the run: $outcome"
    case $outcome in
    finished*) exit 0 ;;
    esac
    if [ "$asked" = "$ENDED" ]; then
        say "whether the job starts again is SLURM's to say: after preemption it does, after a time limit it does not"
        hint
        exit 75
    fi
    case $outcome in
    running*) outcome="the ranks ended without a word: killed, out of memory, a lost node, or a signal to mpirun" ;;
    stopped*)
        if [ "$asked" = "$WARNED" ]; then again "$asked"; fi
        if [ -z "$asked" ] && [[ $outcome == *"time limit"* || $outcome == *SIGUSR2* ]]; then again "$outcome"; fi
        give_up "$outcome" 75
        ;;
    esac
    give_up "$outcome" "$1"
}

# give_up WHY CODE: no further start, for it would end the same way, or nobody wants it.
give_up() {
    say "not requeued: $1"
    hint
    exit $(($2 ? $2 : 1))
}

hint() {
    say "to continue this run: RUN_DIR=$RUN_DIR sbatch ... with the same template and" \
        "options${SLURM_ARRAY_TASK_ID:+, --seed $SLURM_ARRAY_TASK_ID in place of --array}"
}
