# What the three start scripts share: find ray, insist on a private token. Read by `source`, not run.
set -euo pipefail

# The environment in which sdt-dist is installed. Jobs inherit this PATH, so `sdt` and `python` are found on the head.
SDT_VENV="${SDT_VENV:-$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.venv}"
if [[ -x "$SDT_VENV/bin/ray" ]]; then
  export PATH="$SDT_VENV/bin:$PATH"
fi
command -v ray >/dev/null || {
  echo "ray is not installed here: install sdt-dist, or set SDT_VENV to the environment that has it" >&2
  exit 2
}

export RAY_AUTH_MODE=token
TOKEN_FILE="${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}"

require_token() {
  if [[ -n "${RAY_AUTH_TOKEN:-}" ]]; then
    return
  fi
  if [[ ! -s "$TOKEN_FILE" ]]; then
    echo "no token in $TOKEN_FILE: copy it from the head, e.g. scp -p HEAD:.ray/auth_token ~/.ray/" >&2
    exit 2
  fi
  chmod 600 "$TOKEN_FILE"
}
