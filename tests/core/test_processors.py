"""A processor that has AVX2 only: torch multiplies bf16 there in scalar loops, and GraftLM does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
KINDS = ("bf16", "nf4")


def worker(folder: Path) -> None:
    """A LoRA step in bf16, and over NF4 with bf16 compute, against the plain model in fp32 over the same weight values."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    import graftlm
    from graftlm.kernels.linear import way, widened, working_dtype
    from graftlm.quantization import dequantize, quantized_layers

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    ids = torch.randint(3, 512, (3, 20))
    found = {"working": str(working_dtype(torch.bfloat16, ids.device))}
    found["backward"] = way(torch.bfloat16, 64, True) is widened
    for kind in KINDS:
        options = {"quantization_config": nf4, "device_map": "cpu"} if kind == "nf4" else {}
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        wanted = dict(plain.named_modules())
        for name, layer in base.named_modules():
            if any(layer is q for _, q in quantized_layers(base)):
                wanted[name].weight.data = dequantize(layer).float()
        lora = graftlm.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        made = []
        for model in (base, plain):
            torch.manual_seed(1)
            wrapped = graftlm.get_peft_model(model, lora).train()
            if model is plain:
                wrapped.lean = False
            loss = wrapped(input_ids=ids, labels=ids).loss
            loss.backward()
            trained = [p.grad.flatten() for p in wrapped.parameters() if p.requires_grad]
            made.append((loss.item(), torch.cat(trained)))
        found[kind] = [made[0][0], made[1][0], F.cosine_similarity(made[0][1], made[1][1], 0).item()]
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("base"))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | AVX2, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_products_in_16_bits_are_made_in_fp32(found: dict) -> None:
    assert found["working"] == "torch.float32"
    assert found["backward"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_that_of_the_same_values_in_fp32(kind: str, found: dict) -> None:
    loss, wanted, alike = found[kind]
    assert loss == pytest.approx(wanted, rel=5e-3)
    assert alike > 0.999


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
