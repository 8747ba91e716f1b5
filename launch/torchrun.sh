#!/usr/bin/env bash
# Train over torch.distributed on several hosts, with one torchrun per host, started by ssh.
# All hosts need this directory and Python under the same paths.
#
# usage: launch/torchrun.sh CONFIG -H host1:4,host2:4 [key=value ...] [-- OPTIONS OF torchrun]
#   -H HOSTS         host:slots,...; rank 0 runs on the first (default: this host, with -n N workers, or 2)
#   --hostfile FILE  the same from a file with one host per line: "host slots=4"
# environment variables:
#   MASTER_PORT      port of rank 0 (default 29500)
#   DISTTRAIN_SSH    command that starts a remote shell (default ssh)
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

parse "$@"
if [ -z "$hosts" ]; then
    exec "$(dirname "${BASH_SOURCE[0]}")/local.sh" "$config" -n "$workers" "${overrides[@]}" -- "${options[@]}"
fi
[ "$workers" = "$(count_slots "$hosts")" ] || fail "-n $workers contradicts the slots of -H $hosts: torchrun fills all slots, so omit -n"
IFS=, read -ra entries <<<"$hosts"
master=${entries[0]%%:*}
case $master in
localhost | 127.*) [ ${#entries[@]} = 1 ] || fail "the other hosts cannot reach rank 0 as '$master': use this host's name" ;;
esac
check "$workers" "$config" engine=torch "${overrides[@]}"
variables=()
for name in "${forwarded[@]}"; do
    if [ -n "${!name:-}" ]; then variables+=("$name=${!name}"); fi
done

is_this_host() {
    case $1 in localhost | 127.0.0.1 | "$(hostname)" | "$(hostname -s)" | "$(hostname -f 2>/dev/null)") return 0 ;; esac
    return 1
}

# A command that ssh started outlives ssh. This ends the remote torchrun when its input closes, as our end of ssh is gone.
# shellcheck disable=SC2016
tethered='"$@" </dev/null & torchrun=$!
{ while read -r _; do :; done; kill $torchrun 2>/dev/null; } <&3 & tether=$!
wait $torchrun; code=$?; kill $tether 2>/dev/null; exit $code'
read -ra remote_shell <<<"${DISTTRAIN_SSH:-ssh}"
directory=$(mktemp -d)
mkfifo "$directory/silence"
exec 9<>"$directory/silence" # nothing is ever written to it, and it stays open while this script runs
rm -r "$directory"

processes=()
stop() {
    kill "${processes[@]}" 2>/dev/null || true
    wait
}
trap 'stop; exit 75' INT TERM HUP USR1 # torchrun forwards TERM, and the workers save and exit

for index in "${!entries[@]}"; do
    host=${entries[$index]%%:*}
    slots=${entries[$index]##*:}
    [[ ${entries[$index]} == *:* ]] || slots=1
    command=("$python" -m torch.distributed.run --nnodes "${#entries[@]}" --node-rank "$index" --nproc-per-node "$slots"
        --master-addr "$master" --master-port "${MASTER_PORT:-29500}" "${options[@]}"
        -m disttrain train "$config" engine=torch "${overrides[@]}")
    if is_this_host "$host"; then
        "${command[@]}" 9>&- &
    else
        quoted=$(printf "%q " env "${variables[@]}" sh -c "$tethered" torchrun "${command[@]}")
        "${remote_shell[@]}" "$host" "cd $(printf %q "$PWD") && exec 3<&0 && $quoted" <&9 9>&- &
    fi
    processes+=($!)
done

# After the first failure, stop the others: their torchrun would wait for the lost host.
code=0
for _ in "${processes[@]}"; do
    wait -n || {
        code=$?
        stop
        break
    }
done
exit "$code"
