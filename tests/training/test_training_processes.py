"""Several processes of one run: who prints and saves, and that they train what one process trains."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from families import build
from safetensors.torch import load_file
from training_helpers import save_base, save_tweets

from graftlm import AdaLoraConfig, LoraConfig, get_peft_model, processes
from graftlm.cli._processes import launch
from graftlm.errors import ConfigError, RecipeError, UnsupportedError
from graftlm.quantization import scheme_of
from graftlm.training import Recipe, resolve_base, run
from graftlm.training.output import check_shared
from graftlm.training.recipes import only_the_first_speaks
from graftlm.training.resume import last_complete_checkpoint
from graftlm.training.runs import check_enough
from graftlm.training.search import with_best_rate
from graftlm.training.sharding import check_adapters, check_scheme, check_strategy
from graftlm.training.surroundings import check_agreement, join_processes
from graftlm.training.trainer import log


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as the second of two, before they know each other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


def test_one_process_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (processes.count(), processes.index(), processes.is_first()) == (1, 0, True)
    monkeypatch.setenv("RANK", "3")  # a scheduler's own, without a number of processes
    assert processes.is_first()
    processes.wait()


def test_only_the_first_speaks(second: None, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture) -> None:
    assert (processes.count(), processes.index(), processes.is_first()) == (2, 1, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with only_the_first_speaks():
            print("a notice")
            log.warning("a line")
            warnings.warn("a warning", stacklevel=1)
    assert capsys.readouterr().out == "" and not caplog.records
    os.environ["RANK"] = "0"
    with only_the_first_speaks():
        print("a notice")
        log.warning("a line")
    assert capsys.readouterr().out == "a notice\n" and [r.message for r in caplog.records] == ["a line"]


@pytest.mark.parametrize(
    "names",
    [("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"), ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "")],
)
def test_other_launchers_names(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in zip(names, "413", strict=True):
        monkeypatch.setenv(name or "UNUSED", value)
    assert (processes.count(), processes.index()) == (4, 1)
    monkeypatch.setenv("SLURM_JOB_ID", "20007")
    local = "3" if names[2] else "0"
    expected = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "20007"}
    assert processes._variables() == expected
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(UnsupportedError, match="several nodes: set MASTER_ADDR"):
        processes._variables()
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun under srun: its own word counts
    assert processes.count() == 1


def test_a_batch_script_of_slurm_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert processes.count() == 1


def test_one_process_where_several_were_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(UnsupportedError, match="asked for several processes and started one.*--processes"):
        join_processes()


def test_a_port_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        here = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (here | {"MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        PartialState._reset_state()
        with pytest.raises(
            UnsupportedError, match="2 processes of this run do not find each other at 127.0.0.1:.*MASTER_PORT"
        ):
            join_processes()
        PartialState._reset_state()


@pytest.mark.parametrize(
    ("strategy", "variable", "given", "together", "told"),
    [
        ("zero3", "", True, False, "zero3 is for a run that loads its own base.*would come back in parts"),
        ("zero3", "", False, True, "zero3.*runs that train together share one whole base"),
        ("zero2", "", False, True, "zero2 is for a run that trains alone"),
        ("ddp", "ACCELERATE_USE_DEEPSPEED", False, False, "DeepSpeed set by accelerate does not train.*zero2"),
        ("ddp", "ACCELERATE_USE_FSDP", False, False, "FSDP set by accelerate does not train"),
        ("fsdp2", "", True, False, "a loaded base would come back in parts"),
        ("fsdp2", "", False, True, "runs that train together share one whole base"),
    ],
)
def test_strategies_that_cannot_be(
    strategy: str, variable: str, given: bool, together: bool, told: str, second: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv(variable, "true")
    with pytest.raises(UnsupportedError, match=told):
        check_strategy(strategy, given, together)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_zero_says_what_it_needs(strategy: str, second: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=f"{strategy} needs DeepSpeed.*pip install deepspeed.*ddp does without"):
        check_strategy(strategy, False, False)


def test_a_quantised_base_is_not_shared_out(tmp_path: Path) -> None:
    base, _ = resolve_base(str(save_base(tmp_path, "llama", hidden_size=64)), quantization="nf4")
    for strategy in ("fsdp2", "zero3"):
        with pytest.raises(UnsupportedError, match=f"{strategy} cannot hold a base in nf4.*ddp"):
            check_scheme(scheme_of(base), strategy)


def test_adapters_that_are_not_shared_out() -> None:
    config = AdaLoraConfig(task_type="CAUSAL_LM", init_r=4, target_r=2, total_step=10, tinit=1, tfinal=1)
    with pytest.raises(UnsupportedError, match="shard_adapters: ADALORA chooses its ranks by whole matrices"):
        check_adapters(get_peft_model(build("llama"), config))
    check_adapters(get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM")))


def test_recipes_whose_strategy_contradicts_them() -> None:
    with pytest.raises(RecipeError, match="torch_compile and strategy fsdp2"):
        Recipe.from_dict({"training": {"strategy": "fsdp2", "torch_compile": True}})
    with pytest.raises(RecipeError, match="training.shard_adapters and strategy ddp: it is of strategy fsdp2"):
        Recipe.from_dict({"training": {"shard_adapters": True}})
    with pytest.raises(RecipeError, match="training.strategy: expected 'ddp', 'fsdp2'"):
        Recipe.from_dict({"training": {"strategy": "fsdp"}})


def test_more_processes_than_rows(second: None) -> None:
    rows = [{"input_ids": [1], "labels": [1]}]
    with pytest.raises(RecipeError, match="2 processes for 1 rows to train on"):
        check_enough(SimpleNamespace(train_rows=rows))  # type: ignore[arg-type]


def test_a_search_is_one_process(second: None) -> None:
    with pytest.raises(UnsupportedError, match="--budget.*one process, and 2 were started"):
        with_best_rate(Recipe.from_dict({"training": {"learning_rate": "search"}}), None, None, None, print)


def test_other_commands_are_one_process(second: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from graftlm import cli

    monkeypatch.setattr(cli, "OTHERS_WAIT", 0)
    result = CliRunner().invoke(cli.app, ["compare", "--data", "tweets"])
    assert result.exit_code == 2
    assert "Process 1:" in result.stderr and "graftlm compare runs in one process, and 2 were started" in result.stderr


GRAFTLM = [sys.executable, "-m", "graftlm"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_what_one_does(accumulation: int, tmp_path: Path) -> None:
    """Half of each batch a process: the same adapter and held-out loss, one table, one set of files."""
    save_base(tmp_path / "base")
    save_tweets(tmp_path / "tweets")
    training = {"epochs": 2, "learning_rate": 0.02, "logging_steps": 1, "threads": 1, "accumulation": accumulation}
    recipe = Recipe.from_dict(
        {"base": str(tmp_path / "base"), "data": {"source": str(tmp_path / "tweets")}, "output_dir": str(tmp_path / "two"),
         "training": training | {"batch_size": 2}, "method_options": {"lora_dropout": 0.0}}
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    launched = [*TORCHRUN, "-m", "graftlm", "train"] if accumulation == 1 else [*GRAFTLM, "train", "--processes", "2"]
    done = subprocess.run([*launched, str(tmp_path / "recipe.yaml")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Saved in") == done.stdout.count("held-out loss") == 1
    assert done.stderr.count("train loss") == 2  # a line an epoch

    alone = run(recipe.replace("training.batch_size=4", output_dir=str(tmp_path / "one")), quiet=True)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-4)
    written = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert written["metrics"]["loss"] == pytest.approx(alone.metrics["loss"], rel=1e-4)
    for key in ("eval_loss", "epoch_train_loss"):
        both = ([e[key] for e in history if key in e] for history in (written["history"], alone.history))
        assert next(both) == pytest.approx(next(both), rel=1e-4), key
    assert {p.name for p in (tmp_path / "two").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}


def test_processes_on_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from graftlm import cli

    for arguments, told in ((["--processes", "0"], "expected at least 1"),):
        result = CliRunner().invoke(cli.app, ["train", "--output", str(tmp_path / "out"), *arguments])
        assert result.exit_code == 2 and told in result.stderr and "--processes" in result.stderr
    assert not (tmp_path / "out").exists()


def test_processes_within_processes(second: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--processes 2, and 2 processes were started already"):
        launch([Recipe(output_dir=str(tmp_path))], 2, quiet=True)


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A recipe that trains for longer than any test, with a checkpoint every fifth step."""
    save_base(tmp_path / "base")
    save_tweets(tmp_path / "tweets")
    training = {
        "max_steps": 5000,
        "batch_size": 2,
        "threads": 1,
        "save_strategy": "steps",
        "interval": 5,
        "load_best": False,
    }
    recipe = Recipe.from_dict(
        {"base": str(tmp_path / "base"), "data": {"source": str(tmp_path / "tweets")}, "output_dir": str(tmp_path / "out"),
         "training": training}
    )  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return tmp_path


def begun(folder: Path, started: subprocess.Popen) -> None:
    """Wait for a checkpoint."""
    for _ in range(1200):
        if any(folder.glob("out/checkpoint-*/trainer_state.json")):
            return
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.1)
    raise AssertionError("no checkpoint in two minutes")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_once_and_any_number_of_processes_goes_on(number: signal.Signals, endless: Path) -> None:
    command = [*GRAFTLM, "train", str(endless / "recipe.yaml"), "--processes", "2"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun(endless, started)
    started.send_signal(number)
    out, errors = started.communicate(timeout=120)
    assert started.returncode and out.count("Stopped. The adapter so far is in") == 1, errors
    step = max(int(p.name.partition("-")[2]) for p in (endless / "out").glob("checkpoint-*"))
    assert (endless / "out" / "adapter_model.safetensors").is_file()
    for more, several in ((2, []), (4, ["--processes", "2"]), (6, [])):
        flags = ["--resume", "--quiet", "--set", f"training.max_steps={step + more}", *several]
        done = subprocess.run(
            [*GRAFTLM, "train", str(endless / "recipe.yaml"), *flags], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert json.loads((endless / "out" / "metrics.json").read_text())["history"][-1]["step"] == step + more


@pytest.mark.slow
def test_a_killed_process_ends_all_and_leaves_checkpoints(endless: Path) -> None:
    import psutil

    command = [*GRAFTLM, "train", str(endless / "recipe.yaml"), "--processes", "2"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begun(endless, started)
    workers = [p for p in psutil.Process(started.pid).children(recursive=True) if "RANK" in p.environ()]
    next(p for p in workers if p.environ()["RANK"] == "1").kill()
    _, errors = started.communicate(timeout=120)
    assert started.returncode == 128 + signal.SIGKILL
    assert "Process 1 was ended by SIGKILL" in errors and "--resume" in errors
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers)
    assert last_complete_checkpoint(endless / "out", []) is not None


@pytest.mark.slow
def test_a_mistake_is_told_as_by_one_process(endless: Path) -> None:
    command = [*GRAFTLM, "train", str(endless / "recipe.yaml"), "--processes", "2", "--set", "data.max_examples=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "2 processes for 1 rows to train on" in done.stderr
    assert "--resume" not in done.stderr and "Traceback" not in done.stderr


def differing(rank: int, port: int, place: Path, answers: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    join_processes()
    check_agreement({"recipe's seed": "1"})
    try:
        check_agreement({"recipe's seed": "1", "training rows": f"{4 + rank} of digest ab"})
    except UnsupportedError as error:
        answers.put(str(error))
    (place / "own" / str(rank)).mkdir(parents=True)
    check_shared(place)
    try:
        check_shared(place / "own" / str(rank))  # a folder of one name on machines that do not share it
    except UnsupportedError as error:
        answers.put(str(error))
    processes.leave()


def test_processes_that_differ_are_noticed(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    answers = context.Queue()
    started = [context.Process(target=differing, args=(rank, port, tmp_path, answers)) for rank in range(2)]
    for one in started:
        one.start()
    told = [answers.get(timeout=120) for _ in range(4)]
    for one in started:
        one.join(timeout=60)
    assert sum("training rows: 4 of digest ab in process 0, 5 of digest ab in process 1" in text for text in told) == 2
    assert sum("process 1 does not see what process 0 writes there" in text for text in told) == 2
    assert not [*tmp_path.rglob(".shared-*")]
