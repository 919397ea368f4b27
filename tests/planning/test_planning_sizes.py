"""Parameters and bytes from the configuration alone, against models and files that are really made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from families import build

from graftlm import get_peft_model
from graftlm.architectures.attention import kv_shapes
from graftlm.methods import TaskType
from graftlm.planning.sizes import safetensors_bytes, sizes
from graftlm.planning.skeleton import skeleton
from graftlm.training import Recipe, resolve_base
from graftlm.training.defaults import config_type, defaults_of
from graftlm.training.setup import INIT_FIELDS

QUICK = ("lora", "prompt-tuning", "p-tuning", "prefix-tuning", "bottleneck", "vera")
OTHERS = ("adalora", "boft", "fourierft", "ia3", "ln-tuning", "loha", "lokr", "miss", "oft", "randlora", "cartridge",
          "adaption-prompt")  # fmt: skip
CASES = [(m, None) for m in QUICK] + [("lora", "nf4"), ("lora", "int8")]


@pytest.mark.parametrize(
    ("method", "form"), CASES + [pytest.param(m, None, marks=pytest.mark.slow) for m in OTHERS]
)  # fmt: skip
def test_parameters_and_files_are_exact(method: str, form: str | None, tmp_path: Path) -> None:
    planned = sizes(skeleton(Recipe.from_dict({"method": method, "quantization": form})))
    base, _ = resolve_base("graftlm-base", quantization=form)
    before = base.get_memory_footprint()
    options = {k: v for k, v in defaults_of(method).options.items() if k not in INIT_FIELDS}
    model = get_peft_model(base, config_type(method)(task_type=TaskType.CAUSAL_LM, **options))
    model.save_pretrained(tmp_path)
    assert planned.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert planned.base == 10_513_408
    assert planned.adapter_file == (tmp_path / "adapter_model.safetensors").stat().st_size
    assert planned.base_bytes == pytest.approx(before, rel=0.02)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_merged_model_is_as_long_as_its_file(dtype: str, tmp_path: Path) -> None:
    planned = sizes(skeleton(Recipe.from_dict({"dtype": dtype})))
    base, _ = resolve_base("graftlm-base", dtype=dtype)
    get_peft_model(base, config_type("lora")(task_type=TaskType.CAUSAL_LM)).merge_and_unload().save_pretrained(tmp_path)
    assert planned.merged == (tmp_path / "model.safetensors").stat().st_size


def of_config(config: Any, **recipe: Any) -> Any:
    return sizes(skeleton(Recipe.from_dict({"base": "some/where"} | recipe), config))


def test_large_bases_in_moments() -> None:
    """Their published numbers of parameters; LoRA's by hand."""
    llama = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256}
    eight = t.LlamaConfig(**llama, intermediate_size=14_336, num_hidden_layers=32)
    found = of_config(eight, method_options={"r": 8, "target_modules": ["q_proj", "v_proj"]}, dtype="bf16")
    assert found.base == 8_030_261_248
    assert found.trained == 32 * 8 * (2 * 4096 + 4096 + 1024)
    assert found.adapter_file is None  # no weights to take the header's values from
    assert found.base_bytes == pytest.approx(2 * found.base, rel=1e-4)
    large = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128_256}
    seventy = t.LlamaConfig(**large, intermediate_size=28_672, num_hidden_layers=80)
    assert of_config(seventy, dtype="bf16").base == 70_553_706_496
    bloom = t.BloomConfig(vocab_size=250_880, hidden_size=1024, n_layer=24, n_head=16)
    assert of_config(bloom, method="prompt-tuning").base == 559_214_592


def test_quantised_bases_by_their_layers() -> None:
    opt = t.OPTConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, ffn_dim=16_384, word_embed_proj_dim=4096,
        vocab_size=50_272, max_position_embeddings=2048,
    )  # fmt: skip
    found = of_config(opt, quantization="int8", dtype="bf16")
    assert found.base == 6_658_473_984
    linear = 32 * (4 * 4096**2 + 2 * 4096 * 16_384)
    assert found.base_bytes == pytest.approx(linear + 2 * (found.base - linear), rel=0.01)
    from graftlm.architectures.chatglm import ChatGLMConfig

    glm = of_config(ChatGLMConfig(), quantization="nf4", dtype="bf16", method_options={"r": 8})
    assert glm.base == 6_243_584_000
    assert 3.5e9 < glm.base_bytes < 4.2e9


def test_a_file_is_as_long_as_safetensors_writes_it(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"b": torch.zeros(3, 5), "a": torch.zeros(7, dtype=torch.bfloat16), "ü": torch.zeros(2, dtype=torch.int64)}
    save_file(tensors, tmp_path / "x", metadata={"k": '{"v": "ä"}'})
    assert safetensors_bytes(tensors, {"k": '{"v": "ä"}'}) == (tmp_path / "x").stat().st_size


@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt"])
def test_a_prefix_fits_a_base_with_a_padding_token(name: str) -> None:
    """transformers looks for it in the batch, to warn; a tensor without values has nothing to look at."""
    base = build(name, pad_token_id=0)
    found = kv_shapes(build(name, pad_token_id=0).to("meta"))
    assert found == kv_shapes(base) and base.config.pad_token_id == 0


def test_the_published_parameters_of_p_tuning() -> None:
    """Of bloom-1b4-zh, as a tutorial prints them: all, and those of the MLP and of the LSTM with ten virtual tokens."""
    bloom = t.BloomConfig(vocab_size=46_145, hidden_size=2048, n_layer=24, n_head=16)
    for kind, trained in (("MLP", 12_609_536), ("LSTM", 193_030_144)):
        options = {"num_virtual_tokens": 10, "encoder_reparameterization_type": kind}
        found = of_config(bloom, method="p-tuning", method_options=options, dtype="fp32")
        assert found.trained == trained
        assert found.base + 10 * 2048 == 1_303_132_160  # the prompt counts there too
