"""The queue and its processes, which are real ones; only what they do is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from studio_helpers import SLEEPER, client, studio, until

from graftlm.studio import records
from graftlm.studio.errors import PageError
from graftlm.studio.job import last_words
from graftlm.studio.jobs import Jobs, alive, identity, log_of, state_of
from graftlm.studio.progress import Progress, tail
from graftlm.studio.workspace import Workspace


@pytest.fixture
def jobs(tmp_path):
    made = Jobs(Workspace(tmp_path))
    made.program = (sys.executable, str(SLEEPER))
    yield made
    for _, entry in made.entries():
        if "pid" in entry and alive(entry):
            os.killpg(entry["pid"], signal.SIGKILL)


def job(jobs: Jobs, name: str, *args: str):
    folder = jobs.workspace.new_run(name)
    jobs.add(folder, "train", args)
    return folder


def state(folder) -> str:
    return state_of(folder)["state"]


def asleep(folder) -> bool:
    return "asleep" in tail(folder / "log.txt")


def test_a_job_runs_to_its_end_with_nobody_watching(jobs):
    folder = job(jobs, "one", "hello", "world")
    assert state(folder) in ("running", "done")
    until(lambda: state(folder) == "done")
    assert "args hello world" in tail(folder / "log.txt") and state_of(folder)["code"] == 0
    until(lambda: not jobs.going())


def test_one_at_a_time_and_the_next_starts_without_the_studio(jobs):
    first, second, third = job(jobs, "a", "sleep", "600"), job(jobs, "b", "hello"), job(jobs, "c", "hello")
    until(lambda: asleep(first))
    assert (jobs.going(), jobs.waiting()) == (["a"], ["b", "c"]) and state(second) == "waiting"
    jobs.stop(first)
    until(lambda: state(third) == "done")  # nobody called advance: a's process started b, and b's c
    assert state(first) == "stopped" and "saved" in tail(first / "log.txt") and state(second) == "done"
    assert state_of(second)["started"] <= state_of(third)["started"]


def planned(jobs: Jobs, *needs: int | None) -> None:
    """Write plans to what is in the queue."""
    for (file, _), count in zip(jobs.entries(), needs, strict=True):
        jobs.note_plan(file, count)


def test_two_at_a_time_where_the_plans_leave_room(tmp_path):
    jobs = Jobs(Workspace(tmp_path), at_once=2)
    jobs.program = (sys.executable, str(SLEEPER))
    folders = [job(jobs, name, "sleep", "600") for name in "abc"]
    until(lambda: asleep(folders[0]))
    free = psutil.virtual_memory().available
    for needs in ((None, None, None), (1, None, 1), (1, 2 * free, 1), (2 * free, 1, 1), (None, 1, 1)):
        planned(jobs, *needs)  # no plan, too much for both, or too much still to be taken by the first: it goes alone
        jobs.advance()
        assert (jobs.going(), jobs.waiting()) == (["a"], ["b", "c"]), needs
    planned(jobs, 1, 1, 1)
    jobs.advance()
    assert (jobs.going(), jobs.waiting()) == (["a", "b"], ["c"])
    until(lambda: asleep(folders[1]))
    jobs.stop(folders[0])
    until(lambda: asleep(folders[2]))
    for folder in folders[1:]:
        jobs.stop(folder, at_once=True)
        until(lambda folder=folder: jobs.advance() or state(folder) == "stopped")


def test_one_is_started_beside_another_where_a_user_asks_for_it_and_the_plans_leave_room(jobs):
    first, second = job(jobs, "a", "sleep", "600"), job(jobs, "b", "hello")
    planned(jobs, 1, 2**60)
    jobs.beside(second)
    assert jobs.waiting() == ["b"]
    planned(jobs, 1, 1)
    assert jobs.advance() == [second]
    until(lambda: state(second) == "done" and jobs.going() == ["a"])
    with pytest.raises(PageError, match="not running"):
        jobs.beside(second)
    jobs.stop(first, at_once=True)
    until(lambda: jobs.advance() or state(first) == "stopped")


def test_what_trains_together_is_one_job(jobs):
    """One process for all, one log; each is told how it ended itself, and what did not end is resumed without the others."""
    folders = [jobs.workspace.new_run(name) for name in "abc"]
    files = [f"runs/{f.name}/settings.yaml" for f in folders]
    jobs.add(folders, "train", ["several", *files])
    assert jobs.going() == ["a", "b", "c"] and len(list(jobs.workspace.queue.glob("*.json"))) == 1
    until(lambda: state(folders[2]) == "failed")
    assert [state(f) for f in folders] == ["done", "failed", "failed"]
    assert state_of(folders[1])["error"] == "there are no rows" and state_of(folders[2])["error"] == "there is no base"
    assert {log_of(f) for f in folders} == {folders[0] / "log.txt"}
    until(lambda: not jobs.going())
    jobs.again(folders[1], "--resume")
    until(lambda: not jobs.advance() and not jobs.going())
    assert "several runs/b/settings.yaml runs/c/settings.yaml --resume" in tail(log_of(folders[2]))
    assert state(folders[0]) == "done" and log_of(folders[2]) == folders[1] / "log.txt"


def test_what_trains_together_is_stopped_together(jobs):
    first, *folders = (jobs.workspace.new_run(name) for name in "abc")
    jobs.add(first, "train", ["sleep", "600"])
    jobs.add(folders, "train", ["sleep", "600"])
    assert jobs.waiting() == ["b", "c"]
    jobs.stop(folders[1])
    assert [state(f) for f in folders] == ["stopped", "stopped"] and jobs.waiting() == []
    jobs.again(folders[0])
    until(lambda: asleep(first))
    jobs.stop(first)
    until(lambda: asleep(folders[0]))
    jobs.stop(folders[1])
    until(lambda: [state(f) for f in folders] == ["stopped", "stopped"])


def test_what_waits_can_be_taken_out(jobs):
    first, second = job(jobs, "a", "sleep", "600"), job(jobs, "b", "hello")
    jobs.stop(second)
    assert state(second) == "stopped" and jobs.waiting() == []
    with pytest.raises(PageError, match="not running"):
        jobs.stop(second)
    jobs.stop(first, at_once=True)
    until(lambda: jobs.advance() or state(first) == "stopped")


def test_failures_say_what_the_command_said(jobs):
    folder = job(jobs, "a", "fail")
    until(lambda: state(folder) == "failed")
    assert state_of(folder)["error"] == "nothing of it is here"
    jobs.again(folder, "--resume")
    assert state(folder) in ("running", "failed")
    until(lambda: not jobs.going())


def test_a_job_that_is_killed_is_lost_and_says_so(jobs):
    folder = job(jobs, "a", "sleep", "600")
    until(lambda: asleep(folder))
    (entry,) = [e for _, e in jobs.entries()]
    os.kill(entry["pid"], signal.SIGKILL)
    assert until(jobs.advance) == [folder]
    assert state(folder) == "lost" and "without a word" in state_of(folder)["error"]


def test_what_the_system_killed_for_lack_of_memory_says_so(jobs, tmp_path, monkeypatch):
    counted = tmp_path / "vmstat"
    counted.write_text("pgfault 7\noom_kill 3\n")
    monkeypatch.setattr("graftlm.studio.jobs.KILLS", (str(counted), str(tmp_path / "none")))
    folder = jobs.workspace.new_run("large")
    jobs.add(folder, "train", ["sleep", "600"])
    counted.write_text("pgfault 9\noom_kill 4\n")
    os.kill(jobs.entries()[0][1]["pid"], signal.SIGKILL)
    until(lambda: jobs.advance())
    assert state(folder) == "lost" and "lack of memory" in state_of(folder)["error"]
    assert jobs.going() == []


def test_a_job_can_be_stopped_where_its_shell_ignored_the_signal(jobs):
    """A shell's background jobs start with SIGINT ignored, and hand that on."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        folder = job(jobs, "a", "sleep", "600")
    finally:
        signal.signal(signal.SIGINT, before)
    until(lambda: asleep(folder))
    jobs.stop(folder)
    until(lambda: state(folder) == "stopped")


def test_a_process_is_known_by_more_than_its_id(tmp_path):
    """A reused process id is not taken for the job, and never gets its signal."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        entry = identity(other.pid)
        assert alive(entry) and not alive(entry | {"born": entry["born"] - 100})
        made = Jobs(Workspace(tmp_path))
        folder = made.workspace.new_run("a")
        records.write(folder / "job.json", {"kind": "train", "args": ["x"]})
        records.write(folder / "state.json", {"state": "running"})
        past = entry | {"born": entry["born"] - 100, "folders": ["a"], "args": [], "queued": 1.0}
        records.write(made.workspace.queue / "1-a.json", past)
        made.stop(folder)
        assert made.advance() == [folder] and state(folder) == "lost"
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    until(lambda: not alive(entry))


def test_a_zombie_is_not_alive():
    child = subprocess.Popen([sys.executable, "-c", ""])
    until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert not alive(identity(child.pid))
    child.wait()
    assert identity(child.pid)["born"] == 0.0 and not alive(identity(child.pid))


def test_a_new_studio_finds_what_goes_on_and_what_was_lost(tmp_path):
    first = studio(tmp_path)
    going, waits, gone = (first.workspace.new_run(n) for n in ("going", "waits", "gone"))
    first.jobs.add(going, "train", ["sleep", "600"])
    first.jobs.add(waits, "train", ["hello"])
    records.write(gone / "state.json", {"state": "running"})
    for folder in (going, waits, gone):
        first.index.note(folder)
    until(lambda: asleep(going))
    second = studio(tmp_path)
    second.recover()
    states = {r.name: r.state for r in second.index.runs()}
    assert states == {"going": "running", "waits": "waiting", "gone": "lost"}
    second.jobs.stop(going)
    until(lambda: second.look() or second.index.run("waits").state == "done")
    assert second.index.run("going").state == "stopped"


def test_pages_stop_resume_and_delete(tmp_path):
    made = studio(tmp_path)
    browser = client(made)
    folder = made.workspace.new_run("a")
    made.jobs.add(folder, "train", ["sleep", "600"])
    until(lambda: asleep(folder))
    assert browser.post("/runs/a/delete").status_code == 409 and browser.post("/runs/a/resume").status_code == 409
    answer = browser.post("/runs/a/stop")
    assert answer.status_code == 204 and answer.headers["hx-redirect"] == "/runs/a"
    until(lambda: state(folder) == "stopped")
    made.look()
    assert made.index.run("a").state == "stopped"
    assert browser.post("/runs/a/resume").status_code == 204
    until(lambda: made.look() or state(folder) == "running")  # the process before it may still be ending
    assert records.read(next(made.workspace.queue.glob("*.json")))["args"][-1] == "--resume"
    until(lambda: asleep(folder))
    browser.post("/runs/a/stop", data={"now": "1"})
    until(lambda: made.look() or made.index.run("a").state == "stopped")
    assert browser.post("/runs/a/delete").status_code == 204 and not folder.exists()
    assert browser.get("/runs/a").status_code == 404 and browser.post("/runs/a/stop").status_code == 404


def test_the_log_without_a_terminals_codes(tmp_path):
    log = tmp_path / "log.txt"
    assert tail(log) == ""
    log.write_bytes(b"\x1b[31mred\x1b[0m\n10%\r20%\r100%\n\xff end\r\n")
    assert tail(log) == "red\n100%\n\ufffd end\r\n"
    log.write_text("line\n" * 10_000)
    assert len(tail(log)) <= 24_000 and tail(log).startswith("line\n")
    log.write_text("Error: first\nError: no such\nfile")
    assert last_words(log) == "no such\nfile"
    log.write_text("Try 'graftlm -h'.\n╭─ Error ─╮\n│ No such option: -x │\n╰──╯\n")
    assert last_words(log) == "No such option: -x"


def lines(*events: dict) -> str:
    return "".join(json.dumps(e) + "\n" for e in events)


BEGIN = {"event": "begin", "step": 0, "steps": 100, "time": 5.0}
STEPS = [{"event": "step", "step": i, "loss": 1 / i, "seconds": 2.0 * i} for i in range(1, 41)]


def test_progress_is_read_bit_by_bit(tmp_path):
    file, seen = tmp_path / "progress.jsonl", Progress(tmp_path)
    assert not seen.read() and seen.curve() == {"step": [], "train": [], "held_out": []}
    text = lines(BEGIN, *STEPS[:10])
    file.write_text(text[:-20])
    assert seen.read() and seen.step == 9 and seen.total == 100
    with file.open("a") as out:
        out.write(text[-20:] + lines({"event": "evaluation", "step": 10, "loss": 0.5, "samples": []}))
    assert seen.read() and not seen.read()
    assert seen.step == 10 and seen.seconds_left == pytest.approx(180.0)
    assert seen.curve()["held_out"] == [None] * 9 + [0.5] and seen.curve()["train"][-1] == 0.1
    again = file.with_suffix(".new")  # resumed: the file is written anew, and put in its place
    again.write_text(lines(BEGIN, *STEPS[:5], BEGIN | {"step": 5}))
    before = seen.generation
    os.replace(again, file)
    assert seen.read() and seen.generation == before + 1 and len(seen.steps) == 5 and seen.first == 5
    with file.open("a") as out:
        out.write("{cut off\n" + lines(STEPS[5]))
    assert seen.read() and len(seen.steps) == 6


def test_long_curves_are_thinned_out(tmp_path):
    (tmp_path / "progress.jsonl").write_text(lines(*({"event": "step", "step": i, "loss": 1.0} for i in range(1, 10_001))))
    seen = Progress(tmp_path)
    seen.read()
    found = seen.curve()["step"]
    assert len(found) <= 1501 and found[0] == 1 and found[-1] == 10_000


def test_the_watcher_is_cheap(tmp_path):
    """Of a core, while a run goes on: below two in a hundred."""
    made = studio(tmp_path)
    folder = made.workspace.new_run("a")
    made.jobs.add(folder, "train", ["sleep", "600"])
    until(lambda: asleep(folder))
    begun, looks = time.process_time(), 20
    for _ in range(looks):
        made.look()
    spent = (time.process_time() - begun) / looks
    made.jobs.stop(folder, at_once=True)
    assert spent < 0.02 * made.settings.watch
