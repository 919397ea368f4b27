"""What holding a base in fewer bits costs: loss on the bundled English texts in bf16, int8 and nf4 (docs/smollm2.md).

python scripts/base_forms.py smollm2
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

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


def main(base: str) -> None:
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
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
