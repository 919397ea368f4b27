"""What the server does for a request, without HTTP: names, limits, prompts, adapters, measures, logs.

The engine does the rest (see `inference`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import GraftError, nearest
from ..inference.engine import Engine
from ..inference.errands import at_once
from ..inference.requests import Request, SamplingParams
from .adapters import Adapters
from .answers import Token
from .errors import RETRY_AFTER, ApiError, of
from .metrics import Load, Metrics
from .prompts import Prompts
from .running import Running, Wanted
from .schema import (
    MOST_INPUTS,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Generation,
    LoadRequest,
    NamedTool,
    TokenizeRequest,
)
from .settings import Settings
from .spelling import Spelling
from .tools import call_schema

logger = logging.getLogger("graftlm.serving")
COMPLETION = 16  # tokens of a completion whose request names no number, as OpenAI has it
SILENCE = 120  # seconds of one step after which the engine counts as stuck


class Service:
    """An engine behind names and limits.

    Args:
        engine: made, not started.
        tokenizer: the base's.
    """

    def __init__(self, engine: Engine, tokenizer: Any, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.adapters = Adapters(engine.registry, tuple(settings.adapter_dirs), settings.base_name)
        self.begin_with(tokenizer, engine.stepping.vocabulary, engine.limit)

    def begin_with(self, tokenizer: Any, vocabulary: int, context: int) -> None:
        """What a base decides."""
        self.vocabulary, self.context = vocabulary, context
        self.prompts = Prompts(tokenizer, self.vocabulary)
        self.spelling = Spelling(tokenizer)
        self.metrics = Metrics(self.settings.base_name, self.load_now)
        self.draining = False
        self.since = int(time.time())

    # -- its life ----------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Run the engine."""
        self.engine.start()

    def stop(self) -> None:
        """End the engine; what still waits gets an error."""
        self.draining = True
        self.engine.close()

    @property
    def wrong(self) -> str | None:
        """Why nothing is served any more."""
        health = self.engine.health()
        if health.alive and health.silent < SILENCE:
            return None
        return health.error or (f"the engine has been silent for {health.silent:.0f} s" if health.alive else "stopped")

    def load_now(self) -> Load:
        """What the engine holds."""
        health = self.engine.health()
        return Load(
            running=health.running, waiting=health.waiting, cache_used=health.cache_usage,
            max_adapters=self.engine.registry.most, running_adapters=health.running_adapters,
            waiting_adapters=health.waiting_adapters, counts=dict(self.engine.registry.counts),
        )  # fmt: skip

    @contextlib.contextmanager
    def errors(self, endpoint: str) -> Iterator[None]:
        """Errors of ours as clients are told them; those that nobody foresaw go to the log whole."""
        try:
            yield
        except (GraftError, ApiError) as error:
            told = of(error)
            self.metrics.requests.labels(endpoint, str(told.status)).inc()
            raise told from error
        except Exception as error:
            self.metrics.requests.labels(endpoint, "500").inc()
            logger.exception("a request to %s failed", endpoint)
            raise of(error) from error

    # -- what is asked for -------------------------------------------------------------------------------------------------
    def adapter_of(self, model: str) -> str:
        """The engine's name for a model: "" for the base, names joined by '+' for a composition; 404 for any other."""
        if model == self.settings.base_name:
            return ""
        parts = model.split("+")
        if not self.adapters.knows(parts):
            known = self.adapters.names()
            missing = next(part for part in parts if part not in known)
            raise ApiError(
                404,
                f"There is no model {model!r}{nearest(missing, [self.settings.base_name, *known])} (GET /v1/models has all)",
                param="model", code="model_not_found",
            )  # fmt: skip
        if len(set(parts)) < len(parts):
            raise ApiError(400, f"The composition {model!r} names an adapter twice.", param="model")
        return model

    def of_chat(self, body: ChatRequest) -> Wanted:
        """A conversation, ready for the engine."""
        adapter = self.adapter_of(body.model)
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        shown = [] if body.tool_choice == "none" else tools
        ids = self.prompts.of_chat(body.messages, shown, body.chat_template_kwargs, body.add_generation_prompt)
        most = body.max_completion_tokens or body.max_tokens
        form = self._format(body)
        if body.forced:
            if form is not None:
                raise ApiError(400, "response_format and a tool_choice that forces a call exclude each other")
            name = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else None
            form = {"type": "json_schema", "schema": call_schema(tools, name)}
        probs = (body.top_logprobs or 0) if body.logprobs else None
        return self._wanted("chat", body, adapter, [ids], most, probs, form, body.n or 1)

    def of_completion(self, body: CompletionRequest) -> Wanted:
        """Prompts, ready for the engine."""
        if body.echo and body.logprobs is not None:
            raise ApiError(400, "echo together with logprobs is not served: logprobs are of what is written", param="echo")
        adapter = self.adapter_of(body.model)
        ids = [self.prompts.of_text(prompt) for prompt in body.prompts]
        n = body.best_of or body.n or 1
        probs = body.logprobs if body.logprobs is not None else (0 if n > (body.n or 1) else None)
        return self._wanted("completions", body, adapter, ids, body.max_tokens or COMPLETION, probs, self._format(body), n)

    def _wanted(
        self, endpoint: str, body: Generation, adapter: str, prompts: Sequence[list[int]], most: int | None,
        probs: int | None, form: dict[str, Any] | None, n: int,
    ) -> Wanted:  # fmt: skip
        s, keep = self.settings, body.n or 1
        if n * len(prompts) > s.max_choices:
            raise ApiError(400, f"n={n} for {len(prompts)} prompts is over this server's {s.max_choices} choices", param="n")
        longest = max(len(ids) for ids in prompts)
        limit = s.max_prompt or self.context
        if limit is not None and longest > limit:
            raise ApiError(
                400, f"The prompt has {longest} tokens; this server takes {limit}.", code="context_length_exceeded",
                param="messages" if endpoint == "chat" else "prompt",
            )  # fmt: skip
        bias = body.logit_bias or {}
        if (wrong := next((i for i in bias if not 0 <= i < self.vocabulary), None)) is not None:
            raise ApiError(400, f"logit_bias: {wrong} is no token id (0 to {self.vocabulary - 1})", param="logit_bias")
        if most is None:
            most = min(self.room(adapter, longest), s.max_tokens or self.context)
        params = SamplingParams(
            max_new_tokens=most,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),
            min_p=body.min_p or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            logit_bias=bias,
            seed=time.time_ns() % 2**31 if body.seed is None else body.seed,
            stop=body.stops,
            stop_ids=tuple(body.stop_token_ids or ()),
            ignore_end=body.ignore_eos,
            min_new_tokens=min(body.min_tokens or 0, most),
            logprobs=probs,
            response_format=form,
        )
        made = tuple(tuple(ids) for ids in prompts)
        return Wanted(
            endpoint=endpoint, model=body.model, adapter=adapter, prompts=made, params=params, n=n, keep=keep,
            session=str(body.prompt_cache_key or body.user or ""), streams=bool(body.stream),
        )  # fmt: skip

    def room(self, adapter: str, prompt: int) -> int:
        """Tokens that may follow a prompt of so many."""
        front = sum(self.adapters.about(name).front for name in adapter.split("+") if name)
        return max(1, self.context - front - prompt)

    @property
    def width(self) -> int:
        """Of a hidden state."""
        return int(self.engine.model.get_input_embeddings().weight.shape[1])

    @staticmethod
    def _format(body: Generation) -> dict[str, Any] | None:
        """A response format as the engine takes it."""
        form = body.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "json_schema":
            assert form.json_schema is not None
            return {"type": "json_schema", "schema": form.json_schema.schema_}
        return {"type": "regex", "pattern": form.pattern} if form.type == "regex" else {"type": "json_object"}

    # -- running it --------------------------------------------------------------------------------------------------------
    async def begin(self, wanted: Wanted) -> Running:
        """Give it to the engine."""
        self.refuse_when_draining()
        handles: list[Any] = []
        try:
            for ids in wanted.prompts:
                request = Request(
                    prompt=ids, adapter=wanted.adapter, params=wanted.params, n=wanted.n, timeout=self.settings.timeout,
                    session=wanted.session, streams=wanted.streams,
                )  # fmt: skip
                handles.append(await asyncio.to_thread(self.engine.submit, request))
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return Running(handles, wanted.n, self._token, lambda running, error: self._over(wanted, running, error))

    def refuse_when_draining(self) -> None:
        """503 from the moment on that the server is told to stop."""
        if self.draining:
            raise ApiError(503, "This server is shutting down.", code="shutting_down", retry_after=RETRY_AFTER)

    @property
    def busy(self) -> bool:
        """Whether completions run or wait."""
        health = self.engine.health()
        return health.alive and health.running + health.waiting > 0

    def _token(self, token: int, logprob: float | None) -> Token:
        text, data = self.spelling.of(token)
        return Token(token, text, data, logprob)

    def _over(self, wanted: Wanted, running: Running, error: Exception | None) -> None:
        """A request is over: measures, and a line in the log."""
        m, usage, status = self.metrics, running.usage, 200 if error is None else of(error).status
        name = wanted.model
        if running.times:
            m.of(m.first).observe(running.times[0] - running.begun)
            for begun in (handle.begun for handle in running.handles if handle.begun is not None):
                m.of(m.queue).observe(max(0.0, begun - running.begun))
            for before, after in zip(running.times, running.times[1:], strict=False):
                m.of(m.between).observe(after - before)
        seconds = time.monotonic() - running.begun
        m.of(m.whole).observe(seconds)
        m.of(m.prompts).inc(usage.prompt)
        m.of(m.written).inc(usage.completion)
        m.cached.inc(usage.cached)
        m.by_adapter.labels(name, "prompt").inc(usage.prompt)
        m.by_adapter.labels(name, "completion").inc(usage.completion)
        if status == 200 or running.streams:  # others are counted where they are told
            m.requests.labels(wanted.endpoint, str(status)).inc()
        line = {
            "endpoint": wanted.endpoint, "model": name, "status": status, "seconds": round(seconds, 4),
            "prompt_tokens": usage.prompt, "cached_tokens": usage.cached, "completion_tokens": usage.completion,
        }  # fmt: skip
        if self.settings.log_prompts:
            line["prompts"] = [self.prompts.text(ids) for ids in wanted.prompts]
        logger.info(json.dumps(line, ensure_ascii=False))

    async def embed(self, body: EmbeddingRequest) -> tuple[list[list[float]], int]:
        """Vectors of texts, and how many tokens these had."""
        self.refuse_when_draining()
        adapter = self.adapter_of(body.model)
        if body.dimensions not in (None, self.width):
            raise ApiError(400, f"dimensions={body.dimensions}: this base gives {self.width}", param="dimensions")
        inputs = body.inputs
        if len(inputs) > MOST_INPUTS:
            raise ApiError(400, f"input holds {len(inputs)} texts; at most {MOST_INPUTS} are taken", param="input")
        ids = await asyncio.to_thread(lambda: [self.prompts.of_text(text) for text in inputs])
        limit = self.settings.max_prompt or self.context
        if (longest := max(map(len, ids))) > limit:
            raise ApiError(400, f"An input has {longest} tokens; this server takes {limit}.", code="context_length_exceeded")
        until = time.monotonic() + self.settings.timeout
        vectors: list[list[float]] = []
        while len(vectors) < len(ids):  # part by part, so that completions go on between them
            part = at_once(ids[len(vectors) :])
            left = until - time.monotonic()
            made = self.engine.embed(adapter, part, body.pooling, left)
            vectors += await asyncio.shield(asyncio.wrap_future(made))  # the engine's, whoever leaves
        return vectors, sum(map(len, ids))

    # -- models ------------------------------------------------------------------------------------------------------------
    def models(self) -> list[dict[str, Any]]:
        """The base, and all adapters: loaded ones, and those on disk that have not been used yet."""
        return [self._base(), *(self._adapter(name) for name in self.adapters.names())]

    def model(self, name: str) -> dict[str, Any]:
        """One of them; 404 where there is none."""
        if not self.adapter_of(name):
            return self._base()
        if "+" in name:
            return self._card(name) | {
                "parent": self.settings.base_name,
                "root": self.settings.base_name,
                "kind": "composition",
            }
        return self._adapter(name)

    def _card(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.since, "owned_by": "graftlm", "permission": []}

    def _base(self) -> dict[str, Any]:
        root = self.settings.base_name
        return self._card(root) | {"parent": None, "root": root, "kind": "base", "max_model_len": self.context}

    def _adapter(self, name: str) -> dict[str, Any]:
        about = self.adapters.about(name)
        return self._card(name) | {
            "parent": self.settings.base_name, "root": about.folder, "kind": about.kind, "digest": about.digest,
            "loaded": about.loaded, "pinned": about.pinned, "max_model_len": self.context,
        }  # fmt: skip

    def tokenize(self, body: TokenizeRequest) -> dict[str, Any]:
        """Ids of a text or a conversation."""
        if body.model is not None:
            self.adapter_of(body.model)
        if body.messages is not None:
            tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
            ids = self.prompts.of_chat(body.messages, tools, None, body.add_generation_prompt)
        else:
            ids = list(self.prompts.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens)["input_ids"])
        made: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": self.context}
        if body.return_token_strs:
            made["token_strs"] = [self.spelling.of(i)[0] for i in ids]
        return made

    # -- adapters come and go ----------------------------------------------------------------------------------------------
    async def load(self, body: LoadRequest) -> None:
        """Serve an adapter from a folder, under a name."""
        self.check_name(body.lora_name)
        folder = self.allowed(body.lora_path)
        if body.lora_name in self.adapters.names() and not body.load_inplace:
            raise ApiError(
                400, f"The adapter {body.lora_name!r} is served already; load_inplace: true puts this one in its place.",
                param="lora_name",
            )  # fmt: skip
        await asyncio.shield(asyncio.wrap_future(self.engine.load(body.lora_name, folder, body.pinned)))
        self.adapters.loaded(body.lora_name)

    def check_name(self, name: str) -> None:
        """400 for a name that no adapter may have: the base's, and what is read as a composition."""
        if name == self.settings.base_name or "+" in name:
            raise ApiError(400, f"An adapter cannot be called {name!r}.", param="lora_name")

    def allowed(self, path: str) -> Path:
        """A folder below one of those that adapters may come from, links followed; 403 for any other."""
        try:
            found = Path(path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            found = None
        roots = [root.resolve() for root in self.settings.adapter_dirs]
        if found is None or not any(found.is_relative_to(root) for root in roots):
            raise ApiError(403, "lora_path is no folder below an --adapter-dir of this server.", param="lora_path")
        return found

    async def unload(self, name: str) -> None:
        """Serve it no more; what runs on it ends on it."""
        if name not in self.adapters.names():
            known = self.adapters.names()
            raise ApiError(
                404, f"There is no adapter {name!r}{nearest(name, known)}", param="lora_name", code="model_not_found"
            )
        self.engine.unload(name)
        self.adapters.unloaded(name)
