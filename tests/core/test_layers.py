"""What adapters do to layers: their order, what is folded in, each change against its fold, what goes by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import batch
from helpers import attach, close, config, logits_of, randomise, state_of
from torch import nn

import graftlm
from graftlm.architectures import base_modules, block_sites, held_parameters
from graftlm.preparation import freeze_base
from graftlm.routing import Plan, running

INPUTS = batch("llama")


# -- the order of activation -------------------------------------------------------------------------------------------
def with_pair(method: str) -> Any:
    """A model with two more adapters of a method, "p" and "q", whose effects show."""
    model = attach("llama", method)
    for i, name in enumerate(("p", "q")):
        model.add_adapter(name, config(method, "llama"))
        model.set_adapter(name)
        randomise(model, seed=i, scale=0.3)
    return model.eval()


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "parallel"])
def test_bottlenecks_follow_the_order_of_activation(method: str) -> None:
    """Each reads what the one before it has made, alone and in a mixed batch; a parallel one reads the half's input."""
    model = with_pair(method)
    wanted = []
    for order in (["p", "q"], ["q", "p"], ["p"]):
        model.set_adapter(order)
        wanted.append(logits_of(model, **INPUTS))
    apart = (wanted[0] - wanted[1]).abs().max()
    assert apart < 1e-5 if method == "parallel" else apart > 1e-3
    mixed = logits_of(model, **INPUTS, adapter_names=[["p", "q"], ["q", "p"], "p"])
    for row in range(3):
        close(mixed[row], wanted[row][row])


def test_a_site_adds_its_bottlenecks_one_after_the_other() -> None:
    model = with_pair("pfeiffer")
    site = model.base.model.layers[0].mlp.down_proj
    x = torch.randn(2, 5, site.in_features)
    with torch.no_grad():
        for order in (("p", "q"), ("q", "p")):
            wanted = F.linear(x, site.weight)
            for name in order:
                wanted = wanted + model.bottleneck[name]["model/layers/0/mlp/down_proj"](wanted)
            with running(Plan(model.switch, order)):
                close(site(x), wanted)


# -- whose is what -----------------------------------------------------------------------------------------------------
class Standing(nn.Module):
    """A module of an unknown method in a layer's place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.other_table = nn.ParameterDict({"default": nn.Parameter(torch.ones(layer.out_features))})

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) * self.other_table["default"]


def test_an_adapters_parameters_are_known_by_where_they_stand() -> None:
    """Not by their names: wrapping a base once more neither freezes them nor takes them for the base's."""
    base = attach("llama", "lora_default").base
    layer = base.model.layers[0]
    standing = layer.mlp.down_proj = Standing(layer.mlp.down_proj)
    before = state_of(base)
    assert {id(p) for p in held_parameters(standing)} == {id(standing.other_table["default"])}
    assert not list(held_parameters(standing.base_layer))
    freeze_base(base)
    assert standing.other_table["default"].requires_grad
    assert not standing.base_layer.weight.requires_grad
    assert all(p.requires_grad for _, m in base_modules(base) for p in held_parameters(m))
    sites = block_sites(base)
    assert not any("lora" in name or "base_layer" in name for names in sites.values() for name in names)
    assert "model.layers.0.mlp.down_proj" in sites["feed_forward"]
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())


# -- modes -------------------------------------------------------------------------------------------------------------
def test_a_prefix_from_text_that_fails_leaves_the_modes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach("llama", "lora").train()
    model.base.model.layers[0].mlp.eval()
    before = [m.training for m in model.modules()]

    class Tokenizer:
        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, 2]}

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: Tokenizer())
    settings = graftlm.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights="text", init_text="a", tokenizer_name_or_path="none"
    )
    model.add_adapter("text", settings)
    assert [m.training for m in model.modules() if m not in set(model.prompt_encoder.modules())][: len(before)]
    model.delete_adapter("text")
    assert [m.training for m in model.modules()] == before

    def fail(module: nn.Module, args: tuple) -> None:
        raise KeyError("stopped")

    handle = model.base.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="stopped"):
        model.add_adapter("text", settings)
    handle.remove()
    assert [m.training for m in model.modules()] == before
