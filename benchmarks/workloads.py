"""The documents' workloads: bases of the real shapes with random weights, adapters, batches."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import memory as memory_bench

device = "cpu"  # where models and batches go


def synchronize() -> None:
    """Until a GPU has done what was asked of it, so that clocks measure work."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


@dataclass
class Workload:
    """What a document trains.

    Args:
        base: makes the base model (random weights) in a dtype.
        settings: the adapter's configuration class and fields.
        lengths, labelled: tokens of each row, and how many of them, at its end, have labels (0: all).
        left: padded on the left. pad_to: to this length.
        accumulate: HF PEFT takes the rows one by one.
        plain_adamw: the document's loop makes torch's default AdamW.
    """

    base: Callable[[Any], Any]
    settings: tuple[str, dict]
    lengths: list[int]
    labelled: int = 0
    left: bool = False
    pad_to: int = 0
    accumulate: bool = False
    plain_adamw: bool = False
    quantized: str | None = None
    targets: dict = field(default_factory=dict)


def bloom(hidden: int, layers: int, vocabulary: int) -> Callable[[Any], Any]:
    def make(dtype: Any) -> Any:
        from transformers import BloomConfig, BloomForCausalLM

        config = BloomConfig(vocab_size=vocabulary, hidden_size=hidden, n_layer=layers, n_head=16)
        return in_dtype(dtype, lambda: BloomForCausalLM(config))

    return make


def opt(dtype: Any) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=50272, hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32,
        word_embed_proj_dim=2048,
    )  # fmt: skip
    return in_dtype(dtype, lambda: OPTForCausalLM(config))


def glm(dtype: Any) -> Any:
    from transformers import GlmForCausalLM

    return in_dtype(dtype, lambda: GlmForCausalLM(memory_bench.config("glm-1b")))


def smollm2(dtype: Any) -> Any:
    """SmolLM2-135M's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    return in_dtype(dtype, lambda: LlamaForCausalLM(config))


def in_dtype(dtype: Any, make: Callable[[], Any]) -> Any:
    """A model with random weights: a million normal numbers over and over, for drawing a billion takes a minute."""
    import torch

    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model = make()
    finally:
        torch.set_default_dtype(torch.float32)
    buffers = dict(fresh_buffers(model))
    model.to_empty(device="cpu")
    numbers = (torch.randn(2**20 + 1, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.data.fill_(0)
            continue
        flat = parameter.data.view(-1)
        for start in range(0, len(flat), len(numbers)):
            part = flat[start : start + len(numbers)]
            part.copy_(numbers[: len(part)])
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            module.weight.data.fill_(1)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    model.tie_weights()
    return model


def fresh_buffers(model: Any) -> Iterator[tuple[str, Any]]:
    """Buffers (rotary frequencies) of a model on the meta device, made anew from its configuration."""
    for path, module in model.named_modules():
        names = [n for n, _ in module.named_buffers(recurse=False)]
        fresh = type(module)(config=model.config) if names else None
        yield from ((f"{path}.{n}", getattr(fresh, n)) for n in names)


def uniform(low: int, high: int, rows: int, seed: int) -> list[int]:
    return [random.Random(seed * 1000 + i).randint(low, high) for i in range(rows)]


P_TUNING = {"num_virtual_tokens": 10}
LORA = {"r": 8, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": ["q_proj", "k_proj", "v_proj", "out_proj"]}
QLORA = {"r": 4, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": ["q_proj", "k_proj", "v_proj"]}
EVERYWHERE = {"r": 8, "target_modules": "all-linear"}
WORKLOADS = {
    "prefix": Workload(
        bloom(1024, 24, 250880), ("PrefixTuningConfig", {"num_virtual_tokens": 30, "prefix_projection": True}),
        uniform(20, 60, 8, 1), labelled=3, left=True, pad_to=64, plain_adamw=True,
    ),
    "prompt": Workload(
        bloom(1024, 24, 250880), ("PromptTuningConfig", {"num_virtual_tokens": 4}), uniform(60, 180, 8, 2), plain_adamw=True
    ),
    "ptuning": Workload(bloom(2048, 24, 46145), ("PromptEncoderConfig", P_TUNING), [200], labelled=120),
    "ptuning-lstm": Workload(
        bloom(2048, 24, 46145),
        ("PromptEncoderConfig", {**P_TUNING, "encoder_reparameterization_type": "LSTM", "encoder_dropout": 0.1}),
        [200], labelled=120,
    ),
    "accumulation": Workload(
        bloom(2048, 24, 46145), ("PromptEncoderConfig", P_TUNING), uniform(100, 200, 8, 3), labelled=60, accumulate=True
    ),
    "lora": Workload(opt, ("LoraConfig", LORA), uniform(20, 60, 4, 4)),
    "smollm2": Workload(smollm2, ("LoraConfig", EVERYWHERE), [40] * 4),
    "smollm2-qlora": Workload(smollm2, ("LoraConfig", EVERYWHERE), [40] * 4, quantized="nf4"),
    "qlora": Workload(glm, ("LoraConfig", QLORA), uniform(60, 200, 6, 5), quantized="nf4"),
}  # fmt: skip


def batch(work: Workload, vocabulary: int) -> dict[str, Any]:
    """A padded batch: input_ids, attention_mask, labels [rows, longest]."""
    import torch

    torch.manual_seed(1)
    width = work.pad_to or max(work.lengths)
    ids = torch.full((len(work.lengths), width), 3)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, length in enumerate(work.lengths):
        end = width if work.left else length
        ids[i, end - length : end] = torch.randint(10, vocabulary, (length,))
        mask[i, end - length : end] = 1
        count = work.labelled or length
        labels[i, end - count : end] = ids[i, end - count : end]
    return {k: v.to(device) for k, v in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}


def load(work: Workload, dtype: Any, folder: str | None) -> Any:
    """The base: made, or, quantised, loaded from a checkpoint in `folder`."""
    import torch

    torch.manual_seed(0)
    if work.quantized is None:
        return work.base(dtype).to(device)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=settings, device_map=device)


def wrap(library: Any, base: Any, work: Workload) -> Any:
    kind, settings = work.settings
    if work.quantized:
        base = library.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    task = "SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM"
    return library.get_peft_model(base, getattr(library, kind)(task_type=task, **settings)).to(device).train()


def sharing(base: Any) -> Any:
    """A second model over the same weights."""
    return copy.deepcopy(base, {id(t): t for t in [*base.parameters(), *base.buffers()]})
