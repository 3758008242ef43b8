"""The `sdt` command: one message and exit code 2 for a user's mistake, no traceback (SPEC sections 9 and 10)."""

from __future__ import annotations

import sys

import typer

from cluster.commands.doctor import doctor
from cluster.commands.evaluate import evaluate
from cluster.commands.forecast import forecast
from cluster.commands.generate import generate
from cluster.commands.report import report
from cluster.commands.train_forecaster import train_forecaster
from sdt_dist.errors import SdtError

app = typer.Typer(
    name="sdt",
    help="Draw samples from p(x|c) * exp(lambda * r(x)) by tree search over a frozen generative model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
for command in (evaluate, forecast, generate, train_forecaster, report, doctor):
    app.command(command.__name__.replace("_", "-"))(command)

MISTAKE, INTERRUPTED = 2, 130


def main() -> None:
    """Entry point: SdtError ends with exit code 2, Ctrl-C with 130, both without a traceback."""
    try:
        app()
    except SdtError as error:
        print(f"sdt: {error}", file=sys.stderr)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        print("sdt: stopped; finished work is kept, and --resume goes on from it.", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
