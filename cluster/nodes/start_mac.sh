#!/usr/bin/env bash
# Join a Mac to a Ray cluster: an experiment, not a supported way. Use `sdt serve` on the Mac instead (docs/guides/clusters.md#macs).
#
# Ray does not support clusters of several machines on macOS. What is known:
#   - RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1 must be set for every Ray process on the Mac, drivers included (this script
#     sets it for what it starts);
#   - --node-ip-address must be given, and the other nodes must reach the Mac on it, without NAT or a sleeping lid;
#   - Ray and Python X.Y must be those of the head, although the head is Linux;
#   - Ray has no resource for Apple's GPU: MLX uses it, Ray does not count it. Place by the label, one server a Mac;
#   - macOS asks once whether python may accept connections; a Mac that sleeps is a dead node.
#
#   cluster/nodes/start_mac.sh HEAD:6379 MAC_IP [any `ray start` option]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ $# -lt 2 || "$1" != *:* ]]; then
  echo "usage: cluster/nodes/start_mac.sh HEAD:6379 MAC_IP [ray start options]" >&2
  exit 2
fi
if [[ "$(uname -s)" != Darwin ]]; then
  echo "this is not macOS: use cluster/nodes/start_worker.sh" >&2
  exit 2
fi
head="$1"
ip="$2"
shift 2
require_token

export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=1
ray start --address="$head" --node-ip-address="$ip" --labels=sdt-role=model-server,sdt-backend=mlx --disable-usage-stats "$@"
