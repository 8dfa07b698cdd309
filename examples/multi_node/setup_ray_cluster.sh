#!/usr/bin/env bash
# A Ray cluster of three nodes for tuft-jupyter: run this on each of them, first on the head.
#
#   setup_ray_cluster.sh head                     # node 0: trains, on 4 GPUs
#   HEAD_IP=10.0.0.1 setup_ray_cluster.sh worker  # node 1, node 2: sample, on 8 GPUs each
#
# NUM_GPUS is how many GPUs a node offers, PORT where the head listens; CUDA_VISIBLE_DEVICES says which GPUs those are.
# Arguments after the first go to `ray start`. Nothing is stopped: a cluster that runs already is left alone.
set -euo pipefail

role=${1:?head or worker}
shift
port=${PORT:-6379}
temp=${RAY_TEMP_DIR:-/tmp/ray_$(id -u)}

case $role in
head)
    ray start --head \
        --port "$port" \
        --node-ip-address "${HEAD_IP:-$(hostname -I | cut -d' ' -f1)}" \
        --num-gpus "${NUM_GPUS:-4}" \
        --temp-dir "$temp" \
        --disable-usage-stats "$@"
    ;;
worker)
    ray start \
        --address "${HEAD_IP:?the address of the head}:$port" \
        --num-gpus "${NUM_GPUS:-8}" \
        --temp-dir "$temp" \
        --disable-usage-stats "$@"
    ;;
*)
    echo "head or worker, not $role" >&2
    exit 2
    ;;
esac
