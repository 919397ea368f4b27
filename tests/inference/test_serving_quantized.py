"""Bases in int8, NF4 and bf16 in the engine: a request writes what it writes alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import alone, crowd, engine_of, run, some_params, some_prompt
from families import build
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from graftlm.inference.requests import Request, SamplingParams

WIDE = {
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
    "bloom": {"hidden_size": 64},
}
FORMS: dict[str, Any] = {
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
    "nf4-bf16": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
}
EXACT = ("nf4",)  # computed in fp32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, sizes in WIDE.items():
        made[name] = tmp_path_factory.mktemp("bases") / name
        build(name, **sizes).save_pretrained(made[name])
    return made


@pytest.mark.parametrize("form", [*FORMS, "bf16"])
@pytest.mark.parametrize("name", ["llama", pytest.param("bloom", marks=pytest.mark.slow)])
def test_each_request_equals_itself_alone(folders: dict[str, Path], name: str, form: str) -> None:
    options: dict[str, Any] = {"dtype": torch.bfloat16 if "bf16" in form else torch.float32}
    if form in FORMS:
        options |= {"quantization_config": FORMS[form], "device_map": "cpu"}
    base = AutoModelForCausalLM.from_pretrained(folders[name], **options)
    model, rng = crowd(name, ["lora", "ia3", "prompt", "prefix", "houlsby"], base=base), random.Random(5)
    engine = engine_of(model)
    names, asked, handles = ["", *model.methods, "lora+prompt"], [], []
    for i in range(14):
        params = some_params(rng) if form in EXACT else SamplingParams(max_new_tokens=rng.randint(1, 12))
        asked.append(Request(prompt=some_prompt(rng), adapter=names[i % len(names)], params=params))
        handles.append(engine.submit(asked[-1]))
        for _ in range(rng.choice([0, 1, 3])):
            engine.work()
    run(engine)
    for request, handle in zip(asked, handles, strict=True):
        made, wanted = list(handle.result().completions[0].tokens), alone(model, request)
        if made != wanted:
            assert form not in EXACT and near(model, request, made, wanted), (request.adapter, request.params)


def near(model: Any, request: Request, made: list[int], wanted: list[int]) -> bool:
    """Whether two completions part where their tokens are as good as equally likely. In int8 what enters a layer is rounded
    to 255 steps, in bf16 every value to eight bits: the last bit of a sum, which depends on how many rows it is computed
    with, moves logits by up to a step."""
    at = next(i for i, (a, b) in enumerate(zip(made, wanted, strict=False)) if a != b)
    ids = torch.tensor([[*request.prompt, *wanted[:at]]])
    entry = request.adapter.split("+") if request.adapter else "__base__"
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=[entry]).logits[0, -1]
    return bool((logits[made[at]] - logits[wanted[at]]).abs() <= 0.02 * (logits.max() - logits.min()))
