"""The flows of a fleet: which of them its model servers hold, and which one a search proposes with.

See docs/concepts/flow.md.

A search keeps the version that it began with, at later attempts too, so that deaths change no sample; a version goes when
it is not the newest and no unfinished search names it. It must not know torch, Ray or what a flow computes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace

from sdt_dist.actors.controller.slots import Slot
from sdt_dist.actors.work import LATEST, Work
from sdt_dist.errors import ConfigurationError, FleetError, SdtError
from sdt_dist.flow.files import FlowFiles
from sdt_dist.flow.info import FlowHead, check_model
from sdt_dist.models.card import ModelCard


class FlowLibrary:
    """The flows that all model servers are to hold. `flows`: those of the start, the newest last.

    timeout_s: how long a server may take to load one.
    """

    def __init__(
        self, flows: Sequence[FlowFiles], servers: Sequence[Slot], timeout_s: float
    ) -> None:
        self._servers = servers
        self._timeout_s = timeout_s
        self._files: dict[str, FlowFiles] = {}
        self._heads: dict[str, FlowHead] = {}
        self._arriving: list[str] = []  # being told to servers, so that nobody names them yet
        self.latest: str | None = None
        for files in flows:
            self.latest = self._add(files)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def latest_version(self) -> int:
        """The number of the newest flow; 0 where there is none."""
        return 0 if self.latest is None else self._heads[self.latest].info.version

    def check_work(self, work: Iterable[Work]) -> None:
        """ConfigurationError for a search that names a flow which is not there."""
        for one in work:
            if one.flow is not None and self.version_of(one) not in self._files:
                have = ", ".join(self._files) or "none"
                raise ConfigurationError(
                    f"work {one.name}: flow {one.flow!r}, the fleet has {have}; give it as flows."
                )

    def check_card(self, own: ModelCard | None) -> None:
        """CheckpointError unless all flows were trained for the run's own model; None: not known yet.

        Other groups of servers need no check: they have its vocabulary, and other names for its weights.
        """
        for head in self._heads.values() if own is not None else ():
            check_model(head.spec, head.info, own)

    def version_of(self, work: Work) -> str | None:
        """The identity of the flow that a search begins with now."""
        return self.latest if work.flow == LATEST else work.flow

    def fix(self, work: Work) -> Work:
        """The search with its version, which it keeps from now on."""
        name = self.version_of(work)
        return (
            work
            if name is None
            else replace(work, flow=name, flow_version=self._heads[name].info.version)
        )

    async def publish(self, files: FlowFiles, own: ModelCard | None) -> None:
        """Let all ready servers hold a further flow; then it is the newest. Again is harmless.

        CheckpointError or ConfigurationError, and nothing has changed, where the run's own model is another one or a
        server cannot hold it.
        """
        head = files.head
        if own is not None:
            check_model(head.spec, head.info, own)
        is_new = head.identity not in self._files
        name = self._add(files)
        self._arriving.append(name)
        try:
            await asyncio.gather(*(self._tell(slot) for slot in self._servers if slot.is_ready))
        except SdtError:
            if is_new:
                self._remove([name])
            raise
        finally:
            self._arriving.remove(name)
        self.latest = name

    async def give(self, slot: Slot) -> None:
        """Make a server hold what is here and nothing else; when this returns, no flow has been added meanwhile."""
        held = slot.held
        async with held.turn:
            for name in held.names - self._files.keys():
                await slot.ask("drop_flow", self._timeout_s, name)
                held.names.discard(name)
            while missing := [name for name in self._files if name not in held.names]:
                await slot.ask("load_flow", self._timeout_s, self._files[missing[0]])
                held.names.add(missing[0])

    def retire(self, unfinished: Iterable[Work]) -> None:
        """Let servers forget what is not the newest and no unfinished search names."""
        kept = {self.latest, *self._arriving, *(work.flow for work in unfinished)}
        self._remove([name for name in self._files if name not in kept])

    async def _tell(self, slot: Slot) -> None:
        """A server that cannot be told is started again, and then learns of it."""
        try:
            await self.give(slot)
        except FleetError as error:
            slot.report_gone(str(error))

    def _add(self, files: FlowFiles) -> str:
        head = files.head
        name = head.identity
        self._files[name], self._heads[name] = files, head
        return name

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            del self._files[name], self._heads[name]
        for slot in self._servers if names else ():
            if slot.is_ready:
                slot.background(self.give(slot))
