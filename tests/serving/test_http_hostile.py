"""Requests that are made to do harm: each is one client's affair; the server goes on, and tells nothing of its disk."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="the test client of fastapi needs httpx")

from serving_helpers import alone, process, saved, served  # noqa: E402

from graftlm.errors import ConfigError, GraftError  # noqa: E402
from graftlm.inference.errands import EMBEDDED, at_once  # noqa: E402
from graftlm.serving.schema import MOST_INPUTS  # noqa: E402
from graftlm.serving.settings import Settings  # noqa: E402

PROMPT = "The river is long and the"
BODY: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    with served({}, max_tokens=5) as (client, _):
        yield client


def fine(client: Any) -> bool:
    said = client.post("/v1/completions", json=BODY)
    return bool(said.status_code == 200 and said.json()["choices"][0]["text"] == alone(None, PROMPT, 8))


def form(kind: str, value: Any) -> dict[str, Any]:
    name = "json_schema" if kind == "json_schema" else "pattern"
    return {"response_format": {"type": kind, name: {"schema": value} if kind == "json_schema" else value}}


FORMS = {
    "grows over its limits": form("regex", "(a?){5000}a{5000}"),
    "fits nothing": form("regex", r"[^\s\S]"),
    "refers to itself": form("json_schema", {"$ref": "#"}),
    "reads a file": form("json_schema", {"$ref": "file:///etc/hostname"}),
    "takes seconds to read": form("json_schema", {"enum": [f"v{i}" for i in range(20_000)]}),
    "is deep": form("json_schema", json.loads('{"properties":{"a":' * 200 + "{}" + "}}" * 200)),
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(client: Any, name: str) -> None:
    """A form that cannot be kept to ends its own request, also where that shows in the midst of it."""
    pytest.importorskip("llguidance", reason="the extra `serve` is not installed")
    found = client.post("/v1/completions", json=BODY | FORMS[name])
    assert found.status_code == 400, found.text
    assert fine(client)


def test_stop_texts_of_megabytes(client: Any) -> None:
    begun = time.monotonic()
    assert client.post("/v1/completions", json=BODY | {"stop": ["x" * 200_000] * 16}).status_code == 200
    assert time.monotonic() - begun < 20  # looked through whole at each token they took an hour


@pytest.mark.parametrize(
    "options",
    [{"chat_template": "{{ 7 }}"}, {"tokenize": False}, {"return_tensors": "pt"}, {"truncation": True}, {"messages": []}],
)
def test_a_template_is_the_servers(client: Any, options: dict[str, Any]) -> None:
    found = client.post("/v1/chat/completions", json=CHAT | {"chat_template_kwargs": options})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "chat_template_kwargs")
    assert client.post("/v1/chat/completions", json=CHAT | {"chat_template_kwargs": {"mood": 1}}).status_code == 200


EMPTY = [{"prompt": []}, {"prompt": [True]}, {"max_tokens": 0, "echo": True}, {"temperature": 1e-40}]


@pytest.mark.parametrize("more", EMPTY)
def test_values_at_the_edge(client: Any, more: dict[str, Any]) -> None:
    found = client.post("/v1/completions", json=BODY | more)
    assert found.status_code == 400, found.text
    assert "function" not in found.json()["error"]["message"]


def test_answers_that_nobody_bounded(client: Any) -> None:
    """A chat that names no number gets the server's own; a completion OpenAI's."""
    body = CHAT | {"max_tokens": None, "ignore_eos": True}
    assert client.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 5
    assert client.post("/v1/completions", json=BODY | {"max_tokens": None}).json()["usage"]["completion_tokens"] == 16


def test_embeddings_in_bulk(client: Any) -> None:
    """Vectors of many texts come part by part, and are those of each text alone."""
    texts = [f"{i} " * (1 + i * 37 % 150) for i in range(12)]
    body = {"model": "tiny", "input": texts}
    many = [e["embedding"] for e in client.post("/v1/embeddings", json=body).json()["data"]]
    for text, vector in zip(texts, many, strict=True):
        (one,) = client.post("/v1/embeddings", json=body | {"input": text}).json()["data"]
        assert one["embedding"] == pytest.approx(vector, abs=1e-4)
    for wrong in (["a"] * (MOST_INPUTS + 1), []):
        assert client.post("/v1/embeddings", json=body | {"input": wrong}).status_code == 400


def test_parts_of_bulk() -> None:
    rows = [[0] * n for n in (3, EMBEDDED * 2, 5, EMBEDDED // 2, 1, 1)]
    parts = []
    while rows:
        parts.append(at_once(rows))
        rows = rows[len(parts[-1]) :]
    assert [[len(row) for row in part] for part in parts] == [[3], [EMBEDDED * 2], [5, EMBEDDED // 2], [1, 1]]


def test_keys_that_are_empty() -> None:
    for keys in ({"admin_key": ""}, {"api_keys": frozenset({"a", ""})}):
        with pytest.raises(ConfigError, match="An empty key"):
            Settings(base_name="tiny", **keys)


def test_errors_tell_nothing_of_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Broken adapters by their names; where they are stands in the log."""
    root = tmp_path / "secret place"
    saved(root, ["style", "task", "memory"])
    (root / "style" / "adapter_model.safetensors").write_bytes(b"no weights")
    (root / "task" / "adapter_config.json").write_text("{")
    (root / "memory" / "adapter_model.safetensors").unlink()
    for name in ("empty", "pickled"):
        (root / name).mkdir()
        (root / name / "adapter_config.json").write_text("[]" if name == "empty" else '{"peft_type": "LORA"}')
    (root / "pickled" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with served({}, adapter_dirs=[root], admin_key="admin") as (client, service):
        for name in ("style", "task", "memory", "empty", "pickled", "style+task"):
            found = client.post("/v1/completions", json=BODY | {"model": name})
            assert found.status_code == 400, found.text
            assert "secret" not in found.text and name.partition("+")[0] in found.text, found.text
        body = {"lora_name": "it", "lora_path": str(root / "style")}
        found = client.post("/v1/load_lora_adapter", json=body, headers={"Authorization": "Bearer admin"})
        assert found.status_code == 400 and "secret" not in found.text
        assert str(root / "style") in caplog.text
        with pytest.raises(GraftError, match="'style' cannot be served"):
            service.engine.ready("style").result()
        assert fine(client)


def test_clients_that_leave_before_their_stream_begins(tmp_path: Path) -> None:
    """While a prompt waits or is read nobody has an answer yet: leaving ends that request, too."""
    with process(tmp_path, "--max-rows=2") as (url, _):
        body = BODY | {"max_tokens": 480, "ignore_eos": True, "stream": True, "n": 8}
        for _ in range(6):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(30, read=0.005))
        begun = time.monotonic()
        while 'vllm:num_requests_running{model_name="tiny"} 0.0' not in (text := httpx.get(f"{url}/metrics").text):
            assert time.monotonic() < begun + 20, text
            time.sleep(0.1)
        assert 'graftlm_requests_total{endpoint="completions",status="200"}' not in text
        assert 'graftlm_requests_total{endpoint="completions",status="499"} 6.0' in text
