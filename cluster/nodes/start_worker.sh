#!/usr/bin/env bash
# Join this machine to an on-premise Ray cluster under a label that a fleet can ask for.
#
#   cluster/nodes/start_worker.sh HEAD:6379 model-server [any `ray start` option]
#   cluster/nodes/start_worker.sh HEAD:6379 searcher --num-cpus=16
#   cluster/nodes/start_worker.sh HEAD:6379 --labels-file=/etc/sdt/labels.yaml        # key: value lines, instead of a role
#
# The same Ray, Python X.Y and sdt-dist must be installed as on the head, and the head's token be in ~/.ray/auth_token.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
  exit 2
}

[[ $# -ge 2 && "$1" == *:* ]] || usage
head="$1"
shift
case "$1" in
  --labels | --labels=* | --labels-file | --labels-file=*) labels=() ;;
  -*) usage ;;
  *)
    labels=("--labels=sdt-role=$1")
    shift
    ;;
esac
require_token

ray start --address="$head" --disable-usage-stats ${labels[@]+"${labels[@]}"} "$@"
