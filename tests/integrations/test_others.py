"""Programs that take a wrapped model as any model: lm-evaluation-harness and sentence-transformers, on local data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import graftlm


def wrapped(base: Any, task: str) -> Any:
    config = graftlm.LoraConfig(task_type=task, r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return graftlm.get_peft_model(base, config).eval()


def test_lm_evaluation_harness(tiny: Path) -> None:
    """`HFLM(pretrained=model)` scores continuations by the adapter's logits."""
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install lm-eval)")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    assert lm_eval is not None
    model = wrapped(t.AutoModelForCausalLM.from_pretrained(tiny, dtype="float32"), "CAUSAL_LM")
    tokenizer = t.AutoTokenizer.from_pretrained(tiny)
    asked = Instance("loglikelihood", {}, ("a good", " friend"), 0)
    score, _ = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu").loglikelihood([asked])[0]
    start, whole = tokenizer("a good")["input_ids"], tokenizer("a good friend")["input_ids"]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([whole])).logits.log_softmax(-1)[0]
    expected = sum(scores[i - 1, whole[i]].item() for i in range(len(start), len(whole)))
    assert score == pytest.approx(expected, abs=1e-4)


def test_sentence_transformers(tiny: Path) -> None:
    """A wrapped encoder in the place of a `Transformer` module's model."""
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="sentence-transformers is not installed (pip install sentence-transformers)"
    )
    encoder = sentence_transformers.SentenceTransformer(str(tiny), device="cpu")
    name = "model" if "model" in encoder[0]._modules else "auto_model"
    base = getattr(encoder[0], name)
    texts = ["a good friend", "the old house by the river"]
    plain = torch.tensor(encoder.encode(texts))
    model = wrapped(base, "FEATURE_EXTRACTION")
    setattr(encoder[0], name, model)
    adapted = torch.tensor(encoder.encode(texts))
    assert not torch.allclose(adapted, plain, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(torch.tensor(encoder.encode(texts)), plain)
    setattr(encoder[0], name, model.merge_and_unload())
    torch.testing.assert_close(torch.tensor(encoder.encode(texts)), adapted, atol=1e-5, rtol=1e-4)
