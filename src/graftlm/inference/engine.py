"""The engine of a server: requests of any adapters in one batch, each exactly as by itself through `generate`.

    threads of callers    submit ─→ inbox        handle ←─ events
    the engine's thread   inbox → adapters made ready → scheduler → one step of the model → tokens chosen → events

One thread owns the model, the cache and the scheduler; all else talks to it through the inbox. What goes wrong with one
request (its adapter, its numbers, its form) ends that request; if the thread itself dies, every request gets an error.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ..architectures.prepacked import prepacked_if_free
from ..errors import GraftError, QueueFullError, RequestError, ServingError, UnsupportedError
from ..passes.facts import decoder_config
from ..passes.served import Served
from .config import EngineConfig
from .errands import Errand, embedded
from .handle import Handle
from .health import Health
from .jobs import Job
from .pace import Pace
from .registry import Registry, Version
from .requests import Request
from .scheduler import Scheduler
from .space import Space
from .starts import Starts
from .stepping import Stepping

log = logging.getLogger("graftlm.serving")


class Engine:
    """Serves requests on one model.

    Args:
        model: a `PeftModel`; what is attached to it is served by its names.
        tokenizer: for texts, stop texts and forms; without one there are token ids only.
        clock: of deadlines; one that never goes back.

    Raises:
        UnsupportedError: a base that cannot be served step by step.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        config: EngineConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.config = config or EngineConfig()
        self.clock = clock
        space = Space(self.config.cache_tokens)
        kept = self.config.kept_tokens
        self.limit = self._limit(space)
        self.starts = Starts(space.capacity // 2 if kept is None else kept)
        self.registry = Registry(model, self.config.max_adapters, self.wake, self._gone)
        self.served = Served(model)
        self.scheduler, self.stepping = self._parts(space)
        self._inbox: deque[Callable[[], None]] = deque()
        self._pending: list[Job] = []  # their adapters are not ready
        self._errands: list[Errand] = []
        self._jobs: set[Job] = set()
        self._waiting = self._waiting_tokens = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = self._draining = self._news = False
        self._beat = clock()
        self.error: BaseException | None = None

    def _parts(self, space: Space) -> tuple[Scheduler, Stepping]:
        """Who decides what goes through the model next, and who does it."""
        self.served.refuse()
        pace = Pace(self.config.step_tokens)
        scheduler = Scheduler(space, self.config.max_rows, self.config.step_tokens, chunk=pace.tokens)
        parts = self.served, scheduler, self.starts, self.registry, self.tokenizer, self.limit
        return scheduler, Stepping(self, *parts, pace=pace)

    def _limit(self, space: Space) -> int:
        """Tokens that a row may have at most."""
        facts, config = self.model.entry.facts, decoder_config(self.model.base)
        room = None if facts.room is None else facts.room - facts.offset
        own = getattr(config, "max_position_embeddings", None)
        known = [n for n in (room, own, self.config.max_length) if isinstance(n, int) and n > 0]
        return min([space.largest, *known])

    # -- callers ---------------------------------------------------------------------------------------------------------
    def start(self) -> Engine:
        """Begin to serve, in a thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="graftlm-engine", daemon=True)
            self._thread.start()
        return self

    def __enter__(self) -> Engine:
        return self.start()

    def __exit__(self, *exc: Any) -> None:
        self.close(drain=exc[0] is None)

    def submit(self, request: Request) -> Handle:
        """Take a request on.

        Raises:
            UnknownAdapterError: no such adapter.
            RequestError, ConfigError, UnsupportedError: it cannot be served as it is.
            QueueFullError: too much waits already.
            ServingError: the engine does not run.
        """
        self._check(request)
        versions = self.registry.resolve(request.adapter)
        handle = Handle(request, self._cancel, lambda: self.alive)
        deadline = None if request.timeout is None else self.clock() + request.timeout
        constraints = self.stepping.constraints_of(request)  # compiled here, where it holds nobody else back
        job = Job(handle=handle, versions=versions, deadline=deadline, constraints=constraints)
        with self._changed:
            if not self.alive or self._draining:
                raise ServingError(f"The engine does not run{'' if self.error is None else f': {self.error!r}'}.")
            tokens = self._waiting_tokens + len(request.prompt)
            if self._waiting >= self.config.max_waiting or (self._waiting and tokens > self.config.max_waiting_tokens):
                raise QueueFullError(
                    f"{self._waiting} requests wait with prompts of {self._waiting_tokens} tokens; at most "
                    f"{self.config.max_waiting} and {self.config.max_waiting_tokens} may. Try again later."
                )
            self._waiting += 1
            self._waiting_tokens = tokens
            self._jobs.add(job)
        self._do(lambda: self._pending.append(job))
        return handle

    def embed(
        self, adapter: str, rows: Sequence[Sequence[int]], pooling: str = "mean", timeout: float | None = None
    ) -> Future:
        """Vectors of token ids, as a future; see `errands.embedded`.

        Raises:
            UnknownAdapterError: no such adapter.
            ServingError: the engine does not run.
        """
        versions = self.registry.resolve(adapter)
        if not self.alive or self._draining:
            raise ServingError("The engine does not run.")
        deadline = None if timeout is None else self.clock() + timeout
        errand = Errand(versions=versions, what=lambda group: embedded(self.model, group, rows, pooling), deadline=deadline)
        self._do(lambda: self._errands.append(errand))
        return errand.done

    def ready(self, adapter: str) -> Future:
        """Have an adapter (a composition, "" for the base) attached and tried out, as its first request would; a future."""
        versions = self.registry.resolve(adapter)
        errand = Errand(versions=versions, what=lambda group: self.stepping.composition(versions))
        self._do(lambda: self._errands.append(errand))
        return errand.done

    def load(self, name: str, path: str | Path, pinned: bool = False) -> Future:
        """Attach an adapter's directory under a name, in place of what has the name now; see `Registry.load`."""
        return self.registry.load(name, path, pinned)

    def unload(self, name: str) -> None:
        """Forget a name; requests on it finish."""
        self.registry.unload(name)

    @property
    def alive(self) -> bool:
        """Whether it runs, or will when it is started: until then requests wait."""
        running = self._thread is None or self._thread.is_alive()
        return running and self.error is None and not self._stopping

    @property
    def stopping(self) -> bool:
        """Whether it is to end at once."""
        return self._stopping

    def health(self) -> Health:
        """How it does, at any time and from any thread."""
        space, rows = self.scheduler.space, len(self.scheduler.rows)
        with self._changed:
            jobs = list(self._jobs)
        return Health(
            alive=self.alive, error=None if self.error is None else repr(self.error),
            silent=max(0.0, self.clock() - self._beat) if jobs else 0.0, waiting=self._waiting, running=rows,
            cache_usage=1 - space.free / space.capacity, adapters=tuple(self.registry.names),
            running_adapters=_names([v for job in jobs if job.started for v in job.versions]),
            waiting_adapters=_names([v for job in jobs if not job.started for v in job.versions]),
        )  # fmt: skip

    def close(self, drain: bool = False, timeout: float | None = None) -> None:
        """Stop: after all requests have ended (`drain`), or at once, with an error for each."""
        self._draining = True
        if drain and self._thread is not None:
            until = None if timeout is None else time.monotonic() + timeout
            with self._changed:
                while self._jobs and self.alive and (until is None or time.monotonic() < until):
                    self._changed.wait(0.2)
        self._stopping = True
        self.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        self.registry.close()
        self._fail_all(ServingError("The engine was stopped."))

    def wake(self) -> None:
        """There may be something to do."""
        with self._changed:
            self._news = True
            self._changed.notify_all()

    def _check(self, request: Request) -> None:
        p, vocabulary = request.params, self.stepping.vocabulary
        if not 1 <= request.n <= self.config.max_n:
            raise RequestError(f"n={request.n}: expected 1 to {self.config.max_n}.")
        if not request.prompt:
            raise RequestError("An empty prompt: expected one token at least.")
        wrong = [
            t for t in (*request.prompt, *p.logit_bias, *p.stop_ids) if not isinstance(t, int) or not 0 <= t < vocabulary
        ]
        if wrong:
            raise RequestError(f"Token ids {wrong[:5]}: expected 0 to {vocabulary - 1}.")
        self.check_length(request)
        if self.tokenizer is None and (p.stop or p.formatted):
            raise UnsupportedError("Stop texts and response_format need the engine to have a tokenizer.")

    def room(self, prompt: int, front: int = 0) -> int:
        """Tokens that may be written behind a prompt of so many, and so many places in front of it."""
        return self.limit - front - prompt

    def check_length(self, request: Request, front: int = 0) -> None:
        """RequestError where prompt and completion are too long."""
        prompt, new = len(request.prompt), request.params.max_new_tokens
        if new > self.room(prompt, front):
            before = f", {front} places of {request.adapter!r} in front of it" if front else ""
            raise RequestError(
                f"A prompt of {prompt} tokens{before} and max_new_tokens={new} are {front + prompt + new} together; this "
                f"server has room for {self.limit} a request. Shorten the prompt, or ask for fewer tokens."
            )

    def _do(self, what: Callable[[], None]) -> None:
        self._inbox.append(what)
        self.wake()

    def _cancel(self, handle: Handle) -> None:
        self._do(lambda: self._end_job(handle, "cancelled"))

    # -- the engine's thread ---------------------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            packing: AbstractContextManager = prepacked_if_free(self.model, 1) if self.config.prepack else nullcontext()
            with torch.no_grad(), packing:
                while not self._stopping:
                    if not self.work():
                        self._rest()
        except BaseException as error:  # whatever it is, nobody may wait for what will not come
            log.exception("The engine died")
            self.error = error
        finally:
            self._fail_all(ServingError("The engine was stopped." if self.error is None else f"It died: {self.error!r}"))

    def _rest(self) -> None:
        """Wait until something comes, or the next deadline."""
        deadlines = [job.deadline for job in self._pending if job.deadline is not None]
        wait = min([1.0, *(max(0.0, d - self.clock()) for d in deadlines)])
        with self._changed:
            if not self._news:
                self._changed.wait(wait)

    def work(self) -> bool:
        """Whatever there is to do, one step at most. False where there is nothing."""
        self.listen()
        self.registry.tend()
        for job in list(self._pending):
            self._admit(job)
        for errand in list(self._errands):
            self._run_errand(errand)
        if not self.scheduler.busy:
            return False
        self.stepping.step(self.clock())
        return True

    def listen(self) -> None:
        """Take what callers have said."""
        self._beat, self._news = self.clock(), False
        while self._inbox:
            self._inbox.popleft()()

    def _admit(self, job: Job) -> None:
        """Let a request in whose adapters are ready."""
        try:
            if job.deadline is not None and job.deadline <= self.clock():
                self._end_job(job.handle, "timeout")
                return
            if any(v.retired and v not in self.registry.live for v in job.versions):  # gone before it began
                job.versions = self.registry.resolve(job.handle.request.adapter)
            if not self.registry.prepare(job.versions):
                return
            self.stepping.begin(job)
        except GraftError as error:
            self.drop(job, error)
        except Exception as error:
            log.exception("A request could not begin")
            self.drop(job, ServingError(f"The request could not begin: {error!r}"))
        else:
            self._pending.remove(job)

    def _run_errand(self, errand: Errand) -> None:
        """Do what is asked, if its adapters are ready."""
        try:
            if errand.deadline is not None and errand.deadline <= self.clock():
                raise ServingError("It took longer than it may.")
            if not self.registry.prepare(errand.versions):
                return
            found = errand.what(tuple(v.attached for v in errand.versions))
        except Exception as error:  # whatever it is, it is the asker's
            self._errands.remove(errand)
            if errand.done.set_running_or_notify_cancel():  # who asked may have left
                errand.done.set_exception(error)
        else:
            self._errands.remove(errand)
            if errand.done.set_running_or_notify_cancel():
                errand.done.set_result(found)

    def _end_job(self, handle: Handle, finish: str) -> None:
        job = next((j for j in self._jobs if j.handle is handle), None)
        if job is None:
            return
        for writing in list(job.writings):
            self.stepping.end(writing, finish)
        if job in self._pending:
            for index in range(handle.request.n):
                job.put({"index": index, "finish": finish})
            self.settle(job)

    # -- what the steps say ----------------------------------------------------------------------------------------------
    def started(self, job: Job) -> None:
        """A request waits no more."""
        if not job.started:
            job.started, job.handle.begun = True, time.monotonic()
            with self._changed:
                self._waiting -= 1
                self._waiting_tokens -= len(job.handle.request.prompt)

    def settle(self, job: Job) -> None:
        """A request is over."""
        self.started(job)
        if job in self._pending:
            self._pending.remove(job)
        if job.composition is not None:
            self.registry.give(job.versions)
        with self._changed:
            self._jobs.discard(job)
            self._changed.notify_all()

    def drop(self, job: Job, error: Exception) -> None:
        """A request failed."""
        for writing in list(job.writings):
            self.stepping.remove(writing)
        job.handle.fail(error)
        self.settle(job)

    def _gone(self, version: Version) -> None:
        self.stepping.forget(version)

    def _fail_all(self, error: Exception) -> None:
        with self._changed:
            jobs, self._jobs = list(self._jobs), set()
            self._inbox.clear()
            self._changed.notify_all()
        for job in jobs:
            job.handle.fail(error)
        errands, self._errands = self._errands, []
        for errand in errands:
            if not errand.done.done():
                errand.done.set_exception(error)


def _names(versions: Iterable[Version]) -> tuple[str, ...]:
    return tuple(sorted({version.name for version in versions}))
