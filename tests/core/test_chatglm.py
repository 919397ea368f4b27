"""ChatGLM against its definition, its published names and files, and everything that GraftLM does with a model."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as t
from families import VOCAB, build
from helpers import close, fresh, logits_of, padded, randomise, rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.quantizers.base import get_keys_to_not_convert

import graftlm
from graftlm.architectures import LORA_TARGETS, block_sites, chatglm, default_targets, kv_shapes
from graftlm.architectures.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from graftlm.errors import UnsupportedError
from graftlm.training.bases import auto_class

PUBLISHED: dict[str, Any] = {  # what zai-org/chatglm3-6b's config.json says, and keys of its later revisions
    "_name_or_path": "THUDM/chatglm3-6b", "model_type": "chatglm", "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True, "classifier_dropout": None, "eos_token_id": 2, "ffn_hidden_size": 13696,
    "fp32_residual_connection": False, "hidden_dropout": 0.0, "hidden_size": 4096, "kv_channels": 128,
    "layernorm_epsilon": 1e-05, "multi_query_attention": True, "multi_query_group_num": 2, "num_attention_heads": 32,
    "num_layers": 28, "original_rope": True, "pad_token_id": 0, "padded_vocab_size": 65024, "post_layer_norm": True,
    "pre_seq_len": None, "prefix_projection": False, "quantization_bit": 0, "rmsnorm": True, "seq_length": 8192,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.30.2", "use_cache": True,
}  # fmt: skip
TINY = {
    "num_layers": 2, "padded_vocab_size": VOCAB, "hidden_size": 32, "ffn_hidden_size": 48, "kv_channels": 8,
    "num_attention_heads": 4, "multi_query_group_num": 2, "seq_length": 128,
}  # fmt: skip
LAYER_KEYS = (
    "input_layernorm.weight", "self_attention.query_key_value.weight", "self_attention.query_key_value.bias",
    "self_attention.dense.weight", "post_attention_layernorm.weight", "mlp.dense_h_to_4h.weight",
    "mlp.dense_4h_to_h.weight",
)  # fmt: skip


# -- the definition ------------------------------------------------------------------------------------------------------
def definition(model: nn.Module, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Logits [T, V] of a row of ids [T] without padding, computed in fp64 from the state dict, a head at a time."""
    config: Any = model.config
    state = {k.removeprefix("transformer."): v.double() for k, v in model.state_dict().items()}
    heads, groups, size = config.num_attention_heads, config.multi_query_group_num, config.kv_channels
    positions = torch.arange(len(ids)) if positions is None else positions
    causal = torch.ones(len(ids), len(ids)).tril().bool()

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt() * state[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", torch.zeros(1, dtype=torch.double))

    def turned(x: Tensor) -> Tensor:
        """Neighbours of the first half of x [T, D] as complex numbers, turned by their positions."""
        steps = torch.arange(size // 4, dtype=torch.double) / (size // 4)
        angles = positions.double()[:, None] * (10000 * (config.rope_ratio or 1)) ** -steps
        pairs = torch.view_as_complex(x[:, : size // 2].reshape(len(ids), -1, 2).contiguous())
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((torch.view_as_real(pairs).flatten(1), x[:, size // 2 :]), 1)

    h = state["embedding.word_embeddings.weight"][ids]
    for n in range(config.num_layers):
        block = f"encoder.layers.{n}"
        fused = linear(norm(h, f"{block}.input_layernorm"), f"{block}.self_attention.query_key_value")
        columns = fused.view(len(ids), heads + 2 * groups, size).unbind(1)
        queries, keys, values = columns[:heads], columns[heads : heads + groups], columns[heads + groups :]
        contexts = []
        for head, query in enumerate(queries):
            group = head // (heads // groups)
            scores = turned(query) @ turned(keys[group]).T / math.sqrt(size)
            contexts.append(scores.masked_fill(~causal, -torch.inf).softmax(-1) @ values[group])
        h = h + linear(torch.cat(contexts, -1), f"{block}.self_attention.dense")
        wide = linear(norm(h, f"{block}.post_attention_layernorm"), f"{block}.mlp.dense_h_to_4h")
        gate, up = wide[:, : config.ffn_hidden_size], wide[:, config.ffn_hidden_size :]
        h = h + linear(gate * gate.sigmoid() * up, f"{block}.mlp.dense_4h_to_h")
    return (norm(h, "encoder.final_layernorm") @ state["output_layer.weight"].T).float()


VARIANTS: dict[str, dict[str, Any]] = {
    "as-published": {},
    "biases": {"add_bias_linear": True},
    "no-biases": {"add_qkv_bias": False},
    "long-rope": {"rope_ratio": 500},
    "no-rope-ratio": {"rope_ratio": None},
    "one-group": {"multi_query_group_num": 1},
    "every-head": {"multi_query_group_num": 4},
    "wide-heads": {"kv_channels": 16, "layernorm_epsilon": 0.1},
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_definition(variant: str, attention: str) -> None:
    model = build("chatglm", **VARIANTS[variant])
    model.set_attn_implementation(attention)  # type: ignore[operator]
    for ids in rows("chatglm"):
        close(logits_of(model, input_ids=ids[None])[0], definition(model, ids))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_those_of_the_definition(side: str, attention: str) -> None:
    model = fresh("chatglm")
    model.set_attn_implementation(attention)  # type: ignore[operator]
    inputs = padded(rows("chatglm"), side)
    mask = inputs["attention_mask"]
    counted = (mask.cumsum(-1) - 1).clamp_min(0)
    for extra in ({}, {"position_ids": counted}):  # by place or counted: turned positions are relative
        got = logits_of(model, **inputs, **extra)
        for i, ids in enumerate(rows("chatglm")):
            close(got[i][mask[i].bool()], definition(model, ids))


def test_position_ids_are_honoured() -> None:
    model = fresh("chatglm")
    (ids,) = rows("chatglm", (6,))
    positions = torch.tensor([0, 1, 5, 6, 40, 41])
    got = logits_of(model, input_ids=ids[None], position_ids=positions[None])[0]
    close(got, definition(model, ids, positions))
    assert (got - definition(model, ids)).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [(1,) * 8, (3, 1, 4), (5, 3)])
@pytest.mark.parametrize("side", ["left", None])
def test_steps_with_a_cache(steps: tuple[int, ...], side: str | None) -> None:
    model = fresh("chatglm")
    sequences = rows("chatglm", (8, 8) if side is None else (8, 5))
    inputs = padded(sequences, "left", extra=0)
    cache, parts, start = t.DynamicCache(config=model.config), [], 0
    for step in steps:
        mask = None if side is None else inputs["attention_mask"][:, : start + step]
        ids = inputs["input_ids"][:, start : start + step]
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        assert out.past_key_values is cache
        parts.append(out.logits)
        start += step
    assert cache.layers[0].keys.shape == (2, 2, 8, 8)  # the two groups, not the four heads
    for i, ids in enumerate(sequences):
        close(torch.cat(parts, 1)[i, -len(ids) :], definition(model, ids))


def test_left_padded_rows_generate_as_alone() -> None:
    model: Any = fresh("chatglm")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    got = model.generate(**padded(rows("chatglm"), "left"), **options)[:, -6:]
    for row, ids in zip(got, rows("chatglm"), strict=True):
        assert torch.equal(model.generate(ids[None], **options)[0, -6:], row)
    assert torch.equal(model.generate(**padded(rows("chatglm"), "left"), **options, use_cache=False)[:, -6:], got)


# -- what transformers asks of a model -----------------------------------------------------------------------------------
def test_embeddings_in_and_logits_to_keep() -> None:
    model: Any = fresh("chatglm")
    ids = torch.stack(rows("chatglm", (7, 7)))
    whole = logits_of(model, input_ids=ids)
    close(logits_of(model, inputs_embeds=model.get_input_embeddings()(ids)), whole)
    close(logits_of(model, input_ids=ids, logits_to_keep=2), whole[:, -2:])
    close(logits_of(model, input_ids=ids, logits_to_keep=torch.tensor([1, 4])), whole[:, [1, 4]])
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_loss_is_shifted_and_counts_the_items_of_the_whole_batch() -> None:
    model: Any = fresh("chatglm")
    ids = torch.stack(rows("chatglm", (7, 7)))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    targets = labels[:, 1:].flatten()
    total = nn.functional.cross_entropy(logits_of(model, input_ids=ids)[:, :-1].flatten(0, 1), targets, reduction="sum")
    close(model(input_ids=ids, labels=labels).loss, total / (targets != -100).sum())
    close(model(input_ids=ids, labels=labels, num_items_in_batch=50).loss, total / 50)


def test_hidden_states_and_attentions() -> None:
    model: Any = fresh("chatglm")
    model.set_attn_implementation("eager")
    inputs = padded(rows("chatglm"), "right", extra=0)
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, output_attentions=True)
        as_tuple = model(**inputs, return_dict=False)
    close(out.hidden_states[0], model.get_input_embeddings()(inputs["input_ids"]))
    close(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)
    assert [h.shape for h in out.hidden_states] == [(3, 7, 32)] * 3
    assert [a.shape for a in out.attentions] == [(3, 4, 7, 7)] * 2
    close(out.attentions[0].sum(-1), torch.ones(3, 4, 7))
    close(as_tuple[0], out.logits)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    ids = torch.stack(rows("chatglm", (7, 7)))
    gradients = []
    for checkpointing in (False, True):
        model: Any = fresh("chatglm").train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({k: p.grad for k, p in model.named_parameters()})
    for key, wanted in gradients[0].items():
        close(gradients[1][key], wanted)


def test_dropouts_act_in_training_only() -> None:
    for option in ("hidden_dropout", "attention_dropout"):
        model = build("chatglm", **{option: 0.5})
        ids = rows("chatglm")[0][None]
        wanted = logits_of(fresh("chatglm"), input_ids=ids)
        close(logits_of(model, input_ids=ids), wanted)
        assert (logits_of(model.train(), input_ids=ids) - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = fresh("chatglm")
    inputs = padded(rows("chatglm"), "left")
    wanted = logits_of(model, **inputs)
    got = logits_of(model.to(dtype), **inputs)
    assert got.dtype == dtype
    kept = inputs["attention_mask"].bool()
    assert (got.float() - wanted)[kept].abs().max() < 0.1 * wanted[kept].std()


def test_norms_keep_the_dtype_of_what_goes_through() -> None:
    """With norms in fp32, as `prepare_model_for_kbit_training` leaves them, linear layers still get 16-bit inputs."""
    norm = chatglm.RMSNorm(8)
    assert norm(torch.randn(2, 8, dtype=torch.float16)).dtype == torch.float16


def test_tied_embeddings() -> None:
    model: Any = build("chatglm", tie_word_embeddings=True)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_resized_embeddings() -> None:
    model: Any = fresh("chatglm")
    model.resize_token_embeddings(VOCAB + 8)
    assert model.config.padded_vocab_size == model.config.vocab_size == VOCAB + 8
    assert logits_of(model, input_ids=torch.tensor([[VOCAB + 7]])).shape == (1, 1, VOCAB + 8)


def test_classifier_pools_each_rows_last_token() -> None:
    settings = ChatGLMConfig(**TINY, num_labels=3)
    model = t.AutoModelForSequenceClassification.from_config(settings).eval()
    assert not any("output_layer" in key for key in model.state_dict())
    alone = torch.cat([logits_of(model, input_ids=ids[None]) for ids in rows("chatglm")])
    for side in ("left", "right"):
        close(logits_of(model, **padded(rows("chatglm"), side)), alone)


# -- names, sizes, configuration -----------------------------------------------------------------------------------------
def published_keys(layers: int) -> set[str]:
    outside = {"embedding.word_embeddings.weight", "encoder.final_layernorm.weight", "output_layer.weight"}
    inside = {f"encoder.layers.{n}.{key}" for n in range(layers) for key in LAYER_KEYS}
    return {f"transformer.{key}" for key in outside | inside}


def on_meta(**options: Any) -> Any:
    with torch.device("meta"):
        return t.AutoModel.from_config(ChatGLMConfig(**PUBLISHED | options))


def test_chatglm3_6b_has_its_keys_shapes_and_parameters() -> None:
    model = on_meta()
    state = model.state_dict()
    assert set(state) == published_keys(28)
    assert sum(p.numel() for p in model.parameters()) == 6_243_584_000
    block = "transformer.encoder.layers.27"
    assert state[f"{block}.self_attention.query_key_value.weight"].shape == (4608, 4096)
    assert state[f"{block}.self_attention.query_key_value.bias"].shape == (4608,)
    assert state[f"{block}.mlp.dense_h_to_4h.weight"].shape == (27392, 4096)
    assert get_keys_to_not_convert(model) == ["transformer.output_layer"]
    assert default_targets(model, LORA_TARGETS, "LoraConfig") == ["query_key_value"]
    assert kv_shapes(model) == [(2, 128)] * 28
    settings = graftlm.LoraConfig(r=4, lora_alpha=32, task_type="CAUSAL_LM")
    adapted = graftlm.get_peft_model(model, settings)
    assert adapted.get_nb_trainable_parameters() == (974_848, 6_244_558_848)


def test_glm_4_9b_has_its_parameters() -> None:
    model = on_meta(num_layers=40, padded_vocab_size=151552, layernorm_epsilon=1.5625e-07, rope_ratio=500)
    assert sum(p.numel() for p in model.parameters()) == 9_399_951_360


def test_generic_names_of_the_configuration() -> None:
    config = ChatGLMConfig(**PUBLISHED)
    names = {
        "num_hidden_layers": 28, "vocab_size": 65024, "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 13696,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "dtype": torch.float16,
    }  # fmt: skip
    assert {key: getattr(config, key) for key in names} == names
    by_generic = ChatGLMConfig(num_hidden_layers=3, vocab_size=7, head_dim=4, num_key_value_heads=1)
    assert (by_generic.num_layers, by_generic.padded_vocab_size, by_generic.kv_channels) == (3, 7, 4)
    assert ChatGLMConfig(padded_vocab_size=128, vocab_size=100).vocab_size == 128  # the weights' size


def test_the_configuration_survives_saving(tmp_path: Path) -> None:
    ChatGLMConfig(**PUBLISHED, own_key={"kept": [1]}).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    changed = {"torch_dtype", "transformers_version", "_name_or_path"}  # transformers writes these its own way
    assert {k: written[k] for k in PUBLISHED if k not in changed} == {k: v for k, v in PUBLISHED.items() if k not in changed}
    assert written["own_key"] == {"kept": [1]}
    again = t.AutoConfig.from_pretrained(tmp_path)
    assert type(again) is ChatGLMConfig
    first = ChatGLMConfig(**PUBLISHED, own_key={"kept": [1]}).to_dict()
    assert {k: v for k, v in again.to_dict().items() if k != "_name_or_path"} == {
        k: v for k, v in first.items() if k != "_name_or_path"
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rmsnorm": False}, r"rmsnorm=False \(expected True\)"),
        ({"apply_residual_connection_post_layernorm": True}, "post_layernorm=True"),
        ({"post_layer_norm": False, "fp32_residual_connection": True}, r"(?s)fp32_residual.*post_layer_norm=False"),
        ({"multi_query_attention": False}, "multi_query_attention=False"),
        ({"original_rope": False}, "original_rope=False"),
        ({"quantization_bit": 4}, "BitsAndBytesConfig"),
        ({"pre_seq_len": 128}, "PrefixTuningConfig"),
        ({"vision_config": {"hidden_size": 8}}, "images"),
        ({"_name_or_path": "THUDM/chatglm2-6b-32k", "rope_ratio": 50}, "interpolates"),
        ({"position_encoding_2d": True, "inner_hidden_size": 16384}, "version 1"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_is_not_implemented_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        ChatGLMConfig(**PUBLISHED | options)


def test_options_that_are_set_afterwards_raise_too() -> None:
    """`AutoModel.from_pretrained(path, pre_seq_len=...)` sets them on the finished configuration."""
    config = ChatGLMConfig(**TINY)
    config.pre_seq_len = 8  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedError, match="pre_seq_len=8"):
        ChatGLMForConditionalGeneration(config)


# -- published files -----------------------------------------------------------------------------------------------------
AUTO = (t.AutoModel, t.AutoModelForCausalLM, t.AutoModelForSeq2SeqLM)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A directory as published: 16-bit weights with `inv_freq`, and remote code, which must not be run."""
    model: Any = fresh("chatglm").half()
    state = model.state_dict() | {"transformer.rotary_pos_emb.inv_freq": torch.full((2,), 7.0).half()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | TINY))
    for name in ("configuration_chatglm.py", "modeling_chatglm.py"):
        (tmp_path / name).write_text("raise RuntimeError('remote code was run')\n")
    return tmp_path


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("auto", AUTO, ids=lambda a: a.__name__)
def test_published_files_load_without_their_code(
    checkpoint: Path, auto: Any, trust: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    for name in () if trust else ("configuration_chatglm.py", "modeling_chatglm.py"):
        (checkpoint / name).unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, report = auto.from_pretrained(checkpoint, trust_remote_code=trust, output_loading_info=True)
    assert type(model) is ChatGLMForConditionalGeneration
    assert not any(report.values())
    assert not caplog.records
    assert model.dtype == torch.float16
    assert all(torch.equal(p, fresh("chatglm").half().state_dict()[k]) for k, p in model.state_dict().items())
    assert auto_class(model.config, "auto", "chatglm") is t.AutoModelForCausalLM


def test_published_state_loads_strictly(checkpoint: Path) -> None:
    state = load_file(checkpoint / "model.safetensors")
    fresh("chatglm").half().load_state_dict(state, strict=True)
    assert "transformer.rotary_pos_emb.inv_freq" in state


def test_bin_shards_load(checkpoint: Path) -> None:
    state = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    where = {}
    for number, keys in enumerate((sorted(state)[::2], sorted(state)[1::2]), 1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({k: state[k] for k in keys}, checkpoint / name)
        where |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model, report = t.AutoModel.from_pretrained(checkpoint, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values())
    inputs = padded(rows("chatglm"), "left")
    close(logits_of(model, **inputs), logits_of(fresh("chatglm").half().float(), **inputs))


def test_save_and_load(tmp_path: Path) -> None:
    model: Any = fresh("chatglm")
    model.save_pretrained(tmp_path)
    again, report = t.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    inputs = padded(rows("chatglm"), "left")
    assert torch.equal(logits_of(again, **inputs), logits_of(model, **inputs))
    assert set(load_file(tmp_path / "model.safetensors")) == published_keys(2)


def test_registering_is_repeatable() -> None:
    chatglm.register()
    config = ChatGLMConfig(**TINY)
    for auto in AUTO:
        assert type(auto.from_config(config)) is ChatGLMForConditionalGeneration
    assert t.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["chatglm"] == "ChatGLMForConditionalGeneration"
    assert len(list(t.MODEL_FOR_CAUSAL_LM_MAPPING.items())) == len(t.MODEL_FOR_CAUSAL_LM_MAPPING)


# -- adapters and training -----------------------------------------------------------------------------------------------
def lora(lib: Any) -> Any:
    return lib.LoraConfig(r=4, lora_alpha=32, target_modules=["query_key_value"], task_type="CAUSAL_LM")


def test_adapters_of_peft_load_here_and_ours_there(tmp_path: Path) -> None:
    inputs = padded(rows("chatglm"), "right")
    real = inputs["attention_mask"].bool()  # on padding, positions are counted differently
    theirs = randomise(peft.get_peft_model(fresh("chatglm"), lora(peft))).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    block = "base_model.model.transformer.encoder.layers.{}.self_attention.query_key_value.lora_{}.weight"
    assert set(load_file(tmp_path / "theirs" / "adapter_model.safetensors")) == {
        block.format(n, x) for n in range(2) for x in "AB"
    }
    ours = graftlm.PeftModel.from_pretrained(fresh("chatglm"), tmp_path / "theirs").eval()
    wanted = logits_of(theirs, **inputs)[real]
    close(logits_of(ours, **inputs)[real], wanted)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(fresh("chatglm"), tmp_path / "ours").eval()
    close(logits_of(back, **inputs)[real], wanted)
    merged = ours.merge_and_unload()
    assert type(merged) is ChatGLMForConditionalGeneration
    close(logits_of(merged, **inputs)[real], wanted)


def test_places_for_bottlenecks() -> None:
    block = "transformer.encoder.layers"
    assert block_sites(fresh("chatglm")) == {
        "attention": [f"{block}.{n}.self_attention.dense" for n in range(2)],
        "feed_forward": [f"{block}.{n}.mlp.dense_4h_to_h" for n in range(2)],
        "feed_forward_in": [f"{block}.{n}.mlp.dense_h_to_4h" for n in range(2)],
    }


def trainer(model: Any, folder: Path, **options: Any) -> t.Trainer:
    settings = t.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=2, report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, logging_steps=1, **options,
    )  # fmt: skip
    data = [{"input_ids": ids, "labels": ids} for ids in rows("chatglm", (7, 7, 7, 7))]
    return t.Trainer(model=model, args=settings, train_dataset=data)


def test_trainer_shifts_smoothed_labels(tmp_path: Path) -> None:
    """transformers shifts labels itself under label smoothing, for causal models that it knows by name."""
    model = fresh("chatglm")
    ids = torch.stack(rows("chatglm", (7, 7)))
    got = trainer(model, tmp_path, label_smoothing_factor=0.1).compute_loss(model, {"input_ids": ids, "labels": ids})
    logits = logits_of(model, input_ids=ids)[:, :-1].flatten(0, 1)
    close(got, nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), label_smoothing=0.1))


QUANTISED = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_loading_trains(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plain: Any = build("chatglm", hidden_size=64, ffn_hidden_size=64, kv_channels=16)
    plain.save_pretrained(tmp_path / "plain")
    base = t.AutoModel.from_pretrained(
        tmp_path / "plain",
        quantization_config=t.BitsAndBytesConfig(**QUANTISED[kind]),
        device_map="cpu",
        dtype=torch.float32,
    )
    kinds = {name.rpartition(".")[2]: type(m).__name__ for name, m in base.named_modules()}
    assert kinds["output_layer"] == "Linear"
    packed = {kinds[name] for name in ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")}
    assert packed == {"Linear8bitLt" if kind == "int8" else "Linear4bit"}
    model = graftlm.get_peft_model(graftlm.prepare_model_for_kbit_training(base), lora(graftlm))
    ids = torch.stack(rows("chatglm", (7, 7)))
    wanted = logits_of(plain, input_ids=ids)
    assert (logits_of(model.eval(), input_ids=ids) - wanted).std() < 0.4 * wanted.std()
    before = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    training = trainer(model, tmp_path / "out", learning_rate=1e-2, lr_scheduler_type="constant")
    assert math.isfinite(training.train().training_loss)
    after = dict(model.named_parameters())
    assert all(not torch.equal(value, after[key]) for key, value in before.items())
