"""`sdt serve`: a model over HTTP, for searches on other machines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import ssl

    from sdt_dist.serving.http import ModelService

_TOKENS = Path("~/.config/sdt")


def serve(
    model: Annotated[str, typer.Option(help="bundled, a directory or a hub id")] = "bundled",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8011,
    host: Annotated[
        str, typer.Option(help="address to listen on; other than loopback needs TLS")
    ] = "127.0.0.1",
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="bearer token; made if absent [default: SDT_HTTP_TOKEN, or ~/.config/sdt/...]"
        ),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate chain")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key")] = None,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="largest request, in MiB")] = 32.0,
    max_rows: Annotated[
        int, typer.Option(min=1, help="most requests in a message, and in one model call")
    ] = 4096,
    device: Annotated[str | None, typer.Option(help="torch device, e.g. mps or cuda")] = None,
    flow: Annotated[
        list[Path] | None,
        typer.Option(help="flow checkpoint, or bundled, for s_adt; repeat for several"),
    ] = None,
) -> None:
    """Serve a model to searches on other machines; Ctrl-C ends it.

    On the machine that searches, use its address as the model, and its token in SDT_HTTP_TOKEN. From a Mac to a
    cluster, keep the address on loopback and open an SSH tunnel.

    Examples:

      sdt serve --model bundled --port 8011

      ssh -N -R 8011:127.0.0.1:8011 me@cluster-node

      SDT_HTTP_TOKEN=... sdt evaluate --model http://127.0.0.1:8011 --output results/mac

      sdt serve --model bundled --flow runs/flow

      sdt serve --model ./my-model --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem --token-file token
    """
    from sdt_dist.flow.files import FlowFiles
    from sdt_dist.models.card import card_of
    from sdt_dist.models.loading import load_model
    from sdt_dist.models.remote.http_token import server_token
    from sdt_dist.models.spec import check_flow_backend, check_spec
    from sdt_dist.serving.hold_flow import hold_flow
    from sdt_dist.serving.http import ModelService, ServerLimits, check_bind, tls_context

    tls = tls_context(tls_cert, tls_key)
    check_bind(host, tls is not None)
    flows = [FlowFiles.read(path) for path in flow or ()]
    if flows:
        check_flow_backend(model)
    check_spec(model)
    token, place = server_token(token_file, _TOKENS / f"serve-{port}.token")
    limits = ServerLimits(max_body_bytes=int(max_body_mb * 2**20), max_rows=max_rows)
    loaded = load_model(model, device=device)
    card = card_of(loaded, model)
    for files in flows:
        files.check_model(card)
        hold_flow(loaded.model, files)
    service = ModelService(loaded.model, card, token, limits, [files.identity for files in flows])
    _run(service, place, host, port, tls)


def _run(
    service: ModelService,
    place: str,
    host: str,
    port: int,
    tls: ssl.SSLContext | None,
) -> None:
    """Serve until SIGTERM, or Ctrl-C, which ends the event loop and with it the server."""
    import asyncio
    import signal

    from sdt_dist.serving.http import serve as serve_http

    card = service.card
    flows = service.flows

    def announce(bound_port: int) -> None:
        address = f"{'http' if tls is None else 'https'}://{f'[{host}]' if ':' in host else host}:{bound_port}"
        held = f" with {', '.join(f'flow {flow}' for flow in flows)}" if flows else ""
        print(
            f"serving {card.name} ({card.kind}){held} at {address}; token in {place}; Ctrl-C ends it",
            flush=True,
        )

    async def run() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await serve_http(service, host, port, tls=tls, stop=stop, ready=announce)

    asyncio.run(run())
