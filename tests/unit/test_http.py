"""The HTTP model server and its client: the same answers as at home, computed once, and refusals that say why."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

import sdt_dist as sdt
from sdt_dist.errors import ConfigurationError, ContextError, FleetError
from sdt_dist.models.card import ServedModel, card_of
from sdt_dist.models.loading import load_model
from sdt_dist.models.remote.http_api import CLIENT_ID, DEADLINE, IDENTITY, REQUEST_ID
from sdt_dist.models.remote.http_client import _BLOCK_BYTES, HttpModel
from sdt_dist.models.remote.wire import pack_requests, unpack_replies
from sdt_dist.models.toy import Toy
from sdt_dist.protocols import ExpandRequest, PriorLaw, RolloutRequest, Root
from sdt_dist.serving.http import ServerLimits
from tests.http_helpers import TOKEN, RunningServer
from tests.unit.test_card import language

LAW = PriorLaw((0, 5))
ROOT = Root((1,), b"0" * 16)


class GatedToy(Toy):
    """A toy whose rollouts wait for `gate`, and that remembers the batches it was asked for."""

    def __init__(self) -> None:
        super().__init__(5, 6, 1.0)
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.batches = list[int]()

    def rollout(self, requests, law):
        self.entered.set()
        assert self.gate.wait(20)
        self.batches.append(len(requests))
        return super().rollout(requests, law)


@pytest.fixture
def gated() -> Iterator[tuple[GatedToy, RunningServer]]:
    model = GatedToy()
    with RunningServer(model, card_of(model), limits=ServerLimits(queue_rows=8)) as server:
        yield model, server
        model.gate.set()


@pytest.fixture(scope="module")
def plain() -> Iterator[RunningServer]:
    model = Toy(5, 6, 1.0)
    with RunningServer(model, card_of(model)) as server:
        yield server


def rollouts(count: int, first_key: int = 0) -> list[RolloutRequest]:
    return [RolloutRequest(ROOT, (), 6, first_key + i) for i in range(count)]


def raw(
    server: RunningServer, method: str, path: str, body: bytes = b"", **headers: str
) -> tuple[int, bytes, dict]:
    """An answer's status, body and headers; underscores in header names stand for hyphens."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    try:
        connection.request(
            method, path, body, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        response = connection.getresponse()
        return response.status, response.read(), dict(response.getheaders())
    finally:
        connection.close()


def post(
    server: RunningServer, body: bytes, name: str = "one", **changed: str
) -> tuple[int, bytes, dict]:
    headers = {
        "Authorization": f"Bearer {TOKEN}", REQUEST_ID: name, CLIENT_ID: "raw", DEADLINE: "20",
        IDENTITY: server.service.card.identity, **changed,
    }  # fmt: skip
    return raw(server, "POST", "/v1/answer", body, **headers)


def packed(requests, law: PriorLaw = LAW) -> bytes:
    return save(pack_requests(requests, law))


# --- the same answers ---


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["snis", "residual_ts"])
def test_a_search_over_http_draws_the_same_samples_at_the_same_cost(method, monkeypatch):
    local = load_model("bundled")
    history = np.sin(np.arange(120) / 5.0) + 0.1 * np.random.default_rng(0).standard_normal(120)
    options = {
        "method": method,
        "max_new_tokens": 8,
        "num_rollouts": 12,
        "seed": 3,
        "inverse_temperature": 2.0,
    }

    def reward(samples):
        return [-abs(float(series.mean())) for series in samples]

    with RunningServer(local.model, card_of(local, "bundled")) as server:
        monkeypatch.setenv("SDT_HTTP_TOKEN", TOKEN)
        remote = load_model(server.url)
        assert isinstance(remote, ServedModel) and remote.is_forecaster
        have = sdt.search(remote, history, reward, **options)
        remote.model.close()
    want = sdt.search(load_model("bundled"), history, reward, **options)
    assert [s.tokens for s in have.samples] == [s.tokens for s in want.samples]
    assert [s.log_prob for s in have.samples] == [s.log_prob for s in want.samples]
    assert (have.log_z, have.nfe, have.model_calls) == (want.log_z, want.nfe, want.model_calls)
    assert (remote.model.nfe, remote.model.model_calls) == (have.nfe, have.model_calls)


def test_text_comes_over_http_as_from_the_model_itself():
    local = language()
    options = {"method": "residual_ts", "max_new_tokens": 5, "num_rollouts": 8, "num_samples": 4}

    def reward(samples):
        return [float(len(set(tokens))) for tokens in samples]

    want = sdt.search(local, "the capital of France is", reward, **options)
    with RunningServer(language().model, card_of(local, "words")) as server:
        client = server.client()
        have = sdt.search(
            ServedModel(client.card, client), "the capital of France is", reward, **options
        )
    assert [(s.text, s.tokens, s.reward) for s in have.samples] == [
        (s.text, s.tokens, s.reward) for s in want.samples
    ]
    assert any(sample.text for sample in have.samples)


def test_messages_stay_within_the_servers_rows_and_bytes():
    model = Toy(5, 6, 1.0)
    wide = [RolloutRequest(ROOT, (), 6, i, excluded=tuple(range(4)) * 20) for i in range(40)]
    want = Toy(5, 6, 1.0).rollout(wide, LAW)
    limits = ServerLimits(max_rows=7, max_body_bytes=3000)
    with RunningServer(model, card_of(model), limits=limits) as server:
        have = server.client().rollout(wide, LAW)
        assert [r.tokens.tolist() for r in have] == [r.tokens.tolist() for r in want]
        single = [RolloutRequest(ROOT, (), 6, 0, excluded=(0,) * 2000)]
        with pytest.raises(ConfigurationError, match="--max-body-mb"):
            server.client().rollout(single, LAW)


def test_a_message_of_many_blocks_arrives_whole(plain):
    """The client sends a body block by block, each within a connection's own limit of time."""
    wide = [RolloutRequest(ROOT, (), 6, 0, excluded=(0, 1) * 100_000)]
    assert len(packed(wide)) > 2 * _BLOCK_BYTES
    (have,) = plain.client().rollout(wide, LAW)
    (want,) = Toy(5, 6, 1.0).rollout(wide, LAW)
    assert have.tokens.tolist() == want.tokens.tolist()


def test_mixed_replies_keep_their_order_and_an_empty_call_sends_nothing(plain):
    client = plain.client()
    assert client.expand([], LAW) == [] and client.rollout([], LAW) == []
    body = packed([rollouts(1)[0], ExpandRequest(ROOT, (), 3), rollouts(1, 9)[0]])
    status, answer, _ = post(plain, body, "mixed")
    assert status == 200
    assert [type(reply).__name__ for reply in unpack_replies(load(answer))] == [
        "Rollout",
        "Expansion",
        "Rollout",
    ]


def test_more_children_than_tokens_are_all_of_them_as_at_home(plain):
    (reply,) = plain.client().expand([ExpandRequest(ROOT, (), 40)], LAW)
    assert sorted(reply.children.tolist()) == list(range(5))


def test_clients_do_not_share_problems_nor_their_cost(plain):
    counts = []
    for _ in range(2):
        client = plain.client()
        client.expand([ExpandRequest(ROOT, (), 3)], LAW)
        counts.append((client.nfe, client.model_calls))
        client.expand([ExpandRequest(ROOT, (), 3)], LAW)
        assert (client.nfe, client.model_calls) == counts[-1]
        client.release(ROOT)
        client.expand([ExpandRequest(ROOT, (), 3)], LAW)
        assert client.nfe == 2
    assert counts == [(1, 1), (1, 1)]


def test_problems_that_are_never_released_go_by_themselves():
    model = Toy(5, 6, 1.0)
    with RunningServer(model, card_of(model)) as server:
        server.service.server._max_problems = 3
        client = server.client()
        for number in range(9):
            client.expand([ExpandRequest(Root((1,), bytes([number])), (), 2)], LAW)
        assert len(model._prefixes) == 3


# --- computed once ---


def test_a_repeated_message_is_computed_once(gated):
    model, server = gated
    body = packed(rollouts(3))
    with ThreadPoolExecutor(2) as pool:
        early = [pool.submit(post, server, body) for _ in range(2)]
        assert model.entered.wait(20)
        model.gate.set()
        answers = [future.result() for future in early]
    answers.append(post(server, body))
    assert [status for status, _, _ in answers] == [200] * 3
    assert len({answer for _, answer, _ in answers}) == 1
    assert model.batches == [3]
    assert post(server, packed(rollouts(2)))[0] == 409
    assert post(server, body, **{CLIENT_ID: "somebody else"})[0] == 409


def test_old_answers_are_forgotten(plain, monkeypatch):
    monkeypatch.setattr("sdt_dist.serving.server._MOST_ANSWERS", 3)
    for number in range(6):
        assert post(plain, packed(rollouts(1, number)), f"old {number}")[0] == 200
    assert (
        list(plain.service.server._known)
        == list(plain.service.server._kept)
        == ["old 3", "old 4", "old 5"]
    )
    monkeypatch.setattr("sdt_dist.serving.server._MOST_ANSWER_BYTES", 10)
    assert post(plain, packed(rollouts(1)), "large")[0] == 200
    assert list(plain.service.server._known) == ["large"]


def test_a_lost_connection_is_made_anew_and_costs_nothing(plain):
    """A relay that forwards the request, drops the first answers, and forwards the next."""
    with _Relay(plain.port, drops=2) as relay:
        client = HttpModel(f"http://127.0.0.1:{relay.port}", TOKEN, pause_s=0.01)
        relay.dropping = True
        before = plain.service.server.model.nfe
        have = client.rollout(rollouts(4), LAW)
        spent = plain.service.server.model.nfe - before
        client.close()
    want = Toy(5, 6, 1.0).rollout(rollouts(4), LAW)
    assert relay.dropped == 2
    assert [r.tokens.tolist() for r in have] == [r.tokens.tolist() for r in want]
    assert client.nfe == spent == sum(r.cost.nfe for r in want)


class _Relay:
    """Passes bytes on; while `dropping`, the first `drops` answers of the server are lost with their connection."""

    def __init__(self, port: int, drops: int) -> None:
        self._target = port
        self._drops = drops
        self.dropping = False
        self.dropped = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> _Relay:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                for source, sink in ((near, far), (far, near)):
                    self._threads.append(
                        threading.Thread(target=self._pump, args=(source, sink, far), daemon=True)
                    )
                    self._threads[-1].start()

    def _pump(self, source: socket.socket, sink: socket.socket, far: socket.socket) -> None:
        """One direction of a connection, until either side is gone."""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 20):
                if source is far and self.dropping and self.dropped < self._drops:
                    self.dropped += 1
                    break
                sink.sendall(data)
        for side in (source, sink):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
        source.close()


# --- queueing ---


def test_calls_that_wait_are_answered_together_and_health_answers_meanwhile(gated):
    model, server = gated
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(server.client().rollout, rollouts(1), LAW)
        assert model.entered.wait(20)
        others = [pool.submit(server.client().rollout, rollouts(2, 10 * i), LAW) for i in range(3)]
        _wait_for(lambda: server.service.server.counters.waiting_calls == 3)
        assert raw(server, "GET", "/healthz")[:2] == (200, b'{"status": "ok"}')
        model.gate.set()
        replies = [future.result() for future in [first, *others]]
    assert model.batches == [1, 6]
    for i, reply in enumerate(replies[1:]):
        want = Toy(5, 6, 1.0).rollout(rollouts(2, 10 * i), LAW)
        assert [r.tokens.tolist() for r in reply] == [r.tokens.tolist() for r in want]


def test_a_bad_request_fails_no_other_call_of_its_batch(gated):
    model, server = gated
    too_long = [RolloutRequest(Root((1,) * 9, b"x"), (), 1, 0)]
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(server.client().rollout, rollouts(1), LAW)
        assert model.entered.wait(20)
        bad, good = (
            pool.submit(server.client().rollout, asked, LAW) for asked in (too_long, rollouts(2))
        )
        _wait_for(lambda: server.service.server.counters.waiting_calls == 2)
        model.gate.set()
        assert len(first.result()) == 1 and len(good.result()) == 2
        with pytest.raises(ContextError, match="context of 7"):
            bad.result()


def test_a_full_queue_says_when_to_come_back_and_the_client_does(gated):
    model, server = gated
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(server.client().rollout, rollouts(1), LAW)]
        assert model.entered.wait(20)
        running.append(pool.submit(server.client().rollout, rollouts(8), LAW))
        _wait_for(lambda: server.service.server.counters.waiting_calls == 1)
        status, body, headers = post(server, packed(rollouts(1)))
        assert (status, headers["Retry-After"]) == (503, "1")
        assert "8 rows wait, allowed 8" in json.loads(body)["error"]
        with pytest.raises(FleetError, match="rows wait"):
            server.client(timeout_s=0.5).rollout(rollouts(1), LAW)
        running.append(pool.submit(server.client().rollout, rollouts(2), LAW))
        time.sleep(0.2)
        model.gate.set()
        assert [len(future.result()) for future in running] == [1, 8, 2]


def test_a_call_whose_time_is_over_is_never_begun(gated):
    model, server = gated
    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(server.client().rollout, rollouts(1), LAW)
        assert model.entered.wait(20)
        late = pool.submit(post, server, packed(rollouts(5)), **{DEADLINE: "0.05"})
        with pytest.raises(FleetError, match=r"no answer within 0\.1 s"):
            server.client(timeout_s=0.1).rollout(rollouts(3), LAW)
        model.gate.set()
        status, body, _ = late.result()
        first.result()
    assert status == 504 and "not begun" in json.loads(body)["error"]
    assert model.batches == [1]


def test_stopping_turns_waiting_calls_away_at_once():
    model = GatedToy()
    with ThreadPoolExecutor(2) as pool, RunningServer(model, card_of(model)) as server:
        running = pool.submit(post, server, packed(rollouts(1)), "running")
        assert model.entered.wait(20)
        waiting = pool.submit(post, server, packed(rollouts(2)), "waiting")
        _wait_for(lambda: server.service.server.counters.waiting_calls == 1)
        server.stop()
        status, body, _ = waiting.result()
        assert (status, json.loads(body)["error"]) == (503, "server: it is being stopped.")
        model.gate.set()
        assert running.result()[0] == 200
    assert model.batches == [1]


# --- refusals ---


def test_only_health_answers_without_the_token(plain, caplog):
    caplog.set_level(logging.DEBUG)
    for path in ("/v1/model", "/v1/answer", "/v1/release", "/v1/nothing", "/"):
        for token in (
            None,
            "Bearer wrong",
            f"Basic {TOKEN}",
            TOKEN,
            f"Bearer {TOKEN}x",
            "Bearer \xff",
        ):
            headers = {} if token is None else {"Authorization": token}
            status, body, answered = raw(plain, "GET", path, **headers)
            assert (status, answered["WWW-Authenticate"]) == (401, "Bearer")
            assert json.loads(body)["kind"] == "ConfigurationError"
    assert raw(plain, "GET", "/healthz")[0] == 200
    assert raw(plain, "GET", "/v1/nothing", Authorization=f"Bearer {TOKEN}")[0] == 404
    assert raw(plain, "GET", "/v1/answer", Authorization=f"Bearer {TOKEN}")[0] == 405
    assert TOKEN not in caplog.text


def test_a_wrong_token_says_so(plain):
    with pytest.raises(ConfigurationError, match="token: missing or wrong") as caught:
        HttpModel(plain.url, "another-token-0123456789")
    assert "another-token" not in str(caught.value)


def test_a_body_over_the_limit_is_refused():
    model = Toy(5, 6, 1.0)
    with RunningServer(model, card_of(model), limits=ServerLimits(max_body_bytes=4000)) as server:
        status, body, _ = post(server, b"x" * 5000)
        assert status == 413
        assert "--max-body-mb" in json.loads(body)["error"]
        assert post(server, packed(rollouts(1)), "fits")[0] == 200


def test_malformed_messages_are_refused_and_never_crash_the_server(plain):
    good = pack_requests(rollouts(2), LAW)
    bodies = [
        b"",
        b"x" * 100,
        b"\xff" * 8 + b"{}",
        save({"a": np.zeros(2)}),
        packed([]),
        packed(rollouts(5000)),
    ]
    bodies += [save({**good, name: array[:-1]}) for name, array in good.items() if len(array)]
    bodies += [save({**good, name: array.astype(np.float32)}) for name, array in good.items()]
    bodies += [save({**good, "count": np.array([6, count])}) for count in (-1, 2**62)]
    bodies += [packed([ExpandRequest(ROOT, (), 0)]), packed(rollouts(1), PriorLaw((0, 6)))]
    bodies += [packed(rollouts(1), PriorLaw((0, 5), sampling_temperature=0.0))]
    for number, body in enumerate(bodies):
        status, answer, _ = post(plain, body, f"malformed {number}")
        assert status == 400, json.loads(answer)
        assert json.loads(answer)["kind"] == "ConfigurationError"
    status, answer, _ = post(
        plain, packed([RolloutRequest(Root((5,), b""), (), 1, 0)]), "foreign token"
    )
    assert (status, json.loads(answer)["kind"]) == (400, "ContextError")
    for header, value in (
        (DEADLINE, "soon"),
        (DEADLINE, "-1"),
        (DEADLINE, "nan"),
        (REQUEST_ID, "x" * 200),
        (CLIENT_ID, ""),
    ):
        assert post(plain, packed(rollouts(1)), **{header: value})[0] == 400
    for body in (b"", b"[]", b'{"digests": [3]}', b'{"digests": ["xy"]}', b"[" * 100_000):
        headers = {"Authorization": f"Bearer {TOKEN}", CLIENT_ID: "raw"}
        assert raw(plain, "POST", "/v1/release", body, **headers)[0] == 400
    assert post(plain, packed(rollouts(1)), "after all that")[0] == 200


def test_errors_come_out_as_the_class_they_were(plain, caplog):
    client = plain.client()
    with pytest.raises(ContextError, match="prompt: empty"):
        client.rollout([RolloutRequest(Root((), b"x"), (), 1, 0)], LAW)

    class Broken(Toy):
        def rollout(self, requests, law):
            raise RuntimeError("out of memory")

    model = Broken(5, 6, 1.0)
    with RunningServer(model, card_of(model)) as server:
        with pytest.raises(FleetError, match="RuntimeError: out of memory"):
            server.client().rollout(rollouts(1), LAW)
        assert "the model failed" in caplog.text
        assert len(server.client().expand([ExpandRequest(ROOT, (), 2)], LAW)) == 1


def test_a_search_does_not_go_on_with_another_model():
    first = Toy(5, 6, 1.0)
    second = Toy(5, 6, 1.0, seed=1)
    with RunningServer(first, card_of(first, "first")) as server:
        client = server.client()
        port = server.port
        client.rollout(rollouts(1), LAW)
    with (
        RunningServer(second, card_of(second, "second"), port=port),
        pytest.raises(ConfigurationError, match="'second'"),
    ):
        client.rollout(rollouts(1), LAW)
    client.close()
    with pytest.raises(FleetError, match="cannot be reached"):
        client.rollout(rollouts(1), LAW)
    client.release(ROOT)


def test_another_release_of_sdt_and_another_kind_of_server_are_named(plain):
    described = json.loads(plain.service._described)
    for text, error, match in (
        (
            json.dumps({**described, "version": 2}),
            ConfigurationError,
            "speaks version 2, this sdt 3",
        ),
        ("<html>", FleetError, "not as `sdt serve` does"),
        (json.dumps({**described, "card": {}}), ConfigurationError, "model card"),
    ):
        plain.service._described, kept = text, plain.service._described
        try:
            with pytest.raises(error, match=match):
                HttpModel(plain.url, TOKEN)
        finally:
            plain.service._described = kept


def test_replies_that_do_not_fit_are_refused(plain):
    client = plain.client()
    client._exchange(packed(rollouts(2)), rollouts(2))
    with pytest.raises(FleetError, match="do not fit"):
        client._exchange(packed(rollouts(2)), rollouts(3))
    other = replace(client.card, vocab_size=7)
    assert other != client.card


def _wait_for(holds) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)
