"""`graftlm serve`: an OpenAI-compatible server of one base and any number of adapters of any kind."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigError
from . import _base

EXTRA = "pip install 'graftlm[serve]'"


def serve(
    base: _base.BaseOption = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", "-a", help="NAME=DIRECTORY, or DIRECTORY. May be repeated.")
    ] = None,
    adapter_dir: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of adapters: each is served by its folder's name, read at its first use. May be repeated."
        ),
    ] = None,
    quantization: _base.QuantizationOption = None,
    name: Annotated[str | None, typer.Option(help="What requests call the base. Default: its name.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(envvar="GRAFTLM_API_KEY", help="Key that requests need. May be repeated.")
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(envvar="GRAFTLM_ADMIN_KEY", help="Key that loads and unloads adapters; without: nobody can."),
    ] = None,
    max_adapters: Annotated[int, typer.Option(help="Adapters in memory at a time; the others wait on disk.")] = 16,
    max_rows: Annotated[int, typer.Option(help="Completions that are written at a time.")] = 32,
    cache_tokens: Annotated[int | None, typer.Option(help="Places of the key-value cache. Default: 16384.")] = None,
    max_prompt: Annotated[int | None, typer.Option(help="Tokens of a prompt. Default: the base's context.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of a chat's answer whose request names no number. Default: what there is room for."),
    ] = None,
    max_choices: Annotated[int, typer.Option(help="Completions of one request.")] = 16,
    queue: Annotated[int, typer.Option(help="Requests that may wait.")] = 256,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.")] = 600.0,
    log_prompts: Annotated[bool, typer.Option(help="Write prompts into the log.")] = False,
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Engines in processes of their own, behind one door. Needs Ray.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="With --replicas: threads of each. Default: its share.")] = None,
) -> None:
    """Serve a base and its adapters over HTTP, as OpenAI's API; requests of all adapters go through the base together.

    A request names its adapter as `model`, several as `a+b`, the base by its own name. Stop with Ctrl-C or SIGTERM: what
    runs may end first.
    """
    try:
        from ..inference.threads import apart
        from ..serving.run import run
        from ..serving.settings import Settings
        from ..serving.start import service_of
    except ImportError as error:
        raise ConfigError(f"The server needs more packages ({error.name}): {EXTRA}") from error
    adapters = _base.named_adapters(adapter)
    chosen = _base.base_for(base, adapters)
    if replicas is not None:
        own = {"max_adapters": max_adapters, "max_rows": max_rows, "cache_tokens": cache_tokens, "queue": queue}
        own["threads"] = threads or max(1, (os.cpu_count() or 1) // replicas)
        door = {
            "host": host, "port": port, "api_keys": api_key or [], "admin_key": admin_key, "max_prompt": max_prompt,
            "max_tokens": max_tokens, "max_choices": max_choices, "timeout": timeout, "log_prompts": log_prompts,
        }  # fmt: skip
        values = {
            "base": chosen, "quantization": quantization, "name": name, "adapters": adapters, "replicas": replicas,
            "adapter_dirs": [str(folder) for folder in adapter_dir or ()], "http": door,
            "replica": {key: value for key, value in own.items() if value is not None},
        }  # fmt: skip
        start, kind = fleet_parts()
        start.deploy(kind.from_dict(values).beside(Path.cwd()), lambda text: typer.echo(text, err=True))
        return
    if threads is not None:
        raise ConfigError("--threads is for --replicas; OMP_NUM_THREADS says it for a server of one engine.")
    settings = Settings(
        base_name=name or base_name(chosen), adapters=adapters, adapter_dirs=tuple(adapter_dir or ()),
        api_keys=frozenset(api_key or ()), admin_key=admin_key, max_prompt=max_prompt, max_tokens=max_tokens,
        max_choices=max_choices, queue_requests=queue, timeout=timeout, log_prompts=log_prompts,
    )  # fmt: skip
    limits = {"max_adapters": max_adapters, "max_rows": max_rows, "cache_tokens": cache_tokens}
    given = {k: v for k, v in limits.items() if v is not None}
    service = apart(lambda: service_of(*_base.load_base(chosen, quantization), settings, **given))
    names = ", ".join([settings.base_name, *service.adapters.names()])
    with contextlib.suppress(OSError):  # a full disk costs lines of the log, and nothing else
        typer.echo(f"Serving {names} at http://{host}:{port}/v1", err=True)
    run(service, host, port)


def fleet_parts() -> Any:
    """What starts a fleet, and its configuration. ConfigError where packages are missing."""
    try:
        from ray import serve  # noqa: F401

        from ..fleet import config, start
    except ImportError as error:
        raise ConfigError(f"Replicas need more packages ({error.name}): pip install 'graftlm[ray]'") from error
    return start, config.FleetConfig


def base_name(base: str) -> str:
    """What a base is called: its name, or that of its folder or file."""
    return Path(base).name.removesuffix(".gguf")
