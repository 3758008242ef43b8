"""The one fleet of a sweep, outside its trials: a thread of the driver moves searches from the exchange to it and back.

Models are loaded by the fleet's servers alone, however many trials run. It must not know parameters or objectives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any

from sdt_dist.actors.config import FleetConfig
from sdt_dist.actors.fleet import Watch, ask, run_fleet
from sdt_dist.actors.remote.backend import beside_us
from sdt_dist.actors.remote.exchange import ExchangeActor
from sdt_dist.actors.work import Loader, Work
from sdt_dist.errors import FleetError, SdtError
from sdt_dist.flow.files import FlowFiles

_LIMIT_S = 60.0


class SharedFleet:
    """A fleet for as long as the context lasts; `exchange` is what trials are given.

    failed: told, in the fleet's thread, when it ends with an error, which trials are told too. Ray must be connected.
    """

    def __init__(
        self,
        size: FleetConfig,
        loader: Loader,
        *,
        horizon: int,
        flows: Sequence[FlowFiles] = (),
        watch: Watch | None = None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        self._size = size
        self._loader = loader
        self._horizon = horizon
        self._flows = flows
        self._watch = watch
        self._failed = failed
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(1, "fleet")
        self.exchange: Any = None
        self.error: SdtError | None = None

    def __enter__(self) -> SharedFleet:
        self.exchange = beside_us(ExchangeActor, 0.0, {})
        self._pool.submit(self._run).add_done_callback(self._ended)
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._pool.shutdown()

    def _run(self) -> None:
        runs = run_fleet(
            [],
            self._size,
            self._loader,
            max_new_tokens=self._horizon,
            flows=self._flows,
            watch=self._watch,
            feed=self._feed,
        )
        with closing(runs):
            for name, outcome in runs:
                self._ask(self.exchange.give, name, outcome)

    def _feed(self, _: dict[str, Any]) -> list[Work] | None:
        return None if self._closing.is_set() else self._ask(self.exchange.take)

    def _ended(self, run: Future[None]) -> None:
        error = run.exception()
        if error is None or self._closing.is_set():
            return
        self.error = (
            error if isinstance(error, SdtError) else FleetError(f"the fleet failed: {error}")
        )
        try:
            self._ask(self.exchange.fail, self.error)
        except FleetError:
            pass  # the exchange has ended too, and trials notice that themselves
        finally:
            self._failed()

    @staticmethod
    def _ask(method: Any, *arguments: Any) -> Any:
        return ask(method, *arguments, timeout_s=_LIMIT_S, who="the sweep's exchange")
