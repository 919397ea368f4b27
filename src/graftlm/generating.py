"""Calls of `generate`, and what is refused before a pass begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .adapters import AdapterSet
from .errors import UnsupportedError
from .mixing import plan_of, with_tasks
from .modes import evaluating
from .passes.inputs import batch_size, rows_of
from .passes.invoked import waits
from .passes.refusals import check_encoded
from .passes.state import Run
from .routing import Plan, running


def generate(host: AdapterSet, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`generate` of the base in evaluation mode, under the active adapters or those that `adapter_names` names, each row
    of its task in `task_ids`."""
    # in training mode activation checkpointing would throw the cache away, and dropout would apply
    with evaluating(host):
        names = kwargs.pop("adapter_names", None)
        if host.plain:
            plan = plan_of(host, names, None if names is None else rows_of((args, kwargs)), None)
            with running(plan):
                return host.base.generate(*args, **kwargs)
        tasks = kwargs.pop("task_ids", None)
        given = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("inputs")
        refuse_chunks(host, kwargs)
        rows = batch_size(kwargs | {"input_ids": kwargs.get("input_ids", given)})
        plan = plan_of(host, names, None if names is None else rows)
        plan = with_tasks(host, plan, tasks, rows) if host.has_tasks else plan
        call = resume(host, plan, kwargs | ({} if given is None else {"input_ids": given}))
        with running(plan), call.going():
            return host.base.generate(*args, **kwargs)


def resume(host: AdapterSet, plan: Plan, options: dict[str, Any]) -> Run:
    """Check what a `generate` goes on from: a cache with virtual tokens or a prefix in it, outputs of the encoder."""
    call = Run()
    if waits(host, plan):
        call.prompt = options.get("input_ids")
    cache, mask, encoded = (options.get(n) for n in ("past_key_values", "attention_mask", "encoder_outputs"))
    count = host.fronts(plan, batch_size(options))[0]
    if encoded is not None and count:  # a mask of ones alone does not come to the model
        check_encoded(encoded, mask, count)
        call.encoded = True
    if not isinstance(cache, Cache) or not cache.get_seq_length() or not any(host.in_front(plan)):
        return call
    if host.entry.facts.encoder_decoder:
        raise UnsupportedError(
            "generate does not go on from past_key_values with a prefix in the decoder; leave past_key_values out."
        )
    names = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")
    whole = {n: options[n] for n in names if isinstance(options.get(n), Tensor)}
    given = whole["inputs_embeds"] if "inputs_embeds" in whole else whole.get("input_ids")
    if "inputs_embeds" in whole:
        whole.pop("input_ids", None)
    if given is not None and (mask is None or mask.shape == given.shape[:2]):  # else they are the new ones alone
        call.resumed = whole
    return call


def refuse_chunks(host: AdapterSet, options: dict[str, Any]) -> None:
    """UnsupportedError for a prefill in chunks, whose first one may hold only padding, with virtual tokens."""
    config = options.get("generation_config") or getattr(host.base, "generation_config", None)
    chunks = options.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
    if chunks and any(host.counts((name,))[0] for name in host.methods):
        raise UnsupportedError("prefill_chunk_size does not go with virtual tokens: leave it out.")


def refuse_half_on_cpu(host: AdapterSet) -> None:
    """UnsupportedError for training in float16 on a CPU, where no gradient scaler keeps small gradients alive."""
    if not (host.training and torch.is_grad_enabled() and host.adapter_device.type == "cpu"):
        return
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.float16:
        raise UnsupportedError(
            "fp16 training on a CPU: there is no gradient scaling, small gradients become zero. Use bf16=True instead "
            "of fp16=True in TrainingArguments (torch.autocast('cpu', torch.bfloat16) in a loop of your own)."
        )
    if host._float_dtype() is torch.float16:
        raise UnsupportedError(
            "The base is in float16, which cannot be trained on a CPU (no gradient scaling). Load it with "
            "dtype=torch.bfloat16 (or float32); a quantised base can also go through "
            "graftlm.prepare_model_for_kbit_training."
        )
