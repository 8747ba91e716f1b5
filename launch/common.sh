# shellcheck shell=bash disable=SC2034
# Sourced by the scripts beside it and by slurm/*.sbatch: finds Python, reads the common arguments, checks the config.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# The repository's own environment, unless one is active. Launchers start their helpers by name, so PATH must lead there.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    export PATH="$root/.venv/bin:$PATH"
fi
python=$(command -v python || command -v python3 || true)
# The trainer sets the number of threads itself (num_threads); this only keeps torchrun from warning about its own default.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$(id -u)" = 0 ]; then # Open MPI refuses to run as root otherwise
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# torchrun kills workers that are not done so many seconds after a signal; its default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
# What a worker on another host needs of this environment: by name, and by prefix what settings go by. Not the ranks that
# an outer launcher may have left.
forwarded=()
while read -r name; do
    case $name in
    HOROVOD_RANK | HOROVOD_SIZE | HOROVOD_LOCAL_* | HOROVOD_CROSS_* | DISTTRAIN_SSH) ;;
    PATH | PYTHONPATH | LD_LIBRARY_PATH | LD_PRELOAD | MASTER_ADDR | MASTER_PORT | *_proxy | *_PROXY) forwarded+=("$name") ;;
    CUBLAS_* | CUDA_* | DISTTRAIN_* | FI_* | GLOO_* | GOMP_* | HOROVOD_* | KMP_* | MALLOC_* | MKL_* | NCCL_* | NUMBA_* | \
        NVIDIA_* | OMP_* | OPENBLAS_* | PYTHON* | PYTORCH_* | TORCH_* | TORCHINDUCTOR_* | TRITON_* | UCX_* | XDG_CACHE_HOME)
        forwarded+=("$name")
        ;;
    esac
done < <(compgen -e)

fail() {
    echo "error: $*" >&2
    exit 2
}

# parse ARGUMENTS: sets config, workers, hosts (host:slots,...; empty: this host), flags, overrides and options.
parse() {
    config='' workers='' hosts='' flags=() overrides=() options=()
    while [ $# -gt 0 ]; do
        case $1 in
        -h | --help)
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        -n | -H | --hostfile)
            [ $# -ge 2 ] || fail "$1 needs a value"
            case $1 in
            -n) workers=$2 ;;
            -H) hosts=$2 ;;
            --hostfile) hosts=$(read_hostfile "$2") ;;
            esac
            shift
            ;;
        --mpi | --gloo) flags+=("$1") ;;
        --)
            shift
            options=("$@")
            break
            ;;
        -*) fail "unknown option $1 (see $(basename "$0") --help; the launcher's own options go after --)" ;;
        *=*) overrides+=("$1") ;;
        *)
            [ -z "$config" ] || fail "one config file, please: '$config' or '$1'? Settings are written key=value"
            config=$1
            ;;
        esac
        shift
    done
    [ -n "$config" ] || fail "which config file? $(sed -n 's/^# usage: //p' "$0")"
    if [ -n "$hosts" ]; then
        local slots
        slots=$(count_slots "$hosts")
        workers=${workers:-$slots}
    fi
    workers=${workers:-2}
    [[ $workers =~ ^[1-9][0-9]*$ ]] || fail "-n $workers: the number of workers must be a whole number, 1 or more"
}

# A line a host: "host slots=4", "host:4" or "host" -> host:4,...
read_hostfile() {
    [ -r "$1" ] || fail "cannot read the host file $1"
    sed -E 's/#.*//; s/[[:space:]]+slots[[:space:]]*=[[:space:]]*/:/; s/[[:space:]].*//; /^$/d' "$1" | paste -sd,
}

count_slots() {
    local entry total=0
    for entry in ${1//,/ }; do
        [[ $entry =~ ^[^:]+(:[1-9][0-9]*)?$ ]] || fail "host '$entry' is not of the form host:slots"
        [[ $entry == *:* ]] || entry=$entry:1
        total=$((total + ${entry##*:}))
    done
    echo "$total"
}

# check WORKERS CONFIG [key=value ...]: one clear line and exit code 2 here, rather than a launcher's report of N dead workers.
check() {
    local workers=$1
    shift
    [ -n "$python" ] || fail "no Python found: run 'make' in $root, or activate the environment that has disttrain"
    "$python" -m disttrain config "$1" --workers "$workers" "${@:2}" >/dev/null
}

# need COMMAND HOW-TO-GET-IT
need() {
    command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

# supervise HOW COMMAND ...: run a launcher to its end; the status is its code. INT, TERM, HUP or USR1 to this script asks the
# workers to save and end, and the code is 75 then; a second such signal, two seconds or more later, ends them at once. HOW:
#   TERM, USR1   the launcher passes this signal on to its workers, and leaves them time
#   workers      it does not: signal its workers on this host. One of them is enough: the ranks agree on when to end
supervise() {
    local how=$1 code=0
    asked='' hurried=''
    shift
    set -m # a process group of its own: what a terminal sends goes through here
    "$@" </dev/null &
    local launcher=$!
    set +m
    # shellcheck disable=SC2064
    trap "ask $how $launcher" INT TERM HUP USR1
    wait "$launcher" || code=$?
    while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` early
        code=0
        wait "$launcher" || code=$?
    done
    trap - INT TERM HUP USR1
    # torchrun and horovodrun make 1 of whatever code their workers end with.
    if [ -n "$asked" ] && [ -z "$hurried" ] && [ "$code" = 1 ]; then code=75; fi
    return "$code"
}

ask() {
    if [ -n "$asked" ]; then
        if [ $((SECONDS - asked)) -ge 2 ]; then
            hurried=yes
            tell_workers TERM "$2"
            kill -TERM -- "-$2" 2>/dev/null || true
        fi
        return 0 # without a number it would be the status of what the signal interrupted
    fi
    asked=$SECONDS
    case $1 in
    workers) tell_workers USR1 "$2" ;;
    *) kill "-$1" "$2" 2>/dev/null || true ;;
    esac
}

# tell_workers SIGNAL LAUNCHER: send it to all workers that the launcher has on this host.
tell_workers() {
    "$python" - "$@" <<'PYTHON' || true
import contextlib, signal, sys, psutil
for process in psutil.Process(int(sys.argv[2])).children(recursive=True):
    with contextlib.suppress(psutil.NoSuchProcess):
        if "python" in process.name() and " -m disttrain train " in " ".join(process.cmdline()):
            process.send_signal(signal.Signals["SIG" + sys.argv[1]])
PYTHON
}
