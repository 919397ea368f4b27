"""Joined accumulation, steps of a token budget, and the dtype that recipes choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from training_helpers import arguments, examples, losses, save_base, save_tweets, trained, uneven, wrapped

import graftlm
from graftlm.data import PackedRows, PackingCollator
from graftlm.errors import DataError, RecipeError
from graftlm.joint import stacked
from graftlm.training import Trainer, bases
from graftlm.training.joining import Joiner
from graftlm.training.recipes import Recipe, run


# -- accumulation --------------------------------------------------------------------------------------------------------
def fit(
    method: str, folder: Path, family: str = "llama", join: bool = True, tokens: int | None = None, **changes: Any
) -> Any:
    """Seven rows, one a step, four steps an update: the epoch's last update has three. Returns trainer and passes made."""
    model = wrapped(method, family)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "save_strategy": "no"} | changes
    trainer = Trainer(model, arguments(folder, **options), train_dataset=uneven(7))
    if tokens is not None:
        trainer.joiner = Joiner(tokens)
    if not join:
        trainer._may_join = lambda items: False  # type: ignore[method-assign]
    passes: list[int] = []
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    trainer.can = model.can_pack()  # tries things out before the count
    passes.clear()
    trainer.train()
    return trainer, len(passes)


@pytest.mark.parametrize(
    ("method", "family", "smoothing"),  # quick: every method on one family, with the smoothing in turn
    [
        pytest.param(method, *other, marks=[] if j == i % 3 else [pytest.mark.slow])
        for i, method in enumerate(("lora", "prompt", "p_tuning_mlp", "prefix", "bottleneck"))
        for j, other in enumerate((("llama", 0.0), ("bloom", 0.0), ("llama", 0.1)))
    ],
)
def test_joined_accumulation_takes_the_same_steps(method: str, family: str, smoothing: float, tmp_path: Path) -> None:
    plain, many = fit(method, tmp_path / "1", family, join=False, label_smoothing_factor=smoothing)
    ours, few = fit(method, tmp_path / "2", family, label_smoothing_factor=smoothing)
    assert (many - few) >= 9  # 14 rows in 4 updates
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-5)
    for key, value in trained(plain.model).items():
        torch.testing.assert_close(trained(ours.model)[key], value, atol=1e-5, rtol=1e-4)
    for name in ("epoch_train_loss", "train_tokens_per_second"):
        assert any(name in entry for entry in ours.state.log_history)
    sums = [[e["epoch_train_loss"] for e in x.state.log_history if "epoch_train_loss" in e] for x in (plain, ours)]
    assert sums[1] == pytest.approx(sums[0], abs=1e-5)


def test_a_joined_batch_stays_within_its_tokens(tmp_path: Path) -> None:
    plain, many = fit("lora", tmp_path / "1", join=False)
    ours, few = fit("lora", tmp_path / "2", tokens=12)
    assert 4 < few - 1 < many
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-5)


def test_models_that_cannot_pack_accumulate_as_ever(tmp_path: Path) -> None:
    plain, many = fit("lora", tmp_path / "1", "falcon", join=False)
    ours, same = fit("lora", tmp_path / "2", "falcon")
    assert many == same
    assert losses(ours) == losses(plain)


def test_batches_of_other_kinds_are_not_joined() -> None:
    joiner, rows = Joiner(), {k: v[None] for k, v in examples(1)[0].items()}
    assert joiner.add(rows, last=False) == []
    out = joiner.add(rows | {"token_type_ids": rows["labels"]}, last=False)
    assert [sorted(b) for b in out] == [["attention_mask", "input_ids", "labels"], sorted([*rows, "token_type_ids"])]
    assert joiner.waiting == []
    both = stacked([{k: v[:, :5] for k, v in rows.items()}, rows])
    assert both["input_ids"].shape == (2, 8)
    assert both["attention_mask"][0].tolist() == [1] * 5 + [0] * 3
    assert both["labels"][0, 5:].tolist() == [-100] * 3


def test_a_loss_of_ones_own_sees_every_batch_by_itself(tmp_path: Path) -> None:
    class Own(Trainer):
        sizes: list[int] = []

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self.sizes.append(len(inputs["input_ids"]))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Own(
        wrapped("lora", "llama"),
        arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, save_strategy="no"),
        train_dataset=uneven(7),
    )
    trainer.train()
    assert set(trainer.sizes) == {1}


def test_what_a_failed_run_left_waiting_is_dropped(tmp_path: Path) -> None:
    fresh, _ = fit("lora", tmp_path / "1")
    model = wrapped("lora", "llama")
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "save_strategy": "no"}
    trainer = Trainer(model, arguments(tmp_path / "2", **options), train_dataset=uneven(7))
    trainer.joiner.add({k: v[None] for k, v in examples(1)[0].items()}, last=False)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(fresh), abs=1e-6)


# -- packing -------------------------------------------------------------------------------------------------------------
class Rows(list):
    """A list of examples that answers for a column."""

    def __getitem__(self, key: Any) -> Any:
        return [row["input_ids"] for row in self] if key == "input_ids" else super().__getitem__(key)


def sequences(lengths: tuple[int, ...]) -> Rows:
    return Rows({"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in lengths)


def test_every_example_is_in_one_pack_within_the_budget() -> None:
    rows = sequences(tuple(range(1, 60)))
    packs = PackedRows(rows, tokens=100, seed=3)
    lengths = [sum(len(row["input_ids"]) for row in packs[i]) for i in range(len(packs))]
    assert max(lengths) <= 100
    assert sorted(len(row["input_ids"]) for i in range(len(packs)) for row in packs[i]) == list(range(1, 60))
    assert len(packs) <= 1.7 * (sum(lengths) / 100) + 1
    assert packs.packs == PackedRows(rows, tokens=100, seed=3).packs
    assert packs.packs != PackedRows(rows, tokens=100, seed=4).packs


def test_packs_that_cannot_be_made() -> None:
    with pytest.raises(DataError, match=r"60 tokens, more than a step's 50"):
        PackedRows(sequences((60, 3)), tokens=50)
    with pytest.raises(DataError, match="no examples"):
        PackedRows(Rows(), tokens=50)


@pytest.mark.parametrize("method", ["lora", "prompt", "p_tuning_mlp", "prefix", "bottleneck"])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_pack_trains_like_its_padded_rows(method: str, family: str) -> None:
    model = wrapped(method, family).train()
    rows = sequences((7, 3, 5))
    made = PackingCollator()([list(rows)])
    assert made["position_ids"].tolist() == [[*range(7), *range(3), *range(5)]]
    ids = torch.zeros(3, 7, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n], mask[i, :n], labels[i, 1:n] = torch.tensor(row["input_ids"]), 1, torch.tensor(row["labels"][1:])
    model.lean = False
    wanted = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    model.lean = True
    torch.testing.assert_close(model(**made).loss, wanted, atol=1e-5, rtol=1e-5)


def packing(folder: Path, base: Path, *overrides: str, **values: Any) -> Recipe:
    training = {"epochs": 3, "learning_rate": 0.02, "save_strategy": "no", "load_best": False, "threads": 1, "packing": True}
    start = {"base": str(base), "data": {"source": str(folder / "tweets")}, "training": training | {"tokens": 64}}
    return Recipe.from_dict(start | {"output_dir": str(folder / "out"), "overwrite": True} | values, overrides)


@pytest.mark.parametrize("method", ["lora", "prompt-tuning", "prefix-tuning"])
def test_packed_recipes_learn(method: str, tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_tweets(tmp_path / "tweets")
    few = run(packing(tmp_path, tmp_path / "base", "training.tokens=200", method=method), quiet=True)
    many = run(packing(tmp_path, tmp_path / "base", "training.tokens=32", method=method), quiet=True)
    assert few.metrics["loss"] < few.metrics["loss_before"]
    steps = [next(e["step"] for e in reversed(r.history) if "train_runtime" in e) for r in (few, many)]
    assert steps[0] < steps[1]


def test_recipes_that_cannot_pack(tmp_path: Path) -> None:
    save_tweets(tmp_path / "tweets")
    for family, told in (("falcon", "FalconForCausalLM gives other results"), ("t5", "decoder-only")):
        save_base(tmp_path / family, family)
        with pytest.raises(RecipeError, match=told):
            run(packing(tmp_path, tmp_path / family), quiet=True)


# -- dtype ---------------------------------------------------------------------------------------------------------------
def test_auto_dtype_is_bf16_for_large_bases_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save_base(tmp_path)
    found = []
    for has, large in ((False, 0), (True, 0), (True, 10**9)):
        monkeypatch.setattr(bases, "cpu_has_bf16", lambda has=has: has)
        monkeypatch.setattr(bases, "LARGE", large)
        found.append(bases.resolve_base(str(tmp_path), device="cpu")[0].dtype)
    assert found == [torch.float32, torch.bfloat16, torch.float32]


def test_a_bf16_recipe_trains_fp32_adapters(tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_tweets(tmp_path / "tweets")
    result = run(packing(tmp_path, tmp_path / "base", dtype="bf16"), quiet=True)
    assert result.metrics["loss"] < result.metrics["loss_before"]
    model = graftlm.get_peft_model(build("llama").bfloat16(), graftlm.LoraConfig(task_type="CAUSAL_LM"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
