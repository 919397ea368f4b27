"""Memory of evaluation and of generated samples, which a run makes before, in and after training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import GraftError, PlanError
from ..training.evaluation import LABEL_FORMAT, places_kept
from ..training.measuring import SAMPLE_TOKENS, SAMPLES
from ..training.schema import Recipe
from .allocators import CudaCache, play, within
from .glibc import Heap
from .rows import Rows, tensors
from .skeleton import Skeleton
from .step import Heights, of_all_blocks
from .tracing import Account


def evaluation_memory(recipe: Recipe, rows: Rows, whole: Skeleton, gpu: bool = False) -> int:
    """Bytes above the weights at the highest moment of an evaluation: of its longest batch, or of the generated samples.

    Raises:
        PlanError: this model cannot be run over fake tensors.
    """
    if not rows.held.count:
        return 0
    batch, told = longest(recipe, rows), rows.format == LABEL_FORMAT
    try:
        found = of_all_blocks(recipe, whole, lambda found: passed(found, batch, gpu, told), 2, 1)
    except GraftError:
        raise
    except Exception as error:
        raise PlanError(
            f"the memory of an evaluation of {whole.config.model_type} cannot be planned: {type(error).__name__}: {error}"
        ) from error
    return max(round(found.held if gpu else found.share * found.highest), generation_memory(recipe, rows, whole))


def longest(recipe: Recipe, rows: Rows) -> dict[str, Tensor]:
    """The longest batch of the rows that are evaluated."""
    return tensors(rows.collator(rows.held.longest(recipe.training.eval_batch_size)))


def passed(found: Skeleton, batch: dict[str, Tensor], gpu: bool, told: bool = False) -> Heights:
    """A pass without gradients, with its loss as `training.evaluation` makes it."""
    model, account = found.model.eval(), Account()
    account.take(model)
    labels = batch["labels"] if found.seq2seq else batch["labels"][:, 1:]
    places = places_kept(model, labels, told)
    with account, torch.no_grad():
        weights, before = account.live, len(account.events)
        if places is not None:
            given = {k: v for k, v in batch.items() if k != "labels"}
            logits = model(**given, logits_to_keep=places).logits
            F.cross_entropy(logits.flatten(0, 1).float(), labels[:, places].flatten(), reduction="sum")
            del logits
        else:
            model(**batch)
    events, highest = within(account.events[before:]), account.highest - weights
    held = play(CudaCache() if gpu else Heap(), events)
    return Heights(0, highest, 0, held, share=held / max(highest, 1))


def generation_memory(recipe: Recipe, rows: Rows, whole: Skeleton) -> int:
    """Bytes of the keys and values of a batch of answers, and of two steps' logits in fp32: where there are prompts."""
    if not rows.prompts:
        return 0
    config, width = whole.config, cache_width(whole.config)
    if rows.format == LABEL_FORMAT:
        count, new = min(recipe.training.eval_batch_size, rows.held.count), 16
    else:
        count, new = min(SAMPLES, rows.held.count), SAMPLE_TOKENS
    length = max(rows.held.lengths) + new
    return count * (length * width * whole.dtype.itemsize + 2 * config.vocab_size * 4)


def cache_width(config: Any) -> int:
    """Numbers that the cache holds of a token, over all layers."""

    def first(*names: str) -> int:
        return next((v for n in names if isinstance(v := getattr(config, n, None), int)), 0)

    heads = first("num_attention_heads", "n_head", "num_heads")
    size = first("head_dim", "d_kv", "kv_channels") or first("hidden_size", "n_embd", "d_model") // max(heads, 1)
    shared = first("num_key_value_heads", "multi_query_group_num") or heads
    return 2 * first("num_hidden_layers", "num_layers", "n_layer") * shared * size
