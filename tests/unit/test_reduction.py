"""`largest` against a plain sort of every token's rank, and against `draw`: equal to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from sdt_dist.errors import ContextError
from sdt_dist.models.reduction import draw, exp_nonpositive, largest
from sdt_dist.noise import exponential

SHAPES = {
    "smooth": lambda rng, size: rng.standard_normal(size) * 3,
    "flat": np.zeros,
    "tied": lambda rng, size: rng.integers(-2, 2, size),
    "rising": lambda rng, size: np.sort(rng.standard_normal(size)),
    "steep": lambda rng, size: rng.standard_normal(size) * 500,  # most masses are 0 in float64
    "sparse": lambda rng, size: np.where(rng.random(size) < 0.9, -np.inf, rng.integers(0, 3, size)),
}


def make_scores(shape: str, rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """Scores [B, V] float32 with one finite score in each row at least."""
    scores = (SHAPES[shape](size) if shape == "flat" else SHAPES[shape](rng, size)).astype(
        np.float32
    )
    scores[np.arange(size[0]), rng.integers(0, size[1], size[0])] = 1.0
    return scores


def make_requests(rng: np.random.Generator, scores: np.ndarray) -> tuple[list, list, list]:
    """num_children, keys and excluded tokens of each row: few and all, drawn and ordered, none, any and the best."""
    num_tokens = scores.shape[1]
    num_children = []
    keys = []
    excluded = []
    for row in scores:
        num_children.append(int(rng.choice([1, 2, 8, 65, num_tokens, 10**12])))
        keys.append(int(rng.integers(0, 1 << 64, dtype=np.uint64)) if rng.random() < 0.6 else None)
        count = min(num_tokens, int(rng.choice([0, 0, 1, 5, num_tokens // 2, num_tokens])))
        order = np.argsort(-row) if rng.random() < 0.5 else rng.permutation(num_tokens)
        excluded.append(tuple(order[:count].tolist()))
    return num_children, keys, excluded


def by_sorting(
    scores: np.ndarray, num_children: int, key: int | None, excluded: tuple[int, ...]
) -> np.ndarray:
    """Tokens [K] of one row of scores [V]: every token's rank, sorted stably."""
    scores = scores.astype(np.float64)
    nothing = -np.inf
    ranks = scores.copy()
    if key is not None:
        mass = np.array([exp_nonpositive(x) for x in scores - scores.max()])
        ranks = mass / exponential(np.array([key], dtype=np.uint64), len(scores))[0]
        nothing = 0.0
    ranks[list(excluded)] = nothing
    return np.argsort(-ranks, kind="stable")[: min(num_children, int((ranks > nothing).sum()))]


def bits(*values) -> list[bytes]:
    return [np.asarray(value, dtype=np.float64).tobytes() for value in values]


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 64, 65, 300, 3000])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_are_those_of_a_stable_sort_of_all(shape, num_tokens):
    rng = np.random.default_rng(num_tokens)
    for _ in range(12 if num_tokens < 1000 else 2):
        scores = make_scores(shape, rng, (4, num_tokens))
        requests = make_requests(rng, scores)
        for row, want, (tokens, *_) in zip(
            scores, zip(*requests, strict=True), largest(scores, *requests), strict=True
        ):
            assert tokens.dtype == np.int32
            assert tokens.tolist() == by_sorting(row, *want).tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_largest_are_draws_one_after_another(shape):
    """Child k is what `draw` draws with the same key outside the children before it; the last leaves the same rest."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        scores = make_scores(shape, rng, (3, 90))
        num_children, keys, excluded = make_requests(rng, scores)
        for i, (tokens, log_prob, *rest) in enumerate(
            largest(scores, num_children, keys, excluded)
        ):
            if not len(tokens):
                assert rest == [-np.inf, 0]
                continue
            before = [(*excluded[i], *tokens[:k].tolist()) for k in range(len(tokens))]
            drawn, drawn_log_prob, *rests = draw(
                np.repeat(scores[i : i + 1], len(tokens), axis=0), [keys[i]] * len(tokens), before
            )
            assert drawn.tolist() == tokens.tolist()
            assert bits(drawn_log_prob, *(column[-1] for column in rests)) == bits(log_prob, *rest)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_depend_on_the_others(shape):
    rng = np.random.default_rng(9)
    scores = make_scores(shape, rng, (40, 700))
    requests = make_requests(rng, scores)
    together = largest(scores, *requests)
    for i, have in enumerate(together):
        (want,) = largest(scores[i : i + 1], *([column[i]] for column in requests))
        assert bits(*have) == bits(*want)


@pytest.mark.parametrize("key", [None, 3])
@pytest.mark.parametrize("token", [-1, 4])
def test_an_excluded_id_that_is_no_token_is_refused(key, token):
    with pytest.raises(ContextError, match=r"excluded: .* allowed 0 to 3"):
        largest(np.zeros((1, 4), dtype=np.float32), [1], [key], [(token,)])
