"""TRL's trainers on adapters: under `as_peft` with a configuration or a wrapped model, and a wrapped model alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from datasets import Dataset

import graftlm
from graftlm.bundled import base_path
from graftlm.errors import UnsupportedError

trl = pytest.importorskip("trl", reason="TRL is not installed (pip install graftlm[dev])")

WORDS = ["a good friend", "the old house by the river", "green apples", "we met in the morning and left at night"]
PLAIN: dict[str, Any] = {
    "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "learning_rate": 1e-2, "max_steps": 3,
    "per_device_train_batch_size": 2, "logging_steps": 1, "save_strategy": "no", "seed": 0, "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}  # fmt: skip
METHODS: dict[str, Any] = {
    "lora": lambda lib: lib.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "ia3": lambda lib: lib.IA3Config(task_type="CAUSAL_LM"),
    "prompt": lambda lib: lib.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix": lambda lib: lib.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "bottleneck": lambda lib: lib.BottleneckConfig(task_type="CAUSAL_LM", reduction_factor=4),
}
TEXTS = Dataset.from_dict({"text": WORDS * 2})
PAIRS = Dataset.from_dict({"prompt": WORDS, "chosen": WORDS[::-1], "rejected": WORDS[1:] + WORDS[:1]})
MARKED = Dataset.from_dict({"prompt": WORDS * 2, "completion": WORDS[::-1] * 2, "label": [True, False] * 4})
PROMPTS = Dataset.from_dict({"prompt": WORDS})


def short(completions: list[str], **rest: Any) -> list[float]:
    return [float(len(set(text))) for text in completions]


KINDS: dict[str, tuple[str, Dataset, dict[str, Any]]] = {
    "sft": ("SFT", TEXTS, {"max_length": 16}),
    "sft_packed": ("SFT", TEXTS, {"max_length": 16, "packing": True}),
    "sft_padding_free": ("SFT", TEXTS, {"max_length": None, "padding_free": True}),
    "dpo": ("DPO", PAIRS, {"max_length": 24}),
    "kto": ("KTO", MARKED, {"max_length": 24}),
    "grpo": ("GRPO", PROMPTS, {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}),
    "reward": ("Reward", PAIRS.remove_columns("prompt"), {"max_length": 24}),
}


PACKED, SOFT = ("sft_packed", "sft_padding_free"), ("prompt", "prefix")


def base_of(tiny: Path, kind: str) -> Any:
    cls = t.AutoModelForSequenceClassification if kind == "reward" else t.AutoModelForCausalLM
    torch.manual_seed(0)
    return cls.from_pretrained(tiny, dtype="float32", **({"num_labels": 1} if kind == "reward" else {}))


def config_of(method: str, kind: str, lib: Any = graftlm) -> Any:
    config = METHODS[method](lib)
    if kind == "reward":
        config.task_type = lib.TaskType.SEQ_CLS
    return config


def trainer_of(tiny: Path, folder: Path, kind: str, model: Any, **more: Any) -> Any:
    name, data, options = KINDS[kind]
    args = getattr(trl, f"{name}Config")(output_dir=str(folder), **{**PLAIN, **options, **more.pop("options", {})})
    if kind == "grpo":
        more["reward_funcs"] = short
    if more.pop("evaluates", False):
        more["eval_dataset"] = data
    tokenizer = t.AutoTokenizer.from_pretrained(tiny)
    return getattr(trl, f"{name}Trainer")(model=model, args=args, train_dataset=data, processing_class=tokenizer, **more)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(tiny: Path, folder: Path, kind: str, method: str, wrapped: bool = False, lib: Any = graftlm, **more: Any) -> Any:
    """A trainer after its steps: with a configuration, or with a wrapped model."""
    config, base = config_of(method, kind, lib), base_of(tiny, kind)
    torch.manual_seed(0)
    model = lib.get_peft_model(base, config) if wrapped else base
    trainer = trainer_of(tiny, folder, kind, model, **({} if wrapped else {"peft_config": config}), **more)
    trainer.train()
    return trainer


def check(trainer: Any, tiny: Path, kind: str) -> None:
    """It is ours, it has learned finite numbers, and the base is what it was."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    assert isinstance(model, graftlm.PeftModel)
    assert len(losses(trainer)) == 3 and torch.tensor(losses(trainer)).isfinite().all()
    before = graftlm.get_peft_model(base_of(tiny, kind), model.peft_config["default"])
    moved = [not torch.equal(p, q) for (_, p), (_, q) in zip(
        before.adapter_parameters("default"), model.adapter_parameters("default"), strict=True)]  # fmt: skip
    assert any(moved)
    untouched = base_of(tiny, kind).state_dict()
    kept = graftlm.get_base_model_state_dict(model)
    assert untouched.keys() == kept.keys()
    assert all(torch.equal(v, kept[k]) for k, v in untouched.items())


QUICK = [(kind, "lora") for kind in KINDS if kind not in ("kto", "reward")] + [
    ("sft", method) for method in METHODS if method != "lora"
]
SLOW = [(kind, m) for kind in KINDS for m in METHODS if (kind, m) not in QUICK and not (kind in PACKED and m in SOFT)]


@pytest.mark.parametrize(("kind", "method"), [*QUICK, *(pytest.param(*p, marks=pytest.mark.slow) for p in SLOW)])
def test_trainers_take_a_configuration(as_peft: None, tiny: Path, tmp_path: Path, kind: str, method: str) -> None:
    check(trained(tiny, tmp_path, kind, method), tiny, kind)


@pytest.mark.parametrize("kind", ["sft", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "sft")])
@pytest.mark.parametrize("method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("prompt", "bottleneck"))])
def test_a_wrapped_model_trains_the_same_with_and_without_the_name(
    tiny: Path, tmp_path: Path, kind: str, method: str
) -> None:
    """Without `as_peft` TRL takes the wrapper for any model, and loads the reference model again."""
    if kind in PACKED and method in SOFT:
        pytest.skip("packed rows and soft prompts do not go together")
    alone = trained(tiny, tmp_path / "alone", kind, method, wrapped=True)
    check(alone, tiny, kind)
    graftlm.as_peft()
    try:
        named = trained(tiny, tmp_path / "named", kind, method, wrapped=kind not in ("dpo", "kto", "grpo"))
    finally:
        graftlm.as_peft.undo()
    assert losses(alone) == pytest.approx(losses(named), abs=1e-6)


@pytest.mark.parametrize(
    "kind", ["sft", "dpo", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k not in ("sft", "dpo"))]
)
def test_losses_are_hf_pefts(tiny: Path, tmp_path: Path, kind: str) -> None:
    """From the same adapter; where there is a reference model, it is a copy of that adapter in both."""
    peft = pytest.importorskip("peft", reason="HF PEFT is not installed")
    start = graftlm.get_peft_model(base_of(tiny, kind), config_of("lora", kind))
    with torch.no_grad():
        for _, parameter in start.adapter_parameters("default"):
            parameter.add_(0.05 * torch.randn_like(parameter))
    start.save_pretrained(tmp_path / "start")

    def run(lib: Any, name: str) -> list[float]:
        model = lib.PeftModel.from_pretrained(base_of(tiny, kind), tmp_path / "start", is_trainable=True)
        torch.manual_seed(0)
        trainer = trainer_of(tiny, tmp_path / name, kind, model.train())
        trainer.train()
        return losses(trainer)

    theirs = run(peft, "theirs")
    graftlm.as_peft()
    try:
        ours = run(graftlm, "ours")
    finally:
        graftlm.as_peft.undo()
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_without_padding_is_with_padding(as_peft: None, tiny: Path, tmp_path: Path) -> None:
    padded, free = (trained(tiny, tmp_path / kind, kind, "lora") for kind in ("sft", "sft_padding_free"))
    assert losses(free) == pytest.approx(losses(padded), abs=1e-5)


@pytest.mark.parametrize("method", SOFT)
def test_packed_rows_with_a_soft_prompt_are_refused(as_peft: None, tiny: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(UnsupportedError, match="several sequences packed into one"):
        trained(tiny, tmp_path, "sft_packed", method)


def test_the_reference_is_the_base(as_peft: None, tiny: Path, tmp_path: Path) -> None:
    """DPO's reference log probabilities are those of the base without the adapter."""
    precomputed = {"options": {"precompute_ref_log_probs": True}}
    config = graftlm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with_adapter = trainer_of(tiny, tmp_path / "a", "dpo", base_of(tiny, "dpo"), peft_config=config, **precomputed)
    bare = trainer_of(tiny, tmp_path / "b", "dpo", base_of(tiny, "dpo"), **precomputed)
    for key in ("ref_chosen_logps", "ref_rejected_logps"):
        assert list(with_adapter.train_dataset[key]) == pytest.approx(list(bare.train_dataset[key]), abs=1e-4)


WHOLE = [("sft", method) for method in METHODS] + [(kind, "lora") for kind in KINDS if kind != "sft"]
MERGED = ("lora", "ia3")


@pytest.mark.parametrize(("base_name", "kind", "method"), [
    ("tiny", "sft", "lora"), *(pytest.param("smollm2", *p, marks=pytest.mark.slow) for p in WHOLE)
])  # fmt: skip
def test_train_evaluate_save_resume_merge(
    as_peft: None, tiny: Path, tmp_path: Path, base_name: str, kind: str, method: str
) -> None:
    """Every trainer and method, on a real base too: a run cut in two ends where the whole one does, and is read back."""
    from graftlm.bundled import NAMES

    if base_name != "tiny" and base_name not in NAMES:
        pytest.skip(f"{base_name} is not installed")
    folder = tiny if base_name == "tiny" else Path(base_path(base_name))
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 2e-3}
    config, base = config_of(method, kind), base_of(folder, kind)
    torch.manual_seed(0)
    whole = trainer_of(folder, tmp_path / "whole", kind, base, peft_config=config, options=options, evaluates=True)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    after = whole.evaluate()["eval_loss"]
    assert after < before or kind == "grpo"  # a policy's loss is not what it lowers

    config, base = config_of(method, kind), base_of(folder, kind)
    torch.manual_seed(0)
    resumed = trainer_of(folder, tmp_path / "resumed", kind, base, peft_config=config, options=options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    own = dict(resumed.model.adapter_parameters("default"))
    for key, value in whole.model.adapter_parameters("default"):
        torch.testing.assert_close(own[key], value, atol=1e-6, rtol=1e-5)

    whole.save_model(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    loader = graftlm.AutoPeftModelForSequenceClassification if kind == "reward" else graftlm.AutoPeftModelForCausalLM
    with torch.no_grad():
        expected = whole.model.eval()(input_ids=ids).logits
        loaded = loader.from_pretrained(
            tmp_path / "adapter", dtype="float32", **({"num_labels": 1} if kind == "reward" else {})
        )
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-5)
        if method in MERGED:
            merged = whole.model.merge_and_unload()
            torch.testing.assert_close(merged(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
