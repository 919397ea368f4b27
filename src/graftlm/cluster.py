"""Ray, where the extra `ray` is installed: finding a cluster, and whether its machines fit this one, before work is lost."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import ConfigError, UnsupportedError
from .version import __version__

EXTRA = "pip install 'graftlm[ray]'"
PATIENCE = 5.0  # seconds in which an address answers
STORE = 128 << 20  # bytes of a local cluster's object store: requests and events go through it, no weights


def the_ray() -> Any:
    """The module. UnsupportedError where it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(f"This needs Ray, which is not installed: {EXTRA}") from error
    return ray


def as_there(error: Exception) -> Exception:
    """What was raised in another process, without Ray's error around it."""
    cause = getattr(error, "cause", None)  # of a RayTaskError
    return cause if isinstance(cause, Exception) else error


def actor_is_lost() -> tuple[type[Exception], ...]:
    """The errors that say that an actor has died; none where there is no Ray."""
    try:
        from ray.exceptions import RayActorError
    except ImportError:
        return ()
    return (RayActorError,)


@contextlib.contextmanager
def connected(address: str | None = None, cpus: int | None = None) -> Iterator[Any]:
    """Ray, connected to a cluster meanwhile; the module.

    Args:
        address: "host:port", "ray://host:port", or "auto" for the one that this machine belongs to; None starts one here,
            which ends with this.
        cpus: of a cluster that is started here; None: all there are.

    Raises:
        UnsupportedError: Ray is not installed.
        ConfigError: the address does not answer, or the cluster is of another version.
    """
    ray = the_ray()
    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    os.environ.setdefault("RAY_worker_niceness", "0")  # engines are what the machine is for
    if address is None:
        begin(ray, address="local", num_cpus=cpus, object_store_memory=STORE, include_dashboard=False, **quiet)
    else:
        if address != "auto":
            answers(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ConfigError(
                f"The Ray cluster at {address!r} cannot be used: {error}. (Where it was started with a token, Ray wants "
                "RAY_AUTH_MODE=token, and that token, here as well.)"
            ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def begin(ray: Any, **options: Any) -> None:
    """A cluster of this machine. ConfigError where it does not start. (Its parts wait for each other half a minute at most,
    which a busy machine may take.)"""
    for tries_left in (2, 1, 0):
        try:
            ray.init(**options)
            return
        except Exception as error:  # Ray raises bare ones here
            ray.shutdown()
            if not tries_left:
                raise ConfigError(f"Ray does not start on this machine: {error}") from error


def answers(address: str) -> None:
    """ConfigError where nothing listens at an address."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit() or not host:
        raise ConfigError(f"The Ray address {address!r}: expected host:port, ray://host:port, or auto.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"Nothing answers at the Ray address {address!r} ({error}). Is the cluster up (ray start --head), and is it "
            "reached from here?"
        ) from error


def port_is_free(host: str, port: int) -> None:
    """ConfigError where something listens at a port already."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"The port {port} of {host} cannot be had ({error}); choose another one.") from error


def versions() -> dict[str, str]:
    """What decides on numbers: they must be the same wherever one run, or one server, computes."""
    import torch
    import transformers

    return {
        "graftlm": __version__,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
    }


def differences(own: dict[str, str], other: dict[str, str]) -> str:
    """What differs, in words; the empty string where nothing does."""
    return ", ".join(f"{k} {other.get(k, 'missing')} (here {v})" for k, v in own.items() if other.get(k) != v)


def check_machines(ray: Any, folder: Path | None = None) -> None:
    """Look at every machine of the cluster.

    Args:
        folder: that all of them must share; it is there.

    Raises:
        ConfigError: one has other versions, or does not see the folder.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    token = None if folder is None else folder.resolve() / f".shared-{uuid.uuid4().hex}"
    if token is not None:
        token.touch()
    asked = ray.remote(num_cpus=0, max_retries=1)(look)
    nodes = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]}
    try:
        found = {
            place: asked.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(token)
            for node, place in nodes.items()
        }
        problems = []
        for place, reference in found.items():
            try:
                other, sees = ray.get(reference, timeout=120)
            except (ray.exceptions.RayError, TimeoutError) as error:
                cause = str(error).strip().splitlines()[-1]
                problems.append(f"{place} cannot run GraftLM: {cause}")
                continue
            if differs := differences(versions(), other):
                problems.append(f"{place} has {differs}")
            if token is not None and not sees:
                problems.append(f"{place} does not see {folder}")
    finally:
        if token is not None:
            token.unlink(missing_ok=True)
    if problems:
        raise ConfigError(
            "These machines do not fit: " + "; ".join(problems) + ". All need the same versions"
            + (", and a shared folder (--output) for checkpoints and adapters." if folder else ".")
        )  # fmt: skip


def look(token: Path | None) -> tuple[dict[str, str], bool]:
    """On one of the machines: its versions, and whether it sees a file."""
    return versions(), token is None or token.is_file()
