"""The wrapper: two over one base, switching, composing, merging, copying, precision, activation checkpointing."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from accelerate.hooks import ModelHook, add_hook_to_module
from families import ALL, CAUSAL, batch
from helpers import (
    COMPOSITIONS,
    CONFIGS,
    ONE_OF_EACH,
    attach,
    cases,
    close,
    config,
    fresh,
    label,
    logits_of,
    randomise,
    state_of,
    still,
)
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import graftlm
from graftlm.architectures import base_modules, position_room
from graftlm.errors import AdapterError, ConfigError, UnsupportedError
from graftlm.layers import Adapted

METHODS: tuple[Any, ...] = (
    *ONE_OF_EACH,
    "dora",
    "bias_all",
    "embedding",
    "modules_to_save",
    "prefix_projection",
    "parallel",
)
INPUTS = batch("llama")


def steps(model: graftlm.PeftModel, count: int = 2, lr: float = 1e-2) -> list[float]:
    """Some steps of training; the losses."""
    optimizer = torch.optim.AdamW([p for n in model.active_adapters for _, p in model.adapter_parameters(n)], lr=lr)
    losses = []
    for _ in range(count):
        loss = model(**INPUTS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def grads(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


# -- what it is --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", list(ALL))
def test_types_paths_and_signature(name: str) -> None:
    base = fresh(name)
    model = graftlm.get_peft_model(base, config("lora_default", name))
    assert isinstance(model, graftlm.PeftModel)
    assert isinstance(model, nn.Module)
    assert model.get_base_model() is base
    assert model.base_model.model is base
    assert model._get_name() == type(base).__name__
    theirs = [p for p in inspect.signature(type(base).forward).parameters if p != "self"]
    mine = list(inspect.signature(model.forward).parameters)
    assert [p for p in mine if p not in ("adapter_names", "task_ids")] == theirs
    assert model.config is base.config
    assert model.device == base.device
    assert model.dtype == base.dtype
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert any(k.startswith("base_model.model.") and ".lora_A.default.weight" in k for k in model.state_dict())
    assert repr(model).startswith("PeftModel(")
    assert "lora_A" in repr(model)


def test_attributes_come_from_the_base_and_go_to_it() -> None:
    base = fresh("llama")
    model = graftlm.get_peft_model(base, config("prompt", "llama"))
    assert model.lm_head is base.lm_head
    assert model.model.layers[1] is base.model.layers[1]
    assert model.generation_config is base.generation_config
    assert model.can_generate()
    assert model.vocab_size == 96
    model.config.use_cache = False
    assert base.config.use_cache is False
    model.generation_config = made = t.GenerationConfig(max_new_tokens=3)
    assert base.generation_config is made
    assert model.base_model.lm_head is base.lm_head
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018
    assert not hasattr(model, "no_such_thing")
    assert model.active_adapter == "default"
    assert model.active_peft_config is model.peft_config["default"]
    assert model.word_embeddings is base.model.embed_tokens
    assert model.peft_type == "PROMPT_TUNING"


def test_looking_at_a_module_trained_in_full_never_fails() -> None:
    """Of attributes that it lacks it says so, also where two copies could not act together, and before it has its own."""
    model = graftlm.get_peft_model(fresh("llama"), graftlm.LoraConfig(modules_to_save=["norm"]))
    model.add_adapter("other", graftlm.LoraConfig(modules_to_save=["norm"]))
    saved = model.base.model.norm
    model.switch.active = ("default", "other")
    assert not hasattr(saved, "no_such_thing") and saved.variance_epsilon == saved.original_module.variance_epsilon
    bare = type(saved).__new__(type(saved))
    for name in ("no_such_thing", "switch", "modules_to_save"):
        assert not hasattr(bare, name)


def test_module_names_are_those_of_peft() -> None:
    names = []
    for lib in (graftlm, peft):
        settings = lib.LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]
        )
        names.append({k for k, p in lib.get_peft_model(fresh("llama"), settings).named_parameters() if p.requires_grad})
    assert names[0] == names[1]


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_only_the_adapter_trains_and_the_base_stays(method: str) -> None:
    base = fresh("llama")
    before = state_of(base)
    model = graftlm.get_peft_model(base, config(method, "llama")).train()
    losses = steps(model, 4)
    assert losses[-1] < losses[0]
    loss = model(**INPUTS).loss
    loss.backward()
    own = {k for k, _ in model.adapter_parameters("default")}
    assert set(grads(model)) == own
    assert {k for k, p in model.named_parameters() if p.requires_grad} == own
    restored = model.unload()
    assert restored is base
    after = base.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_train_and_eval_reach_every_module(method: str) -> None:
    model = attach("llama", method)
    assert not any(m.training for m in model.modules())
    model.train()
    assert all(m.training for m in model.modules())
    model.eval()
    assert not any(m.training for m in model.modules())


def test_lora_dropout_works_in_training_only() -> None:
    settings = graftlm.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=0.5)
    model = randomise(graftlm.get_peft_model(fresh("llama"), settings))
    model.eval()
    assert torch.equal(logits_of(model, **INPUTS), logits_of(model, **INPUTS))
    model.train()
    assert not torch.equal(logits_of(model, **INPUTS), logits_of(model, **INPUTS))


# -- two wrappers over one base ----------------------------------------------------------------------------------------
PAIRS = [("prompt", "prompt"), ("lora", "lora"), ("lora", "prompt"), ("lora", "modules_to_save"), ("prefix", "prefix"),
         ("houlsby", "lora"), ("lora", "houlsby"), ("houlsby", "houlsby"), ("dora", "lora"), ("bias_all", "lora"),
         ("embedding", "prompt"), ("modules_to_save", "modules_to_save")]  # fmt: skip


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=["+".join(p) for p in PAIRS])
def test_two_wrappers_over_one_base(one: str, two: str) -> None:
    """Trained in turns, each equals the same adapter trained on a base of its own; the base is untouched."""
    base = fresh("llama")
    wrapped = []
    for i, method in enumerate((one, two)):
        torch.manual_seed(i)
        wrapped.append(randomise(graftlm.get_peft_model(base, config(method, "llama")), seed=i))
    apart = []
    for i, method in enumerate((one, two)):
        torch.manual_seed(i)
        apart.append(randomise(graftlm.get_peft_model(fresh("llama"), config(method, "llama")), seed=i))
    for model in (*wrapped, *apart):
        model.train()
    for _ in range(2):
        for shared, alone in zip(wrapped, apart, strict=True):
            assert steps(shared, 1) == pytest.approx(steps(alone, 1), abs=1e-5)
    for shared, alone in zip(wrapped, apart, strict=True):
        close(logits_of(shared.eval(), **INPUTS), logits_of(alone.eval(), **INPUTS), 5e-5)
        with shared.disable_adapter():
            close(logits_of(shared, **INPUTS), logits_of(fresh("llama"), **INPUTS))


@pytest.mark.parametrize(("one", "two"), PAIRS, ids=["+".join(p) for p in PAIRS])
def test_two_wrappers_are_saved_each_by_itself(one: str, two: str, tmp_path: Path) -> None:
    base = fresh("llama")
    first = randomise(graftlm.get_peft_model(base, config(one, "llama")), seed=1).eval()
    second = randomise(graftlm.get_peft_model(base, config(two, "llama")), seed=2).eval()
    for i, model in enumerate((first, second)):
        model.save_pretrained(tmp_path / str(i))
        again = graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / str(i))
        close(logits_of(again, **INPUTS), logits_of(model, **INPUTS))


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(("one", "two"), PAIRS, ids=["+".join(p) for p in PAIRS])
def test_one_of_two_wrappers_is_taken_off(one: str, two: str, order: str) -> None:
    base = fresh("llama")
    models = [randomise(graftlm.get_peft_model(base, config(m, "llama")), seed=i).eval() for i, m in enumerate((one, two))]
    gone, stays = models if order == "first" else models[::-1]
    wanted = logits_of(stays, **INPUTS)
    gone.unload()
    close(logits_of(stays, **INPUTS), wanted)
    stays.unload()
    assert state_of(base).keys() == state_of(fresh("llama")).keys()
    assert torch.equal(logits_of(base, **INPUTS), logits_of(fresh("llama"), **INPUTS))


# -- switching ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "method"), cases(CAUSAL, (*ONE_OF_EACH, "bias_all"), lambda n, m: n in ("llama", "gpt2", "bloom"))
)
def test_disable_adapter_gives_the_base(name: str, method: str) -> None:
    model, inputs = attach(name, method), batch(name)
    wanted = logits_of(model, **inputs)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, **inputs), logits_of(fresh(name), **inputs))
        got = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3, do_sample=False)
        plain = fresh(name).generate(
            inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3, do_sample=False
        )
        assert torch.equal(got, plain)
    assert torch.equal(logits_of(model, **inputs), wanted)


def test_disable_adapter_ends_with_an_exception() -> None:
    model = attach("llama", "lora")
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    assert model.switch.enabled


def test_names_lists_and_activity() -> None:
    model = attach("llama", "lora")
    model.add_adapter("second", config("lora", "llama"))
    model.add_adapter("soft", config("prompt", "llama"))
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default", "second", "soft"]
    for choice in ("second", ["default", "second"], ["second", "soft"], ("soft",)):
        model.set_adapter(choice)
        names = [choice] if isinstance(choice, str) else list(choice)
        assert model.active_adapters == names
        trainable = {k for k, p in model.named_parameters() if p.requires_grad}
        assert trainable == {k for n in names for k, _ in model.adapter_parameters(n)}
    model.set_adapter("second", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("soft")
    assert {k for k, p in model.named_parameters() if p.requires_grad} == {k for k, _ in model.adapter_parameters("soft")}
    for bad in ([], ["default", "default"]):
        with pytest.raises(AdapterError, match="one or more different names"):
            model.set_adapter(bad)
    with pytest.raises(AdapterError, match="no adapter 'secnd'.*did you mean 'second'"):
        model.set_adapter("secnd")
    with pytest.raises(AdapterError, match="There is an adapter 'soft' already"):
        model.add_adapter("soft", config("lora", "llama"))
    assert model.active_adapters == ["second"]


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_delete_adapter_leaves_no_trace(method: str) -> None:
    model = attach("llama", "lora_default")
    before, wanted = state_of(model), logits_of(model, **INPUTS)
    modules = {n for n, _ in model.named_modules()}
    model.add_adapter("second", config(method, "llama"))
    assert state_of(model).keys() != before.keys()
    model.delete_adapter("second")
    after = state_of(model)
    assert after.keys() == before.keys()
    assert {n for n, _ in model.named_modules()} == modules
    assert torch.equal(logits_of(model, **INPUTS), wanted)
    model.add_adapter("second", config(method, "llama"))


def test_deleting_the_active_adapter() -> None:
    model = attach("llama", "lora")
    model.add_adapter("second", config("prompt", "llama"))
    with pytest.warns(UserWarning, match="'default' was active; active now: second"):
        model.delete_adapter("default")
    assert model.active_adapters == ["second"]
    assert not any("lora" in k for k in model.state_dict())
    assert any(p.requires_grad for p in model.parameters())
    model.delete_adapter("second")
    assert model.active_adapters == []
    assert torch.equal(logits_of(model, **INPUTS), logits_of(fresh("llama"), **INPUTS))
    model.add_adapter("third", config("lora", "llama"))
    model.set_adapter("third")
    assert steps(model.train(), 3)[-1] != steps(model, 1)[0]


def test_adapter_names_for_one_call() -> None:
    model = attach("llama", "lora")
    model.add_adapter("second", config("prompt", "llama"))
    model.set_adapter("second")
    randomise(model).eval()
    with_second = logits_of(model, **INPUTS)
    model.set_adapter("default")
    assert torch.equal(logits_of(model, **INPUTS, adapter_names=["second"] * 3), with_second)
    base = logits_of(fresh("llama"), **INPUTS)
    assert torch.equal(logits_of(model, **INPUTS, adapter_names=["__base__"] * 3), base)
    ids = INPUTS["input_ids"]
    one = model.generate(ids, adapter_names=["second"] * 3, max_new_tokens=3, do_sample=False)
    model.set_adapter("second")
    assert torch.equal(one, model.generate(ids, max_new_tokens=3, do_sample=False))
    with pytest.raises(AdapterError, match="no adapter 'third'"):
        model(**INPUTS, adapter_names=["third"] * 3)


def test_layer_and_model_status() -> None:
    model = attach("llama", "lora_default")
    model.add_adapter("soft", config("prompt", "llama"))
    model.add_adapter("bottle", config("houlsby", "llama"))
    status = {s.name: s for s in model.get_layer_status()}
    assert {"prompt_encoder", "bottleneck"} < set(status)
    place = status["model.model.layers.0.self_attn.q_proj"]
    assert place.active_adapters == ["default"]
    assert place.available_adapters == ["default"]
    assert place.requires_grad == {"default": True}
    assert place.merged_adapters == []
    assert place.enabled
    assert len(status) == 4 + 2
    model.merge_adapter("default")
    whole = model.get_model_status()
    assert whole.merged_adapters == ["default"]
    assert whole.available_adapters == ["bottle", "default", "soft"]
    assert whole.peft_types == {"default": "LORA", "soft": "PROMPT_TUNING", "bottle": "BOTTLENECK"}
    assert whole.requires_grad == {"default": True, "soft": False, "bottle": False}
    assert (whole.trainable_params, whole.total_params) == model.get_nb_trainable_parameters()
    assert whole.num_adapter_layers == 6


# -- compositions ------------------------------------------------------------------------------------------------------
MIXES = (*COMPOSITIONS, ("lora", "p_tuning_lstm"), ("houlsby", "prompt"), ("lora", "prompt", "houlsby"), ("lora", "rslora"),
         ("prompt", "prompt"), ("prefix", "prefix"))  # fmt: skip


@pytest.mark.parametrize(("name", "methods"), cases(("llama", "gpt2", "t5"), MIXES, lambda n, m: n == "llama"))
def test_compositions(name: str, methods: tuple[str, ...], tmp_path: Path) -> None:
    """Every part has an effect, is saved and reloaded by itself, and is switched off by itself."""
    inputs = batch(name)
    names = ["default", *(f"{m}{i}" for i, m in enumerate(methods[1:]))]
    model = graftlm.get_peft_model(fresh(name), config(methods[0], name))
    for other, method in zip(names[1:], methods[1:], strict=True):
        model.add_adapter(other, config(method, name))
    model.set_adapter(names)
    randomise(model).eval()
    whole = model(**inputs).loss.detach()
    singles = []
    for one in names:
        model.set_adapter(one)
        singles.append(model(**inputs).loss.detach())
        assert abs(singles[-1] - whole) > 1e-5
    model.set_adapter(names)
    model.save_pretrained(tmp_path)
    again = graftlm.PeftModel.from_pretrained(fresh(name), tmp_path)
    for other in names[1:]:
        again.load_adapter(tmp_path / other, other)
    again.set_adapter(names)
    close(again(**inputs).loss.detach(), whole)
    for one, loss in zip(names, singles, strict=True):
        again.set_adapter(one)
        close(again(**inputs).loss.detach(), loss)
    with again.disable_adapter():
        close(again(**inputs).loss.detach(), fresh(name)(**inputs).loss.detach())


@pytest.mark.parametrize("methods", COMPOSITIONS, ids=label)
def test_compositions_train_together(methods: tuple[str, ...]) -> None:
    model = attach("llama", methods).train()
    before = {n: [p.detach().clone() for _, p in model.adapter_parameters(n)] for n in model.active_adapters}
    losses = steps(model, 4)
    assert losses[-1] < losses[0]
    for name, values in before.items():
        now = [p for _, p in model.adapter_parameters(name)]
        assert any(not torch.equal(a, b) for a, b in zip(values, now, strict=True)), name


def test_two_loras_add_up() -> None:
    """y = Wx + update1 + update2: on the first layer's output, by hand."""
    model = attach("llama", "lora_default")
    model.add_adapter("second", config("lora_default", "llama"))
    model.set_adapter(["default", "second"])
    randomise(model).eval()
    layer = model.base.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        wanted = layer.base_layer(x) + sum(x @ layer.get_delta_weight(n).T for n in ("default", "second"))
        close(layer(x), wanted)


def test_two_copies_of_one_module_cannot_be_active_together() -> None:
    model = attach("llama", "modules_to_save")
    model.add_adapter("second", config("modules_to_save", "llama"))
    model.set_adapter(["default", "second"])
    with pytest.raises(AdapterError, match="only one of them"):
        model(**INPUTS)


# -- copies ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [*METHODS, ("lora", "prompt"), ("prefix", "houlsby")], ids=label)
def test_deepcopy_and_pickle(method: Any) -> None:
    model = attach("llama", method)
    wanted = logits_of(model, **INPUTS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert type(made) is type(model)
        assert isinstance(made, graftlm.PeftModel)
        assert made.base is not model.base
        assert torch.equal(logits_of(made, **INPUTS), wanted)
        assert made.active_adapters == model.active_adapters
        made.set_adapter(made.active_adapters)
        steps(made.train(), 2)
        assert not torch.equal(logits_of(made.eval(), **INPUTS), wanted)
        with made.disable_adapter():
            assert torch.equal(logits_of(made, **INPUTS), logits_of(fresh("llama"), **INPUTS))
    assert torch.equal(logits_of(model, **INPUTS), wanted)


# -- precision ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS, ids=label)
def test_to_dtype(method: str) -> None:
    model = attach("llama", method)
    wanted = logits_of(model, **INPUTS)
    double = model.to(torch.float64)
    assert {p.dtype for p in double.parameters()} == {torch.float64}
    close(logits_of(double, **INPUTS).float(), wanted, 1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("name", "method"),
    cases(("llama", "gpt2", "t5"), METHODS, lambda n, m: n == "llama" or m in ("bias_all", "prefix")),
)
def test_bf16_base_with_fp32_adapters(name: str, method: str, autocast: bool) -> None:
    inputs = batch(name)
    wanted = logits_of(attach(name, method, base=still(name).to(torch.bfloat16).float()), **inputs)
    model = attach(name, method, base=still(name).to(torch.bfloat16)).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        out = model(**inputs)
    assert (out.logits.float() - wanted).abs().mean() < 0.1 * wanted.abs().mean() + 0.02
    out.loss.backward()
    found = grads(model)
    assert found.keys() == {k for k, p in model.named_parameters() if p.requires_grad}
    assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in found.values())
    model.eval()
    assert model.generate(inputs["input_ids"], max_new_tokens=2, do_sample=False).shape[0] == 3


@pytest.mark.parametrize("method", METHODS, ids=label)
def test_autocast_of_an_fp32_base(method: str) -> None:
    model = attach("llama", method).train()
    exact = model(**INPUTS).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**INPUTS).loss
    assert loss.item() == pytest.approx(exact, rel=0.05)
    loss.backward()
    assert all(torch.isfinite(g).all() for g in grads(model).values())


def test_adapters_in_the_bases_own_precision() -> None:
    for method in ("lora", "prompt", "houlsby", "prefix"):
        model = graftlm.get_peft_model(
            fresh("llama").to(torch.bfloat16), config(method, "llama"), autocast_adapter_dtype=False
        )
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        model(**INPUTS).loss.backward()


# -- activation checkpointing ------------------------------------------------------------------------------------------
CHECKPOINTED = cases(
    ("llama", "gpt2", "bloom", "opt", "t5", "bart", "gemma3", "falcon"),
    (*METHODS, *COMPOSITIONS),
    lambda n, m: n == "llama" or (n in ("gpt2", "t5") and m in (*ONE_OF_EACH, ("prefix", "lora"))) or m == "prefix",
)


@pytest.mark.parametrize(("name", "method"), CHECKPOINTED)
def test_checkpointing_changes_neither_loss_nor_gradients(name: str, method: Any) -> None:
    if method == "bias_all" and name not in ("gpt2", "bloom", "opt"):
        pytest.skip("few biases")
    inputs = batch(name)
    model = attach(name, method, base=still(name)).train()
    found = []
    for on in (False, True):
        model.zero_grad(set_to_none=True)
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            assert model.is_gradient_checkpointing
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        found.append((loss.item(), grads(model)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert found[0][1].keys() == found[1][1].keys() == {k for k, p in model.named_parameters() if p.requires_grad}
    for key, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], value, atol=1e-6, rtol=1e-4)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("newer", [False, True], ids=["gradient", "activation"])
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", ("prefix", "lora")], ids=label)
def test_checkpointing_every_other_layer(method: Any, newer: bool) -> None:
    model = attach("llama", method).train()
    model(**INPUTS).loss.backward()
    wanted = grads(model)
    model.zero_grad(set_to_none=True)
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "every_n_layers": 2})
    assert [layer.gradient_checkpointing for layer in model.base.model.layers] == [True, False]
    model(**INPUTS, use_cache=False).loss.backward()
    got = grads(model)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["lora", "prompt", "p_tuning_mlp", "houlsby", "embedding", ("lora", "prompt")], ids=label)
def test_reentrant_checkpointing(method: Any) -> None:
    model = attach("llama", method).train()
    model(**INPUTS).loss.backward()
    wanted = grads(model)
    model.zero_grad(set_to_none=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model(**INPUTS, use_cache=False).loss.backward()
    got = grads(model)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("method", ["prefix", "prefix_projection", ("prefix", "lora")], ids=label)
def test_reentrant_checkpointing_of_a_prefix_is_refused(method: Any) -> None:
    model = attach("llama", method).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UnsupportedError, match="use_reentrant': False"):
        model(**INPUTS)


def test_checkpointing_two_wrappers_in_turn() -> None:
    """Recomputation runs under its own forward's plan, even when another wrapper ran in between."""
    base = fresh("llama")
    models = [
        randomise(graftlm.get_peft_model(base, config(m, "llama")), seed=i).train()
        for i, m in enumerate(("lora", "houlsby"))
    ]
    wanted = []
    for model in models:
        model(**INPUTS).loss.backward()
        wanted.append(grads(model))
        model.zero_grad(set_to_none=True)
    base.gradient_checkpointing_enable({"use_reentrant": False})
    losses = [model(**INPUTS, use_cache=False).loss for model in models]
    for loss in losses:
        loss.backward()
    for model, values in zip(models, wanted, strict=True):
        got = {k: p.grad for k, p in model.adapter_parameters("default")}
        for key, parameter in got.items():
            torch.testing.assert_close(parameter, values[key], atol=1e-6, rtol=1e-4)


# -- merging -----------------------------------------------------------------------------------------------------------
LORA_METHODS = ("lora", "dora", "rslora", "patterns", "embedding", "gaussian", "bias_lora_only", "bias_all")


@pytest.mark.parametrize(
    ("name", "method"),
    cases(("llama", "gpt2", "bloom", "t5", "bert"), LORA_METHODS, lambda n, m: n == "gpt2" or m in ("lora", "embedding")),
)
def test_merge_and_unmerge(name: str, method: str) -> None:
    model, inputs = attach(name, method), batch(name)
    wanted, before = logits_of(model, **inputs), state_of(model)
    model.merge_adapter()
    close(logits_of(model, **inputs), wanted, 2e-5)
    with pytest.warns(UserWarning, match="merged already"):
        model.merge_adapter()  # nothing is merged twice
    close(logits_of(model, **inputs), wanted, 2e-5)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, **inputs), logits_of(fresh(name), **inputs))
    close(logits_of(model, **inputs), wanted, 2e-5)
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(logits_of(model, **inputs), wanted)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_merge_and_unmerge_of_factor_inits(init: str) -> None:
    settings = graftlm.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=init)
    model = randomise(graftlm.get_peft_model(fresh("llama"), settings)).eval()
    wanted, before = logits_of(model, **INPUTS), state_of(model)
    model.merge_adapter()
    close(logits_of(model, **INPUTS), wanted, 2e-5)
    model.unmerge_adapter()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    close(logits_of(model.merge_and_unload(), **INPUTS), wanted, 2e-5)


def test_merge_in_bf16_is_undone_bit_for_bit() -> None:
    model = attach("llama", "lora", base=fresh("llama").to(torch.bfloat16))
    before = state_of(model)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_merge_several_and_some() -> None:
    model = attach("llama", "lora")
    model.add_adapter("second", config("lora", "llama"))
    model.set_adapter(["default", "second"])
    randomise(model).eval()
    wanted = logits_of(model, **INPUTS)
    model.merge_adapter("second")
    close(logits_of(model, **INPUTS), wanted, 2e-5)
    model.merge_adapter(["default"])
    close(logits_of(model, **INPUTS), wanted, 2e-5)
    model.unmerge_adapter()
    model.set_adapter("default")
    alone = logits_of(model, **INPUTS)
    only = model.merge_and_unload(adapter_names=["default"])
    close(logits_of(only, **INPUTS), alone, 2e-5)


def test_two_wrappers_merge_each_by_itself() -> None:
    base = fresh("llama")
    first = randomise(graftlm.get_peft_model(base, config("lora", "llama")), seed=1).eval()
    second = randomise(graftlm.get_peft_model(base, config("lora", "llama")), seed=2).eval()
    one, two = logits_of(first, **INPUTS), logits_of(second, **INPUTS)
    first.merge_adapter()
    close(logits_of(first, **INPUTS), one, 2e-5)
    first.unmerge_adapter()
    close(logits_of(second, **INPUTS), two, 1e-6)
    second.merge_adapter()
    second.unmerge_adapter()
    assert torch.equal(logits_of(first, **INPUTS), one)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "houlsby", "bias_all", "lora"])
def test_a_backbone_that_is_called_by_itself(name: str, method: str) -> None:
    """What acts through the wrapper only is not left out silently; LoRA acts there, too."""
    model, ids = attach(name, method), batch(name)["input_ids"]
    backbone = model.base.base_model
    if method == "lora":
        with torch.no_grad():
            states = model(ids, output_hidden_states=True)
            last = states["decoder_hidden_states" if name == "bart" else "hidden_states"][-1]
            close(backbone(ids)[0], last)
        return
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="called by itself: default would be left out"):
            backbone(ids)
        with pytest.raises(Exception, match="."):  # a failing call of the base leaves nothing behind
            model.base(input_ids="no ids")
    bare = fresh(name)
    if method != "bias_all" and name != "bert":  # LoRA and trained heads act in direct calls
        assert torch.equal(model.base(ids)[0], bare(ids)[0])
    with model.disable_adapter():
        assert torch.equal(backbone(ids)[0], bare.base_model(ids)[0])
    assert getattr(model, model.base.base_model_prefix) is backbone


def with_two(names: tuple[str, str] = ("a", "b"), **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model with two LoRA adapters, the first active, and the logits of each, of both and of none."""
    settings = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = graftlm.get_peft_model(fresh("llama"), graftlm.LoraConfig(**settings), names[0])
        model.add_adapter(names[1], graftlm.LoraConfig(**settings))
    model.set_adapter(list(names))
    randomise(model).eval()
    wanted = {}
    for active in (*names, list(names)):
        model.set_adapter(active)
        wanted["+".join(active)] = logits_of(model, **INPUTS)
    with model.disable_adapter():
        wanted[""] = logits_of(model, **INPUTS)
    model.set_adapter(names[0])
    return model, wanted


@pytest.mark.parametrize("method", [{}, {"use_dora": True}, {"target_modules": ["lm_head", "embed_tokens", "up_proj"]}])
def test_active_adapters_act_whatever_is_merged(method: dict[str, Any]) -> None:
    model, wanted = with_two(**method)
    model.merge_adapter()
    for active in ("a", "b", ["a", "b"], "b", "a"):
        model.set_adapter(active)
        if not method.get("use_dora") or active != ["a", "b"]:  # DoRA's order within a composition matters
            close(logits_of(model, **INPUTS), wanted["+".join(active)], 2e-5)
        with model.disable_adapter():
            assert torch.equal(logits_of(model, **INPUTS), wanted[""])
            model.set_adapter("b")  # within the block, too
        close(logits_of(model, **INPUTS), wanted["b"], 2e-5)
    model.set_adapter("a")
    model.unmerge_adapter()
    assert torch.equal(logits_of(model, **INPUTS), wanted["a"])


def test_what_is_merged_is_computed_once_and_by_the_weight() -> None:
    model, wanted = with_two()
    model.merge_adapter()
    calls: list[str] = []
    for change in [change for m in model.modules() if isinstance(m, Adapted) for change in m.changes.values()]:
        change.low_rank = lambda t, own=change.low_rank: calls.append(t.name) or own(t)
    close(logits_of(model, **INPUTS), wanted["a"], 2e-5)
    assert not calls
    model.set_adapter(["a", "b"])
    logits_of(model, **INPUTS)
    assert set(calls) == {"b"}


def test_merging_names_that_are_not_active() -> None:
    """They become active, beside what is merged; what is not is named. Unmerging undoes both."""
    model, wanted = with_two()
    with pytest.warns(UserWarning, match=r"a acts no longer: merge_adapter\(\['b'\]\) .*set_adapter\(\['a', 'b'\]\)"):
        model.merge_adapter(["b"])
    assert model.active_adapters == ["b"]
    close(logits_of(model, **INPUTS), wanted["b"], 2e-5)
    model.merge_adapter(["a"])  # one after the other
    assert model.active_adapters == ["b", "a"]
    close(logits_of(model, **INPUTS), wanted["a+b"], 2e-5)
    model.unmerge_adapter()
    assert model.active_adapters == ["a"]
    assert torch.equal(logits_of(model, **INPUTS), wanted["a"])
    model.merge_adapter(["a", "b"])
    model.set_adapter("b")
    model.unmerge_adapter()
    assert model.active_adapters == ["b"]
    assert torch.equal(logits_of(model, **INPUTS), wanted["b"])


def test_a_merge_that_fails_leaves_what_is_active() -> None:
    model, wanted = with_two()
    model.add_adapter("prompt", graftlm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedError, match="cannot be merged"):
        model.merge_adapter(["b", "prompt"])
    assert model.active_adapters == ["a"]
    assert torch.equal(logits_of(model, **INPUTS), wanted["a"])


def test_a_merged_adapter_is_not_deleted() -> None:
    """As in HF PEFT; one beside it is, and the merge stays."""
    model, wanted = with_two()
    model.add_adapter("third", graftlm.LoraConfig(r=2, target_modules=["q_proj"]))
    model.merge_adapter(["a", "b"])
    with pytest.raises(AdapterError, match=r"'a' is merged into the base; call unmerge_adapter\(\)"):
        model.delete_adapter("a")
    model.delete_adapter("third")
    assert model.get_model_status().merged_adapters == ["a", "b"] and list(model.peft_config) == ["a", "b"]
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.delete_adapter("a")
    close(logits_of(model, **INPUTS), wanted["b"], 2e-5)
    model.delete_adapter("b")
    assert torch.equal(logits_of(model, **INPUTS), wanted[""])


def test_values_that_change_while_merged(tmp_path: Path) -> None:
    """Loading, a state, a value set by hand: the new ones act, also when they are merged again."""
    model, wanted = with_two()
    model.save_pretrained(tmp_path)
    state, before = graftlm.get_peft_model_state_dict(model, adapter_name="b"), state_of(model)
    whole = {k.replace(".b.", ".a."): v for k, v in before.items() if ".lora_" in k and ".b." in k}

    def by_hand() -> None:
        with torch.no_grad():
            for key, parameter in model.adapter_parameters("a"):
                parameter.copy_(whole[key])

    changes = [
        lambda: model.load_adapter(tmp_path / "b", "a"),
        lambda: graftlm.set_peft_model_state_dict(model, state, "a"),
        lambda: model.load_state_dict(before | whole),
        by_hand,
    ]
    for change in changes:
        model, _ = with_two()
        model.merge_adapter()
        change()
        close(logits_of(model, **INPUTS), wanted["b"], 2e-5)
        model.merge_adapter()
        close(logits_of(model, **INPUTS), wanted["b"], 2e-5)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits_of(model, **INPUTS), wanted[""])


@pytest.mark.parametrize("fused", [False, True])
def test_training_while_merged(fused: bool) -> None:
    models = [with_two(lora_dropout=0.0)[0] for _ in range(2)]
    models[1].merge_adapter()
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=fused)
        for _ in range(2):
            model.train()(**INPUTS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
    close(logits_of(models[1], **INPUTS), logits_of(models[0], **INPUTS), 1e-4)


def test_dropout_acts_in_training_mode_while_merged() -> None:
    model, _ = with_two(lora_dropout=0.5)
    model.train()
    found = []
    for merged in (False, True):
        if merged:
            model.merge_adapter()
        torch.manual_seed(0)
        found.append(logits_of(model, **INPUTS))
    assert torch.equal(*found)


@pytest.mark.parametrize("inner", [0, 1])
def test_a_merge_of_one_wrapper_is_not_seen_by_another(inner: int) -> None:
    base = fresh("llama")
    models = [
        randomise(graftlm.get_peft_model(base, config(m, "llama")), seed=i).eval() for i, m in enumerate(("lora", "dora"))
    ]
    wanted = [logits_of(m, **INPUTS) for m in models]
    one, other = models[inner], models[1 - inner]
    one.merge_adapter()
    close(logits_of(one, **INPUTS), wanted[inner], 2e-5)
    assert torch.equal(logits_of(other, **INPUTS), wanted[1 - inner])
    other.merge_adapter()
    for model, values in zip(models, wanted, strict=True):
        close(logits_of(model, **INPUTS), values, 2e-5)
    other.unload()
    close(logits_of(one, **INPUTS), wanted[inner], 2e-5)
    one.unmerge_adapter()
    assert torch.equal(logits_of(one.unload(), **INPUTS), logits_of(fresh("llama"), **INPUTS))


def test_a_module_trained_in_full_starts_from_the_unmerged_layer() -> None:
    model, wanted = with_two()
    model.merge_adapter()
    model.add_adapter("c", graftlm.LoraConfig(task_type="CAUSAL_LM", modules_to_save=["up_proj"], target_modules=["q_proj"]))
    model.set_adapter("c")
    close(logits_of(model, **INPUTS), wanted[""])


def test_copies_and_casts_while_merged() -> None:
    model, wanted = with_two()
    model.merge_adapter()
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        assert all(m.frozen.fresh for m in made.modules() if getattr(m, "merged_adapters", None))
        close(logits_of(made, **INPUTS), wanted["a"], 2e-5)
        made.set_adapter("b")
        close(logits_of(made, **INPUTS), wanted["b"], 2e-5)
        made.unmerge_adapter()
        close(logits_of(made, **INPUTS), wanted["b"], 2e-5)
    model.double().unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_merge_of_not_a_number_is_refused_when_safe() -> None:
    model = attach("llama", "lora")
    with torch.no_grad():
        next(p for k, p in model.named_parameters() if "lora_B" in k)[0, 0] = float("nan")
    before = state_of(model)
    with pytest.raises(ValueError, match="NaN or infinite"):
        model.merge_adapter(safe_merge=True)
    after = model.state_dict()
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    assert not model.get_model_status().merged_adapters


@pytest.mark.parametrize("method", ["prompt", "p_tuning_mlp", "prefix", "houlsby", "parallel"])
def test_methods_without_merge_say_so(method: str) -> None:
    model = attach("llama", method)
    kind = model.peft_type.value
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnsupportedError, match=f"Adapter 'default' is {kind}.*cannot be merged"):
            call()
    assert not torch.equal(logits_of(model, **INPUTS)[:, -7:], logits_of(fresh("llama"), **INPUTS))


def test_merge_of_a_composition_changes_nothing_when_a_part_cannot() -> None:
    model = attach("llama", ("lora", "prompt"))
    before, wanted = state_of(model), logits_of(model, **INPUTS)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(UnsupportedError, match="'prompt'"):
            call()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert torch.equal(logits_of(model, **INPUTS), wanted)
    model.merge_adapter("default")
    close(logits_of(model, **INPUTS), wanted, 2e-5)


def test_failing_merge_of_tied_weights_leaves_the_tie() -> None:
    model = attach("gpt2", ("embedding", "prompt"))
    with pytest.raises(UnsupportedError):
        model.merge_and_unload()
    assert model.config.tie_word_embeddings
    base = model.base
    assert base.transformer.wte.base_layer.weight is base.lm_head.weight


# -- weighted adapters -------------------------------------------------------------------------------------------------
def two_loras(lib: Any, ranks: tuple[int, int] = (4, 4)) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        targets = ["q_proj", "v_proj", "up_proj"]
        settings = [lib.LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=a, target_modules=targets)
                    for r, a in zip(ranks, (8, 3), strict=True)]  # fmt: skip
        model = lib.get_peft_model(fresh("llama"), settings[0])
        model.add_adapter("second", settings[1])
    generator_free = {}
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if ".lora_" in key:
                generator_free[key] = torch.Generator().manual_seed(sum(key.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator_free[key]) * 0.2)
    return model.eval()


WEIGHTED = [
    ("linear", {}, [0.7, 0.4]), ("linear", {}, [1.0, -0.5]), ("cat", {}, [0.7, 0.4]), ("cat", {}, [1.0, -0.5]),
    ("svd", {}, [0.7, 0.4]), ("svd", {"svd_rank": 3}, [0.7, -0.4]), ("ties", {"density": 0.5}, [0.7, 0.4]),
    ("ties", {"density": 0.3, "majority_sign_method": "frequency"}, [1.0, 1.0]), ("ties", {"density": 1.0}, [0.5, 0.5]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options", "weights"), WEIGHTED, ids=[f"{k}-{i}" for i, (k, _, _) in enumerate(WEIGHTED)])
def test_weighted_adapters_are_those_of_peft(kind: str, options: dict[str, Any], weights: list[float]) -> None:
    outputs = []
    for lib in (graftlm, peft):
        model = two_loras(lib)
        model.add_weighted_adapter(["default", "second"], weights, "mix", combination_type=kind, **options)
        model.set_adapter("mix")
        outputs.append(logits_of(model, **INPUTS))
    close(outputs[0], outputs[1], 5e-5)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare(kind: str) -> None:
    """Random by nature: at density 1 it is its plain form; the same seed gives the same adapter."""

    def mixed(kind: str, density: float | None, seed: int) -> torch.Tensor:
        model = two_loras(graftlm)
        torch.manual_seed(seed)
        options = {} if density is None else {"density": density}
        model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "mix", combination_type=kind, **options)
        model.set_adapter("mix")
        return logits_of(model, **INPUTS)

    assert torch.equal(mixed(kind, 0.5, 3), mixed(kind, 0.5, 3))
    assert not torch.equal(mixed(kind, 0.5, 3), mixed(kind, 0.5, 4))
    plain = mixed("linear", None, 0) if kind == "dare_linear" else mixed("ties", 1.0, 0)
    close(mixed(kind, 1.0, 5), plain)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare_with_peft_at_full_density(kind: str) -> None:
    outputs = []
    for lib in (graftlm, peft):
        model = two_loras(lib)
        model.add_weighted_adapter(["default", "second"], [0.7, 0.4], "mix", combination_type=kind, density=1.0)
        model.set_adapter("mix")
        outputs.append(logits_of(model, **INPUTS))
    close(outputs[0], outputs[1], 5e-5)


def test_cat_is_exact_for_different_ranks() -> None:
    model = two_loras(graftlm, (2, 5))
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "mix", combination_type="cat")
    model.set_adapter("mix")
    got = logits_of(model, **INPUTS)
    assert model.peft_config["mix"].r == 7
    model.set_adapter(["default", "second"])
    close(got, logits_of(model, **INPUTS), 2e-5)


def two_patterned(lib: Any, patterns: tuple[dict[str, int], dict[str, int]]) -> Any:
    """Two LoRA adapters whose ranks differ from layer to layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = [
            lib.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", t], rank_pattern=p)
            for p, t in zip(patterns, ("up_proj", "down_proj"), strict=True)
        ]
        model = lib.get_peft_model(fresh("llama"), settings[0])
        model.add_adapter("second", settings[1])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_" in key:
                generator = torch.Generator().manual_seed(sum(key.encode()))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


UNLIKE, ALIKE = ({"q_proj": 2}, {"v_proj": 7}), ({"q_proj": 2}, {"q_proj": 2, "down_proj": 3})


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("patterns", [UNLIKE, ALIKE], ids=["unlike", "alike"])
def test_weighted_adapters_with_rank_patterns(kind: str, patterns: Any, tmp_path: Path) -> None:
    """Right, as HF PEFT computes it, or refused before anything changes (HF PEFT stops halfway)."""
    options = {"combination_type": kind} | ({} if kind in ("cat", "svd", "linear") else {"density": 1.0})
    arguments = (["default", "second"], [0.7, -0.4], "mix")
    model = two_patterned(graftlm, patterns)
    before = state_of(model)
    if patterns is UNLIKE and kind not in ("cat", "svd"):
        with pytest.raises(ConfigError, match=r"'default' r=2, 'second' r=4 in 'model.layers.0.self_attn.q_proj'.*'cat'"):
            model.add_weighted_adapter(*arguments, **options)
        assert list(model.peft_config) == ["default", "second"]
        assert state_of(model).keys() == before.keys()
        return
    their = two_patterned(peft, patterns)
    for one in (model, their):
        one.add_weighted_adapter(*arguments, **options)
        one.set_adapter("mix")
    wanted = logits_of(their, **INPUTS)
    close(logits_of(model, **INPUTS), wanted, 1e-4)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    close(logits_of(graftlm.PeftModel.from_pretrained(fresh("llama"), tmp_path / "mix"), **INPUTS), wanted, 1e-4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"svd_rank": 0}, "svd_rank=0"), ({"svd_rank": "4"}, "svd_rank='4'"), ({"svd_clamp": 2}, "svd_clamp=2"),
        ({"combination_type": "ties", "density": 1.5}, "density=1.5"), ({"combination_type": "dare_ties"}, "density=None"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, "majority_sign_method='most'"),
        ({"weights": [1, float("nan")]}, "weights="), ({"weights": ["1", 1]}, "weights="),
    ],
)  # fmt: skip
def test_weighted_options_are_checked_first(options: dict[str, Any], match: str) -> None:
    model = two_loras(graftlm)
    before = state_of(model)
    with pytest.raises(ConfigError, match=match):
        model.add_weighted_adapter(**{"adapters": ["default", "second"], "weights": [1, 1], "adapter_name": "mix"} | options)
    assert state_of(model).keys() == before.keys()


def test_weighted_adapter_is_saved_and_read_by_peft(tmp_path: Path) -> None:
    model = two_loras(graftlm)
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mix", combination_type="cat")
    model.set_adapter("mix")
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their = peft.PeftModel.from_pretrained(fresh("llama"), tmp_path / "mix").eval()
    close(logits_of(their, **INPUTS), logits_of(model, **INPUTS))


def test_weighted_adapters_that_cannot_be() -> None:
    model = two_loras(graftlm, (2, 5))
    model.add_adapter("soft", config("prompt", "llama"))
    names = set(model.peft_config)
    for error, match, args, options in (
        (ConfigError, "one rank", (["default", "second"], [1, 1]), {"combination_type": "linear"}),
        (ConfigError, "did you mean 'linear'", (["default", "second"], [1, 1]), {"combination_type": "linaer"}),
        (ConfigError, "density", (["default", "default"], [1, 1]), {"combination_type": "ties"}),
        (AdapterError, "one weight an adapter", (["default", "second"], [1]), {}),
        (AdapterError, "no adapter 'third'", (["default", "third"], [1, 1]), {}),
        (AdapterError, "only LoRA", (["default", "soft"], [1, 1]), {}),
        (TypeError, "unexpected", (["default", "second"], [1, 1]), {"densty": 0.5}),
    ):
        with pytest.raises(error, match=match):
            model.add_weighted_adapter(*args, "mix", **options)
        assert set(model.peft_config) == names
        assert not any(".mix." in k for k in model.state_dict())


@pytest.mark.parametrize("method", list(CONFIGS))
@pytest.mark.parametrize("name", list(ALL))
@pytest.mark.slow
def test_every_method_on_every_family_trains(name: str, method: str) -> None:
    if method == "bias_all" and name == "gemma3":
        pytest.skip("no biases")
    inputs = batch(name)
    model = graftlm.get_peft_model(still(name), config(method, name)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not any(p.grad is not None for p in model.base.parameters() if not p.requires_grad)


def test_loading_into_an_attached_adapter_checks_what_it_computes(tmp_path: Path) -> None:
    """Equal shapes do not make equal adapters: the scale is in the configuration."""
    saved = graftlm.get_peft_model(fresh("llama"), graftlm.LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM"))
    saved.save_pretrained(tmp_path)
    model = graftlm.get_peft_model(fresh("llama"), graftlm.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM"))
    with pytest.raises(AdapterError, match=r"lora_alpha=32 \(attached: 8\)"):
        model.load_adapter(tmp_path, "default")
    model.load_adapter(tmp_path, "other", is_trainable=True)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    model.set_adapter("other")
    assert all(p.requires_grad for n, p in model.named_parameters() if ".other." in n)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".default." in n)


def test_switching_looks_at_the_base_and_not_at_all_adapters() -> None:
    """What `set_adapter` walks through is the same with two adapters and with twenty."""

    def counted(count: int) -> int:
        model = attach("llama", "lora")
        for i in range(count):
            model.add_adapter(f"more{i}", config("lora", "llama"))
        walked = [module for _, module in base_modules(model.base)]
        adapters = [m for _, m in model.base.named_modules() if isinstance(m, torch.nn.ModuleDict)]
        assert adapters and not set(adapters) & set(walked)
        return len(walked)

    assert counted(1) == counted(19)


# -- models that read sound or images --------------------------------------------------------------------------------------
HALVES = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
          "max_target_positions": 32, "decoder_start_token_id": 1, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2, "vocab_size": 64}  # fmt: skip
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
CONVS = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}  # fmt: skip
SENSES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "whisper": (
        t.WhisperForConditionalGeneration,
        lambda: t.WhisperConfig(**HALVES, num_mel_bins=8, max_source_positions=10, suppress_tokens=None,
                                begin_suppress_tokens=None),
        {"input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))},
    ),
    "speech2text": (
        t.Speech2TextForConditionalGeneration,
        lambda: t.Speech2TextConfig(**HALVES, input_feat_per_channel=8, conv_channels=16, max_source_positions=40),
        {"input_features": torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0)),
         "attention_mask": torch.tensor([[1] * 20, [1] * 12 + [0] * 8])},
    ),
    "wav2vec2": (
        t.Wav2Vec2ForCTC, lambda: t.Wav2Vec2Config(**LAYERS, **CONVS, vocab_size=64),
        {"input_values": torch.randn(2, 60, generator=torch.Generator().manual_seed(0))},
    ),
    "vit": (
        t.ViTForImageClassification, lambda: t.ViTConfig(**LAYERS, image_size=8, patch_size=4),
        {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))},
    ),
}  # fmt: skip


def sensing(name: str) -> tuple[nn.Module, dict[str, Any]]:
    kind, settings, inputs = SENSES[name]
    torch.manual_seed(0)
    model = kind(settings()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model, dict(inputs)


@pytest.mark.parametrize("name", list(SENSES))
def test_models_without_token_ids_run_train_and_generate(name: str, tmp_path: Path) -> None:
    """Whisper's `generate` calls the encoder with features alone; Wav2Vec2 and ViT have no embeddings of tokens at all."""
    base, inputs = sensing(name)
    generates = name in ("whisper", "speech2text")
    more = {"decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])} if generates else {}
    wanted = logits_of(base, **inputs, **more)
    options = {"max_new_tokens": 4, "do_sample": False}
    tokens = base.generate(**inputs, **options) if generates else None
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(target_modules="all-linear", r=4)).eval()
    close(logits_of(model, **inputs, **more), wanted)
    if tokens is not None:
        assert torch.equal(model.generate(**inputs, **options), tokens)
    labels = torch.tensor([0, 1]) if name == "vit" else torch.tensor([[5, 6], [7, 8]])
    model.train()(**inputs, labels=labels).loss.backward()
    assert all(p.grad is not None for k, p in model.named_parameters() if ".lora_B" in k and p.requires_grad)
    randomise(model.eval()).save_pretrained(tmp_path)
    wanted = logits_of(model, **inputs, **more)
    again = graftlm.PeftModel.from_pretrained(sensing(name)[0], tmp_path)
    close(logits_of(again, **inputs, **more), wanted)


@pytest.mark.parametrize("name", list(SENSES))
def test_virtual_tokens_without_token_ids_are_refused(name: str) -> None:
    base, _ = sensing(name)
    with pytest.raises(UnsupportedError, match="no embeddings of input tokens.*LoRA or bottleneck"):
        graftlm.get_peft_model(base, graftlm.PromptTuningConfig(num_virtual_tokens=2))
    if name in ("wav2vec2", "vit"):
        with pytest.raises(UnsupportedError, match="prefix"):
            graftlm.get_peft_model(base, graftlm.PrefixTuningConfig(num_virtual_tokens=2))


@pytest.mark.parametrize("name", ["whisper", "speech2text"])
def test_prefix_in_the_decoder_of_a_model_that_reads_sound(name: str) -> None:
    base, inputs = sensing(name)
    model = randomise(
        graftlm.get_peft_model(base, graftlm.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    )
    made = model.eval().generate(
        **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    ids = made.sequences[:, :-1]
    repeated = logits_of(model, **inputs, decoder_input_ids=ids)[:, -len(made.logits) :]
    close(torch.stack(made.logits, 1)[0], repeated[0])


def test_merging_under_accelerates_hooks() -> None:
    """accelerate puts a forward of its own on a layer (device_map); the layer as it was must not use the merged weight."""
    base = fresh("llama")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        plain = base(ids).logits
    for module in [m for n, m in base.named_modules() if n.endswith("q_proj")]:
        add_hook_to_module(module, ModelHook())
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    with torch.no_grad():
        adapted = model(ids).logits
        model.merge_adapter()
        close(model(ids).logits, adapted)
        with model.disable_adapter():
            close(model(ids).logits, plain)
        model.unmerge_adapter()
        close(model(ids).logits, adapted)


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_hooks_have_seen_stays_as_it_was(everywhere: bool) -> None:
    """LoRA writes its update into the layer's output only where nobody else holds that."""
    model = graftlm.get_peft_model(fresh("llama"), graftlm.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).eval()
    layer = next(m for m in model.modules() if hasattr(m, "lora_A")).base_layer
    seen = []

    def hook(module: torch.nn.Module, args: tuple, output: Any) -> None:
        if module is layer:
            seen.append((output, output.clone()))

    handle = register_module_forward_hook(hook) if everywhere else layer.register_forward_hook(hook)
    try:
        with torch.no_grad():
            model(torch.arange(3, 9)[None])
    finally:
        handle.remove()
    assert len(seen) == 1 and torch.equal(*seen[0])


def test_other_parts_position_tables_are_not_the_texts() -> None:
    class Half(torch.nn.Module):
        def __init__(self, **parts: torch.nn.Module) -> None:
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    text = Half(wpe=torch.nn.Embedding(100, 4))
    both = Half(qformer=Half(position_embeddings=torch.nn.Embedding(8, 4)), language_model=text)
    assert position_room(both) == position_room(text) == 100
    assert position_room(Half(vision_model=Half(position_embeddings=torch.nn.Embedding(8, 4)))) is None


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_biases_of_products_are_combined(kind: str) -> None:
    """`lora_bias` of one source or of both: the sum of what they add (HF PEFT leaves it out)."""
    base = nn.Sequential(nn.Linear(6, 8))
    options: Any = {"r": 2, "target_modules": ["0"], "init_lora_weights": False}
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(**options), "plain")
    model.add_adapter("biased", graftlm.LoraConfig(**options, lora_alpha=6, lora_bias=True))
    x = torch.randn(3, 6)
    plain, biased, none = (model(x, adapter_names=[name] * 3) for name in ("plain", "biased", "__base__"))
    model.add_weighted_adapter(["biased"], [-2.0], "one", combination_type=kind)
    model.set_adapter("one")
    assert torch.allclose(model(x), none - 2 * (biased - none), atol=1e-5)
    if kind != "linear":
        model.add_weighted_adapter(["plain", "biased"], [0.5, 2.0], "both", combination_type=kind, svd_rank=4)
        model.set_adapter("both")
        assert torch.allclose(model(x), none + 0.5 * (plain - none) + 2 * (biased - none), atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Conv1d(4, 6, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 1), nn.Conv3d(4, 6, 3)], ids=repr)
@pytest.mark.parametrize("kind", ["svd", "magnitude_prune_svd"])
def test_products_of_convolutions_are_combined(layer: Any, kind: str) -> None:
    config = graftlm.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = graftlm.get_peft_model(nn.Sequential(layer), config, "a")
    model.add_adapter("b", config)
    x = torch.randn(3, 4, *[5] * len(layer.kernel_size))
    a, b, none = (model(x, adapter_names=[name] * 3) for name in ("a", "b", "__base__"))
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "mix", combination_type=kind, svd_rank=4, density=1.0)
    model.set_adapter("mix")
    assert torch.allclose(model(x), none + 0.7 * (a - none) - 0.3 * (b - none), atol=1e-5)


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_products_of_groups_are_refused(kind: str) -> None:
    config = graftlm.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = graftlm.get_peft_model(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), config, "a")
    model.add_adapter("b", config)
    with pytest.raises(ConfigError, match="several groups.*'linear'"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "mix", combination_type=kind)


def test_layers_of_a_bare_backbone_are_counted() -> None:
    base = t.LlamaModel(fresh("llama").config)
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(target_modules=["q_proj"], layers_to_transform=1))
    assert [n for n, _ in model.named_modules() if n.endswith("lora_A.default")] == [
        "base_model.model.layers.1.self_attn.q_proj.lora_A.default"
    ]
