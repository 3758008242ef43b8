"""The `sdt` command: one message and exit code 2 for a user's mistake, no traceback.

See docs/reference/cli.md, docs/guides/evaluate.md#bad-input.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from sdt_dist import __version__
from sdt_dist.cluster.commands.cluster import status, submit
from sdt_dist.cluster.commands.doctor import doctor
from sdt_dist.cluster.commands.evaluate import evaluate
from sdt_dist.cluster.commands.forecast import forecast
from sdt_dist.cluster.commands.generate import generate
from sdt_dist.cluster.commands.report import report
from sdt_dist.cluster.commands.serve import serve
from sdt_dist.cluster.commands.train_flow import train_flow
from sdt_dist.cluster.commands.train_forecaster import train_forecaster
from sdt_dist.cluster.commands.tune import tune
from sdt_dist.errors import SdtError

MISTAKE = 2
INTERRUPTED = 130
_AFTER_A_STOP = {
    "evaluate": "; finished work is kept, and --resume goes on from it",
    "submit": "; the job goes on",
    "train-flow": "; --resume goes on from the last saved state",
    "train-forecaster": "; the same command goes on from the last checkpoint",
    "tune": "; finished searches are kept, and --resume goes on from them",
}


class _Stopped(BaseException):
    """Ctrl-C within a command, with what it leaves. Typer turns KeyboardInterrupt itself into a silent exit."""


def _stoppable(name: str, command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*arguments: object, **options: object) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            raise _Stopped(_AFTER_A_STOP.get(name, "")) from None

    return run


app = typer.Typer(
    name="sdt",
    help="Draw samples from p(x|c) * exp(lambda * r(x)) by tree search over a frozen generative model.\n\n"
    "Example:\n\n  sdt evaluate --output results/quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"sdt {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    """The options that stand before a command."""


for _command in (
    evaluate,
    forecast,
    generate,
    train_forecaster,
    train_flow,
    tune,
    report,
    serve,
    doctor,
):
    _name = _command.__name__.replace("_", "-")
    app.command(_name)(_stoppable(_name, _command))

_cluster = typer.Typer(
    help="Send a command to a Ray cluster, and see what runs there.\n\nExample:\n\n  sdt cluster status --address auto",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for _command in (submit, status):
    _cluster.command(_command.__name__)(_stoppable(_command.__name__, _command))
app.add_typer(_cluster, name="cluster")


def main() -> None:
    """Entry point: SdtError ends with one line and exit code 2, Ctrl-C with 130, both without a traceback."""
    try:
        app(prog_name="sdt")  # which names the variable that shell completion sets
    except SdtError as error:
        print(f"sdt: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(MISTAKE)
    except _Stopped as stopped:
        print(f"sdt: stopped{stopped}.", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
