"""`graftlm export`: what is written for vLLM, llama.cpp and Ollama, read back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import SHAPE, VOCABULARY, write_gguf
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import graftlm
from graftlm import gguf
from graftlm.bundled import base_path
from graftlm.errors import UnsupportedError
from graftlm.exporting import ollama
from graftlm.exporting.vocabulary import rule_of, vocabulary

SMALL: dict[str, Any] = {"vocab_size": len(VOCABULARY), "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
ROPE = {"rope_theta": 5e3, "rope_type": "default"}
BASES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE | SMALL, tie_word_embeddings=False)),
    "wide heads": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE | SMALL | {"head_dim": 32}, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE | SMALL, rope_parameters=ROPE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=64, n_layer=2, n_head=4, n_positions=128)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(**SMALL, hidden_size=64, n_layer=2, n_head=4)),
}  # fmt: skip
IDS = torch.tensor([[5, 9, 100, 7, 33, 264]])


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    return gguf.read(write_gguf(folder / "tiny.gguf"), tmp_path_factory.mktemp("empty"))[1]


@pytest.fixture
def made(tmp_path: Path, words: Any) -> Any:
    """Saves a base of a family and an adapter of it: their folders."""

    def make(family: str, config: Any) -> tuple[Path, Path]:
        torch.manual_seed(0)
        model = BASES[family]().eval()
        with torch.no_grad():
            for value in model.parameters():
                if value.dim() == 1:
                    value.add_(torch.randn_like(value) * 0.1)
        model.save_pretrained(tmp_path / "base")
        words.save_pretrained(tmp_path / "base")
        wrapped = graftlm.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config)
        with torch.no_grad():
            for _, value in wrapped.adapter_parameters("default"):
                value.add_(torch.randn_like(value) * 0.2)
        wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "base", tmp_path / "adapter"

    return make


def lora(**more: Any) -> Any:
    return graftlm.LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"} | more)


def adapted(base: Path, adapter: Path) -> Any:
    return graftlm.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def done(result: Any) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(result: Any) -> str:
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


# -- gguf ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BASES)
def test_gguf_of_a_family_gives_the_adapters_logits(cli, made, tmp_path, family, monkeypatch):
    base, adapter = made(family, lora())
    monkeypatch.chdir(tmp_path)  # as users write it: an output below the folder that they are in
    said = done(cli("export", adapter, "--to", "gguf", "-b", base, "-o", "out"))
    assert "Read back: weights and tokens the same" in said
    rule = "qwen2" if family == "qwen2" else "smollm"  # transformers gives a Qwen2 its own, whatever its files say
    assert f"texts split as {rule!r}" in said
    (tmp_path / "empty").mkdir()
    model, words = gguf.read(tmp_path / "out" / "model.gguf", tmp_path / "empty")
    assert model.config.model_type == BASES[family]().config.model_type and model.dtype == torch.float32
    with torch.no_grad():
        wanted = adapted(base, adapter)(IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(base)(IDS).logits
        got = model.eval()(IDS).logits
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max() < 0.1 * (plain - wanted).abs().max()
    own = AutoTokenizer.from_pretrained(base)
    assert words.chat_template == own.chat_template and words.eos_token_id == own.eos_token_id == 2
    for text in ("hello hell  12", "<|im_start|>user\nhé🙂<|im_end|>"):
        assert words(text).input_ids == own(text).input_ids


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 10), ("bfloat16", 7)])
def test_gguf_rounds_to_its_dtype_and_no_further(cli, made, tmp_path, dtype, bits):
    base, adapter = made("llama", lora())
    done(cli("export", adapter, "--to", "gguf", "-b", base, "-o", tmp_path / "out", "--dtype", dtype))
    (tmp_path / "empty").mkdir()
    model, _ = gguf.read(tmp_path / "out" / "model.gguf", tmp_path / "empty")
    wanted = adapted(base, adapter).merge_and_unload().state_dict()
    moved = 0.0
    for key, value in model.state_dict().items():
        assert ((value.float() - wanted[key]).abs() <= wanted[key].abs() * 2.0 ** -(bits + 1) + 2**-24).all(), key
        moved = max(moved, (value.float() - wanted[key]).abs().max().item())
    assert moved > 0


def test_what_gguf_refuses(cli, made, adapters, base, tmp_path):
    assert "it is no change of weights" in refused(
        cli("export", adapters["prompt"], "--to", "gguf", "-b", base, "-o", tmp_path / "out")
    )
    # the bundled tokenizer has a rule of its own
    assert "by none of the rules of llama.cpp" in refused(
        cli("export", adapters["lora"], "--to", "gguf", "-b", base, "-o", tmp_path / "out")
    )
    assert not (tmp_path / "out" / "model.gguf").exists()
    own, adapter = made("llama", lora())
    for change, told in (
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "Scaled positions"),
    ):
        about = json.loads((own / "config.json").read_text())
        (tmp_path / "other").mkdir(exist_ok=True)
        for file in own.iterdir():
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
        (tmp_path / "other" / "config.json").write_text(json.dumps(about | change))
        out = tmp_path / f"out-{told[:3]}"
        asked = ("export", adapter, "--to", "gguf", "-b", tmp_path / "other", "-o", out, "--allow-base-mismatch")
        assert told in refused(cli(*asked)) and not (out / "model.gguf").exists()
    opt = adapter, "-b", own, "-o", tmp_path / "new"
    assert "expected one of vllm, gguf, ollama" in refused(cli("export", *opt, "--to", "ggml"))
    assert "--rank is for vllm" in refused(cli("export", *opt, "--to", "gguf", "--rank", "4"))
    assert "--dtype is for gguf" in refused(cli("export", *opt, "--to", "vllm", "--dtype", "float16"))
    assert "expected auto, float32" in refused(cli("export", *opt, "--to", "gguf", "--dtype", "int4"))
    assert "not an empty directory" in refused(cli("export", adapter, "-b", own, "-o", own, "--to", "gguf"))


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "bloom", "qwen2", "llama-bpe", "tekken", "gpt-4o"])
def test_rules_are_told_apart(rule):
    assert rule_of(gguf.splitting(rule)) == rule


def test_a_file_that_is_read_back_otherwise_is_thrown_away(made, words, tmp_path, monkeypatch):
    from graftlm.errors import CheckpointError
    from graftlm.exporting import gguf_file, weights

    model = AutoModelForCausalLM.from_pretrained(made("llama", lora())[0])
    monkeypatch.setattr(weights, "laid_out", lambda config, key, value: value)
    with pytest.raises(CheckpointError, match="has other weights"):
        gguf_file.write_gguf(model, words, tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_tokenizers_that_a_file_cannot_hold(words):
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(UnsupportedError, match="has ids up to"):
        vocabulary(words, len(VOCABULARY) - 1)
    assert vocabulary(words, len(VOCABULARY) + 2).tokens[-2:] == [f"[PAD{len(VOCABULARY)}]", f"[PAD{len(VOCABULARY) + 1}]"]
    with pytest.raises(UnsupportedError, match="is WordLevel"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))), 1)
    lower = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(words.backend_tokenizer.to_str()))
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UnsupportedError, match="normalizer Lowercase"):
        vocabulary(lower, len(VOCABULARY))


# -- vllm ----------------------------------------------------------------------------------------------------------------


def test_plain_lora_for_vllm_is_copied(cli, made, tmp_path):
    base, adapter = made("llama", lora(lora_alpha=6))
    said = done(cli("export", adapter, "--to", "vllm", "-b", base, "-o", tmp_path / "out"))
    assert "--enable-lora --max-lora-rank 8 --lora-modules out=out" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    one, other = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "out"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert torch.equal(adapted(base, adapter)(IDS).logits, adapted(base, tmp_path / "out")(IDS).logits)
    assert "leave --rank out" in refused(
        cli("export", adapter, "--to", "vllm", "-b", base, "-o", tmp_path / "new", "-r", "2")
    )


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (lora(use_dora=True), "is DoRA"),
        (lora(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (lora(init_lora_weights="pissa"), "starts from values of the base"),
        (graftlm.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_weights=False), "is LOHA"),
    ],
    ids=["dora", "pattern", "pissa", "loha"],
)
def test_other_methods_for_vllm_need_a_rank_and_become_lora(cli, made, tmp_path, config, told):
    base, adapter = made("llama", config)
    asked = ("export", adapter, "--to", "vllm", "-b", base, "-o", tmp_path / "out")
    said = refused(cli(*asked))
    assert told in said and "Pass --rank" in said and not (tmp_path / "out").exists()
    said = done(cli(*asked, "--rank", "32"))
    assert "as LoRA of rank 32; relative error" in said and "--max-lora-rank 32" in said
    about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["lora_alpha"], about["use_dora"]) == ("LORA", 32, 32, False)
    assert not about["rank_pattern"] and not about["alpha_pattern"] and about["init_lora_weights"] is True
    scales = {
        value.shape[0] for key, value in load_file(tmp_path / "out" / "adapter_model.safetensors").items() if "lora_A" in key
    }
    assert scales == {32}
    with torch.no_grad():
        wanted, got = (adapted(base, f)(IDS).logits for f in (adapter, tmp_path / "out"))
        moved = (wanted - AutoModelForCausalLM.from_pretrained(base)(IDS).logits).abs().max()
    assert (got - wanted).abs().max() < (0.7 if told == "is DoRA" else 1e-3) * moved


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (lora(modules_to_save=["lm_head"], target_modules=["q_proj"]), "modules_to_save"),
        (lora(bias="all"), "bias"),
        (lora(alora_invocation_tokens=[5]), "alora_invocation_tokens"),
        (graftlm.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "graftlm serve"),
        (graftlm.BottleneckConfig(task_type="CAUSAL_LM"), "graftlm serve"),
    ],
    ids=["saved", "bias", "alora", "prefix", "bottleneck"],
)
def test_what_vllm_has_no_place_for(cli, made, tmp_path, config, told):
    base, adapter = made("llama", config)
    for more in ((), ("--rank", "8")):
        assert told in refused(cli("export", adapter, "--to", "vllm", "-b", base, "-o", tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [graftlm.PromptTuningConfig, graftlm.PromptEncoderConfig])
def test_virtual_tokens_for_vllm_by_the_lines_of_the_readme(cli, made, tmp_path, monkeypatch, config):
    base, adapter = made("bloom", config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert "3 virtual tokens" in done(cli("export", adapter, "--to", "vllm", "-b", base, "-o", tmp_path / "out"))
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "--enable-prompt-embeds" in readme
    first, second = re.findall(r"```python\n(.*?)```", readme, re.S)
    monkeypatch.chdir(tmp_path / "out")
    lines: dict[str, Any] = {}
    exec(first, lines)
    embeds = lines["prompt_embeds"]("hello 12")
    ids = AutoTokenizer.from_pretrained(base)("hello 12", return_tensors="pt")
    with torch.no_grad():
        wanted = adapted(base, adapter)(**ids).logits
        got = AutoModelForCausalLM.from_pretrained(base)(inputs_embeds=embeds[None]).logits
    torch.testing.assert_close(got[:, -wanted.shape[1] :], wanted, atol=1e-5, rtol=1e-5)
    asked: list[dict[str, Any]] = []

    class Client:
        def __init__(self, **_: Any) -> None:
            self.completions = self
            self.choices = [type("Choice", (), {"text": "ok"})]

        def create(self, **body: Any) -> Any:
            asked.append(body)
            return self

    monkeypatch.setattr("openai.OpenAI", Client)
    exec(second, lines)
    import base64
    import io

    sent = torch.load(io.BytesIO(base64.b64decode(asked[0]["extra_body"]["prompt_embeds"])), weights_only=True)
    assert torch.equal(sent, lines["prompt_embeds"]("Hello"))
    assert "has no rank" in refused(cli("export", adapter, "--to", "vllm", "-b", base, "-o", tmp_path / "new", "-r", "8"))


# -- ollama --------------------------------------------------------------------------------------------------------------


def test_modelfile(cli, made, tmp_path):
    base, adapter = made("llama", lora())
    said = done(cli("export", adapter, "--to", "ollama", "-b", base, "-o", tmp_path / "out"))
    assert "in the ChatML form" in said and "ollama create out" in said
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n") and (tmp_path / "out" / "model.gguf").is_file()
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER num_ctx 256" in text
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.S)
    assert template and go(template[1], ollama.TALK) == AutoTokenizer.from_pretrained(base).apply_chat_template(
        ollama.TALK, tokenize=False, add_generation_prompt=True
    )


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go makes of the few constructs that the Modelfiles use."""
    assert "{{-" not in template and "-}}" not in template  # these would take line breaks away
    body, opening = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S).groups()
    text = ""
    for message in messages:
        turn = body
        if "if eq" in body:
            marks = r"\{\{ (?:if|else if) eq \.Role \"(\w+)\" \}\}|\{\{ else \}\}|\{\{ end \}\}"
            parts = re.split(marks, body)
            assert parts[0] == parts[-1] == ""
            cases = {role or "assistant": said for role, said in zip(parts[1:-2:2], parts[2:-1:2], strict=True)}
            turn = cases[message["role"]]
        text += turn.replace("{{ .Role }}", message["role"]).replace("{{ .Content }}", message["content"])
    return text + opening


@pytest.mark.parametrize("form", [*ollama.FORMS, ollama.plain("</s>")], ids=lambda f: f.name)
def test_forms_are_the_same_in_go(form):
    assert go(form.go, ollama.TALK) == form.render(ollama.TALK)


def test_forms_are_recognised(words):
    from graftlm.data.chat import render_chat

    words = AutoTokenizer.from_pretrained(base_path())
    assert ollama.recognised(words)[0].render(ollama.TALK) == render_chat(ollama.TALK, words)
    chatml = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    words.chat_template = chatml
    form, system = ollama.recognised(words)
    assert (form.name, system) == ("ChatML", "Be kind.")
    assert 'SYSTEM """Be kind."""' in ollama.modelfile("m.gguf", words, None)[0]
    words.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{ m['content'] + '<|eot_id|>' }}"
        "{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    )
    form, _ = ollama.recognised(words)
    assert form.name == "Llama 3" and form.go.startswith("<s>{{ range")  # the tokenizer does not set it
    for other in (
        chatml.replace("Be kind.<|im_end|>", "Be kind."),
        "{{ raise_exception('no') }}",
        "{{ messages[0].content }}",
    ):
        words.chat_template = other
        text, note = ollama.modelfile("m.gguf", words, None)
        assert ollama.recognised(words) == (None, None)
        assert "no form that is known here" in note and 'TEMPLATE """' not in text
