"""`sdt generate`: text from a language model, tilted by a reward."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sdt_dist.search.result import SearchResult


def generate(
    prompt: Annotated[str, typer.Argument(help="the prompt")],
    model: Annotated[str, typer.Option(help="a directory or hub id of a causal language model")],
    reward: Annotated[
        str,
        typer.Option(help="e.g. regex:[0-9]+, answer:yes, length:target=20, or path.py:function"),
    ],
    method: Annotated[str, typer.Option(help="search method")] = "residual_ts",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="tokens to generate; the prompt does not count")
    ] = 32,
    inverse_temperature: Annotated[
        float, typer.Option(help="lambda of p(x) exp(lambda r(x))")
    ] = 1.0,
    flow: Annotated[
        Path | None,
        typer.Option(help="flow checkpoint, or bundled, that s_adt, snis or smc propose with"),
    ] = None,
    sampling_temperature: Annotated[float, typer.Option(help="temperature of the prior p")] = 1.0,
    rollouts: Annotated[int, typer.Option(min=1, help="rollouts of the search")] = 50,
    num_samples: Annotated[int, typer.Option(min=1, help="samples to print")] = 4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object a sample")] = False,
) -> None:
    """Generate text from p(x|prompt) * exp(lambda * r(x)).

    Examples:

      sdt generate "The capital of France is" --model ./my-model --reward "regex:Paris" --inverse-temperature 5

      sdt generate "The capital" --model ./my-model --reward "regex:Paris" --method s_adt --flow runs/flow

      sdt generate "Once" --model owner/name --reward score.py:my_reward --method dts --rollouts 100
    """
    from sdt_dist.cluster.commands.flow_option import flow_of, read_flow
    from sdt_dist.errors import ConfigurationError, ContextError
    from sdt_dist.models.loading import load_model
    from sdt_dist.models.spec import check_spec
    from sdt_dist.parts import TextPart
    from sdt_dist.rewards.context import RewardContext
    from sdt_dist.rewards.spec import parse_reward
    from sdt_dist.search.methods import get_method, validate_options

    options: dict[str, object] = {
        "inverse_temperature": inverse_temperature,
        "num_samples": num_samples,
    }
    if not get_method(method).reference:
        options["num_rollouts"] = rollouts
    validate_options(method, options)
    factory = parse_reward(reward)
    files = read_flow(flow, method, model, reward, inverse_temperature, max_new_tokens)
    if not factory.scores_text:
        raise ConfigurationError(
            f"reward: {reward!r} scores forecasts; use regex:, answer:, length: or path.py:function."
        )
    check_spec(model)
    if not prompt:
        raise ContextError("prompt: empty; a prompt needs at least one token.")
    loaded = load_model(model)
    if loaded.sample_view == "series":
        raise ConfigurationError(f"model: {model!r} is a forecaster; use `sdt forecast`.")

    from sdt_dist.search.api import search

    context = (TextPart(prompt),)
    result = search(
        loaded,
        context,
        factory.build(RewardContext.of(context)),
        method=method,
        max_new_tokens=max_new_tokens,
        sampling_temperature=sampling_temperature,
        seed=seed,
        flow=flow_of(files, loaded),
        **options,
    )
    _show(result, as_json)


def _show(result: SearchResult, as_json: bool) -> None:
    """Every sample with its own reward, and what the search cost."""
    import json

    for sample in result.samples:
        record = {"text": sample.text, "reward": sample.reward, "log_prob": sample.log_prob}
        print(
            json.dumps(record)
            if as_json
            else f"[reward {sample.reward:.4g}  log p {sample.log_prob:.4g}] {sample.text}"
        )
    if not as_json:
        z = "" if result.log_z is None else f"  log Z {result.log_z:.4g}"
        ess = "" if result.ess is None else f"  ESS {result.ess:.3g}"
        print(
            f"{result.method}: {result.rollouts} rollouts  nfe {result.nfe}{z}{ess}  {result.wall_s:.1f} s"
        )
