"""What happens to a flow that is given, missing, or another one than before.

See docs/concepts/flow.md, docs/guides/evaluate.md#bad-input.
"""

from __future__ import annotations

import numpy as np
import pytest

import sdt_dist as sdt
from sdt_dist.errors import ConfigurationError
from sdt_dist.evaluation.plan import load_config, resolve
from sdt_dist.models.process import TokenProcess
from sdt_dist.models.toy import Toy
from sdt_dist.search.api import run_searches
from sdt_dist.search.methods import method_names, validate_options
from sdt_dist.search.session import SearchProblem
from sdt_dist.search.sharing_plan import SharingPlan
from sdt_dist.tree.snapshot import Snapshot
from sdt_dist.tree.tree import Tree
from tests.proposal_helpers import flow_of, run_with_flow
from tests.search_helpers import PARAMETERS, run_toy


def searches(method: str, **arguments):
    model = Toy(*PARAMETERS["A"])
    process = TokenProcess(model, model.law, model.length)
    problem = SearchProblem(0, process.root([0]), model)
    return list(
        run_searches(
            process, [problem], method=method, options={"num_rollouts": 20}, seed=0, **arguments
        )
    )


@pytest.mark.parametrize("method", [name for name in method_names() if name not in ("snis", "smc")])
def test_methods_that_use_no_flow_refuse_one(method):
    with pytest.raises(
        ConfigurationError, match=f"flow: given, but method '{method}' does not use one"
    ):
        searches(method, flow=flow_of("A", "exact"))


def test_s_adt_without_a_flow_says_what_to_do():
    with pytest.raises(
        ConfigurationError, match=r"'s_adt': it needs a flow network; .* use residual_ts"
    ):
        searches("s_adt")
    with pytest.raises(
        ConfigurationError, match="methods: s_adt needs a flow; give --flow PATH or leave it out"
    ):
        resolve(load_config(None, {"methods": ["s_adt"]}))
    assert "s_adt" not in method_names() and "s_adt" not in load_config(None, {}).methods


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 1.5}, "alpha: 1.5, .*less than or equal to 1"),
        ({"alpha": -0.1}, "alpha: -0.1, .*greater than or equal to 0"),
        ({"alpha_decay": 0.0}, "alpha_decay: 0.0, .*greater than 0"),
        ({"leaf_values": True}, "leaf_values=True with draw='path', allowed: draw='fall'"),
        (
            {"leaf_values": True, "draw": "path"},
            "leaf_values=True with draw='path', allowed: draw='fall'",
        ),
    ],
)
def test_wrong_uses_of_a_flow_name_what_is_allowed(options, words):
    with pytest.raises(ConfigurationError, match=words):
        validate_options("s_adt", options)


@pytest.mark.parametrize("option", ["alpha", "leaf_values", "proposal"])
def test_uses_of_a_flow_belong_to_s_adt(option):
    with pytest.raises(
        ConfigurationError, match=f"unknown option of method 'residual_ts' '{option}'"
    ):
        validate_options("residual_ts", {option: True})


@pytest.mark.parametrize("use", ["mix", "leaf values"])
def test_no_use_of_a_flow_does_without_one(use):
    model = Toy(*PARAMETERS["A"])
    process = TokenProcess(model, model.law, model.length)
    problem = SearchProblem(0, process.root([0]), model)
    with pytest.raises(ConfigurationError, match="'s_adt': it needs a flow network"):
        list(run_searches(process, [problem], method="s_adt", options=USES[use], seed=0))


def test_a_flow_and_shared_evidence_exclude_each_other():
    with pytest.raises(ConfigurationError, match="sharing: given together with a flow"):
        searches("s_adt", flow=flow_of("A", "exact"), sharing=SharingPlan("run", {0: "key"}, 2))


class Uniform:
    """An `LLMInterface` object over three tokens."""

    vocab_size = 3
    eos_token_id = None

    def get_next_token_logits(self, token_sequence):
        return np.zeros(3)

    def encode_text(self, text):
        return [0]

    def decode_tokens(self, tokens):
        return ""

    def get_top_k_tokens(self, sequence, k):
        return []


class TwoFlow:
    """F = 9 for every state that ends in token 2, else 0."""

    identity = "two"

    def log_tilts(self, states, inverse_temperature, log_prob):
        return np.tile([0.0, 0.0, 9.0 * inverse_temperature], (len(states), 1))

    def values(self, states, inverse_temperature):
        return np.array([9.0 * (tokens[-1:] == (2,)) for _, tokens in states])


@pytest.mark.parametrize("method", ["s_adt", "snis", "smc"])
def test_search_takes_a_flow_for_any_model_that_computes_here(method):
    def ends_in_two(samples):
        return [float(sample[-1] == 2) for sample in samples]

    result = sdt.search(
        Uniform(),
        [1],
        ends_in_two,
        method=method,
        max_new_tokens=6,
        flow=TwoFlow(),
        num_rollouts=20,
        num_samples=4,
    )
    assert result.method == method and result.best.reward == 1.0
    assert all(sample.log_prob == pytest.approx(6 * np.log(1 / 3)) for sample in result.samples)


def test_a_model_that_holds_no_flows_says_so():
    class Bare:
        vocab_size = 5
        max_context = 9
        deterministic = True

    process = TokenProcess(Bare(), Toy(*PARAMETERS["A"]).law, 4)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="Bare cannot hold flow networks"):
        process.load_flow(flow_of("A", "exact"))


USES = {
    "proposal": {},
    "mix": {"alpha": 0.5},
    "constant mix alone": {"alpha": 1.0, "alpha_decay": None, "proposal": False},
    "leaf values": {"leaf_values": True, "draw": "fall"},
    "all": {"leaf_values": True, "draw": "fall", "alpha": 0.5},
    "all but the proposal": {"leaf_values": True, "draw": "fall", "alpha": 0.5, "proposal": False},
}


@pytest.mark.parametrize("use", USES)
def test_a_resumed_search_keeps_its_flow_and_equals_one_that_never_stopped(use, tmp_path):
    noisy = flow_of("A", "noisy")
    (part,) = run_with_flow("A", "s_adt", noisy, [4], num_rollouts=40, wave_size=4, **USES[use])
    (whole,) = run_with_flow("A", "s_adt", noisy, [4], num_rollouts=100, wave_size=4, **USES[use])
    saved = Snapshot.load(part.snapshot.save(tmp_path / "search.npz"))

    def resumed(flow):
        model = Toy(*PARAMETERS["A"])
        process = TokenProcess(model, model.law, model.length)
        options = {
            "num_rollouts": 100,
            "wave_size": 4,
            "inverse_temperature": model.inverse_temperature,
        } | USES[use]
        problem = SearchProblem(0, process.root([0]), model)
        ((_, run),) = run_searches(
            process, [problem], method="s_adt", options=options, seed=4, resume=saved, flow=flow
        )
        return run

    again = resumed(noisy)
    assert (again.log_z, again.rollouts) == (whole.log_z, 100)
    assert [s.tokens for s in again.samples] == [s.tokens for s in whole.samples]
    assert all(
        np.array_equal(value, again.tree.arrays()[name], equal_nan=True)
        for name, value in whole.tree.arrays().items()
    )
    with pytest.raises(
        ConfigurationError, match=r"the saved search has flow 'A/noisy/1\.0', now 'A/exact/1\.0'"
    ):
        resumed(flow_of("A", "exact"))


def test_trees_saved_without_proposals_are_read_as_drawn_from_p():
    tree = run_toy("A", "residual_ts", 0, num_rollouts=30).tree
    newer = ("log_proposal", "log_residual_proposal", "log_advantage")
    again = Tree.from_arrays(
        {name: value for name, value in tree.arrays().items() if name not in newer}
    ).arrays()
    assert all(
        np.array_equal(value, again[name], equal_nan=True) for name, value in tree.arrays().items()
    )


def test_trees_saved_without_advantages_have_those_of_their_proposal():
    (run,) = run_with_flow("A", "s_adt", flow_of("A", "noisy"), [0], num_rollouts=30)
    arrays = run.tree.arrays()
    again = Tree.from_arrays(
        {name: value for name, value in arrays.items() if name != "log_advantage"}
    ).arrays()
    assert np.array_equal(again["log_advantage"], arrays["log_advantage"]) and np.any(
        arrays["log_advantage"] != 0
    )
