"""What can go wrong around a server: adapters that break, clients that leave, disks that are full, processes that die."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
httpx = pytest.importorskip("httpx", reason="the test client of fastapi needs httpx")

import psutil  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from serving_helpers import alone, process, saved, served  # noqa: E402

PROMPT = "The river is long and the"
BODY: dict[str, Any] = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
ADMIN = {"Authorization": "Bearer admin"}


def said(found: Any) -> str:
    assert found.status_code == 200, found.text
    return str(found.json()["choices"][0]["text"])


def test_adapters_that_break(tmp_path: Path) -> None:
    """Values that are no numbers, a folder that is deleted before its first use or after it: only their requests fail."""
    root = tmp_path / "roots"
    folders = saved(root, ["style", "task", "memory"])
    weights = root / "style" / "adapter_model.safetensors"
    save_file({k: torch.full_like(v, float("nan")) for k, v in load_file(weights).items()}, weights)
    with served({}, {"max_adapters": 1}, adapter_dirs=[root]) as (client, _):
        plain = said(client.post("/v1/completions", json=BODY))
        found = client.post("/v1/completions", json=BODY | {"model": "style"})
        assert (found.status_code, "NaN or infinite" in found.json()["error"]["message"]) == (400, True), found.text
        assert said(client.post("/v1/completions", json=BODY | {"model": "task"})) == alone(folders["task"], PROMPT, 8)
        shutil.rmtree(root / "task")
        memory = alone(folders["memory"], PROMPT, 8)
        assert said(client.post("/v1/completions", json=BODY | {"model": "memory"})) == memory  # task is out now
        gone = client.post("/v1/completions", json=BODY | {"model": "task"})
        assert (gone.status_code, "not a directory" in gone.json()["error"]["message"]) == (400, True), gone.text
        shutil.rmtree(root / "memory")
        assert said(client.post("/v1/completions", json=BODY | {"model": "memory"})) == memory  # in memory still
        assert said(client.post("/v1/completions", json=BODY)) == plain
        listed = {m["id"]: m["kind"] for m in client.get("/v1/models").json()["data"]}
        assert listed["task"] == "unreadable"


def quiet(url: str) -> bool:
    """Whether nothing runs or waits."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    found = [float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_")]
    return found == [0.0, 0.0]


def settles(url: str) -> None:
    until = time.monotonic() + 60
    while not quiet(url):
        assert time.monotonic() < until, httpx.get(f"{url}/metrics").text
        time.sleep(0.1)


def test_a_process_that_loses_its_clients_its_disk_and_its_life(tmp_path: Path) -> None:
    """Clients leave before, in the midst of and behind their streams; the log's disk is full; kill -9, and again."""
    root = tmp_path / "roots"
    folders = saved(root, ["style"])
    options = (f"--adapter-dir={root}", "--max-rows=4")
    log = "/dev/full" if os.path.exists("/dev/full") else None
    wanted = alone(folders["style"], PROMPT, 8)
    with process(tmp_path, *options, log=log) as (url, running):
        long = BODY | {"max_tokens": 400, "ignore_eos": True, "stream": True, "n": 2}
        for i in range(12):
            with httpx.stream("POST", f"{url}/v1/completions", json=long | {"model": ("tiny", "style")[i % 2]}) as stream:
                for _, _line in zip(range(i % 4 * 2), stream.iter_lines(), strict=False):
                    pass
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/completions", json=long | {"stream": False}, timeout=0.2)
        settles(url)
        for _ in range(3):
            assert said(httpx.post(f"{url}/v1/completions", json=BODY | {"model": "style"}, timeout=60)) == wanted
        running.send_signal(signal.SIGKILL)
        assert running.wait(30) == -signal.SIGKILL
    port = int(url.rpartition(":")[2])
    with process(tmp_path, *options, port=port) as (url, _):  # at the same address, at once
        assert said(httpx.post(f"{url}/v1/completions", json=BODY | {"model": "style"}, timeout=60)) == wanted
        (line,) = [json.loads(x) for x in (tmp_path / "log").read_text().splitlines() if x.startswith("{") and "style" in x]
        assert (line["status"], line["completion_tokens"], line["model"]) == (200, 8, "style")
        assert PROMPT not in (tmp_path / "log").read_text()


@pytest.mark.parametrize("swaps", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_swaps_under_load(tmp_path: Path, swaps: int) -> None:
    """One name stands for other adapters again and again while clients ask: every answer, streamed ones over several swaps
    too, is whole that of one adapter, and of one that the name stood for since it was asked."""
    root = tmp_path / "roots"
    folders = saved(root, ["style", "task", "memory", "block"])
    lengths = 8, 48
    wanted = {(alone(folder, PROMPT, most), most): name for name, folder in folders.items() for most in lengths}
    found: list[tuple[str, float, float]] = []  # whose it is, when it was asked for and answered
    swapped: list[tuple[str, float, float]] = []  # when that began and was done
    failed: list[str] = []
    stop = threading.Event()
    with served({}, {"max_adapters": 3}, adapter_dirs=[root], admin_key="admin") as (client, service):

        def swap(name: str) -> None:
            body = {"lora_name": "it", "lora_path": str(root / name), "load_inplace": True}
            begun = time.monotonic()
            done = client.post("/v1/load_lora_adapter", json=body, headers=ADMIN)
            assert done.status_code == 200, done.text
            swapped.append((name, begun, time.monotonic()))

        def ask(most: int) -> None:
            while not stop.is_set():
                begun, body = time.monotonic(), BODY | {"model": "it", "max_tokens": most, "stream": most == lengths[1]}
                made = client.post("/v1/completions", json=body)
                lines = [x[6:] for x in made.text.split("\n\n")[:-2]] if body["stream"] else [made.text]
                text = "".join(json.loads(line)["choices"][0]["text"] for line in lines) if made.status_code == 200 else None
                whose = wanted.get((str(text), most))
                (failed.append(made.text) if whose is None else found.append((whose, begun, time.monotonic())))

        swap("style")
        threads = [threading.Thread(target=ask, args=(most,)) for most in lengths]
        for thread in threads:
            thread.start()
        for i in range(swaps):
            swap(list(folders)[i % 4])
        stop.set()
        for thread in threads:
            thread.join(60)
        assert not failed, failed[:3]
        until = [done for _, _, done in swapped[1:]] + [float("inf")]
        for whose, asked, answered in found:
            could = {
                name for (name, begun, _), end in zip(swapped, until, strict=True) if begun <= answered and end >= asked
            }
            assert whose in could
        assert len({whose for whose, _, _ in found}) > 1 and len(found) > swaps / 10
        print(f"{len(found)} answers over {swaps} swaps")
        assert len(service.engine.model.methods) <= 3
        assert len(service.engine.stepping.starts.roots) <= 5


@pytest.mark.slow
def test_soak(tmp_path: Path) -> None:
    """Ten minutes of everything at once, or SOAK_SECONDS: answers stay right, nothing is stuck, memory stays flat."""
    seconds, root = float(os.environ.get("SOAK_SECONDS", "600")), tmp_path / "roots"
    folders = saved(root)
    wanted = {name: alone(folder, PROMPT, 8) for name, folder in folders.items()} | {"tiny": alone(None, PROMPT, 8)}
    options = (f"--adapter-dir={root}", "--max-adapters=2", "--max-rows=4", "--cache-tokens=2048", "--admin-key=admin")
    wrong: list[str] = []
    counts = {"answers": 0, "streams": 0, "swaps": 0}
    with process(tmp_path, *options) as (url, running):
        end = time.monotonic() + seconds
        sizes: list[tuple[float, int]] = []

        def asks(seed: int) -> None:
            rng = random.Random(seed)
            with httpx.Client(base_url=url, timeout=120) as client:
                while time.monotonic() < end:
                    name = rng.choice(list(wanted))
                    if rng.random() < 0.3:
                        body = BODY | {"model": name, "stream": True, "max_tokens": 60, "prompt": f"{rng.random()} is"}
                        with client.stream("POST", "/v1/completions", json=body) as stream:
                            for _ in zip(range(rng.randrange(20)), stream.iter_lines(), strict=False):
                                counts["streams"] += 1
                        continue
                    made = client.post("/v1/completions", json=BODY | {"model": name})
                    if made.status_code != 200 or made.json()["choices"][0]["text"] != wanted[name]:
                        wrong.append(made.text)
                    counts["answers"] += 1

        def swaps() -> None:
            while time.monotonic() < end:
                body = {"lora_name": "other", "lora_path": str(root / "style"), "load_inplace": True}
                made = httpx.post(f"{url}/v1/load_lora_adapter", json=body, headers=ADMIN, timeout=120)
                if made.status_code != 200:
                    wrong.append(made.text)
                counts["swaps"] += 1
                sizes.append((time.monotonic(), psutil.Process(running.pid).memory_info().rss))
                time.sleep(0.5)

        threads = [threading.Thread(target=asks, args=(i,)) for i in range(6)] + [threading.Thread(target=swaps)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 180)
        assert not wrong, wrong[:3]
        settles(url)
        assert httpx.get(f"{url}/health").status_code == 200
    assert min(counts.values()) > seconds / 30, counts
    third = len(sizes) // 3
    middle, last = (sorted(size for _, size in part)[third // 2] for part in (sizes[third : 2 * third], sizes[-third:]))
    assert last < middle * 1.05 + 2**24, (counts, middle, last)


@pytest.mark.slow
def test_memory_over_requests(tmp_path: Path, record_property: Any) -> None:
    """20,000 requests of all sorts, or MEMORY_REQUESTS: behind the first quarter the process grows no more."""
    total, root = int(os.environ.get("MEMORY_REQUESTS", "20000")), tmp_path / "roots"
    folders = saved(root)
    prompts = [f"{PROMPT} {i % 97} {'and on ' * (i % 11)}" for i in range(600)]
    options = (f"--adapter-dir={root}", "--max-adapters=3", "--max-rows=8", "--cache-tokens=2048", "--admin-key=admin")
    wrong: list[str] = []
    sizes: list[int] = []
    numbers = iter(range(total))
    lock = threading.Lock()
    with process(tmp_path, *options) as (url, running):

        def ask(client: Any, i: int) -> None:
            model = ("tiny", *folders, "style+task")[i % 6]
            body = BODY | {"model": model, "prompt": prompts[i % 600], "max_tokens": 2, "stream": i % 3 == 0, "n": 1 + i % 2}
            if i % 50 == 7:
                load = {"lora_name": "other", "lora_path": folders["style"], "load_inplace": True}
                made = client.post("/v1/load_lora_adapter", json=load, headers=ADMIN)
            elif i % 50 == 8:
                made = client.post("/v1/embeddings", json={"model": model, "input": ["a", prompts[i % 600]]})
            elif i % 50 == 9:  # what is wrong leaves nothing behind either
                made = client.post("/v1/completions", json=body | {"response_format": {"type": "regex", "pattern": "["}})
                if made.status_code != 400:
                    wrong.append(made.text)
                return
            else:
                made = client.post("/v1/completions", json=body | {"temperature": i % 2, "seed": i})
            if made.status_code != 200:
                wrong.append(made.text)

        def asks() -> None:
            with httpx.Client(base_url=url, timeout=120) as client:
                while not wrong:
                    with lock:
                        if (i := next(numbers, None)) is None:
                            return
                        if i % (total // 20) == 0:
                            sizes.append(psutil.Process(running.pid).memory_info().rss)
                    try:
                        ask(client, i)
                    except Exception as error:  # a thread that fails in silence would look like a server that is idle
                        wrong.append(f"request {i}: {error!r}")

        threads = [threading.Thread(target=asks) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, wrong[:3]
        settles(url)
        sizes.append(psutil.Process(running.pid).memory_info().rss)
    shown = [round(size / 2**20, 1) for size in sizes]
    record_property("megabytes", shown)
    later = torch.tensor(shown[5:])
    at = torch.arange(len(later)) - (len(later) - 1) / 2
    slope = float((at * later).sum() / (at * at).sum())  # megabytes each twentieth, by least squares
    print(f"RSS in MB each {total // 20} requests: {shown}; slope behind the first quarter {slope:.3f}")
    assert slope * 15 < 12, (shown, slope)
