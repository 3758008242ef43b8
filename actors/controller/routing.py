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
        present = set(crews)
        alive = set(servers)
        self._server_of = {c: s for c, s in self._server_of.items() if c in present and s in alive}
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
            self._move(next(c for c in crews if self._server_of[c] == fullest), load)
        return dict(self._server_of)

    def _move(self, crew: Hashable, load: dict[str, int]) -> None:
        target = min(load, key=lambda server: load[server])
        if crew in self._server_of:
            load[self._server_of[crew]] -= 1
        load[target] += 1
        self._server_of[crew] = target
