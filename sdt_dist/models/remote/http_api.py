"""What the HTTP model server and its client agree on: headers, addresses, tokens, errors.

See docs/architecture/fleet.md.

It must not know sockets, models or searches.

    GET  /healthz      {"status": "ok"}; the only path without a token
    GET  /v1/model     {"version", "card", "limits": {"max_rows", "max_body_bytes"}, "flows": [identity, ...]}
    POST /v1/answer    packed requests (`wire`) as safetensors -> packed replies as safetensors
    POST /v1/release   {"digests": [hex, ...]} -> {"released": n}
Errors are {"error": message, "kind": name of an SdtError}.
"""

from __future__ import annotations

import ipaddress
import json
from urllib.parse import urlsplit

from sdt_dist import errors
from sdt_dist.errors import ConfigurationError, FleetError, SdtError

HEALTH = "/healthz"
MODEL = "/v1/model"
ANSWER = "/v1/answer"
RELEASE = "/v1/release"
REQUEST_ID = "X-SDT-Request"  # names one message; repeating it gives the same answer, computed once
CLIENT_ID = "X-SDT-Client"  # whose problems these are: two clients never share a problem's cache or its cost
IDENTITY = "X-SDT-Model"  # the card's identity, so that no search goes on with another model
DEADLINE = (
    "X-SDT-Timeout-S"  # how long the caller will wait; what has not begun by then never begins
)
TOKEN_VARIABLE = "SDT_HTTP_TOKEN"
_SHORTEST_TOKEN = 16
_KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, SdtError)
}


def check_token(token: str, owner: str) -> str:
    """The token, if it can be one; ConfigurationError, which never shows it."""
    if (
        len(token) < _SHORTEST_TOKEN
        or not token.isascii()
        or not token.isprintable()
        or " " in token
    ):
        raise ConfigurationError(
            f"{owner}: not a token; allowed: at least {_SHORTEST_TOKEN} printable ASCII characters without spaces, "
            "e.g. from `openssl rand -hex 32`."
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether an address means this machine and nothing else; names other than localhost do not count."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_url(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of a server's address; ConfigurationError says what is wrong with it.

    Credentials in it are refused, as addresses end up in logs and result files; so is plain http to another machine.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port = parts.port
    except ValueError as error:
        raise ConfigurationError(
            f"model: the address cannot be read ({error}); give e.g. http://127.0.0.1:8011."
        ) from error
    if "@" in parts.netloc:
        raise ConfigurationError(
            f"model: the address of {host!r} holds credentials; leave them out and set {TOKEN_VARIABLE} instead."
        )
    if (
        parts.scheme not in ("http", "https")
        or not host
        or parts.path.strip("/")
        or parts.query
        or parts.fragment
    ):
        raise ConfigurationError(
            f"model: {url!r}, allowed: http://HOST:PORT or https://HOST:PORT and nothing after it."
        )
    if parts.scheme == "http" and not is_loopback(host):
        raise ConfigurationError(
            f"model: {url!r} would send the token and the prompts unencrypted; use https:// (sdt serve --tls-cert "
            f"--tls-key), or an SSH tunnel: `ssh -N -L 8011:127.0.0.1:8011 {host}` and http://127.0.0.1:8011."
        )
    return parts.scheme, host, port or (443 if parts.scheme == "https" else 80)


def error_json(error: Exception) -> dict[str, str]:
    """An error as it travels; what is no SdtError becomes a FleetError."""
    kind = next(
        (base.__name__ for base in type(error).__mro__ if base.__name__ in _KINDS),
        FleetError.__name__,
    )
    return {"error": str(error), "kind": kind}


def error_from_json(status: int, body: bytes, where: str) -> SdtError:
    """The error that a server sent; a FleetError for an answer that is none of ours."""
    try:
        values = json.loads(body)
        return _KINDS[values["kind"]](str(values["error"]))
    except (ValueError, KeyError, TypeError):
        return FleetError(
            f"{where} answered with status {status}, but not as `sdt serve` does; check the address."
        )
