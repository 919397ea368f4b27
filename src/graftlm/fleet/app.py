"""The fleet as an application of Ray Serve: a thin ingress, the manager, and the replicas behind it.

    clients → Serve's proxy → Ingress: the same endpoints, prompts and answers as one engine's server
                                 ├─ requests, events ─→ replicas (actors)
                                 └─ the table ← Manager: starts, watches, replaces and stops them

`build` is what a configuration of Serve's names: `import_path: graftlm.fleet.app:build`, its `args` a `FleetConfig`. The
configuration is the manager's `user_config`, so that a changed one is taken over in place.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from ..serving.app import create_app
from ..serving.run import logs_to
from .config import FleetConfig
from .manager import Manager, Table, plain, put_in
from .remote import Remote
from .replica import Facts
from .service import FleetAdapters, FleetService

AT_ONCE = 10_000  # calls of a deployment; the router holds back, not Serve
log = logging.getLogger("graftlm.serving")


@serve.ingress()
class Ingress:
    """HTTP in front of the replicas."""

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

    def __serve_build_asgi_app__(self) -> Any:
        return create_app(self.service)

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


def build(args: dict[str, Any]) -> Application:
    """The application for a configuration, which `args` is."""
    config = FleetConfig.from_dict(args)
    options: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": AT_ONCE}
    deployment: Any = serve.deployment
    managed = deployment(Manager).options(
        name="Manager", num_replicas=1, user_config=config.model_dump(), graceful_shutdown_timeout_s=5, **options
    )
    ingress = deployment(Ingress).options(
        name="Ingress", num_replicas=config.http.ingress, graceful_shutdown_timeout_s=config.replicas.grace, **options
    )
    return ingress.bind(managed.bind())
