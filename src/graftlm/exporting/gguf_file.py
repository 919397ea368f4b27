"""A merged model as a GGUF file, which is read back and compared before it counts as written.

Matrices are F32, F16 or BF16, vectors F32 as everywhere. Reading back (`graftlm.gguf.read`, so transformers' readers)
must give each weight bit by bit as it was rounded, the logits of those weights, and the ids of the tokenizer.
"""

from __future__ import annotations

import copy
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import gguf as reading
from ..errors import CheckpointError, ConfigError, UnsupportedError, nearest
from . import weights
from .vocabulary import PROBES, Vocabulary, vocabulary

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = 1e-4  # of the largest logit: sums in another order


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file, and how well it was read back."""

    path: Path
    dtype: str
    rule: str
    difference: float
    largest: float
    vocabulary: Vocabulary


def write_gguf(model: Any, tokenizer: Any, path: Path, dtype: str = "auto", name: str | None = None) -> Written:
    """Write a plain transformers model and its tokenizer as a GGUF file.

    Args:
        model: of Llama's, Qwen2's, GPT-2's or Bloom's family, without adapters.
        path: the file, which must not exist.
        dtype: of the matrices: float32, float16, bfloat16; "auto" takes the model's.
        name: the model's, in the file.

    Raises:
        UnsupportedError: a model or tokenizer that such a file cannot hold.
        CheckpointError: the file exists, or what was read back is not what was written.
    """
    kind = chosen(model, dtype)
    weights.check(model.config)
    words = vocabulary(tokenizer, model.config.vocab_size)
    if path.exists():
        raise CheckpointError(f"{path} exists; choose another place.")
    fits(model, kind)
    try:
        fill(path, model, words, kind, name or path.stem)
        difference, largest = compared(path, model, tokenizer, kind)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return Written(
        path=path, dtype=str(kind).removeprefix("torch."), rule=words.rule, difference=difference, largest=largest,
        vocabulary=words,
    )  # fmt: skip


def chosen(model: Any, dtype: str) -> torch.dtype:
    """The dtype of the file's matrices."""
    if dtype == "auto":
        return model.dtype if model.dtype in DTYPES.values() else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: expected auto, {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    return DTYPES[dtype]


def fits(model: Any, kind: torch.dtype) -> None:
    """CheckpointError for weights that are no numbers, or too large for the dtype."""
    wrong = [key for key, value in model.state_dict().items() if not value.to(kind).isfinite().all()]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} weights are not finite in {kind} ({', '.join(wrong[:3])}, …). Write bfloat16 or float32, and "
            "look whether the adapter diverged."
        )


def fill(path: Path, model: Any, words: Vocabulary, kind: torch.dtype, name: str) -> None:
    """Metadata, then the weights."""
    import gguf

    family = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[weights.FAMILIES[model.config.model_type]]]
    file = gguf.GGUFWriter(path, family)
    try:
        file.add_name(name)
        file.add_file_type({torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[kind])  # llama.cpp's numbers
        weights.numbers(model.config, file)
        describe(words, model, file)
        for key, value in weights.tensors(model):
            own = kind if value.dim() > 1 else torch.float32
            array, stored = as_array(value, own)
            file.add_tensor(key, array, raw_dtype=stored)
        file.write_header_to_file()
        file.write_kv_data_to_file()
        file.write_tensors_to_file()
    finally:
        file.close()


def describe(words: Vocabulary, model: Any, file: Any) -> None:
    """The tokenizer's part of the metadata."""
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre(words.rule)
    file.add_token_list(words.tokens)
    file.add_token_types(words.types)
    file.add_token_merges(words.merges)
    for key, add in (
        ("bos", file.add_bos_token_id), ("eos", file.add_eos_token_id), ("unk", file.add_unk_token_id),
        ("pad", file.add_pad_token_id),
    ):  # fmt: skip
        if key in words.ids:
            add(words.ids[key])
    for index, add in zip(more_ends(words, model), (file.add_eot_token_id, file.add_eom_token_id), strict=False):
        add(index)
    file.add_add_bos_token(words.adds_bos)
    file.add_add_eos_token(words.adds_eos)
    if words.chat_template:
        file.add_chat_template(words.chat_template)


def more_ends(words: Vocabulary, model: Any) -> list[int]:
    """Tokens that end an answer beside the tokenizer's own last one."""
    ends = getattr(model, "generation_config", None) and model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    found = [i for i in ends if i is not None and i != words.ids.get("eos") and i < len(words.tokens)]
    if len(found) > 2:
        raise UnsupportedError(
            f"The model ends its answers by {len(found) + 1} tokens; a GGUF file holds three. Set fewer in "
            "model.generation_config.eos_token_id."
        )
    return found


def as_array(value: Tensor, kind: torch.dtype) -> tuple[Any, Any]:
    """A tensor as numpy holds it, and what a file calls that."""
    from gguf import GGMLQuantizationType as Stored

    value = value.to(kind).contiguous().cpu()
    if kind is torch.bfloat16:
        return value.view(torch.uint8).numpy(), Stored.BF16
    return value.numpy(), Stored.F16 if kind is torch.float16 else Stored.F32


def compared(path: Path, model: Any, tokenizer: Any, kind: torch.dtype) -> tuple[float, float]:
    """Largest difference of logits between the file and the model with rounded weights, and the largest logit.

    Raises:
        CheckpointError: weights, logits or token ids are not those that were written.
    """
    with tempfile.TemporaryDirectory() as empty:
        again, words = reading.read(path, Path(empty))
    wanted = copy.deepcopy(model).float()
    for value in wanted.state_dict().values():
        value.copy_((value.to(kind) if value.dim() > 1 else value).to(again.dtype))
    again = again.eval().float()
    got = again.state_dict()
    wrong = [k for k, v in wanted.state_dict().items() if k not in got or not torch.equal(got[k], v)]
    if wrong:
        raise CheckpointError(f"{path.name}, read back, has other weights: {', '.join(wrong[:3])}, … ({len(wrong)}).")
    size = min(model.config.vocab_size, len(tokenizer))
    ids = torch.randint(0, size, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one, other = (m.eval()(input_ids=ids).logits for m in (wanted, again))
    difference, largest = (one - other).abs().max().item(), one.abs().max().item()
    if not difference <= TOLERANCE * max(largest, 1.0):
        raise CheckpointError(
            f"{path.name}, read back, gives other logits: up to {difference:.3g} away (largest {largest:.3g})."
        )
    for text in (*PROBES, "".join(tokenizer.all_special_tokens)):
        ours, theirs = (t(text, add_special_tokens=False)["input_ids"] for t in (tokenizer, words))
        if ours != theirs:
            raise CheckpointError(f"{path.name}, read back, makes other tokens of {text!r}: {theirs}, not {ours}.")
    return difference, largest


def size_of(path: str | os.PathLike) -> float:
    """Megabytes."""
    return os.path.getsize(path) / 1e6
