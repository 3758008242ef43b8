"""What the flow's losses lead to: exact soft values by tables, and values of contexts never seen by the network.

Tables show what each loss pins (docs/concepts/flow.md); the family of toys shows that the network generalises.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from sdt_dist.flow.checkpoint import FlowInfo
from sdt_dist.flow.flow import Flow
from sdt_dist.flow.heads import build_network
from sdt_dist.flow.spec import FlowSpec
from sdt_dist.models.process import TokenProcess
from sdt_dist.search.api import run_searches
from sdt_dist.search.result import SearchResult
from sdt_dist.search.session import SearchProblem
from sdt_dist.training.flow.batch import Batch, Scores, make_batch
from sdt_dist.training.flow.extract import trajectories_of, with_rows
from sdt_dist.training.flow.options import FlowTrainOptions
from sdt_dist.training.flow.replay import ReplayBuffer
from sdt_dist.training.flow.trainer import FlowTrainer, batch_losses
from tests.flow_helpers import FamilyMember, sibling_groups, toy_trajectory
from tests.search_helpers import toy

pytestmark = pytest.mark.usefixtures("one_thread")
TOY = toy("A")
LOSSES = ("rtb", "subtb", "log_partition_variance", "bellman", "terminal", "tie")


@cache
def all_sequences() -> Batch:
    trajectories = [toy_trajectory(TOY, TOY.sequence(i)) for i in range(625)]
    return make_batch(trajectories, {trajectories[0].context: TOY.inverse_temperature})


class Tables:
    """F as free numbers: state[t] [5^t] and token[t] [5^(t+1)], for prefixes in lexicographic order."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        sizes = [5**t for t in range(5)]
        self.state, self.token = (
            [torch.rand(n, generator=generator, dtype=torch.float64).requires_grad_() for n in part]
            for part in (sizes, sizes[1:])
        )

    def scores(self) -> Scores:
        """On all 625 sequences, which come in the order of the tables."""
        state = torch.stack(
            [table.repeat_interleave(625 // len(table)) for table in self.state], dim=1
        )
        rows = [
            table.reshape(-1, 5).repeat_interleave(625 * 5 // len(table), dim=0)
            for table in self.token
        ]
        return Scores(state, torch.stack(rows, dim=1))


def converged(*names: str) -> Tables:
    tables = Tables()
    batch = all_sequences()
    options = FlowTrainOptions.parse(
        {name: float(name in names) for name in LOSSES} | {"per_context": 2}
    )
    optimiser = torch.optim.LBFGS(
        tables.state + tables.token, max_iter=3000, tolerance_grad=1e-11, tolerance_change=0, history_size=50,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def loss() -> torch.Tensor:
        optimiser.zero_grad()
        total = (
            torch.stack(list(batch_losses(tables.scores(), batch, options).values())).sum(0).mean()
        )
        total.backward()
        return total

    optimiser.step(loss)  # type: ignore[arg-type]
    assert loss() < 1e-10
    return tables


def sibling_error(tables: Tables) -> float:
    """Largest error of a difference between siblings."""
    errors = []
    for table, exact in zip(tables.token, TOY.soft_values[1:], strict=True):
        error = (table.detach().numpy() - exact).reshape(-1, 5)
        errors.append(np.abs(error - error[:, :1]).max())
    return max(errors)


def absolute_error(tables: list[torch.Tensor], exact: list[np.ndarray]) -> float:
    return max(np.abs(t.detach().numpy() - v).max() for t, v in zip(tables, exact, strict=True))


def test_relative_trajectory_balance_finds_differences_and_log_z() -> None:
    tables = converged("rtb")
    assert sibling_error(tables) < 1e-4
    assert 5 * float(tables.state[0].detach()) == pytest.approx(TOY.log_z, abs=1e-4)
    # free by a constant for each parent
    assert absolute_error(tables.token, TOY.soft_values[1:]) > 0.01


def test_log_partition_variance_finds_differences() -> None:
    tables = converged("log_partition_variance")
    assert sibling_error(tables) < 1e-4
    assert absolute_error(tables.token, TOY.soft_values[1:]) > 0.01


def test_subtrajectory_balance_finds_the_states_values() -> None:
    tables = converged("subtb")
    assert sibling_error(tables) < 1e-4
    assert absolute_error(tables.state[:-1], TOY.soft_values[:-1]) < 1e-4
    assert absolute_error(tables.token, TOY.soft_values[1:]) > 0.01


@pytest.mark.parametrize("names", [("subtb", "tie"), ("bellman", "terminal", "tie")])
def test_absolute_values_of_both_heads(names: tuple[str, ...]) -> None:
    tables = converged(*names)
    assert absolute_error(tables.token, TOY.soft_values[1:]) < 1e-4
    assert absolute_error(tables.state[:-1], TOY.soft_values[:-1]) < 1e-4


FAMILY_SPEC = FlowSpec(5, (0, 5), 4, context_length=5, patch=5)


def random_members(count: int, seed: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(seed)
    prompts = dict.fromkeys(tuple(rng.integers(0, 5, 5).tolist()) for _ in range(2 * count))
    return list(prompts)[:count]


def searched(prompts: list[tuple[int, ...]], num_rollouts: int) -> ReplayBuffer:
    """Trajectories of residual_ts searches of family members, with complete rows; the members share one prior, so one process."""
    replay = ReplayBuffer(50_000)
    model = FamilyMember((0,) * FamilyMember.weights)
    process = TokenProcess(model, model.law, model.length)
    problems = [
        SearchProblem(i, process.root(prompt), FamilyMember(prompt))
        for i, prompt in enumerate(prompts)
    ]
    options = {"inverse_temperature": 5.0, "num_rollouts": num_rollouts}
    results = dict(run_searches(process, problems, method="residual_ts", options=options, seed=0))
    for problem in problems:
        result = results[problem.index]
        assert isinstance(result, SearchResult) and result.snapshot is not None
        replay.add(with_rows(process, problem.root, trajectories_of(result.snapshot, problem.root)))
    return replay


def spearman(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Spearman's rho of every row."""
    ranks = [rankdata(values, axis=1) for values in (found, exact)]
    (of_found, of_exact) = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    return (of_found * of_exact).sum(axis=1) / np.sqrt(
        (of_found**2).sum(axis=1) * (of_exact**2).sum(axis=1)
    )


def held_out(
    flow: Flow, prompts: list[tuple[int, ...]], inverse_temperature: float
) -> tuple[float, float]:
    """Means over all parents of held-out members: Spearman's rho of F with V among siblings, and F's error
    up to a constant per parent, as a share of the siblings' own spread (which is the error of the prior)."""
    rhos = []
    errors = []
    spreads = []
    for prompt in prompts:
        model = FamilyMember(prompt, inverse_temperature)
        root = TokenProcess(model, model.law, model.length).root(prompt)
        groups = sibling_groups(model)
        states = [(root, prefix) for prefix, _ in groups]
        exact = np.stack([values for _, values in groups])
        rows = np.stack(
            [model.log_prob_tables[len(prefix)][model.index(prefix)] for prefix, _ in groups]
        )
        tilts = flow.log_tilts(states, inverse_temperature, rows)
        errors.append((tilts - inverse_temperature * exact).std(axis=1))
        spreads.append((inverse_temperature * exact).std(axis=1))
        differ = np.ptp(exact, axis=1) > 1e-9  # all children of a parent may be worth the same
        rhos += spearman(tilts[differ], exact[differ]).tolist()
    return float(np.mean(rhos)), float(np.mean(errors) / np.mean(spreads))


@pytest.fixture(scope="module")
def family() -> tuple[Flow, list[tuple[int, ...]]]:
    """A flow trained on searches of 300 members of the family at lambda from 2 to 8, and 40 other members."""
    prompts = random_members(340, seed=1)
    options = FlowTrainOptions.parse(
        {"steps": 1600, "learning_rate": 0.01, "num_contexts": 32, "per_context": 4}
        | {"lowest_inverse_temperature": 2, "highest_inverse_temperature": 8}
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trainer = FlowTrainer(
        build_network(FAMILY_SPEC), searched(prompts[:300], num_rollouts=24), options
    )
    trainer.train()
    return Flow(trainer.network, FlowInfo("", "", options.inverse_temperatures)), prompts[300:]


@pytest.mark.parametrize("inverse_temperature", [2.0, 5.0, 8.0])
def test_values_of_contexts_never_seen(
    family: tuple[Flow, list[tuple[int, ...]]], inverse_temperature: float
) -> None:
    """F orders the children of members it was not trained on, and ranks their log Z."""
    flow, prompts = family
    rho, error = held_out(flow, prompts, inverse_temperature)
    models = {prompt: FamilyMember(prompt, inverse_temperature) for prompt in prompts}
    roots = [
        TokenProcess(model, model.law, model.length).root(prompt)
        for prompt, model in models.items()
    ]
    log_z = inverse_temperature * flow.values([(root, ()) for root in roots], inverse_temperature)
    exact = np.array([model.log_z for model in models.values()])
    print(
        f"lambda {inverse_temperature}: rank correlation {rho:.3f}, error {error:.3f} of the siblings' spread"
    )
    print(
        f"log Z: bias {(log_z - exact).mean():.3f}, error {(log_z - exact).std():.3f}, spread {exact.std():.3f} nats"
    )
    assert rho >= 0.9 and error < 0.4
    assert np.corrcoef(log_z, exact)[0, 1] > 0.6
