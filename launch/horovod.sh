#!/usr/bin/env bash
# Train on Horovod under horovodrun.
#
# usage: launch/horovod.sh CONFIG [-n N] [-H host1:4,host2:4] [--gloo | --mpi] [key=value ...] [-- OPTIONS OF horovodrun]
#   -n N             number of workers (default: all slots of the hosts; 2 without hosts)
#   -H HOSTS         host:slots,... reached by ssh; they must see this directory and Python under the same paths
#   --hostfile FILE  the same, a line a host: "host slots=4"
#   --gloo, --mpi    what carries the collectives (default --gloo; --mpi needs Open MPI 4)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
need horovodrun "launch/install-horovod.sh"
case ${#flags[@]} in
0) flags=(--gloo) ;;
1) ;;
*) fail "--gloo or --mpi, not both" ;;
esac
[ "${flags[0]}" != --mpi ] || need mpirun "pip install 'disttrain[mpi]'"
check "$workers" "$config" engine=horovod "${overrides[@]}"

if [ -n "$hosts" ]; then
    options+=(-H "$hosts")
    mpirun=$(command -v mpirun || true) # looked for under the same path on the other hosts
    if [ "${flags[0]}" = --mpi ]; then options+=(--mpi-args="--prefix ${mpirun%/bin/mpirun}"); fi
fi
command=(horovodrun -np "$workers" "${flags[@]}" "${options[@]}"
    "$python" -m disttrain train "$config" engine=horovod "${overrides[@]}")
# horovodrun leaves its workers 5 seconds after TERM, or none; with --mpi it is a shell that passes no signal on.
supervise workers "${command[@]}"
