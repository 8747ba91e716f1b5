#!/usr/bin/env bash
# Train with N workers on this machine, over torch.distributed (NCCL if there are GPUs, otherwise gloo).
#
# usage: launch/local.sh CONFIG [-n N] [key=value ...] [-- OPTIONS OF torchrun]
#   -n N    number of workers (default 2)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
[ -z "$hosts" ] || fail "local.sh starts workers on this machine only: use torchrun.sh for hosts"
check "$workers" "$config" engine=torch "${overrides[@]}"
supervise TERM "$python" -m torch.distributed.run --standalone --nproc-per-node "$workers" "${options[@]}" \
    -m disttrain train "$config" engine=torch "${overrides[@]}"
