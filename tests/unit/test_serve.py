"""`sdt serve`, addresses, tokens and TLS: what is refused, and why, before a model loads."""

from __future__ import annotations

import http.client
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sdt_dist.cluster.cli import app
from sdt_dist.errors import ConfigurationError
from sdt_dist.models.card import card_of
from sdt_dist.models.loading import load_model
from sdt_dist.models.remote.http_client import HttpModel
from sdt_dist.models.remote.http_token import client_token, server_token
from sdt_dist.models.spec import check_spec
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import PriorLaw, RolloutRequest, Root
from sdt_dist.serving.http import check_bind, tls_context
from tests.http_helpers import TOKEN, RunningServer


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("http://user:secret@127.0.0.1:8011", "holds credentials"),
        ("http://10.0.0.5:8011", "ssh -N -L"),
        ("http://mac.example:8011", "unencrypted"),
        ("http://localhost.evil.example:8011", "unencrypted"),
        ("http://127.0.0.1:8011/v1", "nothing after it"),
        ("http://127.0.0.1:8011?token=x", "nothing after it"),
        ("http://:8011", "allowed"),
        ("http://127.0.0.1:port", "cannot be read"),
        ("https://", "allowed"),
    ],
)
def test_addresses_that_are_refused(url, named):
    with pytest.raises(ConfigurationError, match=re.escape(named)) as caught:
        check_spec(url)
    assert "secret" not in str(caught.value)


def test_addresses_that_are_fine():
    for url in (
        "http://127.0.0.1:8011",
        "http://localhost:8011/",
        "http://[::1]:8011",
        "https://mac.example",
    ):
        check_spec(url)


def test_the_server_chooses_its_device():
    with pytest.raises(ConfigurationError, match="sdt serve --device"):
        load_model("http://127.0.0.1:1", device="cpu")


def test_only_loopback_is_served_without_tls():
    for host in ("127.0.0.1", "localhost", "::1", "127.3.2.1"):
        check_bind(host, has_tls=False)
    for host in ("0.0.0.0", "::", "10.0.0.5", "mac.example", ""):
        check_bind(host, has_tls=True)
        with pytest.raises(ConfigurationError, match="ssh -N -R"):
            check_bind(host, has_tls=False)


def test_a_client_without_a_token_is_told_how_to_get_one(monkeypatch):
    monkeypatch.delenv("SDT_HTTP_TOKEN", raising=False)
    with pytest.raises(ConfigurationError, match="SDT_HTTP_TOKEN: not set"):
        HttpModel("http://127.0.0.1:1")
    monkeypatch.setenv("SDT_HTTP_TOKEN", f" {TOKEN}\n")
    assert client_token() == TOKEN
    for bad in ("short", "with a space 0123456789", "line\nbreak-0123456789", "é" * 20):
        with pytest.raises(ConfigurationError, match="not a token") as caught:
            HttpModel("http://127.0.0.1:1", bad)
        assert bad not in str(caught.value)


def test_a_token_file_is_made_once_for_its_owner_only(tmp_path, monkeypatch):
    monkeypatch.delenv("SDT_HTTP_TOKEN", raising=False)
    path = tmp_path / "deep" / "token"
    token, place = server_token(None, path)
    assert (stat.S_IMODE(path.stat().st_mode), place) == (0o600, str(path))
    assert len(token) == 64
    assert server_token(path, tmp_path / "other") == (token, place)
    assert not (tmp_path / "other").exists()
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="chmod 600"):
        server_token(path, path)
    path.chmod(0o600)
    path.write_text("short")
    with pytest.raises(ConfigurationError, match="not a token"):
        server_token(path, path)
    with pytest.raises(ConfigurationError, match="cannot be used"):
        server_token(tmp_path, path)


def test_the_environments_token_is_used_where_no_file_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("SDT_HTTP_TOKEN", TOKEN)
    token, place = server_token(None, tmp_path / "token")
    assert token == TOKEN and "SDT_HTTP_TOKEN" in place
    assert not (tmp_path / "token").exists()
    assert server_token(tmp_path / "token", tmp_path / "token")[0] != TOKEN


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--host", "0.0.0.0"], "without TLS"),
        (["--tls-cert", "a.pem"], "only one was given"),
        (["--tls-cert", "a.pem", "--tls-key", "b.pem"], "cannot be used"),
        (["--model", "nonsense"], "unknown model"),
    ],
)
def test_serve_refuses_before_it_loads(arguments, named, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sdt_dist.models.loading.load_model", lambda *_, **__: pytest.fail("loaded")
    )
    result = CliRunner().invoke(app, ["serve", "--token-file", str(tmp_path / "token"), *arguments])
    assert isinstance(result.exception, ConfigurationError)
    assert named in str(result.exception)


def test_tls_works_with_a_trusted_certificate_only(tmp_path, monkeypatch):
    certificate = tmp_path / "cert.pem"
    key = tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
               "-days", "2", "-keyout", str(key), "-out", str(certificate), "-subj", "/CN=sdt", "-addext",
               "subjectAltName=IP:127.0.0.1"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    model = Toy(5, 6, 1.0)
    with RunningServer(model, card_of(model), tls=tls_context(certificate, key)) as server:
        with pytest.raises(ConfigurationError, match="SSL_CERT_FILE"):
            HttpModel(server.url, TOKEN, attempts=1)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        asked = [RolloutRequest(Root((1,), b"x"), (), 6, 1)]
        (reply,) = server.client().rollout(asked, PriorLaw((0, 5)))
        assert (
            reply.tokens.tolist()
            == Toy(5, 6, 1.0).rollout(asked, PriorLaw((0, 5)))[0].tokens.tolist()
        )


@contextmanager
def _killed_at_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    """So that a test that fails does not wait for its process."""
    try:
        yield
    finally:
        process.kill()


def test_serve_starts_answers_and_ends_cleanly(tmp_path):
    token_file = tmp_path / "token"
    command = [
        sys.executable,
        "-m",
        "sdt_dist.cluster.cli",
        "serve",
        "--port",
        "0",
        "--token-file",
        str(token_file),
    ]
    environment = {k: v for k, v in os.environ.items() if k != "SDT_HTTP_TOKEN"}
    root = Path(__file__).parents[2]
    with (
        subprocess.Popen(
            command,
            cwd=root,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # a background job has it ignored
        ) as server,
        _killed_at_the_end(server),
    ):
        assert server.stdout is not None
        line = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, (line, server.stderr and server.stderr.read())
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
        connection.request("GET", "/healthz")
        assert connection.getresponse().status == 200
        connection.close()
        model = HttpModel(found[0], token_file.read_text().strip())
        assert model.card.name == "bundled" and model.vocab_size == 1024
        model.close()
        server.send_signal(signal.SIGINT)
        output, errors = server.communicate(timeout=30)
    assert server.returncode == 130
    assert errors == "sdt: stopped.\n"
    assert str(token_file) in line and token_file.read_text().strip() not in line + output + errors
