"""Our Trainer: what it adds to the log, to the directory and to resuming."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import transformers as t
from rich.console import Console
from training_helpers import Kill, arguments, equal, examples, losses, trained, uneven, wrapped

from graftlm import PeftModel
from graftlm.errors import CheckpointError, ConfigError
from graftlm.training import Trainer, TrainingInterrupted
from graftlm.training.progress import RichProgress
from graftlm.training.resume import last_complete_checkpoint


def trainer_of(folder: Path, method: str = "lora", **changes) -> Trainer:
    return Trainer(wrapped(method), arguments(folder, **changes), train_dataset=uneven(), eval_dataset=uneven(5, seed=8))


def token_mean(model: torch.nn.Module, rows: list) -> float:
    """Mean loss over labelled tokens, row by row."""
    total, tokens = 0.0, 0
    for row in rows:
        count = int(row["labels"][1:].ne(-100).sum())
        with torch.no_grad():
            total += float(model(**{k: v[None] for k, v in row.items()}).loss) * count if count else 0.0
        tokens += count
    return total / tokens


def test_losses_are_means_over_tokens(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, eval_strategy="epoch", learning_rate=1e-12, per_device_eval_batch_size=2)
    trainer.train()
    history = trainer.state.log_history
    epochs = [e for e in history if "epoch_train_loss" in e]
    assert [e["epoch"] for e in epochs] == [1.0, 2.0]
    trainer.model.eval()
    wanted = token_mean(trainer.model, uneven())
    assert epochs[0]["epoch_train_loss"] == pytest.approx(wanted, abs=1e-5)
    assert epochs[0]["epoch_train_perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
    assert epochs[0]["tokens_per_second"] > 0 and epochs[0]["peak_memory_bytes"] > 2**20
    evaluated = [e for e in history if "eval_loss" in e]
    assert evaluated[-1]["eval_loss"] == pytest.approx(token_mean(trainer.model, uneven(5, seed=8)), abs=1e-5)
    assert evaluated[-1]["eval_perplexity"] == pytest.approx(math.exp(evaluated[-1]["eval_loss"]))
    assert history[-1]["train_tokens_per_second"] > 0


def test_tokens_of_padding_are_not_counted(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.train()
    assert trainer.meter.tokens == 2 * sum(int(r["attention_mask"].sum()) for r in uneven())


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"label_smoothing_factor": 0.1}])
def test_epoch_loss_with_accumulation_and_smoothing(options: dict, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, learning_rate=1e-12, per_device_train_batch_size=2, **options)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "epoch_train_loss" in e)
    trainer.model.eval()
    plain = token_mean(trainer.model, uneven())
    if "label_smoothing_factor" in options:
        assert "epoch_train_perplexity" not in entry and entry["epoch_train_loss"] != pytest.approx(plain, abs=1e-4)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(token_mean(trainer.model, uneven(5, seed=8)), abs=1e-5)
    else:
        assert entry["epoch_train_loss"] == pytest.approx(plain, abs=1e-5)


def test_virtual_tokens_predict_the_first_token(tmp_path: Path) -> None:
    rows = examples(4)
    for row in rows:
        row["labels"] = row["input_ids"].clone()
    trainer = Trainer(wrapped("prompt"), arguments(tmp_path, learning_rate=1e-12), train_dataset=rows)
    trainer.train()
    trainer.model.eval()
    with torch.no_grad():
        wanted = float(trainer.model(**{k: torch.stack([r[k] for r in rows]) for k in rows[0]}).loss)
    assert losses(trainer)[0] == pytest.approx(wanted, abs=1e-5)


def test_half_written_checkpoints_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    cut = trainer_of(tmp_path / "cut")
    cut.add_callback(Kill(3))
    with pytest.raises(RuntimeError, match="killed"):
        cut.train()
    broken = tmp_path / "cut" / "checkpoint-3"
    state = (broken / "trainer_state.json").read_text()
    (broken / "trainer_state.json").write_text(state[: len(state) // 2])
    again = trainer_of(tmp_path / "cut")
    with caplog.at_level(logging.WARNING, "graftlm"):
        again.train(resume_from_checkpoint=True)
    assert "checkpoint-3 is incomplete (trainer_state.json is cut off)" in caplog.text
    assert equal(trained(again.model), trained(whole.model))
    epochs = [[e["epoch_train_loss"] for e in x.state.log_history if "epoch_train_loss" in e] for x in (whole, again)]
    assert epochs[0] == pytest.approx(epochs[1], abs=1e-6)


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda p: (p / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (lambda p: (p / "optimizer.pt").write_bytes((p / "optimizer.pt").read_bytes()[:40]), "optimizer.pt is cut off"),
        (lambda p: (p / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda p: (p / "trainer_state.json").write_text("{}"), "names no step"),
        (lambda p: [f.unlink() for f in p.glob("*.safetensors")], "weights are missing"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"12345678"), "is cut off"),
    ],
)
def test_what_makes_a_checkpoint_incomplete(damage, told: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=1)
    trainer.train()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    damage(tmp_path / "checkpoint-1")
    notes: list[str] = []
    assert last_complete_checkpoint(tmp_path, notes) is None
    assert told in notes[0]
    with pytest.raises(CheckpointError, match="no complete checkpoint.*checkpoint-1"):
        trainer.train(resume_from_checkpoint=True)


class Interrupt(t.TrainerCallback):
    def __init__(self, step: int, *numbers: signal.Signals) -> None:
        self.step, self.numbers = step, numbers or (signal.SIGINT,)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


# SIGTERM: a scheduler's, or what a launcher makes of Ctrl-C, after the terminal's own or twice
@pytest.mark.parametrize("signals", [("SIGINT",), ("SIGTERM",), ("SIGINT", "SIGTERM"), ("SIGTERM", "SIGTERM")])
def test_a_signal_saves_and_resumes(signals: tuple[str, ...], tmp_path: Path) -> None:
    changes = {"save_strategy": "epoch", "eval_strategy": "epoch"}
    whole = trainer_of(tmp_path / "whole", "p_tuning_lstm_dropout", **changes)
    whole.train()
    stopped = trainer_of(tmp_path / "cut", "p_tuning_lstm_dropout", **changes)
    stopped.add_callback(Interrupt(2, *(signal.Signals[name] for name in signals)))
    before = [signal.getsignal(signal.Signals[name]) for name in signals]
    with pytest.raises(TrainingInterrupted, match="step 3 of 4"):
        stopped.train()
    assert [signal.getsignal(signal.Signals[name]) for name in signals] == before
    names = {p.name for p in (tmp_path / "cut").iterdir()}
    assert {"adapter_model.safetensors", "loss.png", "checkpoint-3"} <= names and "model.safetensors" not in names
    again = trainer_of(tmp_path / "cut", "p_tuning_lstm_dropout", **changes)
    again.train(resume_from_checkpoint=True)
    assert equal(trained(again.model), trained(whole.model))
    assert sum("eval_loss" in e for e in again.state.log_history) == 2


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.add_callback(Interrupt(1, signal.SIGINT, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.train()
    assert not isinstance(caught.value, TrainingInterrupted)


def test_saved_directory(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    card = (tmp_path / "README.md").read_text()
    assert "held-out perplexity" in card and "tokens a second" in card
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert trainer.model.card_metrics["held-out loss"] == pytest.approx(trainer.state.best_metric)


def test_fp16_on_a_cpu_names_bf16(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bf16=True"):
        Trainer(wrapped("lora"), arguments(tmp_path, fp16=True), train_dataset=examples())


def test_bar_and_lines() -> None:
    for bar in (True, False):
        console = Console(file=io.StringIO(), force_terminal=bar, width=120)
        report = RichProgress(console)
        assert report.bar is bar
        args = t.TrainingArguments("unused", report_to="none", use_cpu=True)
        state = t.TrainerState(max_steps=5, global_step=1, epoch=0.2, num_train_epochs=1)
        report.on_train_begin(args, state, None)
        report.on_step_end(args, state, None)
        report.on_log(args, state, None, logs={"loss": 2.5})
        report.on_prediction_step(args, state, None, eval_dataloader=[1, 2])
        report.on_log(args, state, None, logs={"eval_loss": 1.25, "eval_perplexity": 3.5})
        report.on_evaluate(args, state, None)
        report.on_train_end(args, state, None)
        shown = console.file.getvalue()
        assert "eval loss 1.25" in shown and "2.5" in shown and report.progress is None


def test_tensorboard_logs_come_from_transformers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trainer = trainer_of(tmp_path, report_to="tensorboard", max_steps=1)
    trainer.train()
    assert list(tmp_path.rglob("events.out.tfevents*")) or list(
        Path(os.environ.get("TENSORBOARD_LOGGING_DIR", ".")).rglob("events*")
    )


@pytest.mark.parametrize("method", ["lora", "prefix_projection", "bottleneck"])
def test_gradient_checkpointing_gives_the_same_losses(method: str, tmp_path: Path) -> None:
    name = (
        "activation_checkpointing" if hasattr(t.TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
    )
    plain, saving = trainer_of(tmp_path / "a", method), trainer_of(tmp_path / "b", method, **{name: True})
    plain.train()
    saving.train()
    assert losses(saving) == pytest.approx(losses(plain), abs=1e-6)


def test_saved_adapter_loads(tmp_path: Path) -> None:
    from families import build

    trainer = trainer_of(tmp_path, "prefix")
    trainer.train()
    trainer.save_adapter()
    loaded = PeftModel.from_pretrained(build("bloom"), tmp_path)
    row = {k: v[None] for k, v in examples(1)[0].items()}
    with torch.no_grad():
        assert torch.allclose(loaded(**row).logits, trainer.model.eval()(**row).logits, atol=1e-6)
