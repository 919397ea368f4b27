"""`target_parameters`: experts stacked in one tensor, beside HF PEFT; merged, mixed, composed; what is refused."""

from __future__ import annotations

import copy
import functools
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from families import SPECIAL
from helpers import close, logits_of, randomise, state_of, twenty_steps
from test_parity import both_ways, theirs
from torch import nn

import graftlm
from graftlm.errors import ConfigError, TargetError, UnsupportedError

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, **SPECIAL,
}  # fmt: skip
MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
MODELS: dict[str, Any] = {
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_local_experts=4, sliding_window=None)),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**SIZES, head_dim=8, moe_intermediate_size=20, num_experts=4, num_experts_per_tok=2)
    ),
    "gpt_oss": lambda: t.GptOssForCausalLM(t.GptOssConfig(**SIZES, head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(**{**SIZES, "num_key_value_heads": 4}, **MLA, moe_intermediate_size=20, n_routed_experts=4,
                           num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1)
    ),
}  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@functools.cache
def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model


def fresh(name: str) -> nn.Module:
    return copy.deepcopy(built(name))


def settings(lib: Any = graftlm, **options: Any) -> Any:
    plain = {"task_type": "CAUSAL_LM", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "target_parameters": EXPERTS}
    return lib.LoraConfig(**{**plain, **options})


def attach(name: str, **options: Any) -> graftlm.PeftModel:
    return randomise(graftlm.get_peft_model(fresh(name), settings(**options))).eval()


def rows(count: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 96, (count, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


INPUTS = rows() | {"labels": rows()["input_ids"]}


# -- beside HF PEFT ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MODELS)
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    both_ways(lambda: fresh(name), settings_for(name), INPUTS, tmp_path)


def settings_for(name: str) -> Any:
    targets = ["kv_a_proj_with_mqa"] if name == "deepseek_v3" else ["q_proj"]
    return lambda lib: settings(lib, target_modules=targets)


@pytest.mark.parametrize(
    "options",
    [
        {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []},
        {"target_parameters": ["gate.weight", "experts.gate_up_proj"], "target_modules": None},
        {"target_parameters": ["o_proj.weight"], "target_modules": []},
        {"use_rslora": True, "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"1.mlp.experts.gate_up_proj": 9}},
        {"init_lora_weights": False},
    ],
    ids=["one", "router", "of_a_layer", "patterns", "random"],
)
def test_choices_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    both_ways(lambda: fresh("mixtral"), lambda lib: settings(lib, **options), INPUTS, tmp_path)


def labelled(seed: int) -> dict[str, torch.Tensor]:
    inputs = rows(seed=seed)
    return inputs | {"labels": inputs["input_ids"]}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_twenty_losses(name: str) -> None:
    found: list[list[float]] = []
    start: dict[str, torch.Tensor] = {}
    for lib in (graftlm, peft):
        model = (theirs if lib is peft else graftlm.get_peft_model)(fresh(name), settings(lib))
        if lib is peft:
            peft.set_peft_model_state_dict(model, start)
        else:
            start = {k: v.detach().clone() for k, v in graftlm.get_peft_model_state_dict(model).items()}
        found.append(twenty_steps(model, lambda step: labelled(seed=step % 4), 0.01))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert sum(found[0][-4:]) < sum(found[0][:4])


def test_counts_and_starts_are_hf_pefts() -> None:
    mine, their = graftlm.get_peft_model(fresh("mixtral"), settings()), theirs(fresh("mixtral"), settings(peft))
    assert mine.get_nb_trainable_parameters() == their.get_nb_trainable_parameters()
    assert {k: v.shape for k, v in graftlm.get_peft_model_state_dict(mine).items()} == {
        k: v.shape for k, v in peft.get_peft_model_state_dict(their).items()
    }
    own = {k.replace("base_model.model.", "", 1): v for k, v in mine.state_dict().items() if "lora_" in k}
    assert own.keys() == {k.replace("base_model.model.", "", 1) for k in their.state_dict() if "lora_" in k}
    close(logits_of(mine.eval(), **INPUTS), logits_of(fresh("mixtral"), **INPUTS))


# -- merged, mixed, composed -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_merged_and_unmerged(name: str) -> None:
    model = attach(name)
    model.add_adapter("other", settings(target_parameters=["experts.down_proj"], target_modules=[]))
    model.set_adapter("other")
    randomise(model, seed=4)
    for names in (["default"], ["other"], ["default", "other"]):
        model.set_adapter(names)
        wanted, before = logits_of(model, **INPUTS), state_of(model)
        model.merge_adapter()
        close(logits_of(model, **INPUTS), wanted, 2e-5)
        with model.disable_adapter():
            assert torch.equal(logits_of(model, **INPUTS), logits_of(fresh(name), **INPUTS))
        model.set_adapter("default")
        alone = logits_of(model, **INPUTS)
        model.unmerge_adapter()
        close(logits_of(model, **INPUTS), alone, 2e-5)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    model.set_adapter(["default", "other"])
    merged = model.merge_and_unload()
    close(logits_of(merged, **INPUTS), wanted, 2e-5)
    assert state_of(merged).keys() == state_of(fresh(name)).keys()


def test_merged_as_hf_peft_merges(tmp_path: Path) -> None:
    model = attach("gpt_oss")
    model.save_pretrained(tmp_path)
    their = peft.PeftModel.from_pretrained(fresh("gpt_oss"), tmp_path).merge_and_unload()
    for (key, got), wanted in zip(model.merge_and_unload().named_parameters(), their.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_mixed_rows(name: str) -> None:
    """Adapters of other parameters and of other methods, the base, compositions; with gradients."""
    model = attach(name)
    model.add_adapter("down", settings(target_parameters=["experts.down_proj"], target_modules=[]))
    model.add_adapter("prompt", graftlm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    for other in ("down", "prompt"):
        model.set_adapter(other)
        randomise(model, seed=4, scale=0.3)
    names = ["default", "down", "__base__", ["default", "down"], ["prompt", "default"]]
    inputs = rows(5)
    mixed = logits_of(model.eval(), **inputs, adapter_names=names)
    for i, row in enumerate(names):
        own = {k: v[i : i + 1] for k, v in inputs.items()}
        close(mixed[i, -7:], logits_of(model, **own, adapter_names=[row])[0, -7:], 2e-5)
    model.set_adapter(["default", "down"])
    model(**inputs, labels=inputs["input_ids"], adapter_names=names).loss.backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for i, row in enumerate(names):
        own = {k: v[i : i + 1] for k, v in inputs.items()}
        if row == "__base__":
            continue
        targets = 7 if "prompt" in row else 6  # behind virtual tokens the first token is one, too
        (model(**own, labels=own["input_ids"], adapter_names=[row]).loss * targets / 31).backward()
    for key, parameter in model.named_parameters():
        if key in grads:
            close(grads[key], parameter.grad, 1e-4)
    assert any("experts" in key and "lora_A" in key for key in grads)


def test_two_wrappers_over_one_base() -> None:
    base = fresh("mixtral")
    first = randomise(graftlm.get_peft_model(base, settings())).eval()
    wanted = logits_of(first, **INPUTS)
    second = randomise(graftlm.get_peft_model(base, settings(target_parameters=["experts.down_proj"]))).eval()
    close(logits_of(first, **INPUTS), wanted)
    own = logits_of(second, **INPUTS)
    first.merge_adapter()
    close(logits_of(second, **INPUTS), own)
    close(logits_of(first, **INPUTS), wanted, 2e-5)
    first.unload()
    close(logits_of(second, **INPUTS), own)
    second.unload()
    assert state_of(base).keys() == state_of(fresh("mixtral")).keys()
    assert torch.equal(logits_of(base, **INPUTS), logits_of(fresh("mixtral"), **INPUTS))


def test_checkpointed_and_copied() -> None:
    model = attach("mixtral").train()
    model(**INPUTS).loss.backward()
    wanted = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    other = copy.deepcopy(model)
    other.zero_grad()
    other.gradient_checkpointing_enable({"use_reentrant": False})
    other(**INPUTS).loss.backward()
    for key, parameter in other.named_parameters():
        if key in wanted:
            close(parameter.grad, wanted[key])
    model.delete_adapter("default")
    assert state_of(model.base).keys() == state_of(fresh("mixtral")).keys()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_all_linear_says_that_it_leaves_out_experts(family: str) -> None:
    for config in (graftlm.LoraConfig, graftlm.LoHaConfig):
        with pytest.warns(UserWarning, match=r"experts are stacked .*target_parameters=\['experts.gate_up_proj', 'experts"):
            graftlm.get_peft_model(fresh(family), config(target_modules="all-linear"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graftlm.get_peft_model(fresh(family), settings(target_modules="all-linear", target_parameters=EXPERTS))
        graftlm.get_peft_model(nn.Sequential(nn.Linear(3, 3)), graftlm.LoraConfig(target_modules="all-linear"))


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_names() -> None:
    with pytest.raises(
        TargetError, match=r"matches no parameter of this model: 'experts.down_prj'; did you mean 'experts.down_proj'"
    ):
        attach("mixtral", target_parameters=["experts.down_prj"])
    with pytest.warns(UserWarning, match=r"no parameter of this model matches 'experts.gate'.*The others were used"):
        attach("mixtral", target_parameters=["experts.down_proj", "experts.gate"])
    with pytest.raises(ConfigError, match=r"target_parameters='experts.down_proj': expected a list of strings"):
        settings(target_parameters="experts.down_proj")


@pytest.mark.parametrize(
    "options",
    [
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
    ],
)
def test_what_does_not_go_with_it(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"target_parameters does not work with {next(iter(options))}="):
        settings(**options)


def test_what_cannot_be_changed() -> None:
    with pytest.raises(
        ConfigError, match=r"'model.layers.0.self_attn.q_proj.weight', whose layer is changed through target_modules"
    ):
        attach("mixtral", target_parameters=["q_proj.weight"])
    with pytest.raises(
        UnsupportedError, match=r"'model.layers.0.input_layernorm.weight' of a MixtralRMSNorm, of shape \(32,\)"
    ):
        attach("mixtral", target_parameters=["input_layernorm.weight"])
    model = attach("mixtral", target_parameters=["o_proj.weight"], target_modules=[])
    with pytest.raises(UnsupportedError, match="LoRA has no form for 'model.layers.0.self_attn.o_proj'"):
        model.add_adapter("other", settings(target_modules=["o_proj"], target_parameters=None))


def test_quantised_experts() -> None:
    base = fresh("mixtral")
    experts: Any = base.model.layers[0].mlp.experts
    experts._parameters["down_proj"] = nn.Parameter(torch.zeros(4, 9, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        UnsupportedError,
        match=r"layers.0.mlp.experts.down_proj' of a MixtralExperts, which a quantiser keeps as uint8.*dequantize",
    ):
        graftlm.get_peft_model(base, settings())
    assert "lora_A" not in " ".join(base.state_dict())
