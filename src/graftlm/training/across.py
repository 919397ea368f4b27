"""What of a `transformers.Trainer` differs among several processes: who takes gradients' means, what all save together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor

from ..errors import UnsupportedError
from ..model import PeftModel
from .meters import TokenLoss
from .sharding import Exchange, base_parameters, is_sharded
from .sharing import deal_out
from .zero import Zero


class AcrossProcesses(transformers.Trainer):
    """Files and checkpoints are those of one process, and gradients of adapters alone travel."""

    member: Any = None  # of several runs that train together
    exchange: Exchange | None = None  # of gradients, where the model is not wrapped for it
    by_zero = False  # whether gradients and the optimizer are shared out, by DeepSpeed
    release: Callable[[], None] | None = None  # of a base that is shared out by it, too: what follows a backward pass
    zero: Zero | None = None
    optimizer: Any
    lr_scheduler: Any

    def _share_out(self) -> None:
        """Among several processes: adapters' gradients alone travel, by DDP, or by `Exchange` where DDP does not see the
        passes (joint ones, those of a sharded base)."""
        inner = self.accelerator.unwrap_model(self.model)
        if self.accelerator.num_processes == 1 or not isinstance(inner, PeftModel):
            return
        own = {id(p) for p in base_parameters(inner.base)}
        frozen = [name for name, p in inner.named_parameters() if id(p) in own]
        inner._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in inner.named_buffers())]
        if self.by_zero or self.member is not None or is_sharded(inner):
            self.accelerator.prepare_model = lambda model, *args, **kwargs: model
        if self.by_zero:
            self.accelerator.backward = self._backward_by_zero
            self.accelerator.clip_grad_norm_ = self._norm_by_zero
        elif self.member is not None or is_sharded(inner):
            self.exchange = Exchange(inner)
            if self.exchange.parts.found:
                if self.args.fp16:
                    raise UnsupportedError("shard_adapters trains in fp32 or bf16: fp16's scaling is of whole gradients")
                self.accelerator.clip_grad_norm_ = self.exchange.clip

    def get_train_dataloader(self) -> Any:
        """As transformers'; the rows of an update are dealt out by length."""
        loader = super().get_train_dataloader()
        deal_out(loader, self.train_dataset)
        return loader

    def _backward_by_zero(self, loss: Tensor, **kwargs: Any) -> None:
        """`Accelerator.backward`; DeepSpeed updates behind it."""
        assert self.zero is not None
        self.zero.backward(loss / self.accelerator.gradient_accumulation_steps, self.accelerator.sync_gradients)
        if self.release is not None:
            self.release()

    def _norm_by_zero(self, *given: Any, **kwargs: Any) -> Tensor:
        """`Accelerator.clip_grad_norm_`; DeepSpeed has clipped."""
        assert self.zero is not None
        return self.zero.norm

    @property
    def _whole(self) -> Any:
        """A block within which adapters that are in parts are whole; all processes must enter it."""
        return self.exchange.parts.whole() if self.exchange is not None else nullcontext()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'; of adapters in parts it has this process's."""
        parts = self.exchange.parts if self.exchange is not None else None
        if self.by_zero and self.zero is None and self.accelerator.num_processes > 1:
            made = super().create_optimizer(*args, **kwargs)
            self.zero = Zero(made, self.args.max_grad_norm or 0.0)
            return made
        if self.optimizer is not None or parts is None or not parts.found:
            return super().create_optimizer(*args, **kwargs)
        with parts.local():
            made = super().create_optimizer(*args, **kwargs)
        made.register_load_state_dict_pre_hook(parts.cut_states)
        return made

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._whole_states:
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.zero is not None:
            self.zero.take()

    @property
    def _whole_states(self) -> Any:
        """A block within which the optimizer's states are those of one process; all processes must enter it."""
        if self.zero is not None:
            return self.zero.whole()
        return self.exchange.parts.whole_states(self.optimizer.state) if self.exchange is not None else nullcontext()

    def _let_go(self) -> None:
        """What is shared out by others than this class ends with a training."""
        if self.zero is not None:
            self.zero.close()
            self.zero = self.optimizer = self.lr_scheduler = None

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._whole:
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_best_model(self) -> None:
        with self._whole:
            super()._load_best_model()

    def _over_processes(self, loss: TokenLoss) -> TokenLoss:
        if self.accelerator.num_processes == 1:
            return loss
        joined = TokenLoss()
        total, tokens = self._summed(loss.total, loss.tokens)
        joined.total, joined.tokens = total, int(tokens)
        return joined

    def _summed(self, *own: float) -> list[float]:
        """Sums over all processes."""
        return self.accelerator.reduce(
            torch.tensor(own, device=self.accelerator.device, dtype=torch.float64), "sum"
        ).tolist()
