"""Adapter directories: every fault of loading and saving that users of other libraries report is absent here."""

from __future__ import annotations

import json
import os
import shutil
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from families import ALL, batch
from helpers import (
    CONFIGS,
    attach,
    cases,
    close,
    config,
    embedding_name,
    fresh,
    head_name,
    logits_of,
    padded,
    randomise,
    rows,
    state_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import graftlm
from graftlm import fingerprint
from graftlm.bundled import base_path
from graftlm.errors import AdapterError, BaseMismatchError, CheckpointError, ConfigError, GraftError, TargetError
from graftlm.training import resolve_base

WEIGHTS = "adapter_model.safetensors"
TRAINING = "training_state.safetensors"
CONFIG = "adapter_config.json"
EVERY = tuple(CONFIGS)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A LoRA adapter for the tiny Llama."""
    attach("llama", "lora").save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / WEIGHTS
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=header)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def load(name: str, folder: Path, **options: Any) -> graftlm.PeftModel:
    return graftlm.PeftModel.from_pretrained(fresh(name), folder, **options)


# -- round trips -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "method"),
    cases(("llama", "gpt2", "bloom", "t5", "bert"), EVERY, lambda n, m: n == "llama" or m in ("bias_all", "prefix")),
)
def test_saved_and_reloaded(name: str, method: str, tmp_path: Path) -> None:
    model, inputs = attach(name, method), batch(name)
    model.save_pretrained(tmp_path)
    assert {WEIGHTS, CONFIG, "README.md"} <= set(os.listdir(tmp_path))
    assert (tmp_path / TRAINING).exists() == method.startswith(("p_tuning", "prefix_projection", "adalora"))
    again = load(name, tmp_path)
    close(logits_of(again, **inputs), logits_of(model, **inputs), 1e-6)
    assert not again.training
    assert not any(p.requires_grad for p in again.parameters())
    trainable = load(name, tmp_path, is_trainable=True)
    close(logits_of(trainable.eval(), **inputs), logits_of(model, **inputs), 1e-6)
    assert {k for k, p in trainable.named_parameters() if p.requires_grad} == {
        k for k, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("method", EVERY)
def test_the_file_holds_the_adapter_only(method: str, tmp_path: Path) -> None:
    model = attach("llama", method)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors.keys() == graftlm.get_peft_model_state_dict(model).keys()
    assert not any(".base_layer." in k or "original_module" in k for k in tensors)
    assert graftlm.load_peft_weights(tmp_path).keys() == tensors.keys()


def test_config_comes_back(tmp_path: Path) -> None:
    for method in EVERY:
        model = attach("llama", method)
        model.save_pretrained(tmp_path / method)
        again = graftlm.PeftConfig.from_pretrained(tmp_path / method)
        assert type(again) is type(model.peft_config["default"])
        mine = model.peft_config["default"].to_dict() | {"inference_mode": True}
        assert again.to_dict() == mine
    assert graftlm.PeftConfig.from_pretrained(tmp_path / "lora", r=99).r == 99


def test_state_dict_functions() -> None:
    for method in EVERY:
        first, second = attach("llama", method), attach("llama", method, seed=77)
        report = graftlm.set_peft_model_state_dict(second, graftlm.get_peft_model_state_dict(first))
        assert not report.missing_keys
        assert not report.unexpected_keys
        inputs = batch("llama")
        close(logits_of(second, **inputs), logits_of(first, **inputs), 1e-6)
    with pytest.raises(AdapterError, match="no adapter 'other'"):
        graftlm.get_peft_model_state_dict(first, adapter_name="other")
    with pytest.raises(CheckpointError, match="unexpected keys"):
        graftlm.set_peft_model_state_dict(first, {"nonsense": torch.zeros(1)})


# -- files that do not fit -------------------------------------------------------------------------------------------------
def test_missing_unexpected_and_mismatched_keys_are_all_listed(saved: Path) -> None:
    keys = sorted(load_file(saved / WEIGHTS))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[keys[0]], tensors[keys[1]]
        tensors["base_model.model.model.layers.9.extra.lora_A.weight"] = torch.zeros(2, 2)
        tensors["something.else"] = torch.zeros(3)
        tensors[keys[2]] = torch.zeros(7, 5)
        tensors[keys[3]][0, 0] = float("nan")
        tensors[keys[4]][0, 0] = float("inf")

    shape = tuple(load_file(saved / WEIGHTS)[keys[2]].shape)
    edit_weights(saved, change)
    with pytest.raises(CheckpointError) as caught:
        load("llama", saved)
    text = str(caught.value)
    for part in (
        "missing keys (2)", keys[0], keys[1], "unexpected keys (2)", "layers.9.extra.lora_A.weight", "something.else",
        "shapes that differ (1)", f"{keys[2]}: the file has (7, 5), this model needs {shape}",
        "NaN or infinite values (2)", keys[3], keys[4], str(saved),
    ):  # fmt: skip
        assert part in text


def test_base_is_whole_after_a_failed_load(saved: Path) -> None:
    edit_weights(saved, lambda tensors: tensors.pop(sorted(tensors)[0]))
    base = fresh("llama")
    names, before = [n for n, _ in base.named_modules()], state_of(base)
    with pytest.raises(CheckpointError, match="missing keys"):
        graftlm.PeftModel.from_pretrained(base, saved)
    assert [n for n, _ in base.named_modules()] == names
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules())
    inputs = batch("llama")
    assert torch.equal(logits_of(base, **inputs), logits_of(fresh("llama"), **inputs))


@pytest.mark.parametrize("own_name", [True, False], ids=["into-attached", "new-adapter"])
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", "houlsby", "modules_to_save"])
def test_model_is_as_it_was_after_a_failed_load_adapter(method: str, own_name: bool, tmp_path: Path) -> None:
    attach("llama", method, seed=5).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({"nonsense": torch.zeros(1)}))
    model = attach("llama", method).train()
    before, inputs = state_of(model), batch("llama")
    trainable = {k for k, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(CheckpointError, match="nonsense"):
        model.load_adapter(tmp_path, "default" if own_name else "second")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert model.active_adapters == ["default"]
    assert set(model.peft_config) == {"default"}
    assert {k for k, p in model.named_parameters() if p.requires_grad} == trainable
    assert model.training
    close(logits_of(model.eval(), **inputs), logits_of(attach("llama", method), **inputs), 1e-6)


def test_a_dead_adapter_does_not_load(saved: Path) -> None:
    """All keys under other names (the classic silent failure): nothing loads."""

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace("q_proj", "query")] = tensors.pop(key)

    edit_weights(saved, rename)
    with pytest.raises(CheckpointError, match="missing keys"):
        load("llama", saved)


def test_adapter_of_another_size(tmp_path: Path) -> None:
    attach("gpt2", "lora").save_pretrained(tmp_path)
    with pytest.raises(GraftError):
        load("llama", tmp_path)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "text"])
def test_broken_weights_file(saved: Path, damage: str) -> None:
    path = saved / WEIGHTS
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "garbage": os.urandom(4096), "empty": b"", "text": b"{}" * 40}[damage])
    with pytest.raises(CheckpointError, match="not a readable safetensors file") as caught:
        load("llama", saved)
    assert str(path) in str(caught.value)


def test_broken_training_state(tmp_path: Path) -> None:
    attach("llama", "p_tuning_mlp").save_pretrained(tmp_path)
    path = tmp_path / TRAINING
    path.write_bytes(path.read_bytes()[:100])
    load("llama", tmp_path)  # not needed for use
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load("llama", tmp_path, is_trainable=True)


def test_missing_files(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        load("llama", tmp_path / "nowhere")
    (tmp_path / "void").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no adapter_config.json. It holds nothing"):
        load("llama", tmp_path / "void")
    (saved / WEIGHTS).unlink()
    with pytest.raises(
        CheckpointError, match=r"holds no adapter_model.safetensors. It holds README.md, adapter_config.json"
    ):
        load("llama", saved)


def test_hub_ids_without_a_network_say_so() -> None:
    with pytest.raises(CheckpointError, match="could not be had from the hub"):
        load("llama", Path("some-owner/some-adapter"), local_files_only=True)


def test_broken_configuration(saved: Path) -> None:
    (saved / CONFIG).write_text("{ not json")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load("llama", saved)
    (saved / CONFIG).write_text('{\n"peft_type": "LORA",\n"r": 4,\n"r": 8}')
    with pytest.raises(CheckpointError, match=r"key 'r' is given twice in one object \(it stands in lines 3, 4\)"):
        load("llama", saved)
    (saved / CONFIG).write_bytes('{"peft_type": "l\u00f6ra"}'.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json, line 1: byte \d+ \(0xf6\) is not UTF-8"):
        load("llama", saved)
    (saved / CONFIG).write_text("[]")
    with pytest.raises(CheckpointError, match="holds a list, expected an object"):
        load("llama", saved)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_configuration_with_a_byte_order_mark(saved: Path, encoding: str) -> None:
    before = load("llama", saved).peft_config
    (saved / CONFIG).write_text((saved / CONFIG).read_text(encoding="utf-8"), encoding=encoding)
    assert load("llama", saved).peft_config == before


def test_unknown_method_in_a_configuration(saved: Path) -> None:
    edit_config(saved, peft_type="PREFIX_TUNNING")
    with pytest.raises(CheckpointError, match="did you mean 'PREFIX_TUNING'"):
        load("llama", saved)
    edit_config(saved, peft_type="VBLORA")
    with pytest.raises(CheckpointError, match="'VBLORA' is not a method of GraftLM; it has .*PREFIX_TUNING"):
        load("llama", saved)


@pytest.mark.parametrize(
    "option", [{"use_qalora": True}, {"arrow_config": {"top_k": 2}}, {"use_bdlora": {"nblocks": 2}},
               {"kasa_config": {"beta": 0.1}}, {"velora_config": {"scale": 1.0}}, {"brand_new": 0.5}],
)  # fmt: skip
def test_unknown_options_that_are_on_are_refused(saved: Path, option: dict[str, Any]) -> None:
    edit_config(saved, **option)
    with pytest.raises(CheckpointError, match=next(iter(option))):
        load("llama", saved)


def test_unknown_options_that_are_off_pass(saved: Path) -> None:
    edit_config(saved, use_qalora=False, layer_replication=None, brand_new=[], another={}, peft_version="9.9")
    load("llama", saved)


def test_a_configuration_cannot_switch_on_remote_code(tmp_path: Path) -> None:
    attach("llama", "prompt").save_pretrained(tmp_path)
    edit_config(
        tmp_path, prompt_tuning_init="TEXT", prompt_tuning_init_text="x", tokenizer_name_or_path="y",
        tokenizer_kwargs={"trust_remote_code": True},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load("llama", tmp_path)


def test_a_text_initialised_prompt_loads_without_its_tokenizer(tmp_path: Path) -> None:
    model = attach("llama", "prompt")
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, prompt_tuning_init="TEXT", prompt_tuning_init_text="x", tokenizer_name_or_path="no/such-thing")
    for trainable in (False, True):
        close(logits_of(load("llama", tmp_path, is_trainable=trainable).eval(), **batch("llama")),
              logits_of(model, **batch("llama")))  # fmt: skip


# -- which base ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(ALL))
def test_another_base_of_equal_shapes_is_refused(name: str, tmp_path: Path) -> None:
    attach(name, "lora").save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match="allow_base_mismatch=True"):
        graftlm.PeftModel.from_pretrained(fresh(name, seed=1), tmp_path)
    model = graftlm.PeftModel.from_pretrained(fresh(name, seed=1), tmp_path, allow_base_mismatch=True)
    assert model.active_adapters == ["default"]
    graftlm.PeftModel.from_pretrained(fresh(name), tmp_path)


@pytest.mark.parametrize("method", ["prompt", "prefix", "houlsby", "p_tuning_mlp", "embedding", "modules_to_save"])
def test_fingerprint_of_every_method(method: str, tmp_path: Path) -> None:
    attach("llama", method).save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError):
        graftlm.PeftModel.from_pretrained(fresh("llama", seed=1), tmp_path)
    load("llama", tmp_path)


def test_the_same_base_in_another_precision(tmp_path: Path) -> None:
    attach("llama", "lora").save_pretrained(tmp_path / "fp32")
    half = attach("llama", "lora", base=fresh("llama").to(torch.bfloat16))
    half.save_pretrained(tmp_path / "bf16")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for folder in ("fp32", "bf16"):
            model = graftlm.PeftModel.from_pretrained(fresh("llama").to(dtype), tmp_path / folder)
            assert {p.dtype for k, p in model.named_parameters() if "lora_" in k} == {torch.float32}


def test_fingerprint_with_another_adapter_attached_or_merged(tmp_path: Path) -> None:
    """What is looked at is the base, whatever hangs on it."""
    attach("llama", "lora").save_pretrained(tmp_path)
    for method in ("lora", "embedding", "modules_to_save", "dora"):
        model = attach("llama", method, seed=8)
        model.load_adapter(tmp_path, "second")
        if method in ("lora", "dora"):
            model.merge_adapter("default")
            model.load_adapter(tmp_path, "third")


@pytest.mark.parametrize("method", ["lora", "houlsby", "prompt", "bias_all", "head", "norm", "embedding"])
def test_fingerprint_is_the_bases_whatever_hangs_on_it(method: str) -> None:
    """A task's head, trained norms, biases, bottlenecks: the base below stays the same, with one wrapper over it or two."""
    base = fresh("bert")
    plain = fingerprint.of(base)
    options = {"head": {"modules_to_save": ["pooler"]}, "norm": {"modules_to_save": ["LayerNorm"]}}.get(method)
    settings = config(method, "bert") if options is None else graftlm.LoraConfig(task_type="SEQ_CLS", **options)
    model = randomise(graftlm.get_peft_model(base, settings))
    assert fingerprint.of(base) == plain
    model.add_adapter("second", config("lora", "bert"))
    graftlm.get_peft_model(base, config("modules_to_save", "bert"))
    assert fingerprint.of(base) == plain
    if method == "lora":
        model.merge_adapter("default")
        assert fingerprint.of(base) == plain


def test_saved_while_merged(tmp_path: Path) -> None:
    model = attach("llama", "lora")
    wanted = logits_of(model, **batch("llama"))
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    close(logits_of(load("llama", tmp_path), **batch("llama")), wanted)


def test_files_without_fingerprint_load_with_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    their = peft.get_peft_model(fresh("llama"), peft.LoraConfig(task_type="CAUSAL_LM"))
    their.save_pretrained(tmp_path)
    capsys.readouterr()
    load("llama", tmp_path)
    assert "no base fingerprint" in capsys.readouterr().out


def test_own_files_load_without_a_notice(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    load("llama", saved)
    assert capsys.readouterr().out == ""


# -- pickle ----------------------------------------------------------------------------------------------------------------
def test_pickle_is_read_only_when_asked_for(saved: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    torch.save(tensors, saved / "adapter_model.bin")
    (saved / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        load("llama", saved)
    with pytest.raises(CheckpointError, match="allow_pickle=True"):
        graftlm.load_peft_weights(saved)
    model = load("llama", saved, allow_pickle=True)
    close(logits_of(model, **batch("llama")), logits_of(attach("llama", "lora"), **batch("llama")), 1e-6)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def test_pickled_code_is_never_run(saved: Path) -> None:
    torch.save({"x": Evil()}, saved / "adapter_model.bin")
    (saved / WEIGHTS).unlink()
    with pytest.raises(Exception, match="[Ww]eights.only|Unsupported|not a readable"):
        load("llama", saved, allow_pickle=True)


def test_pickle_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="safetensors only"):
        attach("llama", "lora").save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


# -- offline ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["lora", "embedding", "prompt", "p_tuning_lstm", "prefix", "houlsby", "modules_to_save"])
def test_train_save_and_load_without_sockets(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    base = fresh("llama")
    base.config._name_or_path = "some-owner/some-model"  # HF PEFT asks the hub about it when saving
    model = attach("llama", method, base=base)
    train(model, 2)
    model.save_pretrained(tmp_path)
    again = fresh("llama")
    again.config._name_or_path = "some-owner/some-model"
    graftlm.PeftModel.from_pretrained(again, tmp_path)


# -- tied embeddings after merging -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "where"),
    cases(
        ["gpt2", "opt", "bloom", "gemma3", "llama", "t5", "bart"], ["embedding", "head", "both", "head_saved", "plain"],
        lambda n, where: n in ("gpt2", "llama", "t5") or where == "both",
    ),
)  # fmt: skip
def test_merged_models_reload_in_plain_transformers(name: str, where: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "embedding": {"target_modules": [embedding_name(name)]},
        "head": {"target_modules": [head_name(name)]},
        "both": {"target_modules": [embedding_name(name), head_name(name)]},
        "head_saved": {"modules_to_save": [head_name(name)]},
        "plain": {"target_modules": "all-linear"},
    }[where]
    base = fresh(name)
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(r=4, **options))
    randomise(model).eval()
    inputs = {k: v for k, v in batch(name).items() if k != "labels"}
    if name in ("t5", "bart"):
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    wanted = logits_of(model, **inputs)
    assert (wanted - logits_of(fresh(name), **inputs)).abs().max() > 1e-3
    merged = model.merge_and_unload()
    assert type(merged) is type(fresh(name))
    assert not any("lora" in n or "modules_to_save" in n for n, _ in merged.named_modules())
    close(logits_of(merged, **inputs), wanted, 2e-5)
    merged.save_pretrained(tmp_path)
    again = type(merged).from_pretrained(tmp_path).eval()
    close(logits_of(again, **inputs), wanted, 2e-5)


def test_merged_model_with_biases(tmp_path: Path) -> None:
    for method in ("bias_all", "bias_lora_only", "dora", "rslora", "patterns"):
        model = attach("gpt2", method)
        wanted = logits_of(model, **batch("gpt2"))
        merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / method)
        close(logits_of(t.GPT2LMHeadModel.from_pretrained(tmp_path / method).eval(), **batch("gpt2")), wanted, 2e-5)


# -- training goes on ------------------------------------------------------------------------------------------------------
def train(model: graftlm.PeftModel, steps: int, optimizer: Any = None, start: int = 0) -> tuple[list[float], Any]:
    """Some steps of Adam on seeded batches (dropout included: every step seeds the generator)."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(start, start + steps):
        torch.manual_seed(step)
        loss = model(**batch("llama", seed=step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, optimizer


DROPOUT_LSTM = {"num_virtual_tokens": 3, "encoder_hidden_size": 12, "encoder_dropout": 0.5}


def lstm_with_dropout() -> graftlm.PromptEncoderConfig:
    return graftlm.PromptEncoderConfig(task_type="CAUSAL_LM", encoder_reparameterization_type="LSTM", **DROPOUT_LSTM)


# Variants that are resumed as the method itself is.
ALIKE = ("lora_default", "rslora", "gaussian", "patterns", "miss_mini", "oft_exact", "pfeiffer", "parallel")


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] * (m in ALIKE)) for m in (*EVERY, "lstm_dropout")]
)
def test_interrupted_equals_uninterrupted(method: str, tmp_path: Path) -> None:
    """Three steps, saved, loaded into a new model, three more: step for step the six in one go."""

    def begin() -> graftlm.PeftModel:
        if method == "lstm_dropout":
            return randomise(graftlm.get_peft_model(fresh("llama"), lstm_with_dropout()))
        return attach("llama", method)

    torch.manual_seed(0)
    whole, _ = train(begin(), 6)
    torch.manual_seed(0)
    first = begin()
    before, optimizer = train(first, 3)
    first.save_pretrained(tmp_path)
    second = load("llama", tmp_path, is_trainable=True)
    assert second.get_nb_trainable_parameters() == first.get_nb_trainable_parameters()
    ours = [p for p in second.parameters() if p.requires_grad]
    resumed = torch.optim.AdamW(ours, lr=1e-2)
    by_name = {k: p for k, p in first.named_parameters() if p.requires_grad}
    names = [k for k, p in second.named_parameters() if p.requires_grad]
    assert set(names) == set(by_name)
    for name, parameter in zip(names, ours, strict=True):
        resumed.state[parameter] = optimizer.state[by_name[name]]
    after, _ = train(second, 3, resumed, start=3)
    assert before + after == whole


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_p_tuning_starts_at_embeddings_and_trains_its_network(kind: str, tmp_path: Path) -> None:
    """init_weights="vocab": every virtual token is a row of the vocabulary; the file is HF PEFT's."""
    settings = graftlm.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=6, encoder_reparameterization_type=kind, init_weights="vocab",
        encoder_dropout=0.5 if kind == "LSTM" else 0.0,
    )  # fmt: skip
    base = fresh("llama")
    vocabulary = base.get_input_embeddings().weight.detach().clone()
    model = graftlm.get_peft_model(base, settings)
    encoder = model.prompt_encoder["default"]
    assert encoder.training
    tokens = encoder.eval()()
    distance = torch.cdist(tokens, vocabulary, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    assert distance.values.max() < 1e-4
    assert len(set(distance.indices.tolist())) > 1
    assert {k for k, p in encoder.named_parameters() if p.requires_grad} == set(encoder.state_dict())
    train(model, 2)
    model.eval().save_pretrained(tmp_path)
    assert not {"init_weights", "init_text"} & json.loads((tmp_path / CONFIG).read_text()).keys()
    again = load("llama", tmp_path, is_trainable=True)
    assert again.peft_config["default"].init_weights == "vocab"
    assert torch.equal(again.prompt_encoder["default"].eval()(), encoder.eval()())
    theirs = peft.PeftModel.from_pretrained(fresh("llama"), tmp_path).eval()
    close(logits_of(theirs, **batch("llama")), logits_of(model, **batch("llama")), 1e-5)


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_p_tuning_starts_as_the_prompt_of_a_text(kind: str) -> None:
    """The untrained adapter is Prompt Tuning's with the same text: the text repeated in front of every row."""
    base, _ = resolve_base("graftlm-base", dtype="fp32")
    text = {"num_virtual_tokens": 7, "task_type": "CAUSAL_LM", "tokenizer_name_or_path": base_path()}
    row = {"input_ids": torch.tensor([[5, 6, 7]])}
    settings = graftlm.PromptTuningConfig(prompt_tuning_init="TEXT", prompt_tuning_init_text="good or bad?", **text)
    wanted = logits_of(graftlm.get_peft_model(base, settings).eval(), **row)
    settings = graftlm.PromptEncoderConfig(
        init_weights="text", init_text="good or bad?", encoder_reparameterization_type=kind, encoder_hidden_size=16, **text
    )
    model = graftlm.get_peft_model(base, settings)
    close(logits_of(model.eval(), **row), wanted, 1e-3)


def test_p_tuning_with_a_narrow_network_starts_as_near_as_it_can() -> None:
    """Fewer features than tokens: the least-squares solution, with the tokens' mean exact."""
    torch.manual_seed(0)
    settings = graftlm.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=9, encoder_hidden_size=3)
    encoder = graftlm.get_peft_model(fresh("llama"), settings).prompt_encoder["default"]
    wanted = torch.randn(9, encoder.embedding.embedding_dim)
    before = (encoder() - wanted).pow(2).mean()
    encoder.start_at(wanted)
    assert (encoder() - wanted).pow(2).mean() < 0.9 * before
    close(encoder().mean(0), wanted.mean(0), 1e-4)


def test_lstm_saved_in_train_mode_holds_the_eval_output(tmp_path: Path) -> None:
    model = randomise(graftlm.get_peft_model(fresh("llama"), lstm_with_dropout())).train()
    model.save_pretrained(tmp_path)
    assert model.training
    assert model.prompt_encoder["default"].training
    wanted = logits_of(model.eval(), **batch("llama"))
    close(logits_of(load("llama", tmp_path), **batch("llama")), wanted, 1e-6)


def test_training_on_from_a_table_without_its_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of HF PEFT has no training state: said, and training goes on with the table."""
    their = peft.get_peft_model(fresh("llama"), config("p_tuning_mlp", "llama", peft))
    their.save_pretrained(tmp_path)
    model = load("llama", tmp_path, is_trainable=True)
    assert "training goes on with its virtual tokens directly" in capsys.readouterr().out
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad] == [(3, 32)]
    losses, _ = train(model, 3)
    assert losses[0] != losses[-1]


def test_stale_training_state_goes_away(tmp_path: Path) -> None:
    attach("llama", "p_tuning_mlp").save_pretrained(tmp_path)
    assert (tmp_path / TRAINING).exists()
    attach("llama", "lora").save_pretrained(tmp_path)
    assert not (tmp_path / TRAINING).exists()


# -- directories -----------------------------------------------------------------------------------------------------------
def test_other_adapters_go_into_folders_of_their_names(tmp_path: Path) -> None:
    model = attach("llama", ("lora", "prompt", "houlsby"))
    model.save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path / "prompt", tmp_path / "houlsby"):
        assert (folder / WEIGHTS).is_file()
        assert (folder / CONFIG).is_file()
    model.save_pretrained(tmp_path / "some", selected_adapters=["prompt"])
    assert sorted(p.name for p in (tmp_path / "some").iterdir()) == ["prompt"]
    with pytest.raises(AdapterError, match="no adapter 'promt'.*did you mean 'prompt'"):
        model.save_pretrained(tmp_path / "none", selected_adapters=["promt"])
    assert not (tmp_path / "none").exists()


def test_layout_is_that_of_peft(tmp_path: Path) -> None:
    """The same folders for the same adapters, in both libraries."""
    found = []
    for lib in (graftlm, peft):
        model = lib.get_peft_model(fresh("llama"), lib.LoraConfig(task_type="CAUSAL_LM"), adapter_name="first")
        model.add_adapter("second", lib.LoraConfig(task_type="CAUSAL_LM", r=2))
        model.save_pretrained(tmp_path / lib.__name__)
        model = lib.get_peft_model(fresh("llama"), lib.LoraConfig(task_type="CAUSAL_LM"), adapter_name="only")
        model.save_pretrained(tmp_path / lib.__name__ / "single")
        root = tmp_path / lib.__name__
        found.append(sorted(str(p.parent.relative_to(root)) for p in root.rglob(WEIGHTS)))
    assert found[0] == found[1]


def test_saving_over_an_older_adapter_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    attach("llama", "lora", seed=3).save_pretrained(tmp_path)
    model = attach("llama", "lora", seed=4)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    close(logits_of(load("llama", tmp_path), **batch("llama")), logits_of(model, **batch("llama")), 1e-6)
    assert not [p for p in os.listdir(tmp_path) if p.endswith(".tmp")]


def test_an_adapter_that_is_loaded_can_be_overwritten(saved: Path) -> None:
    model = load("llama", saved, is_trainable=True)
    randomise(model, seed=6)
    wanted = logits_of(model.eval(), **batch("llama"))
    model.save_pretrained(saved)
    close(logits_of(load("llama", saved), **batch("llama")), wanted, 1e-6)


def test_a_directory_is_untouched_when_saving_fails(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = attach("llama", "lora", seed=12)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("graftlm.checkpoint.write.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_loading_changes_no_file(saved: Path) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    load("llama", saved, is_trainable=True)
    edit = shutil.copytree(saved, saved.parent / "bad")
    edit_weights(edit, lambda tensors: tensors.pop(sorted(tensors)[0]))
    broken = {p.name: p.read_bytes() for p in edit.iterdir()}
    with pytest.raises(CheckpointError):
        load("llama", edit)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert {p.name: p.read_bytes() for p in edit.iterdir()} == broken


def test_save_into_a_file_and_on_other_processes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        attach("llama", "lora").save_pretrained(tmp_path / "file")
    attach("llama", "lora").save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def test_unknown_loading_options(saved: Path) -> None:
    with pytest.raises(TypeError, match="allow_pickles"):
        load("llama", saved, allow_pickles=True)
    with pytest.raises(CheckpointError, match="untrained"):
        load("llama", saved, ignore_mismatched_sizes=True)


def test_subfolder(tmp_path: Path) -> None:
    model = attach("llama", "lora")
    model.save_pretrained(tmp_path / "inner")
    again = graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path, subfolder="inner")
    close(logits_of(again, **batch("llama")), logits_of(model, **batch("llama")), 1e-6)


def test_model_card(tmp_path: Path) -> None:
    model = attach("llama", "lora")
    model.card_metrics = {"eval_loss": 1.23456, "steps": 10}
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "eval_loss | 1.23456" in text
    assert "| r | 4 |" in text
    (tmp_path / "README.md").write_text(text + "\nwritten by hand\n")
    model.save_pretrained(tmp_path)
    assert "written by hand" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_bytes((tmp_path / "README.md").read_bytes() + b"\ncaf\xe9\n")  # not UTF-8
    model.save_pretrained(tmp_path)
    assert b"caf\xe9" in (tmp_path / "README.md").read_bytes()
    (tmp_path / "README.md").write_text("# someone else's card\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# someone else's card\n"


def test_only_the_base_is_missing_from_a_vocabulary_that_grew(tmp_path: Path) -> None:
    """One new token: the file does not hold the embedding matrix, unless an adapter trains it."""
    base = fresh("llama")
    base.resize_token_embeddings(100)
    model = attach("llama", "lora", base=base)
    model.save_pretrained(tmp_path)
    assert not any("embed_tokens" in k or "lm_head" in k for k in load_file(tmp_path / WEIGHTS))
    assert os.path.getsize(tmp_path / WEIGHTS) < 60_000


def test_peft_ignores_our_header(tmp_path: Path) -> None:
    """Own configuration fields and the fingerprint travel in the header, where HF PEFT does not trip over them."""
    settings = graftlm.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights="zero")
    randomise(graftlm.get_peft_model(fresh("llama"), settings)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    assert not {"init_text", "tokenizer_name_or_path", "prefix_in_encoder"} & set(values)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.PeftModel.from_pretrained(fresh("llama"), tmp_path)


def test_prefix_in_encoder_comes_back_with_its_option(tmp_path: Path) -> None:
    settings = graftlm.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, prefix_in_encoder=True)
    model = randomise(graftlm.get_peft_model(fresh("t5"), settings)).eval()
    model.save_pretrained(tmp_path)
    again = load("t5", tmp_path)
    assert again.peft_config["default"].prefix_in_encoder
    close(logits_of(again, **batch("t5")), logits_of(model, **batch("t5")), 1e-6)


# -- a Trainer's checkpoint ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [*EVERY, ("lora", "prompt"), ("prefix", "houlsby")])
def test_trainer_checkpoint_restores_every_trained_tensor(method: Any, tmp_path: Path) -> None:
    """What a plain Trainer does: save_pretrained(state_dict=…), then load_state_dict of model.safetensors."""
    first = attach("llama", method)
    first.save_pretrained(tmp_path, state_dict=first.state_dict())
    state = load_file(tmp_path / "model.safetensors")
    second = attach("llama", method, seed=55)
    second.load_state_dict(state, strict=False)
    one, two = dict(first.named_parameters()), dict(second.named_parameters())
    for key, parameter in one.items():
        assert torch.equal(parameter, two[key]), key
    base_size = sum(p.numel() for p in fresh("llama").parameters())
    assert sum(v.numel() for v in state.values()) < base_size


def test_full_state_dict_still_goes_torchs_way() -> None:
    for method in ("lora", "prompt", ("lora", "houlsby")):
        first, second = attach("llama", method), attach("llama", method, seed=55)
        second.load_state_dict(first.state_dict())
        assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
        with pytest.raises((RuntimeError, CheckpointError)):
            second.load_state_dict({"nonsense": torch.zeros(1)})


def test_padded_generation_after_reload(tmp_path: Path) -> None:
    model = attach("gpt2", ("lora", "prompt"))
    model.save_pretrained(tmp_path)
    again = graftlm.PeftModel.from_pretrained(fresh("gpt2"), tmp_path)
    again.load_adapter(tmp_path / "prompt", "prompt")
    again.set_adapter(["default", "prompt"], inference_mode=True)
    inputs = padded(rows("gpt2"), "left")
    assert torch.equal(
        again.generate(**inputs, max_new_tokens=4, do_sample=False),
        model.generate(**inputs, max_new_tokens=4, do_sample=False),
    )


def test_a_module_that_the_adapter_does_not_fit_is_refused(saved: Path) -> None:
    with pytest.raises(TargetError, match="matches no module of this model"):
        graftlm.PeftModel.from_pretrained(nn.Linear(2, 2), saved)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rows_of_new_tokens_travel_with_the_adapter(name: str, tmp_path: Path) -> None:
    """A vocabulary that grew: the new rows are random, so they are saved along (as HF PEFT does) and come back."""
    fresh(name).save_pretrained(tmp_path / "base")

    def grown(seed: int) -> Any:
        base = t.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        torch.manual_seed(seed)
        base.resize_token_embeddings(base.config.vocab_size + 5)
        for module in (base.get_input_embeddings(), base.get_output_embeddings()):
            module.weight.data[-5:] = torch.randn(5, module.weight.shape[1])
        return base

    ids = torch.tensor([[5, 6, grown(0).config.vocab_size - 1]])
    ours = graftlm.get_peft_model(grown(1), graftlm.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    ours.save_pretrained(tmp_path / "ours")
    wanted = ours(input_ids=ids).logits
    for library in (graftlm, peft):
        again = library.PeftModel.from_pretrained(grown(2), tmp_path / "ours").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, atol=1e-5, rtol=0)
    theirs = peft.get_peft_model(grown(3), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    again = graftlm.PeftModel.from_pretrained(grown(4), tmp_path / "theirs")
    torch.testing.assert_close(again(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5, rtol=0)
