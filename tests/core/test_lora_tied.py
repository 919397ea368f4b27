"""`ensure_weight_tying` and `layer_replication`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from families import _GQA, batch
from helpers import close, fresh, logits_of, randomise, state_of, twenty_steps
from lora_helpers import OPTIONS
from test_parity import both_ways, from_theirs, theirs
from torch import nn

import graftlm
from graftlm.errors import ConfigError, UnsupportedError

INPUTS = batch("llama")


def tied() -> nn.Module:
    torch.manual_seed(0)
    return t.LlamaForCausalLM(t.LlamaConfig(**_GQA, tie_word_embeddings=True)).eval()


def settings(lib: Any = graftlm, **options: Any) -> Any:
    return lib.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "ensure_weight_tying": True, **options})


SELECTED: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["lm_head", "embed_tokens"]},
    "expression": {"target_modules": ".*q_proj|lm_head"},
    "saved_embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


# -- tied --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("chosen", [k for k in SELECTED if k != "expression"])  # HF PEFT then leaves the head out
def test_files_both_ways(chosen: str, tmp_path: Path) -> None:
    mine = randomise(graftlm.get_peft_model(tied(), settings(**SELECTED[chosen]))).eval()
    mine.save_pretrained(tmp_path / "mine")
    wanted = logits_of(mine, **INPUTS)
    assert (wanted - logits_of(tied(), **INPUTS)).abs().max() > 1e-3
    close(logits_of(from_theirs(tied(), tmp_path / "mine"), **INPUTS), wanted)
    close(logits_of(graftlm.PeftModel.from_pretrained(tied(), tmp_path / "mine"), **INPUTS), wanted)
    their = theirs(tied(), settings(peft, **SELECTED[chosen]))
    with torch.no_grad():  # not by name: HF PEFT's two views of one memory must stay equal
        for key, parameter in their.named_parameters():
            if parameter.requires_grad and "lm_head" not in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    their.save_pretrained(tmp_path / "theirs")
    again = graftlm.PeftModel.from_pretrained(tied(), tmp_path / "theirs")
    close(logits_of(again, **INPUTS), logits_of(their.eval(), **INPUTS))
    assert again.peft_config["default"].ensure_weight_tying


@pytest.mark.parametrize("chosen", ["embedding", "saved_head"])
def test_twenty_losses(chosen: str) -> None:
    """Under SGD, in which HF PEFT's two steps of one memory are one."""
    found: list[list[float]] = []
    start: dict[str, torch.Tensor] = {}
    for lib in (graftlm, peft):
        model = (theirs if lib is peft else graftlm.get_peft_model)(tied(), settings(lib, **SELECTED[chosen]))
        if lib is peft:
            peft.set_peft_model_state_dict(model, start)
        else:
            start = {k: v.detach().clone() for k, v in graftlm.get_peft_model_state_dict(model).items()}
        rate = 0.001 if chosen == "embedding" else 0.5
        found.append(twenty_steps(model, lambda step: batch("llama", seed=step % 4), rate, torch.optim.SGD))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0][-1] < found[0][0]


@pytest.mark.parametrize("chosen", SELECTED)
def test_stays_tied(chosen: str, tmp_path: Path) -> None:
    """After training, moved, copied, merged and saved."""
    model = graftlm.get_peft_model(tied(), settings(**SELECTED[chosen])).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model(**INPUTS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model = copy.deepcopy(model).double().float().eval()
    wanted, before = logits_of(model, **INPUTS), state_of(model)
    if "saved" not in chosen:
        embedding, head = model.base.model.embed_tokens, model.base.lm_head
        close(embedding.get_delta_weight("default"), head.get_delta_weight("default"), 1e-7)
        factors = head.lora_A["default"].weight, head.lora_B["default"].weight  # views, by the names that HF PEFT has
        close(head.scaling["default"] * factors[1] @ factors[0], head.get_delta_weight("default"), 1e-7)
        assert factors[0].data_ptr() == embedding.lora_embedding_B["default"].data_ptr()
        model.merge_adapter()
        close(logits_of(model, **INPUTS), wanted)
        with torch.no_grad():
            embedding.lora_embedding_B["default"].add_(0.1)
        changed = logits_of(model, **INPUTS)  # the merged head is no more what it should be
        model.unmerge_adapter()
        close(logits_of(model, **INPUTS), changed)
        with torch.no_grad():
            embedding.lora_embedding_B["default"].copy_(
                before["base_model.model.model.embed_tokens.lora_embedding_B.default"]
            )
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings
    close(logits_of(merged, **INPUTS), wanted, 2e-5)
    merged.save_pretrained(tmp_path)
    close(logits_of(t.LlamaForCausalLM.from_pretrained(tmp_path).eval(), **INPUTS), wanted, 2e-5)


def test_tied_in_mixed_batches() -> None:
    model = randomise(graftlm.get_peft_model(tied(), settings(**SELECTED["embedding"])), scale=0.3)
    model.add_adapter("other", settings(**SELECTED["both"], use_dora=True))
    model.set_adapter("other")
    randomise(model, seed=4, scale=0.3).eval()
    names = ["default", "other", "__base__"]
    inputs = {k: v for k, v in INPUTS.items() if k != "labels"}
    mixed = logits_of(model, **inputs, adapter_names=names)
    for i, name in enumerate(names):
        close(mixed[i], logits_of(model, **{k: v[i : i + 1] for k, v in inputs.items()}, adapter_names=[name])[0], 2e-5)
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert state_of(model.base).keys() == state_of(tied()).keys()


def test_a_head_that_the_model_does_not_name() -> None:
    class Unnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.out.weight = self.table.weight

        def get_input_embeddings(self) -> nn.Module:
            return self.table

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.out(self.table(ids))

    model = randomise(
        graftlm.get_peft_model(Unnamed(), graftlm.LoraConfig(r=2, target_modules=["out"], ensure_weight_tying=True)),
        scale=0.3,
    )
    ids = torch.arange(9)
    table = model.base.table
    a, b, scale = (table.lora_embedding_A["default"], table.lora_embedding_B["default"], table.scaling["default"])
    weight = table.base_layer.weight + scale * (b @ a).T
    close(model(ids), weight @ weight.T)


def test_nothing_to_tie() -> None:
    with pytest.warns(UserWarning, match="this model has no tied embeddings and head; nothing to tie"):
        graftlm.get_peft_model(fresh("llama"), settings(target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="neither target_modules nor modules_to_save name the embeddings or the head"):
        graftlm.get_peft_model(tied(), settings(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedError, match="ensure_weight_tying is for decoder-only"):
        graftlm.get_peft_model(fresh("t5"), settings(target_modules=["q"]))


# -- replicated --------------------------------------------------------------------------------------------------------
PAIRS = [[0, 1], (0, 2), [1, 2]]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_replicated_both_ways(name: str, tmp_path: Path) -> None:
    both_ways(lambda: fresh(name), lambda lib: lib.LoraConfig(**OPTIONS, layer_replication=PAIRS), batch(name), tmp_path)


def test_replicated_losses_are_hf_pefts() -> None:
    from lora_helpers import twenty

    twenty("llama", lambda lib: lib.LoraConfig(**OPTIONS, layer_replication=PAIRS))


@pytest.mark.parametrize("name", ["bloom", "gpt2", "bert", "gemma3"])
def test_replicated_and_undone(name: str) -> None:
    base = fresh(name)
    count = base.config.num_hidden_layers
    task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
    config = graftlm.LoraConfig(**{**OPTIONS, "task_type": task}, layer_replication=PAIRS)
    model = randomise(graftlm.get_peft_model(base, config)).eval()
    inputs = batch(name)
    assert base.config.num_hidden_layers == 4
    assert sum(p.numel() for p in base.parameters() if not p.requires_grad) == sum(
        p.numel() for p in fresh(name).parameters()
    )
    wanted = logits_of(model, **inputs)
    model.add_adapter("second", graftlm.LoraConfig(**{**OPTIONS, "task_type": task}, layer_replication=PAIRS))
    model.set_adapter("second")
    close(logits_of(model, **inputs, adapter_names=["default"] * 3), wanted, 2e-5)
    if name != "bert":
        got = model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(
            got, model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0)
        )
    model.delete_adapter("default")
    assert base.config.num_hidden_layers == 4
    plain = model.unload()
    assert plain.config.num_hidden_layers == count
    assert getattr(plain.config, "layer_types", None) == getattr(fresh(name).config, "layer_types", None)
    assert torch.equal(logits_of(plain, **inputs), logits_of(fresh(name), **inputs))


def test_what_cannot_be_replicated() -> None:
    def attach(pairs: Any, name: str = "llama") -> Any:
        return graftlm.get_peft_model(fresh(name), graftlm.LoraConfig(**OPTIONS, layer_replication=pairs))

    for pairs in ([[0, 3]], [[1, 1]]):
        with pytest.raises(ConfigError, match=r"is no range of this model's 2 blocks; expected \[from, up to\]"):
            attach(pairs)
    with pytest.raises(ConfigError, match="expected pairs"):
        attach([[0, 1, 2]])
    model = attach(PAIRS)
    with pytest.raises(ConfigError, match="they must be alike"):
        model.add_adapter("other", graftlm.LoraConfig(**OPTIONS, layer_replication=[[0, 2]]))
    with pytest.raises(UnsupportedError, match="layer_replication: blocks share their weights"):
        model.merge_adapter()
    later = graftlm.get_peft_model(fresh("llama"), graftlm.LoraConfig(**OPTIONS))
    with pytest.raises(ConfigError, match="the adapter with it must be the first one"):
        later.add_adapter("other", graftlm.LoraConfig(**OPTIONS, layer_replication=PAIRS))
    with pytest.raises(UnsupportedError, match="layer_replication is for decoder-only"):
        attach(PAIRS, "t5")
