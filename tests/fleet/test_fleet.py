"""A fleet in one process, without Ray: answers, streams, adapters that come and go, replicas that die or are replaced."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from fleet_helpers import Actor, Fleet, FleetConfig, within, written  # noqa: E402
from serving_helpers import alone, saved  # noqa: E402

from graftlm.errors import QueueFullError, ServingError  # noqa: E402
from graftlm.inference.requests import Request, SamplingParams  # noqa: E402
from graftlm.serving.app import create_app  # noqa: E402

PROMPT = "The river is long and the"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    written(folder)
    return folder


def run(root: Path, work: Callable[[Fleet, httpx.AsyncClient], Coroutine], **values: Any) -> None:
    """Do some work with a fleet and a client of its ingress."""

    async def all_of_it() -> None:
        base = {"base": str(root / "tiny"), "adapter_dirs": [str(root / "adapters")], "replicas": 2}
        config = FleetConfig.from_dict(base | {"http": {"admin_key": "key"}} | values)
        async with Fleet(config) as fleet:
            door = httpx.ASGITransport(create_app(fleet.service), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=door, base_url="http://fleet") as client:
                await asyncio.wait_for(work(fleet, client), 100)

    asyncio.run(all_of_it())


async def complete(client: httpx.AsyncClient, model: str = "tiny", **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | more
    return await client.post("/v1/completions", json=body)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def request(new: int, streams: bool, adapter: str = "", n: int = 1) -> Request:
    params = SamplingParams(max_new_tokens=new, ignore_end=True)
    return Request(prompt=(5, 6, 7, 8), adapter=adapter, params=params, streams=streams, n=n)


def at(fleet: Fleet) -> Any:
    """The replica that has requests."""
    return next(link for link in fleet.remote.links.values() if link.calls)


async def sent(fleet: Fleet) -> None:
    """Until a request is at a replica."""
    async with within(20):
        while not any(link.calls for link in fleet.remote.links.values()):
            await asyncio.sleep(0.01)


def test_answers_are_those_of_generate_wherever_they_are_written(root: Path) -> None:
    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        models = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
        assert models == ["tiny", "block", "memory", "style", "task"]
        folders = {name: str(root / "adapters" / name) for name in models[1:]}
        for name in models:
            expected = alone(folders.get(name), PROMPT, 8)
            assert [text(await complete(client, name)) for _ in range(2)] == [expected] * 2
        assert text(await complete(client, "style+task")) not in {alone(f, PROMPT, 8) for f in folders.values()}
        lines = (await complete(client, "style", stream=True)).text.split("\n\n")
        assert lines[-2] == "data: [DONE]" and len(lines) > 4
        n = (await complete(client, "task", n=3, temperature=1, seed=1)).json()["choices"]
        assert len({c["text"] for c in n}) > 1
        vector = {"model": "style", "input": "a river"}
        assert len((await client.post("/v1/embeddings", json=vector)).json()["data"][0]["embedding"]) == 32
        assert (await client.get("/ready")).status_code == 200
        assert "graftlm_tokens_total" in (await client.get("/metrics")).text

    run(root, work)


def test_what_cannot_be_served_is_told_as_by_one_engine(root: Path) -> None:
    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        found = await complete(client, "stile")
        assert found.status_code == 404 and "did you mean 'style'" in found.text
        found = await complete(client, max_tokens=10_000)
        assert found.status_code == 400 and "Shorten the prompt" in found.text
        found = await complete(client, response_format={"type": "regex", "pattern": "("})
        assert found.status_code == 400

    run(root, work, replicas=1)


def test_an_adapter_is_asked_for_where_it_is(root: Path) -> None:
    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        for _ in range(3):
            await asyncio.gather(*(complete(client, name) for name in ("style", "task", "block")))
        loads = [actor.inner.engine.registry.counts["loaded"] for actor in fleet.manager.actors.values()]
        assert sum(loads) == 3 and max(loads) == 2

    run(root, work)


def test_a_lost_replica_loses_streams_and_nothing_else(root: Path) -> None:
    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        expected = [e.tokens for e in [e async for e in fleet.remote.submit(request(200, True))]]
        whole = fleet.remote.submit(request(200, False))
        stream = fleet.remote.submit(request(200, True))
        later = fleet.remote.submit(request(200, True))
        await sent(fleet)
        first = await anext(aiter(stream))
        assert first.tokens == expected[0]
        for link in list(fleet.remote.links.values()):
            if any(call.handle is stream for call in link.calls.values()):
                fleet.manager.actors[link.name].kill()
        with pytest.raises(ServingError, match="gone"):
            [e async for e in stream]
        tokens = [t for e in [e async for e in whole] for t in e.tokens]
        assert tokens == [t for part in expected for t in part]
        try:
            assert [e.tokens for e in [e async for e in later]] == expected  # it had streamed yet, or it runs elsewhere
        except ServingError as error:
            assert "gone" in str(error)
        await fleet.settled()  # another one has come in its place
        assert text(await complete(client, "style")) == alone(str(root / "adapters" / "style"), PROMPT, 8)
        assert fleet.remote.router.asked == 0 and not fleet.remote.router.by_group

    run(root, work)


def test_a_request_that_replicas_die_of_is_given_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died = []
    run_there = Actor.run

    async def dies(self: Actor, name: str, *args: Any) -> Any:
        if name == "submit":
            died.append(self)
            self.kill()
        return await run_there(self, name, *args)

    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        with pytest.raises(ServingError, match="3 replicas were lost"):
            await fleet.remote.submit(request(400, False)).aresult()
        assert len(set(died)) == len(died) == 3

    monkeypatch.setattr(Actor, "run", dies)
    run(root, work)


def test_requests_wait_where_no_replica_is_there(root: Path) -> None:
    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        for actor in list(fleet.manager.actors.values()):
            actor.kill()
        async with within(30):
            while fleet.remote.links:
                await asyncio.sleep(0.01)
        assert (await client.get("/health")).status_code == 503
        assert text(await complete(client)) == alone(None, PROMPT, 8)

    run(root, work, replicas=1)


def test_a_replica_that_says_nothing_counts_as_lost(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm.fleet import remote

    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        monkeypatch.setattr(remote, "SILENCE", 1.5)
        await asyncio.sleep(1.2)  # polls that wait longer are over
        hung = next(iter(fleet.manager.actors.values()))

        async def nothing(*_: Any) -> None:
            await asyncio.sleep(1000)

        hung.inner.poll = hung.inner.submit = nothing
        found = await asyncio.gather(*(complete(client) for _ in range(6)))
        assert {text(r) for r in found} == {alone(None, PROMPT, 8)}

    run(root, work)


def test_cancelling_frees_the_replica(root: Path) -> None:
    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        handle = fleet.remote.submit(request(450, True, n=2))
        await anext(aiter(handle))
        handle.cancel()
        finish = {e.index: e.finish for e in [e async for e in handle]}
        assert finish == {0: "cancelled", 1: "cancelled"}
        async with within(20):
            while any(actor.inner.tokens for actor in fleet.manager.actors.values()):
                await asyncio.sleep(0.01)
        assert fleet.remote.router.asked == 0

    run(root, work, replicas=1)


def test_too_much_is_a_429_that_says_when(root: Path) -> None:
    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        found = await asyncio.gather(*(complete(client, max_tokens=60) for _ in range(12)))
        refused = [r for r in found if r.status_code != 200]
        assert 0 < len(refused) < 12
        assert all(r.status_code == 429 and r.headers["retry-after"] == "2" for r in refused)
        with pytest.raises(QueueFullError):
            handles = [fleet.remote.submit(request(100, True)) for _ in range(12)]
            await asyncio.gather(*(handle.aresult() for handle in handles))

    run(root, work, replicas=1, replica={"max_rows": 2, "queue": 2})


def test_an_adapter_is_replaced_once_and_everywhere_while_it_is_asked_for(root: Path, tmp_path: Path) -> None:
    """Requests that began before end on the old one; from the answer on all replicas have the new one."""
    shutil.copytree(root / "adapters", tmp_path / "adapters")
    new = saved(tmp_path / "new", ["style"], seed=77)["style"]
    shutil.copytree(new, tmp_path / "adapters" / "style-new")
    old = alone(str(root / "adapters" / "style"), PROMPT, 8)
    other = alone(new, PROMPT, 8)
    assert old != other

    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        key = {"Authorization": "Bearer key"}
        body = {"lora_name": "style", "lora_path": str(tmp_path / "adapters" / "style-new")}
        asyncs = [asyncio.ensure_future(complete(client, "style")) for _ in range(6)]
        await asyncio.gather(*(complete(client, "style") for _ in range(2)))
        found = await client.post("/v1/load_lora_adapter", json=body, headers=key)
        assert found.status_code == 400 and "load_inplace" in found.text
        shutil.rmtree(tmp_path / "adapters" / "style")  # it was sealed: nobody reads the folder any more
        assert text(await complete(client, "style")) == old
        inplace = body | {"load_inplace": True}
        broken = tmp_path / "adapters" / "broken"
        broken.mkdir()
        found = await client.post(
            "/v1/load_lora_adapter", headers=key, json=body | {"lora_path": str(broken), "load_inplace": True}
        )
        assert found.status_code == 400
        found = await client.post(
            "/v1/load_lora_adapter", headers=key, json=body | {"lora_path": "/etc", "load_inplace": True}
        )
        assert found.status_code == 403
        assert text(await complete(client, "style")) == old
        found = await client.post("/v1/load_lora_adapter", headers=key, json=inplace)
        assert found.status_code == 200, found.text
        after = await asyncio.gather(*(complete(client, "style") for _ in range(8)))
        assert {text(r) for r in after} == {other}
        assert {text(r) for r in await asyncio.gather(*asyncs)} == {old}
        card = (await client.get("/v1/models/style")).json()
        assert card["root"].endswith("style-new") and card["loaded"]
        assert len({actor.inner.known.get("style") for actor in fleet.manager.actors.values()} - {None}) == 1
        found = await client.post("/v1/unload_lora_adapter", headers=key, json={"lora_name": "style"})
        assert found.status_code == 200
        assert (await complete(client, "style")).status_code == 404
        assert (await client.post("/v1/unload_lora_adapter", headers=key, json={"lora_name": "style"})).status_code == 404

    run(root, work, adapter_dirs=[str(tmp_path / "adapters")])


def test_replicas_are_replaced_one_by_one_without_a_lost_request(root: Path) -> None:
    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        before, failed, done = set(fleet.manager.actors), [], asyncio.Event()
        expected = alone(str(root / "adapters" / "style"), PROMPT, 8)

        async def ask() -> int:
            count = 0
            while not done.is_set():
                found = await complete(client, "style", stream=count % 2 == 1)
                if found.status_code != 200 or '"error"' in found.text:
                    failed.append(found.text)
                elif count % 2 == 0 and text(found) != expected:
                    failed.append(text(found))
                count += 1
            return count

        asks = [asyncio.ensure_future(ask()) for _ in range(3)]
        changed = fleet.config.model_dump()
        changed["replica"]["max_rows"] = 4
        await fleet.manager.reconfigure(changed)
        await fleet.settled()
        done.set()
        counts = await asyncio.gather(*asks)
        assert not failed and min(counts) > 1
        assert not before & set(fleet.manager.actors)
        assert {a.inner.engine.config.max_rows for a in fleet.manager.actors.values()} == {4}

    run(root, work)


def test_a_configuration_that_does_not_start_leaves_the_fleet_as_it_is(root: Path) -> None:
    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        before = set(fleet.manager.actors)
        made = fleet.manager.made

        def broken() -> Any:
            actor = made()

            async def facts() -> None:
                raise ServingError("no memory")

            actor.inner.facts = facts
            return actor

        fleet.manager.made = broken  # type: ignore[method-assign]
        changed = fleet.config.model_dump()
        changed["replica"]["max_rows"] = 4
        await fleet.manager.reconfigure(changed)
        async with within(30):
            while not fleet.manager.error or fleet.manager.control.failed < 3:
                await asyncio.sleep(0.05)
        assert "no memory" in fleet.manager.error and before == set(fleet.manager.actors)
        assert (await complete(client, "style")).status_code == 200
        changed["http"]["port"] = 9
        with pytest.raises(ValueError, match="http.port cannot change"):
            await fleet.manager.reconfigure(changed)

    run(root, work)


def test_the_number_follows_the_tokens_on_their_way(root: Path) -> None:
    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        handles = [fleet.remote.submit(request(450, False)) for _ in range(8)]
        async with within(60):
            while len(fleet.remote.links) < 2:
                await asyncio.sleep(0.05)
        for handle in handles:
            handle.cancel()
        async with within(60):
            while len(fleet.remote.links) > 1:
                await asyncio.sleep(0.05)
        assert (await complete(client, "style")).status_code == 200

    scaled = {"min": 1, "max": 2, "queued_tokens": 500, "up_after": 0.2, "down_after": 0.5}
    run(root, work, replicas=scaled)


def test_a_broken_adapter_stops_the_start(root: Path, tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()

    async def work() -> None:
        config = FleetConfig.from_dict({"base": str(root / "tiny"), "adapters": {"bad": str(tmp_path / "bad")}})
        with pytest.raises(ValueError, match="adapter_config.json"):
            async with Fleet(config):
                pass

    asyncio.run(work())


def test_drained_it_takes_nothing_new(root: Path) -> None:
    async def work(fleet: Fleet, client: httpx.AsyncClient) -> None:
        handle = fleet.remote.submit(request(100, False))
        await sent(fleet)
        await fleet.manager.drain()
        await asyncio.sleep(0.1)
        found = await complete(client)
        assert found.status_code == 503 and found.headers["retry-after"] == "2"
        assert len((await handle.aresult()).completions[0].tokens) == 100

    run(root, work, replicas=1)
