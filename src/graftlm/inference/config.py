"""How much an engine takes on."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How much an engine takes on.

    Args:
        max_rows: completions in the batch at a time.
        cache_tokens: places of the key-value cache.
        kept_tokens: places beside it for shared starts; None: half as many.
        step_tokens: tokens of a step at most; beside rows that decode, prompts' chunks are sized by time (see `pace`).
        max_length: of prompt and completion together; None: what the base and the cache allow.
        max_waiting, max_waiting_tokens: requests that may wait, and their prompts' tokens.
        max_n: completions of one request.
        max_adapters: adapters that are attached at a time, those aside that the model had before.
        prepack: keep the base's weights a second time in the processor's own layout, where the memory is there.
    """

    max_rows: int = 32
    cache_tokens: int = 16384
    kept_tokens: int | None = None
    step_tokens: int = 512
    max_length: int | None = None
    max_waiting: int = 256
    max_waiting_tokens: int = 1 << 20
    max_n: int = 16
    max_adapters: int = 8
    prepack: bool = True

    def __post_init__(self) -> None:
        for name in (
            "max_rows",
            "cache_tokens",
            "step_tokens",
            "max_waiting",
            "max_waiting_tokens",
            "max_n",
            "max_adapters",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 or above.")
        if self.cache_tokens < 16:
            raise ConfigError(f"cache_tokens={self.cache_tokens}: expected 16 or above.")
