"""The fleet as an application of Ray Serve: a thin door, the manager, and the replicas behind it.

    clients → Door, an HTTP server of its own on the head (or Serve's proxies → Ingress): one engine's endpoints and answers
                ├─ requests, events ─→ replicas (actors)
                └─ the table ← Manager: starts, watches, replaces and stops them

A `Door` spares requests the way through Serve's proxy, which is most of what being in front costs. KubeRay asks Serve's
proxies whether a machine is well, so `build` stands behind these: `import_path: graftlm.fleet.app:build` in Serve's
configuration, its `args` a `FleetConfig`. That is the manager's `user_config`, so a changed one is taken over in place.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from typing import Any

import uvicorn
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from ..serving.app import create_app
from ..serving.run import Server, logs_to
from .config import FleetConfig
from .manager import Manager, Table, plain, put_in
from .remote import Remote
from .replica import Facts
from .service import FleetAdapters, FleetService

LOOKS = 1.0  # seconds between two of Serve's looks at a door or the manager; what has died stands in again after them
AT_ONCE = 10_000  # calls of a deployment; the router holds back, not Serve
log = logging.getLogger("graftlm.serving")


class Front:
    """What is in front of the replicas: requests become theirs, answers come from there."""

    async def __init__(self, manager: DeploymentHandle) -> None:  # type: ignore[misc]  # Ray awaits it
        logs_to(sys.stderr)
        self.manager = manager
        facts: Facts = await plain(manager.facts.remote())
        self.table: Table = await manager.watch.remote("", 0, 0)
        config = FleetConfig.from_dict(self.table.values)
        self.remote = Remote(config.replica.limits, entries=lambda adapter: self.adapters.sealed(adapter))
        self.adapters = FleetAdapters(manager, lambda: self.remote.held)
        self.service = FleetService(self.remote, self.adapters, facts, config.settings())
        self._take_over()
        self.follows = asyncio.get_running_loop().create_task(self._follow())

    async def _follow(self) -> None:
        """For ever: the table as it changes. Without the manager what there is goes on."""
        while True:
            try:
                before = self.table
                self.table = await self.manager.watch.remote(before.manager, before.version, before.number)
                self._take_over()
                if self.table.manager != before.manager:
                    log.warning("The manager is another one: its replicas take the place of those before.")
            except Exception:
                log.exception("The manager does not answer; the replicas that are there serve on")
                await asyncio.sleep(1)

    def _take_over(self) -> None:
        put_in(self.table.entries, self.adapters.entries)
        config = FleetConfig.from_dict(self.table.values)
        self.remote.limits = config.replica.limits
        self.remote.update(self.table.replicas)
        self.service.settings = config.settings()
        self.service.draining = self.table.draining

    async def check_health(self) -> None:
        """Serve asks; an ingress that no longer follows the table is replaced."""
        if self.follows.done():
            raise RuntimeError("the ingress does not follow its manager any more")


@serve.ingress()
class Ingress(Front):
    """HTTP that Serve's proxies hand on."""

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self.service)


class Door(Front):
    """HTTP at an address of its own; with `many`, one of several processes that listen there."""

    async def __init__(self, manager: DeploymentHandle, host: str, port: int, many: bool, grace: float) -> None:  # type: ignore[misc]
        listens = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048, reuse_port=many
        )
        await super().__init__(manager)  # type: ignore[misc]
        config = uvicorn.Config(
            create_app(self.service), log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=round(grace),
        )  # fmt: skip
        self.server = Server(config, self.service)
        self.serves = asyncio.get_running_loop().create_task(self.server.serve([listens]))
        while not self.server.started:
            await self.check_health()
            await asyncio.sleep(0.01)

    async def check_health(self) -> None:
        await super().check_health()
        if self.serves.done():
            raise RuntimeError("the server has ended")

    async def __del__(self) -> None:
        """Serve lets it go: what runs may end."""
        if hasattr(self, "serves"):
            self.server.should_exit = True
            await self.serves


def build(args: dict[str, Any]) -> Application:
    """The application for a configuration, which `args` is, behind Serve's proxies."""
    config = FleetConfig.from_dict(args)
    return in_front(Ingress, config).bind(managed(config))


def build_with_door(config: FleetConfig) -> Application:
    """The same, with a door of its own on the head."""
    door, http = in_front(Door, config, resources={"node:__internal_head__": 0.001}), config.http
    return door.bind(managed(config), http.host, http.port, http.ingress > 1, config.replicas.grace)


def in_front(kind: type, config: FleetConfig, **options: Any) -> Any:
    """A deployment of one of these."""
    grace = config.replicas.grace
    return deployed(kind, name=kind.__name__, num_replicas=config.http.ingress, graceful_shutdown_timeout_s=grace, **options)


def managed(config: FleetConfig) -> Any:
    """The manager."""
    return deployed(
        Manager, name="Manager", num_replicas=1, user_config=config.model_dump(), graceful_shutdown_timeout_s=5
    ).bind()


def deployed(kind: type, resources: dict[str, float] | None = None, **options: Any) -> Any:
    deployment: Any = serve.deployment
    options |= {"ray_actor_options": {"num_cpus": 0, "resources": resources or {}}, "health_check_period_s": LOOKS}
    return deployment(kind).options(max_ongoing_requests=AT_ONCE, **options)
