"""ChatGLM: the decoder of chatglm2-6b, chatglm3-6b and of glm-4-9b's "chatglm" checkpoints, without remote code.

Source: Zeng et al., "ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4", 2024 (arXiv:2406.12793), with
rotary positions (arXiv:2104.09864) on half of each head, grouped keys and values (arXiv:2305.13245), SwiGLU
(arXiv:2002.05202) and RMSNorm (arXiv:1910.07467). Names of modules are those of zai-org/chatglm3-6b, so that its files,
and adapters that were made on its remote code, fit as they are. Attention, caches, masks and losses are transformers'.

Shapes: B rows, T tokens, H hidden size, A query heads, G groups of keys and values, D head size, F feed-forward size::

    query_key_value   [B, T, H] -> [B, T, (A + G + G) D]   queries, then keys, then values, head by head
    dense             [B, T, A D] -> [B, T, H]
    dense_h_to_4h     [B, T, H] -> [B, T, F + F]           the gate (through SiLU), then what it gates
    dense_4h_to_h     [B, T, F] -> [B, T, H]
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.glm.modeling_glm import GlmRMSNorm, apply_rotary_pos_emb, eager_attention_forward
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .chatglm_config import ChatGLMConfig


class RMSNorm(GlmRMSNorm):
    """Root mean square norm, computed in fp32 including its weight; the result is in the input's dtype."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * wide).to(hidden_states.dtype)


class RotaryEmbedding(nn.Module):
    """Cosines and sines for half of a head: position m turns the i-th pair of neighbours by m * base^(-4i / D).

    Keeps no state. Published files hold `inv_freq`, which follows from the configuration; `load_state_dict` drops it.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.base = 10000.0 * (1 if config.rope_ratio is None else config.rope_ratio)
        self.width = config.kv_channels // 2
        self.register_load_state_dict_pre_hook(lambda module, state, prefix, *rest: state.pop(f"{prefix}inv_freq", None))

    @torch.no_grad()
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [B or 1, T]; returns cosines and sines [B or 1, T, D / 2] in the dtype of `hidden_states`."""
        steps = torch.arange(0, self.width, 2, device=hidden_states.device, dtype=torch.float32) / self.width
        angles = position_ids[..., None].float() * (1.0 / self.base**steps)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)


class SelfAttention(nn.Module):
    """Causal attention of A query heads over G groups of keys and values, from one fused projection."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.num_key_value_groups = config.num_attention_heads // config.multi_query_group_num
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        groups = config.multi_query_group_num * self.head_dim
        self.widths = (config.num_attention_heads * self.head_dim, groups, groups)
        bias = config.add_bias_linear or config.add_qkv_bias
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.widths), bias=bias)
        self.dense = nn.Linear(self.widths[0], config.hidden_size, bias=config.add_bias_linear)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, T, H]; returns the same shape, and the weights [B, A, T, S] where they are kept."""
        rows = hidden_states.shape[:-1]
        fused = self.query_key_value(hidden_states).split(self.widths, dim=-1)
        query, key, value = (x.view(*rows, -1, self.head_dim).transpose(1, 2) for x in fused)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        context, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )  # [B, T, A, D]
        return self.dense(context.reshape(*rows, -1)), weights


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), gate and up in one projection."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        width, bias = config.ffn_hidden_size, config.add_bias_linear
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * width, bias=bias)
        self.dense_4h_to_h = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dense_4h_to_h(F.silu(gate) * up)


class GLMBlock(GradientCheckpointingLayer):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.hidden_dropout = config.hidden_dropout
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states [B, T, H]; returns the same shape. The rest goes to the attention."""
        attended, _ = self.self_attention(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + F.dropout(attended, self.hidden_dropout, self.training)
        fed = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + F.dropout(fed, self.hidden_dropout, self.training)


class GLMTransformer(nn.Module):
    """The blocks and the last norm."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GLMBlock(config, index) for index in range(config.num_layers))
        self.final_layernorm = RMSNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.final_layernorm(hidden_states)


class Embedding(nn.Module):
    """Holds the word embeddings under their published name."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.padded_vocab_size or 0, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids)


class ChatGLMPreTrainedModel(PreTrainedModel):
    """What transformers asks of a family."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["GLMBlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_pos_emb\.inv_freq"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type]] = {"hidden_states": GLMBlock, "attentions": SelfAttention}


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embeddings, blocks and, as in the published files, the output layer, which the head on top calls."""

    output_layer: nn.Module | None

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        config.check()
        self.embedding = Embedding(config)
        self.rotary_pos_emb = RotaryEmbedding(config)
        self.encoder = GLMTransformer(config)
        self.output_layer = nn.Linear(config.hidden_size, config.padded_vocab_size or 0, bias=False)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding.word_embeddings = value  # type: ignore[assignment]

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids [B, T] or inputs_embeds [B, T, H], attention_mask [B, S], position_ids [B, T]: hidden states [B, T, H].

        Without position_ids, tokens are counted by their places from the cache on, as in transformers' other decoders.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("ChatGLMModel: expected either input_ids or inputs_embeds, got both or neither.")
        hidden_states: Any = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = self.encoder(
            hidden_states,
            attention_mask=mask,
            position_embeddings=self.rotary_pos_emb(hidden_states, position_ids),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, past_key_values=past_key_values)


class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, GenerationMixin):
    """The causal language model, under its published name."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"
    }

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.transformer.output_layer = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `ChatGLMModel`, and labels [B, T] (shifted here, -100 ignored): logits [B, T, V] and the loss."""
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.transformer.output_layer(kept)  # type: ignore[misc]
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ChatGLMForSequenceClassification(GenericForSequenceClassification, ChatGLMPreTrainedModel):
    """A linear head on each row's last token, by transformers' own recipe for decoders; there is no output layer."""

    base_model_prefix = "transformer"
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"rotary_pos_emb\.inv_freq", r"output_layer\.weight"]

    def __init__(self, config: ChatGLMConfig) -> None:
        ChatGLMPreTrainedModel.__init__(self, config)  # type: ignore[call-arg]
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config)
        self.transformer.output_layer = None
        self.score = nn.Linear(config.hidden_size, config.num_labels or 0, bias=False)
        self.post_init()


def register() -> None:
    """Tell transformers' auto classes: `AutoModel` gives the language model, as the published files ask. Repeatable.

    A registered class goes before a checkpoint's remote code, with and without `trust_remote_code`.
    """
    t.AutoConfig.register(ChatGLMConfig.model_type, ChatGLMConfig, exist_ok=True)
    for auto in (t.AutoModel, t.AutoModelForCausalLM, t.AutoModelForSeq2SeqLM):
        auto.register(ChatGLMConfig, ChatGLMForConditionalGeneration, exist_ok=True)
    t.AutoModelForSequenceClassification.register(ChatGLMConfig, ChatGLMForSequenceClassification, exist_ok=True)
    # By this table of names `Trainer` knows whose labels are shifted (under label smoothing).
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ChatGLMConfig.model_type] = ChatGLMForConditionalGeneration.__name__
