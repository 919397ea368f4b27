"""Methods that change layers: each change is its fold; (IA)3 and LoHa beside HF PEFT, quantised, in mixed rows, merged."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from families import ALL, batch
from helpers import attach, cases, close, config, fresh, logits_of, randomise, state_of, still, twenty_steps, unpacked
from safetensors.torch import load_file
from test_engine import ragged
from test_engine import same as packed_as_padded
from test_parity import both_ways, theirs
from test_quantized import folders, load  # noqa: F401  (a fixture)
from torch import nn
from transformers.pytorch_utils import Conv1D

import graftlm
from graftlm.errors import CheckpointError, CompositionError, ConfigError, TargetError, UnsupportedError
from graftlm.joint import Share, joinable, joint_losses
from graftlm.layers import Adapted
from graftlm.methods import METHODS
from graftlm.methods.layered import LayerMethod
from graftlm.quantization import dequantize, quantized_kind
from graftlm.routing import Switch

INPUTS = batch("llama")
NEW = (
    "ia3", "loha", "vera", "lokr", "randlora", "fourierft", "ln_tuning", "miss", "miss_mini", "bat", "oft", "oft_exact",
    "boft", "adalora",
)  # fmt: skip


def spread(method: str) -> float:
    """How far values are thrown that show what an adapter does, without drowning the base."""
    return {"lokr": 0.1, "randlora": 0.1, "miss": 0.03, "miss_mini": 0.03}.get(method, 0.3)  # the latter sum over shards


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
    "tokens": lambda: graftlm.TrainableTokensConfig(token_indices=[7, 1, 4]),
    "vera": lambda: graftlm.VeraConfig(r=7),
    "lokr": lambda: graftlm.LoKrConfig(r=1, alpha=5),
    "lokr_whole": lambda: graftlm.LoKrConfig(r=4, alpha=5, init_weights="lycoris"),
    "lokr_both": lambda: graftlm.LoKrConfig(r=1, decompose_both=True, decompose_factor=3, init_weights=False),
    "randlora": lambda: graftlm.RandLoraConfig(r=4, randlora_alpha=4),
    "randlora_sparse": lambda: graftlm.RandLoraConfig(r=4, randlora_alpha=4, sparse=True),
    "fourierft": lambda: graftlm.FourierFTConfig(n_frequency=20),
    "miss": lambda: graftlm.MissConfig(r=5),
    "miss_mini": lambda: graftlm.MissConfig(r=5, mini_r=3, init_weights="mini"),
    "bat": lambda: graftlm.MissConfig(r=3, init_weights="bat"),
    "oft": lambda: graftlm.OFTConfig(oft_block_size=3),
    "oft_exact": lambda: graftlm.OFTConfig(oft_block_size=3, use_cayley_neumann=False),
    "oft_shared": lambda: graftlm.OFTConfig(r=3, oft_block_size=0, block_share=True),
    "boft": lambda: graftlm.BOFTConfig(boft_block_size=4),
    "butterfly": lambda: graftlm.BOFTConfig(boft_block_num=6, boft_block_size=0, boft_n_butterfly_factor=2),
    "adalora": lambda: graftlm.AdaLoraConfig(init_r=3),
}
EMBEDDING = ("lora", "rslora", "dora", "tokens", "oft", "oft_exact", "oft_shared")
CONV = ("lora", "rslora", "dora", "ia3", "ia3_input", "loha", "loha_effective")
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
        method, host = cls(settings, name), SimpleNamespace(base_model=nn.Module(), adapter_dtype=lambda _: torch.float32)
        method.prepare(host, [made.frozen])
        made.add(name, method.change(host, "layer", made.frozen), torch.float32)
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
    for taken in (False, True):
        with torch.set_grad_enabled(taken):
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
              ("loha", "ia3", "dora", "lora"), ("pissa", "ia3_input", "ia3"),
              ("oft", "ia3", "boft", "bat"), ("butterfly", "miss", "oft_exact", "adalora", "loha")], ids="+".join,
)  # fmt: skip
def test_changes_nest(names: tuple[str, ...], kind: str) -> None:
    """They enter from the last to the first, leave and are folded from the first to the last; merged in part, too."""
    if kind == "conv_2d":
        names = tuple(n for n in (n.replace("pissa", "lora") for n in names) if n in CONV)
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
WITHOUT = {  # ours alone: Conv1D layers
    ("chatglm", "loha"), ("chatglm", "lokr"),
    *(("gpt2", m) for m in ("loha", "lokr", "miss", "miss_mini", "bat", "oft", "oft_exact", "boft")),
}  # fmt: skip
FILES = cases(
    ALL, NEW, lambda n, m: n in ("llama", "t5") or (n in ("bloom", "gpt2", "bert") and m in ("ia3", "loha", "adalora"))
)


@pytest.mark.parametrize(("name", "method"), [c for c in FILES if c.values not in WITHOUT])
def test_files_both_ways(name: str, method: str, tmp_path: Path) -> None:
    inputs = batch(name)
    if method == "adalora":  # HF PEFT fails on labels unless it is trained
        labels = inputs.pop("labels")
        inputs |= {"decoder_input_ids": labels} if labels.shape != inputs["input_ids"].shape and labels.dim() == 2 else {}
    both_ways(lambda: fresh(name), lambda lib: config(method, name, lib), inputs, tmp_path)


TWENTY = [m for m in NEW if m != "adalora"]  # its own: test_adalora.py


@pytest.mark.parametrize(
    ("name", "method"),
    cases(["llama", "bert", "opt"], TWENTY, lambda n, m: n == ("bert" if TWENTY.index(m) % 3 == 0 else "llama")),
)
def test_twenty_losses(name: str, method: str) -> None:
    losses: dict[str, list[float]] = {}
    for library in (graftlm, peft):
        torch.manual_seed(3)
        settings = config(method, name, library)
        model = (theirs if library is peft else graftlm.get_peft_model)(still(name), settings)
        rate = 0.01 if method == "randlora" else 0.03  # at which rounding does not grow
        losses[library.__name__] = twenty_steps(model, lambda step: batch(name, seed=step % 4), rate)
    assert losses["graftlm"] == pytest.approx(losses["peft"], abs=1e-4)
    assert sum(losses["graftlm"][-4:]) < sum(losses["graftlm"][:4])


def test_loha_with_patterns_and_layers(tmp_path: Path) -> None:
    def settings(lib: Any) -> Any:
        return lib.LoHaConfig(
            task_type="CAUSAL_LM", r=4, alpha=8, target_modules=["q_proj", "up_proj"], layers_to_transform=[1],
            rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}, init_weights=False,
        )  # fmt: skip

    both_ways(lambda: fresh("llama"), settings, INPUTS, tmp_path)


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_on_conv1d_where_hf_peft_fails(method: str) -> None:
    model = attach("gpt2", method)
    inputs = batch("gpt2")
    wanted = logits_of(model, **inputs)
    assert (wanted - logits_of(fresh("gpt2"), **inputs)).abs().max() > 1e-4
    close(logits_of(model.merge_and_unload(), **inputs), wanted)


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "lokr_both": ("LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 4, "init_weights": "lycoris"}),
    "lokr_patterns": ("LoKrConfig", {"r": 2, "rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}}),
    "lokr_aim": ("LoKrConfig", {"r": 2, "decompose_factor": 3, "init_weights": False, "layers_to_transform": [1]}),
    "vera_seed": ("VeraConfig", {"r": 9, "projection_prng_key": 7, "save_projection": False}),
    "vera_random": ("VeraConfig", {"r": 9, "init_weights": False, "layers_to_transform": 0, "layers_pattern": "layers"}),
    "randlora_sparse": ("RandLoraConfig", {"r": 5, "sparse": True, "randlora_alpha": 10}),
    "randlora_very_sparse": ("RandLoraConfig", {"r": 5, "very_sparse": True, "randlora_alpha": 10}),
    "randlora_seed": ("RandLoraConfig", {"r": 40, "save_projection": False, "init_weights": False, "randlora_alpha": 40}),
    "fourierft_patterns": ("FourierFTConfig", {"n_frequency": 30, "n_frequency_pattern": {"q_proj": 70}, "scaling": 90}),
    "fourierft_seed": ("FourierFTConfig", {"n_frequency": 512, "random_loc_seed": 3, "init_weights": True}),
    "ln_some": ("LNTuningConfig", {"target_modules": r".*layernorm", "exclude_modules": ["post_attention_layernorm"]}),
    "ln_any": ("LNTuningConfig", {"target_modules": ["norm", "down_proj", "lm_head"]}),
}
TYPE = {"task_type": "CAUSAL_LM"}
LINEAR = {"target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_both_ways(case: str, tmp_path: Path) -> None:
    kind, options = OPTIONS[case]
    both_ways(lambda: fresh("llama"), lambda lib: getattr(lib, kind)(**TYPE, **LINEAR | options), INPUTS, tmp_path)


RATES = {
    "rank": {"rank_dropout": 0.5},
    "module": {"module_dropout": 0.5},
    "scaled": {"rank_dropout": 0.5, "rank_dropout_scale": True},
}


@pytest.mark.parametrize(
    ("kind", "which"), [(k, w) for k in ("LoHa", "LoKr") for w in RATES if (k, w) != ("LoHa", "scaled")]
)
def test_what_hf_peft_drops_is_dropped(kind: str, which: str) -> None:
    rates = RATES[which]
    options = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **rates}
    mine = randomise(graftlm.get_peft_model(fresh("llama"), getattr(graftlm, f"{kind}Config")(**options)), scale=0.5)
    their = theirs(fresh("llama"), getattr(peft, f"{kind}Config")(**options))
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
@pytest.mark.parametrize(
    ("scheme", "method"),  # quick: every method over one form
    cases(("int8", "nf4"), NEW, lambda scheme, m: scheme == ("int8", "nf4")[NEW.index(m) % 2]),
)
def test_on_a_quantised_base(folders, method, scheme, tmp_path, capsys):  # noqa: F811
    """As on the base with the quantised layers' weights in fp32; trained, saved, merged and unmerged."""
    base = load(folders["llama"], scheme)
    scale = spread(method)
    model = randomise(graftlm.get_peft_model(base, config(method, "llama")), scale=scale).eval()
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
    # HF PEFT cannot, or multiplies by dequantised weights
    if (method, scheme) not in (("loha", "nf4"), ("lokr", "nf4"), ("bat", "int8")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            their = peft.PeftModel.from_pretrained(unpacked(load(folders["llama"], scheme)), tmp_path).eval()
        rounding = 0.03 * wanted.abs().max().item() if (method, scheme) == ("vera", "int8") else 1e-4
        close(wanted, logits_of(their, **{k: v for k, v in INPUTS.items() if k != "labels"}), rounding)
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
    """Rows of every method, LoRA, compositions and the base in one batch: each as alone, and their gradients."""
    model = attach(name, "ia3")
    for i, method in enumerate((*NEW[1:], "lora_default")):
        model.add_adapter(method, config(method, name))
        model.set_adapter(method)
        randomise(model, seed=i, scale=spread(method))
    rows = [
        "default", *NEW[1:], ["lora_default", "default"], "__base__", ["loha", "lora_default"], ["ln_tuning", "vera"],
        ["oft", "adalora", "boft"], ["bat", "oft_exact", "default"],
    ]  # fmt: skip
    inputs = batch(name, rows=len(rows))
    inputs.pop("labels")
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    model.eval()
    got = logits_of(model, **inputs, adapter_names=rows)
    for i, row in enumerate(rows):
        own = {k: v[i : i + 1] for k, v in inputs.items()}
        close(got[i], logits_of(model, **own, adapter_names=[row])[0], 2e-5)


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "t5"))])
def test_trained_together(name: str) -> None:
    """Wrappers of every method over one base in one training pass, packed where that can be: each as alone."""
    base, models, wanted = still(name), [], []
    for i, method in enumerate((*NEW, "ln_tuning")):  # twice: copies of the same modules, one in another
        models.append(graftlm.get_peft_model(base, config(method, name)).train())
        randomise(models[-1], seed=i, scale=min(spread(method), 0.2))
    data = [batch(name, rows=1 + i % 3, length=5 + i % 4, seed=i) for i in range(len(models))]
    for model, inputs in zip(models, data, strict=True):
        assert model.can_pack() == (name != "t5")
        loss = model(**inputs).loss
        loss.backward()
        wanted.append((loss.item(), [p.grad.clone() for _, p in model.adapter_parameters("default")]))
        model.zero_grad()
    shares = [Share(model, inputs) for model, inputs in zip(models, data, strict=True)]
    assert all(joinable(share.model, share.inputs) for share in shares)
    for share, (total, count), (loss, grads) in zip(shares, joint_losses(shares), wanted, strict=True):
        penalty = share.model.penalty(["default"])
        own = total / count if penalty is None else total / count + penalty
        assert own.item() == pytest.approx(loss, abs=2e-5)
        parameters = [p for _, p in share.model.adapter_parameters("default")]
        for got, gradient in zip(torch.autograd.grad(own, parameters, retain_graph=True), grads, strict=True):
            close(got, gradient, 5e-5)


@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow), "opt"])
def test_packed(name: str, method: str) -> None:
    """Loss and gradients of rows side by side are those of padded rows."""
    model = attach(name, method, base=still(name)).train()
    packed_as_padded(model, **ragged())
    assert model.can_pack()


@pytest.mark.parametrize("method", NEW)
@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "t5", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bloom", "bert"))]
)
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
    with pytest.raises(ConfigError, match="init_weights='lyco': expected True, False or 'lycoris'"):
        graftlm.LoKrConfig(init_weights="lyco")
    with pytest.raises(ConfigError, match="decompose_factor=0: expected a whole number above 0, or -1"):
        graftlm.LoKrConfig(decompose_factor=0)
    for kind in (graftlm.VeraConfig, graftlm.RandLoraConfig, graftlm.FourierFTConfig):
        with pytest.raises(UnsupportedError, match="bias='all': biases are trained beside LoRA only"):
            kind(bias="all")
    with pytest.raises(ConfigError, match=r"n_frequency=600: 'model.layers.0.self_attn.v_proj' has 16 x 32 = 512 places"):
        graftlm.get_peft_model(fresh("llama"), graftlm.FourierFTConfig(n_frequency=600, target_modules=["v_proj"]))
    with pytest.raises(ConfigError, match="very_sparse=True leaves only zeros"):
        graftlm.get_peft_model(fresh("llama"), graftlm.RandLoraConfig(r=1, very_sparse=True, projection_prng_key=204))
    for settings in (
        kind(target_modules=["embed_tokens"])
        for kind in (
            graftlm.IA3Config,
            graftlm.LoHaConfig,
            graftlm.VeraConfig,
            graftlm.LoKrConfig,
            graftlm.RandLoraConfig,
            graftlm.FourierFTConfig,
        )  # fmt: skip
    ):
        with pytest.raises(UnsupportedError, match="has no form for 'model.embed_tokens', a Embedding; it takes linear"):
            graftlm.get_peft_model(fresh("llama"), settings)
    unknown = fresh("bloom")
    unknown.config.model_type = "unknown"
    with pytest.raises(TargetError, match="default feedforward_modules for model type 'unknown'"):
        graftlm.get_peft_model(unknown, graftlm.IA3Config(target_modules=["q_proj"]))
    with pytest.raises(TargetError, match=r"model type 'unknown'.*LoHaConfig\(target_modules"):
        graftlm.get_peft_model(unknown, graftlm.LoHaConfig())


# -- projections that layers share -------------------------------------------------------------------------------------
PROJECTED = {
    "vera": ("vera_A", "vera_B", lambda **o: graftlm.VeraConfig(**TYPE, **LINEAR, r=6, d_initial=0.5, **o)),
    "randlora": ("randlora_A", "randlora_B", lambda **o: graftlm.RandLoraConfig(**TYPE, **LINEAR, r=5, **o)),
}


@pytest.mark.parametrize("method", PROJECTED)
def test_projections_stand_once_and_move_with_the_model(method: str, tmp_path: Path) -> None:
    a, b, make = PROJECTED[method]
    model = randomise(graftlm.get_peft_model(fresh("llama"), make())).eval()
    keys = [k for k in model.state_dict() if f"{method}_A" in k or f"{method}_B" in k]
    assert keys == [f"base_model.{a}.default", f"base_model.{b}.default"]
    assert {f"base_model.{a}", f"base_model.{b}"} <= set(graftlm.get_peft_model_state_dict(model))
    wanted = logits_of(model, **INPUTS)
    twin = copy.deepcopy(model)
    for parameter in getattr(model.base_model, a).buffers():
        parameter.zero_()
    assert torch.equal(logits_of(twin, **INPUTS), wanted)
    assert (logits_of(model, **INPUTS) - wanted).abs().max() > 1e-3
    model.load_state_dict(twin.state_dict())
    close(logits_of(model, **INPUTS), wanted, 0)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(logits_of(again, **INPUTS), wanted)
    again.double()
    assert all(buffer.dtype is torch.float64 for buffer in getattr(again.base_model, b).buffers())
    close(logits_of(again, **INPUTS).float(), wanted, 1e-4)
    close(again.merge_and_unload()(**INPUTS).logits.float(), wanted, 1e-4)
    other = make(projection_prng_key=5, save_projection=False)
    model.add_adapter("other", other)
    assert f"base_model.{a}.other" not in model.state_dict()
    assert torch.equal(logits_of(model, **INPUTS), wanted)
    model.delete_adapter("default")
    model.delete_adapter("other")
    assert not hasattr(model.base_model, a)


@pytest.mark.parametrize("method", PROJECTED)
def test_projections_out_of_a_file_or_a_seed(method: str, tmp_path: Path) -> None:
    a, _, make = PROJECTED[method]
    model = randomise(graftlm.get_peft_model(fresh("llama"), make())).eval()
    getattr(model.base_model, a)["default"].mul_(2)  # as made on a machine that draws otherwise
    wanted = logits_of(model, **INPUTS)
    model.save_pretrained(tmp_path / "whole")
    again = graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / "whole")
    assert torch.equal(logits_of(again, **INPUTS), wanted)
    model.load_adapter(tmp_path / "whole", "second")
    model.set_adapter("second")
    assert torch.equal(logits_of(model, **INPUTS), wanted)
    seeded = randomise(graftlm.get_peft_model(fresh("llama"), make(projection_prng_key=3, save_projection=False))).eval()
    seeded.save_pretrained(tmp_path / "seed")
    assert not [k for k in load_file(tmp_path / "seed" / "adapter_model.safetensors") if k.endswith(f"{method}_A")]
    again = graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / "seed")
    assert torch.equal(logits_of(again, **INPUTS), logits_of(seeded, **INPUTS))
    settings = json.loads((tmp_path / "seed" / "adapter_config.json").read_text())
    settings["save_projection"] = True
    (tmp_path / "seed" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"missing keys \(2\):\n    base_model.{a}"):
        graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / "seed")


def test_gradients_of_projected_changes() -> None:
    """No gradient of a projection is made, and those of the rest are right."""
    for method in ("vera", "randlora"):
        layer, x = adapted("linear", method)
        layer.double()
        change, t = layer.changes[method], layer.held(method)
        for held in change.pair:
            held.double()
        parameters = [t[table].detach().requires_grad_() for table in change.tables[:2]]
        y = torch.zeros(4, 5, 9, dtype=torch.float64)

        def left(*given: torch.Tensor, change: Any = change, x: Any = x, y: Any = y, name: str = method) -> torch.Tensor:
            table = dict(zip(change.tables, given, strict=False))
            return change.leave(Given(table, name), x.double(), y, None, layer.frozen)  # noqa: B023

        assert torch.autograd.gradcheck(left, parameters)


class Given(dict):
    """Tensors by table, in `Held`'s place."""

    def __init__(self, tables: dict[str, torch.Tensor], name: str) -> None:
        super().__init__(tables)
        self.name = name


# -- norms -------------------------------------------------------------------------------------------------------------
def test_norms_over_a_16_bit_base() -> None:
    """Copies are in fp32, and what they give goes on in the base's precision."""
    model = graftlm.get_peft_model(fresh("llama").to(torch.bfloat16), config("ln_tuning", "llama"))
    assert {p.dtype for _, p in model.adapter_parameters("default")} == {torch.float32}
    plain = logits_of(fresh("llama").to(torch.bfloat16), **INPUTS)
    got = model.eval()(**INPUTS)
    assert got.logits.dtype is torch.bfloat16
    close(got.logits.float(), plain.float(), 0.06)
    model.train()(**INPUTS).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in model.adapter_parameters("default"))
    assert logits_of(model.merge_and_unload(), **INPUTS).dtype is torch.bfloat16


def test_norms_of_two_adapters() -> None:
    model = attach("llama", "ln_tuning")
    model.add_adapter("second", graftlm.LNTuningConfig(**TYPE, target_modules=["norm"]))
    model.set_adapter(["default", "second"])
    with pytest.raises(CompositionError, match="each bring their own copy"):
        model(**INPUTS)
    model.set_adapter("default")
    model.add_adapter("third", graftlm.LNTuningConfig(**TYPE, target_modules=["down_proj"], modules_to_save=["lm_head"]))
    model.set_adapter(["default", "third"])
    randomise(model, scale=0.3)
    wanted = logits_of(model, **INPUTS)
    keys = set(graftlm.get_peft_model_state_dict(model, adapter_name="third"))
    assert "base_model.model.lm_head.weight" in keys
    assert "base_model.model.model.layers.0.mlp.down_proj.ln_tuning_layers.weight" in keys
    model.delete_adapter("second")
    close(logits_of(model, **INPUTS), wanted, 0)
    with pytest.raises(TargetError, match=r"selects '(model.layers.0.self_attn)' and '\1.q_proj' within"):
        graftlm.get_peft_model(fresh("llama"), graftlm.LNTuningConfig(target_modules=["self_attn", "q_proj"]))
    assert state_of(fresh("llama")).keys() == state_of(model.unload()).keys()


def test_norms_beside_a_trained_head(tmp_path: Path) -> None:
    def settings(lib: Any) -> Any:
        return lib.LNTuningConfig(task_type="SEQ_CLS", target_modules=["LayerNorm"])

    both_ways(lambda: fresh("bert"), settings, batch("bert"), tmp_path)


@pytest.mark.parametrize("kind", ["IA3", "LoHa", "Vera", "LoKr", "RandLora", "FourierFT", "LNTuning"])
def test_fields_and_defaults_are_hf_pefts(kind: str) -> None:
    mine, their = getattr(graftlm, f"{kind}Config")(), getattr(peft, f"{kind}Config")()
    for name, value in mine.to_dict().items():
        assert name in mine.own_fields or value == getattr(their, name), name
    missing = set(vars(their)) - set(mine.to_dict()) - {"peft_version"}
    assert not missing


@pytest.mark.parametrize("layer", [torch.nn.Linear(6, 8), torch.nn.Conv1d(6, 8, 3), torch.nn.Embedding(6, 8)], ids=repr)
def test_dora_of_rows_of_zeros(layer: torch.nn.Module) -> None:
    """Pruned or never trained rows have no direction: they are as they are, not infinite, and train."""
    base = torch.nn.Sequential(copy.deepcopy(layer))
    embeds = isinstance(layer, torch.nn.Embedding)
    x = torch.tensor([[0, 3, 5]]) if embeds else torch.randn(2, 6, 6)
    with torch.no_grad():
        (base[0].weight[:, 2:4] if embeds else base[0].weight[2:4]).zero_()
        expected = base(x)
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    assert (model(x) - expected).abs().max() <= 1e-6
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        model(x).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    trained = model(x).detach()
    assert torch.isfinite(trained).all() and (model.merge_and_unload()(x) - trained).abs().max() <= 1e-5
