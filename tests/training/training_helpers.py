"""What the training tests share: tiny models with adapters, data of fixed tensors, a tokenizer without files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers as t
from families import SEQ2SEQ, VOCAB, build, task
from torch import nn

import graftlm

torch.set_num_threads(1)
PLAIN: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True}

CONFIGS: dict[str, Any] = {
    "lora": lambda lib, n: lib.LoraConfig(task_type=task(n), r=4, lora_alpha=8),
    "lora_dropout": lambda lib, n: lib.LoraConfig(task_type=task(n), r=4, lora_dropout=0.3),
    "prompt": lambda lib, n: lib.PromptTuningConfig(task_type=task(n), num_virtual_tokens=3),
    "p_tuning_mlp": lambda lib, n: lib.PromptEncoderConfig(task_type=task(n), num_virtual_tokens=3, encoder_hidden_size=12),
    "p_tuning_lstm": lambda lib, n: lib.PromptEncoderConfig(
        task_type=task(n), num_virtual_tokens=3, encoder_hidden_size=12, encoder_reparameterization_type="LSTM"
    ),
    "p_tuning_lstm_dropout": lambda lib, n: lib.PromptEncoderConfig(
        task_type=task(n), num_virtual_tokens=3, encoder_hidden_size=12, encoder_reparameterization_type="LSTM",
        encoder_dropout=0.3,
    ),
    "prefix": lambda lib, n: lib.PrefixTuningConfig(task_type=task(n), num_virtual_tokens=3),
    "prefix_projection": lambda lib, n: lib.PrefixTuningConfig(
        task_type=task(n), num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=12
    ),
    "bottleneck": lambda lib, n: lib.BottleneckConfig(task_type=task(n), reduction_factor=4),
}  # fmt: skip


def wrapped(method: str, family: str = "bloom", lib: Any = graftlm, seed: int = 3) -> Any:
    """A tiny model with a fresh adapter; the same call gives the same values."""
    base = build(family)
    torch.manual_seed(seed)
    return lib.get_peft_model(base, CONFIGS[method](lib, family))


def examples(count: int = 10, family: str = "bloom", seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Rows of one length, the first two labels masked."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = torch.randint(3, VOCAB, (8,), generator=generator)
        labels = torch.randint(3, VOCAB, (6,), generator=generator) if family in SEQ2SEQ else ids.clone()
        labels[:2] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


def uneven(count: int = 7, seed: int = 4) -> list[dict[str, torch.Tensor]]:
    """Causal rows, right-padded, with different numbers of labelled tokens."""
    rows = examples(count, seed=seed)
    for i, row in enumerate(rows):
        keep = 3 + i % 5
        row["attention_mask"][keep:] = 0
        row["labels"][keep:] = -100
    return rows


def arguments(folder: str | os.PathLike, **changes: Any) -> t.TrainingArguments:
    """Six steps (two epochs of ten rows by four), a checkpoint every step, all losses logged."""
    values: dict[str, Any] = PLAIN | {
        "output_dir": str(folder), "num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "steps", "save_steps": 1, "seed": 7,
    }  # fmt: skip
    return t.TrainingArguments(**(values | changes))


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(trainer: t.Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Kill(t.TrainerCallback):
    """Ends the process's training without any clean-up after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("killed")


WORDS = [
    "Tweet",
    "text",
    "Label",
    ":",
    "good",
    "bad",
    "late",
    "again",
    "great",
    "thanks",
    "the",
    "train",
    "was",
    "yes",
    "no",
]


def word_tokenizer() -> t.PreTrainedTokenizerFast:
    """One token a word, out of `WORDS` and enough fillers for the tiny models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS]
    words += [f"w{i}" for i in range(VOCAB - len(words))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def save_base(folder: Path, family: str = "bloom", **overrides: object) -> Path:
    """A tiny base model directory with its tokenizer."""
    build(family, **overrides).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def save_tweets(folder: Path, train: int = 12, test: int = 6) -> Path:
    """Labelled tweets as csv files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("test", test)):
        lines = ["Tweet text,text_label"]
        for i in range(count):
            lines.append("the train was late again,bad" if i % 2 else "great train thanks,good")
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


# What recipes of these methods need on tiny bases, or at all.
NEEDED: dict[str, dict[str, Any]] = {"miss": {"r": 4}, "trainable-tokens": {"token_indices": [5, 6, 7, 8, 9]}}
