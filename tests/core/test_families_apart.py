"""Families whose blocks are not Llama's: mixtures of experts, hybrids, layers with a form of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as t
from helpers import randomise
from torch import nn

import graftlm
from graftlm.architectures import fast
from graftlm.errors import UnsupportedError

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
BASES = {
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**SIZES, num_local_experts=4, head_dim=8, layer_types=["full_attention"] * 2)
    ),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8, decoder_sparse_step=2)),
    "arcee": lambda: t.ArceeForCausalLM(t.ArceeConfig(**SIZES)),
    "lfm2": lambda: t.Lfm2ForCausalLM(t.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])),
    "qwen3_next": lambda: t.Qwen3NextForCausalLM(
        t.Qwen3NextConfig(
            **SIZES,
            **EXPERTS,
            head_dim=8,
            shared_expert_intermediate_size=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention"],
        )  # fmt: skip
    ),
}
LLAMA4 = dict(
    **SIZES, intermediate_size_mlp=48, num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=1, head_dim=8
)


def built(name: str) -> Any:
    torch.manual_seed(0)
    return BASES[name]().eval()


@pytest.mark.parametrize("placement", ["PFEIFFER", "HOULSBY", "PARALLEL"])
@pytest.mark.parametrize("name", BASES)
def test_every_block_has_its_bottleneck(name: str, placement: str) -> None:
    """At each half's end, whatever it ends in; rows of a mixed batch equal each adapter's own, and the base is the base."""
    base = built(name)
    ids = torch.randint(5, 96, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = base(input_ids=ids).logits
    config = graftlm.BottleneckConfig(task_type="CAUSAL_LM", placement=placement)
    model = graftlm.get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", config)
    halves = 2 if placement == "HOULSBY" else 1
    places = {key.rsplit(".bottleneck", 1)[0] for key in graftlm.get_peft_model_state_dict(model, adapter_name="a")}
    assert sorted(int(p.split("layers.")[1].split(".")[0]) for p in places) == sorted([0, 1] * halves)
    for seed, adapter in enumerate(("a", "b")):
        model.set_adapter(adapter)
        randomise(model, seed)
    model.eval()
    with torch.no_grad():
        mixed = model(input_ids=ids, adapter_names=["a", "b", "__base__"]).logits
        torch.testing.assert_close(mixed[2], wanted[2], rtol=1e-5, atol=1e-5)
        for row, adapter in enumerate(("a", "b")):
            model.set_adapter(adapter)
            alone = model(input_ids=ids).logits[row]
            torch.testing.assert_close(mixed[row], alone, rtol=1e-5, atol=1e-5)
            assert (alone - wanted[row]).abs().max() > 1e-3


def test_a_whole_halfs_bottleneck_is_after_its_output() -> None:
    """The slow reference: the half's own output through the adapter, put in its place by hand."""
    base = built("gpt_oss")
    plain = copy.deepcopy(base)
    model = graftlm.get_peft_model(base, graftlm.BottleneckConfig(task_type="CAUSAL_LM")).eval()
    randomise(model)
    for number, layer in enumerate(plain.model.layers):
        adapter = model.bottleneck["default"][f"model/layers/{number}/mlp"]
        layer.mlp.register_forward_hook(lambda m, args, out, adapter=adapter: (out[0] + adapter(out[0]), *out[1:]))
    ids = torch.arange(5, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-6, atol=1e-6)


def test_a_linear_layer_of_another_form_is_left_out_and_refused_by_name() -> None:
    torch.manual_seed(0)
    base = t.Llama4ForCausalLM(t.Llama4TextConfig(**LLAMA4)).eval()
    ids = torch.arange(5, 14)[None]
    with pytest.raises(UnsupportedError, match=r"feed_forward\.router.* is a Llama4Router"):
        graftlm.get_peft_model(copy.deepcopy(base), graftlm.LoraConfig(target_modules=["router"]))
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert not any("router" in name for name, p in model.named_parameters() if p.requires_grad)
    model(input_ids=ids, labels=ids).loss.backward()


def test_a_linear_layer_that_reads_more_stays_a_target() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor, scale: float) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x) * scale

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Scaled(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x, scale=2.0)

    model = graftlm.get_peft_model(Net(), graftlm.LoraConfig(target_modules="all-linear"))
    assert model(torch.ones(2, 4)).shape == (2, 3)


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2"])
def test_a_prefix_on_a_hybrid_names_the_layers_without_keys(name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"layers \[0\] keep no keys and values"):
        graftlm.get_peft_model(built(name), graftlm.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def test_prompt_tuning_without_attention_heads() -> None:
    """Mamba has none to record; virtual tokens enter it as embeddings all the same."""
    torch.manual_seed(0)
    base = t.MambaForCausalLM(t.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8)).eval()
    plain = copy.deepcopy(base)
    model = graftlm.get_peft_model(base, graftlm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    ids = torch.arange(5, 14)[None]
    prompt = model.get_prompt_embedding_to_save("default")[None]
    with torch.no_grad():
        wanted = plain(inputs_embeds=torch.cat([prompt, plain.get_input_embeddings()(ids)], 1)).logits[:, 3:]
        torch.testing.assert_close(model(input_ids=ids).logits[:, -9:], wanted, rtol=1e-5, atol=1e-5)


def test_a_prefix_where_a_configuration_is_strict() -> None:
    config = t.ModernBertDecoderConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"})
    model = graftlm.get_peft_model(
        t.ModernBertDecoderForCausalLM(config), graftlm.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    assert model.peft_config["default"].num_layers == 2


class Weightless(nn.Module):
    """A norm that keeps a weight and does not read it (Falcon Mamba's)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8), requires_grad=False)
        self.variance_epsilon = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(x.dtype)


class WeighedInFloat(Weightless):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unit = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * unit).to(x.dtype)


@pytest.mark.parametrize("kind", [Weightless, WeighedInFloat])
def test_fresh_norms_are_tried_with_weights_that_tell(kind: type) -> None:
    """Weights of one say nothing about how, or whether, a norm reads them."""
    named = type(kind.__name__ + "RMSNorm", (kind,), {})
    assert fast.forward_for(named().to(torch.bfloat16), {}) is None


PER_LAYER: dict[str, Any] = {
    "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96, "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
BY_LAYER = {
    "gemma3n": lambda: t.Gemma3nForCausalLM(
        t.Gemma3nTextConfig(
            **SIZES,
            **PER_LAYER,
            num_kv_shared_layers=0,
            laurel_rank=4,
            altup_num_inputs=2,
            activation_sparsity_pattern=[0.0, 0.0],
        )  # fmt: skip
    ),
    "gemma4": lambda: t.Gemma4ForCausalLM(t.Gemma4TextConfig(**SIZES, **PER_LAYER)),
}


@pytest.mark.parametrize("name", BY_LAYER)
def test_virtual_tokens_leave_embeddings_by_layer_in_place(name: str) -> None:
    """Real tokens keep theirs (given embeddings, Gemma 3n loses them silently); virtual ones have the padding's."""
    torch.manual_seed(0)
    base = BY_LAYER[name]().eval()
    with torch.no_grad():
        for parameter in base.parameters():  # Gemma 3n's fresh scales are zero
            parameter.add_(torch.randn_like(parameter) * 0.02)
    text = base.model
    ids = torch.randint(5, 96, (2, 7), generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(base)
    model = graftlm.get_peft_model(base, graftlm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    prompt = model.get_prompt_embedding_to_save("default").expand(2, -1, -1)
    embeds = torch.cat([prompt, plain.get_input_embeddings()(ids)], 1)
    lookup = [torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)] + ([None] if name == "gemma4" else [])
    inputs = text.get_per_layer_inputs(*lookup)
    with torch.no_grad():
        wanted = plain(inputs_embeds=embeds, per_layer_inputs=inputs).logits[:, 3:]
        model.eval()
        torch.testing.assert_close(model(input_ids=ids).logits[:, -7:], wanted, rtol=1e-5, atol=1e-5)
        dropped = plain(inputs_embeds=embeds, per_layer_inputs=inputs * 0).logits[:, 3:]
        assert (dropped - wanted).abs().max() > 1e-3, "embeddings by layer make no difference here"
        predicted = plain(inputs_embeds=embeds, per_layer_inputs=inputs).logits[:, 2:-1]
    loss = float(torch.nn.functional.cross_entropy(predicted.flatten(0, 1), ids.flatten()))
    model.train()
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(loss, rel=1e-4)
    model.eval()
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached, recomputed = (model.generate(input_ids=ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, recomputed)
    with pytest.raises(UnsupportedError, match="Pass input_ids, or per_layer_inputs"):
        model(inputs_embeds=plain.get_input_embeddings()(ids))


RECURRENT = {
    "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8)),
    "mamba2": lambda: t.Mamba2ForCausalLM(
        t.Mamba2Config(
            vocab_size=96,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            num_heads=8,
            head_dim=8,
            n_groups=1,
            chunk_size=16,
        )  # fmt: skip
    ),
    "rwkv": lambda: t.RwkvForCausalLM(
        t.RwkvConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, context_length=64)
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_virtual_tokens_enter_a_recurrent_state_once(name: str) -> None:
    """A state holds what came before: its next token comes alone, and the scores are those of the whole text anew.

    One row: transformers' RWKV itself mixes the states of several.
    """
    torch.manual_seed(0)
    base = RECURRENT[name]().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(2.0)
    model = graftlm.get_peft_model(base, graftlm.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    randomise(model, scale=0.5)
    ids = torch.randint(5, 96, (1, 9), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False,
        "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0,
    }  # fmt: skip
    carried, anew = (model.generate(input_ids=ids, use_cache=use, **options).logits for use in (True, False))
    for one, other in zip(carried, anew, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
