"""Steps by a family's lean form beside the same ones by the base's own layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_helpers import crowd
from families import VOCAB, build
from helpers import close, fresh
from torch import Tensor

import graftlm
from graftlm.architectures.lean import lean
from graftlm.architectures.prepacked import prepacked
from graftlm.passes.served import PlainCache, Row, Served

FAMILIES = ["llama", "bloom", "gpt2", "opt", "mistral", "qwen2", "qwen3"]
GROUPS = [("lora",), (), ("wide",), ("lora", "wide"), ("houlsby",), ("dora",), ("ia3",), ("wide", "loha"), ("lora",)]


def served(model: Any, groups: list[tuple[str, ...]]) -> Served:
    made = Served(model)
    for group in dict.fromkeys(groups):
        made.admit(group)
    return made


def logits(server: Served, groups: list[tuple[str, ...]], how: bool | None) -> Tensor:
    """Of three steps: prompts of several lengths, one token of each row, and one of each beside two of the last."""
    server.lean.forced = how
    cache, starts, made = PlainCache(server), [], []
    for row, group in enumerate(groups):
        front = server.front(group)
        cache.join(row, front)
        starts.append(front.length)
    generator = torch.Generator().manual_seed(4)
    for counts in ([1 + row % 4 for row in range(len(groups))], [1] * len(groups), [1] * (len(groups) - 1) + [2]):
        tokens = [torch.randint(3, VOCAB, (n,), generator=generator) for n in counts]
        rows = [Row(*row) for row in zip(groups, tokens, starts, strict=True)]
        made.append(server.step(rows, cache.over(list(enumerate(counts)))))
        starts = [start + n for start, n in zip(starts, counts, strict=True)]
    server.lean.forced = None
    return torch.stack(made)


@pytest.mark.parametrize(
    ("name", "packs"),
    [(n, False) for n in FAMILIES]
    + [pytest.param(n, True, marks=[pytest.mark.slow] * (i > 3)) for i, n in enumerate(FAMILIES)],
)
def test_as_the_layers_themselves(name: str, packs: bool) -> None:
    """Ranks of several sizes, compositions, bottlenecks and changes that are no low-rank updates, in one step."""
    model = crowd(name, ["lora", "wide", "houlsby", "dora", "ia3", "loha"])
    server = served(model, GROUPS)
    assert all(server.lean.trusts(group) for group in GROUPS)
    with prepacked(model) if packs else torch.no_grad():
        for groups in (GROUPS, GROUPS[::-1], [("wide",)] * 3, [(), ()], [("lora",), ("wide",), ("wide",)]):
            close(logits(server, groups, True), logits(server, groups, False))


def test_soft_prompts_are_in_the_cache() -> None:
    groups = [("prompt",), ("prefix", "lora"), (), ("p_mlp",)]
    server = served(crowd("llama", ["lora", "prompt", "prefix", "p_mlp"]), groups)
    assert all(server.lean.trusts(group) for group in [*groups, ("lora",)])
    close(logits(server, groups, True), logits(server, groups, False))


def test_a_broken_adapter_reaches_its_own_rows_only() -> None:
    groups = [("lora",), ("wide",), (), ("lora",)]
    model = crowd("llama", ["lora", "wide"])
    server = served(model, groups)
    before = logits(server, groups, True)
    with torch.no_grad():
        for _, parameter in model.adapter_parameters("wide"):
            parameter.fill_(torch.nan)
    server.lean.forget("wide")
    after = logits(server, groups, True)
    assert bool(after[:, 1].isnan().all())
    assert torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])


@pytest.mark.parametrize("what", ["hook", "pre-hook", "forward", "everyone's", "merged", "parallel"])
def test_what_the_form_would_pass_over_goes_through_the_layers(what: str) -> None:
    groups: list[tuple[str, ...]] = [("lora",), (), ("parallel",)] if what == "parallel" else [("lora",), ()]
    model = crowd("llama", ["lora", "parallel", "wide"])
    server = served(model, groups)
    counts = (1,) * len(groups)
    rows = tuple(groups)
    assert (server.lean.rows(rows, counts) is not None) == (what != "parallel")
    layer: Any = model.base.model.layers[1]
    undo = None
    if what == "hook":
        undo = layer.mlp.register_forward_hook(lambda module, args, output: output * 2).remove
    elif what == "pre-hook":
        undo = layer.self_attn.o_proj.base_layer.register_forward_pre_hook(lambda module, args: None).remove
    elif what == "forward":
        layer.forward, undo = layer.forward, lambda: delattr(layer, "forward")
    elif what == "everyone's":
        undo = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None).remove
    elif what == "merged":
        model.merge_adapter(["lora"])
        undo = model.unmerge_adapter
    assert server.lean.rows(rows, counts) is None
    if undo is not None:
        undo()
        assert server.lean.rows(rows, counts) is not None


def test_an_adapter_that_comes_later() -> None:
    """Its layers stand in places that were bare before."""
    model = crowd("llama", ["lora"])
    server = served(model, [("lora",)])
    before = logits(server, [("lora",), ()], True)
    model.add_adapter("more", graftlm.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    model.eval()
    server.admit(("more",))
    close(logits(server, [("lora",), ()], True), before)
    groups = [("lora",), (), ("more",)]
    close(logits(server, groups, True), logits(server, groups, False))


def test_another_adapter_under_the_same_name_is_tried_anew() -> None:
    model = crowd("llama", ["lora", "wide"])
    server = served(model, [("lora",), ("wide",)])
    model.delete_adapter("lora")
    model.add_adapter("lora", graftlm.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    model.eval()
    assert server.lean.trusts(("wide",)) and not server.lean.trusts(("lora",))
    server.admit(("lora",))
    assert server.lean.trusts(("lora",))
    groups = [("lora",), ("wide",)]
    close(logits(server, groups, True), logits(server, groups, False))


@pytest.mark.parametrize(
    ("name", "changes"),
    [("bloom", {"apply_residual_connection_post_layernorm": True}), ("opt", {"do_layer_norm_before": False}),
     ("opt", {"word_embed_proj_dim": 16}), ("opt", {"_remove_final_layer_norm": True}),
     ("gpt2", {"add_cross_attention": True})],
)  # fmt: skip
def test_what_a_configuration_makes_different(name: str, changes: dict[str, Any]) -> None:
    assert lean(build(name)) is not None
    assert lean(build(name, **changes)) is None


def test_weights_that_change_are_taken_up() -> None:
    model = crowd("llama", ["lora"])
    groups: list[tuple[str, ...]] = [("lora",), ()]
    server = served(model, groups)
    layer = model.base.model.layers[0].self_attn.k_proj
    with prepacked(model):
        before = logits(server, groups, True)
        with torch.no_grad():
            layer.weight.mul_(2)
        written = logits(server, groups, True)
        layer.weight = torch.nn.Parameter(layer.weight * 2, requires_grad=False)
        exchanged = logits(server, groups, True)
    assert not torch.allclose(before, written) and not torch.allclose(written, exchanged)
    close(logits(server, groups, True), exchanged)
    close(logits(server, groups, False), exchanged)


@pytest.mark.parametrize("name", ["gemma3", "gpt_neox", "falcon"])
def test_families_without(name: str) -> None:
    assert lean(fresh(name)) is None
