"""LLaMA-Adapter: HF PEFT's files, logits and losses; the queries that it reads; mixed, packed, quantised, generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import CAUSAL, ENCODERS, batch, build
from helpers import attach, close, config, fresh, logits_of, padded, randomise, rows, state_of, still, twenty_steps, unpacked
from test_parity import both_ways, from_theirs, theirs
from test_quantized import folders, load  # noqa: F401  (a fixture)
from torch import nn
from transformers import LlamaForSequenceClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bloom.modeling_bloom import BloomAttention

import graftlm
from graftlm.errors import ConfigError, TargetError, UnsupportedError
from graftlm.methods.adaption_prompt import FAMILIES, AdaptionPrompt

THEIRS = ("llama", "mistral", "gpt2")
OURS = (*THEIRS, "qwen2", "qwen3", "gemma3", "bloom")


# -- beside HF PEFT ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("layers", [1, 2])
def test_files_both_ways(name: str, layers: int, tmp_path: Path) -> None:
    def settings(lib: Any) -> Any:
        return lib.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=layers)

    both_ways(lambda: fresh(name), settings, batch(name), tmp_path)


@pytest.mark.parametrize("name", THEIRS)
def test_twenty_losses(name: str) -> None:
    losses: dict[str, list[float]] = {}
    for library in (graftlm, peft):
        torch.manual_seed(3)
        model = (theirs if library is peft else graftlm.get_peft_model)(still(name), config("adaption", name, library))
        losses[library.__name__] = twenty_steps(model, lambda step: batch(name, seed=step % 4), 0.03)
    assert losses["graftlm"] == pytest.approx(losses["peft"], abs=1e-4)
    assert sum(losses["graftlm"][-4:]) < sum(losses["graftlm"][:4])


def test_a_config_of_theirs_is_ours() -> None:
    mine, their = (lib.AdaptionPromptConfig(adapter_len=3, adapter_layers=2) for lib in (graftlm, peft))
    assert mine.is_adaption_prompt and their.is_adaption_prompt
    assert not set(their.to_dict()) - set(mine.to_dict()) - {"peft_version"}


# -- what it reads -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OURS)
def test_a_gate_at_zero_changes_nothing(name: str) -> None:
    model = graftlm.get_peft_model(fresh(name), config("adaption", name)).eval()
    assert torch.equal(logits_of(model, **batch(name)), logits_of(fresh(name), **batch(name)))
    randomise(model)
    assert (logits_of(model, **batch(name)) - logits_of(fresh(name), **batch(name))).abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in OURS if n != "bloom"])
def test_the_queries_are_those_of_the_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read from the layers against what the attention function gets."""
    seen: list[torch.Tensor] = []
    read: list[torch.Tensor] = []

    def noted(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.transpose(1, 2))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)

    plain = AdaptionPrompt.forward

    def kept(self: Any, module: Any, family: Any, q: torch.Tensor) -> torch.Tensor:
        read.append(q)
        return plain(self, module, family, q)

    monkeypatch.setattr(AdaptionPrompt, "forward", kept)
    ALL_ATTENTION_FUNCTIONS.register("noted", noted)
    model = graftlm.get_peft_model(build(name), config("adaption", name)).eval()
    model.base.set_attn_implementation("noted")
    logits_of(model, **padded(rows(name), "left"))
    assert len(seen) == len(read) == 2
    for mine, own in zip(read, seen, strict=True):
        close(mine, own, 1e-6)


def test_the_queries_of_bloom() -> None:
    base = fresh("bloom")
    module = next(m for m in base.modules() if isinstance(m, BloomAttention))
    fused = module.query_key_value(torch.randn(2, 3, 32))
    close(FAMILIES["bloom"].read(module, fused, {}), module._reshape(fused)[0].transpose(1, 2))
    prompt = torch.randn(5, 32)
    _, keys, values = module._reshape(module.query_key_value(prompt)[None])
    mine = FAMILIES["bloom"].keys(module, prompt)
    for got, wanted in zip(mine, (keys, values), strict=True):
        close(got, wanted[0].transpose(0, 1))


def test_the_formula() -> None:
    """Against the paper's equation, written out."""
    model = attach("llama", "adaption")
    module = model.base.model.layers[1].self_attn
    prompt = model.prompt_encoder["default"]["model/layers/1/self_attn"]
    q = torch.randn(2, 3, 4, 8)
    k, v = (getattr(module, n)(prompt.adaption_prompt[0]).view(3, 2, 8) for n in ("k_proj", "v_proj"))
    wanted = torch.zeros(2, 3, 4, 8)
    for b, t, h in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(4)).tolist():
        weights = torch.softmax(k[:, h // 2] @ q[b, t, h] / 8**0.5, dim=0)
        wanted[b, t, h] = prompt.adaption_gate * (weights @ v[:, h // 2])
    close(prompt(module, FAMILIES["llama"], q), module.o_proj(wanted.flatten(2)))


def test_an_output_layer_with_a_bias() -> None:
    """HF PEFT would add it a second time."""
    model = graftlm.get_peft_model(build("llama", attention_bias=True), config("adaption", "llama")).eval()
    wanted = logits_of(build("llama", attention_bias=True), **batch("llama"))
    close(logits_of(model, **batch("llama")), wanted, 1e-6)


# -- rows, compositions, generation ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OURS)
def test_mixed_rows(name: str) -> None:
    model = attach(name, "adaption")
    model.add_adapter("short", graftlm.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1))
    for i, method in enumerate(("short", "lora", "prompt", "prefix")):
        if method != "short":
            model.add_adapter(method, config(method, name))
        model.set_adapter(method)
        randomise(model, seed=i, scale=0.3)
    names = ["default", "short", ["default", "short"], "__base__", ["lora", "default", "prompt"], ["prefix", "short"]]
    inputs = padded(rows(name, (7, 4, 5, 6, 3, 8)), "left")
    model.eval()
    got = logits_of(model, **inputs, adapter_names=names)
    for i, row in enumerate(names):
        own = {k: v[i : i + 1] for k, v in inputs.items()}
        close(got[i, -3:], logits_of(model, **own, adapter_names=[row])[0, -3:], 3e-5)
    short = {k: v[:, -6:] for k, v in inputs.items()}
    mixed = model.generate(**short, adapter_names=names, max_new_tokens=4, do_sample=False)
    for i, row in enumerate(names):
        own = {k: v[i : i + 1] for k, v in short.items()}
        alone = model.generate(**own, adapter_names=[row], max_new_tokens=4, do_sample=False)
        assert torch.equal(mixed[i], alone[0])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_packed_and_mixed_training_gives_the_padded_gradients(name: str) -> None:
    model = graftlm.get_peft_model(still(name), config("adaption", name))
    model.add_adapter("other", config("adaption", name))
    model.add_adapter("lora", config("lora", name))
    model.set_adapter(["default", "other", "lora"])
    randomise(model)
    inputs = batch(name, rows=4)
    inputs["attention_mask"][1, 5:] = 0
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    names = ["default", "other", ["default", "other"], ["lora", "default"]]
    found = []
    for lean in (True, False):
        model.lean = lean
        model.zero_grad()
        model.train()(**inputs, adapter_names=names).loss.backward()
        found.append([p.grad.clone() for n in model.methods for _, p in model.adapter_parameters(n)])
        assert all(g.abs().sum() > 0 for g in found[-1])
    for mine, plain in zip(*found, strict=True):
        close(mine, plain)


def test_activation_checkpointing() -> None:
    found = []
    for checkpoints in (False, True):
        model = attach("llama", ("adaption", "lora"), base=still("llama"))
        if checkpoints:
            model.gradient_checkpointing_enable()
        model.train()(**batch("llama")).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*found, strict=True):
        close(one, other)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_on_a_quantised_base(folders, scheme, tmp_path):  # noqa: F811
    base = load(folders["llama"], scheme)
    model = randomise(graftlm.get_peft_model(base, config("adaption", "llama")), scale=0.3).eval()
    inputs = batch("llama")
    wanted = logits_of(model, **inputs)
    model.save_pretrained(tmp_path)
    close(logits_of(unpacked(from_theirs(load(folders["llama"], scheme), tmp_path)), **inputs), wanted, 1e-4)
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in model.adapter_parameters("default"))


@pytest.mark.parametrize("method", ["adaption", "pfeiffer"])
def test_deleting_one_leaves_the_others_at_work(method: str) -> None:
    model = attach("llama", method)
    model.add_adapter("other", config(method, "llama"))
    model.set_adapter("other")
    randomise(model, seed=5, scale=0.5).eval()
    wanted = logits_of(model, **batch("llama"))
    model.delete_adapter("default")
    close(logits_of(model, **batch("llama")), wanted, 0)
    before = state_of(fresh("llama"))
    assert state_of(model.unload()).keys() == before.keys()


def test_a_head_that_is_trained_along(tmp_path: Path) -> None:
    settings: Any = CAUSAL["llama"]()[1]
    settings.num_labels = 3

    def base() -> nn.Module:
        torch.manual_seed(0)
        return LlamaForSequenceClassification(settings).eval()

    made = graftlm.AdaptionPromptConfig(task_type="SEQ_CLS", adapter_len=3, adapter_layers=1)
    model = randomise(graftlm.get_peft_model(base(), made)).eval()
    inputs = batch("llama") | {"labels": torch.tensor([0, 1, 2])}
    model.save_pretrained(tmp_path / "mine")
    again = graftlm.PeftModel.from_pretrained(base(), tmp_path / "mine")
    assert again.peft_config["default"].modules_to_save == ["classifier", "score"]
    close(logits_of(again, **inputs), logits_of(model, **inputs))
    their = theirs(base(), peft.AdaptionPromptConfig(task_type="SEQ_CLS", adapter_len=3, adapter_layers=1))
    their.save_pretrained(tmp_path / "theirs")
    again = graftlm.PeftModel.from_pretrained(base(), tmp_path / "theirs")
    close(logits_of(again, **inputs), logits_of(their.eval(), **inputs))


# -- what cannot be meant ----------------------------------------------------------------------------------------------
def test_errors() -> None:
    def make(name: str, **options: Any) -> Any:
        settings = {"adapter_len": 3, "adapter_layers": 2} | options
        return graftlm.get_peft_model(fresh(name), graftlm.AdaptionPromptConfig(**settings))

    with pytest.raises(ConfigError, match="adapter_layers=3: this model has 2 layers"):
        make("llama", adapter_layers=3)
    settings = make("llama", adapter_len=None, adapter_layers=None).peft_config["default"]
    assert (settings.adapter_len, settings.adapter_layers) == (10, 1)
    with pytest.raises(ConfigError, match="adapter_len=0: expected a whole number above 0"):
        make("llama", adapter_len=0)
    with pytest.raises(UnsupportedError, match="no form for model type 'opt'; it takes llama, mistral"):
        make("opt")
    with pytest.raises(TargetError, match="'model.layers.0.mlp' is no attention module"):
        make("llama", target_modules="mlp")
    with pytest.raises(TargetError, match="no module of this model is called so"):
        make("llama", target_modules="attention")
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        attach("llama", "adaption").merge_adapter()
    for name in ENCODERS:
        with pytest.raises(UnsupportedError, match="no form for model type"):
            make(name)
