#!/usr/bin/env bash
# `shardembed train` on the nodes of a Slurm job: a torchrun agent on each, which meet on the first one.
#
#     sbatch --nodes 4 --gpus-per-node 8 launch/slurm.sh /shared/job.yaml --set data.path=/shared/clicks.parquet
#
# docs/launching.md says what each line is for. From the environment: RANKS_PER_NODE, INTERFACE (eth0, ib0, ...), PORT,
# MAX_RESTARTS, MAX_REQUEUES, PYTHON.
#SBATCH --job-name=shardembed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch [OPTIONS] launch/slurm.sh CONFIG [ARGUMENTS OF shardembed train]" >&2
    exit 2
fi

RANKS=${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
HEAD=${HOSTS%%$'\n'*}
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 10000))}
PYTHON=${PYTHON:-python}
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME=$INTERFACE NCCL_SOCKET_IFNAME=$INTERFACE
fi
export RANKS HEAD PORT PYTHON MAX_RESTARTS="${MAX_RESTARTS:-3}" TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"

agent() { # on every node
    local is_host=0
    if [ "$SLURMD_NODENAME" = "$HEAD" ]; then is_host=1; fi
    exec "$PYTHON" -m torch.distributed.run \
        --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$RANKS" --max-restarts "$MAX_RESTARTS" \
        --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$HEAD:$PORT" \
        --rdzv-conf "is_host=$is_host,join_timeout=600,read_timeout=300" --local-addr "$SLURMD_NODENAME" \
        -m shardembed train "$@"
}

time_is_up() { # Slurm says so two minutes before: end the ranks, and have Slurm start this job again, which goes on
    trap '' USR1
    kill -TERM "$step" || true
    if wait "$step"; then exit 0; fi # it had just finished
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_REQUEUES:-20}" ]; then
        echo "slurm.sh: time is up, and the job has been requeued ${SLURM_RESTART_COUNT:-0} times: it ends here" >&2
        exit 1
    fi
    echo "slurm.sh: time is up; job $SLURM_JOB_ID is requeued, and goes on from its newest checkpoint"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap time_is_up USR1

srun --export=ALL --nodes "$SLURM_JOB_NUM_NODES" --ntasks-per-node 1 --kill-on-bad-exit=1 \
    bash -c "$(declare -f agent); agent \"\$@\"" agent "$@" &
step=$!
wait "$step"
