"""An OpenAI-compatible server, asked by the standard library alone: its models, and answers as they come."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import GraftError

if TYPE_CHECKING:
    from ..inference import Sampling

PATIENCE = 600.0  # seconds without a byte


class ServerError(GraftError):
    """A server that cannot be reached, or refuses a request.

    Args:
        code: its own word for what is wrong, such as "context_length_exceeded".
    """

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Server:
    """A server by the address that its clients are given, with or without /v1."""

    url: str
    key: str | None = None

    @property
    def root(self) -> str:
        bare = self.url.rstrip("/")
        bare = bare if bare.startswith(("http://", "https://")) else f"http://{bare}"
        return bare if bare.endswith("/v1") else f"{bare}/v1"

    @contextmanager
    def asked(self, path: str, body: dict[str, Any] | None = None) -> Iterator[Any]:
        """The open answer to a GET, or with a body to a POST; ServerError for any other."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(f"{self.root}/{path}", data, headers)
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                yield answer
        except urllib.error.HTTPError as error:
            raise refusal(self.root, error) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ServerError(
                f"{self.root} does not answer ({reason}). Is the server running, and is --server its URL?"
            ) from error

    def models(self) -> tuple[str, list[str]]:
        """The base's name, and those of the adapters: models that have a parent, or where none has one all but the first."""
        with self.asked("models") as answer:
            try:
                cards = json.loads(answer.read())["data"]
                names = [card["id"] for card in cards]
            except (ValueError, KeyError, TypeError) as error:
                raise ServerError(
                    f"{self.root}/models is no list of models: is {self.url} an OpenAI-compatible server?"
                ) from error
        if not names:
            raise ServerError(f"{self.root} serves no model.")
        base = next((card["id"] for card in cards if not card.get("parent")), names[0])
        return base, [name for name in names if name != base]

    def answer(self, model: str, messages: list[dict[str, str]], sampling: Sampling) -> Generator[str, None, None]:
        """The assistant's next turn in pieces of text. Closing the iterator ends the request."""
        with self.asked("chat/completions", request(model, messages, sampling)) as lines:
            for line in lines:
                field, _, data = line.decode("utf-8").strip().partition(":")
                if field != "data":
                    continue
                if (data := data.strip()) == "[DONE]":
                    return
                event = json.loads(data)
                if wrong := event.get("error"):
                    raise ServerError(str(wrong.get("message", wrong)), wrong.get("code"))
                for choice in event.get("choices", ()):
                    if piece := (choice.get("delta") or {}).get("content"):
                        yield piece
        raise ServerError(f"{self.root} broke off in the middle of an answer.")


def request(model: str, messages: list[dict[str, str]], sampling: Sampling) -> dict[str, Any]:
    """The body. `repetition_penalty` is no field of OpenAI's: it is sent where it does something."""
    body: dict[str, Any] = {
        "model": model, "messages": messages, "stream": True, "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
    }  # fmt: skip
    if sampling.repetition_penalty != 1:
        body["repetition_penalty"] = sampling.repetition_penalty
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    return body


def refusal(root: str, error: urllib.error.HTTPError) -> ServerError:
    """What a server says of a request that it refuses."""
    text = error.read().decode("utf-8", "replace")
    try:
        told = json.loads(text)
        told = told.get("error", told)
        message, code = (told.get("message") or text, told.get("code")) if isinstance(told, dict) else (str(told), None)
    except (ValueError, AttributeError):
        message, code = text.strip()[:300], None
    hint = " Pass --api-key." if error.code == 401 else ""
    return ServerError(f"{root} answers {error.code}: {message or error.reason}{hint}", code)
