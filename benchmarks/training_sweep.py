"""Time ratios over families, methods, dtypes and batches: `training.py --sweep`."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

from rivals import Incomparable, alternate, pair
from workloads import Workload, uniform

FAMILIES = ["bloom", "opt", "gpt2", "llama", "qwen2", "falcon", "t5"]


def families() -> dict[str, Callable[[Any], Any]]:
    """Models of `FAMILIES` with some thirty million parameters in their blocks."""
    import transformers as t

    sizes = {"vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8}
    gated = sizes | {"intermediate_size": 1408, "num_key_value_heads": 2}
    configs = {
        "bloom": (t.BloomForCausalLM, t.BloomConfig(vocab_size=32000, hidden_size=512, n_layer=6, n_head=8)),
        "opt": (t.OPTForCausalLM, t.OPTConfig(**sizes, ffn_dim=2048, word_embed_proj_dim=512)),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(vocab_size=32000, n_embd=512, n_layer=6, n_head=8)),
        "llama": (t.LlamaForCausalLM, t.LlamaConfig(**gated)),
        "qwen2": (t.Qwen2ForCausalLM, t.Qwen2Config(**gated)),
        "falcon": (t.FalconForCausalLM, t.FalconConfig(**sizes)),
        "t5": (
            t.T5ForConditionalGeneration,
            t.T5Config(vocab_size=32000, d_model=512, num_layers=6, num_heads=8, d_ff=2048, decoder_start_token_id=0),
        ),
    }

    def maker(kind: Any, config: Any) -> Callable[[Any], Any]:
        def make(dtype: Any) -> Any:
            import torch

            torch.manual_seed(0)
            return kind(copy.deepcopy(config)).to(dtype)

        return make

    return {name: maker(*pair_) for name, pair_ in configs.items()}


METHODS = {
    "lora": ("LoraConfig", {"r": 16, "lora_dropout": 0.05}),
    "lora-all": ("LoraConfig", {"r": 64, "target_modules": "all-linear"}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 16}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 16}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 16}),
}
SHAPES = {
    "ragged, all labelled": {"lengths": uniform(20, 160, 6, 7)},
    "full, all labelled": {"lengths": [96] * 4},
    "long, few labelled": {"lengths": [500, 480], "labelled": 8},
    "one short row": {"lengths": [40]},
}


def sweep(args: argparse.Namespace) -> None:
    """Time ratios over families, methods, dtypes and batches; exits with an error where HF PEFT is clearly faster."""
    import torch

    slow = []
    print(f"{'family':8} {'method':10} {'dtype':9} " + " ".join(f"{name:>22}" for name in SHAPES))
    for family, make in ((f, m) for f, m in families().items() if f in args.families):
        for method, settings in METHODS.items():
            for dtype in args.dtype:
                cells = []
                for shape in SHAPES.values():
                    work = Workload(make, settings, **shape)  # type: ignore[arg-type]
                    try:
                        theirs, ours = pair(work, getattr(torch, dtype), None)
                    except Incomparable as reason:
                        print(f"{family:8} {method:10} {dtype:9} {reason}", flush=True)
                        break
                    times = alternate(theirs, ours, work, args.rounds)
                    cells.append(statistics.median(times["peft"]) / statistics.median(times["graftlm"]))
                if len(cells) < len(SHAPES):
                    continue
                print(f"{family:8} {method:10} {dtype:9} " + " ".join(f"{c:21.2f}x" for c in cells), flush=True)
                slow += [(family, method, dtype, name, c) for name, c in zip(SHAPES, cells, strict=True) if c < 0.95]
    for case in slow:
        print("slower than HF PEFT:", *case)
    if slow:
        raise SystemExit(1)
