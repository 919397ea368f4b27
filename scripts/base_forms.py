"""What holding a base in fewer bits costs: loss on the bundled English texts in bf16, int8 and nf4 (docs/smollm2.md).

python scripts/base_forms.py smollm2
"""

from __future__ import annotations

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graftlm import bundled
from graftlm.data import load_data
from graftlm.inference.text import encode
from graftlm.training import resolve_base

TEXTS = {"tweets": "Tweet text", "prompts": "prompt", "quotes": "quote"}
FORMS: tuple[tuple[str, str, str | None], ...] = (
    ("fp32", "fp32", None), ("bf16", "bf16", None), ("int8", "bf16", "int8"), ("nf4", "bf16", "nf4"),
)  # fmt: skip
ROWS = 120  # of each data set
BATCH = 8


def loss_sum(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[float, int]:
    """Summed loss and number of the tokens that have one before them; logits [B, T, V], ids and mask [B, T]."""
    counted = (mask[:, 1:] * mask[:, :-1]).bool()
    loss = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return loss[counted].sum().item(), int(counted.sum())


@torch.inference_mode()
def mean_loss(model, tokenizer, texts: list[str]) -> tuple[float, int]:
    total, count = 0.0, 0
    for start in range(0, len(texts), BATCH):
        ids, mask = encode(tokenizer, texts[start : start + BATCH], model.device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        part, number = loss_sum(model(input_ids=ids, attention_mask=mask, position_ids=positions).logits, ids, mask)
        total, count = total + part, count + number
    return total / count, count


def rounding(path: str) -> float:
    """Rounding error of a file's Q4_1 matrices, root mean square over that of the weights.

    A block of 32 weights has 16 levels, `step` apart; evenly spread errors have a mean square of step² / 12.
    """
    errors, weights = 0.0, 0.0
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.tensor_type is gguf.GGMLQuantizationType.Q4_1:
            steps = tensor.data.reshape(-1, 20)[:, :2].copy().view(np.float16).astype(np.float64)  # [blocks, 1]
            errors += 32 * (steps**2).sum() / 12
            weights += (gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64) ** 2).sum()
    return (errors / weights) ** 0.5


def main(base: str = "smollm2") -> None:
    print(f"rounding error of the Q4_1 matrices: {rounding(str(bundled.PACKAGED[base].find())):.1%} of the weights (rms)")
    texts = {}
    for name, column in TEXTS.items():
        splits = load_data(name)
        rows = splits[next((s for s in ("test", "validation") if s in splits), "train")]
        texts[name] = [str(t) for t in rows[column][:ROWS]]
    print("| form | bytes of the base |", " | ".join(TEXTS), "|\n|---|---:|", "---:|" * len(TEXTS), sep="")
    for form, dtype, scheme in FORMS:
        model, tokenizer = resolve_base(base, dtype=dtype, quantization=scheme)
        found = {name: mean_loss(model, tokenizer, t) for name, t in texts.items()}
        losses = " | ".join(f"{loss:.4f}" for loss, _ in found.values())
        print(f"| {form} | {model.get_memory_footprint() / 1e6:.0f} MB | {losses} |", flush=True)
    print("tokens:", {name: count for name, (_, count) in found.items()})


if __name__ == "__main__":
    main()
