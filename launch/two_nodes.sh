#!/usr/bin/env bash
# `shardembed train` on two machines (or, with NODES=4, on more) without a scheduler: run this on each, at about the same time.
#
#     INTERFACE=eth0 launch/two_nodes.sh 10.0.0.1 0 /shared/job.yaml     # on the machine with that address
#     INTERFACE=eth0 launch/two_nodes.sh 10.0.0.1 1 /shared/job.yaml     # on the other
#
# docs/launching.md says what each line is for. From the environment: NODES, RANKS_PER_NODE, INTERFACE, PORT, MAX_RESTARTS, RUN_ID,
# PYTHON.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: two_nodes.sh ADDRESS_OF_NODE_0 NODE CONFIG [ARGUMENTS OF shardembed train]" >&2
    exit 2
fi
head=$1 node=$2
shift 2

ranks=${RANKS_PER_NODE:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)}
if [ "$ranks" = 0 ]; then ranks=1; fi

local_address=()
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
    address=$(ip -4 -oneline address show dev "$INTERFACE" | awk '{ sub("/.*", "", $4); print $4; exit }')
    if [ -z "$address" ]; then
        echo "two_nodes.sh: the interface $INTERFACE has no IPv4 address here; see: ip -4 address" >&2
        exit 2
    fi
    local_address=(--local-addr "$address")
fi

export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NODES:-2}" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-id "${RUN_ID:-shardembed}" --rdzv-endpoint "$head:${PORT:-29500}" \
    --rdzv-conf "is_host=$((node == 0)),join_timeout=600,read_timeout=300" "${local_address[@]}" \
    -m shardembed train "$@"
