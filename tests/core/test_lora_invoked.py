"""`alora_invocation_tokens`: the adapter acts from its last invocation in a row on."""

from __future__ import annotations

import contextlib
import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import batch
from helpers import close, fresh, logits_of, padded, randomise, still, twenty_steps
from lora_helpers import OPTIONS
from test_parity import both_ways, theirs

import graftlm
from graftlm.errors import ConfigError, UnsupportedError
from graftlm.joint import Share, joint_losses

CALL = [11, 12]
ROWS = [
    [5, 6, 7, *CALL, 8, 9],
    [20, *CALL, 21, *CALL, 22, 23, 24],  # the last one counts
    [30, 31, 32, 33],  # none: the base
    [*CALL, 40, 41],
    [50, 51, 52, *CALL],
]
STARTS = [3, 4, 99, 0, 3]


def settings(lib: Any = graftlm, **options: Any) -> Any:
    return lib.LoraConfig(**{**OPTIONS, "alora_invocation_tokens": CALL, **options})


def attach(name: str = "llama", **options: Any) -> graftlm.PeftModel:
    return randomise(graftlm.get_peft_model(fresh(name), settings(**options)), scale=0.3).eval()


def tensors(rows: list[list[int]] = ROWS) -> list[torch.Tensor]:
    return [torch.tensor(row) for row in rows]


def plain_lora(model: graftlm.PeftModel, name: str = "llama", **options: Any) -> graftlm.PeftModel:
    """The same adapter acting on every token."""
    other = graftlm.get_peft_model(fresh(name), graftlm.LoraConfig(**OPTIONS, **options))
    graftlm.set_peft_model_state_dict(other, graftlm.get_peft_model_state_dict(model))
    return other.eval()


# -- what it computes --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("llama", {}), ("bloom", {}), ("gpt2", {}), ("bloom", {"bias": "lora_only"}), ("gpt2", {"bias": "all"})],
)
def test_rows_before_and_behind(name: str, options: dict[str, Any], side: str) -> None:
    """Before the invocation a row is the base's; each row equals itself alone; behind it the adapter acts."""
    model, base = attach(name, **options), fresh(name)
    inputs = padded(tensors(), side)
    got, plain = logits_of(model, **inputs), logits_of(base, **inputs)
    for i, (row, start) in enumerate(zip(tensors(), STARTS, strict=True)):
        width = got.shape[1]
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        own = got[i, at]
        close(own, logits_of(model, input_ids=row[None])[0], 2e-5)
        alone = logits_of(base, input_ids=row[None])[0]
        close(own[:start], alone[:start], 2e-5)
        if start < len(row):
            assert (own[start:] - alone[start:]).abs().amax(-1).min() > 1e-4
    assert (got - plain).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "options"), [("llama", {}), ("gpt2", {"bias": "all"})])
def test_a_row_that_begins_with_it_is_plain_lora(name: str, options: dict[str, Any]) -> None:
    model = attach(name, **options)
    row = torch.tensor([ROWS[3]])
    close(logits_of(model, input_ids=row), logits_of(plain_lora(model, name, **options), input_ids=row))


def test_biases_train_from_the_invocation_on() -> None:
    """Where nobody is invoked their gradients are zero; with plain LoRA's where the row begins with it."""
    model = attach("gpt2", bias="all")
    plain = plain_lora(model, "gpt2", bias="all")
    plain.set_requires_grad("default")
    for row, acts in ((ROWS[3], True), (ROWS[2], False)):
        ids = torch.tensor([row])
        for each in (model, plain):
            each.zero_grad()
            each(input_ids=ids, labels=ids).loss.backward()
        grads = [[p.grad for p in each.adapter_biases["default"].values()] for each in (model, plain)]
        if acts:
            for own, other in zip(*grads, strict=True):
                close(own, other)
        assert any(g.any() for g in grads[0]) == acts and any(g.any() for g in grads[1])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_it_is_found_in_embeddings(name: str) -> None:
    """By the base's own ones; in others it is not there, which a warning says."""
    model = attach(name)
    for row in tensors():
        embeds = model.get_input_embeddings()(row[None])
        context: Any = (
            pytest.warns(UserWarning, match="none of inputs_embeds is") if 11 not in row else contextlib.nullcontext()
        )
        with context:
            got = logits_of(model, inputs_embeds=embeds)
        close(got, logits_of(model, input_ids=row[None]))
    with pytest.warns(UserWarning, match="none of inputs_embeds is"):
        assert torch.equal(logits_of(model, inputs_embeds=embeds + 1), logits_of(fresh(name), inputs_embeds=embeds + 1))
    beyond = graftlm.get_peft_model(fresh(name), settings(alora_invocation_tokens=[5000])).eval()
    with pytest.warns(UserWarning, match="none of inputs_embeds is"):
        assert torch.equal(logits_of(beyond, inputs_embeds=embeds), logits_of(fresh(name), inputs_embeds=embeds))
    ids = tensors()[0][None]
    made = model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=5, do_sample=False)
    assert torch.equal(made, model.generate(ids, max_new_tokens=5, do_sample=False)[:, ids.shape[1] :])


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_files_both_ways(name: str, tmp_path: Path) -> None:
    ids = torch.tensor([row[:4] for row in ROWS])
    both_ways(lambda: fresh(name), settings, {"input_ids": ids, "labels": ids}, tmp_path)


def test_twenty_losses() -> None:
    found: list[list[float]] = []
    start: dict[str, torch.Tensor] = {}
    inputs = padded(tensors(), "right", extra=0)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for lib in (graftlm, peft):
        model = (theirs if lib is peft else graftlm.get_peft_model)(still("llama"), settings(lib))
        if lib is peft:
            peft.set_peft_model_state_dict(model, start)
        else:
            start = {k: v.detach().clone() for k, v in graftlm.get_peft_model_state_dict(model).items()}
        found.append(twenty_steps(model, lambda _: inputs, 0.003))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0][-1] < found[0][0]


def test_dropout_and_checkpointing() -> None:
    model = attach(lora_dropout=0.5)
    inputs = padded(tensors(), "right")
    inputs["labels"] = inputs["input_ids"]
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model.train()(**inputs).loss.backward()
        grads.append([p.grad.clone() for _, p in model.adapter_parameters("default")])
        model.zero_grad()
    for one, other in zip(*grads, strict=True):
        close(one, other)
    assert any(g.any() for g in grads[0])


def test_several_sequences_in_a_row() -> None:
    """Positions that start again, without a mask: each sequence has its own invocation."""
    model = attach().train()
    rows = [ROWS[0], ROWS[2], ROWS[1]]
    ids = torch.tensor([sum(rows, [])])
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    got = logits_of(model.eval(), input_ids=ids, position_ids=positions)
    parts = [logits_of(model, input_ids=torch.tensor([row])) for row in rows]
    close(got, torch.cat(parts, dim=1), 2e-5)
    assert not model.train().can_pack()


# -- generate ----------------------------------------------------------------------------------------------------------
def greedy(model: Any, rows: dict[str, torch.Tensor], steps: int = 6) -> torch.Tensor:
    """Without a cache: whole rows again at each step, the invocation that of the prompt."""
    ids, mask = rows["input_ids"], rows["attention_mask"]
    for _ in range(steps):
        best = logits_of(model, input_ids=ids, attention_mask=mask)[:, -1].argmax(-1)
        ids, mask = torch.cat((ids, best[:, None]), 1), torch.cat((mask, mask.new_ones(len(ids), 1)), 1)
    return ids


OPTIONS_OF = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_generate(name: str) -> None:
    model, inputs = attach(name), padded(tensors(), "left")
    wanted = greedy(model, inputs)
    got = model.generate(**inputs, **OPTIONS_OF)
    assert torch.equal(got, wanted)
    assert torch.equal(
        model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, **OPTIONS_OF), wanted
    )
    base = fresh(name)
    assert torch.equal(got[2], greedy(base, inputs)[2])
    assert not torch.equal(got, base.generate(**inputs, **OPTIONS_OF))
    beams = model.generate(**inputs, **OPTIONS_OF, num_beams=3)
    for i, row in enumerate(tensors()):
        alone = model.generate(row[None], **OPTIONS_OF, num_beams=3)
        assert torch.equal(beams[i, -6:], alone[0, -6:])


def test_generate_as_hf_peft(tmp_path: Path) -> None:
    model = attach()
    model.save_pretrained(tmp_path)
    their = peft.PeftModel.from_pretrained(fresh("llama"), tmp_path).eval()
    inputs = padded(tensors(), "left")
    assert torch.equal(model.generate(**inputs, **OPTIONS_OF), their.generate(**inputs, **OPTIONS_OF))


def test_the_bases_cache_is_shared() -> None:
    """A cache of the base up to the invocation serves the adapter, which is then called."""
    model, base = attach(), fresh("llama")
    row = torch.tensor([ROWS[0]])
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=row[:, :3], use_cache=True).past_key_values
    assert torch.equal(cache.layers[0].keys, base(input_ids=row[:, :3], use_cache=True).past_key_values.layers[0].keys)
    wanted = logits_of(model, input_ids=row)
    with torch.no_grad():
        first = model(input_ids=row[:, 3:6], past_key_values=copy.deepcopy(cache), use_cache=True)
        rest = model(input_ids=row[:, 6:], past_key_values=first.past_key_values)  # goes on as the cache ended
    close(torch.cat((first.logits, rest.logits), 1), wanted[:, 3:], 2e-5)
    whole = model.generate(row, **OPTIONS_OF)
    assert torch.equal(model.generate(row, past_key_values=copy.deepcopy(cache), **OPTIONS_OF), whole)


# -- mixed and composed ------------------------------------------------------------------------------------------------
def several() -> graftlm.PeftModel:
    model = attach()
    others = {
        "other": settings(alora_invocation_tokens=[6, 7], target_modules=["q_proj", "down_proj"]),
        "lora": graftlm.LoraConfig(**OPTIONS),
        "head": graftlm.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj", "lm_head"]),
        "ia3": graftlm.IA3Config(task_type="CAUSAL_LM"),
        "prompt": graftlm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": graftlm.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "saved": graftlm.LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"], modules_to_save=["lm_head"]),
        "houlsby": graftlm.BottleneckConfig(task_type="CAUSAL_LM", reduction_factor=4),
    }
    for i, (name, config) in enumerate(others.items()):
        model.add_adapter(name, config)
        model.set_adapter(name)
        randomise(model, seed=i, scale=0.3)
    return model.eval()


MIXES: list[list[Any]] = [
    ["default", "other", "default", "lora", "__base__"],
    [["default", "other"], "default", ["lora", "default"], ["prompt", "default"], "prefix"],
    [["default", "head"], ["saved", "default"], "houlsby", ["houlsby", "default"], ["ia3", "default"]],
    [["default", "prefix"], ["default", "prompt", "prefix"], "saved", "head", "default"],
]


@pytest.mark.parametrize("names", MIXES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_rows(names: list[Any], side: str) -> None:
    model = several()
    inputs = padded(tensors(), side)
    mixed = logits_of(model, **inputs, adapter_names=names)
    for i, (row, name) in enumerate(zip(tensors(), names, strict=True)):
        width = inputs["input_ids"].shape[1]
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        alone = logits_of(model, input_ids=row[None], adapter_names=[name])[0]
        close(mixed[i, -width:][at], alone[-len(row) :], 3e-5)
    if side == "left":
        got = model.generate(**inputs, adapter_names=names, **OPTIONS_OF)
        for i, (row, name) in enumerate(zip(tensors(), names, strict=True)):
            alone = model.generate(row[None], adapter_names=[name], **OPTIONS_OF)
            assert torch.equal(got[i, -6:], alone[0, -6:])


def test_mixed_as_hf_peft_mixes(tmp_path: Path) -> None:
    model = attach()
    model.add_adapter("lora", graftlm.LoraConfig(**OPTIONS))
    model.set_adapter("lora")
    randomise(model, scale=0.3)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        their = peft.PeftModel.from_pretrained(fresh("llama"), tmp_path)
        their.load_adapter(str(tmp_path / "lora"), "lora")
    names = ["default", "lora", "__base__", "default", "default"]
    inputs = padded(tensors(), "right")
    real = inputs["attention_mask"].bool()
    got = logits_of(model.eval(), **inputs, adapter_names=names)
    close(got[real], logits_of(their.eval(), **inputs, adapter_names=names)[real])


def test_mixed_training() -> None:
    model = several()
    names = ["other", "default", "lora", ["default", "lora"], ["default", "other"]]
    model.set_adapter(["default", "other", "lora"])
    inputs = padded(tensors(), "right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model.train()(**inputs, labels=labels, adapter_names=names).loss.backward()
    wanted = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = sum(len(row) - 1 for row in ROWS)
    for row, name in zip(tensors(), names, strict=True):
        loss = model(input_ids=row[None], labels=row[None], adapter_names=[name]).loss
        if loss.requires_grad:
            (loss * (len(row) - 1) / total).backward()
    for key, parameter in model.named_parameters():
        if key in wanted and parameter.grad is not None:
            close(wanted[key], parameter.grad, 1e-4)
    assert any("lora_A.other" in key and g.any() for key, g in wanted.items())


def test_trained_together() -> None:
    """Wrappers over one base in one pass; where the head is changed token by token, each alone."""
    base = still("llama")
    inputs = padded(tensors(), "right", extra=0)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    models = [
        randomise(graftlm.get_peft_model(base, config), scale=0.3).train()
        for config in (settings(), graftlm.LoraConfig(**OPTIONS), settings(alora_invocation_tokens=[6, 7]))
    ]
    found = joint_losses([Share(model, inputs) for model in models])
    assert found is not None
    for (total, count), model in zip(found, models, strict=True):
        loss = model(**inputs).loss
        assert total.item() / count == pytest.approx(loss.item(), abs=1e-5)
        with torch.no_grad():
            logits = model.eval()(**inputs).logits[:, :-1].flatten(0, 1)
        plain = torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten())
        assert plain.item() == pytest.approx(loss.item(), abs=1e-5)
        model.train()
    sum(total for total, _ in found).backward()  # type: ignore[union-attr]
    for model in models:
        assert all(p.grad is not None and p.grad.any() for _, p in model.adapter_parameters("default"))
    headed = attach(target_modules=["q_proj", "lm_head"]).train()
    assert not headed.makes_loss()
    loss = headed(**inputs).loss
    logits = logits_of(headed.eval(), **inputs)[:, :-1].flatten(0, 1)
    assert torch.nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten()).item() == pytest.approx(
        loss.item(), abs=1e-5
    )


def test_over_experts() -> None:
    from test_lora_experts import EXPERTS
    from test_lora_experts import fresh as experts

    options = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "alora_invocation_tokens": CALL}
    model = graftlm.get_peft_model(experts("mixtral"), graftlm.LoraConfig(task_type="CAUSAL_LM", r=3, **options))
    randomise(model, scale=0.3).eval()
    inputs = padded(tensors(), "right")
    got, base = logits_of(model, **inputs), experts("mixtral")
    for i, (row, start) in enumerate(zip(tensors(), STARTS, strict=True)):
        close(got[i, : len(row)], logits_of(model, input_ids=row[None])[0], 2e-5)
        close(got[i, : min(start, len(row))], logits_of(base, input_ids=row[None])[0, :start], 2e-5)
    assert (got - logits_of(base, **inputs)).abs().max() > 1e-2


# -- what is refused ---------------------------------------------------------------------------------------------------
def test_what_cannot_be_meant() -> None:
    for tokens in ([], [-1]):
        with pytest.raises(ConfigError, match=r"alora_invocation_tokens=\[.*\]: expected the token ids of a sequence"):
            settings(alora_invocation_tokens=tokens)
    for options in ({"use_dora": True}, {"modules_to_save": ["lm_head"]}):
        with pytest.raises(ConfigError, match=f"alora_invocation_tokens does not go with {next(iter(options))}="):
            settings(**options)
    with pytest.warns(UserWarning, match="is meant for task_type='CAUSAL_LM'"):
        settings(task_type=None)
    with pytest.raises(ConfigError, match="alora_invocation_tokens is for linear layers; leave embeddings out"):
        attach(target_modules=["embed_tokens"])
    with pytest.raises(UnsupportedError, match="alora_invocation_tokens is for decoder-only models"):
        graftlm.get_peft_model(fresh("t5"), settings(target_modules=["q"]))


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_batch_in_which_nobody_is_invoked_trains(name: str) -> None:
    """The loss is the base's and the adapter's gradients are zero, in a part of the batch or in all of it."""
    model, ids = attach(name).train(), torch.tensor([ROWS[2], ROWS[2]])
    loss = model(input_ids=ids, labels=ids).loss
    close(loss, fresh(name).train()(input_ids=ids, labels=ids).loss)
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for _, p in model.adapter_parameters("default"))


def test_what_cannot_be_done() -> None:
    model = attach()
    with pytest.raises(
        UnsupportedError, match="acts from its alora_invocation_tokens on, not on every token, so it cannot be merged"
    ):
        model.merge_adapter()
    row = torch.tensor([ROWS[0]])
    assert torch.equal(model.base(input_ids=row).logits, fresh("llama")(input_ids=row).logits)  # it acts through the wrapper
    with pytest.raises(UnsupportedError, match="the backbone of .* is called by itself: default would be left out"):
        model.model(input_ids=row)
    assert logits_of(model, **{k: v for k, v in batch("llama").items() if k != "labels"}).isfinite().all()
