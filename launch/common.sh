# shellcheck shell=bash disable=SC2034
# Sourced by the other launch scripts and by slurm/*.sbatch: finds Python, parses common arguments, checks the config.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Use the repository's virtual environment unless one is active. Launchers find their helper programs on PATH.
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then
    export PATH="$root/.venv/bin:$PATH"
fi
python=$(command -v python || command -v python3 || true)
# Keeps torchrun from warning about its default. The trainer sets the number of threads itself (num_threads).
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
if [ "$(id -u)" = 0 ]; then # Open MPI refuses to run as root otherwise
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
# Seconds after a signal until torchrun kills its workers; its default is 30.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}"
# Names of the environment variables that workers on other hosts need. Excludes ranks that an outer launcher set.
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

# parse ARGUMENTS: set config, workers, hosts (host:slots,...; empty: this host), flags, overrides and options.
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
            [ -z "$config" ] || fail "more than one config file: '$config' and '$1'; write settings as key=value"
            config=$1
            ;;
        esac
        shift
    done
    [ -n "$config" ] || fail "no config file given; usage: $(sed -n 's/^# usage: //p' "$0")"
    if [ -n "$hosts" ]; then
        local slots
        slots=$(count_slots "$hosts")
        workers=${workers:-$slots}
    fi
    workers=${workers:-2}
    [[ $workers =~ ^[1-9][0-9]*$ ]] || fail "-n $workers: the number of workers must be an integer, 1 or more"
}

# read_hostfile FILE: print host:slots,... from lines of the form "host slots=4", "host:4" or "host".
read_hostfile() {
    [ -r "$1" ] || fail "cannot read host file $1"
    sed -E 's/#.*//; s/[[:space:]]+slots[[:space:]]*=[[:space:]]*/:/; s/[[:space:]].*//; /^$/d' "$1" | paste -sd,
}

count_slots() {
    local entry total=0
    for entry in ${1//,/ }; do
        [[ $entry =~ ^[^:]+(:[1-9][0-9]*)?$ ]] || fail "host '$entry' must have the form host:slots"
        [[ $entry == *:* ]] || entry=$entry:1
        total=$((total + ${entry##*:}))
    done
    echo "$total"
}

# check WORKERS CONFIG [key=value ...]: exit with a one-line error and code 2 if the config is invalid. Without it, the
# error would be lost in a launcher's report of dead workers.
check() {
    local workers=$1
    shift
    [ -n "$python" ] || fail "no Python found: run 'make' in $root, or activate the environment that has disttrain"
    "$python" -m disttrain config "$1" --workers "$workers" "${@:2}" >/dev/null
}

# need COMMAND HOW-TO-INSTALL-IT
need() {
    command -v "$1" >/dev/null || fail "$1 is not installed: $2"
}

# supervise HOW COMMAND ...: run a launcher until it exits, and return its exit code. If this script receives INT, TERM, HUP
# or USR1, it requests the workers to save and exit, and returns 75. A second signal, at least two seconds later, ends the
# workers immediately. HOW is how to request it:
#   TERM, USR1   send this signal to the launcher, which forwards it to its workers and gives them time to exit
#   workers      signal the launcher's workers on this host, for launchers that do not forward signals. A signal to one
#                worker is enough, since the ranks agree on when to exit
supervise() {
    local how=$1 code=0
    stop_requested_at='' stop_forced=''
    shift
    set -m # runs the launcher in its own process group, so that signals from a terminal reach only this script
    "$@" </dev/null &
    local launcher=$!
    set +m
    # shellcheck disable=SC2064
    trap "request_stop $how $launcher" INT TERM HUP USR1
    wait "$launcher" || code=$?
    while kill -0 "$launcher" 2>/dev/null; do # a signal interrupts `wait`
        code=0
        wait "$launcher" || code=$?
    done
    trap - INT TERM HUP USR1
    # torchrun and horovodrun exit with 1, whatever non-zero code their workers exit with.
    if [ -n "$stop_requested_at" ] && [ -z "$stop_forced" ] && [ "$code" = 1 ]; then code=75; fi
    return "$code"
}

# request_stop HOW LAUNCHER: handle a signal, see supervise.
request_stop() {
    if [ -n "$stop_requested_at" ]; then
        if [ $((SECONDS - stop_requested_at)) -ge 2 ]; then
            stop_forced=yes
            signal_workers TERM "$2"
            kill -TERM -- "-$2" 2>/dev/null || true
        fi
        return 0 # a bare return would pass on the status of the interrupted command
    fi
    stop_requested_at=$SECONDS
    case $1 in
    workers) signal_workers USR1 "$2" ;;
    *) kill "-$1" "$2" 2>/dev/null || true ;;
    esac
}

# signal_workers SIGNAL LAUNCHER: send a signal to all workers of the launcher on this host.
signal_workers() {
    "$python" - "$@" <<'PYTHON' || true
import contextlib, signal, sys, psutil
for process in psutil.Process(int(sys.argv[2])).children(recursive=True):
    with contextlib.suppress(psutil.NoSuchProcess):
        if "python" in process.name() and " -m disttrain train " in " ".join(process.cmdline()):
            process.send_signal(signal.Signals["SIG" + sys.argv[1]])
PYTHON
}
