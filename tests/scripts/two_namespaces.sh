#!/usr/bin/env bash
# Runs launch/two_nodes.sh as two nodes: in two network namespaces that a virtual wire connects, and that see nothing else. To be
# run in namespaces of its own (unshare --net --pid --fork --mount-proc), which end with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

wired() { # wired ADDRESS: the loopback interface, and this end of the wire
    ip link set lo up
    ip address add "$1/24" dev wire
    ip link set wire up
}

unshare --net sleep infinity &
other=$!
until [ "$(readlink "/proc/$other/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.01; done
ip link add wire type veth peer name wire netns "$other"
wired 10.77.0.1
nsenter --target "$other" --net bash -euc "$(declare -f wired); wired 10.77.0.2"

export INTERFACE=wire
nsenter --target "$other" --net launch/two_nodes.sh 10.77.0.1 1 "$@" &
second=$!
launch/two_nodes.sh 10.77.0.1 0 "$@"
wait "$second"
