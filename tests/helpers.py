"""What the tests of the core share: fresh copies of tiny models, configurations by method, padded batches."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import CAUSAL, ENCODERS, SEQ2SEQ, VOCAB, build, task
from torch import Tensor, nn

import graftlm
from graftlm.kernels import varlen

EMBEDDINGS = {
    "bloom": "word_embeddings", "opt": "embed_tokens", "gpt2": "wte", "gpt_neox": "embed_in", "falcon": "word_embeddings",
    "bert": "word_embeddings", "roberta": "word_embeddings", "chatglm": "word_embeddings",
}  # fmt: skip
HEADS = {"bert": "classifier", "roberta": "classifier", "chatglm": "output_layer"}
TARGETS = {"glm": ["q_proj", "v_proj"], "glm4": ["q_proj", "v_proj"], "phi3": ["qkv_proj"]}  # not in HF PEFT's table
IA3 = {n: {"target_modules": [*names, "down_proj"], "feedforward_modules": ["down_proj"]} for n, names in TARGETS.items()}
IA3["chatglm"] = {"target_modules": ["query_key_value", "dense_4h_to_h"], "feedforward_modules": ["dense_4h_to_h"]}
_LLAMA = ["input_layernorm", "post_attention_layernorm", "norm"]
_NORMS = {
    "opt": ["self_attn_layer_norm", "final_layer_norm"], "glm": _LLAMA, "glm4": [*_LLAMA, "post_mlp_layernorm",
    "post_self_attn_layernorm"], "chatglm": [*_LLAMA[:2], "final_layernorm"], "phi3": _LLAMA,
    "gpt_neox": [*_LLAMA[:2], "final_layer_norm"], "bert": ["LayerNorm"], "roberta": ["LayerNorm"],
}  # fmt: skip
LN = {n: {"target_modules": names} for n, names in _NORMS.items()}  # not in HF PEFT's table


@functools.cache
def _built(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):  # what is drawn next does not depend on who was first to ask for it
        return build(name, seed)


def fresh(name: str, seed: int = 0) -> nn.Module:
    """A tiny model of a family; every call gives a copy with the same weights."""
    return copy.deepcopy(_built(name, seed))


def still(name: str, seed: int = 0) -> nn.Module:
    """The same without dropout anywhere, for comparing passes in training mode."""
    model = fresh(name, seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key in ("dropout", "attention_dropout", "activation_dropout", "layerdrop"):
            if isinstance(module.__dict__.get(key), float):
                setattr(module, key, 0.0)
    return model


def embedding_name(name: str) -> str:
    """Last part of the input embedding's module name."""
    return EMBEDDINGS.get(name, "embed_tokens")


def head_name(name: str) -> str:
    """Last part of the output head's module name."""
    return HEADS.get(name, "lm_head")


def _lora(lib: Any, name: str, **options: Any) -> Any:
    return lib.LoraConfig(**{"task_type": task(name), "r": 4, "target_modules": TARGETS.get(name)} | options)


def _prefix(lib: Any, name: str, **options: Any) -> Any:
    """HF PEFT looks for `num_key_value_heads` in the configuration's dict, and ChatGLM's has another name for it."""
    sizes = {"token_dim": 16, "num_attention_heads": 2} if name == "chatglm" and lib is not graftlm else {}
    return lib.PrefixTuningConfig(task_type=task(name), num_virtual_tokens=3, **sizes, **options)


# Each builds the same configuration from either library: `lib` is graftlm or peft.
CONFIGS: dict[str, Any] = {
    "lora": lambda lib, n: lib.LoraConfig(task_type=task(n), r=4, lora_alpha=8, target_modules="all-linear"),
    "lora_default": lambda lib, n: lib.LoraConfig(task_type=task(n), target_modules=TARGETS.get(n)),
    "dora": lambda lib, n: _lora(lib, n, target_modules="all-linear", use_dora=True),
    "rslora": lambda lib, n: _lora(lib, n, target_modules="all-linear", use_rslora=True),
    "patterns": lambda lib, n: lib.LoraConfig(
        task_type=task(n), r=4, lora_alpha=8, target_modules="all-linear",
        rank_pattern={r".*\.0\..*": 2, r".*\.1\..*": 6}, alpha_pattern={r".*\.1\..*": 3},
    ),
    "bias_all": lambda lib, n: _lora(lib, n, bias="all"),
    "bias_lora_only": lambda lib, n: _lora(lib, n, bias="lora_only"),
    "modules_to_save": lambda lib, n: _lora(lib, n, modules_to_save=[head_name(n)]),
    "embedding": lambda lib, n: _lora(lib, n, target_modules=[embedding_name(n)]),
    "gaussian": lambda lib, n: _lora(lib, n, init_lora_weights="gaussian"),
    "ia3": lambda lib, n: lib.IA3Config(task_type=task(n), **IA3.get(n, {})),
    "loha": lambda lib, n: lib.LoHaConfig(task_type=task(n), r=4, alpha=8, target_modules="all-linear"),
    "tokens": lambda lib, n: lib.TrainableTokensConfig(task_type=task(n), token_indices=[5, 90, 17]),
    "lora_tokens": lambda lib, n: _lora(lib, n, trainable_token_indices=[5, 90, 17]),
    "vera": lambda lib, n: lib.VeraConfig(task_type=task(n), r=12, d_initial=0.5, target_modules="all-linear"),
    "lokr": lambda lib, n: lib.LoKrConfig(task_type=task(n), r=2, alpha=4, target_modules="all-linear"),
    "randlora": lambda lib, n: lib.RandLoraConfig(task_type=task(n), r=6, randlora_alpha=12, target_modules="all-linear"),
    "fourierft": lambda lib, n: lib.FourierFTConfig(
        task_type=task(n), n_frequency=60, scaling=50.0, target_modules="all-linear"
    ),
    "ln_tuning": lambda lib, n: lib.LNTuningConfig(task_type=task(n), **(LN.get(n, {}) if lib is not graftlm else {})),
    "miss": lambda lib, n: lib.MissConfig(task_type=task(n), r=6, target_modules="all-linear"),
    "miss_mini": lambda lib, n: lib.MissConfig(
        task_type=task(n), r=5, mini_r=4, init_weights="mini", target_modules="all-linear"
    ),
    "bat": lambda lib, n: lib.MissConfig(task_type=task(n), r=8, init_weights="bat", target_modules="all-linear"),
    "oft": lambda lib, n: lib.OFTConfig(task_type=task(n), oft_block_size=8, target_modules="all-linear"),
    "oft_exact": lambda lib, n: lib.OFTConfig(
        task_type=task(n), r=4, oft_block_size=0, use_cayley_neumann=False, target_modules="all-linear"
    ),
    "boft": lambda lib, n: lib.BOFTConfig(task_type=task(n), boft_block_size=8, target_modules="all-linear"),
    "adalora": lambda lib, n: lib.AdaLoraConfig(
        task_type=task(n), init_r=6, target_r=3, lora_alpha=8, total_step=12, tinit=2, tfinal=3, target_modules="all-linear"
    ),
    "prompt": lambda lib, n: lib.PromptTuningConfig(task_type=task(n), num_virtual_tokens=3),
    "p_tuning_mlp": lambda lib, n: lib.PromptEncoderConfig(task_type=task(n), num_virtual_tokens=3, encoder_hidden_size=12),
    "p_tuning_lstm": lambda lib, n: lib.PromptEncoderConfig(
        task_type=task(n), num_virtual_tokens=3, encoder_hidden_size=12, encoder_reparameterization_type="LSTM"
    ),
    "prefix": _prefix,
    "cartridge": lambda lib, n: lib.CartridgeConfig(task_type=task(n), num_virtual_tokens=3),
    "prefix_projection": lambda lib, n: _prefix(lib, n, prefix_projection=True, encoder_hidden_size=12),
    "houlsby": lambda lib, n: lib.BottleneckConfig(task_type=task(n), placement="houlsby", reduction_factor=4),
    "pfeiffer": lambda lib, n: lib.BottleneckConfig(task_type=task(n), placement="pfeiffer", reduction_factor=4),
    "parallel": lambda lib, n: lib.BottleneckConfig(task_type=task(n), placement="parallel", reduction_factor=4),
}  # fmt: skip

# Those that not every model or call takes: by families, or with `task_ids`.
PARTIAL: dict[str, Any] = {
    "adaption": lambda lib, n: lib.AdaptionPromptConfig(task_type=task(n), adapter_len=3, adapter_layers=2),
    "multitask": lambda lib, n: lib.MultitaskPromptTuningConfig(
        task_type=task(n), num_virtual_tokens=3, num_tasks=3, num_ranks=2
    ),
}

ONE_OF_EACH = ("lora", "prompt", "p_tuning_mlp", "prefix", "houlsby")
COMPOSITIONS = (("lora", "prompt"), ("prefix", "lora"), ("lora", "houlsby"), ("prompt", "prefix"))


def config(method: str, name: str, lib: Any = graftlm) -> Any:
    """The configuration of a method for a family."""
    return (CONFIGS | PARTIAL)[method](lib, name)


def randomise(model: nn.Module, seed: int = 2, scale: float = 0.1) -> nn.Module:
    """Give every adapter parameter a value that shows; by name, so that it does not depend on their order."""
    own = getattr(model, "adapter_parameters", None)  # a base that is wrapped twice has another wrapper's, too
    named = model.named_parameters() if own is None else [(k, p) for n in model.active_adapters for k, p in own(n)]
    with torch.no_grad():
        for key, parameter in named:
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(seed + sum(key.encode()))
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype).to(parameter.device) * scale)
    return model


def attach(name: str, method: str | tuple[str, ...], seed: int = 2, base: nn.Module | None = None) -> graftlm.PeftModel:
    """A fresh model with a randomised adapter of a method, or with several that are active together, in eval mode."""
    methods = (method,) if isinstance(method, str) else method
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = graftlm.get_peft_model(base if base is not None else fresh(name), config(methods[0], name))
        for other in methods[1:]:
            model.add_adapter(other, config(other, name))
    if len(methods) > 1:
        model.set_adapter(["default", *methods[1:]])
    return randomise(model, seed).eval()


def rows(name: str, lengths: tuple[int, ...] = (7, 4, 5), seed: int = 5) -> list[Tensor]:
    """Token ids of rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]


def padded(sequences: list[Tensor], side: str, extra: int = 2) -> dict[str, Tensor]:
    """Rows of ids padded with zeros (the pad token) on one side, `extra` places more than needed, with their mask."""
    width = max(len(s) for s in sequences) + extra
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, s in enumerate(sequences):
        at = slice(0, len(s)) if side == "right" else slice(width - len(s), width)
        ids[i, at], mask[i, at] = s, 1
    return {"input_ids": ids, "attention_mask": mask}


def cases(names: Any, methods: Any, quick: Any) -> list[Any]:
    """Every family with every method; those for which `quick(name, method)` is false are the long tail."""
    return [
        pytest.param(n, m, id=f"{n}-{label(m)}", marks=[] if quick(n, m) else [pytest.mark.slow])
        for n in names
        for m in methods
    ]


def pairs(names: Any, methods: Any) -> list[Any]:
    """Every family with every method; of one family all methods are quick, and of the others one each, in turn."""
    names, methods = list(names), list(methods)
    turn = {name: methods[i % len(methods)] for i, name in enumerate(names[1:])}
    return cases(names, methods, lambda n, m: n == names[0] or turn[n] == m)


def label(method: str | tuple[str, ...]) -> str:
    """Name of a method or a composition in a test's id."""
    return method if isinstance(method, str) else "+".join(method)


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to 1e-5, absolute and relative."""
    torch.testing.assert_close(got, wanted, atol=tolerance, rtol=tolerance)


def logits_of(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def unpacked(model: nn.Module) -> nn.Module:
    """An oracle whose 4-bit layers compute in their own dtype: with AVX512-BF16 bitsandbytes evaluates those of
    fp32 in bf16, too."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def on_flash(monkeypatch: Any) -> list[tuple]:
    """Let packed rows go through the GPU's attention, which is computed slowly here; returns a list of its calls."""
    calls: list[tuple] = []

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return flash(*args, **kwargs)

    monkeypatch.setattr(varlen, "takes", lambda device, dtype: True)
    monkeypatch.setattr(varlen, "kernel", lambda: noted)
    return calls


def twenty_steps(model: nn.Module, inputs: Callable[[int], dict[str, Any]], lr: float, kind: Any = None) -> list[float]:
    """Losses of 20 steps of AdamW (or another `kind` of optimiser) in training mode, on `inputs(step)`."""
    optimiser = (kind or torch.optim.AdamW)([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(20):
        loss = model.train()(**inputs(step)).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


@contextmanager
def left_behind() -> Iterator[list[Tensor]]:
    """The tensors that the block made and only the garbage collector would free (found when it has ended). What was there
    before is frozen, and stays so: to look through all that the libraries hold takes longer than most tests."""
    left: list[Tensor] = []
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield left
        left += [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    finally:
        gc.enable()


def flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What torch's kernel for sequences of different lengths computes on a GPU, slowly: [tokens, heads, head_dim]."""
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    made = []
    spans = (itertools.pairwise(t.tolist()) for t in (cu_seq_q, cu_seq_k))
    for (a, b), (c, d) in zip(*spans, strict=True):
        assert b - a <= max_q and d - c <= max_k
        k, v = (t[c:d].repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(0, 1) for t in (key, value))
        seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        made.append(F.scaled_dot_product_attention(query[a:b].transpose(0, 1), k, v, seen, scale=scale).transpose(0, 1))
    return torch.cat(made)


__all__ = [
    "CAUSAL", "COMPOSITIONS", "CONFIGS", "ENCODERS", "ONE_OF_EACH", "SEQ2SEQ", "attach", "cases", "close", "config",
    "embedding_name", "fresh", "head_name", "label", "left_behind", "logits_of", "on_flash", "padded", "pairs", "randomise",
    "rows", "state_of", "still", "twenty_steps",
]  # fmt: skip
