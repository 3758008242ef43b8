"""How large a fleet is, where its actors may run, and how long anything may wait.

See docs/architecture/fleet.md.

Sizes, labels and deadlines change no sample. Groups of servers of several kinds do in the last digits: a fleet of them
promises seeds only, and its results say `deterministic: false`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from sdt_dist.errors import ConfigurationError
from sdt_dist.files import read_mapping
from sdt_dist.models.remote.http_api import check_url
from sdt_dist.models.spec import check_flow_backend, split_spec
from sdt_dist.search.options import parse_options


class Placement(BaseModel):
    """What one actor of a kind asks of its node: Ray resources, and labels that the node must carry."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    cpus: float = Field(
        0.1, ge=0, description="CPUs reserved in Ray's books; fractions let many share a core"
    )
    gpus: float = Field(0.0, ge=0, description="GPUs reserved")
    labels: dict[str, str] = Field(
        default_factory=dict, description="Ray node labels that must match exactly"
    )


class ServerGroup(BaseModel):
    """Model servers of another kind that serve the run's model too, from where their own nodes have it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    model: str = Field(
        description="MODEL SPEC as the group's nodes know it: a path of theirs, with mlx: before it, an address"
    )
    count: int = Field(1, ge=1, description="servers of the group, each with one copy of the model")
    placement: Placement = Field(
        default_factory=lambda: Placement(cpus=1.0), description="placement of its servers"
    )

    @field_validator("model")
    @classmethod
    def _can_be_loaded_somewhere(cls, spec: str) -> str:
        """The backend and an address's form; this machine need not have the paths and packages of the group's nodes."""
        backend, name = split_spec(spec)
        if backend in ("http", "https"):
            check_url(name)
        return spec

    @property
    def kind(self) -> str:
        """What placement calls an actor of the group."""
        return f"server of {self.model}"


class FleetConfig(BaseModel):
    """A fleet; the defaults are local mode on two cores."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    address: str = Field(
        "local", description="'local' starts Ray here; 'auto' or host:port attaches to a cluster"
    )
    servers: int = Field(
        1, ge=1, description="model servers of the run's own --model, each with one copy of it"
    )
    searchers: int = Field(1, ge=1, description="searchers, each driving many problems at once")
    shards: int = Field(
        1, ge=1, description="soft-value store shards (started only when evidence is shared)"
    )
    problems_per_searcher: int = Field(16, ge=1, description="problems a searcher drives together")
    server: Placement = Field(
        default_factory=lambda: Placement(cpus=1.0), description="placement of those servers"
    )
    more_servers: list[ServerGroup] = Field(
        default_factory=list,
        description="groups of other kinds that serve the same model: other nodes, backends or paths",
    )
    searcher: Placement = Field(default_factory=Placement, description="placement of searchers")
    shard: Placement = Field(default_factory=Placement, description="placement of store shards")
    buffer_records: int = Field(
        64, ge=1, description="finished searches that wait for a learner; the oldest go first"
    )
    learner_gpus: float = Field(
        0.0, ge=0, description="GPUs reserved for a learner, which runs beside its driver"
    )
    server_threads: int | None = Field(
        None, ge=1, description="torch threads of a CPU server; default its CPUs, rounded up"
    )
    queue_rows: int = Field(
        65_536, ge=1, description="rows that may wait at a model server before it refuses more"
    )
    start_timeout_s: float = Field(
        300.0, gt=0, description="how long an actor may take until it answers its probe"
    )
    call_timeout_s: float = Field(
        600.0, gt=0, description="how long a model call may take, queueing included"
    )
    problem_timeout_s: float = Field(
        7200.0, gt=0, description="how long a problem may be without any progress"
    )
    max_attempts: int = Field(
        5, ge=1, description="times a problem is started before it is set aside as failed"
    )
    connect_timeout_s: float = Field(20.0, gt=0, description="how long to look for a cluster")

    @property
    def group_of_server(self) -> list[int]:
        """The group of every model server, by its number: 0 is the run's own model, n is more_servers[n - 1]."""
        counts = [self.servers, *(group.count for group in self.more_servers)]
        return [group for group, count in enumerate(counts) for _ in range(count)]

    @property
    def group_names(self) -> list[str]:
        """Every group of model servers, for people."""
        return [
            "the run's own model",
            *(f"more_servers.{i}, {g.model}" for i, g in enumerate(self.more_servers)),
        ]

    def check_flows(self) -> None:
        """ConfigurationError where a group of model servers cannot hold flows."""
        for number, group in enumerate(self.more_servers):
            try:
                check_flow_backend(group.model)
            except ConfigurationError as error:
                raise ConfigurationError(f"more_servers.{number}: {error}") from error

    def placement_of(self, group: int) -> Placement:
        """What the servers of a group ask of their nodes."""
        return self.more_servers[group - 1].placement if group else self.server


def fleet_config(values: dict[str, Any]) -> FleetConfig:
    """A checked FleetConfig; ConfigurationError names the bad field, its value and what is allowed."""
    return parse_options(FleetConfig, values, "a fleet")


def load_fleet(
    path: str | None, overrides: dict[str, Any], *, small_model: bool = False
) -> FleetConfig:
    """The fleet in a YAML file (None: local mode) with overrides.

    In local mode a model that is small enough to have several copies of gets a server and a searcher a core, four at
    most, where nothing else is said: on two cores that took three quarters of the time of one server (benchmarks/local_mode.py).
    """
    given = ({} if path is None else read_mapping(Path(path), "fleet")) | overrides
    if small_model and given.get("address", "local") == "local":
        cores = min(os.cpu_count() or 1, 4)
        given = {"servers": cores, "searchers": cores} | given
    return fleet_config(given)
