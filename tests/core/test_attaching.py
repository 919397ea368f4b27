"""What a new adapter costs: its own tensors and hooks, and nothing of what was tried out before it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import attach, close, config, padded, randomise, rows, still
from torch import Tensor, nn

import graftlm
from graftlm.errors import AdapterError
from graftlm.methods.bottleneck import Bottleneck

KINDS = ("lora", "prompt", "prefix", "houlsby")


def batch() -> dict[str, Tensor]:
    inputs = padded(rows("llama", (9, 4, 6)), "right")
    return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def runs(model: Any, **inputs: Any) -> int:
    """How often one pass runs the base's body."""
    count: list[int] = []
    handle = model.base.base_model.register_forward_pre_hook(lambda *_: count.append(1))
    try:
        model(**(inputs or batch()))
    finally:
        handle.remove()
    return len(count)


def trained(method: str, base: Any = None) -> Any:
    return attach("llama", method, base=still("llama") if base is None else base).train()


@pytest.mark.parametrize("method", KINDS)
def test_a_new_adapter_of_a_known_kind_is_not_tried_out(method: str) -> None:
    model = trained(method)
    assert runs(model) > 1, "the first pass tries nothing out"
    assert runs(model) == 1
    for i in range(3):
        model.add_adapter(f"more{i}", config(method, "llama"))
        assert runs(model) == 1
        model.set_adapter(f"more{i}")
        assert runs(model) == 1


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("method", KINDS)
def test_an_adapter_of_another_kind_leaves_the_first_ones_short_cuts(method: str, other: str) -> None:
    model = trained(method)
    model(**batch())
    model.add_adapter("other", config(other, "llama"))
    assert runs(model) == 1
    model.set_adapter("other")
    randomise(model)
    assert (runs(model) > 1) == (other != method)
    model.delete_adapter("default")
    assert runs(model) == 1


def test_trials_ahead_of_time() -> None:
    model = trained("lora")
    for method in ("prompt", "houlsby"):
        model.add_adapter(method, config(method, "llama"))
    model.try_out()
    for name in model.methods:
        model.set_adapter(name)
        assert runs(model) == 1
    model.eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    assert runs(model, **inputs, adapter_names=["default", "houlsby", "prompt"]) == 1
    with pytest.raises(AdapterError, match="row 1: There is no adapter 'promt'"):
        model.try_out(["default", "promt"])


def test_wrappers_of_one_base_share_what_was_tried_out() -> None:
    base = still("llama")
    first = trained("lora", base)
    first(**batch())
    second = trained("lora", base)
    assert runs(second) == runs(first) == 1


@pytest.mark.parametrize("other", ["lora", "prompt"])
def test_another_head_is_tried_out(other: str) -> None:
    model = trained("lora")
    model(**batch())
    model.base.lm_head = nn.Linear(32, model.base.lm_head.out_features, bias=False).requires_grad_(False)
    model.add_adapter("other", config(other, "llama"))
    assert runs(model) > 1
    assert runs(model) == 1
    lean = model(**batch()).loss
    model.lean = False
    close(lean, model(**batch()).loss)


def test_modules_of_an_adapters_own_are_tried_out() -> None:
    """A trained copy of an attention module may not go the way that the base's own goes."""
    model: Any = attach("gpt2", "lora_default", base=still("gpt2")).train()
    model(**batch())
    settings = graftlm.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_fc"], modules_to_save=["attn"])
    model.add_adapter("other", settings)
    model.set_adapter("other")
    randomise(model)
    assert runs(model) > 1
    lean = model(**batch()).loss
    model.lean = False
    close(lean, model(**batch()).loss)


def hooks(model: Any) -> Counter:
    """The hooks on every module of the base, and how many of each."""
    found: Counter = Counter()
    for name, module in model.base.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            found.update((name, kind, id(hook)) for hook in getattr(module, kind).values())
    return found


@pytest.mark.parametrize("method", KINDS)
def test_hooks_stay_where_they_are(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of one kind: each connects itself only."""
    connected: list[str] = []
    connect = Bottleneck.connect
    monkeypatch.setattr(Bottleneck, "connect", lambda self, host: (connected.append(self.name), connect(self, host))[1])
    model = trained(method)
    before = hooks(model)
    for i in range(4):
        model.add_adapter(f"more{i}", config(method, "llama"))
        assert not before - hooks(model), "hooks were placed anew"
    assert connected == (["default", "more0", "more1", "more2", "more3"] if method == "houlsby" else [])
    for i in (2, 0, 1, 3):
        model.delete_adapter(f"more{i}")
    assert hooks(model) == before


def test_hooks_follow_layers_that_are_replaced() -> None:
    """A bottleneck reads what its block gives with LoRA, in whatever order they were attached."""
    found = []
    for order in (("houlsby", "lora"), ("lora", "houlsby")):
        model = graftlm.get_peft_model(still("llama"), config(order[0], "llama"), order[0])
        model.add_adapter(order[1], config(order[1], "llama"))
        model.set_adapter(["lora", "houlsby"])
        model.eval()
        with torch.no_grad():
            for name in model.methods:
                for key, parameter in model.adapter_parameters(name):
                    parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(sum(key.encode())))
            found.append(model(**batch()).logits)
        model.set_adapter("houlsby")
        model.delete_adapter("lora")
        with torch.no_grad():
            found.append(model(**batch()).logits)
    close(found[0], found[2])
    close(found[1], found[3])
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_the_second_wrapper_s_layers_carry_the_first_one_s_hooks() -> None:
    base = still("llama")
    first = attach("llama", "houlsby", base=base)
    with torch.no_grad():
        wanted = first(**batch()).logits
        attach("llama", "lora", base=base)
        close(first(**batch()).logits, wanted)
