"""Whether a flow helps on contexts that it was not trained on: how far its proposal is from pi*, and how far p is.

    KL(pi*||P_F) = E_pi*[ lambda r - log Z - sum_t step_t ],   KL(pi*||p) = E_pi*[ lambda r - log Z ]

estimated on draws from p weighted by exp(lambda r), the same for both; step_t as in `losses`. KL(pi*||q) is, in nats, the log
of how many draws from q an importance sampler needs, roughly (Chatterjee and Diaconis 2018, arXiv 1511.01437).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sdt_dist.flow.network import FlowNetwork
from sdt_dist.training.flow.batch import Batch, Scores, make_batch
from sdt_dist.training.flow.losses import log_ratios
from sdt_dist.training.flow.trajectories import Trajectory


def divergences(
    network: FlowNetwork, trajectories: Sequence[Trajectory], inverse_temperature: float
) -> dict[str, float]:
    """Mean over contexts of KL(pi*||P_F), as `flow`, and of KL(pi*||p), as `prior`, in nats, on draws from p.

    Too small where a context has fewer draws than e^KL; the difference suffers less, as both have the same weights.
    """
    by_context: dict[str, list[Trajectory]] = {}
    for trajectory in trajectories:
        by_context.setdefault(trajectory.context, []).append(trajectory)
    device = network.reward_mean.device
    found = []
    for context, own in by_context.items():  # one at a time: they are many, and a batch is large
        batch = make_batch(own, {context: inverse_temperature}, network.spec).to(device)
        with torch.no_grad():
            scores = Scores.of(network, batch)
            both = divergences_of(scores, batch)
        found.append(torch.stack(both).cpu())
    flow, prior = torch.cat(found, dim=1).mean(1).tolist()
    return {"flow": flow, "prior": prior}


def divergences_of(scores: Scores, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(pi*||P_F), KL(pi*||p)) [G] of each context of a batch of draws from p."""
    group = batch.group
    none = torch.zeros_like(batch.inverse_temperature)
    tilted = batch.tilt * batch.reward
    # 1. log Z of each context: the mean of exp(lambda r) over its draws.
    lowest = torch.full_like(none, -torch.inf)
    top = lowest.scatter_reduce(0, group, tilted, "amax")
    count = none.index_add(0, group, torch.ones_like(tilted))
    total = none.index_add(0, group, torch.exp(tilted - top[group]))
    log_z = top + torch.log(total / count)
    # 2. Means under pi*, each draw with its share of the weights.
    share = batch.shares(tilted) / count[group]
    surprise = tilted - log_z[group]
    prior = none.index_add(0, group, share * surprise)
    log_ratio = log_ratios(scores, batch).sum(1)
    steps = none.index_add(0, group, share * log_ratio)
    return prior - steps, prior
