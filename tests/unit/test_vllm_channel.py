"""The channel between vLLM's engine process and ours, without vLLM."""

from __future__ import annotations

import numpy as np
import pytest

from sdt_dist.errors import FleetError
from sdt_dist.models.vllm.channel import WHOLE, Frame, Listener, connect


def frame(step: int, rows: int, vocabulary: int) -> Frame:
    rng = np.random.default_rng(step)
    return Frame(
        step=np.array([step]),
        requests=np.arange(rows),
        positions=np.arange(rows, dtype=np.int32),
        sizes=np.array([WHOLE] + [2] * (rows - 1), dtype=np.int32),
        tokens=rng.integers(0, 9, 2 * (rows - 1)).astype(np.int32),
        log_prob=rng.standard_normal(2 * (rows - 1)),
        log_residual=np.array([-np.inf] + [-1.5] * (rows - 1)),
        num_remaining=np.zeros(rows, dtype=np.int32),
        logits=rng.standard_normal((1, vocabulary)).astype(np.float32),
    )


@pytest.fixture
def ends():
    found: list[Frame] = []
    listener = Listener(found.append)
    engine = connect(str(listener.path))
    listener.accept(1, 5.0)
    yield listener, engine, found
    engine.close()
    listener.close()


def test_frames_arrive_whole_and_in_order_however_they_are_cut(ends):
    listener, engine, found = ends
    sent = [frame(step, rows, 50) for step, rows in enumerate((1, 4, 2))]
    stream = b"".join(one.packed() for one in sent)
    for begin in range(0, len(stream), 97):
        engine.sendall(stream[begin : begin + 97])
        assert listener.drain()
    assert [int(one.step[0]) for one in found] == [0, 1, 2]
    for have, want in zip(found, sent, strict=True):
        for name in Frame.__slots__:
            np.testing.assert_array_equal(getattr(have, name), getattr(want, name))


def test_what_was_sent_before_the_end_is_still_handed_on(ends):
    listener, engine, found = ends
    engine.sendall(frame(7, 3, 5).packed())
    engine.close()
    assert not listener.drain()
    assert [int(one.step[0]) for one in found] == [7]
    assert not listener.drain() and len(found) == 1


def test_only_its_owner_can_open_the_socket_and_nothing_is_left(ends):
    listener, _, _ = ends
    assert listener.path.stat().st_mode & 0o777 == 0o600
    assert listener.path.parent.stat().st_mode & 0o777 == 0o700
    listener.close()
    assert not listener.path.parent.exists()


def test_an_engine_that_does_not_connect_is_an_error_in_time():
    listener = Listener(lambda _: None)
    with pytest.raises(FleetError, match=r"opened no channel within 0\.05 s"):
        listener.accept(1, 0.05)
    listener.close()
