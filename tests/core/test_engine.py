"""Training passes without padding and unlabelled logits against plain ones, in every family and with every method."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
import transformers as t
from accelerate.utils.operations import convert_to_fp32
from families import CAUSAL, SEQ2SEQ, VOCAB, batch, build
from helpers import CONFIGS, attach, cases, close, config, left_behind, on_flash, padded, pairs, randomise, rows, still
from torch import Tensor, nn

import graftlm
from graftlm.architectures import fast
from graftlm.architectures.gated import mlp_forward
from graftlm.errors import UnsupportedError
from graftlm.kernels import lora, varlen
from graftlm.passes.trial import Check

METHODS = ("lora", "prompt", "p_tuning_mlp", "prefix", "prefix_projection", "houlsby", "dora", "bias_all", "modules_to_save")
TOGETHER = (("prompt", "prefix"), ("prefix", "lora"), ("prompt", "lora"))
PADDED = {"falcon"}  # attention of its own: trained padded, with the labelled tokens' logits only


@pytest.fixture(autouse=True)
def as_if_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA by the function that large layers take; tiny ones take it too."""
    monkeypatch.setattr(lora, "_FEW", 0)


def trained(name: str, method: Any) -> graftlm.PeftModel:
    return attach(name, method, base=still(name)).train()


def ragged(side: str = "right", unlabelled: int = 2) -> dict[str, Tensor]:
    """Rows of different lengths with labels, the first few of each without."""
    inputs = padded(rows("llama", (9, 4, 6, 1, 8)), side)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    early = inputs["attention_mask"].cumsum(-1) <= unlabelled
    return inputs | {"labels": labels.masked_fill(early, -100)}


def pass_(model: Any, **inputs: Any) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Loss, gradients by name, output."""
    model.zero_grad()
    output = model(**inputs)
    output.loss.backward()
    return output.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, output


def unmade(output: Any) -> bool:
    """Whether an output's logits are still to be made."""
    return hasattr(output.loss, "logits_on_demand") and "_logits" not in vars(output)


def same(model: Any, tolerance: float = 1e-5, **inputs: Any) -> Any:
    """The short cuts' loss and gradients are the plain pass's; the short cuts' output is returned."""
    model.lean = False
    loss, gradients, plain = pass_(model, **inputs)
    model.lean = True
    own_loss, own, output = pass_(model, **inputs)
    close(own_loss, loss, tolerance)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert unmade(output) and not unmade(plain)
    return output, plain


@pytest.mark.parametrize(
    ("name", "method"),
    cases(CAUSAL, METHODS + TOGETHER, lambda n, m: n in ("bloom", "llama", "gpt2", "opt") or m == "prefix"),
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_gradients_and_logits(name: str, method: Any, side: str) -> None:
    if name == "falcon" and "prefix" in str(method) and side == "left":
        pytest.skip("Falcon rotates by place: a prefix before left padding raises")
    model, inputs = trained(name, method), ragged(side)
    output, plain = same(model, **inputs)
    real = inputs["attention_mask"].bool()
    width = real.shape[1]
    close(output.logits[:, -width:][real], plain.logits[:, -width:][real])
    assert output.logits.shape == plain.logits.shape
    assert model.can_pack() == (name not in PADDED)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", ("prompt", "prefix")])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_packed_rows_by_the_gpus_attention(name: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = on_flash(monkeypatch)
    model = trained(name, method)
    same(model, **ragged())
    assert model.can_pack() and calls


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("right", [True, False])
def test_a_gpus_attention_with_wrong_gradients_is_not_used(
    method: str, right: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    on_flash(monkeypatch)
    monkeypatch.setattr(Check, "tries_gradients", True)
    if not right:
        made = varlen.kernel()
        monkeypatch.setattr(varlen, "kernel", lambda: lambda *args, **kwargs: made(*args, **kwargs).detach())
    model = trained("llama", method)
    with caplog.at_level(logging.INFO, "graftlm.engine"):
        same(model, **ragged())
    assert model.can_pack() == right
    assert right or "packing changes its gradients" in caplog.text


@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", "modules_to_save"])
def test_encoder_decoder_models(name: str, method: str) -> None:
    model, inputs = trained(name, method), batch(name)
    inputs["labels"][0, 3:] = -100
    output, plain = same(model, **inputs)
    close(output.logits, plain.logits)
    assert not model.can_pack()


@pytest.mark.parametrize("method", ["prompt", "p_tuning_mlp", "lora"])
def test_embeddings_narrower_than_the_hidden_size(method: str) -> None:
    """OPT-350m projects its embeddings up: virtual tokens are packed beside tokens of the same width."""
    model = attach("opt", method, base=build("opt", word_embed_proj_dim=16, dropout=0.0)).train()
    inputs = ragged()
    output, plain = same(model, **inputs)
    assert model.can_pack()
    real, length = inputs["attention_mask"].bool(), inputs["labels"].shape[1]
    close(output.logits[:, -length:][real], plain.logits[:, -length:][real])


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("items", [5, torch.tensor(11)])
def test_loss_divided_by_the_items_of_an_update(method: str, items: Any) -> None:
    same(trained("bloom", method), **ragged(), num_items_in_batch=items)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_first_tokens_with_labels(method: str) -> None:
    """Right-padded rows: only a virtual token can predict the first one. On the left the plain model predicts it from the
    padding; that loss is kept, too."""
    model = trained("llama", method)
    for side in ("right", "left"):
        same(model, **ragged(side, unlabelled=0))


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_no_label_at_all_gives_nan_as_ever(method: str) -> None:
    inputs = ragged()
    inputs["labels"].fill_(-100)
    assert trained("bloom", method)(**inputs).loss.isnan()


@pytest.mark.parametrize("name", ["bloom", "llama", "opt"])
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix_projection", ("prompt", "prefix")])
def test_rows_that_hold_several_sequences(name: str, method: Any) -> None:
    """A packed row trains like its sequences in rows of their own."""
    model, sequences = trained(name, method), rows(name, (9, 4, 6, 8))
    apart = padded(sequences, "right")
    labels = apart["input_ids"].masked_fill((apart["attention_mask"] == 0) | (torch.arange(11) == 0), -100)
    packed = {
        "input_ids": torch.cat(sequences)[None],
        "position_ids": torch.cat([torch.arange(len(s)) for s in sequences])[None],
        "labels": torch.cat([torch.cat((torch.tensor([-100]), s[1:])) for s in sequences])[None],
    }
    loss, gradients, _ = pass_(model, **apart, labels=labels)
    own_loss, own, _ = pass_(model, **packed)
    close(own_loss, loss)
    for key, gradient in gradients.items():
        torch.testing.assert_close(own[key], gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bloom", "llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", "prefix_projection", ("prompt", "prefix")])
def test_activation_checkpointing_changes_nothing(name: str, method: Any) -> None:
    model, inputs = trained(name, method), ragged("left")
    loss, gradients, _ = pass_(model, **inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    own_loss, own, _ = pass_(model, **inputs)
    assert torch.equal(own_loss, loss)
    for key, gradient in gradients.items():
        close(own[key], gradient, 1e-6)


def test_activation_checkpointing_keeps_less() -> None:
    """Everything that the short cuts keep for the backward pass goes the way by which checkpointing drops it."""
    kept: dict[bool, int] = {}
    for checkpointing in (False, True):
        model = trained("bloom", "prefix")
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**ragged())  # the first pass tries things out
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: (s.append(x.numel()), x)[1], lambda x: x):
            model(**ragged())
        kept[checkpointing] = sum(sizes)
    assert kept[True] < 0.7 * kept[False]


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix", "houlsby"])
def test_bf16_base_with_fp32_adapters(method: str) -> None:
    model = attach("llama", method, base=still("llama").bfloat16()).train()
    model.lean = False
    loss, gradients, _ = pass_(model, **ragged())
    model.lean = True
    own_loss, own, _ = pass_(model, **ragged())
    assert model.can_pack()
    close(own_loss, loss, 2e-2)
    together, apart = (torch.cat([g[k].float().flatten() for k in sorted(g)]) for g in (own, gradients))
    assert (together - apart).norm() < 0.1 * apart.norm()
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)


def test_mixed_precision() -> None:
    model = trained("llama", "lora")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**ragged())
    model.lean = False
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(**ragged())
    assert unmade(output)
    close(output.loss, plain.loss, 2e-2)


# -- heads ---------------------------------------------------------------------------------------------------------------
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS: dict[str, Any] = {
    "softcap": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
    "scaled": lambda: t.CohereForCausalLM(t.CohereConfig(**SIZES, logit_scale=0.25)),
    "divided": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SIZES, logits_scaling=4.0)),
    "biased": lambda: t.PhiForCausalLM(t.PhiConfig(**SIZES)),
    "codegen": lambda: t.CodeGenForCausalLM(t.CodeGenConfig(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)),
    "tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mamba": lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4)),
    "experts": lambda: t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_local_experts=4)),
}  # fmt: skip
NOT_PACKED = {"softcap", "codegen", "mamba"}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_of_all_kinds(kind: str) -> None:
    torch.manual_seed(0)
    base = HEADS[kind]()
    for parameter in base.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.15)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    settings = graftlm.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model: Any = randomise(graftlm.get_peft_model(base, settings)).train()
    output, plain = same(model, **ragged())
    real = ragged()["attention_mask"].bool()
    close(output.logits[real], plain.logits[real])
    assert model.can_pack() == (kind not in NOT_PACKED)


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_trained_heads_are_trained(options: dict[str, Any]) -> None:
    settings = graftlm.LoraConfig(task_type="CAUSAL_LM", r=4, **options)
    model: Any = randomise(graftlm.get_peft_model(still("llama"), settings)).train()
    _, gradients, _ = pass_(model, **ragged())
    assert any("lm_head" in name for name in gradients)
    same(model, **ragged())
    with model.disable_adapter():
        assert model(**ragged()).loss.isfinite()


def test_a_base_without_language_model_head_is_left_alone() -> None:
    model = trained("bert", "lora")
    assert not unmade(model(**batch("bert")))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "chatglm"])
def test_gated_mlps_keep_less_and_compute_the_same(name: str) -> None:
    model = attach(name, "lora").train()
    mlps = [m for m in model.modules() if isinstance(m, fast.Fast) and type(m).__name__.endswith("MLP")]
    assert mlps, "no gated MLP was found"
    for mlp in mlps:
        x = torch.randn(2, 3, model.config.hidden_size)
        kept, results = [], []
        for forward in (mlp.forward, lambda x, m=mlp: m.plain_class.forward(m, x)):
            x = x.detach().requires_grad_()
            sizes: dict[int, int] = {}

            def pack(t: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
                return t

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                y = forward(x)
            kept.append(sum(sizes.values()))
            results.append((y.detach(), *torch.autograd.grad(y.sin().sum(), x)))
        assert kept[0] < kept[1]
        for ours, plain in zip(*results, strict=True):
            close(ours, plain, 1e-6)


class GatedMLP(nn.Module):
    """A gated MLP, or one that does something else in between."""

    def __init__(self, twist: str = "", limit: float = 0.0) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act = nn.Linear(8, 12), nn.Linear(6, 8), nn.SiLU()
        self.twist, self.limit = twist, limit

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        if self.twist == "swapped":
            gate, up = up, gate
        if self.twist == "clamped":
            up = up.clamp(-10, 10)
        made = self.act(gate) * up
        if self.twist == "dropped":
            made = nn.functional.dropout(made, 0.1, self.training)
        return self.down_proj(made + self.limit if self.limit else made)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("twist", ["swapped", "clamped", "dropped"])
def test_mlps_of_another_kind_are_left_alone(twist: str, training: bool) -> None:
    tried: dict = {}
    assert mlp_forward(GatedMLP().train(training), tried) is not None
    assert mlp_forward(GatedMLP(twist).train(training), tried) is None
    assert mlp_forward(GatedMLP(limit=1.0).train(training), tried) is None
    owner = GatedMLP()
    owner.scale = nn.Parameter(torch.ones(()))
    assert mlp_forward(owner, tried) is None
    assert owner.training and owner.act.training


@pytest.mark.parametrize("other", [nn.GELU, nn.Tanh])
def test_an_activation_that_is_exchanged_later_is_heeded(other: type[nn.Module]) -> None:
    model = attach("llama", "lora").train()
    mlp: Any = model.base.model.layers[0].mlp
    assert isinstance(mlp, fast.Fast)
    x, before = torch.randn(2, 3, model.config.hidden_size), mlp.act_fn
    mlp.act_fn = other()
    assert torch.equal(mlp(x), mlp.plain_class.forward(mlp, x))
    exchanged, mlp.act_fn = mlp(x), before
    assert not torch.allclose(mlp(x), exchanged)


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "opt", "bart"])
def test_dropout_of_the_base(name: str, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that drop are packed; a layer that is run again draws its masks again, with and without a gradient."""
    if large:
        monkeypatch.setattr(fast, "WORTH_A_MODE", 0)
    rates = {"gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3}}.get(name, {"dropout": 0.3})
    model = attach(name, "lora", base=build(name, **rates)).train()
    inputs = batch(name) if name in SEQ2SEQ else ragged()
    assert model.can_pack() == (name not in SEQ2SEQ)
    found = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        if options:
            model.gradient_checkpointing_enable(options)
        model(**inputs)
        torch.manual_seed(1)
        loss, gradients, _ = pass_(model, **inputs, use_cache=False)
        found.append((loss, torch.cat([g.flatten() for g in gradients.values()])))
    torch.manual_seed(2)
    assert pass_(model, **inputs, use_cache=False)[0] != found[0][0], "nothing was dropped"
    for loss, gradient in found[1:]:
        close(loss, found[0][0])
        close(gradient, found[0][1])
    model.eval()
    with torch.no_grad():
        assert torch.equal(*(model(**inputs).logits for _ in range(2)))


def test_sliding_windows_are_kept() -> None:
    """Sequences longer than the window are trained padded, with transformers' own mask."""
    torch.manual_seed(0)
    base = t.MistralForCausalLM(t.MistralConfig(**SIZES, sliding_window=6))
    model = randomise(graftlm.get_peft_model(base, config("lora", "mistral"))).train()
    for lengths in ((4, 5, 3), (20, 5, 3)):
        inputs = padded(rows("mistral", lengths), "right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        same(model, **inputs, labels=labels)


# -- what users see ------------------------------------------------------------------------------------------------------
def test_logits_are_lazy_and_carry_gradients() -> None:
    model = trained("bloom", "prompt")
    output = model(**ragged())
    assert list(output) == list(output.keys()) == ["loss", "logits"] and len(output) == 2
    assert "logits" in output and "attentions" not in output and output.get("attentions", 3) == 3
    assert output[0] is output["loss"] is output.loss is output.get("loss") is output[:1][0]
    convert_to_fp32(output)  # what accelerate does to the outputs of every step
    assert unmade(output)
    made = output.logits
    assert output["logits"] is made is output[1] is output[-1] is output.get("logits") is dict(output.items())["logits"]
    assert [v is w for v, w in zip(output.to_tuple(), output.values(), strict=True)] == [True, True]
    assert all(a is b for a, b in zip(output.to_tuple(), {**output}.values(), strict=True))
    loss, logits = output.to_tuple()
    assert loss is output.loss and logits is made
    with pytest.raises(KeyError):
        output["attentions"]
    made.float().pow(2).mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    again = type(output)({k: v.float() for k, v in output.items()})  # as accelerate rebuilds outputs
    close(again.logits, made)
    again.logits = made
    assert list(again) == ["loss", "logits"] and again.to_tuple()[1] is made


def test_evaluation_and_other_requests_are_plain() -> None:
    model, inputs = trained("llama", "lora"), ragged()
    assert not unmade(model.eval()(**inputs))
    model.train()
    assert model(**inputs, output_hidden_states=True).hidden_states
    assert len(model(**inputs, return_dict=False)) >= 2
    assert "past_key_values" in model(**inputs, use_cache=True)
    assert "logits" in model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert model.base(**inputs).logits is not None


@pytest.mark.parametrize(
    ("name", "method"), pairs(["llama", "bloom", "falcon", "t5"], ["lora", "prompt", "prefix_projection", "houlsby"])
)
@pytest.mark.parametrize("training", [True, False])
def test_a_step_leaves_nothing_to_the_garbage_collector(name: str, method: str, training: bool) -> None:
    """What a cycle of references holds lives on into the next steps, and is added to their memory."""
    model = trained(name, method).train(training)
    inputs = batch(name) if name in SEQ2SEQ else ragged()
    model(**inputs).loss.backward()
    model.zero_grad(set_to_none=False)
    with left_behind() as left:
        model(**inputs).loss.backward()
        model(**inputs)
    assert [tuple(o.shape) for o in left] == []


def test_dropout_of_the_base_is_not_shared_between_sequences() -> None:
    base = still("opt")
    for module in base.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.1
    model = attach("opt", "prompt", base=base).train()
    assert not model.entry.packing.shares_virtual
    torch.manual_seed(0)
    loss = model(**ragged()).loss
    torch.manual_seed(1)
    assert model(**ragged()).loss != loss
    torch.manual_seed(0)
    assert model(**ragged()).loss == loss


def test_first_pass_leaves_the_generator_alone() -> None:
    draws = []
    for _ in range(2):
        model = trained("bloom", "lora")
        torch.manual_seed(3)
        model.can_pack()
        draws.append(torch.rand(1))
    torch.manual_seed(3)
    assert draws[0] == draws[1] == torch.rand(1)


@pytest.mark.parametrize("name", ["bloom", "gpt2"])
def test_the_base_is_its_own_again_after_unwrapping(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = still(name)
    before = {n: type(m) for n, m in base.named_modules()}
    attention = base.config._attn_implementation
    first, second = (graftlm.get_peft_model(base, config("prompt", name)).train() for _ in range(2))
    fast_now = {n: type(m) for n, m in base.named_modules()}
    assert fast_now != before
    for model in (first, second):
        model(**ragged()).loss.backward()
        assert base.config._attn_implementation == attention
    first.unload()
    assert {n: type(m) for n, m in base.named_modules()} == fast_now
    second.unload()
    assert {n: type(m) for n, m in base.named_modules()} == before


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_prepacked_weights_change_no_result(name: str) -> None:
    model = attach(name, "lora_default", base=still(name))
    inputs = batch(name)
    before = {n: type(m) for n, m in model.named_modules()}
    prompt = {k: v for k, v in inputs.items() if "label" not in k}

    def everything() -> tuple:
        model.train()
        loss, gradients, _ = pass_(model, **inputs)
        model.eval()
        return loss, gradients, model.generate(**prompt, max_new_tokens=4, do_sample=False)

    plain = everything()
    with graftlm.prepacked(model, at_most=10) as size:
        assert size == 0
        assert {n: type(m) for n, m in model.named_modules()} == before
    with graftlm.prepacked(model) as size:
        assert size > 1000
        with graftlm.prepacked(model, at_most=10) as shared:  # nothing more to keep
            assert shared == size
        loss, gradients, tokens = everything()
    assert {n: type(m) for n, m in model.named_modules()} == before
    close(loss, plain[0])
    assert torch.equal(tokens, plain[2])
    for key, value in plain[1].items():
        torch.testing.assert_close(gradients[key], value, atol=1e-5, rtol=1e-4)


def test_a_failing_pass_puts_the_attention_back() -> None:
    base = still("llama")
    model = graftlm.get_peft_model(base, config("lora", "llama")).train()
    model(**ragged())

    def broken(*args: Any) -> None:
        raise RuntimeError("broken on purpose")

    handle = base.model.layers[1].register_forward_pre_hook(broken)
    before = base.config._attn_implementation
    with pytest.raises(RuntimeError, match="on purpose"):
        model(**ragged())
    handle.remove()
    assert base.config._attn_implementation == before
    assert not unmade(base(**ragged()))


def test_copies_and_pickles_train() -> None:
    model, inputs = trained("bloom", "prefix"), ragged()
    loss = model(**inputs).loss
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(twin.train()(**inputs).loss, loss)
        assert twin.entry.host is twin
    head = copy.deepcopy(model.base.get_output_embeddings())
    assert head(torch.zeros(2, 32)).shape == (2, VOCAB)
    assert pickle.loads(pickle.dumps(head)).weight.shape == head.weight.shape


def test_switching_and_disabling_between_passes() -> None:
    model, inputs = trained("llama", "lora"), ragged()
    model.add_adapter("other", CONFIGS["prompt"](graftlm, "llama"))
    for active in ("default", "other", ["default", "other"]):
        model.set_adapter(active)
        randomise(model)
        same(model, **inputs)
    with model.disable_adapter(), torch.no_grad():
        close(model(**inputs).loss, still("llama").train()(**inputs).loss)


# -- inputs of all kinds -------------------------------------------------------------------------------------------------
def odd_inputs() -> dict[str, dict[str, Any]]:
    """Batches whose loss depends on more than their real tokens, or whose positions are their own."""
    plain, left = ragged(unlabelled=0), ragged("left", unlabelled=0)
    holes = ragged()
    holes["attention_mask"][0, 4] = 0
    places = torch.arange(plain["labels"].shape[1]).expand_as(plain["labels"])
    bare = {k: v for k, v in plain.items() if k != "attention_mask"}
    return {
        "labels_on_padding": plain | {"labels": plain["input_ids"]},
        "labels_on_left_padding": left | {"labels": left["input_ids"]},
        "hole": holes,
        "hole_unlabelled": holes | {"labels": holes["labels"].masked_fill(holes["attention_mask"] == 0, -100)},
        "no_mask": bare,
        "positions_with_offset": plain | {"position_ids": places + 3},
        "equal_positions": plain | {"position_ids": torch.zeros_like(places)},
        "positions_with_mask": plain | {"position_ids": places % 4},
        "jump": bare | {"position_ids": torch.where(places > 4, places + 9, places)},
        "padding_rows": plain | {"attention_mask": plain["attention_mask"] * (torch.arange(5) != 2)[:, None]},
    }


@pytest.mark.parametrize("kind", odd_inputs())
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_odd_inputs_train_as_ever(name: str, method: str, kind: str) -> None:
    """The same loss and gradients as the plain pass, or the same refusal."""
    model, inputs = trained(name, method), odd_inputs()[kind]
    model.lean = False
    try:
        model(**inputs)
    except UnsupportedError:
        model.lean = True
        with pytest.raises(UnsupportedError):
            model(**inputs)
        return
    if kind != "padding_rows":  # what a row without a token gives is no one's concern; it may not disturb the others
        same(model, **inputs)


def test_shifted_labels_of_ones_own() -> None:
    inputs = ragged()
    shifted = torch.full_like(inputs["labels"], -100)
    shifted[:, :-1] = inputs["labels"][:, 1:]
    model = trained("llama", "lora")
    loss = model(**inputs).loss
    close(same(model, **inputs, shift_labels=shifted)[0].loss, loss)


# -- what scripts do -----------------------------------------------------------------------------------------------------
def test_outputs_by_place_and_in_files(tmp_path: Any) -> None:
    model, inputs = trained("llama", "lora"), ragged()
    loss, logits = model(**inputs)[:2]
    output = model(**inputs)
    close(output[1], logits)
    close(output.to_tuple()[1], logits)
    again = pickle.loads(pickle.dumps(output))
    close(again.logits, logits)
    torch.save(output.loss, tmp_path / "loss.pt")
    close(torch.load(tmp_path / "loss.pt", weights_only=False), loss)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_base_is_copied_while_it_is_wrapped(name: str) -> None:
    model = trained(name, "prefix")
    twin = copy.deepcopy(model.base)
    inputs = ragged()
    with torch.no_grad():
        close(twin.eval()(**inputs).logits, still(name)(**inputs).logits)
    assert not any(isinstance(m, fast.Fast) for m in twin.modules())


@pytest.mark.parametrize("change", ["head", "vocabulary"])
def test_a_head_that_is_replaced_after_wrapping(change: str) -> None:
    model = trained("llama", "lora")
    model(**ragged())
    if change == "head":
        model.base.lm_head = nn.Linear(32, VOCAB, bias=False).requires_grad_(False)
    else:
        model.base.resize_token_embeddings(VOCAB + 8)
        model.base.requires_grad_(False)
        model.set_adapter("default")
    same(model, **ragged())


def test_checkpointing_of_ones_own_fails_loudly_or_is_right() -> None:
    """Layers that run again outside the pass cannot know its sequences."""
    from torch.utils.checkpoint import checkpoint

    model, inputs = trained("llama", "lora"), ragged()
    for layer in model.base.model.layers:
        forward = layer.forward
        layer.forward = lambda *a, f=forward, **k: checkpoint(f, *a, use_reentrant=False, **k)
    with pytest.raises(RuntimeError):
        pass_(model, **inputs)
    model.packs = False
    loss, gradients, _ = pass_(model, **inputs)
    wanted_loss, wanted, _ = pass_(trained("llama", "lora"), **inputs)
    close(loss, wanted_loss)
    for key, gradient in wanted.items():
        close(gradients[key], gradient)


def test_arguments_of_the_loss_go_the_plain_way() -> None:
    model, inputs = trained("llama", "lora"), ragged()
    labels = inputs["labels"].masked_fill(inputs["labels"] == -100, -7)
    output = model(**(inputs | {"labels": labels}), ignore_index=-7)
    assert not unmade(output)
    close(output.loss, model(**inputs).loss)


def test_logits_are_read_outside_autocast() -> None:
    model, inputs = trained("opt", "lora"), ragged()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("scale", [None, 0.02], ids=["default_start", "tiny_weights"])
def test_layers_that_mix_neighbours_are_found_however_small_their_weights(scale: float | None) -> None:
    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k != "max_position_embeddings"}
    base = t.Lfm2ForCausalLM(t.Lfm2Config(**sizes, layer_types=["conv", "full_attention"], conv_L_cache=3))
    if scale is not None:
        for parameter in base.parameters():
            parameter.data.mul_(scale if parameter.dim() > 1 else 1.0)
    model: Any = graftlm.get_peft_model(base, graftlm.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).train()
    assert not model.can_pack()
    same(randomise(model), **ragged())


def test_a_cap_is_found_while_logits_are_small() -> None:
    torch.manual_seed(0)
    base = t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, head_dim=8))
    model: Any = graftlm.get_peft_model(base, graftlm.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).train()
    model(**ragged())
    base.lm_head.weight.data.mul_(100)
    same(randomise(model), **ragged())


def test_noise_on_embeddings_keeps_its_size() -> None:
    """NEFTune scales its noise by the length of the rows it sees."""
    model = trained("llama", "prompt")
    model(**ragged())
    seen: list[torch.Size] = []
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model(**ragged())
    assert seen[-1][:2] == ragged()["input_ids"].shape


def test_second_derivatives_raise() -> None:
    model = trained("bloom", "prompt")
    parameters = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="first derivatives only"):
        gradients = torch.autograd.grad(model(**ragged()).loss, parameters, create_graph=True)
        torch.autograd.grad(sum(g.pow(2).sum() for g in gradients), parameters)


def test_output_classes_are_made_once() -> None:
    model = trained("llama", "lora")
    assert type(model(**ragged())) is type(model(**ragged()))
    output = model(**ragged())
    close(output.get("logits"), output.logits)
    assert output.get("nothing", 3) == 3


def test_a_loss_function_that_is_set_later_is_heeded() -> None:
    model = trained("llama", "lora")
    model(**ragged())
    model.base.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().mean()
    output = model(**ragged())
    assert not unmade(output)
    close(output.loss, output.logits.float().mean())


def test_two_wrappers_both_use_the_fused_head() -> None:
    base = still("llama")
    both = [graftlm.get_peft_model(base, config("lora", "llama")).train() for _ in range(2)]
    for model in both:
        assert model.entry.loss.plain_head() is base.lm_head
        same(randomise(model), **ragged())


def test_another_thread_may_run_the_base_meanwhile() -> None:
    import threading

    base = still("llama")
    model = graftlm.get_peft_model(base, config("prefix", "llama")).train()
    ids = ragged()["input_ids"]
    with torch.no_grad():
        wanted = base(input_ids=ids).logits
    errors: list[Any] = []
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            try:
                with torch.no_grad():
                    close(base(input_ids=ids).logits, wanted)
            except Exception as error:
                errors.append(error)
                return

    thread = threading.Thread(target=serve)
    thread.start()
    for _ in range(30):
        model(**ragged()).loss.backward()
    done.set()
    thread.join()
    assert not errors


def test_packed_rows_outside_training() -> None:
    sequences = rows("llama", (5, 4))
    packed = {
        "input_ids": torch.cat(sequences)[None],
        "position_ids": torch.cat([torch.arange(len(s)) for s in sequences])[None],
    }
    model = trained("llama", "lora").eval()
    with torch.no_grad():
        close(model(**packed).logits[0, 5:], model(input_ids=sequences[1][None]).logits[0])
        with pytest.raises(UnsupportedError, match="does not read them"):
            trained("bloom", "lora").eval()(**packed)


def test_many_tiny_rows_stay_padded() -> None:
    model = trained("llama", "lora")
    inputs = padded(rows("llama", (5,) * 40), "right", 0)
    inputs["labels"] = inputs["input_ids"].masked_fill(torch.arange(5) == 0, -100)
    handled: list[int] = []
    model.base.model.register_forward_hook(lambda m, a, o: handled.append(o.last_hidden_state.shape[0]))
    same(model, **inputs)
    assert handled[-1] == 40
