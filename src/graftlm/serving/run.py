"""Running the app: uvicorn, which drains on SIGTERM, and logs as JSON lines."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from typing import Any

import uvicorn

from .app import create_app
from .service import Service

GRACE = 30  # seconds that what runs may take to end after SIGTERM


class Server(uvicorn.Server):
    """uvicorn's server. From the first signal on it takes nothing new: it still listens, and says so with 503, until what
    runs has ended; a second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.service.draining = True
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: Any = None) -> None:
        grace = self.config.timeout_graceful_shutdown or 0
        until = time.monotonic() + grace
        while self.service.busy and not self.force_exit and time.monotonic() < until:
            await asyncio.sleep(0.1)
        self.config.timeout_graceful_shutdown = max(1, round(until - time.monotonic()))
        await super().shutdown(sockets)


class JsonLines(logging.Formatter):
    """A record as a line of JSON; a message that is an object already becomes part of it."""

    def format(self, record: logging.LogRecord) -> str:
        made: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        text = record.getMessage()
        try:
            given = json.loads(text) if text.startswith("{") else None
        except ValueError:
            given = None
        made |= given if isinstance(given, dict) else {"message": text}
        if record.exc_info:
            made["traceback"] = self.formatException(record.exc_info)
        return json.dumps(made, ensure_ascii=False)


def logs_to(stream: Any) -> None:
    """Lines of the server, and uvicorn's own, to a stream. One that cannot be written to loses lines, nothing else."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logging.raiseExceptions = False
    for name in ("graftlm.serving", "graftlm.inference", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def run(service: Service, host: str, port: int, *, grace: int = GRACE) -> None:
    """Serve until a signal comes; then what runs may end within `grace` seconds."""
    logs_to(sys.stderr)
    config = uvicorn.Config(
        create_app(service), host=host, port=port, log_config=None, access_log=False, timeout_graceful_shutdown=grace,
        server_header=False,
    )  # fmt: skip
    try:
        Server(config, service).run()
    finally:
        service.stop()  # uvicorn leaves that out when it is told twice
