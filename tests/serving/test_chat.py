"""`graftlm chat --server`: the conversation of the command line with a server that runs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="the test client of fastapi needs httpx")

from serving_helpers import saved, tiny, tokenizer  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from graftlm.cli import app  # noqa: E402
from graftlm.cli._server import Server, ServerError, request  # noqa: E402
from graftlm.inference import Sampling  # noqa: E402
from graftlm.serving.app import create_app  # noqa: E402
from graftlm.serving.settings import Settings  # noqa: E402
from graftlm.serving.start import service_of  # noqa: E402

KEY = "secret"
QUIET = ("--temperature", "0", "--repetition-penalty", "1", "--max-new-tokens", "6")


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folders = saved(tmp_path_factory.mktemp("adapters"), ("style", "task"))
    settings = Settings(base_name="tiny", adapters=folders, api_keys=frozenset({KEY}))
    service = service_of(tiny(), tokenizer(), settings)
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < until
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


def talk(url: str, *lines: str, key: str | None = KEY, more: tuple[str, ...] = QUIET) -> Any:
    keys = () if key is None else ("--api-key", key)
    return CliRunner().invoke(app, ["chat", "--server", url, *keys, *more], input="\n".join(lines) + "\n")


def said(url: str, model: str, *turns: str, **more: Any) -> str:
    """What the server says to a conversation, asked for at once."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 6, "seed": 0} | more
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {KEY}"})
    return str(answer.json()["choices"][0]["message"]["content"]).strip()


def test_a_conversation_whose_adapters_change(url: str) -> None:
    result = talk(
        url, "Hi there", "/adapter style", "And now", "/adapter style+task", "/base", "/reset", "Once more", "/quit"
    )
    assert result.exit_code == 0, result.output
    first = said(url, "tiny", "Hi there")
    second = said(url, "style", "Hi there", first, "And now")
    assert result.stdout == "".join(f"{text}\n" for text in (first, second, said(url, "tiny", "Once more")))
    told = result.stderr
    assert "Adapters: style, task. Answering: tiny." in told
    assert "Answering: style." in told and "Answering: style + task." in told and told.count("Answering: tiny.") == 2


def test_a_system_text_and_a_composition(url: str) -> None:
    result = talk(url, "/system Be kind.", "/adapter task+style", "Hi", "/adapter styl", "/adapter")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert result.stdout.strip() == said(url, "task+style", messages=messages)
    assert "There is no adapter 'styl', did you mean 'style'" in " ".join(result.stderr.split()).replace(";", ",")
    assert result.stderr.count("Answering: task + style.") == 3


def test_what_the_server_refuses(url: str) -> None:
    for key in (None, "wrong"):
        result = talk(url, "Hi", key=key)
        assert result.exit_code == 2 and "401" in result.stderr and "--api-key" in result.stderr
    result = talk(url, "Hi", "/reset", "Hello", more=("--max-new-tokens", "600"))
    assert result.exit_code == 0 and result.stdout == "" and "This turn is forgotten" in result.stderr
    result = CliRunner().invoke(app, ["chat", "--server", url, "--base", "smollm2"])
    assert result.exit_code == 2 and "leave out --base" in result.stderr
    assert talk("http://127.0.0.1:9", "Hi").exit_code == 2


def test_what_is_sent(url: str) -> None:
    sampling = Sampling(max_new_tokens=3, temperature=0.5, top_p=0.9, repetition_penalty=1.1, seed=4, stop=("x",))
    body = request("m", [], sampling)
    assert (body["max_tokens"], body["temperature"], body["top_p"], body["seed"], body["stop"]) == (3, 0.5, 0.9, 4, ["x"])
    assert body["repetition_penalty"] == 1.1 and body["stream"] is True
    assert "repetition_penalty" not in request("m", [], Sampling(max_new_tokens=3, repetition_penalty=1.0))
    root = url + "/v1"
    assert all(Server(u).root == root for u in (url, url + "/", root, root + "/", url.removeprefix("http://")))


@contextmanager
def other(answers: list[Any]) -> Iterator[tuple[str, list[Any]]]:
    """A server of another make: it lists models without parents, and answers with what it is given, in turn."""
    asked: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, json.dumps({"data": [{"id": "org/one"}, {"id": "a+b"}]}))

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.reply(*answers.pop(0))

        def reply(self, status: int, text: str) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def streamed(*pieces: str, done: bool = True) -> tuple[int, str]:
    events = [json.dumps({"choices": [{"delta": {"role": "assistant"}}]})]
    events += [json.dumps({"choices": [{"delta": {"content": p}}]}, ensure_ascii=False) for p in pieces]
    events += [json.dumps({"choices": [], "usage": {}})] + ["[DONE]"] * done
    return 200, ": a comment\n\n" + "".join(f"data: {e}\n\n" for e in events)


def test_another_make_of_server() -> None:
    too_long = (400, json.dumps({"error": {"message": "too long", "code": "context_length_exceeded"}}))
    answers = [
        streamed("你", "好 "),
        streamed("b"),
        too_long,
        streamed("c"),
        streamed("d", done=False),
        (500, "<html>no</html>"),
    ]
    with other(answers) as (url, asked):
        result = talk(url, "1", "/adapter a+b", "2", "3", "4", "5")
    assert result.exit_code == 0 and result.stdout == "你好\nb\nc\n"
    assert [a["model"] for a in asked] == ["org/one"] + ["a+b"] * 5
    assert [m["content"] for m in asked[2]["messages"]] == ["1", "你好", "2", "b", "3"]
    assert [m["content"] for m in asked[3]["messages"]] == ["2", "b", "3"]
    assert [m["content"] for m in asked[5]["messages"]] == ["2", "b", "3", "c", "5"]  # the turn that broke off is forgotten
    told = " ".join(result.stderr.split())
    assert "its oldest turn is forgotten" in told and "broke off" in told and "500: <html>no</html>" in told


def test_errors_in_the_middle_of_an_answer() -> None:
    event = 'data: {"error": {"message": "it broke", "code": "engine_failed"}}\n\n'
    with other([(200, event)]) as (url, _), pytest.raises(ServerError, match="it broke") as told:
        list(Server(url).answer("m", [], Sampling()))
    assert told.value.code == "engine_failed"


def test_ctrl_c_ends_the_request(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The connection is closed, and the turn is not kept."""
    from graftlm.cli import chat

    closed: list[bool] = []

    class Slow(Server):
        def answer(self, *_: Any) -> Iterator[str]:
            try:
                yield "a"
                raise KeyboardInterrupt
            finally:
                closed.append(True)

    session = chat.Session(None, None, Sampling(), [], server=Slow(url), base="tiny")
    chat.answer(session, "Hi")
    assert closed == [True] and session.turns == []
