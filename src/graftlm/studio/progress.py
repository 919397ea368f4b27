"""What a run wrote while it went, read bit by bit: `progress.jsonl`, and the end of its log."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NAME = "progress.jsonl"
LOG_BYTES = 24_000
POINTS = 1500  # of a curve that is drawn
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\n]*\r(?!\n)")  # of terminals: colours, lines that were written over


class Progress:
    """A run's progress file, read on from where it was read to before.

    Attributes:
        steps, evaluations: events in their order; those of a part that was trained again only once.
        step, total: where training is, of how many steps.
        begun: seconds since the epoch at which it began, 0 before.
        generation: another number each time the file begins anew.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.generation = -1
        self._clear(0)

    def _clear(self, node: int) -> None:
        self.steps: list[dict[str, Any]] = []
        self.evaluations: list[dict[str, Any]] = []
        self.step = self.total = self.first = 0
        self.begun = 0.0
        self.generation += 1
        self._node, self._offset = node, 0

    def read(self) -> bool:
        """Take in what was written since; whether there was anything."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return False
        if found.st_ino != self._node or found.st_size < self._offset:  # a resumed run writes the file anew
            self._clear(found.st_ino)
        if found.st_size == self._offset:
            return False
        with self.path.open("rb") as file:
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]  # the last line may be half written
        self._offset += len(whole)
        for line in whole.splitlines():
            self._take(line)
        return bool(whole)

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return  # cut off when the machine went off
        self.step = event["step"]
        if event["event"] == "begin":
            self.total, self.begun, self.first = event["steps"], event["time"], event["step"]
        elif event["event"] == "step":
            self.steps.append(event)
        elif event["event"] == "evaluation":
            self.evaluations.append(event)

    @property
    def last(self) -> dict[str, Any]:
        """The last step's measures; {} before the first."""
        return self.steps[-1] if self.steps else {}

    @property
    def seconds_left(self) -> float | None:
        """By the mean of the steps so far; None before the first."""
        done = self.step - self.first
        return self.last["seconds"] / done * (self.total - self.step) if done > 0 and self.last else None

    def curve(self) -> dict[str, list]:
        """Steps with the losses of training and of held-out rows at them, None where there is none; thinned out evenly."""
        every = -(-len(self.steps) // POINTS) or 1
        train = {e["step"]: e["loss"] for e in [*self.steps[::every], *self.steps[-1:]]}
        held_out = {e["step"]: e["loss"] for e in self.evaluations}
        at = sorted(train.keys() | held_out.keys())
        return {"step": at, "train": [train.get(s) for s in at], "held_out": [held_out.get(s) for s in at]}


def tail(path: Path, size: int = LOG_BYTES) -> str:
    """The end of a log, from a line's beginning, without a terminal's codes."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, 2)
            file.seek(max(0, length - size))
            text = file.read()
    except FileNotFoundError:
        return ""
    if length > size:
        text = text[text.find(b"\n") + 1 :]
    return CODES.sub("", text.decode("utf-8", "replace"))
