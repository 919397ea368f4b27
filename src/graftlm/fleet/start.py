"""Starting a fleet: on this machine, for as long as the command runs, or on a cluster, where it stays."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..cluster import as_there, check_machines, connected, port_is_free
from ..errors import ConfigError, ServingError
from .config import FleetConfig
from .control import SEEN
from .handle import NAME, manager

WAIT = 1800.0  # seconds that a fleet may take to be ready


def deploy(config: FleetConfig, say: Callable[[str], None]) -> None:
    """Bring a fleet up, or a running one to another configuration, and serve: until a signal comes where the cluster is this
    command's own, else it stays when this returns.

    Raises:
        ConfigError: what can be told before: folders, ports, processors, versions.
        ServingError: no replica starts.
    """
    check_folders(config)
    here = config.address is None
    if here:
        port_is_free(config.http.host, config.http.port)
    with connected(config.address, cpus(config) if here else None) as ray, until_told() as told:
        if not here:
            check_machines(ray)
        running = bring_up(ray, config)
        where = f"http://{config.http.host}:{config.http.port}/v1"
        say(f"{'Changed' if running else 'Serving'} {config.base_name} on {config.replicas.min} replicas at {where}")
        if here:
            told.wait()
            let_end(config)


def bring_up(ray: Any, config: FleetConfig) -> bool:
    """Deploy it in the cluster that this is connected to; whether it ran already. Returns when all of it serves."""
    from ray import serve

    from .app import build_with_door

    running = NAME in serve.status().applications
    if running:
        answer(manager().reconfigure.remote(config.model_dump()))
    else:
        start_serve(ray, config)
        serve.run_many(
            [serve.RunTarget(target=build_with_door(config), name=NAME, route_prefix=None)],
            wait_for_applications_running=False,
        )
    until, status = time.monotonic() + WAIT, dict[str, Any]()
    while True:
        found = serve.status().applications[NAME]
        if found.status == "DEPLOY_FAILED":
            raise ServingError(f"The fleet does not start: {found.message}")
        managed = found.deployments.get("Manager")
        if managed is not None and managed.status == "HEALTHY":
            status = answer(manager().status.remote())
            if status["error"]:
                if not running:
                    serve.delete(NAME)
                raise ServingError(status["error"] + (" The replicas of before serve on." if running else ""))
            if found.status == "RUNNING" and renewed(status, config):
                return running
        if time.monotonic() > until:
            raise ServingError(f"The fleet is not ready after {WAIT:.0f} s: {status}")
        time.sleep(0.2)


def renewed(status: dict[str, Any], config: FleetConfig) -> bool:
    """Whether as many replicas are ready as there are to be, all of the last generation."""
    ready = [r for r in status["replicas"].values() if r["state"] == "ready"]
    return len(ready) >= config.replicas.min and all(r["generation"] == status["generation"] for r in ready)


def start_serve(ray: Any, config: FleetConfig) -> None:
    """Serve, where it does not run yet; its proxies are not needed. ConfigError where the fleet's port is taken."""
    from ray import serve

    head = ray.remote(num_cpus=0, resources={"node:__internal_head__": 0.001})(port_is_free)
    answer(head.remote(config.http.host, config.http.port))
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})


def answer(asked: Any) -> Any:
    """What another process answers, or its error as it was there."""
    import ray

    try:
        return ray.get(asked) if isinstance(asked, ray.ObjectRef) else asked.result()
    except Exception as error:
        raise as_there(error) from None


def stop(config: FleetConfig) -> None:
    """Take a fleet down: what runs may end."""
    with connected(config.address or "auto"):
        let_end(config)


def check_folders(config: FleetConfig) -> None:
    """ConfigError for folders that are not there, before anything is started."""
    problems = [f"adapters.{n}: {p} is no folder" for n, p in config.adapters.items() if not Path(p).is_dir()]
    problems += [f"adapter_dirs: {p} is no folder" for p in config.adapter_dirs if not Path(p).is_dir()]
    if problems and config.address in (None, "auto"):
        raise ConfigError("; ".join(problems) + ".")


def cpus(config: FleetConfig) -> int:
    """CPUs of a cluster that is started here: enough for all replicas, and for one more while they are replaced."""
    return config.replica.threads * (config.replicas.most + 1)


@contextlib.contextmanager
def until_told() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets. The second one interrupts at once."""
    told = threading.Event()

    def note(*_: Any) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()

    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def let_end(config: FleetConfig) -> None:
    """Take no more requests; what runs may end; then the fleet goes."""
    from ray import serve

    if NAME not in serve.status().applications:
        raise ConfigError("No fleet runs there.")
    asked = manager()
    answer(asked.drain.remote())
    until = time.monotonic() + config.replicas.grace
    time.sleep(SEEN)
    while time.monotonic() < until and any(r["tokens"] for r in answer(asked.status.remote())["replicas"].values()):
        time.sleep(0.2)
    serve.delete(NAME)
