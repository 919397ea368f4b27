"""The HTTP server: every endpoint, errors in OpenAI's form, adapters per request."""

from __future__ import annotations

import base64
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("httpx", reason="the test client of fastapi needs httpx")

from serving_helpers import KINDS, alone, saved, served, tokenizer  # noqa: E402

from graftlm.inference.requests import Event, Request, TokenLogprob  # noqa: E402
from graftlm.serving.answers import ChatForm, Choice, Piece, Token  # noqa: E402
from graftlm.serving.running import Running  # noqa: E402
from graftlm.serving.schema import ChatRequest, CompletionRequest  # noqa: E402

PROMPT = "The river is long and the"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return saved(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def client(folders: dict[str, str]) -> Iterator[Any]:
    with served(folders) as (client, _):
        yield client


def complete(client: Any, model: str = "tiny", **more: Any) -> Any:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | more
    return client.post("/v1/completions", json=body)


def events(response: Any) -> list[Any]:
    """The data of server-sent events, but for the last, which is [DONE]."""
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("name", ["tiny", *KINDS])
def test_completions_are_those_of_generate(client: Any, folders: dict[str, str], name: str) -> None:
    found = complete(client, name).json()
    assert found["choices"][0]["text"] == alone(folders.get(name), PROMPT, 8)
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 8
    assert found["usage"]["prompt_tokens"] == len(tokenizer()(PROMPT)["input_ids"])
    assert found["model"] == name


def test_compositions(client: Any) -> None:
    texts = {name: complete(client, name).json()["choices"][0]["text"] for name in ("style", "task", "style+task")}
    assert len(set(texts.values())) == 3
    assert complete(client, "style+style").status_code == 400


def test_streams_add_up(client: Any) -> None:
    whole = complete(client, "style", n=2, seed=3, temperature=1, logprobs=2).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(complete(client, "style", n=2, seed=3, temperature=1, logprobs=2, **options))
    usage = chunks.pop()
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 16
    for choice in whole["choices"]:
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice["index"]]
        assert "".join(p["text"] for p in parts) == choice["text"]
        assert [p["finish_reason"] for p in parts][-1] == "length"
        found = [t for p in parts for t in p["logprobs"]["token_logprobs"]]
        assert found == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)  # of a start that is kept by now
        assert all(len(top) == 2 for p in parts for top in p["logprobs"]["top_logprobs"])


def test_chat(client: Any) -> None:
    body = {"model": "style", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "temperature": 0}
    found = client.post("/v1/chat/completions", json=body).json()
    (choice,) = found["choices"]
    assert found["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant"
    said = client.post(
        "/v1/completions",
        json={"model": "style", "prompt": "user: Hello\nassistant: ", "max_tokens": 6, "temperature": 0},
    ).json()
    assert choice["message"]["content"] == said["choices"][0]["text"]
    chunks = events(client.post("/v1/chat/completions", json=body | {"stream": True, "logprobs": True, "top_logprobs": 3}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == choice["message"]["content"]
    tops = [t for c in chunks if c["choices"][0]["logprobs"] for t in c["choices"][0]["logprobs"]["content"]]
    assert len(tops) == 6
    assert all(len(t["top_logprobs"]) == 3 and t["logprob"] <= 0 for t in tops)


def test_forms(client: Any) -> None:
    pytest.importorskip("llguidance", reason="the extra `serve` is not installed")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "response_format": form}
    found = client.post("/v1/chat/completions", json=body | {"max_tokens": 100}).json()["choices"][0]
    if found["finish_reason"] == "stop":
        assert json.loads(found["message"]["content"])["a"] in (1, 2)
    regex = {"type": "regex", "pattern": "[ab]{3}"}
    assert set(complete(client, response_format=regex, max_tokens=20).json()["choices"][0]["text"]) <= {"a", "b"}


def test_tools(client: Any) -> None:
    pytest.importorskip("llguidance", reason="the extra `serve` is not installed")
    parameters = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "count", "parameters": parameters}}
    body = {
        "model": "tiny", "messages": [{"role": "user", "content": "Count"}], "tools": [tool], "tool_choice": "required",
        "max_tokens": 200, "temperature": 0,
    }  # fmt: skip
    found = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert found["finish_reason"] == "tool_calls", found
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] == "count"
    assert json.loads(call["function"]["arguments"])["n"] in (1, 2)
    chunks = events(client.post("/v1/chat/completions", json=body | {"stream": True}))
    (again,) = [c["choices"][0]["delta"]["tool_calls"] for c in chunks if "tool_calls" in c["choices"][0]["delta"]]
    assert again[0]["function"] == call["function"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    history = [
        *body["messages"], {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "7"},
    ]  # fmt: skip
    assert client.post("/v1/chat/completions", json=body | {"messages": history}).status_code == 200
    wrong = body | {"tool_choice": {"type": "function", "function": {"name": "other"}}}
    assert client.post("/v1/chat/completions", json=wrong).status_code == 400


def test_one_call_at_most(client: Any) -> None:
    """parallel_tool_calls: false ends an answer behind its first call, and answers no more than that one."""
    two = '<tool_call>{"name": "f", "arguments": {}}</tool_call><tool_call>{"name": "f", "arguments": {"n": 1}}</tool_call>'
    for calls, wanted in ((None, 2), (1, 1)):
        form = ChatForm("tiny", False, ["f"], calls)
        choice = Choice(text=two, finish="stop")
        assert len(form.whole_choice(0, choice)["message"]["tool_calls"]) == wanted
        chunks = form.delta(0, choice, Piece("", finish="stop"))
        assert [len(c["choices"][0]["delta"].get("tool_calls", ())) for c in chunks] == [wanted, 0]
    tool = {"type": "function", "function": {"name": "f"}}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "tools": [tool], "max_tokens": 4}
    assert ChatRequest(**body, parallel_tool_calls=False).stops == ("</tool_call>",)
    assert ChatRequest(**body).stops == ChatRequest(**body, parallel_tool_calls=False, tool_choice="required").stops == ()
    assert client.post("/v1/chat/completions", json=body | {"parallel_tool_calls": False}).status_code == 200


def test_log_probabilities_of_nothing_are_json() -> None:
    found = TokenLogprob(token=3, logprob=-math.inf, top={3: -math.inf, 4: 0.0})
    (token,) = Running([], 1, lambda i, p: Token(i, "a", b"a", p), lambda *_: None)._tokens(
        Event(index=0, logprobs=(found,))
    )
    assert [token.logprob, *(t.logprob for t in token.top)] == [-9999.0, -9999.0, 0.0]


def test_embeddings(client: Any) -> None:
    body = {"model": "style", "input": ["One text", "And a second, longer text"]}
    found = client.post("/v1/embeddings", json=body).json()
    first, second = (e["embedding"] for e in found["data"])
    assert len(first) == 32
    (by_itself,) = client.post("/v1/embeddings", json=body | {"input": "One text"}).json()["data"]
    assert by_itself["embedding"] == pytest.approx(first, abs=1e-4)
    packed = client.post("/v1/embeddings", json=body | {"encoding_format": "base64"}).json()["data"][1]["embedding"]
    assert struct.unpack("<32f", base64.b64decode(packed)) == pytest.approx(second, abs=1e-5)
    base = client.post("/v1/embeddings", json=body | {"model": "tiny", "input": "One text"}).json()["data"][0]["embedding"]
    assert base != pytest.approx(first, abs=1e-3)
    assert client.post("/v1/embeddings", json=body | {"dimensions": 7}).status_code == 400


def test_models(client: Any) -> None:
    found = {m["id"]: m for m in client.get("/v1/models").json()["data"]}
    assert set(found) == {"tiny", *KINDS}
    assert found["style"]["parent"] == "tiny"
    assert found["style"]["kind"] == "lora"
    assert found["task"]["kind"] == "prompt_tuning"
    assert len({m["digest"] for name, m in found.items() if name != "tiny"}) == len(KINDS)
    assert client.get("/v1/models/style+task").json()["kind"] == "composition"
    assert client.get("/v1/models/none").status_code == 404


def test_tokens(client: Any) -> None:
    ids = client.post("/tokenize", json={"prompt": PROMPT}).json()["tokens"]
    assert ids == tokenizer()(PROMPT)["input_ids"]
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPT}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert tokenizer().decode(chat["tokens"]) == "user: Hi\nassistant: "


def test_health_and_metrics(client: Any) -> None:
    complete(client, "style")
    assert client.get("/health").status_code == client.get("/ready").status_code == 200
    text = client.get("/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:lora_requests_info",
    ):
        assert f"# TYPE {name} gauge" in text
    assert 'graftlm_tokens_total{adapter="style",kind="completion"}' in text


WRONG = [
    ({"model": "styl"}, 404, "There is no model 'styl'; did you mean 'style'"),
    ({"model": "style+nothing"}, 404, "There is no model"),
    ({"temprature": 1}, 400, "unknown field 'temprature'; did you mean 'temperature'"),
    ({"temperature": -1}, 400, "temperature"),
    ({"n": 17}, 400, "n=17"),
    ({"prompt": [10**6]}, 400, "not in the vocabulary"),
    ({"prompt": "a " * 2000}, 400, "tokens; this server takes"),
    ({"max_tokens": 5000}, 400, "together; this server has room"),
    ({"logit_bias": {"999999": 1}}, 400, "is no token id"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options needs stream"),
    ({"best_of": 2, "n": 3}, 400, "best_of=2 is less than n=3"),
    ({"response_format": {"type": "json_schema"}}, 400, "needs json_schema"),
    ({"response_format": {"type": "regex", "pattern": "("}}, 400, "response_format"),
    ({"suffix": "x"}, 400, "suffix"),
]


@pytest.mark.parametrize(("more", "status", "message"), WRONG)
def test_what_is_wrong(client: Any, more: dict[str, Any], status: int, message: str) -> None:
    found = complete(client, **more)
    error = found.json()["error"]
    assert (found.status_code, message in error["message"]) == (status, True), error
    assert set(error) == {"message", "type", "param", "code"}
    assert complete(client).status_code == 200


@pytest.mark.parametrize("body", [b"{", b"[]", b"\xff\xfe", b'{"model": "tiny", "prompt": "\\ud800"}', b"null", b'"x"', b""])
def test_broken_bodies(client: Any, body: bytes) -> None:
    found = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert found.status_code == 400
    assert found.json()["error"]["message"]


def test_best_of_and_echo(client: Any) -> None:
    found = complete(client, best_of=4, n=2, temperature=1.5, seed=1).json()["choices"]
    assert [c["index"] for c in found] == [0, 1]
    echoed = complete(client, echo=True).json()["choices"][0]["text"]
    assert echoed == PROMPT + complete(client).json()["choices"][0]["text"]


def test_several_prompts(client: Any) -> None:
    ids = tokenizer()(PROMPT)["input_ids"]
    found = complete(client, prompt=[ids, tokenizer()("Another one")["input_ids"]], n=2, temperature=0).json()["choices"]
    assert [c["index"] for c in found] == [0, 1, 2, 3]
    assert found[0]["text"] == found[1]["text"] == complete(client).json()["choices"][0]["text"] != found[2]["text"]


def test_keys(folders: dict[str, str]) -> None:
    with served({}, api_keys=frozenset({"secret"})) as (client, _):
        assert complete(client).status_code == 401
        assert client.get("/v1/models").json()["error"]["type"] == "authentication_error"
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        client.headers["Authorization"] = "Bearer secret"
        assert complete(client).status_code == 200
        load = {"lora_name": "style", "lora_path": folders["style"]}
        assert client.post("/v1/load_lora_adapter", json=load).status_code == 403


def test_loading_and_unloading(folders: dict[str, str], tmp_path: Path) -> None:
    root = tmp_path / "roots"
    saved(root, ["style"])
    saved(tmp_path / "outside", ["task"])
    (root / "link").symlink_to(tmp_path / "outside" / "task")
    (root / "broken").mkdir()
    (root / "broken" / "adapter_config.json").write_text("{}")
    with served({"fixed": folders["block"]}, adapter_dirs=[root], admin_key="admin") as (client, _):

        def admin(path: str, **body: Any) -> Any:
            return client.post(f"/v1/{path}", json=body, headers={"Authorization": "Bearer admin"})

        about = {m["id"]: m for m in client.get("/v1/models").json()["data"]}
        assert about["style"]["loaded"] is False and about["style"]["digest"] is None
        assert about["broken"]["kind"] == "unreadable"
        assert complete(client, "style").json()["choices"][0]["text"] == alone(folders["style"], PROMPT, 8)
        assert client.get("/v1/models/style").json()["loaded"] is True
        assert complete(client, "broken").status_code == 400
        assert client.post("/v1/load_lora_adapter", json={}).status_code == 401
        for path in (
            str(tmp_path / "outside" / "task"),
            str(root / ".." / "outside" / "task"),
            str(root / "link"),
            "\0",
            "/etc",
        ):
            assert admin("load_lora_adapter", lora_name="t", lora_path=path).status_code == 403
        done = admin("load_lora_adapter", lora_name="new", lora_path=str(root / "style"))
        assert (done.status_code, done.text) == (200, "Success: LoRA adapter 'new' added successfully.")
        assert admin("load_lora_adapter", lora_name="new", lora_path=str(root / "style")).status_code == 400
        before = complete(client, "new").json()["choices"][0]["text"]
        saved(root, ["style"], seed=9)
        assert (
            admin("load_lora_adapter", lora_name="new", lora_path=str(root / "style"), load_inplace=True).status_code == 200
        )
        assert complete(client, "new").json()["choices"][0]["text"] == alone(str(root / "style"), PROMPT, 8) != before
        assert admin("load_lora_adapter", lora_name="bad", lora_path=str(root / "broken")).status_code == 400
        assert admin("load_lora_adapter", lora_name="a+b", lora_path=str(root / "style")).status_code == 400
        assert admin("unload_lora_adapter", lora_name="new").text == "Success: LoRA adapter 'new' removed successfully."
        assert complete(client, "new").status_code == 404
        assert admin("unload_lora_adapter", lora_name="new").status_code == 404


def test_limits() -> None:
    with served({}, max_body=2000, queue_requests=1, limits={"max_rows": 1}) as (client, service):
        assert complete(client, prompt="x" * 3000).status_code == 413
        body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "ignore_eos": True, "temperature": 0}
        wanted = service.of_completion(CompletionRequest(**body))
        asked = Request(prompt=wanted.prompts[0], params=wanted.params)
        handles = [service.engine.submit(asked)]
        while not service.engine.health().running:
            assert not handles[0].done
        handles.append(service.engine.submit(asked))  # the one that may wait
        full = complete(client)
        for handle in handles:
            handle.cancel()
        assert full.status_code == 429
        assert full.headers["retry-after"]


def test_after_the_engine_died() -> None:
    with served({}) as (client, service):
        service.engine.stepping.step = None
        found = complete(client)
        assert found.status_code == 503
        assert client.get("/health").status_code == 503
        assert complete(client).status_code == 503


def test_usage_of_chunks(client: Any) -> None:
    """None but at the end, as OpenAI has it; or so far with each, as vLLM's clients ask for it."""
    asked = {"stream": True, "n": 2, "prompt": [PROMPT, "One"]}
    whole = complete(client, **asked | {"stream": False}).json()["usage"]
    *chunks, last = events(complete(client, **asked, stream_options={"include_usage": True}))
    assert {c["usage"] for c in chunks} == {None}
    assert {k: last["usage"][k] for k in whole if k != "prompt_tokens_details"} == {
        k: whole[k] for k in whole if k != "prompt_tokens_details"
    }
    options = {"include_usage": True, "continuous_usage_stats": True}
    written = [c["usage"]["completion_tokens"] for c in events(complete(client, **asked, stream_options=options))]
    assert written == sorted(written) and written[0] >= 1 and written[-1] == whole["completion_tokens"] == 32
