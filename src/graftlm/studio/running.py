"""Running the studio: its address, the browser, uvicorn."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from ..errors import ConfigError
from .app import create_app
from .studio import Settings, Studio
from .workspace import Workspace

GRACE = 2  # seconds that open pages may take to end


class Server(uvicorn.Server):
    """uvicorn's server, which says when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()


def listening(port: int) -> socket.socket:
    """A socket on a port of this machine; 0 for any that is free. ConfigError: it is taken."""
    door = socket.socket()
    door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        door.bind(("127.0.0.1", port))
    except OSError as error:
        door.close()
        raise ConfigError(f"Port {port} cannot be had ({error.strerror}); give another by --port, or 0 for any.") from error
    return door


def run(
    root: Path, given: Sequence[Path], *, port: int, browser: bool, at_once: int, max_upload: int, say: Callable[[str], None]
) -> None:
    """Serve a workspace until Ctrl-C. Runs that go on are not ended by it."""
    workspace = Workspace(root, given)
    door = listening(port)
    settings = Settings(port=door.getsockname()[1], token=secrets.token_urlsafe(24), at_once=at_once, max_upload=max_upload)
    address = f"http://127.0.0.1:{settings.port}/?token={settings.token}"
    app = create_app(Studio(workspace, settings))

    def ready() -> None:
        say(f"GraftLM Studio: {address}")
        if browser:
            webbrowser.open(address)

    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE)
    Server(config, ready).run([door])
