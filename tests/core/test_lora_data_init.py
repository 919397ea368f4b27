"""EVA, CorDA and LoRA-GA: start values that come from data, beside HF PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import batch
from helpers import close, fresh, logits_of, randomise, state_of, twenty_steps
from peft.tuners.lora.config import CordaConfig as TheirCorda
from peft.tuners.lora.corda import preprocess_corda as their_preprocess_corda
from test_parity import from_theirs, theirs
from torch import nn

import graftlm
from graftlm.errors import CheckpointError, ConfigError, UnsupportedError

INPUTS = batch("llama")
PLAIN = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}


def batches(name: str = "llama") -> list[dict[str, torch.Tensor]]:
    return [batch(name, rows=4, length=12, seed=s) for s in range(3)]


def one_by_one(model: nn.Module) -> Callable[[], None]:
    """Runs a model on rows of sample data."""

    def run() -> None:
        for inputs in batches():
            for row in inputs["input_ids"]:
                model(input_ids=row[None])

    return run


def train_step(model: nn.Module, name: str = "llama") -> Callable[[], None]:
    def run() -> None:
        for inputs in batches(name):
            model(**inputs).loss.backward()

    return run


def exact_svd(monkeypatch: Any) -> None:
    """A randomised decomposition would draw other numbers in each library."""

    def svd(matrix: torch.Tensor, q: int = 6, niter: int = 2, M: Any = None) -> Any:  # noqa: N803
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :q], s[:q], vh[:q].T

    monkeypatch.setattr(torch, "svd_lowrank", svd)


def corda(base: nn.Module, lib: Any = graftlm, **options: Any) -> Any:
    sub = {k: options.pop(k) for k in ("corda_method", "cache_file", "covariance_file") if k in options}
    kind, run = (graftlm.CordaConfig, graftlm.preprocess_corda) if lib is graftlm else (TheirCorda, their_preprocess_corda)
    config = lib.LoraConfig(**{**PLAIN, **options}, init_lora_weights="corda", corda_config=kind(**sub))
    run(base, config, one_by_one(base))
    return config


def lora_ga(base: nn.Module, lib: Any = graftlm, name: str = "llama", **options: Any) -> Any:
    sub = {k: options.pop(k) for k in ("direction", "scale", "stable_gamma") if k in options}
    config = lib.LoraConfig(**{**PLAIN, **options}, init_lora_weights="lora_ga", lora_ga_config=lib.LoraGAConfig(**sub))
    lib.preprocess_loraga(base, config, train_step(base, name))
    return config


START: dict[str, Callable[..., Any]] = {"corda": corda, "lora_ga": lora_ga}
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("corda", {}),
    ("corda", {"corda_method": "kpm", "use_rslora": True}),
    ("corda", {"rank_pattern": {"down_proj": 2}}),
    ("lora_ga", {}),
    ("lora_ga", {"direction": "ArBr", "scale": "weight_svd"}),
    ("lora_ga", {"direction": "A2rBr", "scale": "gd_scale", "alpha_pattern": {"q_proj": 9}}),
    ("lora_ga", {"scale": "unit", "rank_pattern": {"q_proj": 3}}),
]


@pytest.mark.parametrize("start", START)
def test_a_configuration_that_says_no_start_any_more(start: str, tmp_path: Path) -> None:
    """HF PEFT's users change it before they convert an adapter: its file is the same."""
    base = fresh("llama")
    model = randomise(graftlm.get_peft_model(base, START[start](base)), scale=0.3).eval()
    wanted = logits_of(model, **INPUTS)
    model.peft_config["default"].init_lora_weights = True
    for options in ({}, {"path_initial_model_for_weight_conversion": "start"}):
        model.save_pretrained(tmp_path, **options)
        close(logits_of(graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path), **INPUTS), wanted, 2e-5)


# -- CorDA and LoRA-GA -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("start", "options"), OPTIONS)
def test_starts_and_losses_are_hf_pefts(start: str, options: dict[str, Any], monkeypatch: Any) -> None:
    """Factors of every layer, and 20 losses; the base stays as it is here."""
    exact_svd(monkeypatch)
    found: list[list[float]] = []
    factors: list[dict[str, torch.Tensor]] = []
    for lib in (graftlm, peft):
        base = fresh("llama")
        config = START[start](base, lib, **copy.deepcopy(options))
        before = state_of(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = (theirs if lib is peft else graftlm.get_peft_model)(base, config)
        factors.append({k: p.detach().clone() for k, p in model.named_parameters() if "lora_" in k})
        if lib is graftlm:
            close(logits_of(model.eval(), **INPUTS), logits_of(fresh("llama"), **INPUTS), 2e-5)
            assert all(
                torch.equal(before[k.replace("base_layer.", "")], v) for k, v in base.state_dict().items() if "lora" not in k
            )
        found.append(twenty_steps(model, lambda step: batches()[step % 3], 0.003))
    assert factors[0].keys() == factors[1].keys()
    for key, value in factors[0].items():
        close(value, factors[1][key], 1e-4)
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0][-1] < found[0][0]


@pytest.mark.parametrize(("start", "options"), [OPTIONS[1], OPTIONS[2], OPTIONS[5]])
@pytest.mark.parametrize("dora", [False, True])
def test_the_file_holds_the_start(start: str, options: dict[str, Any], dora: bool, tmp_path: Path) -> None:
    """Plain LoRA of twice the rank for HF PEFT; here the same adapter again, to be trained further."""
    base = fresh("llama")
    config = START[start](base, **copy.deepcopy(options), use_dora=dora)
    model = randomise(graftlm.get_peft_model(base, config), scale=0.2).eval()
    wanted = logits_of(model, **INPUTS)
    model.save_pretrained(tmp_path)
    close(logits_of(from_theirs(fresh("llama"), tmp_path), **INPUTS), wanted, 2e-5)
    again = graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path, is_trainable=True).eval()
    close(logits_of(again, **INPUTS), wanted)
    assert again.peft_config["default"].to_dict() | {"base_model_name_or_path": None} == config.to_dict()
    losses = []
    for one in (model, again):
        optimiser = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=0.01)
        losses.append([])
        for _ in range(3):
            loss = one.train()(**INPUTS).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    model.eval()
    wanted = logits_of(model, **INPUTS)
    model.merge_adapter()
    close(logits_of(model, **INPUTS), wanted, 2e-5)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, **INPUTS), logits_of(fresh("llama"), **INPUTS))
    close(logits_of(model.merge_and_unload(), **INPUTS), wanted, 2e-5)


def test_hf_pefts_file_belongs_on_its_base(tmp_path: Path) -> None:
    base = fresh("llama")
    their = randomise(theirs(base, lora_ga(base, peft))).eval()
    their.save_pretrained(tmp_path)
    changed = fresh("llama")
    with torch.no_grad():
        for name, module in changed.named_modules():
            if isinstance(module, nn.Linear):
                own = their.get_submodule(f"base_model.model.{name}")
                module.weight.copy_(getattr(own, "base_layer", own).weight)
    with pytest.warns(UserWarning, match="holds no start values. It belongs on the base whose weights HF PEFT changed"):
        mine = graftlm.PeftModel.from_pretrained(changed, tmp_path)
    close(logits_of(mine, **INPUTS), logits_of(their, **INPUTS))


def test_caches(tmp_path: Path) -> None:
    """Found again from their files, which are safetensors."""
    results = []
    for again in (False, True):
        base = fresh("llama")
        files = {"cache_file": str(tmp_path / "in" / "cache"), "covariance_file": str(tmp_path / "covariance")}
        config = graftlm.LoraConfig(**PLAIN, init_lora_weights="corda", corda_config=graftlm.CordaConfig(**files))
        graftlm.preprocess_corda(base, config, None if again else one_by_one(base))
        results.append(graftlm.get_peft_model_state_dict(graftlm.get_peft_model(base, config)))
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())
    base, config = fresh("llama"), graftlm.LoraConfig(**PLAIN, init_lora_weights="lora_ga")
    graftlm.preprocess_loraga(base, config, train_step(base), cache_file=str(tmp_path / "ga"))
    other = fresh("llama")
    graftlm.preprocess_loraga(other, config, lambda: None, cache_file=str(tmp_path / "ga"))
    q = [m.model.layers[0].self_attn.q_proj._peft_loraga_grad for m in (base, other)]
    assert torch.equal(*q)
    torch.save({}, tmp_path / "pickle")
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        graftlm.preprocess_loraga(other, config, lambda: None, cache_file=str(tmp_path / "pickle"))


def test_gradients_leave_the_base_as_it_was() -> None:
    base = fresh("gpt2")
    base.transformer.wte.weight.requires_grad = False
    before = state_of(base)
    model = graftlm.get_peft_model(base, lora_ga(base, name="gpt2", target_modules=["c_attn"])).eval()
    close(logits_of(model, **batch("gpt2")), logits_of(fresh("gpt2"), **batch("gpt2")), 2e-5)
    model.unload()
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    assert not any("grad" in k or "eigens" in k for m in base.modules() for k in vars(m) if "loraga" in k)


def test_what_is_missing() -> None:
    base = fresh("llama")
    for init, run in (("corda", "preprocess_corda"), ("lora_ga", "preprocess_loraga")):
        with pytest.raises(ConfigError, match=rf"has no start values; call {run}\(model, config, ...\)"):
            graftlm.get_peft_model(base, graftlm.LoraConfig(**PLAIN, init_lora_weights=init))
        config = graftlm.LoraConfig(**PLAIN)
        with pytest.raises(ConfigError, match=f"{run} needs LoraConfig"):
            getattr(graftlm, run)(base, config, lambda: None)
    config = graftlm.LoraConfig(**PLAIN, init_lora_weights="lora_ga")
    with pytest.raises(ConfigError, match="train_step has given .* no gradient"):
        graftlm.preprocess_loraga(base, config, lambda: None)
    config = graftlm.LoraConfig(**PLAIN, init_lora_weights="corda")
    with pytest.raises(ConfigError, match="run_model has not run"):
        graftlm.preprocess_corda(base, config, lambda: None)
    with pytest.raises(ConfigError, match="needs 2r = 40 directions"):
        graftlm.get_peft_model(base, lora_ga(base, r=20))
    with pytest.raises(ConfigError, match="CorDA's start values are of rank 4, the layer's is 3"):
        corda(base)
        graftlm.get_peft_model(base, graftlm.LoraConfig(**{**PLAIN, "r": 3}, init_lora_weights="corda"))
    with pytest.raises(UnsupportedError, match="'corda' is for linear layers"):
        graftlm.get_peft_model(
            fresh("llama"), graftlm.LoraConfig(target_modules=["embed_tokens"], init_lora_weights="corda")
        )
    for field, options in (
        ("corda_method", {"corda_config": {"corda_method": "x"}}),
        ("direction", {"lora_ga_config": {"direction": "x"}}),
    ):
        with pytest.raises(ConfigError, match=f"{field}='x': expected one of"):
            graftlm.LoraConfig(**options)
    with pytest.raises(ConfigError, match="eva_config has no field 'roh'; did you mean 'rho'"):
        graftlm.LoraConfig(init_lora_weights="eva", eva_config={"roh": 1})
    with pytest.raises(ConfigError, match="`rho` must be >= 1.0"):
        graftlm.EvaConfig(rho=0.5)
    with pytest.warns(UserWarning, match="`eva_config` specified but will be ignored"):
        graftlm.LoraConfig(eva_config=graftlm.EvaConfig())


# -- EVA ---------------------------------------------------------------------------------------------------------------
EVA: list[dict[str, Any]] = [
    {}, {"rho": 1.0}, {"whiten": True, "adjust_scaling_factors": False}, {"use_label_mask": False, "tau": 0.9},
]  # fmt: skip


def eva_data() -> list[dict[str, torch.Tensor]]:
    found = [batch("llama", rows=8, length=16, seed=s) for s in range(3)]
    for inputs in found:
        inputs["labels"][:, :4] = -100
        inputs["attention_mask"][:3, -5:] = 0
        inputs["labels"][:3, -5:] = -100
    return found


def eva(lib: Any, **options: Any) -> Any:
    same = [] if options.get("whiten") else ["k_proj", "v_proj"]  # HF PEFT divides once for each layer of the same inputs
    settings = {**PLAIN, "target_modules": ["q_proj", *same, "down_proj"]}
    return lib.LoraConfig(**settings, init_lora_weights="eva", eva_config=lib.EvaConfig(**options))


@pytest.mark.parametrize("options", EVA)
def test_eva_is_hf_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    """Directions, ranks, alphas, logits after a few steps; both ways through files."""
    models, configs, states = [], [], []
    for lib in (graftlm, peft):
        model = (theirs if lib is peft else graftlm.get_peft_model)(fresh("llama"), eva(lib, **options))
        states.append(lib.get_eva_state_dict(model, eva_data(), show_progress_bar=False))
        lib.initialize_lora_eva_weights(model, eva_data(), show_progress_bar=False)
        models.append(model)
        configs.append(model.peft_config["default"])
    assert states[0].keys() == states[1].keys()
    for name, a in states[0].items():
        assert a.shape == states[1][name].shape
        close(a.float(), states[1][name].float(), 1e-3)
    assert configs[0].rank_pattern == configs[1].rank_pattern
    assert configs[0].alpha_pattern == configs[1].alpha_pattern
    assert set(configs[0].target_modules) == set(configs[1].target_modules)
    if options.get("rho") != 1.0:
        assert configs[0].rank_pattern
    close(logits_of(models[0].eval(), **INPUTS), logits_of(fresh("llama"), **INPUTS))
    peft.set_peft_model_state_dict(models[1], graftlm.get_peft_model_state_dict(models[0]))
    losses: list[list[float]] = []
    for model in models:
        losses.append(twenty_steps(model, lambda step: eva_data()[step % 3], 0.01))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    wanted = logits_of(models[0].eval(), **INPUTS)
    models[0].save_pretrained(tmp_path / "mine")
    close(logits_of(from_theirs(fresh("llama"), tmp_path / "mine"), **INPUTS), wanted)
    close(logits_of(graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / "mine"), **INPUTS), wanted)
    models[1].save_pretrained(tmp_path / "theirs")
    mine = graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / "theirs")
    close(logits_of(mine, **INPUTS), logits_of(models[1].eval(), **INPUTS))


def test_eva_from_a_state_of_the_base() -> None:
    """Found on the base, given to an adapter; a rank of 0 takes a layer out, a missing one starts as ever."""
    state = graftlm.get_eva_state_dict(fresh("llama"), eva_data(), eva(graftlm))
    assert all(name.startswith("model.layers.") for name in state)
    first, second = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
    state[first] = state[first][:0]
    state.pop(second)
    model = graftlm.get_peft_model(fresh("llama"), eva(graftlm))
    with pytest.warns(UserWarning, match=rf"were not found in the eva state_dict: \['{second}'\]"):
        graftlm.initialize_lora_eva_weights(model, eva_state_dict=state)
    assert not hasattr(model.base.get_submodule(first), "base_layer")
    assert first not in model.peft_config["default"].target_modules
    assert model.base.get_submodule(second).lora_A["default"].weight.shape[0] == 4
    model(**INPUTS).loss.backward()
    assert all(p.requires_grad for _, p in model.adapter_parameters("default"))


def test_eva_needs() -> None:
    model = graftlm.get_peft_model(fresh("llama"), eva(graftlm))
    with pytest.raises(ConfigError, match="dataloader is required if eva_state_dict is not provided"):
        graftlm.initialize_lora_eva_weights(model)
    with pytest.raises(ConfigError, match="dataloader is empty"):
        graftlm.initialize_lora_eva_weights(model, [])
    with pytest.raises(ConfigError, match="model must be a PeftModel"):
        graftlm.initialize_lora_eva_weights(fresh("llama"), eva_data())
    with pytest.raises(ConfigError, match="can only be used with `init_lora_weights='eva'`"):
        graftlm.initialize_lora_eva_weights(graftlm.get_peft_model(fresh("llama"), graftlm.LoraConfig(**PLAIN)), eva_data())
    with pytest.raises(ConfigError, match="peft_config is required if model is not a PeftModel"):
        graftlm.get_eva_state_dict(fresh("llama"), eva_data())
    with pytest.raises(ConfigError, match="module names were not found in the model: nowhere"):
        graftlm.get_eva_state_dict(model, eva_data(), prepare_layer_inputs_fn={"nowhere": print})
