"""`sdt forecast`: a probabilistic forecast of one CSV column."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from sdt_dist.rewards.base import Reward
    from sdt_dist.rewards.spec import RewardFactory
    from sdt_dist.search.result import SearchResult


def forecast(
    csv: Annotated[Path, typer.Argument(help="CSV with a numeric column, oldest row first")],
    column: Annotated[
        str | None, typer.Option(help="column to forecast; default the last numeric one")
    ] = None,
    time_column: Annotated[
        str | None, typer.Option(help="column of times; default the first that looks like it")
    ] = None,
    horizon: Annotated[int, typer.Option(min=1, help="values to forecast")] = 24,
    season: Annotated[
        int | None, typer.Option(min=1, help="season length; drawn as a naive line in the plot")
    ] = None,
    method: Annotated[str, typer.Option(help="search method")] = "snis",
    model: Annotated[
        str, typer.Option(help="bundled, or a directory that train-forecaster wrote")
    ] = "bundled",
    reward: Annotated[str, typer.Option(help="e.g. spectral:gamma=1+nonneg")] = "spectral:gamma=1",
    inverse_temperature: Annotated[
        float, typer.Option(help="lambda of p(x) exp(lambda r(x))")
    ] = 3.0,
    flow: Annotated[
        Path | None,
        typer.Option(help="flow checkpoint, or bundled, that s_adt, snis or smc propose with"),
    ] = None,
    rollouts: Annotated[int, typer.Option(min=1, help="rollouts of the search")] = 200,
    num_samples: Annotated[int, typer.Option(min=2, help="samples that make the quantiles")] = 100,
    quantiles: Annotated[
        str, typer.Option(help="comma-separated")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    plot: Annotated[Path | None, typer.Option(help="write a fan chart (PNG)")] = None,
    output: Annotated[
        Path | None, typer.Option(help="write the forecast as CSV; default: print it")
    ] = None,
    samples: Annotated[Path | None, typer.Option(help="write every sample as CSV")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Forecast the next values of a series, as mean and quantiles.

    Examples:

      sdt forecast load.csv --column OT --horizon 96 --plot fan.png --output forecast.csv

      sdt forecast load.csv --column OT --horizon 24 --method s_adt --flow runs/flow

      sdt forecast sales.csv --horizon 12 --reward "spectral:gamma=1+nonneg" --quantiles 0.05,0.5,0.95
    """
    from sdt_dist.cluster.commands.flow_option import flow_of, read_flow
    from sdt_dist.data.reader import read_csv
    from sdt_dist.data.scale import fit_scale
    from sdt_dist.models.loading import load_model
    from sdt_dist.models.spec import check_spec
    from sdt_dist.rewards.spec import parse_reward
    from sdt_dist.search.methods import get_method, validate_options

    levels = _levels(quantiles)
    options: dict[str, object] = {
        "inverse_temperature": inverse_temperature,
        "num_samples": num_samples,
    }
    if not get_method(method).reference:
        options["num_rollouts"] = rollouts
    validate_options(method, options)
    factory = parse_reward(reward)
    files = read_flow(flow, method, model, reward, inverse_temperature, horizon)
    check_spec(model)
    table = read_csv(csv, column=column, time_column=time_column)
    history = table.iloc[:, -1].to_numpy(float)
    fit_scale(history)
    times = _future(table, horizon)
    built = _reward(factory, history, horizon)
    _prepare_outputs(output=output, samples=samples, plot=plot)

    from sdt_dist.search.api import search

    loaded = load_model(model)
    held = flow_of(files, loaded)
    result = search(
        loaded,
        history,
        built,
        method=method,
        max_new_tokens=horizon,
        seed=seed,
        flow=held,
        **options,
    )
    frame = _frame(result, times, levels)
    writers: list[Callable[[], None]] = [lambda: _write(frame, output)]
    if samples is not None:
        writers.append(lambda: _write(_sample_frame(result, times), samples))
    if plot is not None:
        from sdt_dist.report.figures.samples import fan_chart_file

        writers.append(
            lambda: fan_chart_file(
                history, result, plot, name=str(table.columns[-1]), season=season
            )
        )
    _write_all(writers)


def _levels(text: str) -> list[float]:
    from sdt_dist.errors import ConfigurationError

    try:
        levels = [float(item) for item in text.split(",")]
    except ValueError as error:
        raise ConfigurationError(
            f"quantiles: {text!r}, allowed: comma-separated numbers in (0, 1)."
        ) from error
    if not all(0 < level < 1 for level in levels):
        raise ConfigurationError(
            f"quantiles: {text!r}, allowed: comma-separated numbers in (0, 1)."
        )
    return levels


def _reward(factory: RewardFactory, history: np.ndarray, horizon: int) -> Reward:
    """The reward of this history, tried out; refused before the model loads where it cannot score such a forecast."""
    from sdt_dist.errors import ConfigurationError
    from sdt_dist.evaluation.plan import try_reward

    if not factory.scores_forecasts:
        raise ConfigurationError(
            f"reward: {factory.spec!r} scores text; a forecast needs a reward of series."
        )
    return try_reward(factory, history, horizon)


def _future(table: pd.DataFrame, horizon: int) -> list[str]:
    """Times after the last row by the inferred frequency (the last step where none is); row numbers without times.

    DataError for times that do not increase, or that run out of the calendar.
    """
    import warnings

    import pandas as pd

    from sdt_dist.errors import DataError

    index = table.index
    if not isinstance(index, pd.DatetimeIndex):
        return [str(len(table) + i) for i in range(horizon)]
    if index.hasnans or not index.is_monotonic_increasing or not index.is_unique:
        raise DataError(
            "time column: times must increase from row to row, with none missing; sort or fill them."
        )
    with warnings.catch_warnings():
        # later pandas give an offset, which date_range takes too
        warnings.simplefilter("ignore", DeprecationWarning)
        frequency = pd.infer_freq(index[-min(len(index), 50) :]) or (index[-1] - index[-2])
    try:
        future = pd.date_range(index[-1], periods=horizon + 1, freq=frequency)[1:]
    except (OverflowError, ValueError) as error:
        raise DataError(
            f"time column: {horizon} steps after {index[-1]} are no times ({error})."
        ) from error
    return [time.isoformat(sep=" ") for time in future]


def _prepare_outputs(**paths: Path | None) -> None:
    """Make the folders of the files to write, so that nothing is searched for that cannot be kept."""
    from sdt_dist.errors import ConfigurationError, ResultsError

    given = {name: path for name, path in paths.items() if path is not None}
    if len({path.resolve() for path in given.values()}) < len(given):
        raise ConfigurationError(f"{', '.join(given)}: the same file twice; give each its own.")
    if "plot" in given:
        from sdt_dist.report.figures.files import image_suffixes

        if given["plot"].suffix.lower() not in image_suffixes():
            raise ConfigurationError(
                f"plot: {str(given['plot'])!r}, allowed endings: {', '.join(image_suffixes())}."
            )
    for name, path in given.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(
                f"{name}: {path} cannot be written ({error.strerror}); give another path."
            ) from error
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ResultsError(
                f"{name}: {path} cannot be written (not a file in a writable folder)."
            )


def _frame(result: SearchResult, times: list[str], levels: list[float]) -> pd.DataFrame:
    import numpy as np
    import pandas as pd

    paths = np.stack([sample.series for sample in result.samples])  # type: ignore[misc]
    columns = {f"q{level:g}": np.quantile(paths, level, axis=0) for level in levels}
    return pd.DataFrame({"timestamp": times, "mean": paths.mean(axis=0), **columns})


def _sample_frame(result: SearchResult, times: list[str]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {"timestamp": times, **{f"s{i}": s.series for i, s in enumerate(result.samples)}}
    )


def _write(frame: pd.DataFrame, path: Path | None) -> None:
    """Write a table, or print it: where no path is given, and where the path fails, so that it is not lost."""
    from sdt_dist.errors import ResultsError
    from sdt_dist.files import write_text

    text = frame.to_csv(index=False, float_format="%.8g")
    if path is None:
        print(text, end="")
        return
    try:
        write_text(path, text)
    except ResultsError as error:
        print(text, end="")
        raise ResultsError(f"{error} It is printed instead.") from error


def _write_all(writers: list[Callable[[], None]]) -> None:
    """Write every output that can be written, then raise one ResultsError for the others."""
    from sdt_dist.errors import ResultsError

    failures = []
    for write in writers:
        try:
            write()
        except ResultsError as error:
            failures.append(str(error))
    if failures:
        raise ResultsError(" ".join(failures))
