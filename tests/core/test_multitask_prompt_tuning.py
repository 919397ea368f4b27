"""Multitask Prompt Tuning: HF PEFT's files, logits and losses; rows of different tasks, packed, generated; start values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import ALL, CAUSAL, SEQ2SEQ, batch
from helpers import attach, cases, close, config, fresh, logits_of, padded, randomise, rows, still, twenty_steps, unpacked
from safetensors.torch import load_file
from test_parity import both_ways, theirs
from test_quantized import folders, load  # noqa: F401  (a fixture)

import graftlm
from graftlm.errors import CheckpointError, ConfigError, UnsupportedError
from graftlm.joint import joinable
from graftlm.passes.served import Served

TASKS = torch.tensor([2, 0, 1])


# -- beside HF PEFT ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "method"), cases(ALL, ["multitask"], lambda n, m: n in ("bloom", "gpt2", "llama", "t5")))
@pytest.mark.parametrize("mixed", [True, False])
def test_files_both_ways(name: str, method: str, mixed: bool, tmp_path: Path) -> None:
    inputs = batch(name) | {"task_ids": TASKS if mixed else torch.tensor([1, 1, 1])}

    def base() -> Any:
        model = fresh(name)
        plain = model.forward

        def forward(*args: Any, task_ids: Any = None, **kwargs: Any) -> Any:
            return plain(*args, **kwargs)

        forward.__signature__ = __import__("inspect").signature(plain)  # type: ignore[attr-defined]
        model.forward = forward
        return model

    both_ways(base, lambda lib: config(method, name, lib), inputs, tmp_path)


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_twenty_losses(name: str) -> None:
    losses: dict[str, list[float]] = {}
    for library in (graftlm, peft):
        torch.manual_seed(3)
        model = (theirs if library is peft else graftlm.get_peft_model)(still(name), config("multitask", name, library))
        inputs = lambda step: batch(name, seed=step % 4) | {"task_ids": TASKS.roll(step)}  # noqa: E731
        losses[library.__name__] = twenty_steps(model, inputs, 0.1)
    assert losses["graftlm"] == pytest.approx(losses["peft"], abs=1e-4)
    assert sum(losses["graftlm"][-4:]) < sum(losses["graftlm"][:4])


def source(name: str, folder: Path) -> str:
    """The file of an adapter of three tasks."""
    model = attach(name, "multitask")
    model.save_pretrained(folder)
    return str(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("init", ["EXACT_SOURCE_TASK", "AVERAGE_SOURCE_TASKS", "ONLY_SOURCE_SHARED"])
def test_starts_from_a_source(name: str, init: str, tmp_path: Path) -> None:
    path = source(name, tmp_path / "source")
    made = []
    for library in (graftlm, peft):
        settings = library.MultitaskPromptTuningConfig(
            task_type=config("multitask", name).task_type, num_virtual_tokens=3, num_ranks=2, prompt_tuning_init=init,
            prompt_tuning_init_state_dict_path=path, prompt_tuning_init_task=1,
        )  # fmt: skip
        torch.manual_seed(4)
        model = (theirs if library is peft else graftlm.get_peft_model)(fresh(name), settings)
        made.append(model)
    mine, their = (peft_state(model) for model in made)
    assert mine.keys() == their.keys()
    for key, value in their.items():
        close(mine[key], value, 0 if init != "AVERAGE_SOURCE_TASKS" else 1e-6)
    made[0].save_pretrained(tmp_path / "mine")
    (tmp_path / "source" / "adapter_model.safetensors").unlink()
    again = graftlm.PeftModel.from_pretrained(fresh(name), tmp_path / "mine")  # the source is not needed any more
    close(logits_of(again, **batch(name)), logits_of(made[0].eval(), **batch(name)))


def peft_state(model: Any) -> dict[str, torch.Tensor]:
    library = graftlm if isinstance(model, graftlm.PeftModel) else peft
    return library.get_peft_model_state_dict(model)


def test_starts_from_text() -> None:
    from graftlm.bundled import base_path

    made = []
    for library in (graftlm, peft):
        settings = library.MultitaskPromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="TEXT", prompt_tuning_init_text="a b c",
            tokenizer_name_or_path=str(base_path()),
        )  # fmt: skip
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(base_path())
        torch.manual_seed(4)
        made.append(peft_state((theirs if library is peft else graftlm.get_peft_model)(base, settings)))
    for key, value in made[1].items():
        close(made[0][key], value)


# -- rows of tasks -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "t5", "bart"])
def test_rows_of_tasks_equal_themselves_alone(name: str) -> None:
    """Beside rows of other methods, of compositions, and of the base; left-padded; generated."""
    model = attach(name, "multitask")
    for i, method in enumerate(("lora_default", "prompt", "prefix")):
        model.add_adapter(method, config(method, name))
        model.set_adapter(method)
        randomise(model, seed=i, scale=0.3)
    names = ["default", "default", "prompt", ["lora_default", "default"], "__base__", "default", ["prefix", "default"]]
    tasks = torch.tensor([2, 0, 1, 0, 2, 2, 1])
    if name == "t5":
        with pytest.raises(UnsupportedError, match="would stand between prefix and tokens"):
            model(**batch(name), adapter_names=["prefix", "default", ["prefix", "default"]], task_ids=[0, 0, 0])
        names[-1] = "__base__"
    inputs: dict[str, Any] = padded(rows(name, (7, 4, 5, 6, 3, 8, 5)), "right" if name in SEQ2SEQ else "left")
    if name in SEQ2SEQ:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :3].clamp_min(3)
    model.eval()
    got = logits_of(model, **inputs, adapter_names=names, task_ids=tasks)
    for i, row in enumerate(names):
        own = {k: v[i : i + 1] for k, v in inputs.items()}
        wanted = logits_of(model, **own, adapter_names=[row], task_ids=tasks[i : i + 1])
        close(got[i, -3:], wanted[0, -3:], 3e-5)
    inputs.pop("decoder_input_ids", None)
    made = model.generate(**inputs, adapter_names=names, task_ids=tasks, max_new_tokens=4, do_sample=False, num_beams=2)
    for i, row in enumerate(names):
        own = {k: v[i : i + 1] for k, v in inputs.items()}
        alone = model.generate(
            **own, adapter_names=[row], task_ids=[int(tasks[i])], max_new_tokens=4, do_sample=False, num_beams=2
        )
        assert torch.equal(made[i, : alone.shape[1]], alone[0])


def test_one_task_for_all_and_the_tasks_apart() -> None:
    model, inputs = attach("llama", "multitask"), batch("llama")
    apart = [logits_of(model, **inputs, task_ids=[k] * 3) for k in range(3)]
    assert all((a - b).abs().max() > 1e-3 for a, b in ((apart[0], apart[1]), (apart[1], apart[2])))
    mixed = logits_of(model, **inputs, task_ids=TASKS)
    for row, task in enumerate(TASKS.tolist()):
        close(mixed[row], apart[task][row])
    with model.disable_adapter():
        close(logits_of(model, **inputs, task_ids=TASKS), logits_of(fresh("llama"), **inputs), 0)
    model.add_adapter("lora", config("lora", "llama"))
    model.set_adapter("lora")
    logits_of(model, **inputs)  # tasks have no meaning here


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packed_training_gives_the_padded_gradients(name: str) -> None:
    model = attach(name, ("multitask", "lora"), base=still(name))
    inputs = batch(name, rows=4)
    inputs["attention_mask"][1, 5:] = 0
    inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    found = []
    for lean in (True, False):
        model.lean = lean
        model.zero_grad()
        model.train()(**inputs, task_ids=torch.tensor([1, 0, 1, 1])).loss.backward()
        found.append([p.grad.clone() for n in model.methods for _, p in model.adapter_parameters(n)])
    for mine, plain in zip(*found, strict=True):
        close(mine, plain)
    columns = dict(model.adapter_parameters("default"))["prompt_encoder.default.prefix_task_cols"].grad
    assert columns[2].abs().sum() == 0 and columns[:2].abs().sum() > 0


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_on_a_quantised_base(folders, scheme):  # noqa: F811
    model = attach("llama", "multitask", base=load(folders["llama"], scheme))
    inputs = batch("llama") | {"task_ids": TASKS}
    their = theirs(unpacked(load(folders["llama"], scheme)), config("multitask", "llama", peft)).eval()
    peft.set_peft_model_state_dict(their, graftlm.get_peft_model_state_dict(model))
    close(logits_of(model, **inputs), logits_of(their, **inputs), 1e-4)
    model.train()(**inputs).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for _, p in model.adapter_parameters("default"))


def test_a_cache_belongs_to_its_task() -> None:
    model, inputs = attach("llama", "multitask"), batch("llama")
    inputs.pop("labels")
    with torch.no_grad():
        cache = model(**inputs, task_ids=TASKS, use_cache=True).past_key_values
    step = {"input_ids": inputs["input_ids"][:, :1], "attention_mask": torch.ones(3, 8, dtype=torch.long)}
    with pytest.raises(UnsupportedError, match=r"default \(task 2\), default \(task 0\)"):
        model(**step, past_key_values=cache, task_ids=TASKS.flip(0))
    model(**step, past_key_values=cache, task_ids=TASKS)


def test_a_trainer_keeps_the_column(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    inputs = batch("llama", rows=8)
    columns = {k: v.tolist() for k, v in inputs.items()} | {"task_ids": [0, 1, 2, 0, 1, 2, 0, 1]}
    for kind in (Trainer, graftlm.Trainer):
        model = graftlm.get_peft_model(still("llama"), config("multitask", "llama"))
        arguments = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=True)
        start = load_state(model)
        kind(model, arguments, train_dataset=Dataset.from_dict(columns), data_collator=default_data_collator).train()
        assert all(not torch.equal(start[k], v) for k, v in load_state(model).items())


def load_state(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in graftlm.get_peft_model_state_dict(model).items()}


# -- what cannot be meant ----------------------------------------------------------------------------------------------
def test_errors(tmp_path: Path) -> None:
    model, inputs = attach("llama", "multitask"), batch("llama")
    for wrong in (None, [0, 1], [[0], [1], [2]], torch.tensor([0.0, 1.0, 2.0]), 1):
        with pytest.raises(ConfigError, match="adapter 'default' has 3 tasks, so a call needs the number of each row's"):
            model(**inputs, task_ids=wrong)
    for wrong in (3, -1):
        with pytest.raises(ConfigError, match=f"task_ids, row 1: {wrong}; adapter 'default' has tasks 0 to 2"):
            model(**inputs, task_ids=[0, wrong, 1])
    with pytest.raises(ConfigError, match="has 3 tasks"):
        model.generate(inputs["input_ids"])
    with pytest.raises(UnsupportedError, match="several tasks"):
        Served(model).admit(("default",))
    assert not joinable(model, batch("llama"))
    make = graftlm.MultitaskPromptTuningConfig
    with pytest.raises(ConfigError, match="prompt_tuning_init=EXACT_SOURCE_TASK needs prompt_tuning_init_state_dict_path"):
        make(prompt_tuning_init="EXACT_SOURCE_TASK")
    with pytest.raises(ConfigError, match="a pickle is not read"):
        make(prompt_tuning_init="ONLY_SOURCE_SHARED", prompt_tuning_init_state_dict_path="a.bin")
    with pytest.raises(ConfigError, match="starts one task, and num_tasks=2"):
        make(prompt_tuning_init="AVERAGE_SOURCE_TASKS", prompt_tuning_init_state_dict_path="a.safetensors", num_tasks=2)
    path = source("llama", tmp_path)
    good: dict[str, Any] = {"num_virtual_tokens": 3, "num_ranks": 2, "prompt_tuning_init": "EXACT_SOURCE_TASK"}
    good |= {"prompt_tuning_init_state_dict_path": path}
    for options, error, text in (
        ({"prompt_tuning_init_task": 3}, ConfigError, "has tasks 0 to 2"),
        ({"num_ranks": 1}, ConfigError, r"prefix_task_cols is \(1, 3, 2\), expected \(1, 3, 1\)"),
        ({"prompt_tuning_init_state_dict_path": str(tmp_path / "none.safetensors")}, CheckpointError, "cannot be read"),
    ):
        with pytest.raises(error, match=text):
            graftlm.get_peft_model(fresh("llama"), make(**good | options))
    attach("llama", "prompt").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no 'prefix_task_cols'"):
        graftlm.get_peft_model(fresh("llama"), make(**good))


def test_one_task_needs_no_ids() -> None:
    model = graftlm.get_peft_model(fresh("llama"), graftlm.MultitaskPromptTuningConfig(task_type="CAUSAL_LM"))
    close(logits_of(model, **batch("llama")), logits_of(model, **batch("llama"), task_ids=[0, 0, 0]), 0)


def test_the_file(tmp_path: Path) -> None:
    shapes = {k: tuple(v.shape) for k, v in load_file(source("t5", tmp_path)).items()}
    assert shapes == {"prefix_task_cols": (3, 6, 2), "prefix_task_rows": (3, 2, 32), "prompt_embeddings": (6, 32)}
    assert "llama" in CAUSAL
