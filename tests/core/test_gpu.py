"""What only a GPU shows: quantised bases, half precision with gradient scaling, flash attention. Skipped without one."""

from __future__ import annotations

import pytest
import torch
from families import batch
from helpers import attach, close, still
from test_quantized import folders, load  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM

import graftlm
from graftlm.quantization import loading_options

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu(folder, scheme, dtype=torch.bfloat16):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **loading_options(scheme, dtype, "cuda"))


def inputs():
    return {k: v.cuda() for k, v in batch("llama").items()}


@pytest.mark.parametrize("method", ["lora", "dora", "prompt", "p_tuning_mlp", "prefix", "houlsby"])
@pytest.mark.parametrize("scheme", ["int8", "nf4", "fp4"])
def test_methods_train_on_a_quantised_base(folders, scheme, method):  # noqa: F811
    base = graftlm.prepare_model_for_kbit_training(on_gpu(folders["llama"], scheme))
    model = attach("llama", method, base=base).cuda().train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(**inputs()).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.generate(input_ids=inputs()["input_ids"], max_new_tokens=3).shape[1] == 10


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_fp16_with_a_gradient_scaler(folders, scheme):  # noqa: F811
    """Document 004's precision."""
    base = graftlm.prepare_model_for_kbit_training(on_gpu(folders["llama"], scheme, torch.float16))
    model = attach("llama", "lora", base=base).cuda().train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    scaler = torch.amp.GradScaler()
    losses = []
    for _ in range(8):
        with torch.autocast("cuda", torch.float16):
            loss = model(**inputs()).loss
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "opt"])
def test_packed_rows_by_the_flash_kernel(name, method):
    model = attach(name, method, base=still(name).to("cuda", torch.bfloat16)).cuda().train()
    ids = torch.randint(3, 60, (4, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, length in enumerate((40, 9, 23, 1)):
        mask[row, length:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    given = {k: v.cuda() for k, v in given.items()}
    losses = []
    for lean in (False, True):
        model.lean = lean
        model.zero_grad()
        loss = model(**given).loss
        loss.backward()
        losses.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert model.can_pack()
    assert losses[1][0] == pytest.approx(losses[0][0], rel=2e-2)
    assert (losses[1][1] - losses[0][1]).norm() <= 0.1 * losses[0][1].norm()


def test_outputs_are_those_of_the_cpu(folders):  # noqa: F811
    wanted = attach("llama", "lora", base=load(folders["llama"], "nf4"))(**batch("llama")).logits
    got = attach("llama", "lora", base=on_gpu(folders["llama"], "nf4", torch.float32)).cuda()(**inputs()).logits
    close(got.cpu(), wanted, 1e-3)
