"""What adapters do to layers: their order, what is folded in, each change against its fold, what goes by itself."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import batch
from helpers import attach, close, config, fresh, logits_of, randomise, state_of
from torch import nn

import graftlm
from graftlm.architectures import base_modules, block_sites, held_parameters
from graftlm.kernels import grouped_low_rank
from graftlm.layers import Adapted, adapted
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

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name, **options: Tokenizer())
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


# -- merging by several wrappers ---------------------------------------------------------------------------------------
def sharing(*methods: str) -> tuple[nn.Module, list[Any], list[torch.Tensor]]:
    """A base, wrappers over it with an adapter each, and the logits of each."""
    base = fresh("llama")
    models = [attach("llama", method, seed=i, base=base) for i, method in enumerate(methods)]
    return base, models, [logits_of(model, **INPUTS) for model in models]


@pytest.mark.parametrize("methods", [("lora", "lora"), ("lora", "dora"), ("dora", "embedding", "lora_default")])
def test_wrappers_merge_and_unmerge_in_any_order(methods: tuple[str, ...]) -> None:
    """What is folded in belongs to the base's layer: each wrapper computes the same all along, and the base comes back."""
    base, models, wanted = sharing(*methods)
    before = state_of(base)
    for merging, unmerging in itertools.product(itertools.permutations(range(len(models))), repeat=2):
        for i in merging:
            models[i].merge_adapter()
            for model, values in zip(models, wanted, strict=True):
                close(logits_of(model, **INPUTS), values, 2e-5)
        changed = [k for k, v in base.state_dict().items() if not torch.equal(before[k], v)]
        assert changed
        for i in unmerging:
            models[i].unmerge_adapter()
            assert not models[i].get_model_status().merged_adapters
            for model, values in zip(models, wanted, strict=True):
                close(logits_of(model, **INPUTS), values, 2e-5)
        assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
        for model, values in zip(models, wanted, strict=True):
            assert torch.equal(logits_of(model, **INPUTS), values)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_base_called_by_itself_goes_through_all_that_is_merged(order: tuple[int, int]) -> None:
    base, models, _ = sharing("lora", "dora")
    wanted = logits_of(base, **INPUTS)
    for i in order:
        models[i].merge_adapter()
    calls = watch_changes(base)
    close(logits_of(base, **INPUTS), wanted, 2e-5)
    assert not calls


def watch_changes(model: nn.Module) -> list[str]:
    """Names of adapters, as they are computed beside layers from now on."""
    calls: list[str] = []
    for change in [change for m in model.modules() if isinstance(m, Adapted) for change in m.changes.values()]:

        def asked(t: Any, own: Any = change.low_rank) -> Any:
            calls.append(t.name)
            return own(t)

        change.low_rank = asked  # type: ignore[method-assign]
    return calls


@pytest.mark.parametrize("keeps", [True, False])
def test_merging_for_good_leaves_what_another_wrapper_has_merged(keeps: bool) -> None:
    base, (one, other), (_, wanted) = sharing("lora", "dora")
    before = state_of(base)
    one.merge_adapter()
    if keeps:
        values = logits_of(one, **INPUTS)
        with pytest.raises(ValueError, match="nothing was changed"):
            with torch.no_grad():
                next(p for _, p in other.adapter_parameters("default"))[0, 0] = torch.inf
            other.merge_and_unload(safe_merge=True)
        assert one.get_model_status().merged_adapters == ["default"]
        close(logits_of(one, **INPUTS), values, 0)
        one.unmerge_adapter()
        assert all(torch.equal(before[k], v) for k, v in base.state_dict().items() if "lora_A" not in k)
        return
    other.merge_and_unload()
    assert one.get_model_status().merged_adapters == ["default"]
    merged = logits_of(one, **INPUTS)
    one.unmerge_adapter()
    close(logits_of(one, **INPUTS), merged, 2e-5)
    with one.disable_adapter():
        close(logits_of(one, **INPUTS), wanted, 2e-5)


def test_the_order_of_merged_adapters_is_that_of_activation() -> None:
    """DoRA scales what came before it: merged or not, in either order, the logits are the same."""
    model = attach("llama", "dora")
    for i, name in enumerate(("p", "q")):
        model.add_adapter(name, config("dora", "llama"))
        model.set_adapter(name)
        randomise(model, seed=i, scale=0.3)
    wanted = {}
    for order in (("p", "q"), ("q", "p")):
        model.set_adapter(list(order))
        wanted[order] = logits_of(model.eval(), **INPUTS)
    assert (wanted["p", "q"] - wanted["q", "p"]).abs().max() > 1e-3
    calls = watch_changes(model)
    for order in wanted:
        model.set_adapter(list(order))
        model.merge_adapter()
        close(logits_of(model, **INPUTS), wanted[order], 5e-5)
        assert not calls
        model.set_adapter(list(order[::-1]))
        close(logits_of(model, **INPUTS), wanted[order[::-1]], 5e-5)
        assert calls
        calls.clear()
        model.unmerge_adapter()


# -- what goes by itself in a mixed batch ------------------------------------------------------------------------------
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many updates each call of the grouped function has."""
    calls: list[int] = []

    def grouped(y: torch.Tensor, x: torch.Tensor, updates: list, kept: dict) -> torch.Tensor:
        calls.append(len(updates))
        return grouped_low_rank(y, x, updates, kept)

    monkeypatch.setattr(adapted, "grouped_low_rank", grouped)
    return calls


@pytest.mark.parametrize("training", [False, True])
def test_a_group_with_its_own_way_does_not_slow_the_others(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One DoRA adapter in a mixed batch: the rows of plain LoRA still go through one function together."""
    model = attach("llama", "lora")
    for i, (name, method) in enumerate((("second", "lora"), ("third", "lora"), ("own", "dora"))):
        model.add_adapter(name, config(method, "llama"))
        model.set_adapter(name)
        randomise(model, seed=i)
    rows = ["default", "own", "second", "third", "__base__"]
    ids = torch.arange(5 * 6).view(5, 6) % 50 + 3
    alone = [logits_of(model, input_ids=ids[i : i + 1], adapter_names=[name])[0] for i, name in enumerate(rows)]
    model(input_ids=ids, adapter_names=rows)  # the trial
    calls, layers = counted(monkeypatch), sum(isinstance(m, Adapted) for m in model.modules())
    with torch.set_grad_enabled(training):
        got = model(input_ids=ids, adapter_names=rows).logits
    assert calls == [3] * layers
    for row, wanted in zip(got, alone, strict=True):
        close(row, wanted)
    if training:
        gradients = {}
        model.set_requires_grad(model.peft_config, True)
        for mixed in (True, False):
            model.zero_grad()
            if mixed:
                model(input_ids=ids, adapter_names=rows).logits.square().sum().backward()
            else:
                for i, name in enumerate(rows[:-1]):
                    model(input_ids=ids[i : i + 1], adapter_names=[name]).logits.square().sum().backward()
            gradients[mixed] = [p.grad.clone() for n in model.peft_config for _, p in model.adapter_parameters(n)]
        for got, wanted in zip(gradients[True], gradients[False], strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)
