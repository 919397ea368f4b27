"""AdaLoRA's schedule in Trainers: by itself in ours, by a callback in transformers'; resumed, and beside other runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from families import build
from test_together import losses as logged
from test_together import one_way, recipe, tiny_base, weights  # noqa: F401  (fixtures)
from training_helpers import Kill, arguments, equal, examples, losses, trained

import graftlm
from graftlm.errors import ConfigError
from graftlm.training import RankSchedule, Together, Trainer, run


def model_of(**changes: Any) -> Any:
    base = build("bloom")
    torch.manual_seed(3)
    values = {"init_r": 6, "target_r": 2, "target_modules": "all-linear", "tfinal": 2, **changes}
    return graftlm.get_peft_model(base, graftlm.AdaLoraConfig(task_type="CAUSAL_LM", **values))


def trainer_of(folder: Path, cls: type = Trainer, model: Any = None, **changes: Any) -> t.Trainer:
    callbacks = [] if cls is Trainer else [RankSchedule()]
    model = model_of() if model is None else model
    return cls(model, arguments(folder, **changes), train_dataset=examples(), callbacks=callbacks)


def ranks(model: Any) -> dict[str, list[bool]]:
    return model.peft_config["default"].rank_pattern


def test_our_trainer_a_plain_one_and_a_plain_loop_are_the_same(tmp_path: Path) -> None:
    own, plain = trainer_of(tmp_path / "own"), trainer_of(tmp_path / "plain", t.Trainer)
    own.train()
    plain.train()
    assert losses(own) == losses(plain)
    assert equal(trained(own.model), trained(plain.model))
    assert ranks(own.model) == ranks(plain.model)
    assert sum(map(sum, ranks(own.model).values())) == 2 * len(ranks(own.model))
    assert own.model.peft_config["default"].total_step == 6

    model, seen = model_of(total_step=6), []
    rows = own.get_train_dataloader()
    torch.manual_seed(7)
    optimiser, step = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0), 0
    t.set_seed(7)
    for epoch in range(2):
        rows.set_epoch(epoch)
        for batch in rows:
            for group in optimiser.param_groups:
                group["lr"] = 1e-2 * (6 - step) / 6
            loss = model.train()(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            model.update_and_allocate(step)
            optimiser.zero_grad()
            seen.append(loss.item())
            step += 1
    assert len(seen) == 6 and ranks(model).keys() == ranks(own.model).keys()
    assert sum(map(sum, ranks(model).values())) == 2 * len(ranks(model))


@pytest.mark.parametrize("cls", [t.Trainer, Trainer], ids=["plain", "own"])
@pytest.mark.parametrize("at", [2, 5])  # among the allocations; when they are over
def test_interrupted_equals_uninterrupted(cls: type, at: int, tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", cls)
    whole.train()
    killed = trainer_of(tmp_path / "cut", cls)
    killed.add_callback(Kill(at))
    with pytest.raises(RuntimeError, match="killed"):
        killed.train()
    resumed = trainer_of(tmp_path / "cut", cls)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert equal(trained(resumed.model), trained(whole.model))
    assert ranks(resumed.model) == ranks(whole.model)


def test_beside_another_adapter_it_resumes_as_well(tmp_path: Path) -> None:
    """Then a checkpoint's `model.safetensors` has the parameters of all, and AdaLoRA's ratings."""

    def two() -> Any:
        model = model_of()
        model.add_adapter("other", graftlm.LoraConfig(r=2))
        model.set_adapter(["default", "other"])
        return model

    whole = trainer_of(tmp_path / "whole", model=two())
    whole.train()
    killed = trainer_of(tmp_path / "cut", model=two())
    killed.add_callback(Kill(3))
    with pytest.raises(RuntimeError, match="killed"):
        killed.train()
    resumed = trainer_of(tmp_path / "cut", model=two())
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert equal(trained(resumed.model), trained(whole.model))
    assert ranks(resumed.model) == ranks(whole.model)


def test_the_best_checkpoint_is_loaded(tmp_path: Path) -> None:
    trainer = Trainer(
        model_of(), arguments(tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=0.3),
        train_dataset=examples(), eval_dataset=examples(4, seed=9),
    )  # fmt: skip
    trainer.train()
    best = min(e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)
    trainer.save_adapter()
    loaded = graftlm.PeftModel.from_pretrained(build("bloom"), tmp_path)
    assert Trainer(loaded, arguments(tmp_path), eval_dataset=examples(4, seed=9)).evaluate()["eval_loss"] == pytest.approx(
        best, abs=1e-5
    )


def test_batches_of_one_update_have_a_penalty_each(tmp_path: Path) -> None:
    """As with HF PEFT, whose model adds it to every loss; they are not joined to one packed batch."""
    own, plain = (
        trainer_of(tmp_path / cls.__module__, cls, gradient_accumulation_steps=2, per_device_train_batch_size=2)
        for cls in (Trainer, t.Trainer)
    )
    own.train()
    plain.train()
    assert losses(own) == pytest.approx(losses(plain), abs=1e-6)


def test_schedules_that_do_not_end_are_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="ranks come to their ends at step 48 .*training ends at step 6"):
        trainer_of(tmp_path, model=model_of(total_step=50)).train()
    with pytest.raises(ConfigError, match="no step is left in which ranks could fall"):
        trainer_of(tmp_path, model=model_of(tinit=5)).train()


@pytest.mark.slow
def test_runs_together_have_schedules_of_their_own(tmp_path: Path) -> None:
    def runs(folder: Path) -> list[Any]:
        small = {"target_modules": ["query_key_value"], "lora_dropout": 0.0}
        return [
            recipe(folder, "a", "adalora", {**small, "init_r": 6, "target_r": 3}, max_steps=8),
            recipe(folder, "b", "adalora", {**small, "init_r": 4, "target_r": 1, "tfinal": 2}, max_steps=6, seed=3),
            recipe(folder, "lora", options={"r": 4}),
            recipe(folder, "miss", "miss", {"r": 8}),
            recipe(folder, "oft", "oft", {"oft_block_size": 16}, seed=2),
            recipe(folder, "boft", "boft", {"boft_n_butterfly_factor": 2}, batch_size=3),
        ]

    for one in runs(tmp_path / "alone"):
        run(one, quiet=True)
    together = Together(quiet=True)
    for one in runs(tmp_path / "together"):
        together.add(one)
    outcomes = together.run()
    assert [o.error for o in outcomes] == [None] * len(outcomes)
    assert together.passes["joint"] >= 5
    for outcome in outcomes:
        alone, folder = tmp_path / "alone" / Path(outcome.recipe.output_dir).name, Path(outcome.recipe.output_dir)
        for key, value in weights(alone).items():
            torch.testing.assert_close(weights(folder)[key], value, atol=1e-5, rtol=1e-5)
        assert logged(folder) == pytest.approx(logged(alone), rel=1e-3, abs=1e-5)
    for name, total in (("a", 3 * 8), ("b", 8)):
        stored = json.loads((tmp_path / "together" / name / "adapter_config.json").read_text())
        assert sum(map(sum, stored["rank_pattern"].values())) == total
