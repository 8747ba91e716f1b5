#!/usr/bin/env bash
# Train under mpirun: on the mpi engine, or with engine=horovod on Horovod over MPI.
#
# usage: launch/mpi.sh CONFIG [-n N] [-H host1:4,host2:4] [key=value ...] [-- OPTIONS OF mpirun]
#   -n N             number of workers (default: all slots of the hosts; 2 without hosts)
#   -H HOSTS         host:slots,... reached by ssh; they must see this directory and Python under the same paths
#   --hostfile FILE  the same, a line a host: "host slots=4"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
need mpirun "pip install 'disttrain[mpi]', or load your cluster's MPI module"
check "$workers" "$config" engine=mpi "${overrides[@]}"

if mpirun --version 2>&1 | grep -q 'Open MPI\|OpenRTE'; then
    # By its whole path, Open MPI looks for itself under the same path on the other hosts. Binding would squeeze the threads
    # of a worker onto one core.
    launcher=("$(command -v mpirun)" -n "$workers" --bind-to none --map-by slot)
    if [ -n "$hosts" ]; then launcher+=(-H "$hosts"); else launcher+=(--oversubscribe); fi
    for name in "${forwarded[@]}"; do
        if [ -n "${!name:-}" ]; then launcher+=(-x "$name"); fi
    done
else # MPICH and its kin: Hydra takes the environment along by itself
    launcher=(mpirun -n "$workers")
    if [ -n "$hosts" ]; then launcher+=(-hosts "$hosts"); fi
fi
# mpirun leaves its workers a second after TERM, and as long as they like after USR1, which it passes on.
supervise USR1 "${launcher[@]}" "${options[@]}" "$python" -m disttrain train "$config" engine=mpi "${overrides[@]}"
