#!/usr/bin/env bash
# Two "hosts" on one machine: network namespaces joined by a veth pair, torchrun on each, one run over both.
#   tests/training/hosts.sh RUN_DIR [options of train.py]       as root; PYTHON names the interpreter
set -euo pipefail
cd "$(dirname "$0")/../.."
run_dir=$1; shift
tag=$$
one=host-a-$tag; two=host-b-$tag
clean() { ip netns del "$one" 2>/dev/null || true; ip netns del "$two" 2>/dev/null || true; }
trap clean EXIT
ip netns add "$one"
ip netns add "$two"
ip link add "va$tag" netns "$one" type veth peer name "vb$tag" netns "$two"
ip -n "$one" addr add 10.77.0.1/24 dev "va$tag"
ip -n "$two" addr add 10.77.0.2/24 dev "vb$tag"
for host in "$one:va$tag" "$two:vb$tag"; do
    ip -n "${host%%:*}" link set lo up
    ip -n "${host%%:*}" link set "${host##*:}" up
done
on_host() { # namespace, interface, number of the node, options
    local host=$1 interface=$2 node=$3; shift 3
    ip netns exec "$host" env GLOO_SOCKET_IFNAME="$interface" TP_SOCKET_IFNAME="$interface" \
        "${PYTHON:-python3}" -m torch.distributed.run --nnodes 2 --nproc_per_node 1 --node_rank "$node" \
        --master_addr 10.77.0.1 --master_port 29400 train.py "$@"
}
on_host "$two" "vb$tag" 1 --run_dir "$run_dir" --trainer.num_nodes 2 --trainer.devices 1 "$@" &
other=$!
on_host "$one" "va$tag" 0 --run_dir "$run_dir" --trainer.num_nodes 2 --trainer.devices 1 "$@"
wait "$other"
