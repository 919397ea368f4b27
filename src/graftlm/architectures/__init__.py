"""Facts about model families: what layers are called, what shapes attention keeps, how positions are counted.

Importing this package registers ChatGLM, which transformers itself does not have.
"""

from . import chatglm, chatglm_tokenizer
from .attention import attention_modules, encoder_kv_shapes, kv_shapes, self_attention_call
from .blocks import block_sites
from .facts import (
    LORA_TARGETS,
    Targets,
    backbone_embeddings,
    counts_from_ids,
    counts_from_mask,
    default_targets,
    end_ids,
    finds_features_by_embedding,
    has_image_positions,
    is_encoder_decoder,
    is_plain,
    model_dims,
    model_type,
    pools_first_token,
    pools_last_token,
    position_offset,
    position_room,
    position_table,
    position_tables,
    sums_up_mask,
    takes_position_ids,
    target_family,
    token_embeddings,
)
from .per_layer import blank_ids, per_layer_inputs, per_layer_table
from .walk import base_modules, clean_path, held_parameters, innermost, replace_module

__all__ = [
    "LORA_TARGETS",
    "Targets",
    "attention_modules",
    "backbone_embeddings",
    "base_modules",
    "blank_ids",
    "block_sites",
    "clean_path",
    "counts_from_ids",
    "counts_from_mask",
    "default_targets",
    "end_ids",
    "encoder_kv_shapes",
    "finds_features_by_embedding",
    "has_image_positions",
    "held_parameters",
    "innermost",
    "is_encoder_decoder",
    "is_plain",
    "kv_shapes",
    "model_dims",
    "model_type",
    "per_layer_inputs",
    "per_layer_table",
    "pools_first_token",
    "pools_last_token",
    "position_offset",
    "position_room",
    "position_table",
    "position_tables",
    "replace_module",
    "self_attention_call",
    "sums_up_mask",
    "takes_position_ids",
    "token_embeddings",
    "target_family",
]

chatglm.register()
chatglm_tokenizer.register_tokenizer(chatglm.ChatGLMConfig)
