"""A comparison on Ray: equal to that of one machine, also where machines are lost; checks before work is lost."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comparison_helpers import DATA, SETTINGS

from graftlm import cluster
from graftlm.comparison import ComparisonResult, MethodRun, compare, spread
from graftlm.errors import ConfigError, DataError

METHODS = ["lora:r=2", "prompt-tuning", "bottleneck:training.gradient_checkpointing=true", "lora:r=-1"]
OWN = ("loss", "accuracy", "loss_before", "trainable_parameters", "general_loss", "general_loss_before")


class TaskError(Exception):
    """As Ray tells what a task raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("traceback …")
        self.cause = cause


class Crashed(Exception):
    """A worker died, and all that were tried after it."""


class Local:
    """What `Spread` asks of Ray, done here at once: what it is given travels as a copy.

    Args:
        dies: how many times the first task's process is lost, each time after one of its runs.
    """

    class exceptions:
        RayTaskError = TaskError

    def __init__(self, dies: int = 0) -> None:
        self.dies, self.tries = dies, 0
        self.answers: dict[int, Any] = {}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}, "NodeID": "ab" * 28, "NodeManagerAddress": "here"}]

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        assert options["num_cpus"] == 1 and options["max_retries"] == spread.TRIES
        return lambda work: Task(self, work, options["max_retries"])

    def wait(self, references: list[int], timeout: float) -> tuple[list[int], list[int]]:
        return references[:1], references[1:]

    def get(self, reference: int) -> Any:
        found = self.answers[reference]
        if isinstance(found, Exception):
            raise found
        return found


class Task:
    def __init__(self, ray: Local, work: Any, retries: int) -> None:
        self.ray, self.work, self.retries = ray, work, retries

    def remote(self, *args: Any) -> int:
        number = len(self.ray.answers)
        self.ray.answers[number] = Crashed("the worker died")
        for _ in range(self.retries + 1):
            try:
                with self.ray_dies():
                    self.ray.answers[number] = self.work(*copy.deepcopy(args))
            except Crashed:
                continue
            except Exception as error:
                self.ray.answers[number] = TaskError(error)
            break
        return number

    @contextlib.contextmanager
    def ray_dies(self) -> Iterator[None]:
        """The process is lost as soon as one of its runs has been noted."""
        self.ray.tries += 1
        if self.ray.tries > self.ray.dies:
            yield
            return
        save = spread.Part.save

        def last(part: spread.Part) -> None:
            save(part)
            raise Died

        spread.Part.save = last  # type: ignore[method-assign]
        try:
            yield
        except Died:
            raise Crashed from None
        finally:
            spread.Part.save = save  # type: ignore[method-assign]


class Died(BaseException):
    """Nothing catches the loss of a process."""


def made(base: str, folder: Path, ray: Local | None, monkeypatch: pytest.MonkeyPatch, **options: Any) -> ComparisonResult:
    if ray is not None:
        monkeypatch.setattr(cluster, "connected", lambda address: contextlib.nullcontext(ray))
        monkeypatch.setattr(cluster, "check_machines", lambda ray, folder: None)
    given = {"base": base, "data": DATA, "methods": METHODS, "settings": SETTINGS, "quiet": True} | options
    return compare(output_dir=folder, ray=None if ray is None else "auto", **given)


@pytest.fixture(scope="module")
def here(base: str, tmp_path_factory: pytest.TempPathFactory) -> ComparisonResult:
    with pytest.MonkeyPatch.context() as patch:
        return made(base, tmp_path_factory.mktemp("here") / "o", None, patch)


def measures(run: MethodRun) -> dict[str, float]:
    return {name: run.metrics[name] for name in OWN if run.metrics.get(name) is not None}


def same(one: ComparisonResult, other: ComparisonResult) -> None:
    """All that a report shows, but for times."""
    for a, b in zip(one.runs, other.runs, strict=True):
        for name in ("label", "status", "error", "directory", "quantization"):
            assert getattr(a, name) == getattr(b, name), (a.label, name)
        assert measures(a) == pytest.approx(measures(b), rel=1e-6)
        assert a.samples == b.samples
        assert a.recipe.replace(str(one.output_dir), "o") == b.recipe.replace(str(other.output_dir), "o")
    assert one.base_metrics.keys() == other.base_metrics.keys() and one.best.label == other.best.label
    for key, value in one.base_metrics.items():
        assert other.base_metrics[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    assert (one.train_rows, one.eval_rows, one.general) == (other.train_rows, other.eval_rows, other.general)


def test_results_are_those_of_one_machine(base, here, tmp_path, monkeypatch):
    ray = Local()
    found = made(base, tmp_path / "o", ray, monkeypatch)
    assert len(ray.answers) == 2  # two forms of the base
    same(here, found)
    assert found.report_path.is_file() and json.loads(found.json_path.read_text())["runs"][0]["status"] == "done"
    assert (found.output_dir / found.runs[0].directory / "adapter_model.safetensors").is_file()


def test_a_lost_machine_costs_nothing_that_was_done(base, here, tmp_path, monkeypatch):
    """Its runs go on elsewhere: the one that was done is kept, the other resumes."""
    trained = []
    placed = spread.PartField.placed

    def noted(self, recipe):
        found = placed(self, recipe)
        trained.append((Path(recipe.output_dir).name, found.resume))
        return found

    monkeypatch.setattr(spread.PartField, "placed", noted)
    ray = Local(dies=1)
    same(here, made(base, tmp_path / "o", ray, monkeypatch))
    assert ray.tries == 3
    again = [name for i, (name, _) in enumerate(trained) if name in [n for n, _ in trained[:i]]]
    assert len(again) == 1  # of two, the one that was not done


def test_a_task_that_is_lost_for_good_fails_its_own_runs(base, tmp_path, monkeypatch):
    class Lost(Local):
        def remote(self, **options: Any) -> Any:
            def work(order: spread.Order) -> None:
                if len(self.answers) == 1:
                    raise Crashed
                spread.trained(order)

            return lambda _: Task(self, work, 0)

    found = made(base, tmp_path / "o", Lost(), monkeypatch, methods=METHODS[:3])
    assert [run.status for run in found.runs] == ["failed", "failed", "done"], [run.error for run in found.runs]
    assert "the worker died" in found.runs[0].error


def test_what_concerns_all_is_raised(base, tmp_path, monkeypatch):
    with pytest.raises(DataError):
        made(base, tmp_path / "o", Local(), monkeypatch, data="no-such-data")
    with pytest.raises(ConfigError, match="does not travel"):
        made(base, tmp_path / "p", Local(), monkeypatch, model=object(), tokenizer=object())


def test_rates_are_searched_in_the_tasks(base, tmp_path, monkeypatch):
    ray = Local()
    found = made(
        base, tmp_path / "o", ray, monkeypatch, budget=4.0, methods=METHODS[:3], data=DATA | {"max_examples": 24},
        settings={"training": {"max_steps": 2}},
    )  # fmt: skip
    assert set(found.search) == set(METHODS[:3]) and len(ray.answers) == 4
    assert all(any(t["status"] == "chosen" for t in tried) for tried in found.search.values())


@pytest.mark.slow
def test_a_real_cluster(base, here, tmp_path):
    """One machine, two tasks; a worker is killed in the midst of it."""
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    import threading

    import psutil

    killed: list[int] = []

    def kill() -> None:
        while not killed:
            for process in psutil.process_iter(["cmdline"]):
                if (process.info["cmdline"] or [""])[0].startswith("ray::trained"):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                        return

    with cluster.connected(None, cpus=2):
        threading.Thread(target=kill, daemon=True).start()
        found = compare(
            base=base, data=DATA, methods=METHODS, settings=SETTINGS, quiet=True, output_dir=tmp_path / "o", ray="local"
        )
    assert killed
    same(here, found)


def test_machines_that_do_not_fit_are_told_before(tmp_path):
    """Other versions, a folder that they do not see, and ones that cannot run it at all."""
    own = cluster.versions()

    class Ray(Local):
        class exceptions:
            RayError = OSError

        def __init__(self, answer: Any) -> None:
            self.answer = answer

        def remote(self, **options: Any) -> Any:
            return lambda work: self

        def options(self, **options: Any) -> Any:
            class Remote:
                @staticmethod
                def remote(token: Path) -> int:
                    assert token.is_file()
                    return 0

            return Remote

        def get(self, reference: int, timeout: float) -> Any:
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    cluster.check_machines(Ray((own, True)), tmp_path)
    for answer, told in [
        ((own | {"torch": "0.1"}, True), "here has torch 0.1"),
        ((own, False), f"here does not see {tmp_path}"),
        (OSError("no module named graftlm"), "here cannot run GraftLM: no module named graftlm"),
    ]:
        with pytest.raises(ConfigError, match=told):
            cluster.check_machines(Ray(answer), tmp_path)
    assert not list(tmp_path.iterdir())
