"""Bases that cannot be stepped, behind the same HTTP interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("httpx", reason="the test client of fastapi needs httpx")

import torch  # noqa: E402
from serving_helpers import served, tokenizer  # noqa: E402
from transformers import (  # noqa: E402
    FalconConfig,
    FalconForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import graftlm  # noqa: E402
from graftlm.inference.batches import BatchEngine  # noqa: E402

PROMPT = "The river is long and the"


def base_of(kind: str) -> Any:
    torch.manual_seed(3)
    size: dict[str, Any] = {"vocab_size": len(tokenizer()), "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if kind == "falcon":
        config = FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3, **size)
        return FalconForCausalLM(config).eval()
    config = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0, **size)
    return T5ForConditionalGeneration(config).eval()


def saved(kind: str, folder: Path) -> str:
    task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
    model = graftlm.get_peft_model(base_of(kind), graftlm.LoraConfig(task_type=task, r=4, target_modules="all-linear"))
    with torch.no_grad():
        for _, parameter in model.adapter_parameters("default"):
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["falcon", "t5"])
def test_all_endpoints(kind: str, tmp_path: Path) -> None:
    folder = saved(kind, tmp_path / "style")
    with served({"style": folder}, base=base_of(kind)) as (client, service):
        assert isinstance(service.engine, BatchEngine)
        wrapped = graftlm.PeftModel.from_pretrained(base_of(kind), folder).eval()
        given = tokenizer()(PROMPT, return_tensors="pt")
        made = wrapped.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0)
        skip = 1 if kind == "t5" else given["input_ids"].shape[1]
        body = {"model": "style", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        found = client.post("/v1/completions", json=body).json()
        assert found["choices"][0]["text"] == tokenizer().decode(made[0, skip:], skip_special_tokens=True)
        assert found["usage"]["completion_tokens"] == 8
        lines = client.post("/v1/completions", json=body | {"stream": True}).text.split("\n\n")
        chunks = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
        assert "".join(chunks) == found["choices"][0]["text"] and len(chunks) > 1
        assert client.post("/v1/completions", json=body | {"model": "base"}).status_code == 404
        plain = client.post("/v1/completions", json=body | {"model": "tiny"}).json()["choices"][0]["text"]
        assert plain != found["choices"][0]["text"]
        asked = {"model": "style", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "n": 2, "seed": 5}
        chat = client.post("/v1/chat/completions", json=asked).json()
        assert [c["finish_reason"] for c in chat["choices"]] == ["length"] * 2
        vectors = [
            client.post("/v1/embeddings", json={"model": m, "input": ["One text", "A longer one, which pads it"]}).json()
            for m in ("style", "tiny")
        ]
        alone = client.post("/v1/embeddings", json={"model": "style", "input": "One text"}).json()
        assert alone["data"][0]["embedding"] == pytest.approx(vectors[0]["data"][0]["embedding"], abs=1e-4)
        assert vectors[0]["data"][0]["embedding"] != pytest.approx(vectors[1]["data"][0]["embedding"], abs=1e-3)
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        assert 'graftlm_adapter_loads_total{outcome="loaded"} 1.0' in client.get("/metrics").text
