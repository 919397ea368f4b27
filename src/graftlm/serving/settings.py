"""What a server may be told at its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits and doors of a server.

    Args:
        base_name: what requests call the base.
        adapters: directories by name, served from the start.
        adapter_dirs: folders below which adapters may be loaded from while it runs; each folder in them that holds an
            adapter is served under its name, loaded at its first use.
        api_keys: of these, requests need one; none: they need none.
        admin_key: what adapters are loaded and unloaded with; None: they cannot be.
        max_body: bytes of a request.
        max_prompt: tokens of a prompt; None: the base's context.
        max_tokens: of a chat's answer whose request names no number; None: what the base's context has room for.
        max_choices: `n` at most.
        queue_requests, queue_tokens: what may wait.
        timeout: seconds that a request may take.
        log_prompts: whether logs hold what was said.
    """

    base_name: str
    adapters: Mapping[str, str] = field(default_factory=dict)
    adapter_dirs: Sequence[Path] = ()
    api_keys: frozenset[str] = frozenset()
    admin_key: str | None = None
    max_body: int = 4 * 2**20
    max_prompt: int | None = None
    max_tokens: int | None = None
    max_choices: int = 16
    queue_requests: int = 256
    queue_tokens: int = 262_144
    timeout: float = 600.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        for name in ("max_body", "max_prompt", "max_tokens", "max_choices", "queue_requests", "queue_tokens", "timeout"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"{name}={value!r}: expected above 0.")
        if "" in self.api_keys or self.admin_key == "":
            raise ConfigError("An empty key: expected one that nobody guesses, or none at all.")
        for folder in self.adapter_dirs:
            if not folder.is_dir():
                raise ConfigError(f"--adapter-dir {folder}: expected a folder that holds adapters.")
        taken = [name for name in self.adapters if name == self.base_name or "+" in name]
        if taken:
            raise ConfigError(f"An adapter cannot be called {taken[0]!r}: that is the base's name, or holds a '+'.")
