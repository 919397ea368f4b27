"""Memory by rank: what is shared out, against what `fully_shard` would hold, and against two real processes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from distributed_runs import can_run, in_two_processes
from families import VOCAB
from training_helpers import save_base, save_tweets

from graftlm import plan, processes
from graftlm.errors import PlanError, UnsupportedError
from graftlm.planning import Plan
from graftlm.planning.ranks import ranks
from graftlm.training import Recipe, run
from graftlm.training.sharding import IN_PARTS

CONFIG = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 8, "vocab_size": VOCAB,
}  # fmt: skip
BLOCK = 4 * (4 * 1024 * 1024 + 3 * 1024 * 4096 + 2 * 1024)  # bytes


def recipe(strategy: str, **others: Any) -> Recipe:
    training = {"strategy": strategy, "batch_size": 2, "max_steps": 3}
    return Recipe.from_dict({"dtype": "fp32", "training": training} | others)


@pytest.fixture(scope="module")
def planned() -> dict[str, Plan]:
    config = t.LlamaConfig(**CONFIG)
    return {s: plan(recipe(s), config=config, rows=40, length=16, device="h100") for s in ("ddp", "fsdp2")}


def test_what_each_rank_holds(planned: dict[str, Plan]) -> None:
    config, one = t.LlamaConfig(**CONFIG), planned["ddp"].step
    ddp = ranks(planned["ddp"], 8)
    assert (ddp.base, ddp.gathered, ddp.adapter) == (one.base, 0, one.adapter)
    assert ddp.exchange == one.gradients == ddp.exchanged_bytes
    assert ddp.peak_bytes == planned["ddp"].peak_bytes + one.gradients  # DDP's buckets
    parts = ranks(planned["fsdp2"], 8, config)
    assert parts.base == one.base - 6 * BLOCK + 6 * BLOCK // 8
    assert parts.gathered == 3 * BLOCK
    assert parts.exchanged_bytes == one.gradients + 2 * 6 * BLOCK * 7 // 8
    assert parts.adapter == one.adapter and parts.peak_bytes < ddp.peak_bytes
    both = ranks(replace(planned["fsdp2"], recipe=recipe("fsdp2").replace("training.shard_adapters=true")), 8, config)
    assert (both.base, both.exchanged_bytes > parts.exchanged_bytes) == (parts.base, True)
    assert both.gradients == both.adapter == one.adapter // 8 and both.optimizer == one.optimizer // 8
    uneven = ranks(planned["fsdp2"], 3, config)  # 1024 rows in three: parts of 342, filled up
    assert uneven.base > one.base - 6 * BLOCK + 6 * BLOCK // 3
    assert ranks(planned["fsdp2"], 1, config).base == one.base
    zero = ranks(replace(planned["ddp"], recipe=recipe("zero2")), 8, config)
    assert (zero.base, zero.adapter, zero.gradients) == (one.base, one.adapter, one.gradients)
    assert zero.optimizer == (one.optimizer + one.adapter) // 8 and zero.peak_bytes < ddp.peak_bytes
    assert zero.exchanged_bytes == one.gradients + one.adapter * 7 // 8
    three = ranks(replace(planned["ddp"], recipe=recipe("zero3")), 8, config)
    assert (three.base, three.gathered, three.optimizer) == (parts.base, parts.gathered, zero.optimizer)
    assert three.exchanged_bytes == zero.exchanged_bytes + 2 * 6 * BLOCK * 7 // 8


def test_what_cannot_be_planned(planned: dict[str, Plan]) -> None:
    with pytest.raises(PlanError, match="--processes 0: expected at least 1"):
        ranks(planned["ddp"], 0)
    with pytest.raises(PlanError, match="41 processes for 40 rows"):
        ranks(planned["ddp"], 41)
    quantised = plan(recipe("fsdp2", quantization="nf4"), rows=8, length=8, device="h100")
    with pytest.raises(UnsupportedError, match="fsdp2 cannot hold a base in nf4.*ddp"):
        ranks(quantised, 2)
    with pytest.raises(UnsupportedError, match="strategy: zero2: ADALORA chooses its ranks.*ddp, or fsdp2"):
        ranks(plan(recipe("zero2", method="adalora"), rows=8, length=8, device="h100"), 2)


def test_ranks_on_the_command_line() -> None:
    from typer.testing import CliRunner

    from graftlm import cli

    words = ["plan", "--rows", "8", "--length", "8", "--device", "h100", "--processes", "2", "--strategy", "fsdp2"]
    found = CliRunner().invoke(cli.app, words)
    text = " ".join(found.stdout.split())
    assert found.exit_code == 0, found.stderr
    assert "2 processes, fsdp2: rank 0 to 1, each base" in text and "Peak of each process" in text
    refused = CliRunner().invoke(cli.app, [*words, "--compare"])
    assert refused.exit_code == 2 and "--processes is of a plain plan" in refused.stderr


def process(rank: int, port: int, folder: Path) -> None:
    """One of two processes: a run, and what the first of them takes while it trains."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    found = run(Recipe.from_yaml(folder / "recipe.yaml"), quiet=True)
    if processes.is_first():
        (folder / "peak.json").write_text(json.dumps(found.metrics["peak_memory_bytes"]), encoding="utf-8")
    processes.leave()


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_two_processes_take_what_is_planned(strategy: str, tmp_path: Path) -> None:
    if not can_run(strategy):
        pytest.skip("DeepSpeed is not installed")
    save_base(tmp_path / "base", "llama", **CONFIG | {"num_hidden_layers": 12})
    save_tweets(tmp_path / "tweets", train=40)
    own = recipe(
        strategy, base=str(tmp_path / "base"), data={"source": str(tmp_path / "tweets")}, output_dir=str(tmp_path / "out")
    ).replace("training.save_strategy=no", "training.eval_strategy=no", "training.load_best=false")
    (tmp_path / "recipe.yaml").write_text(own.to_yaml(), encoding="utf-8")
    planned = plan(own)
    found = ranks(planned, 2)
    in_two_processes(process, tmp_path)
    measured = json.loads((tmp_path / "peak.json").read_text(encoding="utf-8"))
    held = found.base + found.gathered + found.adapter + found.gradients + found.optimizer + found.exchange
    assert measured == pytest.approx(planned.process_bytes + held + found.activations, rel=0.15), found
    assert strategy not in IN_PARTS or found.base < 0.6 * planned.step.base
