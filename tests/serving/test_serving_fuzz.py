"""Bodies of all sorts against every endpoint: an answer or an error in OpenAI's form for each, and nothing left behind."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("httpx", reason="the test client of fastapi needs httpx")

from serving_helpers import alone, saved, served  # noqa: E402

PROMPT = "The river is long and the"
TOOL = {"type": "function", "function": {"name": "count", "parameters": {"type": "object"}}}
SAID = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "style", "prompt": PROMPT, "max_tokens": 3, "temperature": 0.7, "top_p": 0.9, "n": 1, "stop": ["x"],
        "seed": 1, "logit_bias": {"5": 1.0}, "logprobs": 2, "stream": False, "min_tokens": 1, "frequency_penalty": 0.5,
        "stop_token_ids": [3], "echo": False, "best_of": 1, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
    },
    "/v1/chat/completions": {
        "model": "task", "messages": SAID, "max_tokens": 3, "tools": [TOOL], "tool_choice": "auto", "logprobs": True,
        "top_logprobs": 2, "response_format": {"type": "text"}, "stream": True, "stream_options": {"include_usage": True},
        "chat_template_kwargs": {}, "user": "me", "metadata": {}, "n": 1,
    },
    "/v1/embeddings": {"model": "style", "input": ["One", "Two"], "encoding_format": "base64", "pooling": "last"},
    "/tokenize": {"model": "style", "messages": SAID, "return_token_strs": True},
    "/detokenize": {"tokens": [5, 6, 7]},
    "/v1/load_lora_adapter": {"lora_name": "new", "lora_path": "style", "load_inplace": True, "pinned": False},
    "/v1/unload_lora_adapter": {"lora_name": "new"},
}  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 17, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), "", " ", "a", "base", "style+task", "style+style", "+", "../style", "/etc/passwd", "\0", "\ud800",
    "\u202e", "日本語🙂" * 20, "ａ" * 5000, "e\u0301" * 9, "<|endoftext|>", "{{ 7 * 7 }}", "{% raise %}", [], {},
    [[]], [[[]]], [None],
    [1, "a"], ["a", 1], [5, 6], [[5, 6], [7]], [[5], "a"], [10**9], [-1], {"a": {"b": []}}, {"type": "json_object"},
    {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "strange"}}}, {"type": "regex", "pattern": "("},
    {"type": "regex", "pattern": "a{99999}"}, {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/nowhere"}}},
    {"999999999999999999999": 1}, {"x": 1}, {"5": 1e400}, [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}], [{"role": "tool"}],
    [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "assistant", "content": "only"}], [{"role": "user"}], [{"role": "nobody", "content": "x"}], [TOOL, TOOL],
    {"type": "function", "function": {"name": "count"}}, "required", "none", {"include_usage": None},
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in a body."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, found in inside:
        yield (*at, key)
        yield from places(found, (*at, key))


def spoiled(rng: random.Random, path: str) -> bytes:
    """A body that is not quite, or not at all, what an endpoint takes."""
    body = json.loads(json.dumps(BODIES[path]))
    for key in rng.sample(list(body), rng.randint(0, len(body))):
        if key not in ("model", "prompt", "messages", "input", "lora_name", "lora_path", "tokens") or rng.random() < 0.1:
            del body[key]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        found = list(places(body))
        if not found:
            break
        *way, last = rng.choice(found)
        inside = body
        for key in way:
            inside = inside[key]
        inside[last] = copy.deepcopy(rng.choice(ODD) if rng.random() < 0.8 else rng.choice(list(BODIES.values())))
    if rng.random() < 0.1:
        body[rng.choice(["extra", "", "\ud800", "temprature", "__class__", "prompt_embeds"])] = copy.deepcopy(
            rng.choice(ODD)
        )
    raw = json.dumps(body, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    kind, at = rng.random(), rng.randrange(len(raw) + 1)
    if kind < 0.05:
        return raw[:at]
    if kind < 0.1:
        return raw[:at] + bytes(rng.randrange(256) for _ in range(3)) + raw[at:]
    if kind < 0.12:
        return rng.choice(
            [b"[" * 50_000, b'{"a":' * 20_000, b"1" * 10_000, b"\xff\xfe{\0}\0", b"", b"null", b'"x"', raw * 2]
        )
    return raw


def ask(client: Any, rng: random.Random) -> tuple[str, bytes, Any]:
    path = rng.choice(list(BODIES))
    body = spoiled(rng, path)
    kind = rng.choice(
        ["application/json"] * 9 + ["text/plain", "", "multipart/form-data; boundary=x", "application/json; x=\xff"]
    )
    headers = {"content-type": kind.encode("latin-1"), "authorization": "Bearer admin"}
    return path, body, client.post(path, content=body, headers=headers)


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_body_at_all(tmp_path: Path, count: int) -> None:
    rng, root = random.Random(count), tmp_path / "roots"
    folders = saved(root, ["style", "task"])
    seen: dict[int, int] = {}
    limits = {"cache_tokens": 2048, "max_rows": 4}
    with served(folders, limits, adapter_dirs=[root], admin_key="admin", max_body=100_000, timeout=20) as (client, service):
        for _ in range(count):
            path, body, found = ask(client, rng)
            seen[found.status_code] = seen.get(found.status_code, 0) + 1
            assert found.status_code < 500, (path, body[:2000], found.text)
            if found.status_code >= 400:
                assert found.json()["error"]["message"], (path, body[:2000])
                assert set(found.json()["error"]) == {"message", "type", "param", "code"}
            elif "event-stream" in found.headers["content-type"]:
                assert found.text.endswith("data: [DONE]\n\n")
                assert '"internal_error"' not in found.text, (path, body[:2000], found.text[-2000:])
        assert seen[200] > count / 20
        assert seen[400] > count / 5
        health = service.engine.health()
        assert (health.alive, health.waiting, health.running) == (True, 0, 0)
        asked = {"model": "style", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        assert client.post("/v1/completions", json=asked).json()["choices"][0]["text"] == alone(folders["style"], PROMPT, 8)
