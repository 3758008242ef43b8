#!/usr/bin/env bash
# Start the head of an on-premise Ray cluster: token authentication on, dashboard on loopback only.
#
#   cluster/nodes/start_head.sh [--node-ip-address=10.0.0.5] [--num-cpus=0] [--labels sdt-role=searcher] [any `ray start` option]
#
# Ray's other ports listen on every interface whatever is asked here: let a firewall admit only the cluster's nodes.
# Variables: SDT_VENV, RAY_PORT (6379), RAY_DASHBOARD_PORT (8265).
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [[ -z "${RAY_AUTH_TOKEN:-}" && ! -s "$TOKEN_FILE" && -z "${RAY_AUTH_TOKEN_PATH:-}" ]]; then
  (umask 077 && ray get-auth-token --generate >/dev/null)
fi
require_token

ray start --head --port="${RAY_PORT:-6379}" \
  --dashboard-host=127.0.0.1 --dashboard-port="${RAY_DASHBOARD_PORT:-8265}" --disable-usage-stats "$@"

cat <<TEXT

Workers:    copy $TOKEN_FILE to each (mode 0600), then cluster/nodes/start_worker.sh THIS_HOST:${RAY_PORT:-6379} ROLE
Dashboard:  ssh -N -L 8265:127.0.0.1:${RAY_DASHBOARD_PORT:-8265} THIS_HOST, then http://127.0.0.1:8265
TEXT
