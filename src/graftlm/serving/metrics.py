"""Measures for Prometheus: under vLLM's names where dashboards and autoscalers read those, ours beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHORT = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56)


@dataclass(frozen=True)
class Load:
    """What an engine holds at this moment."""

    running: int
    waiting: int
    cache_used: float
    max_adapters: int
    running_adapters: tuple[str, ...]
    waiting_adapters: tuple[str, ...]
    counts: dict[str, int]  # adapters loaded, failed and evicted since the start


class Metrics:
    """All measures of one server.

    Args:
        model: the base's name.
        load: tells the engine's state when it is asked for.
    """

    def __init__(self, model: str, load: Callable[[], Load]) -> None:
        self.registry = CollectorRegistry()
        self.load = load
        self._model = model
        named: dict[str, Any] = {"registry": self.registry}
        of = ["model_name"]
        self._running = Gauge("vllm:num_requests_running", "Requests in the batch", of, **named)
        self._waiting = Gauge("vllm:num_requests_waiting", "Requests that wait", of, **named)
        self._cache = Gauge("vllm:kv_cache_usage_perc", "Share of the cache that is used (1 is all)", of, **named)
        adapters = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        self._adapters = Gauge("vllm:lora_requests_info", "Adapters of requests; the value is a time", adapters, **named)
        self.first = Histogram("vllm:time_to_first_token_seconds", "To the first token", of, buckets=SECONDS, **named)
        self.between = Histogram("vllm:inter_token_latency_seconds", "Between tokens", of, buckets=SHORT, **named)
        self.queue = Histogram("vllm:request_queue_time_seconds", "Before the first step", of, buckets=SECONDS, **named)
        self.whole = Histogram("vllm:e2e_request_latency_seconds", "Of a whole request", of, buckets=SECONDS, **named)
        self.prompts = Counter("vllm:prompt_tokens", "Tokens of prompts", of, **named)
        self.written = Counter("vllm:generation_tokens", "Tokens that were written", of, **named)
        self.by_adapter = Counter("graftlm_tokens", "Tokens by adapter", ["adapter", "kind"], **named)
        self.cached = Counter("graftlm_prefix_cache_hit_tokens", "Tokens of prompts that were in the cache", **named)
        self.requests = Counter("graftlm_requests", "Requests by how they ended", ["endpoint", "status"], **named)
        self._loads = Counter("graftlm_adapter_loads", "Adapters read from disk", ["outcome"], **named)
        self._evictions = Counter("graftlm_adapter_evictions", "Adapters put out to make room", **named)
        self._counted = dict.fromkeys(("loaded", "failed", "evicted"), 0)

    def of(self, measure: Any) -> Any:
        """A measure of this base."""
        return measure.labels(self._model)

    def text(self) -> bytes:
        """All measures as Prometheus reads them."""
        load = self.load()
        self.of(self._running).set(load.running)
        self.of(self._waiting).set(load.waiting)
        self.of(self._cache).set(load.cache_used)
        self._adapters.clear()
        names = (",".join(load.running_adapters), ",".join(load.waiting_adapters))
        self._adapters.labels(str(load.max_adapters), *names).set_to_current_time()
        for name, before in self._counted.items():
            counter = self._evictions if name == "evicted" else self._loads.labels(name)
            counter.inc(load.counts[name] - before)
        self._counted = load.counts
        return generate_latest(self.registry)
