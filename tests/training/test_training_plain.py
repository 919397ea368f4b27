"""A plain `transformers.Trainer` trains, saves, resumes and unwraps our model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import transformers as t
from safetensors.torch import load_file
from training_helpers import Kill, arguments, equal, examples, losses, trained, wrapped

import graftlm
from graftlm.training import Trainer


def trainer_of(method: str, folder: Path, cls: type = t.Trainer, **changes) -> t.Trainer:
    evaluates = {"eval_dataset": examples(4, seed=9)} if "eval_strategy" in changes else {}
    return cls(wrapped(method), arguments(folder, **changes), train_dataset=examples(), **evaluates)


@pytest.mark.parametrize("cls", [t.Trainer, Trainer], ids=["plain", "own"])
@pytest.mark.parametrize("method", ["lora_dropout", "prompt", "prefix_projection", "p_tuning_lstm_dropout", "bottleneck"])
def test_interrupted_equals_uninterrupted(cls: type, method: str, tmp_path: Path) -> None:
    whole = trainer_of(method, tmp_path / "whole", cls)
    whole.train()
    killed = trainer_of(method, tmp_path / "cut", cls)
    killed.add_callback(Kill(4))
    with pytest.raises(RuntimeError, match="killed"):
        killed.train()
    resumed = trainer_of(method, tmp_path / "cut", cls)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    assert equal(trained(resumed.model), trained(whole.model))


@pytest.mark.parametrize("method", ["lora", "prefix_projection", "p_tuning_lstm"])
def test_checkpoints_hold_only_the_adapter(method: str, tmp_path: Path) -> None:
    trainer = trainer_of(method, tmp_path)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json"} <= {
        p.name for p in folder.iterdir()
    }
    base = set(trainer.model.get_base_model().state_dict())
    for path in folder.glob("*.safetensors"):
        keys = load_file(path)
        assert not base & {k.removeprefix("base_model.model.") for k in keys}
    assert not (folder / "config.json").exists()


@pytest.mark.parametrize("method", ["lora", "prompt", "p_tuning_lstm_dropout", "prefix_projection"])
def test_best_checkpoint_is_loaded(method: str, tmp_path: Path) -> None:
    trainer = trainer_of(
        method, tmp_path, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, learning_rate=0.5,
        num_train_epochs=1,
    )  # fmt: skip
    trainer.train()
    scores = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(scores.values())
    assert trainer.state.best_metric == pytest.approx(best)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("cls, method", [(t.Trainer, "lora"), (t.Trainer, "prefix"), (Trainer, "lora"), (Trainer, "prefix")])
def test_label_smoothing_is_exact(cls: type, method: str, tmp_path: Path) -> None:
    trainer = trainer_of(method, tmp_path, cls, label_smoothing_factor=0.1)
    trainer.model.eval()
    rows = examples(3)
    batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
    with torch.no_grad():
        got = trainer.compute_loss(trainer.model, dict(batch))
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert float(got) == pytest.approx(smoothed(logits[:, :-1], batch["labels"][:, 1:]), abs=1e-5)


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1))


@pytest.mark.parametrize("cls", [t.Trainer, Trainer])
@pytest.mark.parametrize("method", ["prompt", "p_tuning_mlp"])
def test_label_smoothing_with_virtual_tokens_is_exact(method: str, cls: type, tmp_path: Path) -> None:
    """The logits line up with the given tokens when the loss is made outside the model: left-padded rows, by hand."""
    trainer = trainer_of(method, tmp_path, cls, label_smoothing_factor=0.1)
    model = trainer.model.eval()
    lengths, virtual = (7, 4, 5), 3
    ids = [torch.arange(5, 5 + n) + 3 * i for i, n in enumerate(lengths)]
    batch = {k: torch.zeros(3, 7, dtype=torch.long) for k in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full((3, 7), -100)
    for i, row in enumerate(ids):
        for key, value in (("input_ids", row), ("attention_mask", 1)):
            batch[key][i, 7 - len(row) :] = value
        batch["labels"][i, 8 - len(row) :] = row[1:]
    count = torch.tensor(sum(lengths) - 3)
    with torch.no_grad():
        got = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
        alone = [model(input_ids=row[None]).logits[0, virtual:-1] for row in ids]
    wanted = smoothed(torch.cat(alone)[None], torch.cat([row[1:] for row in ids])[None])
    assert float(got) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("family", ["bloom", "t5"])
@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_label_smoothing_in_training_needs_no_logits(
    method: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and gradients are those of a model that makes all logits; the first token is predicted too, as without."""
    model = wrapped(method, family).train()
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=examples(family=family))
    rows = examples(3, family)
    batch = {k: torch.stack([r[k] for r in rows]) for k in rows[0]}
    batch["labels"][0] = torch.arange(5, 5 + batch["labels"].shape[1])  # from the first token on
    for module in model.modules():  # without dropout
        for name in {"p", "dropout"} & vars(module).keys():
            setattr(module, name, 0.0)
    asked: list = []
    monkeypatch.setattr(type(model.entry.loss), "logits", lambda *_: asked.append(1))
    loss = trainer.compute_loss(model, dict(batch))
    ours = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert not asked
    model.lean = False
    with pytest.raises(graftlm.errors.UnsupportedError, match="label_smoothing=0.1.*makes_loss"):
        model(**batch, label_smoothing=0.1)
    logits, labels = model(**batch).logits, batch["labels"]
    if family == "bloom" and (virtual := logits.shape[1] - labels.shape[1]):
        logits = logits[:, virtual - 1 : -1]
    elif family == "bloom":
        logits, labels = logits[:, :-1], labels[:, 1:]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.1)
    theirs = torch.autograd.grad(wanted, [p for p in model.parameters() if p.requires_grad])
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["bloom", "t5"])
def test_smoothed_accumulation_is_that_of_transformers(family: str, tmp_path: Path) -> None:
    """T5 does not heed the items of an update, a smoothed loss does."""
    found = []
    for cls in (t.Trainer, Trainer):
        model = wrapped("lora", family)
        for module in model.modules():
            for name in {"p", "dropout", "dropout_rate"} & vars(module).keys():
                setattr(module, name, 0.0)
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "label_smoothing_factor": 0.1}
        rows = examples(9, family)
        for i, row in enumerate(rows):
            row["labels"][: 1 + i % 4] = -100
            if family == "t5":
                row["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(row["labels"][None])[0]
        trainer = cls(model, arguments(tmp_path / cls.__module__, save_strategy="no", **options), train_dataset=rows)
        trainer.train()
        found.append((losses(trainer), trained(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    for key, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], value, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("cls", [t.Trainer, Trainer], ids=["plain", "own"])
@pytest.mark.parametrize("method", ["prompt", "p_tuning_lstm", "prefix", "lora"])
def test_metrics_get_one_output_a_label(method: str, cls: type, tmp_path: Path) -> None:
    """`compute_metrics` shifts by one, as for the base: virtual tokens' outputs do not stand in front of the others."""
    seen = {}

    def metrics(prediction: t.EvalPrediction) -> dict[str, float]:
        logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        assert logits.shape[:2] == labels.shape
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        seen["logits"] = logits
        return {"shifted": float(loss)}

    rows = examples(4, seed=9)  # without labels that only a virtual token could predict
    trainer = cls(
        wrapped(method), arguments(tmp_path, per_device_eval_batch_size=4), eval_dataset=rows, compute_metrics=metrics
    )
    found = trainer.evaluate()
    assert found["eval_shifted"] == pytest.approx(found["eval_loss"], abs=1e-5)
    outputs = trainer.predict(rows)
    assert outputs.predictions.shape == tuple(seen["logits"].shape)


def test_someones_own_smoother_is_used(tmp_path: Path) -> None:
    trainer = trainer_of("lora", tmp_path, Trainer, label_smoothing_factor=0.1)
    trainer.label_smoother = lambda output, labels, **_: output["logits"].sum() * 0 + 7
    batch = {k: torch.stack([r[k] for r in examples(2)]) for k in examples(1)[0]}
    assert trainer.compute_loss(trainer.model.train(), batch).item() == 7


def test_a_share_of_one_or_more_raises() -> None:
    model = wrapped("lora")
    with pytest.raises(graftlm.errors.ConfigError, match="label_smoothing=1.5"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), label_smoothing=1.5)


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_seq2seq_trainer_predicts_with_generate(method: str, tmp_path: Path) -> None:
    values = arguments(tmp_path).to_dict()
    keep = {k: values[k] for k in ("output_dir", "learning_rate", "use_cpu", "disable_tqdm", "dataloader_pin_memory")}
    made = t.Seq2SeqTrainingArguments(
        **keep,
        report_to="none",
        max_steps=2,
        per_device_train_batch_size=4,
        predict_with_generate=True,
        generation_max_length=5,
    )
    trainer = t.Seq2SeqTrainer(
        wrapped(method, "t5"), made, train_dataset=examples(family="t5"), eval_dataset=examples(3, "t5"),
        compute_metrics=lambda p: {"beyond": int((p.predictions[:, 5:] > 0).sum()), "rows": len(p.predictions)},
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 3 and metrics["eval_beyond"] == 0 and metrics["eval_loss"] > 0


def test_unwrap_gives_the_wrapper_back() -> None:
    model = wrapped("lora")
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.unwrap_model(model) is model
    compiled = torch.compile(model, backend="eager")
    assert accelerator.unwrap_model(compiled, keep_torch_compile=False) is model
    assert isinstance(accelerator.unwrap_model(accelerator.prepare_model(model)), graftlm.PeftModel)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_torch_compile_trains(method: str, tmp_path: Path) -> None:
    trainer = trainer_of(method, tmp_path, torch_compile=True, torch_compile_backend="eager", max_steps=2)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()
    reference = trainer_of(method, tmp_path / "plain", max_steps=2)
    reference.train()
    assert losses(trainer) == pytest.approx(losses(reference), abs=1e-4)


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"bf16": True}, {"auto_find_batch_size": True}])
def test_options_of_transformers_work(options: dict, tmp_path: Path) -> None:
    trainer = trainer_of("prefix", tmp_path, max_steps=2, **options)
    trainer.train()
    assert len(losses(trainer)) == 2


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix_projection"])
def test_accumulation_equals_the_large_batch(method: str, tmp_path: Path) -> None:
    one = trainer_of(method, tmp_path / "1", max_steps=3)
    two = trainer_of(method, tmp_path / "2", max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    one.train()
    two.train()
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)


ALONE = """
import sys, socket
sys.path[:0] = [{tests!r}, {here!r}]
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = lambda cls, name, path=None, target=None: None if name.split(".")[0] == "peft" else find(name, path, target)
PathFinder.find_spec = classmethod(hidden)
import importlib.metadata as md
real = md.version
def version(name):
    if name == "peft": raise md.PackageNotFoundError(name)
    return real(name)
md.version = version
def refuse(*a, **k): raise OSError("sockets are blocked")
socket.socket.connect = refuse
socket.create_connection = refuse
socket.getaddrinfo = refuse
import transformers as t
from pathlib import Path
from training_helpers import arguments, examples, wrapped, equal, trained, losses, Kill
from graftlm.training import Trainer
from graftlm import PeftModel
from families import build
folder = Path({folder!r})
for cls in (t.Trainer, Trainer):
    for method in ("lora_dropout", "p_tuning_lstm_dropout"):
        place = folder / cls.__module__ / method
        rows = dict(train_dataset=examples(), eval_dataset=examples(3))
        make = lambda f: cls(wrapped(method), arguments(f, eval_strategy="epoch"), **rows)
        whole = make(place / "whole"); whole.train()
        cut = make(place / "cut"); cut.add_callback(Kill(4))
        try: cut.train()
        except RuntimeError: pass
        again = make(place / "cut"); again.train(resume_from_checkpoint=True); again.save_model()
        assert equal(trained(whole.model), trained(again.model)), (cls, method)
        PeftModel.from_pretrained(build("bloom"), place / "cut")
assert "peft" not in sys.modules
print("ALONE OK")
"""


def test_without_peft_and_without_network(tmp_path: Path) -> None:
    here = Path(__file__).parent
    code = ALONE.format(tests=str(here.parent), here=str(here), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "ALONE OK" in done.stdout, done.stderr[-3000:]
