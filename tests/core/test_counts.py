"""Exact parameter counts of the documents' models, on the meta device with the real shapes."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
import transformers as t
from families import ALL
from helpers import CONFIGS, config, fresh

import graftlm


def on_meta(model_config: Any) -> Any:
    with torch.device("meta"):
        return t.AutoModelForCausalLM.from_config(model_config)


@pytest.fixture
def bloomz_560m() -> Any:
    return on_meta(t.BloomConfig(vocab_size=250_880, hidden_size=1024, n_layer=24, n_head=16))


@pytest.fixture
def bloom_1b4_zh() -> Any:
    return on_meta(t.BloomConfig(vocab_size=46_145, hidden_size=2048, n_layer=24, n_head=16))


def opt_6_7b(**options: Any) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": 50_272, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16_384,
        "word_embed_proj_dim": 4096, "max_position_embeddings": 2048,
    }  # fmt: skip
    return on_meta(t.OPTConfig(**sizes | options))


def line(model: Any, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    model.print_trainable_parameters()
    return capsys.readouterr().out


def test_document_001_prefix_tuning(bloomz_560m: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings = graftlm.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=30, prefix_projection=True)
    model = graftlm.get_peft_model(bloomz_560m, settings)
    assert model.get_nb_trainable_parameters() == (51_461_120, 559_214_592 + 51_461_120)
    shapes = {k: tuple(p.shape) for k, p in model.named_parameters() if p.requires_grad}
    assert shapes == {
        "prompt_encoder.default.embedding.weight": (30, 1024),
        "prompt_encoder.default.transform.0.weight": (1024, 1024),
        "prompt_encoder.default.transform.0.bias": (1024,),
        "prompt_encoder.default.transform.2.weight": (49_152, 1024),
        "prompt_encoder.default.transform.2.bias": (49_152,),
    }
    (kept,) = graftlm.get_peft_model_state_dict(model).values()
    assert tuple(kept.shape) == (30, 49_152)
    assert kept.numel() == 30 * 24 * 2 * 1024 == 1_474_560
    assert line(model, capsys) == "trainable params: 51,461,120 || all params: 610,675,712 || trainable%: 8.4269\n"


def test_document_001_shares(bloomz_560m: Any) -> None:
    """What is kept: 0.1 % for a prefix of 10, some percent for adapters."""
    settings = graftlm.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=12)
    trainable, total = graftlm.get_peft_model(bloomz_560m, settings).get_nb_trainable_parameters()
    assert trainable == 12 * 49_152
    assert 0.0009 < trainable / total < 0.0012


def test_document_002_prompt_tuning(bloomz_560m: Any, capsys: pytest.CaptureFixture[str]) -> None:
    settings = graftlm.PromptTuningConfig(
        task_type=graftlm.TaskType.CAUSAL_LM, prompt_tuning_init=graftlm.PromptTuningInit.RANDOM, num_virtual_tokens=4
    )
    model = graftlm.get_peft_model(bloomz_560m, settings)
    assert model.get_nb_trainable_parameters() == (4_096, 559_218_688)
    assert 100 * 4_096 / 559_218_688 == 0.0007324504863471229
    assert line(model, capsys) == "trainable params: 4,096 || all params: 559,218,688 || trainable%: 0.0007\n"


@pytest.mark.parametrize(
    ("kind", "trainable", "total", "share"),
    [("MLP", 12_609_536, 1_315_721_216, "0.9584"), ("LSTM", 193_030_144, 1_496_141_824, "12.9019")],
)
def test_document_003_p_tuning(
    bloom_1b4_zh: Any, capsys: pytest.CaptureFixture[str], kind: str, trainable: int, total: int, share: str
) -> None:
    assert sum(p.numel() for p in bloom_1b4_zh.parameters()) == 1_303_111_680
    settings = graftlm.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=10, encoder_reparameterization_type=kind, encoder_dropout=0.1
    )  # fmt: skip
    model = graftlm.get_peft_model(bloom_1b4_zh, settings)
    assert model.get_nb_trainable_parameters() == (trainable, total)
    assert line(model, capsys) == f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share}\n"


def test_document_004_lora_on_opt(capsys: pytest.CaptureFixture[str]) -> None:
    """The document names fc_in and fc_out, which OPT does not have: said in one warning, with what it has."""
    settings = graftlm.LoraConfig(
        r=8, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"], lora_dropout=0.05,
        bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = graftlm.get_peft_model(opt_6_7b(), settings)
    texts = [str(w.message) for w in caught if "target_modules" in str(w.message)]
    assert len(texts) == 1
    assert "'fc_in' (did you mean" in texts[0]
    assert "'fc_out' (did you mean" in texts[0]
    hint_in, hint_out = texts[0].split("'fc_out'")
    assert "'fc1'" in hint_in
    assert "'fc2'" in hint_out.partition(". The other")[0]
    trainable = 32 * 4 * 8 * (4096 + 4096)
    assert trainable == 8_388_608
    base = sum(p.numel() for p in model.base.parameters()) - trainable
    assert model.get_nb_trainable_parameters() == (trainable, base + trainable)
    assert line(model, capsys).startswith("trainable params: 8,388,608 || all params: ")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["fc1"], "rank_pattern": {r"layers\.[0-9]\.fc1": 64}},
    ],
    ids=["every-linear", "dora", "modules-to-save", "embedding", "pattern"],
)
def test_lora_counts_are_those_of_peft(options: dict[str, Any]) -> None:
    counts, lines = [], []
    for lib in (graftlm, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = lib.get_peft_model(opt_6_7b(num_hidden_layers=3), lib.LoraConfig(r=8, task_type="CAUSAL_LM", **options))
        counts.append(model.get_nb_trainable_parameters())
        lines.append({tuple(p.shape) for p in model.parameters() if p.requires_grad})
    assert counts[0] == counts[1]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("method", [m for m in CONFIGS if m not in ("houlsby", "pfeiffer", "parallel")])
@pytest.mark.parametrize("name", ["bloom", "llama", "t5", "bert"])
def test_counts_and_lines_are_those_of_peft(name: str, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name not in ("bloom", "bert") and method in ("bias_all", "bias_lora_only"):
        pytest.skip("no biases there")
    if (name, method) == ("bert", "tokens"):
        pytest.skip("a classifier's head is trained along; HF PEFT's configuration of this method has no modules_to_save")
    counts, lines = [], []
    for lib in (graftlm, peft):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = lib.get_peft_model(fresh(name), config(method, name, lib))
        counts.append(model.get_nb_trainable_parameters())
        lines.append(line(model, capsys))
    assert counts[0][0] == counts[1][0]
    # ours are held beside the base, which stays as it is; theirs overwrite it. AdaLoRA's rank is a parameter there
    if not method.startswith(("bias", "adalora")):
        assert lines[0] == lines[1]


@pytest.mark.parametrize("name", list(ALL))
def test_bottleneck_counts(name: str) -> None:
    """Two d x H matrices and their biases at every place; Houlsby has two places a block, the others one.

    A decoder block's cross-attention has none.
    """
    base = fresh(name)
    blocks = 4 if name in ("t5", "bart") else 2
    size, width = 8, 32
    one = 2 * size * width + size + width
    counts = {
        p: graftlm.get_peft_model(fresh(name), config(p, name)).get_nb_trainable_parameters()[0]
        for p in ("houlsby", "pfeiffer", "parallel")
    }
    head = sum(p.numel() for k, p in base.named_parameters() if k.startswith("classifier"))
    assert counts["pfeiffer"] - head == counts["parallel"] - head == blocks * one
    assert counts["houlsby"] - head == 2 * blocks * one


def test_llama_lora_all_linear_counts() -> None:
    """r (in + out) for every linear layer, by hand: GQA's narrow keys and values, and the three feed-forward layers."""
    model = graftlm.get_peft_model(fresh("llama"), graftlm.LoraConfig(r=4, target_modules="all-linear"))
    per_layer = 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 48) * 3)
    assert model.get_nb_trainable_parameters()[0] == 2 * per_layer


def test_chatglm_like_qlora_targets_one_fused_layer() -> None:
    """Document 004's second model trains `query_key_value` with r=4: r (in + out) a layer."""
    base = on_meta(t.BloomConfig(vocab_size=1000, hidden_size=256, n_layer=5, n_head=8))
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(r=4, lora_alpha=32, target_modules=["query_key_value"]))
    assert model.get_nb_trainable_parameters()[0] == 5 * 4 * (256 + 768)
