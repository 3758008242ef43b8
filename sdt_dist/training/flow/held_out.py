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
            found.append(torch.stack(divergences_of(Scores.of(network, batch), batch)).cpu())
    flow, prior = torch.cat(found, dim=1).mean(1).tolist()
    return {"flow": flow, "prior": prior}


def divergences_of(scores: Scores, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(KL(pi*||P_F), KL(pi*||p)) [G] of each context of a batch of draws from p."""
    tilted = batch.tilt * batch.reward
    groups = torch.zeros_like(batch.inverse_temperature)
    top = groups.fill_(-torch.inf).scatter_reduce(0, batch.group, tilted, "amax")
    count = torch.zeros_like(groups).index_add(0, batch.group, torch.ones_like(tilted))
    total = torch.zeros_like(groups).index_add(0, batch.group, torch.exp(tilted - top[batch.group]))
    log_z = top + torch.log(total / count)
    share = batch.shares(tilted) / count[batch.group]
    prior = torch.zeros_like(groups).index_add(
        0, batch.group, share * (tilted - log_z[batch.group])
    )
    steps = torch.zeros_like(groups).index_add(
        0, batch.group, share * log_ratios(scores, batch).sum(1)
    )
    return prior - steps, prior
