"""LoRA's options over int8 and NF4: beside HF PEFT, and what cannot be done."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from families import batch
from helpers import close, logits_of, randomise, state_of, unpacked
from test_quantized import folders, load  # noqa: F401  (a fixture)

import graftlm
from graftlm.errors import UnsupportedError

PLAIN = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
CALL = [11, 12]
OPTIONS: dict[str, dict[str, Any]] = {
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "fc1"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "replicated": {"layer_replication": [[0, 1], [0, 2]]},
    "invoked": {"alora_invocation_tokens": CALL},
}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    found = batch(name)
    found["input_ids"][:2, 2:4] = torch.tensor(CALL)
    return found


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("option", OPTIONS)
def test_as_hf_peft(folders, option: str, scheme: str, tmp_path: Path) -> None:  # noqa: F811
    name = "opt" if option == "lora_bias" else "llama"
    base = load(folders[name], scheme)
    model = randomise(graftlm.get_peft_model(base, graftlm.LoraConfig(**{**PLAIN, **OPTIONS[option]})), scale=0.3).eval()
    inputs = inputs_of(name)
    wanted = logits_of(model, **inputs)
    model.save_pretrained(tmp_path)
    if option == "orthogonal" or (option, scheme) == ("replicated", "int8"):  # HF PEFT fails, or quantises what is quantised
        plain = graftlm.PeftModel.from_pretrained(load(folders[name], None), tmp_path)
        close(wanted, logits_of(plain, **inputs), (0.2 if scheme == "int8" else 0.5) * wanted.abs().max().item())
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            their = peft.PeftModel.from_pretrained(unpacked(load(folders[name], scheme)), tmp_path).eval()
        close(wanted, logits_of(their, **inputs), 1e-4 * max(1.0, wanted.abs().max().item()))
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 1e-4 for _, p in model.adapter_parameters("default"))
    if option in ("lora_bias", "orthogonal"):
        before = state_of(base)
        model.eval().merge_adapter()
        close(logits_of(model, **inputs), wanted, 0.06 * wanted.abs().max().item())
        model.unmerge_adapter()
        assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_experts_beside_quantised_layers(scheme: str, tmp_path: Path) -> None:
    """bitsandbytes quantises linear layers and leaves experts as they are."""
    from test_lora_experts import SIZES, settings

    torch.manual_seed(0)
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 64}
    plain = t.MixtralForCausalLM(t.MixtralConfig(**sizes, num_local_experts=4, sliding_window=None))
    plain.save_pretrained(tmp_path / "base")
    model = randomise(graftlm.get_peft_model(load(tmp_path / "base", scheme), settings()), scale=0.3).eval()
    model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their = peft.PeftModel.from_pretrained(unpacked(load(tmp_path / "base", scheme)), tmp_path / "adapter").eval()
    inputs = batch("llama")
    wanted = logits_of(model, **inputs)
    close(wanted, logits_of(their, **inputs), 1e-4)
    assert any(
        "experts" in name and p.dtype is torch.float32 for name, p in model.base.named_parameters() if not p.requires_grad
    )
    model.merge_adapter()
    close(logits_of(model, **inputs), wanted, 0.06 * wanted.abs().max().item())
    model.unmerge_adapter()
    close(logits_of(model, **inputs), wanted, 0)


def test_starts_from_data_need_the_weights(folders) -> None:  # noqa: F811
    base = load(folders["llama"], "nf4")
    for init, run in (("corda", graftlm.preprocess_corda), ("lora_ga", graftlm.preprocess_loraga)):
        with pytest.raises(UnsupportedError, match="does not support quantized models: .* is 4bit"):
            run(base, graftlm.LoraConfig(**PLAIN, init_lora_weights=init), lambda: None)


def test_eva_on_a_quantised_base(folders) -> None:  # noqa: F811
    base = load(folders["llama"], "nf4")
    before = logits_of(base, **batch("llama"))
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(**PLAIN, init_lora_weights="eva"))
    graftlm.initialize_lora_eva_weights(model, [batch("llama", rows=8, length=16, seed=s) for s in range(2)])
    close(logits_of(model.eval(), **batch("llama")), before, 1e-5)
    assert model.peft_config["default"].rank_pattern
