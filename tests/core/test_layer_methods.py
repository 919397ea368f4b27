"""Methods that change layers: each change is its fold; (IA)3 and LoHa beside HF PEFT, quantised, in mixed rows, merged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from families import ALL, batch
from helpers import attach, cases, close, config, fresh, logits_of, randomise, state_of, still
from test_parity import both_ways, theirs
from test_quantized import folders, load  # noqa: F401  (a fixture)
from torch import nn
from transformers.pytorch_utils import Conv1D

import graftlm
from graftlm.errors import ConfigError, TargetError, UnsupportedError
from graftlm.layers import Adapted
from graftlm.methods import METHODS
from graftlm.methods.layered import LayerMethod
from graftlm.quantization import dequantize, quantized_kind
from graftlm.routing import Switch

INPUTS = batch("llama")
NEW = ("ia3", "loha")


# -- a change is its fold ----------------------------------------------------------------------------------------------
LORA = {"r": 3, "lora_alpha": 5}
CHANGES: dict[str, Any] = {
    "lora": lambda: graftlm.LoraConfig(**LORA),
    "rslora": lambda: graftlm.LoraConfig(**LORA, use_rslora=True),
    "dora": lambda: graftlm.LoraConfig(**LORA, use_dora=True),
    "pissa": lambda: graftlm.LoraConfig(**LORA, init_lora_weights="pissa"),
    "olora": lambda: graftlm.LoraConfig(**LORA, init_lora_weights="olora"),
    "pissa_dora": lambda: graftlm.LoraConfig(**LORA, init_lora_weights="pissa", use_dora=True),
    "loftq": lambda: graftlm.LoraConfig(**LORA, init_lora_weights="loftq"),
    "ia3": lambda: graftlm.IA3Config(feedforward_modules=[]),
    "ia3_input": lambda: graftlm.IA3Config(feedforward_modules=["layer"]),
    "loha": lambda: graftlm.LoHaConfig(r=3, alpha=5),
    "loha_effective": lambda: graftlm.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True),
}
EMBEDDING = ("lora", "rslora", "dora")
CONV = (*EMBEDDING, "ia3", "ia3_input", "loha", "loha_effective")
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 9),
    "without_bias": lambda: nn.Linear(12, 9, bias=False),
    "conv1d": lambda: Conv1D(9, 12),
    "embedding": lambda: nn.Embedding(12, 9),
    "conv_1d": lambda: nn.Conv1d(12, 9, 3, stride=2, padding=1),
    "conv_2d": lambda: nn.Conv2d(12, 9, (3, 2), padding=(1, 0), dilation=2, padding_mode="circular", bias=False),
    "conv_3d": lambda: nn.Conv3d(12, 9, (1, 3, 3), padding="same"),
    "conv_pointwise": lambda: nn.Conv2d(12, 9, 1),
    "conv_groups": lambda: nn.Conv2d(12, 9, 3, groups=3, padding=1),
}
WITHOUT_FOLD = {("conv_groups", c) for c in EMBEDDING} | {("conv_3d", "loha_effective")}


def goes(change: str, kind: str) -> bool:
    """Whether a change is of such a layer, and is one of its weight."""
    if kind == "embedding":
        return change in EMBEDDING
    return not kind.startswith("conv_") or (change in CONV and (kind, change) not in WITHOUT_FOLD)


PLACES = [(c, n) for n in LAYERS for c in CHANGES if goes(c, n)]


class Base(nn.Module):
    """A base of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def adapted(kind: str, *changes: str, seed: int = 0) -> tuple[Adapted, torch.Tensor]:
    """A layer with adapters whose effects show, active in this order, and an input of it."""
    torch.manual_seed(seed)
    layer = LAYERS[kind]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
        parameter.requires_grad = False
    switch = Switch()
    made = Adapted(layer, switch)
    for name in changes:
        settings = CHANGES[name]()
        cls = next(method for own, method in METHODS.values() if own is type(settings))
        assert issubclass(cls, LayerMethod)
        made.add(name, cls(settings, name).change(Any, "layer", made.frozen), torch.float32)
        with torch.no_grad():
            for _, parameter in made.parts(name):
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    switch.active = changes
    if kind.startswith("conv_"):
        return made, torch.randn(4, 12, *[7] * (layer.weight.dim() - 2))
    return made, torch.randint(12, (4, 5)) if kind == "embedding" else torch.randn(4, 5, 12)


def by_weight(layer: Adapted, x: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
    """The reference: one product by the weight and the bias with the changes folded in."""
    weight, bias = layer.frozen.folded([(layer, name) for name in names])
    plain = layer.frozen.plain
    if layer.frozen.kind == "conv":
        return torch.func.functional_call(
            plain, {"weight": weight.view_as(plain.weight)} | ({} if bias is None else {"bias": bias}), x
        )
    return F.embedding(x, weight.T) if x.dtype is torch.long else F.linear(x, weight, bias)


def test_every_method_of_layers_is_tried_here() -> None:
    own = {method for _, method in METHODS.values() if issubclass(method, LayerMethod)}
    assert {next(m for c, m in METHODS.values() if c is type(make())) for make in CHANGES.values()} == own


@pytest.mark.parametrize(("change", "kind"), PLACES)
def test_a_change_is_its_fold(change: str, kind: str) -> None:
    """Computed beside the layer, by the weight, merged, and with the delta that merging adds: the same."""
    layer, x = adapted(kind, change)
    rounded = 3e-5 if kind.startswith("conv_") else 1e-5  # sums of hundreds
    plain, before = layer.base_layer(x), state_of(layer)
    wanted = by_weight(layer, x, (change,))
    assert (wanted - plain).abs().max() > 1e-2
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            close(layer(x), wanted, rounded)
    layer.requires_grad_(False)
    delta = layer.get_delta_weight(change)
    assert delta.shape == layer.weight.shape
    close(layer.weight + delta, layer.frozen.rows(layer.frozen.folded([(layer, change)])[0]))
    layer.merge([change])
    assert layer.merged_adapters == [change]
    close(layer(x), wanted, rounded)
    close(layer.base_layer(x), wanted, rounded)
    layer.switch.enabled = False
    assert torch.equal(layer(x), plain)
    layer.unmerge()
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv_2d"])
@pytest.mark.parametrize(
    "names", [("ia3", "dora"), ("dora", "ia3"), ("ia3_input", "lora"), ("lora", "ia3_input"), 
              ("loha", "ia3", "dora", "lora"), ("pissa", "ia3_input", "ia3")], ids="+".join,
)  # fmt: skip
def test_changes_nest(names: tuple[str, ...], kind: str) -> None:
    """They enter from the last to the first, leave and are folded from the first to the last; merged in part, too."""
    if kind == "conv_2d" and "pissa" in names:
        names = tuple(n.replace("pissa", "lora") for n in names)
    layer, x = adapted(kind, *names)
    layer.requires_grad_(False)
    wanted = by_weight(layer, x, names)
    close(layer(x), wanted, 1e-4)
    inner: nn.Module = layer.base_layer
    weight = layer.frozen.weight()
    for name in names:  # each around the one before it
        weight = layer.changes[name].fold(layer.held(name), weight, layer.frozen)
    close(layer.frozen.folded([(layer, n) for n in names])[0], weight)
    before = state_of(layer)
    for some in (names[:1], names[-1:], names):
        layer.merge(some)
        close(layer(x), wanted, 1e-4)
        layer.switch.active = names[::-1]
        close(layer(x), by_weight(layer, x, names[::-1]), 1e-4)
        layer.switch.active = names
    layer.unmerge(names[0])
    close(layer(x), wanted, 1e-4)
    layer.unmerge()
    assert inner is layer.base_layer
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_merged_inputs_scale_and_trained_biases() -> None:
    """A bias that another adapter trains is scaled as well, merged or not."""
    model = attach("opt", "ia3")
    model.add_adapter("biased", config("bias_lora_only", "opt"))
    model.set_adapter(["biased", "default"])
    randomise(model, scale=0.3).eval()
    inputs = batch("opt")
    wanted = logits_of(model, **inputs)
    for names in (["biased"], ["default"], ["biased", "default"]):
        model.merge_adapter(names)
        close(logits_of(model, **inputs), wanted, 5e-5)
        model.unmerge_adapter()
    close(logits_of(model.merge_and_unload(), **inputs), wanted, 5e-5)


# -- beside HF PEFT ----------------------------------------------------------------------------------------------------
WITHOUT = {"chatglm", "gpt2"}  # LoHa on Conv1D is ours alone
FILES = cases(ALL, NEW, lambda n, m: n in ("bloom", "gpt2", "llama", "t5", "bert"))


@pytest.mark.parametrize(("name", "method"), [c for c in FILES if c.values not in [(n, "loha") for n in WITHOUT]])
def test_files_both_ways(name: str, method: str, tmp_path: Path) -> None:
    both_ways(lambda: fresh(name), lambda lib: config(method, name, lib), batch(name), tmp_path)


@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize("name", ["llama", "bert", pytest.param("opt", marks=pytest.mark.slow)])
def test_twenty_losses(name: str, method: str) -> None:
    losses: dict[str, list[float]] = {}
    for library in (graftlm, peft):
        torch.manual_seed(3)
        settings = config(method, name, library)
        model = (theirs if library is peft else graftlm.get_peft_model)(still(name), settings)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)
        for step in range(20):
            loss = model.train()(**batch(name, seed=step % 4)).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.setdefault(library.__name__, []).append(loss.item())
    assert losses["graftlm"] == pytest.approx(losses["peft"], abs=1e-4)
    assert sum(losses["graftlm"][-4:]) < sum(losses["graftlm"][:4])


def test_loha_with_patterns_and_layers(tmp_path: Path) -> None:
    def settings(lib: Any) -> Any:
        return lib.LoHaConfig(
            task_type="CAUSAL_LM", r=4, alpha=8, target_modules=["q_proj", "up_proj"], layers_to_transform=[1],
            rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}, init_weights=False,
        )  # fmt: skip

    both_ways(lambda: fresh("llama"), settings, INPUTS, tmp_path)


def test_loha_on_conv1d() -> None:
    model = attach("gpt2", "loha")
    inputs = batch("gpt2")
    wanted = logits_of(model, **inputs)
    assert (wanted - logits_of(fresh("gpt2"), **inputs)).abs().max() > 1e-4
    close(logits_of(model.merge_and_unload(), **inputs), wanted)


@pytest.mark.parametrize("rates", [{"rank_dropout": 0.5}, {"module_dropout": 0.5}], ids=lambda r: next(iter(r)))
def test_loha_drops_what_hf_peft_drops(rates: dict[str, float]) -> None:
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **rates}
    mine = randomise(graftlm.get_peft_model(fresh("llama"), graftlm.LoHaConfig(**options)), scale=0.5)
    their = theirs(fresh("llama"), peft.LoHaConfig(**options))
    peft.set_peft_model_state_dict(their, graftlm.get_peft_model_state_dict(mine))
    x = torch.randn(3, 5, 32)
    found = []
    for model in (mine, their):
        layer = model.base_model.model.model.layers[0].self_attn.q_proj.train()
        torch.manual_seed(5)
        outputs = []
        for _ in range(6):
            if model is mine and "rank_dropout" in rates:
                torch.rand(1)  # HF PEFT draws for the module whatever its rate is
            outputs.append(layer(x))
        found.append(outputs)
    for got, wanted in zip(*found, strict=True):
        close(got, wanted)
    assert not all(torch.equal(found[0][0], other) for other in found[0])
    mine.eval().requires_grad_(False)
    wanted = logits_of(mine, **INPUTS)
    mine.merge_adapter()
    close(logits_of(mine, **INPUTS), wanted)


def test_gradients_of_loha() -> None:
    layer, x = adapted("linear", "loha")
    change, t = layer.changes["loha"], layer.held("loha")
    factors = [t[table].detach().double().requires_grad_() for table in change.tables[:4]]

    def update(*given: torch.Tensor) -> torch.Tensor:
        return change.update(dict(zip(change.tables, given, strict=False)), torch.float64)

    assert torch.autograd.gradcheck(update, factors)
    assert torch.autograd.gradgradcheck(update, factors)


# -- quantised, mixed, merged ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
@pytest.mark.parametrize("method", NEW)
def test_on_a_quantised_base(folders, method, scheme, tmp_path, capsys):  # noqa: F811
    """As on the base with the quantised layers' weights in fp32; trained, saved, merged and unmerged."""
    base = load(folders["llama"], scheme)
    model = randomise(graftlm.get_peft_model(base, config(method, "llama")), scale=0.3).eval()
    plain = load(folders["llama"], None)
    with torch.no_grad():
        for name, module in plain.named_modules():
            own = base.get_submodule(name)
            own = own.frozen.layer if isinstance(own, Adapted) else own
            if quantized_kind(own):
                module.weight.copy_(dequantize(own))
    model.save_pretrained(tmp_path)
    reference = graftlm.PeftModel.from_pretrained(plain, tmp_path)
    wanted, exact = logits_of(model, **INPUTS), logits_of(reference, **INPUTS)
    close(wanted, exact, (0.03 if scheme == "int8" else 1e-4) * exact.abs().max().item())
    if method == "ia3":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            their = peft.PeftModel.from_pretrained(load(folders["llama"], scheme), tmp_path).eval()
        close(wanted, logits_of(their, **INPUTS), 1e-4)
    before = state_of(base)
    model.merge_adapter()
    close(logits_of(model, **INPUTS), wanted, 0.06 * wanted.abs().max().item())
    model.unmerge_adapter()
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    close(logits_of(model, **INPUTS), wanted, 0)
    model.train()(**INPUTS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in model.adapter_parameters("default"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_mixed_rows(name: str) -> None:
    """Rows of (IA)3, LoHa, LoRA, a composition and the base in one batch: each as alone, and their gradients."""
    model = attach(name, "ia3")
    for i, method in enumerate(("loha", "lora_default")):
        model.add_adapter(method, config(method, name))
        model.set_adapter(method)
        randomise(model, seed=i, scale=0.3)
    rows = ["default", "loha", ["lora_default", "default"], "__base__", ["loha", "lora_default"]]
    inputs = batch(name, rows=5)
    inputs.pop("labels")
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    model.eval()
    got = logits_of(model, **inputs, adapter_names=rows)
    for i, row in enumerate(rows):
        own = {k: v[i : i + 1] for k, v in inputs.items()}
        close(got[i], logits_of(model, **own, adapter_names=[row])[0], 2e-5)


@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "t5", "bert"])
def test_merged_and_unmerged(name: str, method: str) -> None:
    model, inputs = attach(name, method), batch(name)
    wanted, before = logits_of(model, **inputs), state_of(model)
    model.merge_adapter()
    close(logits_of(model, **inputs), wanted, 2e-5)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, **inputs), logits_of(fresh(name), **inputs))
    model.unmerge_adapter()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    merged = model.merge_and_unload()
    close(logits_of(merged, **inputs), wanted, 2e-5)
    assert state_of(merged).keys() == state_of(fresh(name)).keys()


# -- configurations ----------------------------------------------------------------------------------------------------
def test_what_cannot_be_meant() -> None:
    with pytest.raises(ConfigError, match="feedforward_modules: 'wo' is not among target_modules"):
        graftlm.IA3Config(target_modules=["k"], feedforward_modules=["wo"])
    with pytest.raises(UnsupportedError, match="use_effective_conv2d=True is for Conv1d and Conv2d"):
        adapted("conv_3d", "loha_effective")
    for settings in (
        graftlm.IA3Config(target_modules=["embed_tokens"]),
        graftlm.LoHaConfig(target_modules=["embed_tokens"]),
    ):
        with pytest.raises(UnsupportedError, match="has no form for 'model.embed_tokens', a Embedding; it takes linear"):
            graftlm.get_peft_model(fresh("llama"), settings)
    unknown = fresh("llama")
    unknown.config.model_type = "unknown"
    with pytest.raises(TargetError, match="default feedforward_modules for model type 'unknown'"):
        graftlm.get_peft_model(unknown, graftlm.IA3Config(target_modules=["q_proj"]))
    with pytest.raises(TargetError, match=r"model type 'unknown'.*LoHaConfig\(target_modules"):
        graftlm.get_peft_model(unknown, graftlm.LoHaConfig())


@pytest.mark.parametrize("kind", ["IA3", "LoHa"])
def test_fields_and_defaults_are_hf_pefts(kind: str) -> None:
    mine, their = getattr(graftlm, f"{kind}Config")(), getattr(peft, f"{kind}Config")()
    for name, value in mine.to_dict().items():
        assert value == getattr(their, name), name
    missing = set(vars(their)) - set(mine.to_dict()) - {"peft_version"}
    assert not missing
