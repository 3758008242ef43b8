"""What of a configuration can be refused without data or a model, one check a concern.

See docs/guides/evaluate.md#bad-input. Each raises a ConfigurationError that names the field, or what it documents; `plan.resolve`
says in which order. Those that read something on the way return it, so that nobody reads it again.
"""

from __future__ import annotations

from sdt_dist.errors import CheckpointError, ConfigurationError
from sdt_dist.evaluation.config import EvaluationConfig, MethodConfig
from sdt_dist.evaluation.evidence import evidence_files
from sdt_dist.evaluation.method_options import options_of
from sdt_dist.flow.files import FlowFiles
from sdt_dist.models.loading import check_flow_backend
from sdt_dist.rewards.spec import RewardFactory, parse_reward
from sdt_dist.search.methods import get_method, validate_options
from sdt_dist.search.sharing_plan import SHARING_METHODS, check_sharing


def check_methods(config: EvaluationConfig) -> None:
    """Every method's options, whether it can use a flow, and whether it can share evidence."""
    is_warm = config.warm_start is not None
    for method in config.method_configs():
        options = validate_options(method.name, options_of(config, method))
        check_flow_use(method, is_given=config.flow is not None)
        check_sharing(method.name, options, config.searchers_per_problem, is_warm)


def check_flow_use(method: MethodConfig, *, is_given: bool) -> None:
    """Refuse a flow that the method cannot use, or the lack of one that it is to use."""
    chosen = get_method(method.name)
    if method.uses_flow and chosen.flow == "none":
        chosen.check_flow(is_given=True)
    if not method.uses_flow and chosen.flow == "required":
        raise ConfigurationError(
            f"methods: {method.label} has flow: false, but {method.name} needs one; leave flow out, or use residual_ts."
        )
    if method.uses_flow and not is_given:
        raise ConfigurationError(
            f"methods: {method.label} needs a flow; give --flow PATH or leave it out."
        )


def check_evidence(config: EvaluationConfig) -> None:
    """Refuse evidence that no method can keep, and a warm start from a directory without any."""
    names = {method.name for method in config.method_configs()}
    if config.keep_evidence and names.isdisjoint(SHARING_METHODS):
        raise ConfigurationError(
            f"keep_evidence: true, but the methods {sorted(names)} have none to keep; allowed with: "
            f"{', '.join(SHARING_METHODS)}."
        )
    if config.warm_start is not None:
        evidence_files(config.warm_start)


def check_labels(config: EvaluationConfig) -> None:
    """Refuse two methods of one label."""
    labels = [method.label for method in config.method_configs()]
    if len(set(labels)) < len(labels):
        raise ConfigurationError(f"methods: labels {labels} must differ; give each its own label.")


def check_flow(config: EvaluationConfig, known: FlowFiles | None = None) -> FlowFiles | None:
    """The files of the flow, if there is one; CheckpointError where they are damaged, another flow's or not for this use.

    known: the files, where they were read before. Whether the flow was trained for the model is not said here, as that is
    not loaded.
    """
    if config.flow is None:
        if config.flow_identity is not None:
            raise ConfigurationError(
                "flow_identity: given, but no flow; give --flow PATH, or leave it out."
            )
        return None
    methods = config.method_configs()
    users = [method for method in methods if method.uses_flow]
    if not users:
        raise ConfigurationError(
            f"flow: {config.flow!r}, but none of the methods {', '.join(m.label for m in methods)} uses it; "
            "add s_adt, snis+flow or smc+flow to methods, or leave it out."
        )
    check_flow_backend(config.model)
    files = known or read_flow(config.flow, config.flow_identity)
    for method in users:
        inverse_temperature = options_of(config, method)["inverse_temperature"]
        files.head.check_use(config.reward_of(method), inverse_temperature, config.horizon)
    return files


def read_flow(path: str, identity: str | None) -> FlowFiles:
    """The files of a flow; CheckpointError where they are damaged, or another flow's than that of this identity."""
    files = FlowFiles.read(path)
    if identity not in (None, files.identity):
        raise CheckpointError(
            f"flow: {path} holds flow {files.identity}, flow_identity is {identity}; give that flow, or "
            "leave flow_identity out."
        )
    return files


def check_rewards(config: EvaluationConfig) -> dict[str, RewardFactory]:
    """Every reward by its spec, the evaluation's own first; ContextError for a horizon too short for one."""
    own = [config.reward_of(method) for method in config.method_configs()]
    specs = dict.fromkeys([config.reward, *own])
    return {spec: _checked_reward(spec, config.horizon) for spec in specs}


def _checked_reward(spec: str, horizon: int) -> RewardFactory:
    reward = parse_reward(spec)
    if not reward.scores_forecasts:
        raise ConfigurationError(
            f"reward: {spec!r} scores text; an evaluation of forecasts needs series."
        )
    reward.check_horizon(horizon)
    return reward


def check_lengths(config: EvaluationConfig) -> None:
    """Refuse a history that is shorter than its forecast."""
    if config.context_length < config.horizon:
        raise ConfigurationError(
            f"context_length: {config.context_length}, must be >= the horizon of {config.horizon}, because spectra compare "
            "a forecast with as long a piece of its history."
        )
