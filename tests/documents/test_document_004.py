"""Document 004: LoRA on an OPT with English quotes, and QLoRA on a ChatGLM3 with advertising copy.

On a CPU, with small random models in the published layout; ChatGLM3's folder names remote code, which must not run.
Left out of the lines: `fp16=True` where results are compared (it rounds), and what transformers 5 took away
(`load_in_8bit=` of `from_pretrained`, `warmup_ratio`).
"""

import os

import pytest
import torch
from chatglm_files import model_config, tokenizer_folder
from document_runner import files, losses
from safetensors.torch import load_file
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

import graftlm
from graftlm.architectures.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from graftlm.architectures.chatglm_tokenizer import ChatGLMTokenizer

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
LORA = {
    # transformers 5 reads the tokenizer's own class from its folder
    "from transformers import GPT2Tokenizer, OPTForCausalLM": "from transformers import AutoTokenizer, OPTForCausalLM",
    "GPT2Tokenizer.from_pretrained": "AutoTokenizer.from_pretrained",
    ", load_in_8bit=True": "",
    'tokenizer(text, return_tensors="pt").to(0)\noutputs': 'tokenizer(text, return_tensors="pt")\noutputs',
    'tokenizer(text, return_tensors="pt").to(0)\nout =': 'tokenizer(text, return_tensors="pt")\nout =',
    "    fp16=True, ": "    use_cpu=True, ",
    "learning_rate=2e-4": "learning_rate=5e-3",
    "logging_steps=20": "logging_steps=1",
    "max_steps=100": "max_steps=12",
    "range(num_examples)": "range(3)",
}
QLORA = {
    "learning_rate=1e-3,": "learning_rate=2e-2,",
    "warmup_ratio=0.1,": "warmup_steps=0.1,",
    "fp16=True,": "use_cpu=True, save_steps=3,",
    "gradient_accumulation_steps=8,": "gradient_accumulation_steps=2,",
    "logging_steps=100,": "logging_steps=1,",
    "trainer.train()": "trainer.train(resume_from_checkpoint=resume_from_checkpoint)",
}
UNQUANTISED = QLORA | {"quantization_config=q_config, ": ""}
CHATGLM = {
    "num_layers": 2, "padded_vocab_size": 1536, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16,
    "num_attention_heads": 4, "multi_query_group_num": 2, "seq_length": 2048, "initializer_range": 0.1,
}  # fmt: skip
LAYER = "base_model.model.transformer.encoder.layers.{}.self_attention.query_key_value.lora_{}.weight"


def start(model):
    """The same start values for both libraries, which draw LoRA's A differently from one seed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_A" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


SAME_START = {"\nmodel = get_peft_model(model, config)": "\nmodel = start(get_peft_model(model, config))"}
UNQUANTISED["get_peft_model(kbit_model, lora_config)"] = "start(get_peft_model(kbit_model, lora_config))"


@pytest.fixture(scope="module")
def models(workplace, base, tmp_path_factory):
    """A small OPT and a small ChatGLM3, with the documents' names."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    OPTForCausalLM(OPTConfig(vocab_size=16_384, **sizes, **SPECIAL)).save_pretrained(folder / "opt")
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "opt")
    ChatGLMForConditionalGeneration(ChatGLMConfig(**CHATGLM)).save_pretrained(folder / "chatglm")
    model_config(tokenizer_folder(folder / "chatglm"), **CHATGLM)
    workplace.model("facebook/opt-6.7b", folder / "opt")
    workplace.model("zai-org/chatglm3-6b", folder / "chatglm")


def qlora(workplace, replace, library="graftlm"):
    return workplace.run("document_004_qlora", library, replace, start=start)


def test_lora_on_opt(workplace, models):
    with pytest.warns(UserWarning, match="'fc_in'.*'fc1'.*'fc_out'"):
        outcome = workplace.run("document_004_lora", replace=LORA)
    assert "Generated Text: " in outcome.printed and "GB" in outcome.printed
    line = next(x for x in outcome.printed.splitlines() if x.startswith("trainable params"))
    assert line.startswith(f"trainable params: {2 * 4 * 8 * (64 + 64):,} ")  # 2 layers, 4 projections, rank 8
    logged = losses(outcome.trainer)
    assert len(logged) == 12 and sum(logged[-4:]) < sum(logged[:4])
    names = files(outcome.save_path)
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}

    base = OPTForCausalLM.from_pretrained(outcome.model_id)
    reloaded = graftlm.PeftModel.from_pretrained(base, outcome.save_path)
    with torch.no_grad():
        trained = outcome.model.eval()(**outcome.inputs).logits
        torch.testing.assert_close(reloaded(**outcome.inputs).logits, trained)
        with reloaded.disable_adapter():
            assert not torch.allclose(reloaded(**outcome.inputs).logits, trained, atol=1e-3)


def test_lora_on_opt_follows_hf_peft(workplace, models):
    """In batches of one, without padding; without dropout, the base's too, whose masks are drawn in another way."""
    undropped = {", load_in_8bit=True": ", dropout=0.0", "lora_dropout=0.05": "lora_dropout=0.0"}
    alone = LORA | SAME_START | undropped | {"per_device_train_batch_size=4": "per_device_train_batch_size=1"}
    ours, theirs = (workplace.run("document_004_lora", library, alone, start=start) for library in ("graftlm", "peft"))
    assert next(x for x in ours.printed.splitlines() if x.startswith("trainable params")) in theirs.printed
    assert losses(ours.trainer) == pytest.approx(losses(theirs.trainer), abs=2e-3)


def test_half_precision_of_the_document_on_a_cpu(workplace, models):
    """`fp16=True` trains on a CPU as well (autocast without a gradient scaler)."""
    half = LORA | {"    fp16=True, ": "    fp16=True, use_cpu=True, ", "max_steps=100": "max_steps=2"}
    outcome = workplace.run("document_004_lora", replace=half)
    assert len(losses(outcome.trainer)) == 2 and all(x < 20 for x in losses(outcome.trainer))


def test_int8_base(workplace, models):
    int8 = {
        "from transformers import GPT2Tokenizer, OPTForCausalLM": (
            "from transformers import AutoTokenizer, BitsAndBytesConfig, OPTForCausalLM"
        ),
        ", load_in_8bit=True": ', quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"',
        "max_steps=100": "max_steps=4",
    }
    outcome = workplace.run("document_004_lora", replace=LORA | int8)
    assert outcome.model.get_base_model().model.decoder.layers[0].fc1.weight.dtype == torch.int8
    assert len(losses(outcome.trainer)) == 4
    assert "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight" in load_file(
        f"{outcome.save_path}/adapter_model.safetensors"
    )


def test_qlora_workflow_unquantised(workplace, models):
    whole = qlora(workplace, UNQUANTISED)
    assert type(whole.tokenizer) is ChatGLMTokenizer and type(whole.model) is ChatGLMForConditionalGeneration
    assert whole.target_modules == ["query_key_value"]
    logged = losses(whole.trainer)
    assert (
        len(logged) == 7
        and sum(logged[-2:]) < sum(logged[:2]) - 0.3
        and whole.tokenized_dataset.column_names == ["input_ids", "labels"]
    )
    row = whole.tokenized_dataset[0]
    assert whole.tokenizer.convert_ids_to_tokens(row["input_ids"][:2]) == ["[gMASK]", "sop"]
    assert row["input_ids"][-1] == row["labels"][-1] == whole.tokenizer.eos_token_id
    batch = whole.data_collator([whole.tokenized_dataset[i] for i in range(6)])
    lengths = (batch["input_ids"] != whole.tokenizer.pad_token_id).sum(1)
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)

    steps = whole.trainer.state.global_step
    trained = load_file(f"{whole.save_path}/checkpoint-{steps}/adapter_model.safetensors")
    assert set(trained) == {LAYER.format(layer, half) for layer in range(2) for half in "AB"}
    os.rename(f"{whole.save_path}/checkpoint-3", "interrupted")
    resumed = UNQUANTISED | {"resume_from_checkpoint = None ": "resume_from_checkpoint = 'interrupted' "}
    again = qlora(workplace, resumed)
    assert again.trainer.state.global_step == steps
    assert losses(again.trainer) == pytest.approx(logged, abs=1e-6)
    for key, value in load_file(f"{again.save_path}/checkpoint-{steps}/adapter_model.safetensors").items():
        torch.testing.assert_close(value, trained[key])

    still = UNQUANTISED | {"lora_dropout = 0.05": "lora_dropout = 0.0"}
    ours, theirs = (losses(qlora(workplace, still, library).trainer) for library in ("graftlm", "peft"))
    assert ours == pytest.approx(theirs, abs=5e-3)


def test_nf4_base(workplace, models):
    outcome = qlora(
        workplace,
        QLORA | {"num_train_epochs=1,": "max_steps=3,", "per_device_train_batch_size=6": "per_device_train_batch_size=2"},
    )
    weight = outcome.qlora_model.get_base_model().transformer.encoder.layers[0].mlp.dense_h_to_4h.weight
    assert weight.dtype == torch.uint8 and weight.numel() == 64 * 2 * 96 // 2
    logged = losses(outcome.trainer)
    assert len(logged) == 3 and all(x > 0 for x in logged)
    assert files(f"{outcome.save_path}/checkpoint-3") >= {"adapter_config.json", "adapter_model.safetensors"}
    kept = load_file(f"{outcome.save_path}/checkpoint-3/adapter_model.safetensors")
    assert set(kept) == {LAYER.format(layer, half) for layer in range(2) for half in "AB"}
    assert all(t.is_floating_point() for t in kept.values())

    model, tokenizer = outcome.qlora_model.eval(), outcome.tokenizer
    rows = [row["content"] for row in outcome.dataset["test"].select(range(3))]
    with torch.no_grad():
        for side in ("left", "right"):
            batch = tokenizer(rows, padding=True, padding_side=side, return_tensors="pt")
            logits = model(**batch).logits
            for i, text in enumerate(rows):
                alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
                torch.testing.assert_close(logits[i][batch["attention_mask"][i].bool()], alone, atol=1e-3, rtol=0)
    batch = tokenizer(rows, padding=True, return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=4)
    assert all(isinstance(text, str) for text in tokenizer.batch_decode(written, skip_special_tokens=True))
