"""Cartridges: HF PEFT's files, logits and losses; frozen entries; starts from a text and a cache; mixed and composed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import ALL, batch
from helpers import attach, cases, close, config, fresh, logits_of, padded, randomise, rows, still, twenty_steps, unpacked
from test_parity import both_ways, theirs
from test_quantized import folders, load  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer

import graftlm
from graftlm.bundled import base_path
from graftlm.errors import AdapterError, ConfigError, UnsupportedError

NOT_THERE = ("falcon", "chatglm", "bert", "roberta")  # where HF PEFT has no prefix, or other sizes have to be named


@pytest.mark.parametrize(
    ("name", "method"),
    [
        c
        for c in cases(ALL, ["cartridge"], lambda n, m: n in ("bloom", "gpt2", "llama", "t5"))
        if c.values[0] not in NOT_THERE
    ],
)
def test_files_both_ways(name: str, method: str, tmp_path: Path) -> None:
    both_ways(lambda: fresh(name), lambda lib: config(method, name, lib), batch(name), tmp_path)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_twenty_losses(name: str) -> None:
    losses: dict[str, list[float]] = {}
    for library in (graftlm, peft):
        torch.manual_seed(3)
        model = (theirs if library is peft else graftlm.get_peft_model)(still(name), config("cartridge", name, library))
        before = library.get_peft_model_state_dict(model)["prompt_embeddings"].clone()
        losses[library.__name__] = twenty_steps(model, lambda step: batch(name, seed=step % 4), 0.03)
        after = library.get_peft_model_state_dict(model)["prompt_embeddings"]
        assert torch.equal(after[:1], before[:1])
        assert not torch.equal(after[1:], before[1:])
    assert losses["graftlm"] == pytest.approx(losses["peft"], abs=1e-4)
    assert sum(losses["graftlm"][-4:]) < sum(losses["graftlm"][:4])


@pytest.mark.parametrize("frozen", [0, 2, 4])
def test_frozen_entries(frozen: int) -> None:
    settings = graftlm.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, num_frozen_tokens=frozen)
    model = graftlm.get_peft_model(fresh("llama"), settings)
    assert model.get_nb_trainable_parameters()[0] == (4 - frozen) * 2 * 2 * 16


def test_starts_from_a_text_and_from_a_cache() -> None:
    """The first entries of the base's own keys and values: the adapter gives what the base gives behind the text."""
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    text = "Grafting joins the tissue of plants so that they grow together."
    ids = tokenizer(text)["input_ids"]
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": len(ids)}
    made = {}
    for library in (graftlm, peft):
        base = AutoModelForCausalLM.from_pretrained(base_path(), dtype="float32")
        model = (theirs if library is peft else graftlm.get_peft_model)(base, library.CartridgeConfig(**settings)).eval()
        made[library] = library.initialize_kv_prefix_from_text(model, tokenizer, text=text)
    close(made[graftlm], made[peft])
    base = AutoModelForCausalLM.from_pretrained(base_path(), dtype="float32")
    model = graftlm.get_peft_model(base, graftlm.CartridgeConfig(**settings)).eval()
    table = graftlm.initialize_kv_prefix_from_text(model, tokenizer, text=text)
    close(model.get_prompt_embedding_to_save("default"), table, 0)
    more = torch.tensor([[7, 8, 9]])
    with model.disable_adapter(), torch.no_grad():
        wanted = model(input_ids=torch.cat((torch.tensor([ids]), more), dim=1)).logits[:, -3:]
        cache = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    close(logits_of(model, input_ids=more), wanted, 1e-4)
    model.add_adapter("prefix", graftlm.PrefixTuningConfig(**settings))
    model.set_adapter("prefix")
    for given in (cache, [(layer.keys, layer.values) for layer in cache.layers]):
        close(graftlm.initialize_kv_prefix_from_past_key_values(model, past_key_values=given), table)
    close(logits_of(model, input_ids=more), wanted, 1e-4)


def test_mixed_rows_and_compositions() -> None:
    model = attach("llama", "cartridge")
    model.add_adapter("long", graftlm.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    for i, method in enumerate(("long", "lora", "prompt")):
        if method != "long":
            model.add_adapter(method, config(method, "llama"))
        model.set_adapter(method)
        randomise(model, seed=i, scale=0.3)
    names = ["default", "long", ["default", "long"], "__base__", ["lora", "default", "prompt"]]
    inputs = padded(rows("llama", (7, 4, 5, 6, 3)), "left")
    model.eval()
    got = logits_of(model, **inputs, adapter_names=names)
    for i, row in enumerate(names):
        own = {k: v[i : i + 1] for k, v in inputs.items()}
        close(got[i, -3:], logits_of(model, **own, adapter_names=[row])[0, -3:], 3e-5)


def test_packed_training_gives_the_padded_gradients() -> None:
    model = attach("llama", "cartridge", base=still("llama"))
    inputs = batch("llama", rows=4)
    inputs["attention_mask"][1, 5:] = 0
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = []
    for lean in (True, False):
        model.lean = lean
        model.zero_grad()
        model.train()(**inputs).loss.backward()
        found.append([p.grad.clone() for _, p in model.adapter_parameters("default")])
    for mine, plain in zip(*found, strict=True):
        close(mine, plain)


def test_composed_files(tmp_path: Path) -> None:
    """Side by side in one file as side by side in one pass; HF PEFT's composition of our files is the same."""
    model = attach("llama", "cartridge")
    model.add_adapter("b", graftlm.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    model.set_adapter(["default", "b"])
    randomise(model, seed=6).eval().save_pretrained(tmp_path)
    paths = [tmp_path, tmp_path / "b"]
    for library, folder in ((graftlm, "mine"), (peft, "theirs")):
        library.compose_cartridge_adapters(paths, output_path=tmp_path / folder)
        one = graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / folder)
        assert one.peft_config["default"].num_virtual_tokens == 5
        close(logits_of(one, **batch("llama")), logits_of(model, **batch("llama")))
    attach("llama", "prefix").save_pretrained(tmp_path / "prefix")
    for wrong, text in (([tmp_path], "expected two or more"), ([tmp_path, tmp_path / "prefix"], "is PREFIX_TUNING")):
        with pytest.raises(AdapterError, match=text):
            graftlm.compose_cartridge_adapters(wrong, output_path=tmp_path / "x")


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_on_a_quantised_base(folders, scheme):  # noqa: F811
    model = attach("llama", "cartridge", base=load(folders["llama"], scheme))
    their = theirs(unpacked(load(folders["llama"], scheme)), config("cartridge", "llama", peft)).eval()
    peft.set_peft_model_state_dict(their, graftlm.get_peft_model_state_dict(model))
    close(logits_of(model, **batch("llama")), logits_of(their, **batch("llama")), 1e-4)
    model.train()(**batch("llama")).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in model.adapter_parameters("default"))


def test_errors() -> None:
    with pytest.raises(ConfigError, match="num_frozen_tokens=5 of num_virtual_tokens=4"):
        graftlm.CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=5)
    with pytest.raises(ConfigError, match="num_frozen_tokens=-1: expected a whole number from 0"):
        graftlm.CartridgeConfig(num_frozen_tokens=-1)
    model = attach("llama", "cartridge")
    short = [(torch.zeros(1, 2, 2, 8),) * 2] * 2
    with pytest.raises(ConfigError, match=r"layer 0: \(1, 2, 2, 8\), expected \[1, kv_heads, 3 or more"):
        graftlm.initialize_kv_prefix_from_past_key_values(model, past_key_values=short)
    with pytest.raises(ConfigError, match=r"makes a prefix of \(2, 64\), adapter 'default' has \(3, 64\)"):
        graftlm.initialize_kv_prefix_from_past_key_values(model, past_key_values=short, num_virtual_tokens=2)
    with pytest.raises(ConfigError, match="past_key_values is empty"):
        graftlm.initialize_kv_prefix_from_past_key_values(model, past_key_values=[])
    for method in ("prefix_projection", "lora"):
        with pytest.raises(UnsupportedError, match="holds no keys and values as they are"):
            graftlm.initialize_kv_prefix_from_past_key_values(attach("llama", method), past_key_values=short)
