"""Mistakes raise: what was got, what was expected, and the nearest right name."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import peft
import pytest
import torch
from families import batch
from helpers import attach, config, fresh, logits_of, state_of
from transformers import DynamicCache, StaticCache

import graftlm
from graftlm.errors import (
    AdapterError,
    CheckpointError,
    CompositionError,
    ConfigError,
    GraftError,
    TargetError,
    UnsupportedError,
)

INPUTS = batch("llama")
SOFT = ("prompt", "p_tuning_mlp", "prefix")


def lora(**options: Any) -> graftlm.LoraConfig:
    return graftlm.LoraConfig(task_type="CAUSAL_LM", **options)


# -- configurations ----------------------------------------------------------------------------------------------------
CONFIG_MISTAKES: list[tuple[Any, dict[str, Any], str]] = [
    (graftlm.LoraConfig, {"r": 0}, r"r=0: expected a whole number above 0"),
    (graftlm.LoraConfig, {"r": -4}, r"r=-4: expected a whole number above 0"),
    (graftlm.LoraConfig, {"r": 2.5}, r"r=2.5: expected a whole number above 0"),
    (graftlm.LoraConfig, {"r": True}, r"r=True: expected a whole number"),
    (graftlm.LoraConfig, {"r": "8"}, r"r='8': expected a whole number"),
    (graftlm.LoraConfig, {"lora_dropout": 1.0}, r"lora_dropout=1.0: expected a probability, 0 <= p < 1"),
    (graftlm.LoraConfig, {"lora_dropout": -0.1}, r"lora_dropout=-0.1: expected a probability"),
    (graftlm.LoraConfig, {"bias": "lora"}, r"bias='lora': expected 'none', 'all' or 'lora_only'"),
    (graftlm.LoraConfig, {"init_lora_weights": "pisa"}, r"init_lora_weights='pisa': expected True, False.*mean 'pissa'"),
    (graftlm.LoraConfig, {"init_lora_weights": "loftqq"}, r"init_lora_weights='loftqq'.*mean 'loftq'"),
    (graftlm.LoraConfig, {"layers_pattern": "layers"}, r"layers_pattern is given without layers_to_transform"),
    (graftlm.LoraConfig, {"layers_to_transform": [0], "target_modules": "all-linear"}, r"needs target_modules as a list"),
    (graftlm.LoraConfig, {"task_type": "CAUSAL"}, r"task_type='CAUSAL': expected one of .*did you mean 'CAUSAL_LM'"),
    (graftlm.PromptTuningConfig, {"num_virtual_tokens": 0}, r"num_virtual_tokens=0"),
    (graftlm.PromptTuningConfig, {"num_virtual_tokens": -3}, r"num_virtual_tokens=-3"),
    (graftlm.PromptTuningConfig, {"prompt_tuning_init": "RANDM"}, r"prompt_tuning_init='RANDM'.*did you mean 'RANDOM'"),
    (graftlm.PromptTuningConfig, {"prompt_tuning_init": "TEXT"}, r"needs tokenizer_name_or_path \(got None\)"),
    (graftlm.PromptTuningConfig, {"tokenizer_kwargs": {"use_fast": True}}, r"only for prompt_tuning_init=TEXT"),
    (graftlm.PromptEncoderConfig, {"encoder_reparameterization_type": "GRU"}, r"'GRU': expected one of MLP, LSTM"),
    (graftlm.PromptEncoderConfig, {"encoder_hidden_size": -1}, r"encoder_hidden_size=-1"),
    (graftlm.PromptEncoderConfig, {"encoder_num_layers": 0}, r"encoder_num_layers=0"),
    (graftlm.PromptEncoderConfig, {"encoder_dropout": 1.5}, r"encoder_dropout=1.5: expected a probability"),
    (graftlm.PromptEncoderConfig, {"init_weights": "words"}, r"'words': expected None \(random\), 'vocab' or 'text'"),
    (graftlm.PromptEncoderConfig, {"init_weights": "text"}, r"needs init_text and tokenizer_name_or_path"),
    (graftlm.PrefixTuningConfig, {"init_weights": "random"}, r"init_weights='random': expected None \(random\), 'zero'"),
    (graftlm.PrefixTuningConfig, {"init_weights": "text"}, r"needs init_text and tokenizer_name_or_path"),
    (graftlm.PrefixTuningConfig, {"encoder_hidden_size": 0}, r"encoder_hidden_size=0"),
    (graftlm.PrefixTuningConfig,
     {"init_weights": "text", "init_text": "a", "tokenizer_name_or_path": "b", "prefix_projection": True},
     r"prefix_projection=False"),
    (graftlm.BottleneckConfig, {"placement": "houlsbi"}, r"placement='houlsbi': expected one of HOULSBY, PFEIFFER"),
    (graftlm.BottleneckConfig, {"reduction_factor": 0}, r"reduction_factor=0: expected a number above 0"),
    (graftlm.BottleneckConfig, {"dropout": 2}, r"dropout=2: expected a probability"),
    (graftlm.BottleneckConfig, {"activation": "relv"}, r"activation='relv' is unknown to transformers.*'relu'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    CONFIG_MISTAKES,
    ids=[f"{kind.__name__}-{'-'.join(options)}-{i}" for i, (kind, options, _) in enumerate(CONFIG_MISTAKES)],
)
def test_configuration_values(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        kind(**options)
    assert isinstance(caught.value, GraftError)
    assert isinstance(caught.value, ValueError)


METHODS = (graftlm.LoraConfig, graftlm.PromptTuningConfig, graftlm.PromptEncoderConfig, graftlm.PrefixTuningConfig,
           graftlm.BottleneckConfig)  # fmt: skip
FIELDS = [(kind, f.name) for kind in METHODS for f in dataclasses.fields(kind) if f.name != "peft_type"]


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[f"{k.__name__}-{n}" for k, n in FIELDS])
def test_every_field_says_what_it_expects(kind: Any, name: str) -> None:
    """An object of no use anywhere: never accepted, never an error of another kind."""
    with pytest.raises(ConfigError, match=rf"{name}=<object.*: expected|{name}.*expected"):
        kind(**{name: object()})


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (graftlm.LoraConfig, {"lora_alpha": "16"}, "lora_alpha='16': expected a finite number"),
        (graftlm.LoraConfig, {"lora_alpha": float("nan")}, "lora_alpha=nan: expected a finite number"),
        (graftlm.LoraConfig, {"lora_dropout": "0.1"}, "lora_dropout='0.1': expected a probability"),
        (graftlm.LoraConfig, {"lora_dropout": True}, "lora_dropout=True: expected a probability"),
        (graftlm.LoraConfig, {"use_dora": "yes"}, "use_dora='yes': expected True or False"),
        (
            graftlm.LoraConfig,
            {"modules_to_save": "lm_head"},
            r"'lm_head': expected a list of strings.*write .*=\['lm_head'\]",
        ),
        (graftlm.LoraConfig, {"target_modules": [1]}, "target_modules=.*: expected a list of strings or a string or None"),
        (graftlm.LoraConfig, {"target_modules": "(q"}, r"target_modules: '\(q' is no regular expression"),
        (graftlm.LoraConfig, {"rank_pattern": {"q_proj": "4"}}, r"rank_pattern\['q_proj'\]='4': expected a whole number"),
        (
            graftlm.LoraConfig,
            {"alpha_pattern": {"q_proj": None}},
            r"alpha_pattern\['q_proj'\]=None: expected a finite number",
        ),
        (graftlm.LoraConfig, {"alpha_pattern": {"q[": 1}}, r"alpha_pattern: 'q\[' is no regular expression"),
        (graftlm.LoraConfig, {"layers_to_transform": "0"}, "layers_to_transform='0': expected a list of whole numbers"),
        (graftlm.PromptTuningConfig, {"num_virtual_tokens": "4"}, "num_virtual_tokens='4': expected a whole number above 0"),
        (graftlm.PromptTuningConfig, {"num_virtual_tokens": None}, "num_virtual_tokens=None: expected a whole number"),
        (graftlm.PrefixTuningConfig, {"num_layers": 0}, "num_layers=0: expected a whole number above 0 or None"),
        (graftlm.PromptEncoderConfig, {"encoder_dropout": "0"}, "encoder_dropout='0': expected a probability"),
        (graftlm.BottleneckConfig, {"scaling": "4"}, "scaling='4': expected a finite number"),
        (graftlm.BottleneckConfig, {"reduction_factor": "16"}, "reduction_factor='16': expected a number above 0"),
    ],
)
def test_kinds_of_values(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**options)


def test_values_become_plain_ones(tmp_path: Path) -> None:
    """Numbers of numpy, tuples, sets, ranges and paths are what they stand for, and the file can be written."""
    made = graftlm.LoraConfig(
        r=np.int64(4), lora_alpha=np.float32(8), target_modules={"v_proj", "q_proj"}, layers_to_transform=range(2),
        rank_pattern=None, modules_to_save=("lm_head",), base_model_name_or_path=Path("base"),
    )  # fmt: skip
    made.save_pretrained(tmp_path)
    assert graftlm.PeftConfig.from_pretrained(tmp_path) == made
    assert (made.r, made.target_modules, made.layers_to_transform) == (4, ["q_proj", "v_proj"], [0, 1])
    assert (made.rank_pattern, made.modules_to_save, made.base_model_name_or_path) == ({}, ["lm_head"], "base")
    assert type(made.lora_alpha) is float
    with pytest.raises(ConfigError, match="no field 'lora_alpa' to save; did you mean 'lora_alpha'"):
        made.save_pretrained(tmp_path, lora_alpa=3)


# -- HF PEFT's arguments -------------------------------------------------------------------------------------------------
SHARED_CONFIGS = ("LoraConfig", "PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig")


@pytest.mark.parametrize("name", SHARED_CONFIGS)
def test_every_field_of_peft_is_taken_with_its_default(name: str) -> None:
    """None of theirs is forgotten: each alone, and all together."""
    theirs = getattr(peft, name)()
    given = {f.name: getattr(theirs, f.name) for f in dataclasses.fields(theirs) if f.init}
    given |= {"num_virtual_tokens": 5} if "num_virtual_tokens" in given else {}
    kind = getattr(graftlm, name)
    kind(**given)
    for key, value in given.items():
        kind(**{key: value})
    own = {f.name for f in dataclasses.fields(kind)}
    switched_on = {"peft_version", "megatron_core", "qalora_group_size"}  # say nothing by themselves
    for key in given.keys() - own - switched_on:
        value = True if given[key] is False else {"x": 1}
        with pytest.raises(UnsupportedError, match=rf"{name}: GraftLM does not have HF PEFT's {key}="):
            kind(**{key: value})


def test_groups_of_settings_are_looked_into() -> None:
    graftlm.LoraConfig(runtime_config=peft.LoraRuntimeConfig())
    graftlm.LoraConfig(runtime_config={"ephemeral_gpu_offload": False})
    with pytest.raises(UnsupportedError, match="runtime_config"):
        graftlm.LoraConfig(runtime_config=peft.LoraRuntimeConfig(ephemeral_gpu_offload=True))


CALLS: dict[str, Any] = {
    "get_peft_model": peft.get_peft_model,
    "from_pretrained": peft.PeftModel.from_pretrained,
    "load_adapter": peft.PeftModel.load_adapter,
    "add_adapter": peft.PeftModel.add_adapter,
    "save_pretrained": peft.PeftModel.save_pretrained,
    "set_adapter": peft.PeftModel.set_adapter,
    "add_weighted_adapter": peft.LoraModel.add_weighted_adapter,
    "merge_adapter": peft.LoraModel.merge_adapter,
    "merge_and_unload": peft.LoraModel.merge_and_unload,
    "set_peft_model_state_dict": peft.set_peft_model_state_dict,
    "get_peft_model_state_dict": peft.get_peft_model_state_dict,
    "load_peft_weights": peft.load_peft_weights,
    "prepare_model_for_kbit_training": peft.prepare_model_for_kbit_training,
}


@pytest.mark.parametrize("name", list(CALLS))
def test_calls_take_every_argument_of_peft(name: str, tmp_path: Path) -> None:
    """With the defaults that HF PEFT gives them."""
    options = {
        p.name: p.default
        for p in inspect.signature(CALLS[name]).parameters.values()
        if p.default is not p.empty and p.kind is not p.VAR_KEYWORD
    }
    model = attach("llama", "lora")
    model.save_pretrained(tmp_path / "saved")
    saved = tmp_path / "saved"
    first = {
        "get_peft_model": (fresh("llama"), lora()),
        "from_pretrained": (fresh("llama"), saved),
        "load_adapter": (saved, "second"),
        "add_adapter": ("second", lora()),
        "save_pretrained": (tmp_path / "new",),
        "set_adapter": ("default",),
        "add_weighted_adapter": (["default", "default"], [0.5, 0.5], "mix"),
        "set_peft_model_state_dict": (model, graftlm.get_peft_model_state_dict(model)),
        "get_peft_model_state_dict": (model,),
        "load_peft_weights": (saved,),
        "prepare_model_for_kbit_training": (fresh("llama"),),
    }.get(name, ())
    owner = graftlm if hasattr(graftlm, name) else graftlm.PeftModel if name == "from_pretrained" else model
    getattr(owner, name)(*first, **options)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("from_pretrained", {"key_mapping": {"a": "b"}}, UnsupportedError),
        ("from_pretrained", {"lo_cpu_mem_usage": True}, TypeError),
        ("save_pretrained", {"path_initial_model_for_weight_conversion": "init"}, UnsupportedError),
        ("save_pretrained", {"push_to_hub": True}, UnsupportedError),
        ("save_pretrained", {"selected_adapter": ["default"]}, TypeError),
        ("load_adapter", {"key_mapping": {"a": "b"}}, UnsupportedError),
        ("add_adapter", {"autocast": False}, TypeError),
    ],
)
def test_arguments_that_ask_for_what_is_not_here(name: str, options: dict[str, Any], error: Any, tmp_path: Path) -> None:
    model = attach("llama", "lora")
    model.save_pretrained(tmp_path)
    with pytest.raises(error, match=next(iter(options))):
        if name == "from_pretrained":
            graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path, **options)
        elif name == "save_pretrained":
            model.save_pretrained(tmp_path / "new", **options)
        elif name == "load_adapter":
            model.load_adapter(tmp_path, "second", **options)
        else:
            model.add_adapter("second", lora(), **options)
    assert list(model.peft_config) == ["default"]
    assert not (tmp_path / "new").exists()


def test_usual_arguments_of_loading(tmp_path: Path) -> None:
    """As scripts give them: the base's own precision, where to put what, hub options."""
    attach("llama", "lora").save_pretrained(tmp_path / "a")
    half = fresh("llama").to(torch.bfloat16)
    model = graftlm.PeftModel.from_pretrained(
        half, tmp_path, torch_dtype=torch.bfloat16, device_map="auto", low_cpu_mem_usage=True, ephemeral_gpu_offload=False,
        revision=None, subfolder="a", token=None, use_auth_token=True, cache_dir=None,
    )  # fmt: skip
    assert {p.dtype for k, p in model.named_parameters() if ".lora_" in k} == {torch.float32}
    model.load_adapter(tmp_path / "a", "sixteen", torch_device="cpu", autocast_adapter_dtype=False)
    model.add_adapter("new", lora(), autocast_adapter_dtype=False)
    kinds = {n: {p.dtype for _, p in model.adapter_parameters(n)} for n in model.peft_config}
    assert kinds == {"default": {torch.float32}, "sixteen": {torch.bfloat16}, "new": {torch.bfloat16}}
    model.add_adapter("newer", lora())
    assert {p.dtype for _, p in model.adapter_parameters("newer")} == {torch.float32}


@pytest.mark.parametrize("kind", [graftlm.LoraConfig, graftlm.PromptTuningConfig, graftlm.PrefixTuningConfig])
def test_unknown_fields(kind: Any) -> None:
    with pytest.raises(TypeError, match="no_such_field"):
        kind(no_such_field=1)


def test_enum_values_in_any_case() -> None:
    assert graftlm.LoraConfig(task_type="causal_lm").task_type is graftlm.TaskType.CAUSAL_LM
    assert graftlm.BottleneckConfig(placement="Houlsby").placement is graftlm.BottleneckPlacement.HOULSBY
    assert graftlm.LoraConfig(task_type=peft.TaskType.CAUSAL_LM).task_type is graftlm.TaskType.CAUSAL_LM
    assert graftlm.LoraConfig().task_type is None


def test_mlp_layers_are_fixed() -> None:
    with pytest.warns(UserWarning, match="encoder_num_layers is for the LSTM"):
        graftlm.PromptEncoderConfig(encoder_num_layers=4)


@pytest.mark.parametrize(
    "wrong", [None, {"peft_type": "LORA"}, "lora", graftlm.LoraConfig, graftlm.PeftConfig(), peft.LoraConfig(r=4)],
    ids=["none", "dict", "string", "class", "bare", "peft"],
)  # fmt: skip
def test_wrong_kinds_of_configuration(wrong: Any) -> None:
    base = fresh("llama")
    before = state_of(base)
    with pytest.raises((ConfigError, TypeError), match="configuration|LoraConfig"):
        graftlm.get_peft_model(base, wrong)
    assert state_of(base).keys() == before.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())


def test_peft_configurations_are_told_where_to_come_from() -> None:
    with pytest.raises(ConfigError, match=r"got peft\..*LoraConfig. Import it from graftlm"):
        graftlm.get_peft_model(fresh("llama"), peft.LoraConfig(r=4))


def test_from_dict() -> None:
    with pytest.raises(CheckpointError, match="peft_type 'LORAA' is not a method.*did you mean 'LORA'"):
        graftlm.PeftConfig.from_peft_type(peft_type="LORAA")
    with pytest.raises(CheckpointError, match="peft_type None"):
        graftlm.PeftConfig.from_peft_type(r=4)
    assert graftlm.PeftConfig.from_peft_type(peft_type="LORA", r=4) == graftlm.LoraConfig(r=4)


# -- target modules ----------------------------------------------------------------------------------------------------
TARGET_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["q_projj"]}, r"\['q_projj'\] matches no module of this model; did you mean 'q_proj'"),
    ({"target_modules": ["nothing", "at_all"]}, r"linear layers are called down_proj, gate_proj, k_proj.*'all-linear'"),
    ({"target_modules": r".*\.nowhere"}, r"matches no module"),
    ({"target_modules": []}, r"matches no module"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"within layers_to_transform=\[7\]"),
    ({"target_modules": ["q_proj"], "layers_to_transform": 2}, r"within layers_to_transform=2"),
    ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"}, r"matches no module"),
    ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"outside exclude_modules=\['q_proj'\]"),
    ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, r"is called 'lm_haed'; did you mean 'lm_head'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), TARGET_MISTAKES, ids=[str(i) for i in range(len(TARGET_MISTAKES))])
def test_target_modules(options: dict[str, Any], message: str) -> None:
    base = fresh("llama")
    before = state_of(base)
    with pytest.raises(TargetError, match=message):
        graftlm.get_peft_model(base, lora(**options))
    assert state_of(base).keys() == before.keys()
    model = attach("llama", "prompt")
    before = state_of(model)
    with pytest.raises(TargetError):
        model.add_adapter("second", lora(**options))
    assert state_of(model).keys() == before.keys()
    assert list(model.peft_config) == ["default"]


def test_each_unmatched_target_is_named_once() -> None:
    with pytest.warns(UserWarning) as caught:
        graftlm.get_peft_model(fresh("llama"), lora(target_modules=["q_proj", "v_prj", "ffn_down"]))
    texts = [str(w.message) for w in caught if "target_modules" in str(w.message)]
    assert len(texts) == 1
    assert "'v_prj' (did you mean 'v_proj'" in texts[0]
    assert "'ffn_down'" in texts[0]
    assert "'q_proj'," not in texts[0].split("matches")[1].split(".")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graftlm.get_peft_model(fresh("llama"), lora(target_modules=["q_proj", "v_proj"]))


def test_layers_that_do_not_exist_beside_some_that_do() -> None:
    """A number out of range is named, although others match."""
    with pytest.warns(UserWarning, match="layers_to_transform.*9"):
        graftlm.get_peft_model(fresh("llama"), lora(target_modules=["q_proj"], layers_to_transform=[0, 9]))


def test_pattern_keys_that_match_nothing() -> None:
    """A rank or alpha for a module that is not there would be silently ignored."""
    with pytest.warns(RuntimeWarning, match="rank_pattern.*q_prj"):
        graftlm.get_peft_model(fresh("llama"), lora(target_modules=["q_proj"], rank_pattern={"q_prj": 2}))
    with pytest.warns(RuntimeWarning, match="alpha_pattern.*v_proj"):
        graftlm.get_peft_model(fresh("llama"), lora(target_modules=["q_proj"], alpha_pattern={"v_proj": 2}))


def lora_places(lib: Any, **options: Any) -> list[str]:
    """Modules that LoRA is attached to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lib.get_peft_model(fresh("llama"), lib.LoraConfig(task_type="CAUSAL_LM", **options))
    return sorted({k.split(".lora_")[0] for k, _ in model.named_parameters() if ".lora_" in k})


WHOLE = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "model.embed_tokens"], ["q_proj", WHOLE]])
@pytest.mark.parametrize("pattern", [None, "layers"])
def test_whole_names_are_taken_whatever_layers_are_asked_for(targets: list[str], pattern: str | None) -> None:
    options = {"target_modules": targets, "layers_to_transform": [1], "layers_pattern": pattern}
    found = lora_places(graftlm, **options)
    assert found == lora_places(peft, **options)
    assert len(found) == 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [1]}, "matches 'embed_tokens' is left out"),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, "matches 'v_proj' is left out"),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, "matches 'lm_head' is left out"),
        ({"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 7}, "layers_to_transform: 7"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, -1]}, r"layers_to_transform: -1 \(layers are counted"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["v_prj"]}, "exclude_modules: 'v_prj'"),
        ({"target_modules": ["q_proj"], "exclude_modules": "q_proj"}, r"the expression 'q_proj'.*write \['q_proj'\]"),
    ],
)
def test_entries_that_select_nothing_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.warns(UserWarning, match=match):
        graftlm.get_peft_model(fresh("llama"), lora(**options))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"target_modules": "q_proj"}, r"an expression for whole module names.*for modules of that name write \['q_proj'\]"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, r"layers_to_transform=\[9\]\. Its linear"),
        ({"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]}, "trained in full"),
    ],
)
def test_nothing_matches_and_no_entry_is_offered_itself(options: dict[str, Any], match: str) -> None:
    with pytest.raises(TargetError, match=match) as caught:
        graftlm.get_peft_model(fresh("llama"), lora(**options))
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("rank", [0, -2, 1.5])
def test_pattern_values(rank: Any) -> None:
    with pytest.raises(ConfigError, match="rank_pattern"):
        graftlm.get_peft_model(fresh("llama"), lora(target_modules=["q_proj"], rank_pattern={"q_proj": rank}))


@pytest.mark.parametrize("config", [
    graftlm.LoraConfig(r=65), graftlm.LoraConfig(r=4, rank_pattern={"layers.1.self_attn.q_proj": 65}),
    graftlm.AdaLoraConfig(init_r=65, target_r=8, total_step=9, tinit=1, tfinal=1), graftlm.LoHaConfig(r=65),
], ids=["lora", "pattern", "adalora", "loha"])  # fmt: skip
def test_a_rank_over_both_sizes_of_a_layer(tmp_path: Path, config: Any) -> None:
    """It is refused where an adapter is made, and the base stays as it was; a file of HF PEFT's that has one is read."""
    base = fresh("llama")
    before = state_of(base)
    config.target_modules, size = ["q_proj"], base.config.hidden_size
    with pytest.raises(ConfigError, match=rf"r=\d+ is over both sizes of '.*q_proj', a Linear of .*at most {size} "):
        graftlm.get_peft_model(base, config)
    assert state_of(base).keys() == before.keys()
    theirs = peft.get_peft_model(fresh("llama"), getattr(peft, type(config).__name__)(**_given(config)))
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs.eval()(**INPUTS).logits
        torch.testing.assert_close(graftlm.PeftModel.from_pretrained(base, tmp_path)(**INPUTS).logits, expected)


def _given(config: Any) -> dict[str, Any]:
    names = ("r", "rank_pattern", "init_r", "target_r", "total_step", "tinit", "tfinal", "target_modules")
    return {name: getattr(config, name) for name in names if getattr(config, name, None)}


def test_modules_that_lora_cannot_take() -> None:
    base = fresh("llama")
    before = state_of(base)
    with pytest.raises(UnsupportedError, match=r"LoRA has no form for '.*norm', a LlamaRMSNorm"):
        graftlm.get_peft_model(base, lora(target_modules=["q_proj", "norm"]))
    assert state_of(base).keys() == before.keys()
    with pytest.raises(UnsupportedError, match="is for linear layers"):
        graftlm.get_peft_model(base, lora(target_modules=["embed_tokens"], init_lora_weights="pissa"))
    assert state_of(base).keys() == before.keys(), "a failed attach left modules behind"
    graftlm.get_peft_model(base, lora())


def test_no_defaults_for_an_unknown_family() -> None:
    base = fresh("bloom")
    base.config.model_type = "blom"
    with pytest.raises(TargetError, match="no default target_modules for model type 'blom'; did you mean 'bloom'"):
        graftlm.get_peft_model(base, lora())


@pytest.mark.parametrize(("kind", "targets"), [
    (graftlm.LoraConfig, ["q_proj", "v_proj"]), (graftlm.IA3Config, ["k_proj", "v_proj", "down_proj"]),
])  # fmt: skip
def test_a_new_family_built_like_llama_has_llamas_defaults(kind: Any, targets: list[str]) -> None:
    base = fresh("llama")
    base.config.model_type = "smollm9"
    made = graftlm.get_peft_model(base, kind(task_type="CAUSAL_LM")).peft_config["default"]
    assert made.target_modules == targets and getattr(made, "feedforward_modules", ["down_proj"]) == ["down_proj"]


def test_bottleneck_places() -> None:
    with pytest.raises(TargetError, match="leaves no block"):
        graftlm.get_peft_model(fresh("llama"), graftlm.BottleneckConfig(layers_to_transform=[5]))
    with pytest.raises(TargetError, match=r"feed_forward_modules=\['down'\] matches no module"):
        graftlm.get_peft_model(fresh("llama"), graftlm.BottleneckConfig(feed_forward_modules=["down"]))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers_to_transform": [0, 5]}, "layers_to_transform: 5"),
        ({"feed_forward_modules": ["down_proj", "dwn_proj"]}, "feed_forward_modules: 'dwn_proj'; did you mean 'down_proj'"),
        ({"attention_modules": ["o_proj"]}, r"attention_modules \(placement PFEIFFER has no adapter there\)"),
    ],
)
def test_bottleneck_entries_that_select_nothing_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.warns(UserWarning, match=match):
        graftlm.get_peft_model(fresh("llama"), graftlm.BottleneckConfig(**options))


def test_expressions_and_empty_names() -> None:
    with pytest.raises(TargetError, match=r"feed_forward_modules='down_proj' matches no module.*write \['down_proj'\]"):
        graftlm.get_peft_model(fresh("llama"), graftlm.BottleneckConfig(feed_forward_modules="down_proj"))
    with pytest.raises(ConfigError, match=r"feed_forward_modules: '\(' is no regular expression"):
        graftlm.BottleneckConfig(feed_forward_modules="(")
    with pytest.raises(ConfigError, match=r"layers_pattern: '\[' is no regular expression"):
        lora(layers_to_transform=[0], layers_pattern=["layers", "["])
    with pytest.raises(TargetError, match="an empty name would be every module"):
        graftlm.get_peft_model(fresh("llama"), lora(modules_to_save=[""]))


def test_names_given_as_a_string_or_not_at_all(tmp_path: Path) -> None:
    model = attach("llama", "lora")
    model.save_pretrained(tmp_path, selected_adapters="default")
    assert (tmp_path / "adapter_model.safetensors").exists()
    with pytest.raises(AdapterError, match="expected two lists"):
        model.add_weighted_adapter("default", [1.0], "mix")
    for nothing in (None, 3, [], ["default", "default"]):
        with pytest.raises(AdapterError, match="expected one or more different names"):
            model.set_adapter(nothing)


def test_prefix_and_prompt_sizes_given_wrong() -> None:
    with pytest.raises(ConfigError, match="token_dim=16: the input embeddings of this model are 32 wide"):
        graftlm.get_peft_model(fresh("llama"), graftlm.PromptTuningConfig(token_dim=16))
    with pytest.raises(ConfigError, match="does not fit: this model's 2 layers keep 2 x 8 = 16"):
        graftlm.get_peft_model(fresh("llama"), graftlm.PrefixTuningConfig(token_dim=32))
    with pytest.raises(ConfigError, match="num_layers=5"):
        graftlm.get_peft_model(fresh("llama"), graftlm.PrefixTuningConfig(num_layers=5))
    with pytest.raises(ConfigError, match="no separate encoder"):
        graftlm.get_peft_model(fresh("llama"), graftlm.PrefixTuningConfig(prefix_in_encoder=True))


# -- the wrapper -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["", "a.b", "__base__", None, 3, "default"])
def test_adapter_names(name: Any) -> None:
    model = attach("llama", "lora")
    before = state_of(model)
    with pytest.raises(AdapterError, match="cannot name an adapter|already"):
        model.add_adapter(name, config("lora", "llama"))
    assert state_of(model).keys() == before.keys()
    if name != "default":
        with pytest.raises(AdapterError, match="cannot name an adapter"):
            graftlm.get_peft_model(fresh("llama"), config("lora", "llama"), adapter_name=name)


@pytest.mark.parametrize("method", ["lora", "prompt", "houlsby", "prefix", "bias_all"])
@pytest.mark.parametrize("name", ["weight", "items", "keys", "training", "with/slash", "with space", "模型", "0"])
def test_unusual_adapter_names(name: str, method: str, tmp_path: Any) -> None:
    """What is not refused works: names of container methods, of attributes, of other scripts."""
    try:
        model = graftlm.get_peft_model(fresh("llama"), config(method, "llama"), adapter_name=name).eval()
    except AdapterError as error:
        assert name in str(error)
        return
    wanted = logits_of(model, **INPUTS)
    model.save_pretrained(tmp_path)
    folder = next(p.parent for p in tmp_path.rglob("adapter_config.json"))
    again = graftlm.PeftModel.from_pretrained(fresh("llama"), folder, adapter_name=name)
    assert torch.allclose(logits_of(again, **INPUTS), wanted, atol=1e-6)


def test_names_that_contain_each_other() -> None:
    model = graftlm.get_peft_model(fresh("llama"), config("lora", "llama"), adapter_name="a")
    model.add_adapter("a_b", config("dora", "llama"))
    model.add_adapter("weight_a", config("embedding", "llama"))
    model.add_adapter("lora_A", config("lora", "llama"))
    keys = {n: {k for k, _ in model.adapter_parameters(n)} for n in model.peft_config}
    names = list(keys)
    for i, one in enumerate(names):
        assert keys[one]
        for other in names[i + 1 :]:
            assert not keys[one] & keys[other], (one, other)
    trained = {k for k, _ in model.named_parameters() if ".lora_" in k}
    assert set.union(*keys.values()) == trained


def test_wrapping_twice() -> None:
    model = attach("llama", "lora")
    with pytest.raises(AdapterError, match=r"wrapped already. Add another adapter with model.add_adapter"):
        graftlm.get_peft_model(model, config("prompt", "llama"))


@pytest.mark.parametrize("wrong", ["llama", None, dict])
def test_no_model(wrong: Any) -> None:
    with pytest.raises(AdapterError, match="Expected a transformers model as the base"):
        graftlm.get_peft_model(wrong, config("lora", "llama"))


def test_unknown_adapters_everywhere() -> None:
    model = attach("llama", "lora")
    for call in (
        lambda: model.set_adapter("defualt"), lambda: model.delete_adapter("defualt"),
        lambda: model.merge_adapter("defualt"),
        lambda: model.set_requires_grad("defualt"),
        lambda: model.save_pretrained("/nowhere", selected_adapters=["defualt"]),
        lambda: model(**INPUTS, adapter_names=["defualt"] * 3), lambda: model.merge_and_unload(adapter_names=["defualt"]),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match="There is no adapter 'defualt'; attached: 'default'; did you mean 'default'"):
            call()


def test_second_adapter_that_trains_biases() -> None:
    model = attach("gpt2", "bias_all")
    before = state_of(model)
    with pytest.raises(ConfigError, match="trains biases too"):
        model.add_adapter("second", config("bias_lora_only", "gpt2"))
    assert state_of(model).keys() == before.keys()


# -- forward -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", SOFT)
def test_masks_of_four_dimensions(method: str) -> None:
    model = attach("llama", method)
    mask = torch.zeros(3, 1, 7, 7)
    with pytest.raises(UnsupportedError, match=r"need an attention_mask \[B, T\] of ones and zeros, got \(3, 1, 7, 7\)"):
        model(input_ids=INPUTS["input_ids"], attention_mask=mask)


def test_masks_of_four_dimensions_with_lora() -> None:
    """Nothing stands against them without virtual tokens."""
    model = attach("llama", "lora")
    causal = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None].expand(3, 1, 7, 7)
    got = logits_of(model, input_ids=INPUTS["input_ids"], attention_mask=causal)
    assert torch.allclose(got, logits_of(model, input_ids=INPUTS["input_ids"]), atol=1e-5)


@pytest.mark.parametrize("method", SOFT)
def test_packed_rows(method: str) -> None:
    model = attach("llama", method)
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(3, -1)
    with pytest.raises(UnsupportedError, match="several sequences packed into one"):
        model(**INPUTS, position_ids=packed)


def test_packed_rows_with_lora() -> None:
    """Two sequences in one row equal the two rows: position_ids go through."""
    model = attach("llama", "lora")
    ids = INPUTS["input_ids"][:1]
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    got = logits_of(model, input_ids=ids, position_ids=packed, use_cache=False)  # transformers' own condition for it
    alone = torch.cat((logits_of(model, input_ids=ids[:, :3]), logits_of(model, input_ids=ids[:, 3:])), 1)
    assert torch.allclose(got, alone, atol=1e-5)


@pytest.mark.parametrize("method", SOFT)
def test_static_cache(method: str) -> None:
    """Refused, or right: never silently wrong."""
    model = attach("llama", method)
    ids = INPUTS["input_ids"]
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    wanted = model.generate(ids, **options)
    try:
        got = model.generate(ids, **options, cache_implementation="static")
    except UnsupportedError as error:
        assert "static cache" in str(error)
    else:
        assert torch.equal(got, wanted)
    cache = StaticCache(config=model.config, max_cache_len=16)
    try:
        with torch.no_grad():
            got = model(input_ids=ids, past_key_values=cache).logits
    except UnsupportedError as error:
        assert "static cache" in str(error)
    else:
        assert torch.allclose(got[:, -7:], logits_of(model, input_ids=ids)[:, -7:], atol=1e-5)


def test_static_cache_with_lora() -> None:
    model = attach("llama", "lora")
    options = {"max_new_tokens": 4, "do_sample": False}
    got = model.generate(INPUTS["input_ids"], **options, cache_implementation="static")
    assert torch.equal(got, model.generate(INPUTS["input_ids"], **options))


@pytest.mark.parametrize("method", ["lora", *SOFT])
def test_a_cache_by_hand(method: str) -> None:
    """Two forwards with a cache of one's own equal one over the whole row."""
    model = attach("llama", method)
    ids = INPUTS["input_ids"]
    whole = logits_of(model, input_ids=ids)
    cache = DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :4], past_key_values=cache, use_cache=True)
        rest = model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(rest, whole[:, -3:], atol=1e-5)


@pytest.mark.parametrize("method", ["lora", *SOFT])
def test_no_input_at_all(method: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        attach("llama", method)()


@pytest.mark.parametrize("length", [5, 9])
@pytest.mark.parametrize("method", SOFT)
def test_mask_of_the_wrong_length(method: str, length: int) -> None:
    model = attach("llama", method)
    with pytest.raises(GraftError, match="attention_mask"):
        model(input_ids=INPUTS["input_ids"], attention_mask=torch.ones(3, length, dtype=torch.long))


@pytest.mark.parametrize("method", ["lora", *SOFT])
def test_positional_and_tuple_calls(method: str) -> None:
    model = attach("llama", method)
    with torch.no_grad():
        by_place = model(INPUTS["input_ids"], INPUTS["attention_mask"]).logits
        plain = model(input_ids=INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"], return_dict=False)
    assert isinstance(plain, tuple)
    wanted = logits_of(model, input_ids=INPUTS["input_ids"], attention_mask=INPUTS["attention_mask"])
    assert torch.equal(by_place, wanted)
    assert torch.equal(plain[0], wanted)


def test_base_that_was_never_wrapped_is_not_touched_by_a_mistake() -> None:
    """After any of the refusals above the base still works as before."""
    base = fresh("llama")
    wanted = logits_of(base, **INPUTS)
    for wrong in (
        lora(target_modules=["nothing"]), lora(target_modules=["norm"]), graftlm.PrefixTuningConfig(num_layers=9),
        graftlm.BottleneckConfig(layers_to_transform=[9]), lora(target_modules=["q_proj"], modules_to_save=["nothing"]),
    ):  # fmt: skip
        with pytest.raises(GraftError):
            graftlm.get_peft_model(base, wrong)
        assert torch.equal(logits_of(base, **INPUTS), wanted)
        assert not any("lora" in n for n, _ in base.named_modules())


def test_the_error_tree() -> None:
    for kind, builtin in (
        (ConfigError, ValueError), (TargetError, ConfigError), (AdapterError, ValueError), (CompositionError, AdapterError),
        (UnsupportedError, NotImplementedError), (CheckpointError, ValueError),
    ):  # fmt: skip
        assert issubclass(kind, GraftError)
        assert issubclass(kind, builtin)


def test_prefix_where_positions_cannot_follow_the_mask() -> None:
    """MPT's ALiBi counts places: left padding would stand between the prefix and the tokens."""
    from transformers import MptConfig, MptForCausalLM

    torch.manual_seed(0)
    base = MptForCausalLM(MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)).eval()
    model = graftlm.get_peft_model(base, graftlm.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    right = model(input_ids=torch.tensor([[5, 6, 7, 8, 0]]), attention_mask=torch.tensor([[1, 1, 1, 1, 0]])).logits
    torch.testing.assert_close(alone, right[:, :4], atol=1e-5, rtol=0)
    with pytest.raises(graftlm.errors.UnsupportedError, match="Pad on the right"):
        model(input_ids=torch.tensor([[0, 5, 6, 7, 8]]), attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))


def test_a_dtype_for_loading_that_the_base_has_not_warns(tmp_path: Path) -> None:
    """HF PEFT passes it over; an adapter's precision is that of the base."""
    graftlm.get_peft_model(fresh("llama"), graftlm.LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="torch_dtype=torch.bfloat16 changes nothing here"):
        graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path, torch_dtype=torch.bfloat16)


def test_fields_of_a_users_own_method_may_have_any_kind() -> None:
    @dataclasses.dataclass(kw_only=True)
    class OwnConfig(graftlm.PeftConfig):
        kind: Literal["one", "two"] = "one"
        pair: tuple[int, int] = (1, 2)

    assert OwnConfig(kind="two", pair=(3, 4)).pair == (3, 4)
    with pytest.raises(ConfigError, match="kind='three'"):
        OwnConfig(kind="three")  # type: ignore[arg-type]
