"""Adapters for vLLM: LoRA directories as it loads them, virtual tokens as a file of prompt embeddings.

vLLM scales every layer by ``lora_alpha / r`` (``/ sqrt(r)`` for rsLoRA) of the whole configuration: it passes over rank and
alpha patterns without a word, refuses DoRA and modules that are trained in full, and knows no other method. What is plain
LoRA is copied; what is not becomes LoRA by singular values (`graftlm.converting`), where a rank is given for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoint.read import read_tensors
from ..converting import save_as_lora
from ..errors import CheckpointError, ConfigError, UnsupportedError
from ..files import WEIGHTS_NAME, find_file
from ..methods import PeftConfig, method_for

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that `--max-lora-rank` takes
STARTS = (True, False, "gaussian", "orthogonal", "loftq")  # that leave the base as it is and B A as all there is
PROMPTS = ("PROMPT_TUNING", "P_TUNING")
FACTORS = re.compile(r"\.lora_([AB])\.weight$|\.lora_embedding_([AB])$")
# Fields by which LoRA does more than add one product to each weight, in a way that no other factors could hold
BEYOND = ("modules_to_save", "layer_replication", "alora_invocation_tokens", "trainable_token_indices", "target_parameters")
MERGE = "Merge it: graftlm merge, or graftlm export --to gguf."


def export_vllm(folder: str, output: Path, wrapped: Callable[[], Any], rank: int | None = None) -> list[str]:
    """Write an adapter as vLLM takes it.

    Args:
        folder: the adapter's directory.
        output: a directory that is made.
        wrapped: loads the base with the adapter, called "default"; asked only where its tensors are needed.
        rank: of the LoRA that another method becomes.

    Returns:
        Lines about what was written.

    Raises:
        UnsupportedError: vLLM cannot take it in any form.
        ConfigError: it could become LoRA, but no rank was given; or a rank where none is needed.
    """
    config = PeftConfig.from_pretrained(folder)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    method = method_for(config, "default")
    if kind in PROMPTS:
        if rank is not None:
            raise ConfigError(f"--rank {rank}: {folder} is {kind}, which has no rank; leave it out.")
        return export_prompt(folder, kind, output, wrapped())
    refuse(folder, kind, config, method.mergeable)
    why = hindrances(folder, kind, config)
    if not why:
        if rank is not None:
            raise ConfigError(f"--rank {rank}: {folder} is plain LoRA already and is copied as it is; leave --rank out.")
        return export_plain(folder, output)
    if rank is None:
        raise ConfigError(
            f"{folder} {' and '.join(why)}, which vLLM does not load. Pass --rank (16, say) to turn it into plain LoRA of "
            "that rank; the error that this costs is shown."
        )
    check_rank(rank)
    save_as_lora(output, wrapped(), rank)
    return [f"It {' and '.join(why)}, so it became plain LoRA.", *export_plain(str(output), output)]


def refuse(folder: str, kind: str, config: Any, mergeable: bool) -> None:
    """UnsupportedError for what vLLM cannot run, whatever it is turned into."""
    if not mergeable and kind != "LORA":
        raise UnsupportedError(
            f"{folder} is {kind}: it is no change of weights and no virtual tokens at the input, and vLLM has nothing else. "
            f"graftlm serve --adapter {folder} serves it as OpenAI's API."
        )
    used = [field for field in BEYOND if getattr(config, field, None)]
    if getattr(config, "bias", "none") != "none":
        used.append("bias")
    if getattr(config, "lora_bias", False):
        used.append("lora_bias")
    if used:
        raise UnsupportedError(f"{folder} uses {', '.join(used)}, for which vLLM has no place. {MERGE}")


def hindrances(folder: str, kind: str, config: Any) -> list[str]:
    """Why a directory is not plain LoRA of one rank, in words; [] where it is."""
    if kind != "LORA":
        return [f"is {kind}"]
    told = []
    if config.use_dora:
        told.append("is DoRA")
    for field in ("rank_pattern", "alpha_pattern"):
        if getattr(config, field):
            told.append(f"has other values for some layers ({field})")
    if config.init_lora_weights not in STARTS:
        told.append(f"starts from values of the base (init_lora_weights={config.init_lora_weights!r})")
    strange = [key for key in tensors_of(folder) if not FACTORS.search(key)]
    if strange and not told:
        told.append(f"holds more than A and B ({strange[0]})")
    return told


def check_rank(rank: int) -> None:
    if not 1 <= rank <= RANKS[-1]:
        raise ConfigError(f"rank {rank}: vLLM takes ranks from 1 to {RANKS[-1]}.")


def tensors_of(folder: str) -> dict[str, Tensor]:
    """An adapter's tensors by the names of its file."""
    return read_tensors(find_file(folder, WEIGHTS_NAME))


def export_plain(folder: str, output: Path) -> list[str]:
    """Configuration and tensors, copied, with a README."""
    about = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = tensors_of(folder)
    ranks = {value.shape[0] for key, value in tensors.items() if (m := FACTORS.search(key)) and "A" in m.groups()}
    if ranks != {about["r"]}:
        raise CheckpointError(f"{folder} says r={about['r']}, its tensors have ranks {sorted(ranks)}.")
    check_rank(about["r"])
    output.mkdir(parents=True, exist_ok=True)
    about["inference_mode"] = True
    (output / "adapter_config.json").write_text(json.dumps(about, indent=2, sort_keys=True), encoding="utf-8")
    save_file({k: v.contiguous() for k, v in tensors.items()}, output / "adapter_model.safetensors", {"format": "pt"})
    if load_file(output / "adapter_model.safetensors").keys() != tensors.keys():
        raise CheckpointError(f"{output} does not hold what was written.")
    most = next(r for r in RANKS if r >= about["r"])
    base = about.get("base_model_name_or_path") or "BASE"
    name = output.resolve().name
    line = f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules {name}={name}"
    (output / "README.md").write_text(LORA_README.format(name=name, line=line), encoding="utf-8")
    return [f"LoRA of rank {about['r']} in {output}.", line]


def export_prompt(folder: str, kind: str, output: Path, model: Any) -> list[str]:
    """Virtual tokens [P, H] as a file, with the lines of a client that sets them before its prompt."""
    if model.config.is_encoder_decoder:
        raise UnsupportedError(f"{folder}: vLLM's prompt embeddings are for decoders; the base has an encoder.")
    if model.config.model_type in ("gemma", "gemma2"):  # transformers scales embeddings that are given, vLLM does not
        raise UnsupportedError(f"{folder}: transformers and vLLM scale embeddings of {model.config.model_type} differently.")
    method = model.methods["default"]
    with torch.no_grad():
        tokens = method.virtual_tokens(model).detach().to(model.dtype).cpu().contiguous()
    output.mkdir(parents=True, exist_ok=True)
    save_file({"prompt_embeds": tokens}, output / "prompt_embeds.safetensors", {"format": "pt"})
    base = method.config.base_model_name_or_path or "BASE"
    text = PROMPT_README.format(name=output.resolve().name, base=base, count=len(tokens), width=tokens.shape[1], kind=kind)
    (output / "README.md").write_text(text, encoding="utf-8")
    return [f"{len(tokens)} virtual tokens in {output}; its README.md has the lines of a client."]


LORA_README = """# {name}, for vLLM

```bash
{line}
```

Requests name it as their `model`. vLLM serves LoRA on the models that its list of supported models marks so, on the
layers that it has; it says at the start what it does not take.
"""

PROMPT_README = """# {name}, for vLLM

`prompt_embeds.safetensors` holds `prompt_embeds` [{count}, {width}], the virtual tokens of an adapter ({kind}). They stand
before the embeddings of a prompt's tokens; vLLM takes both together, as one tensor.

```bash
vllm serve {base} --enable-prompt-embeds
```

The tensor of a prompt:

```python
import base64, io, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base!r}
tokenizer = AutoTokenizer.from_pretrained(base)
embed = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings()
virtual = load_file("prompt_embeds.safetensors")["prompt_embeds"]

def prompt_embeds(text):
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    with torch.no_grad():
        return torch.cat([virtual, embed(ids).to(virtual.dtype)])

def encoded(text):
    file = io.BytesIO()
    torch.save(prompt_embeds(text), file)
    return base64.b64encode(file.getvalue()).decode()
```

A completion (a conversation is rendered by the chat template first):

```python
from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
said = client.completions.create(model={base!r}, prompt="", max_tokens=40, extra_body={{"prompt_embeds": encoded("Hello")}})
print(said.choices[0].text)
```
"""
