#!/usr/bin/env bash
# Train on Horovod under horovodrun.
#
# usage: launch/horovod.sh CONFIG [-n N] [-H host1:4,host2:4] [--gloo | --mpi] [key=value ...] [-- OPTIONS OF horovodrun]
#   -n N             number of workers (default: all slots of the hosts; 2 without hosts)
#   -H HOSTS         host:slots,... reached by ssh; all need this directory and Python under the same paths
#   --hostfile FILE  the same from a file with one host per line: "host slots=4"
#   --gloo, --mpi    library for the collectives (default --gloo; --mpi needs Open MPI 4)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
need horovodrun "launch/install-horovod.sh"
case ${#flags[@]} in
0) flags=(--gloo) ;;
1) ;;
*) fail "--gloo and --mpi exclude each other" ;;
esac
[ "${flags[0]}" != --mpi ] || need mpirun "pip install 'disttrain[mpi]'"
check "$workers" "$config" engine=horovod "${overrides[@]}"

if [ -n "$hosts" ]; then
    options+=(-H "$hosts")
    mpirun=$(command -v mpirun || true) # the other hosts need it under the same path
    if [ "${flags[0]}" = --mpi ]; then options+=(--mpi-args="--prefix ${mpirun%/bin/mpirun}"); fi
fi
command=(horovodrun -np "$workers" "${flags[@]}" "${options[@]}"
    "$python" -m disttrain train "$config" engine=horovod "${overrides[@]}")
# After TERM, horovodrun gives its workers at most 5 seconds. With --mpi it is a shell that does not forward signals.
supervise workers "${command[@]}"
