"""A toy whose calls take a while, so that kills meet calls in flight; workers import it."""

from __future__ import annotations

import time
from pathlib import Path

from sdt_dist.models.toy import Toy
from tests.fleet_helpers import TOY


class Slow(Toy):
    """Each call takes `delay_s` more while the file `while_exists` is there: once the kills are over, the rest is quick."""

    identity = "the slow toy"

    def __init__(self, delay_s: float, while_exists: str) -> None:
        super().__init__(*TOY)
        self._delay_s = delay_s
        self._file = Path(while_exists)

    def _wait(self) -> None:
        if self._file.exists():
            time.sleep(self._delay_s)

    def expand(self, requests, law):
        self._wait()
        return super().expand(requests, law)

    def rollout(self, requests, law):
        self._wait()
        return super().rollout(requests, law)
