"""Peak memory of LoRA and QLoRA training steps: GraftLM and HF PEFT, each with its own k-bit preparation.

    python benchmarks/memory.py                        # the shape of a 0.4 B GLM; minutes on two cores
    python benchmarks/memory.py --shape glm-1b --json memory.json
    python benchmarks/memory.py --shape smollm2 --schemes fp32 bf16        # LoRA on all linear layers, four rows of 40
    python benchmarks/memory.py --shape glm-1b --schemes nf4-fp32 --no-checkpointing

Every case runs in a process of its own: load the same random bf16 checkpoint (in fp32, bf16, int8 or NF4 with double
quantisation; nf4-fp32 computes in fp32), prepare, attach LoRA, train two steps on the same batch. What is printed is the
resident memory (on a GPU: what is allocated) before the base was loaded, with it, and the highest until the end; and the
highest's ratio to GraftLM's with the first scheme. It exits with an error if GraftLM's QLoRA needs more than its bf16 LoRA.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {
    "glm-0.1b": {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1536, "num_attention_heads": 8},
    "glm-0.4b": {"hidden_size": 1280, "num_hidden_layers": 16, "intermediate_size": 3456, "num_attention_heads": 10},
    "glm-1b": {"hidden_size": 2048, "num_hidden_layers": 20, "intermediate_size": 6144, "num_attention_heads": 16},
}
VOCABULARY, LENGTHS = 65_024, (60, 84, 113, 141, 172, 200)
LLAMAS = {  # LoRA everywhere: SmolLM2-135M's shape, and one in which the vocabulary weighs nothing
    "smollm2": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "layers": {
        "vocab_size": 4_096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
        "num_attention_heads": 16, "num_key_value_heads": 4,
    },
}  # fmt: skip
SCHEMES = ("bf16", "nf4", "int8")


def config(shape: str):
    """A Llama, or GLM with two key-value heads, as ChatGLM3."""
    from transformers import GlmConfig, LlamaConfig

    if shape in LLAMAS:
        return LlamaConfig(**LLAMAS[shape], tie_word_embeddings=True, dtype="bfloat16")
    sizes = SHAPES[shape]
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    return GlmConfig(
        **sizes, num_key_value_heads=2, head_dim=head, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=2,
        max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip


def build(shape: str, folder: Path) -> None:
    """A random checkpoint in bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config(shape), dtype=torch.bfloat16).save_pretrained(folder)


def load(folder: str, scheme: str, device: str):
    """The checkpoint in fp32, bf16 or quantised."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = torch.float32 if scheme.endswith("fp32") else torch.bfloat16
    options: dict = {"dtype": dtype, "device_map": device}
    if scheme == "int8":
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif scheme.startswith("nf4"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def worker(library: str, scheme: str, checkpointing: bool, folder: str) -> None:
    """One case; prints its figures as JSON."""
    import torch

    lib = __import__(library)
    __import__("bitsandbytes")  # in every case, so that libraries weigh the same
    device = "cuda" if torch.cuda.is_available() else "cpu"
    from transformers import AutoModelForCausalLM  # noqa: F401

    settle(device)
    empty = resident(device)
    base = load(folder, scheme, device)
    options = {"use_reentrant": False}
    if scheme not in ("bf16", "fp32"):
        base = lib.prepare_model_for_kbit_training(base, checkpointing, options if checkpointing else None)
    elif checkpointing:
        base.gradient_checkpointing_enable(options)
    small = base.config.model_type == "llama"
    targets = (
        {"r": 8, "target_modules": "all-linear"} if small else {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    )
    settings = lib.LoraConfig(task_type="CAUSAL_LM", lora_alpha=32, **targets)
    model = lib.get_peft_model(base, settings).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    inputs = {k: v.to(device) for k, v in batch((40,) * 4 if small else LENGTHS, base.config.vocab_size).items()}
    settle(device)
    start = resident(device)
    losses = []
    for _ in range(2):
        loss = model(**inputs).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    found = {"empty": empty, "start": start, "peak": peak(device), "losses": losses}
    print(json.dumps(found | {"weights": base.get_memory_footprint()}))


def batch(lengths: tuple[int, ...] = LENGTHS, vocabulary: int = VOCABULARY) -> dict:
    """Rows of so many tokens, padded on the right, all labelled."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        ids[i, :length] = labels[i, :length] = torch.randint(3, min(40_000, vocabulary), (length,), generator=generator)
        mask[i, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def settle(device: str) -> None:
    """Give back what loading left, and start the peak anew."""
    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def status(key: str) -> int:
    """A figure of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(key)).split()[1])


def resident(device: str) -> int:
    import torch

    return torch.cuda.memory_allocated() if device == "cuda" else status("VmRSS")


def peak(device: str) -> int:
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else status("VmHWM")


def measure(folder: Path, case: tuple[str, str, bool]) -> dict:
    """Run a case in a process of its own."""
    library, scheme, checkpointing = case
    # large blocks straight from the system, so that freed memory does not count
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--worker", library, scheme, str(int(checkpointing)), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    named = {"library": library, "scheme": scheme, "checkpointing": checkpointing}
    return named | json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES, *LLAMAS], default="glm-0.4b")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=["fp32", *SCHEMES, "nf4-fp32"])
    parser.add_argument("--no-checkpointing", action="store_true", help="without activation checkpointing only")
    parser.add_argument("--json", type=Path, default=None, help="write the figures there as well")
    parser.add_argument("--worker", nargs=4, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        library, scheme, checkpointing, folder = args.worker
        worker(library, scheme, bool(int(checkpointing)), folder)
        return
    with tempfile.TemporaryDirectory() as name:
        build(args.shape, Path(name))
        rows = []
        for checkpointing in (False,) if args.no_checkpointing else (False, True):
            for library in ("graftlm", "peft"):
                rows += [measure(Path(name), (library, scheme, checkpointing)) for scheme in args.schemes]
    report(rows, args.json)


def report(rows: list[dict], path: Path | None) -> None:
    """Print the table; exit with an error if GraftLM's QLoRA takes more than its bf16 LoRA."""
    failed, first = False, rows[0]["scheme"]
    title = f"of {first} LoRA"
    print(f"{'library':8} {'base':8} {'checkpointing':13} {'without':>9} {'with base':>9} {'peak':>9} {title:>13}   losses")
    for row in rows:
        same = (r for r in rows if r["checkpointing"] == row["checkpointing"])
        reference = next(r for r in same if (r["library"], r["scheme"]) == ("graftlm", first))
        row["ratio"] = row["peak"] / reference["peak"]
        on = "on" if row["checkpointing"] else "off"
        megabytes = " ".join(f"{row[k] / 2**20:7.0f} M" for k in ("empty", "start", "peak"))
        print(
            f"{row['library']:8} {row['scheme']:8} {on:13} {megabytes} {row['ratio']:12.2f}x   "
            f"{row['losses'][0]:.4f} {row['losses'][1]:.4f}"
        )
        failed = failed or ((row["library"], row["scheme"], first) == ("graftlm", "nf4", "bf16") and row["ratio"] > 1)
    if path is not None:
        path.write_text(json.dumps(rows, indent=1))
    if failed:
        raise SystemExit("GraftLM's QLoRA takes more memory than its bf16 LoRA.")


if __name__ == "__main__":
    main()
