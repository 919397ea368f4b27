"""What a fleet is told: one YAML file, checked as recipes are. All defaults stand here.

base: smollm2
adapters: {style: ./style}
adapter_dirs: [./adapters]
replicas: {min: 2, max: 8, queued_tokens: 4000}
replica: {threads: 4, max_rows: 16}
http: {port: 8000}
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from ..errors import ConfigError
from ..inference.config import EngineConfig
from ..serving.settings import Settings
from ..training.schema import Scheme, Section, apply_overrides, described, read_yaml


class Replicas(Section):
    """How many there are. With `max` above `min` their number follows the tokens that are on their way."""

    min: int = Field(default=1, ge=1, description="at least")
    max: int | None = Field(default=None, ge=1, description="at most; left out: as many as `min`, always")
    queued_tokens: int = Field(default=4000, ge=1, description="tokens of prompts and answers on their way, a replica")
    up_after: float = Field(default=5, ge=0, description="seconds of more before another one is started")
    down_after: float = Field(default=120, ge=0, description="seconds of less before one is let go")
    grace: float = Field(default=60, ge=0, description="seconds that what runs on one may take when it is let go")

    @model_validator(mode="after")
    def _ordered(self) -> Replicas:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        return self

    @property
    def most(self) -> int:
        return self.max or self.min


class ReplicaSection(Section):
    """One replica: an engine in a process of its own."""

    threads: int = Field(default=1, ge=1, description="CPU threads; as many CPUs are reserved for it")
    gpus: float = Field(default=0, ge=0, description="GPUs that are reserved for it")
    resources: dict[str, float] = Field(default_factory=dict, description="further resources of Ray's that it needs")
    max_rows: int = Field(default=16, ge=1, description="completions that are written at a time")
    max_adapters: int = Field(default=16, ge=1, description="adapters in memory at a time")
    cache_tokens: int = Field(default=16384, ge=16, description="places of the key-value cache")
    queue: int = Field(default=256, ge=1, description="requests that may wait")
    queue_tokens: int = Field(default=262_144, ge=1, description="tokens of requests that may be there")
    prepack: bool = Field(default=True, description="weights a second time in the processor's own layout, given the memory")

    @property
    def limits(self) -> dict[str, int]:
        """What the router is told (see `Place`)."""
        return {
            "rows": self.max_rows, "room": self.max_adapters, "most": self.max_rows + self.queue,
            "most_tokens": self.queue_tokens,
        }  # fmt: skip

    def engine(self, choices: int) -> EngineConfig:
        """What the engine is told."""
        return EngineConfig(
            max_rows=self.max_rows, max_adapters=self.max_adapters, cache_tokens=self.cache_tokens, max_n=choices,
            max_waiting=self.queue, max_waiting_tokens=self.queue_tokens, prepack=self.prepack,
        )  # fmt: skip


class HttpSection(Section):
    """Where it listens, and what a request may be."""

    host: str = Field(default="127.0.0.1", description="address; 0.0.0.0 for all")
    port: int = Field(default=8000, ge=1, le=65535, description="port")
    ingress: int = Field(default=1, ge=1, description="processes that take requests in")
    api_keys: list[str] = Field(default_factory=list, description="of which requests need one")
    admin_key: str | None = Field(default=None, description="loads and unloads adapters; left out: nobody can")
    max_body: int = Field(default=4 * 2**20, ge=1, description="bytes of a request")
    max_prompt: int | None = Field(default=None, ge=1, description="tokens of a prompt; the base's context")
    max_tokens: int | None = Field(default=None, ge=1, description="tokens of a chat's answer whose request names none")
    max_choices: int = Field(default=16, ge=1, description="completions of a request")
    timeout: float = Field(default=600, gt=0, description="seconds that a request may take")
    log_prompts: bool = Field(default=False, description="write prompts into the log")


class FleetConfig(Section):
    """A whole fleet. `from_yaml` and `from_dict` build it; both collect every error in one ConfigError."""

    base: str = Field(
        default="graftlm-base", description="name, path, GGUF file or hub id; every replica's machine needs it"
    )
    quantization: Scheme = Field(default=None, description="int8, nf4 or fp4")
    name: str | None = Field(default=None, description="what requests call the base; its name")
    adapters: dict[str, str] = Field(default_factory=dict, description="folders by name, tried out at the start")
    adapter_dirs: list[str] = Field(default_factory=list, description="folders of adapters, each read at its first use")
    address: str | None = Field(
        default=None, description="of a Ray cluster: host:port or auto; left out: one is started here"
    )
    replicas: Replicas = Field(default=Replicas(), description="how many")
    replica: ReplicaSection = Field(default=ReplicaSection(), description="what each is")
    http: HttpSection = Field(default=HttpSection(), description="the door")

    @field_validator("replicas", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        return {"min": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @property
    def base_name(self) -> str:
        return self.name or Path(self.base).name.removesuffix(".gguf")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], overrides: Iterable[str] = (), where: str = "fleet") -> FleetConfig:
        """A checked configuration; `overrides` are `key.key=value` texts, their values YAML.

        Raises:
            ConfigError: lists every unknown key (with the nearest name) and every impossible value.
        """
        content = yaml.safe_load(yaml.safe_dump(dict(values)))
        problems, made = apply_overrides(content, overrides), None
        try:
            made = cls.model_validate(content)
        except ValidationError as error:
            problems += [text.replace("value error, ", "") for text in described(cls, error.errors())]
        if made is not None:
            problems += made.conflicts()
        if problems or made is None:
            raise ConfigError(f"{where}: {len(problems)} problem(s)\n" + "\n".join(f"  {p}" for p in problems))
        return made

    @classmethod
    def from_yaml(cls, path: str | os.PathLike, overrides: Iterable[str] = ()) -> FleetConfig:
        """Read a file; relative paths in it are beside it. Errors as in `from_dict`."""
        values = read_yaml(path, ConfigError, "configuration")
        return cls.from_dict(values, overrides, str(path)).beside(Path(path).resolve().parent)

    def beside(self, folder: Path) -> FleetConfig:
        """The same with relative paths made absolute."""

        def whole(path: str) -> str:
            return str((folder / path).resolve()) if path.startswith(".") or (folder / path).exists() else path

        return self.model_copy(
            update={
                "base": whole(self.base),
                "adapters": {name: str(folder / Path(p).expanduser()) for name, p in self.adapters.items()},
                "adapter_dirs": [str(folder / Path(p).expanduser()) for p in self.adapter_dirs],
            }
        )

    def conflicts(self) -> list[str]:
        """Entries that do not go together."""
        found = []
        for name in self.adapters:
            if name == self.base_name or "+" in name or not name:
                found.append(f"adapters.{name}: an adapter cannot have the base's name, or a '+' in its own")
        if len(self.adapters) > self.replica.max_adapters:
            found.append(f"adapters: {len(self.adapters)} for replica.max_adapters {self.replica.max_adapters}; raise that")
        if "" in self.http.api_keys or self.http.admin_key == "":
            found.append("http: an empty key; expected one that nobody guesses, or none at all")
        return found

    def settings(self) -> Settings:
        """The door's."""
        h = self.http
        return Settings(
            base_name=self.base_name, api_keys=frozenset(h.api_keys), admin_key=h.admin_key, max_body=h.max_body,
            max_prompt=h.max_prompt, max_tokens=h.max_tokens, max_choices=h.max_choices, timeout=h.timeout,
            log_prompts=h.log_prompts, queue_requests=self.replica.queue, queue_tokens=self.replica.queue_tokens,
        )  # fmt: skip

    @property
    def computes(self) -> dict[str, Any]:
        """What a replica is made of: those that were made of something else are replaced."""
        return self.model_dump(include={"base", "quantization", "replica"}) | {"choices": self.http.max_choices}
