"""Which model server each crew uses: sticky while it lives, least loaded when it must change.

See docs/architecture/fleet.md.

A crew's prompts are cached on its server, so a change costs their encoding again: as few crews move as balance needs.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


class RouteTable:
    """An assignment of crews to servers that changes as little as it can."""

    def __init__(self) -> None:
        self._server_of: dict[Hashable, str] = {}

    def assign(self, crews: Sequence[Hashable], servers: Sequence[str]) -> dict[Hashable, str]:
        """A server for every crew, loads differing by one crew at most; {} without servers."""
        self._forget(set(crews), set(servers))
        if not servers:
            return {}
        load = dict.fromkeys(servers, 0)
        for server in self._server_of.values():
            load[server] += 1
        for crew in crews:
            if crew not in self._server_of:
                self._move(crew, load)
        while max(load.values()) - min(load.values()) > 1:
            fullest = max(servers, key=lambda server: load[server])
            its_crews = (crew for crew in crews if self._server_of[crew] == fullest)
            self._move(next(its_crews), load)
        return dict(self._server_of)

    def _forget(self, present: set[Hashable], alive: set[str]) -> None:
        """Drop crews that are not there any more, and those whose server is gone."""
        kept = {}
        for crew, server in self._server_of.items():
            if crew in present and server in alive:
                kept[crew] = server
        self._server_of = kept

    def _move(self, crew: Hashable, load: dict[str, int]) -> None:
        target = min(load, key=lambda server: load[server])
        if crew in self._server_of:
            load[self._server_of[crew]] -= 1
        load[target] += 1
        self._server_of[crew] = target
