"""Every public name of HF PEFT is one of ours, or absent with a reason; and the names that are ours behave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from torch import nn

import graftlm
import graftlm.utils
from graftlm.compat import names
from graftlm.compat.tuners import TrainableTokensLayer
from graftlm.errors import CheckpointError, ConfigError, UnsupportedError
from graftlm.methods import METHODS, Method

peft = pytest.importorskip("peft", reason="HF PEFT, whose names these are, is not installed")


def found(name: str, home: Any) -> bool:
    return name in graftlm.__all__ or getattr(home, name, None) is not None


def test_every_public_name_is_here_or_absent_with_a_reason() -> None:
    import peft.utils

    assert peft.__version__ == names.VERSION
    unsaid = [n for n in peft.__all__ if not found(n, graftlm) and names.reason(n) is None]
    unsaid += [n for n in peft.utils.__all__ if not found(n, graftlm.utils) and names.reason(n) is None]
    assert not unsaid


def test_no_reason_for_what_is_here() -> None:
    assert not [n for n in names.ABSENT if n in graftlm.__all__ or n in graftlm.utils.__all__]
    known = {*peft.__all__, *peft.utils.__all__}
    assert not [n for n in names.ABSENT if n not in known and not n.startswith("TRANSFORMERS_MODELS_TO_")]


def test_every_home_exists(as_peft: None) -> None:
    from importlib import import_module

    for module, own in names.MODULES.items():
        held = import_module(f"peft.{module}".rstrip("."))
        for name in own:
            assert getattr(held, name) is not None


@pytest.fixture
def as_peft() -> Any:
    graftlm.as_peft()
    yield
    graftlm.as_peft.undo()


# -- by task -------------------------------------------------------------------------------------------------------------
LORA: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}


def test_classes_by_task() -> None:
    made = graftlm.PeftModelForCausalLM(build("llama"), graftlm.LoraConfig(**LORA))
    assert type(made).__name__ == "PeftModelForCausalLM" and made.task_type == "CAUSAL_LM"
    usual = graftlm.get_peft_model(build("llama"), graftlm.LoraConfig(task_type="CAUSAL_LM", **LORA))
    for model in (made, usual):
        assert isinstance(model, (graftlm.PeftModel, graftlm.PeftMixedModel))
        assert isinstance(model, graftlm.PeftModelForCausalLM) and not isinstance(model, graftlm.PeftModelForSeq2SeqLM)
    assert not isinstance(build("llama"), graftlm.PeftModelForCausalLM)
    with pytest.raises(ConfigError, match="is for task_type"):
        graftlm.PeftModelForCausalLM(build("llama"), graftlm.LoraConfig(task_type="SEQ_CLS", **LORA))
    assert graftlm.MODEL_TYPE_TO_PEFT_MODEL_MAPPING["CAUSAL_LM"] is graftlm.PeftModelForCausalLM


def test_auto_classes(tmp_path: Path) -> None:
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **LORA)).eval()
    model.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    loaded = graftlm.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    for wrong in (graftlm.AutoPeftModelForSeq2SeqLM, graftlm.AutoPeftModel):
        with pytest.raises(ConfigError, match="use AutoPeftModelForCausalLM"):
            wrong.from_pretrained(tmp_path / "adapter")
    with pytest.raises(UnsupportedError, match="from_pretrained"):
        graftlm.AutoPeftModelForCausalLM(base)
    with pytest.raises(UnsupportedError, match="a configuration imports nothing"):
        graftlm.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", import_allowlist=["os"])


@pytest.mark.parametrize("mapping", [("system", "os"), ("pipeline", "transformers"), None])
def test_a_configuration_runs_nothing(tmp_path: Path, mapping: tuple[str, str] | None) -> None:
    """HF PEFT imports the library that a file names; here it names a model class of transformers, or nothing is loaded."""
    model = graftlm.get_peft_model(build("llama"), graftlm.LoraConfig(**LORA))
    named = mapping and {"base_model_class": mapping[0], "parent_library": mapping[1]}
    model.peft_config["default"].auto_mapping = named or None
    model.peft_config["default"].base_model_name_or_path = "somewhere"
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="names no model class of transformers"):
        graftlm.AutoPeftModel.from_pretrained(tmp_path)
    model.peft_config["default"].base_model_name_or_path = None
    model.save_pretrained(tmp_path / "nameless")
    with pytest.raises(CheckpointError, match="base_model_name_or_path"):
        graftlm.AutoPeftModel.from_pretrained(tmp_path / "nameless")


# -- by method and layer -------------------------------------------------------------------------------------------------
def test_classes_by_method() -> None:
    from graftlm.compat import tuners

    model = graftlm.get_peft_model(build("llama"), graftlm.LoraConfig(task_type="CAUSAL_LM", **LORA))
    assert isinstance(model.base_model, (graftlm.LoraModel, tuners.BaseTuner)) and not isinstance(
        model.base_model, graftlm.IA3Model
    )
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert (
        isinstance(layer, tuners.BaseTunerLayer)
        and isinstance(layer, tuners.Linear)
        and not isinstance(layer, tuners.Embedding)
    )
    assert not isinstance(model.base_model.model.model.layers[0].self_attn.k_proj, tuners.BaseTunerLayer)
    ia3 = graftlm.get_peft_model(build("llama"), graftlm.IA3Config(task_type="CAUSAL_LM"))
    assert isinstance(ia3.base_model, graftlm.IA3Model) and not isinstance(ia3.base_model, graftlm.LoraModel)
    assert graftlm.PEFT_TYPE_TO_TUNER_MAPPING[ia3.peft_type] is graftlm.IA3Model
    soft = graftlm.get_peft_model(build("llama"), graftlm.PromptTuningConfig(task_type="CAUSAL_LM"))
    assert not isinstance(soft.base_model, tuners.BaseTuner)


def test_the_level_below_the_wrapper_can_be_made_by_itself() -> None:
    ids = torch.tensor([[5, 6, 7]])
    base = build("llama")
    plain = base(input_ids=ids).logits
    tuner = graftlm.LoraModel(base, graftlm.LoraConfig(init_lora_weights=False, **LORA), "default").eval()
    assert isinstance(tuner, graftlm.LoraModel) and tuner.model is base and tuner.prefix == "lora_"
    changed = tuner(input_ids=ids).logits
    assert not torch.allclose(changed, plain) and len(tuner.targeted_module_names) == 2
    tuner.disable_adapter_layers()
    torch.testing.assert_close(tuner(input_ids=ids).logits, plain)
    tuner.enable_adapter_layers()
    torch.testing.assert_close(tuner.merge_and_unload()(input_ids=ids).logits, changed, atol=1e-5, rtol=1e-4)


ENCODERS = [
    ("PromptEmbedding", "PromptTuningConfig", {}),
    ("PromptEncoder", "PromptEncoderConfig", {"encoder_hidden_size": 6}),
    ("PromptEncoder", "PromptEncoderConfig", {"encoder_hidden_size": 6, "encoder_reparameterization_type": "LSTM"}),
    ("PrefixEncoder", "PrefixTuningConfig", {"num_layers": 2}),
    ("PrefixEncoder", "PrefixTuningConfig", {"num_layers": 2, "prefix_projection": True, "encoder_hidden_size": 6}),
]


@pytest.mark.parametrize(("name", "config", "options"), ENCODERS)
def test_encoders_are_hf_pefts(name: str, config: str, options: dict[str, Any]) -> None:
    """The same parameters under the same names, and the same outputs [B, P, width]."""
    sizes = {"num_virtual_tokens": 3, "token_dim": 8, "num_transformer_submodules": 1}
    words = (nn.Embedding(9, 8),) if name == "PromptEmbedding" else ()
    ours, theirs = (getattr(lib, name)(getattr(lib, config)(**sizes, **options), *words) for lib in (graftlm, peft))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    indices = torch.arange(3).expand(2, 3)
    torch.testing.assert_close(ours(indices), theirs(indices))


def test_what_the_methods_hold_counts_as_encoders() -> None:
    for name, config in (("PromptEmbedding", "PromptTuningConfig"), ("PromptEncoder", "PromptEncoderConfig")):
        model = graftlm.get_peft_model(build("llama"), getattr(graftlm, config)(task_type="CAUSAL_LM", num_virtual_tokens=3))
        assert isinstance(model.prompt_encoder["default"], getattr(graftlm, name))
    with pytest.raises(ConfigError, match="token_dim"):
        graftlm.PromptEncoder(graftlm.PromptEncoderConfig(num_virtual_tokens=3, num_transformer_submodules=1))


# -- functions -----------------------------------------------------------------------------------------------------------
def test_functions_are_hf_pefts() -> None:
    import peft.utils

    labels = torch.tensor([[5, -100, 7], [8, 9, 10]])
    assert torch.equal(graftlm.shift_tokens_right(labels, 0, 1), peft.shift_tokens_right(labels, 0, 1))
    weight = nn.Parameter(torch.randn(2, 3))
    for flag in (True, False):
        ours, theirs = graftlm.utils.transpose(weight, flag), peft.utils.transpose(weight, flag)
        assert torch.equal(ours, theirs) and type(ours) is type(theirs)
    assert graftlm.utils.infer_device() == peft.utils.infer_device()
    for method in ("LORA", "IA3", "LOHA", "LNTUNING", "OFT", "VERA"):
        own, hf = (
            getattr(lib, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING") for lib in (graftlm.utils, peft.utils)
        )
        assert own["llama"] == hf["llama"] and own["t5"] == hf["t5"]


def test_mixed_precision_parameters() -> None:
    model = graftlm.get_peft_model(build("llama"), graftlm.LoraConfig(task_type="CAUSAL_LM", **LORA))
    graftlm.cast_mixed_precision_params(model, torch.bfloat16)
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}
    with pytest.raises(ConfigError, match="float16 or torch.bfloat16"):
        graftlm.cast_mixed_precision_params(model, torch.int8)


def test_the_bare_bases_state() -> None:
    plain = build("llama").state_dict()
    model = graftlm.get_peft_model(
        build("llama"), graftlm.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"], **LORA)
    )
    state = graftlm.get_base_model_state_dict(model)
    assert state.keys() == plain.keys() and all(torch.equal(v, plain[k]) for k, v in state.items())
    other = build("llama", seed=1).state_dict()
    graftlm.set_base_model_state_dict(model, other)
    assert all(torch.equal(v, other[k]) for k, v in graftlm.get_base_model_state_dict(model).items())
    first = next(iter(other))
    with pytest.raises(CheckpointError, match=f"Missing: {first}"):
        graftlm.set_base_model_state_dict(model, {k: v for k, v in other.items() if k != first})
    assert graftlm.set_base_model_state_dict(model, {**plain, "more": plain[first]}, strict=False).unexpected_keys == [
        "more"
    ]


def test_status() -> None:
    model = graftlm.get_peft_model(build("llama"), graftlm.LoraConfig(task_type="CAUSAL_LM", **LORA))
    assert graftlm.get_layer_status(model) == model.get_layer_status() and len(graftlm.get_layer_status(model)) == 2
    assert graftlm.get_model_status(model).peft_types == {"default": "LORA"}


def test_a_method_of_ones_own() -> None:
    class Nothing(Method):
        pass

    class NothingConfig(graftlm.PeftConfig):
        pass

    try:
        graftlm.utils.register_peft_method(name="nothing", config_cls=NothingConfig, model_cls=Nothing)
        assert graftlm.PEFT_TYPE_TO_CONFIG_MAPPING["NOTHING"] is NothingConfig
        with pytest.raises(ConfigError, match="already"):
            graftlm.utils.register_peft_method(name="nothing", config_cls=NothingConfig, model_cls=Nothing)
    finally:
        METHODS.pop("NOTHING", None)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="lower case"):
        graftlm.utils.register_peft_method(name="Nothing", config_cls=NothingConfig, model_cls=Nothing)
    with pytest.raises(ConfigError, match="Adding a method"):
        graftlm.utils.register_peft_method(name="nothing", config_cls=NothingConfig, model_cls=peft.LoraModel)


def test_the_version_in_saved_configurations(tmp_path: Path) -> None:
    import json

    graftlm.LoraConfig(**LORA).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))["peft_version"] == peft.__version__
    assert (
        graftlm.PeftConfig.from_pretrained(tmp_path).peft_version == peft.PeftConfig.from_pretrained(tmp_path).peft_version
    )


def test_status_speaks_hf_pefts_names() -> None:
    """The kinds of layers and of the level below the wrapper, in the model's order."""

    def toy() -> nn.Module:
        torch.manual_seed(0)
        parts = {"lin": nn.Linear(6, 6), "conv": nn.Conv2d(3, 4, 3), "emb": nn.Embedding(9, 6), "end": nn.Linear(6, 2)}
        return nn.ModuleDict(parts)

    reports = []
    for lib in (graftlm, peft):
        model = lib.get_peft_model(toy(), lib.LoraConfig(target_modules=["emb", "conv"], modules_to_save=["end"]))
        model.add_adapter("other", lib.LoraConfig(target_modules=["lin"], r=4))
        fields = ("name", "module_type", "enabled", "merged_adapters", "requires_grad", "available_adapters", "devices")
        status = [{f: getattr(s, f) for f in (*fields, "quantization_backend")} for s in model.get_layer_status()]
        whole = model.get_model_status()
        reports.append((status, whole.adapter_model_type, whole.quantization_backend, whole.num_adapter_layers))
    assert reports[0] == reports[1] and reports[0][1] == "LoraModel"
    loha = graftlm.get_peft_model(toy(), graftlm.LoHaConfig(target_modules=["lin"]))
    assert loha.get_model_status().adapter_model_type == "LoHaModel"
    assert [s.module_type for s in loha.get_layer_status()] == ["loha.Linear"]


def test_targeted_parameters() -> None:
    for lib in (graftlm, peft):
        model = lib.get_peft_model(
            nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6)}),
            lib.LoraConfig(target_modules=["b"], target_parameters=["a.weight"]),
        )
        assert model.targeted_parameter_names == model.base_model.targeted_parameter_names == ["a.weight"]


def test_trained_tokens_are_found_where_hf_peft_has_them() -> None:
    model = graftlm.get_peft_model(build("llama"), graftlm.LoraConfig(trainable_token_indices=[1, 2], **LORA))
    layer = model.base_model.model.get_input_embeddings()
    rows = torch.rand_like(layer.token_adapter.trainable_tokens_delta["default"])
    layer.token_adapter.trainable_tokens_delta["default"].data = rows
    torch.testing.assert_close(layer(torch.tensor([2, 1])), rows.flip(0))
    assert isinstance(layer, graftlm.utils.TrainableTokensWrapper)
    other = model.base_model.model.model.layers[0].self_attn.q_proj
    assert not isinstance(other, graftlm.utils.TrainableTokensWrapper) and not hasattr(other, "token_adapter")
    assert isinstance(layer.token_adapter, TrainableTokensLayer) and not isinstance(other, TrainableTokensLayer)
    for module in ("peft.tuners.trainable_tokens", "peft.tuners.trainable_tokens.layer"):
        assert graftlm.as_peft.lookup(module, "TrainableTokensLayer") is TrainableTokensLayer


def test_a_configurations_file_as_it_stands(tmp_path: Path) -> None:
    config = graftlm.LoraConfig(**LORA)
    config.save_pretrained(tmp_path)
    found = graftlm.LoraConfig.from_json_file(tmp_path / "adapter_config.json")
    assert found.pop("peft_version") == names.VERSION and found == config.to_dict()


def test_dora_of_an_embedding_follows_a_scale_of_zero() -> None:
    """An embedding that multiplies what it gives (Gemma): the adapter's part goes with it, and nothing divides by it."""
    model = graftlm.get_peft_model(
        build("gemma3"), graftlm.LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True, init_lora_weights=False)
    )
    layer, ids = model.base_model.model.get_input_embeddings(), torch.arange(5)
    before = layer(ids)
    layer.base_layer.embed_scale.mul_(3)
    torch.testing.assert_close(layer(ids), 3 * before)
    layer.base_layer.embed_scale.zero_()
    assert not layer(ids).any()


def test_trained_tokens_of_a_module_around_an_encoder_decoder_model() -> None:
    """Its configuration says two halves; it has no method that gives them."""

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("bart").model
            self.config = self.inner.config

        def get_input_embeddings(self) -> nn.Module:
            return self.inner.encoder.embed_tokens

    for config in (
        graftlm.LoraConfig(target_modules="all-linear", trainable_token_indices={"embed_tokens": [1, 2]}),
        graftlm.TrainableTokensConfig(token_indices=[1, 2]),
    ):
        model = graftlm.get_peft_model(Around(), config)
        layer = model.base.inner.encoder.embed_tokens
        assert isinstance(layer, TrainableTokensLayer) and layer.token_indices["default"] == [1, 2]


# -- at one layer, and one level below the wrapper ----------------------------------------------------------------------
def test_which_modules_a_configuration_means() -> None:
    from peft.tuners.tuners_utils import check_target_module_exists

    from graftlm.compat import helpers

    keys = ("model.layers.0.q_proj", "model.layers.1.q_proj", "q_proj", "lm_head", "model.layers.0.xq_proj")
    cases: list[dict[str, Any]] = [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ".*q_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.q_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ]
    for options in cases:
        ours, theirs = graftlm.LoraConfig(**options), peft.LoraConfig(**options)
        found = [helpers.check_target_module_exists(ours, key) for key in keys]
        assert found == [bool(check_target_module_exists(theirs, key)) for key in keys], options
    model = graftlm.get_peft_model(build("llama"), graftlm.LoraConfig(**LORA))
    inspected = helpers.inspect_matched_modules(model.base_model)
    assert inspected == helpers.inspect_matched_modules(model)
    assert inspected["matched"] == model.targeted_module_names and "lm_head" in inspected["unmatched"]


def test_active_adapters_below_the_wrapper() -> None:
    model = graftlm.get_peft_model(build("llama"), graftlm.LoraConfig(**LORA))
    model.add_adapter("other", graftlm.LoraConfig(**LORA))
    assert model.base_model.active_adapter == "default" and model.has_active_enabled_adapter
    model.set_adapter(["default", "other"])
    assert model.base_model.active_adapter == ["default", "other"]
    with model.disable_adapter():
        assert not model.has_active_enabled_adapter
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer._all_available_adapter_names() == ["default", "other"]


def test_one_layer_is_merged_as_by_hf_peft() -> None:
    made = []
    for lib in (graftlm, peft):
        torch.manual_seed(0)
        model = lib.get_peft_model(nn.ModuleDict({"a": nn.Linear(6, 6)}), lib.LoraConfig(r=2, target_modules=["a"]))
        layer = model.base_model.model["a"]
        layer.lora_B["default"].weight.data.fill_(0.5)
        layer.lora_A["default"].weight.data.fill_(0.25)
        layer.merge(safe_merge=True, adapter_names=["default"])
        made.append(layer.base_layer.weight.detach().clone())
        layer.unmerge()
        layer.lora_B["default"].weight.data.fill_(float("inf"))
        with pytest.raises(ValueError, match=r"(?i)nan"):
            layer.merge(safe_merge=True)
        assert layer.merged_adapters == []
    torch.testing.assert_close(made[0], made[1])


def test_lora_plus() -> None:
    from peft.optimizers import create_loraplus_optimizer

    from graftlm.compat.optimizers import create_loraplus_optimizer as own

    def toy() -> nn.Module:
        return nn.ModuleDict({"emb": nn.Embedding(9, 6), "lin": nn.Linear(6, 6), "norm": nn.LayerNorm(6)})

    found = []
    for lib, create in ((graftlm, own), (peft, create_loraplus_optimizer)):
        options = {"r": 2, "target_modules": ["emb", "lin"], "modules_to_save": ["norm"]}
        model = lib.get_peft_model(toy(), lib.LoraConfig(**options))
        optimizer = create(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, eps=1e-6)
        names = {id(p): n for n, p in model.named_parameters()}
        groups = [(sorted(names[id(p)] for p in g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
        found.append(groups)
    assert found[0] == found[1]


def test_the_prefix_of_lora_that_trains_tokens() -> None:
    config = graftlm.LoraConfig(trainable_token_indices=[1, 2], **LORA)
    assert graftlm.get_peft_model(build("llama"), config).prefix == "lora_"
    tokens = graftlm.get_peft_model(build("llama"), graftlm.TrainableTokensConfig(token_indices=[1, 2]))
    assert tokens.prefix == "trainable_tokens_"
    layer = tokens.get_input_embeddings().token_adapter
    assert torch.equal(layer.trainable_tokens_original["default"], layer.base_layer.weight[[1, 2]])


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_an_adapter_out_of_a_sharded_model() -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = graftlm.get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), graftlm.LoraConfig(r=2, target_modules=["0"]))
    wanted = {k: v.clone() for k, v in graftlm.get_peft_model_state_dict(model).items()}
    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        found = graftlm.get_peft_model_state_dict(sharded)
    finally:
        dist.destroy_process_group()
    assert found.keys() == wanted.keys() and all(torch.equal(v, found[k]) for k, v in wanted.items())


def test_an_injected_adapter_on_the_meta_device() -> None:
    def toy() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"emb": nn.Embedding(9, 6), "lin": nn.Linear(6, 6), "conv": nn.Conv1d(3, 4, 2)})

    config = graftlm.LoraConfig(r=2, target_modules=["emb", "lin", "conv"], init_lora_weights=False)
    filled = graftlm.inject_adapter_in_model(config, toy())
    state = graftlm.get_peft_model_state_dict(filled)
    empty = graftlm.inject_adapter_in_model(config, toy(), low_cpu_mem_usage=True)
    assert {v.device.type for v in graftlm.get_peft_model_state_dict(empty).values()} == {"meta"}
    graftlm.set_peft_model_state_dict(empty, state, low_cpu_mem_usage=True)
    found = graftlm.get_peft_model_state_dict(empty)
    assert found.keys() == state.keys() and all(torch.equal(v, found[k]) for k, v in state.items())
    inputs = torch.randn(2, 6)
    assert torch.equal(empty["lin"](inputs), filled["lin"](inputs))


def test_configurations_that_were_read_follow() -> None:
    model = graftlm.get_peft_model(build("llama"), graftlm.LoraConfig(**LORA))
    read = model.peft_config
    model.add_adapter("other", graftlm.LoraConfig(**LORA))
    assert list(model.peft_config) == ["default", "other"] and read is model.peft_config
    model.delete_adapter("other")
    assert list(read) == ["default"]
