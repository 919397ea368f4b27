"""What the studio's tests share: a studio without a network, and one that runs as its users run it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from graftlm.studio import records
from graftlm.studio.app import create_app
from graftlm.studio.studio import Settings, Studio
from graftlm.studio.workspace import Workspace

PORT, TOKEN = 8765, "a-token-for-tests"
ADDRESS = f"http://127.0.0.1:{PORT}"
SLEEPER = Path(__file__).parent / "sleeping_job.py"


class Here:
    """The worker's errands in this process."""

    async def ask(self, name: str, /, timeout: float = 0.0, **values: Any) -> Any:
        from graftlm.studio import errands

        found = errands.answer(json.dumps({"id": 0, "name": name, "values": values}))
        if "error" in found:
            from graftlm.studio.errors import PageError

            raise PageError(found["status"], found["error"])
        return json.loads(json.dumps(found["answer"], default=str))


def studio(root: Path, *given: Path, **settings: Any) -> Studio:
    made = Studio(Workspace(root, given), Settings(port=PORT, token=TOKEN, **settings))
    made.worker = Here()  # type: ignore[assignment]
    made.jobs.program = (sys.executable, str(SLEEPER))
    return made


def client(made: Studio, inside: bool = True) -> TestClient:
    """A browser; inside: with the cookie and the CSRF token."""
    found = TestClient(create_app(made), base_url=ADDRESS, follow_redirects=False)
    if inside:
        assert found.get(f"/?token={TOKEN}").status_code == 303
        page = found.get("/")
        found.headers["X-CSRF-Token"] = re.search(r'"X-CSRF-Token": "(\w+)"', page.text)[1]  # type: ignore[index]
    return found


def until(asked: Any, seconds: float = 240.0) -> Any:
    """What `asked` gives, once that is true."""
    end = time.monotonic() + seconds
    while not (found := asked()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


WEIGHTS = (2).to_bytes(8, "little") + b"{}"  # a safetensors file without tensors


def an_adapter(made: Studio, name: str = "mine") -> Path:
    """A run that has ended, with an adapter; its folder."""
    folder = made.workspace.new_run(name)
    records.write(folder / "adapter_config.json", {"peft_type": "LORA", "r": 8})
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "README.md").write_text("# A card <b>")
    (folder / "recipe.yaml").write_text("method: lora\nbase: graftlm-base\ntraining: {seed: 1}\n")
    (folder / "metrics.json").write_text(
        json.dumps({"metrics": {"loss": 1.0, "loss_before": 2.0}, "history": [{"step": 5, "eval_loss": 1.0}]})
    )
    made.index.sync()
    return folder


def parses(args: list[str]) -> bool:
    """Whether a job's arguments are a command line of `graftlm`; click's error where they are not."""
    from graftlm.cli import load

    return bool(load(args[0]).make_context(args[0], list(args[1:])))


class Process:
    """`graftlm studio` as a process."""

    def __init__(self, workspace: Path, port: int = 0, *more: str) -> None:
        command = [
            sys.executable,
            "-m",
            "graftlm",
            "studio",
            "-w",
            str(workspace),
            "--port",
            str(port),
            "--no-browser",
            *more,
        ]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        self.address = re.search(r"http://\S+", line)[0]  # type: ignore[index]
        self.port = int(re.search(r":(\d+)/", line)[1])  # type: ignore[index]

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
