"""The official client of OpenAI's API against a server of its own process, as a user starts it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
openai = pytest.importorskip("openai", reason="the openai client is not installed")
httpx = pytest.importorskip("httpx", reason="the openai client needs httpx")

from serving_helpers import process, saved  # noqa: E402

KEY = "secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Any]]:
    root = tmp_path_factory.mktemp("served")
    adapters = [f"--adapter={name}={folder}" for name, folder in saved(root / "adapters").items()]
    with process(root, *adapters, f"--api-key={KEY}") as (address, running):
        yield f"{address}/v1", running


@pytest.fixture
def client(server: tuple[str, Any]) -> Any:
    return openai.OpenAI(base_url=server[0], api_key=KEY, max_retries=0)


def test_endpoints(client: Any) -> None:
    assert {m.id for m in client.models.list()} == {"tiny", "style", "task", "memory", "block"}
    assert client.models.retrieve("style").parent == "tiny"
    said = client.completions.create(model="style", prompt="One", max_tokens=5, temperature=0, logprobs=1)
    assert len(said.choices[0].logprobs.tokens) == said.usage.completion_tokens == 5
    asked = [{"role": "user", "content": "Hi"}]
    whole = client.chat.completions.create(model="task", messages=asked, max_tokens=6, temperature=0)
    parts = client.chat.completions.create(model="task", messages=asked, max_tokens=6, temperature=0, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content
    assert len(client.embeddings.create(model="block", input="One").data[0].embedding) == 32


def test_errors(client: Any, server: tuple[str, Any]) -> None:
    with pytest.raises(openai.NotFoundError, match="There is no model 'none'"):
        client.completions.create(model="none", prompt="One")
    with pytest.raises(openai.BadRequestError, match="this server"):
        client.completions.create(model="tiny", prompt="One", max_tokens=100_000)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server[0], api_key="wrong", max_retries=0).models.list()


def test_a_client_that_leaves_frees_its_row(client: Any) -> None:
    stream = client.completions.create(
        model="tiny", prompt="One", max_tokens=480, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 20
    while 'vllm:num_requests_running{model_name="tiny"} 0.0' not in metrics(client):
        assert time.monotonic() < until
        time.sleep(0.1)


def metrics(client: Any) -> str:
    return str(client._client.get(str(client.base_url).replace("/v1/", "/metrics"), headers=client.auth_headers).text)


def test_many_at_once(client: Any) -> None:
    """Requests of every adapter at the same time: each gets what it gets alone."""

    def ask(model: str) -> str:
        made = client.completions.create(model=model, prompt=f"About {model}", max_tokens=12, temperature=0)
        return str(made.choices[0].text)

    models = ["tiny", "style", "task", "memory", "block", "style+task"]
    alone, found = {m: ask(m) for m in models}, []
    threads = [threading.Thread(target=lambda m=m: found.append((m, ask(m)))) for m in models * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    assert all(text == alone[m] for m, text in found)


def test_sigterm_lets_requests_end(client: Any, server: tuple[str, Any]) -> None:
    """What runs ends whole; what comes meanwhile is told that the server goes, as whoever asks whether it is ready."""
    long = {"model": "tiny", "prompt": "One", "max_tokens": 400, "temperature": 0, "extra_body": {"ignore_eos": True}}
    streams = [client.completions.create(**long, stream=True) for _ in range(3)]
    chunks = [[next(iter(stream))] for stream in streams]
    server[1].send_signal(signal.SIGTERM)
    time.sleep(0.5)  # the loop looks ten times a second
    with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
        openai.OpenAI(base_url=server[0], api_key=KEY, max_retries=0).completions.create(model="style", prompt="Two")
    assert (refused.value.status_code, refused.value.response.headers["retry-after"]) == (503, "2")
    assert httpx.get(server[0].replace("/v1", "/ready")).status_code == 503
    for stream, have in zip(streams, chunks, strict=True):
        have += list(stream)
        assert have[-1].choices[0].finish_reason == "length"
    assert len({"".join(c.choices[0].text for c in have) for have in chunks}) == 1
    assert server[1].wait(30) == 0


def test_a_second_sigterm_stops(tmp_path: Path) -> None:
    with process(tmp_path, "--max-rows=1") as (url, running):
        body = {"model": "tiny", "prompt": "One", "max_tokens": 500, "ignore_eos": True, "stream": True, "n": 8}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            for _ in range(2):
                running.send_signal(signal.SIGTERM)
                time.sleep(0.3)
            assert running.wait(20) == 0
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
