"""A fleet on a real Ray cluster of this machine, as a user starts it: over HTTP, with processes that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")
pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from fleet_helpers import written  # noqa: E402
from serving_helpers import alone, free_port, saved  # noqa: E402

from graftlm import cluster  # noqa: E402
from graftlm.errors import ConfigError  # noqa: E402
from graftlm.fleet.config import FleetConfig  # noqa: E402

pytestmark = pytest.mark.slow
PROMPT = "The river is long and the"
WAIT = 240.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cluster")
    written(folder)
    return folder


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    with cluster.connected(None, cpus=4) as ray:
        yield ray


@pytest.fixture(scope="module")
def fleet(root: Path, ray: Any) -> Iterator[tuple[FleetConfig, httpx.Client]]:
    from ray import serve

    from graftlm.fleet.start import bring_up

    config = FleetConfig.from_dict(
        {
            "base": str(root / "tiny"), "adapters": {"style": str(root / "adapters" / "style")}, "replicas": 2,
            "adapter_dirs": [str(root / "adapters")], "http": {"port": free_port(), "admin_key": "key"},
            "replica": {"max_rows": 4, "queue": 4},
        }
    )  # fmt: skip
    bring_up(ray, config)
    with httpx.Client(base_url=f"http://127.0.0.1:{config.http.port}", timeout=WAIT) as client:
        yield config, client
    serve.shutdown()


def complete(client: httpx.Client, model: str = "tiny", **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | more
    return client.post("/v1/completions", json=body)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def status() -> dict[str, Any]:
    from graftlm.fleet.handle import manager
    from graftlm.fleet.start import answer

    return answer(manager().status.remote())


def until(true: Any) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def ready() -> list[str]:
    return [name for name, r in status()["replicas"].items() if r["state"] == "ready"]


def engines(ray: Any) -> list[int]:
    """Processes of replicas."""
    import psutil

    return [p.pid for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [""])[0].startswith("ray::Replica")]


def test_answers_streams_and_limits(fleet: Any, root: Path) -> None:
    _, client = fleet
    for name in ("tiny", "style", "task"):
        folder = None if name == "tiny" else str(root / "adapters" / name)
        assert [text(complete(client, name)) for _ in range(2)] == [alone(folder, PROMPT, 8)] * 2
    with client.stream("POST", "/v1/completions", json={"model": "task", "prompt": PROMPT, "stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and len(lines) > 10
    assert complete(client, "stile").status_code == 404
    assert client.get("/v1/models/style").json()["loaded"]


def test_too_much_is_a_429(fleet: Any) -> None:
    config, _ = fleet

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{config.http.port}", timeout=WAIT) as client:
            body = {"model": "style", "prompt": PROMPT, "max_tokens": 300, "ignore_eos": True}
            return await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(40)))

    found = asyncio.run(ask())
    refused = [r for r in found if r.status_code != 200]
    assert 0 < len(refused) < 40
    assert all(r.status_code == 429 and "retry-after" in r.headers for r in refused)


def test_a_client_that_leaves_frees_its_replica(fleet: Any) -> None:
    _, client = fleet
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with contextlib.ExitStack() as streams:

        def seen() -> bool:  # one more stream a look: the manager looks twice a second, and a fast replica has ended by then
            streams.enter_context(client.stream("POST", "/v1/completions", json=body))
            return any(r["tokens"] for r in status()["replicas"].values())

        until(seen)
    until(lambda: not any(r["tokens"] for r in status()["replicas"].values()))


def test_a_killed_replica_loses_streams_and_nothing_else(fleet: Any, ray: Any) -> None:
    """Every request ends: whole answers as if nothing had happened, streams that had begun with an error or whole."""
    _, client = fleet
    expected = text(complete(client, max_tokens=200, ignore_eos=True))
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        body = {"max_tokens": 200, "ignore_eos": True, "stream": number % 2 == 1}
        found[number] = complete(client, **body)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: sum(r["tokens"] > 0 for r in status()["replicas"].values()))
    before, victims = ready(), engines(ray)
    os.kill(victims[0], signal.SIGKILL)
    for thread in threads:
        thread.join(WAIT)
    assert len(found) == 6
    for number, answer in found.items():
        if number % 2 == 0:
            assert text(answer) == expected
        else:
            assert answer.status_code == 200 and answer.text.endswith("data: [DONE]\n\n")
    until(lambda: len(ready()) == 2 and ready() != before)
    assert text(complete(client, max_tokens=200, ignore_eos=True)) == expected


def test_a_killed_door_stands_in_again(fleet: Any, ray: Any) -> None:
    """What ran over it ends with its connection; replicas stay, and the next door has the table again."""
    _, client = fleet
    expected, before = text(complete(client, "task")), ready()
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with pytest.raises(httpx.TransportError), client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        os.kill(doors()[0], signal.SIGKILL)
        list(lines)
    killed = time.monotonic()
    until(lambda: answers(client))
    assert time.monotonic() - killed < 30
    assert text(complete(client, "task")) == expected and ready() == before
    until(lambda: not any(r["tokens"] for r in status()["replicas"].values()))  # the stream's rows are given up


def doors() -> list[int]:
    """Processes of doors."""
    import psutil

    return [p.pid for p in psutil.process_iter(["cmdline"]) if ":Door" in (p.info["cmdline"] or [""])[0]]


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/v1/models", timeout=1).status_code == 200
    except httpx.TransportError:
        return False


def test_an_adapter_is_replaced_under_load(fleet: Any, root: Path, tmp_path: Path) -> None:
    _, client = fleet
    new = saved(tmp_path, ["style"], seed=77)["style"]
    os.rename(new, root / "adapters" / "style-new")
    old, other = (alone(str(root / "adapters" / name), PROMPT, 8) for name in ("style", "style-new"))
    found: list[str] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            found.append(text(complete(client, "style")))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(found) > 5)
    body = {"lora_name": "style", "lora_path": str(root / "adapters" / "style-new"), "load_inplace": True}
    answer = client.post("/v1/load_lora_adapter", json=body, headers={"Authorization": "Bearer key"})
    assert answer.status_code == 200, answer.text
    after = {text(complete(client, "style")) for _ in range(6)}
    done.set()
    for thread in threads:
        thread.join()
    assert after == {other} and set(found) == {old, other} and old != other


def test_replicas_are_replaced_while_requests_run(fleet: Any, ray: Any) -> None:
    from graftlm.fleet.start import bring_up

    config, client = fleet
    before, failed, count, done = ready(), [], [0], threading.Event()

    def ask() -> None:
        while not done.is_set():
            answer = complete(client, stream=count[0] % 2 == 1, max_tokens=30)
            count[0] += 1
            if answer.status_code != 200 or '"error"' in answer.text:
                failed.append(answer.text)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    changed = FleetConfig.from_dict(config.model_dump(), ["replica.max_rows=6"])
    assert bring_up(ray, changed)
    done.set()
    for thread in threads:
        thread.join()
    assert not failed and count[0] > 3 and not set(before) & set(ready())
    with pytest.raises(ConfigError, match="http.port cannot change"):
        bring_up(ray, FleetConfig.from_dict(config.model_dump(), ["http.port=9"]))


def test_serve_replicas_drains_on_a_signal(root: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "graftlm", "serve", "--base", str(root / "tiny"), f"--port={port}", "--replicas=2"]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with open(root / "log", "wb") as log:
        running = subprocess.Popen(command, env=paths, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        until(lambda: running.poll() is not None or "Serving" in (root / "log").read_text())
        with httpx.Client(base_url=address, timeout=WAIT) as client:
            assert text(complete(client)) == alone(None, PROMPT, 8)
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                written = [next(lines)]
                running.send_signal(signal.SIGTERM)
                written += lines  # what runs ends whole
            assert written[-2] == "data: [DONE]" and '"length"' in written[-4] and not any('"error"' in w for w in written)
        assert running.wait(WAIT) == 0
        with pytest.raises(ConfigError):
            cluster.answers(f"127.0.0.1:{port}")
    finally:
        running.kill()
        running.wait()
