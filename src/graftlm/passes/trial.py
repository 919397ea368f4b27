"""Trials: a small random batch through the model itself, to see what holds for it, never assumed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..architectures import backbone_embeddings, is_encoder_decoder
from ..kernels import HeadForm
from ..modes import evaluating
from ..quantization import quantized_layers
from ..routing import Group, Plan
from .facts import decoder_config
from .row import IGNORED
from .run import run
from .state import Form, Packed, Pass, Probe

if TYPE_CHECKING:
    from ..adapters import AdapterSet

log = logging.getLogger("graftlm.engine")


class Trial:
    """Small random batches through a model, of which nothing is left behind: neither modes nor random numbers."""

    def __init__(self, host: AdapterSet) -> None:
        self.host = host
        self.generator = torch.Generator().manual_seed(0)

    def ids(self, *shape: int) -> Tensor:
        """Random token ids of this shape."""
        vocabulary = min(backbone_embeddings(self.host.base).weight.shape[0], 1000)
        return torch.randint(1, vocabulary, shape, generator=self.generator)

    @property
    def precise(self) -> bool:
        """Whether two ways to compute the same differ by fp32's rounding only."""
        exact = all(k == "4bit" and m.compute_dtype is torch.float32 for k, m in quantized_layers(self.host.base))
        auto = torch.is_autocast_enabled(self.host.adapter_device.type)
        return self.host._float_dtype() is torch.float32 and exact and not auto

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Evaluation mode (no dropout), except for quantised layers, which would be packed; the generator as it was."""
        quantised = {layer for _, layer in quantized_layers(self.host.base)}
        with evaluating(self.host, but=quantised), torch.random.fork_rng(devices=[]):
            yield

    @contextmanager
    def disturbed(self, groups: list[Group]) -> Iterator[None]:
        """The adapters with noise on their values; afterwards as they were, bit for bit. Their storage is exchanged, so that
        a pass that waits for its gradient keeps what it saw."""
        names = dict.fromkeys(n for group in groups for n in group)
        parameters: list[nn.Parameter] = [p for n in names for _, p in self.host.adapter_parameters(n)]
        before = [p.data for p in parameters]
        generator, much = torch.Generator().manual_seed(1), 0.1 if self.precise else 0.3
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator) * much
            p.data = p.data + noise.to(p.device, p.dtype)
        try:
            yield
        finally:
            for p, value in zip(parameters, before, strict=True):
                p.data = value


def kind_of(host: AdapterSet, group: Group) -> str:
    """What adapters are alike for the trial: all that their configurations say."""
    configs = [host.methods[n].config.to_dict() | {"inference_mode": None, "base_model_name_or_path": None} for n in group]
    return json.dumps(configs, sort_keys=True, default=str)


class Check(Trial):
    """Runs a batch plainly and by the short cuts, and compares."""

    ROWS, LENGTH, SHORT = 2, 6, 4

    def __init__(self, host: AdapterSet, plan: Plan) -> None:
        super().__init__(host)
        self.plan = plan
        ids = self.ids(self.ROWS, self.LENGTH)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[1, self.SHORT :], labels[1, self.SHORT :] = 0, IGNORED
        device = host.adapter_device
        self.batch = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}

    def form(self) -> Form | None:
        base = self.host.base
        shifts = not is_encoder_decoder(base)
        if shifts:
            name = getattr(getattr(base, "loss_function", None), "__name__", "")
            if name not in ("ForCausalLMLoss", "ForMaskedLMLoss"):
                return None
            shifts = name == "ForCausalLMLoss"
        with self.quiet(), torch.no_grad():
            plain, output = self.run(None)
            softcap = getattr(decoder_config(base), "final_logit_softcapping", None)
            assert plain.raw is not None
            head = HeadForm.recognise(plain.raw, output.logits, softcap)
            if head is None:
                return None
            form = Form(head=head, packs=False, shifts=shifts)
            if not self.close(self.run(form)[1].loss, output.loss):
                log.info("%s: its loss is not the usual one; all logits are computed", type(base).__name__)
                return None
            packs = self.packs(form, plain, output)
        return Form(head=head, packs=packs, shifts=shifts)

    def heeds_items(self) -> bool:
        """Whether the plain model divides its summed loss by `num_items_in_batch`."""
        with self.quiet(), torch.no_grad():
            mean, divided = (self.run(None, items)[1].loss for items in (None, 7))
        every = is_encoder_decoder(self.host.base) or self.host.counts(self.plan.adapters)[0] > 0
        labels = self.batch["labels"] if every else self.batch["labels"][:, 1:]
        return self.close(divided * 7, mean * int(labels.ne(IGNORED).sum()))

    def packs(self, form: Form, plain: Pass, output: Any) -> bool:
        """Whether the packed row gives the padded batch's hidden states and loss."""
        base, packing = self.host.base, self.host.entry.packing
        tuned = getattr(decoder_config(base), "attn_temperature_tuning", None)  # Llama 4: by places in the row
        mixes = any(isinstance(m, nn.Conv1d) for m in base.modules())  # along the row
        if not form.shifts or tuned or mixes or not packing.packs_on(self.host.adapter_device):
            return False
        form = replace(form, packs=True)
        try:
            now, packed = self.run(form)
        except Exception as reason:  # an attention that is not transformers' exchangeable one
            log.info("%s is trained padded: %s", type(base).__name__, reason)
            return False
        if not isinstance(now.layout, Packed):
            return False
        count = self.host.counts(self.plan.adapters)[0]
        assert plain.hidden is not None and now.hidden is not None
        expected = plain.layout.restore(plain.hidden)[:, count:][self.batch["attention_mask"].bool()].float()
        found = now.hidden[0][now.layout.row.tokens].float()
        error = float((found - expected).norm() / expected.norm())
        exact = found.shape == expected.shape and error <= (1e-4 if self.precise else 5e-2)
        exact = exact and self.close(packed.loss, output.loss) and self.apart(form, now, now.layout)
        if exact and self.tries_gradients and not self.same_gradients(form):
            log.info("%s is trained padded: packing changes its gradients", type(base).__name__)
            return False
        if not exact:
            log.info("%s is trained padded: packing changes its hidden states by %.1e", type(base).__name__, error)
            return False
        return True

    def apart(self, form: Form, before: Pass, layout: Packed) -> bool:
        """Whether other tokens in the first row change nothing in the second one's hidden states.

        It shows in any dtype, and for weights so small that what leaks (through a convolution, say) is.
        """
        ids = self.batch["input_ids"]
        others = ids.clone()
        others[0] = ids[0].roll(1) + 1
        self.batch["input_ids"] = others % int(ids.max() + 1)
        try:
            after = self.run(form)[0]
        finally:
            self.batch["input_ids"] = ids
        places = layout.row.tokens[self.LENGTH :]
        first, second = (now.hidden[0][places].float() for now in (before, after))  # type: ignore[index]
        rounded = 1e-6 if self.grouped else 0.0
        return bool((first - second).abs().max() <= rounded * first.abs().max())

    @property
    def tries_gradients(self) -> bool:
        """Whether the packed row's backward pass is tried too: on a GPU it is a kernel that is not ours."""
        return self.host.adapter_device.type != "cpu"

    def same_gradients(self, form: Form) -> bool:
        """Whether the packed row gives the plain pass's gradients, roughly (a kernel that is wrong is far off)."""
        trained = [p for p in self.host.parameters() if p.requires_grad]
        try:
            plain, packed = (self.gradients(way, trained) for way in (None, form))
        except Exception as reason:  # a kernel without a backward pass for these shapes
            log.info("%s: the packed row's backward pass failed: %s", type(self.host.base).__name__, reason)
            return False
        off = sum(float((a - b).float().square().sum()) for a, b in zip(packed, plain, strict=True))
        size = sum(float(b.float().square().sum()) for b in plain)
        return off <= (1e-3 if self.precise else 1e-1) ** 2 * size

    def gradients(self, form: Form | None, trained: list[nn.Parameter]) -> Sequence[Tensor]:
        """Those of the batch's loss. (In evaluation mode cuDNN's LSTM has none; torch's own has.)"""
        with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
            loss = self.run(form)[1].loss
            if not (trained and loss.requires_grad):
                return [torch.zeros_like(p) for p in trained]
            return torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)

    def run(self, form: Form | None, items: int | None = None) -> tuple[Pass, Any]:
        """One pass by the short cuts of `form` (None: plainly), and its output."""
        inputs = dict(self.batch)
        if items is not None:
            inputs["num_items_in_batch"] = torch.tensor(items, device=inputs["labels"].device)
        return run(self.host, self.plan, inputs, probe=Probe(form))

    @property
    def grouped(self) -> bool:
        """Whether products round by what else is in the batch: experts' groups, int8's outlier columns."""
        base = self.host.base
        config = decoder_config(base)
        experts = any(getattr(config, n, None) for n in ("num_local_experts", "num_experts", "n_routed_experts"))
        return bool(experts) or any(kind == "int8" for kind, _ in quantized_layers(base))

    def close(self, a: Tensor, b: Tensor) -> bool:
        return bool(torch.isclose(a.float(), b.float(), rtol=1e-4 if self.precise else 3e-2))
