"""AdaLoRA's penalty, its schedule, files with the ranks that are left, and further training from them, beside HF PEFT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import batch
from helpers import close, config, fresh, logits_of, randomise, state_of, still
from safetensors.torch import load_file
from test_parity import from_theirs, theirs

import graftlm
from graftlm.errors import AdapterError, CheckpointError, ConfigError

INPUTS = {k: v for k, v in batch("llama").items() if k != "labels"}


def settings(lib: Any, **changes: Any) -> Any:
    values = {"init_r": 6, "target_r": 2, "lora_alpha": 8, "total_step": 16, "tinit": 2, "tfinal": 5, "deltaT": 2}
    return lib.AdaLoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": "all-linear", **values, **changes})


def wrapped(**changes: Any) -> Any:
    torch.manual_seed(3)
    return graftlm.get_peft_model(still("llama"), settings(graftlm, **changes))


def train(model: Any, steps: range, rate: float = 0.03, optimiser: Any = None) -> list[float]:
    """Losses of steps with the schedule, called where HF PEFT has it."""
    optimiser = optimiser or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for step in steps:
        loss = model.train()(**batch("llama", seed=step % 4)).loss
        loss.backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def pair(**changes: Any) -> tuple[Any, Any]:
    """Ours and HF PEFT's with the same values."""
    mine, their = wrapped(**changes), theirs(still("llama"), settings(peft, **changes))
    peft.set_peft_model_state_dict(their, graftlm.get_peft_model_state_dict(mine))
    return mine, their


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_loss_has_hf_pefts_penalty(name: str) -> None:
    """In training; in evaluation it is the task's own."""
    mine = randomise(graftlm.get_peft_model(still(name), config("adalora", name)), scale=0.3)
    their = theirs(still(name), config("adalora", name, peft))
    peft.set_peft_model_state_dict(their, graftlm.get_peft_model_state_dict(mine))
    inputs = batch(name)
    got, wanted = (model.train()(**inputs) for model in (mine, their))
    close(got.loss, wanted.loss)
    close(got.logits, wanted.logits)
    for output in (got, wanted):
        output.loss.backward()
    gradients = {k.replace(".default", ""): p.grad for k, p in their.named_parameters() if p.requires_grad}
    found = {k.replace(".default", ""): p.grad for k, p in mine.named_parameters() if p.requires_grad}
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        close(found[key], gradient, 1e-4)
    penalty = mine.penalty(["default"]).item()
    assert penalty > 0.1
    close(mine.eval()(**inputs).loss, wanted.loss - penalty)
    with mine.train().disable_adapter():
        close(mine(**inputs).loss, still(name)(**inputs).loss)


@pytest.mark.parametrize("changes", [{}, {"deltaT": 1, "tfinal": 0, "beta1": 0.5, "beta2": 0.7}], ids=["phases", "plain"])
def test_twenty_losses_with_the_schedule(changes: dict[str, Any], tmp_path: Path) -> None:
    """As HF PEFT's, with the same ranks left; files read both ways."""
    mine, their = pair(**changes)
    assert train(mine, range(20)) == pytest.approx(train(their, range(20)), abs=1e-4)
    wanted = {k.replace(".default", ""): v for k, v in their.peft_config["default"].rank_pattern.items()}
    assert mine.peft_config["default"].rank_pattern == wanted
    layers = len(wanted)
    assert sum(map(sum, wanted.values())) == 2 * layers and len({sum(rows) for rows in wanted.values()}) > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their.save_pretrained(tmp_path / "theirs")
    mine.save_pretrained(tmp_path / "mine")
    a, b = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("mine", "theirs"))
    assert {k: v.shape for k, v in a.items()} == {k: v.shape for k, v in b.items()}
    stored = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert stored["rank_pattern"] == wanted and stored["total_step"] == 16
    expected = logits_of(mine.eval(), **INPUTS)
    close(logits_of(from_theirs(fresh("llama"), tmp_path / "mine"), **INPUTS), expected)
    got = graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / "mine")
    close(logits_of(got, **INPUTS), expected)
    assert {layer.r["default"] for layer in got.modules() if hasattr(layer, "lora_E")} == {sum(r) for r in wanted.values()}
    got.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[k], v) for k, v in a.items())
    assert not (tmp_path / "again" / "training_state.safetensors").exists()
    close(
        logits_of(graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / "theirs"), **INPUTS),
        logits_of(their.eval(), **INPUTS),
    )
    before = state_of(got)
    got.merge_adapter()
    close(logits_of(got, **INPUTS), expected, 2e-5)
    got.unmerge_adapter()
    assert all(torch.equal(before[k], v) for k, v in got.state_dict().items())


def test_a_file_has_every_triplet_that_acts(tmp_path: Path) -> None:
    """Between two allocations some come back; what is saved computes what the model does."""
    model = wrapped(deltaT=4)
    train(model, range(8))  # the last allocation is that of step 4
    kept = {k: list(v) for k, v in model.peft_config["default"].rank_pattern.items()}
    model.save_pretrained(tmp_path)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(map(sum, pattern.values())) > sum(map(sum, kept.values()))
    wanted = logits_of(model.eval(), **INPUTS)
    close(logits_of(graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path), **INPUTS), wanted)
    close(logits_of(from_theirs(fresh("llama"), tmp_path), **INPUTS), wanted)


@pytest.mark.parametrize("stop", [3, 7, 13])
def test_training_goes_on_exactly(stop: int, tmp_path: Path) -> None:
    """From a directory: whole factors, ratings and what is kept come from the training state (the optimizer is one without
    a state of its own)."""

    def plain(model: Any) -> Any:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)

    whole, cut = wrapped(), wrapped()
    losses = train(whole, range(18), optimiser=plain(whole))
    assert train(cut, range(stop), optimiser=plain(cut)) == losses[:stop]
    cut.save_pretrained(tmp_path)
    again = graftlm.PeftModel.from_pretrained(still("llama"), tmp_path, is_trainable=True)
    assert train(again, range(stop, 18), optimiser=plain(again)) == losses[stop:]
    assert again.peft_config["default"].rank_pattern == whole.peft_config["default"].rank_pattern
    (tmp_path / "training_state.safetensors").unlink()  # as HF PEFT writes it: from the ranks that are left
    bare = graftlm.PeftModel.from_pretrained(still("llama"), tmp_path, is_trainable=True)
    close(logits_of(bare.eval(), **INPUTS), logits_of(cut.eval(), **INPUTS))
    train(bare, range(3))


def test_a_training_state_that_does_not_fit(tmp_path: Path) -> None:
    model = wrapped()
    train(model, range(3))
    model.save_pretrained(tmp_path)
    other = wrapped(init_r=5)
    method = other.methods["default"]
    before = state_of(other)
    with pytest.raises(CheckpointError, match="missing or of another shape. Was it trained with init_r=5"):
        method.load_training(other, load_file(tmp_path / "training_state.safetensors"))
    assert all(torch.equal(before[k], v) for k, v in other.state_dict().items())


def test_each_adapter_has_its_own_schedule() -> None:
    """Two that are active together (HF PEFT trains one)."""
    model = wrapped()
    model.add_adapter("other", settings(graftlm, target_r=1, total_step=10, tinit=0, tfinal=2))
    model.set_adapter(["default", "other"])
    train(model, range(18))
    left = {n: sum(map(sum, model.peft_config[n].rank_pattern.values())) for n in ("default", "other")}
    layers = len(model.peft_config["other"].rank_pattern)
    assert left == {"default": 2 * layers, "other": layers}


def test_what_a_schedule_needs() -> None:
    for changes in ({"tinit": 9, "tfinal": 7}, {"total_step": 3}):
        with pytest.raises(ConfigError, match="no step is left in which ranks could fall"):
            settings(graftlm, **changes)
    for changes, text in (
        ({"use_dora": True}, "use_dora=True"), ({"use_rslora": True}, "use_rslora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"), ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{text}.*AdaLoRA does not support it"):
            settings(graftlm, **changes)
    with pytest.raises(ConfigError, match="orth_reg_weight=-1"):
        settings(graftlm, orth_reg_weight=-1)
    with pytest.warns(UserWarning, match="`r` is not used in AdaLora and will be ignored"):
        settings(graftlm, r=4)
    endless = wrapped(total_step=None)
    with pytest.raises(ConfigError, match="needs total_step"):
        endless.update_and_allocate(0)
    with pytest.raises(AdapterError, match="has no gradients: call update_and_allocate after"):
        wrapped().update_and_allocate(0)
    with pytest.raises(AdapterError, match=r"update_and_allocate\(11\) ends a schedule"):
        wrapped().update_and_allocate(11)
    plain = graftlm.get_peft_model(fresh("llama"), config("lora", "llama"))
    with pytest.raises(AdapterError, match="none of default is AdaLoRA"):
        plain.base_model.update_and_allocate(0)
    with pytest.raises(AdapterError, match="only LoRA adapters can be combined"):
        wrapped().add_weighted_adapter(["default"], [1.0], "sum")


def test_a_budget_over_all_ranks_keeps_them() -> None:
    model = wrapped(target_r=9)
    train(model, range(12))
    assert all(all(rows) for rows in model.peft_config["default"].rank_pattern.values())


def test_without_total_step_the_file_has_one_for_hf_peft(tmp_path: Path) -> None:
    model = randomise(wrapped(total_step=None)).eval()
    model.save_pretrained(tmp_path)
    close(logits_of(from_theirs(fresh("llama"), tmp_path), **INPUTS), logits_of(model, **INPUTS))
    assert graftlm.PeftConfig.from_pretrained(tmp_path).total_step is None


@pytest.mark.parametrize("options", [{"trainable_token_indices": [1]}, {"target_parameters": ["w"]}, {"lora_bias": True}])
def test_fields_of_lora_that_have_no_form_here(options: dict) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.*AdaLoRA does not support it"):
        graftlm.AdaLoraConfig(**options)
