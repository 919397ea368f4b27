"""transformers' own way with adapters, under `as_peft`: `load_adapter`, `add_adapter` and their like, without a wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import graftlm

IDS = torch.tensor([[5, 6, 7, 8]])
METHODS: dict[str, Any] = {
    "lora": lambda: graftlm.LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    ),
    "ia3": lambda: graftlm.IA3Config(task_type="CAUSAL_LM", init_ia3_weights=False),
    "loha": lambda: graftlm.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_weights=False),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def base(tiny: Path) -> Any:
    return t.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32").eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_adapter_is_loaded_switched_saved_and_deleted(
    as_peft: None, tiny: Path, tmp_path: Path, base: Any, method: str
) -> None:
    wrapper = graftlm.get_peft_model(t.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32"), METHODS[method]()).eval()
    wrapper.save_pretrained(tmp_path / "adapter")
    plain, expected = logits(base), logits(wrapper)
    base.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(base), expected)
    assert not torch.allclose(plain, expected, atol=1e-4)
    base.disable_adapters()
    torch.testing.assert_close(logits(base), plain)
    base.enable_adapters()
    base.add_adapter(METHODS["lora"](), "second")
    assert base.active_adapters() == ["second"] and not torch.allclose(logits(base), expected, atol=1e-4)
    base.set_adapter("default")
    torch.testing.assert_close(logits(base), expected)
    base.delete_adapter("second")
    assert list(base.peft_config) == ["default"]

    base.save_pretrained(tmp_path / "again")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in (tmp_path / "again").iterdir()}
    for folder in ("adapter", "again"):  # transformers reads the base's name from the adapter's configuration
        loaded = t.AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="float32").eval()
        torch.testing.assert_close(logits(loaded), expected)


def test_a_trainer_trains_what_add_adapter_added(as_peft: None, tmp_path: Path, base: Any) -> None:
    before = logits(base)
    base.add_adapter(graftlm.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.testing.assert_close(logits(base), before)  # it starts at zero
    args = t.TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.1, save_strategy="no",
        dataloader_pin_memory=False,
    )  # fmt: skip
    t.Trainer(base, args, train_dataset=[{"input_ids": IDS[0], "labels": IDS[0]}] * 4).train()
    assert {n for n, p in base.named_parameters() if p.requires_grad} == {
        n for n, _ in base.named_parameters() if "lora_" in n
    }
    assert not torch.allclose(logits(base.eval()), before, atol=1e-4)
    base.disable_adapters()
    torch.testing.assert_close(logits(base), before)
