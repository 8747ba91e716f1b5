#!/usr/bin/env bash
# Train under mpirun on the mpi engine, or on Horovod over MPI with engine=horovod.
#
# usage: launch/mpi.sh CONFIG [-n N] [-H host1:4,host2:4] [key=value ...] [-- OPTIONS OF mpirun]
#   -n N             number of workers (default: all slots of the hosts; 2 without hosts)
#   -H HOSTS         host:slots,... reached by ssh; all need this directory and Python under the same paths
#   --hostfile FILE  the same from a file with one host per line: "host slots=4"
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
need mpirun "pip install 'disttrain[mpi]', or load your cluster's MPI module"
check "$workers" "$config" engine=mpi "${overrides[@]}"

if mpirun --version 2>&1 | grep -q 'Open MPI\|OpenRTE'; then
    # If started by its full path, Open MPI uses the same path on the other hosts. Binding could force all threads of a
    # worker onto one core.
    launcher=("$(command -v mpirun)" -n "$workers" --bind-to none --map-by slot)
    if [ -n "$hosts" ]; then launcher+=(-H "$hosts"); else launcher+=(--oversubscribe); fi
    for name in "${forwarded[@]}"; do
        if [ -n "${!name:-}" ]; then launcher+=(-x "$name"); fi
    done
else # MPICH and its derivatives: Hydra passes the environment on by default
    launcher=(mpirun -n "$workers")
    if [ -n "$hosts" ]; then launcher+=(-hosts "$hosts"); fi
fi
# After TERM, mpirun gives its workers one second. It forwards USR1 and then waits as long as the workers need.
supervise USR1 "${launcher[@]}" "${options[@]}" "$python" -m disttrain train "$config" engine=mpi "${overrides[@]}"
