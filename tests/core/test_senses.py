"""transformers' models that see and hear, under every method that changes layers: run, train, save, reload, mix, merge."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from helpers import close, pairs, randomise, state_of
from test_wrapper import SENSES, sensing
from torch import Tensor, nn

import graftlm
from graftlm.errors import UnsupportedError
from graftlm.layers import Adapted

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_SIZES, "vocab_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1}
_EYES = {**_SIZES, "image_size": 8, "patch_size": 4}
_IDS = torch.tensor([[1, 60, 60, 60, 60, 7, 8], [1, 60, 60, 60, 60, 9, 5]])
_IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def clip() -> nn.Module:
    text = t.CLIPTextConfig(
        **_SIZES, vocab_size=64, max_position_embeddings=16, eos_token_id=2, bos_token_id=1, pad_token_id=0
    )
    return t.CLIPModel(t.CLIPConfig(text_config=text.to_dict(), vision_config=t.CLIPVisionConfig(**_EYES).to_dict()))


def llava() -> nn.Module:
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(text_config=t.LlamaConfig(**_TEXT), vision_config=t.CLIPVisionConfig(**_EYES), image_token_id=60)
    )


def paligemma() -> nn.Module:
    text = t.GemmaConfig(**_TEXT, head_dim=8)
    config = t.PaliGemmaConfig(
        text_config=text.to_dict() | {"model_type": "gemma"}, image_token_id=60, projection_dim=32, hidden_size=32,
        vision_config=t.SiglipVisionConfig(**_EYES).to_dict() | {"model_type": "siglip_vision_model"},
    )  # fmt: skip
    return t.PaliGemmaForConditionalGeneration(config)


# model, inputs, what is compared, layers by kind: the feed-forward half's last one last
MODELS: dict[str, tuple[Any, dict[str, Any], str, list[str]]] = {
    "clip": (clip, {"input_ids": torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2]]), "pixel_values": _IMAGES}, "logits_per_image",
             ["patch_embedding", "q_proj", "fc2"]),
    "llava": (llava, {"input_ids": _IDS, "pixel_values": _IMAGES}, "logits", ["patch_embedding", "v_proj", "fc2"]),
    "paligemma": (paligemma, {"input_ids": _IDS, "pixel_values": _IMAGES, "token_type_ids": 0 * _IDS}, "logits",
                  ["patch_embedding", "q_proj", "down_proj"]),
}  # fmt: skip
LAYERS = {
    "whisper": ["conv1", "q_proj", "fc2"], "speech2text": ["conv_layers.0", "q_proj", "fc2"],
    "wav2vec2": ["conv_layers.1.conv", "v_proj", "output_dense"], "vit": ["projection", "q_proj", "fc2"],
}  # fmt: skip
NAMES = [*SENSES, *MODELS]
METHODS: dict[str, Any] = {
    "lora": lambda layers: graftlm.LoraConfig(r=4, lora_alpha=8, target_modules=layers),
    "dora": lambda layers: graftlm.LoraConfig(r=4, target_modules=layers, use_dora=True),
    "ia3": lambda layers: graftlm.IA3Config(target_modules=layers, feedforward_modules=layers[-1:]),
    "loha": lambda layers: graftlm.LoHaConfig(r=3, target_modules=layers),
}


def base_of(name: str) -> tuple[nn.Module, dict[str, Any]]:
    if name in SENSES:
        base, inputs = sensing(name)
        halves = name in ("whisper", "speech2text")
        return base, inputs | ({"decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])} if halves else {})
    torch.manual_seed(0)
    base = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return base, dict(MODELS[name][1])


def output(name: str, model: Any, inputs: dict[str, Any], **more: Any) -> Tensor:
    return model(**inputs, **more)[MODELS[name][2] if name in MODELS else "logits"]


def layers_of(name: str) -> list[str]:
    return MODELS[name][3] if name in MODELS else LAYERS[name]


@pytest.mark.parametrize(("name", "method"), pairs(NAMES, METHODS))
def test_every_layer_method(name: str, method: str, tmp_path: Path) -> None:
    base, inputs = base_of(name)
    plain, keys = output(name, base, inputs).detach(), state_of(base).keys()
    model = graftlm.get_peft_model(base, METHODS[method](layers_of(name))).eval()
    kinds = {m.frozen.kind for m in model.modules() if isinstance(m, Adapted)}
    assert kinds == {"conv", "linear"}
    randomise(model, scale=0.2)
    found = output(name, model, inputs)
    assert (found - plain).abs().max() > 1e-4
    found.square().mean().backward()
    trained = [p for _, p in model.adapter_parameters("default")]
    moved = sum(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in trained)
    assert moved >= len(trained) * (0.7 if name == "llava" else 0.9)  # it reads the last but one layer of its eyes
    torch.optim.SGD(trained, lr=1e-3).step()
    model.requires_grad_(False)
    wanted = output(name, model, inputs)
    model.save_pretrained(tmp_path)
    again = graftlm.PeftModel.from_pretrained(base_of(name)[0], tmp_path)
    close(output(name, again, inputs), wanted)
    with model.disable_adapter():
        close(output(name, model, inputs), plain)
    model.merge_adapter()
    close(output(name, model, inputs), wanted, 1e-4)
    model.unmerge_adapter()
    close(output(name, model, inputs), wanted, 0)
    merged = model.merge_and_unload()
    close(output(name, merged, inputs), wanted, 1e-4)
    assert state_of(merged).keys() == keys


@pytest.mark.parametrize("name", ["vit", "wav2vec2", "whisper", "speech2text", "llava"])
def test_mixed_rows(name: str) -> None:
    """Each row as alone; where a model reads no tokens, that is tried out on the batch itself."""
    base, inputs = base_of(name)
    model = graftlm.get_peft_model(base, METHODS["lora"](layers_of(name))).eval()
    randomise(model, scale=0.2)
    model.add_adapter("second", METHODS["loha"](layers_of(name)))
    model.set_adapter("second")
    randomise(model, scale=0.2)
    for rows in (["default", "second"], ["__base__", "default"]):
        mixed = output(name, model, inputs, adapter_names=rows)
        for i, row in enumerate(rows):
            alone = output(name, model, {k: v[i : i + 1] for k, v in inputs.items()}, adapter_names=[row])
            close(mixed[i, : alone.shape[1]], alone[0], 2e-5)


def test_layers_that_are_read_and_not_called() -> None:
    """WavLM's attention gives its layers' weights to a function of torch's: that is said, since nothing would be trained."""
    config = t.WavLMConfig(
        **_SIZES, conv_dim=(16, 16), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2, vocab_size=32,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    base, sound = t.WavLMForCTC(config).eval(), torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    plain = base(sound).logits
    for method in METHODS:
        layers = ["v_proj", "output_dense"]
        with pytest.warns(
            UserWarning, match=r"everywhere this model's code reads the weight of v_proj \('wavlm.*; 2 in all"
        ):
            graftlm.get_peft_model(copy.deepcopy(base), METHODS[method](layers))
    with pytest.warns(UserWarning, match="reads the weight of v_proj"):
        model = randomise(graftlm.get_peft_model(base, METHODS["lora"](["v_proj"])), scale=0.3)
    close(model(sound).logits, plain, 0)


def test_layers_that_are_called_are_not_reported() -> None:
    for build in (lambda: base_of("wav2vec2")[0], lambda: base_of("llava")[0], clip):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*reads the weight.*")
            graftlm.get_peft_model(build(), graftlm.LoraConfig(target_modules="all-linear"))
    mamba = t.MambaForCausalLM(t.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4))
    with pytest.warns(UserWarning, match="with Mamba's kernels, on GPUs, this model's code reads the weight of out_proj"):
        graftlm.get_peft_model(mamba, graftlm.LoraConfig(target_modules=["out_proj"]))


def test_rows_that_meet_in_the_output() -> None:
    """CLIP compares every text with every image: no row of its output is of one adapter."""
    base, inputs = base_of("clip")
    model = graftlm.get_peft_model(base, METHODS["lora"](layers_of("clip"))).eval()
    with pytest.raises(UnsupportedError, match="[Rr]un one adapter a batch"):
        randomise(model, scale=0.2)(**inputs, adapter_names=["default", "__base__"])


def test_positions_of_sound_are_not_merged_into() -> None:
    """Wav2Vec2's convolution of positions computes its weight (weight norm): adapted, but not merged."""
    base, inputs = base_of("wav2vec2")
    model = graftlm.get_peft_model(base, graftlm.LoraConfig(r=4, target_modules=["pos_conv_embed.conv", "fc1", "q_proj"]))
    wanted = output("wav2vec2", randomise(model.eval(), scale=0.3), inputs)
    with pytest.raises(UnsupportedError, match="computes its weight at each pass"):
        model.merge_adapter()
    close(output("wav2vec2", model, inputs), wanted)
