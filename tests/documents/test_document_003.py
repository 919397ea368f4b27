"""Document 003: P-Tuning with its MLP and its LSTM on Chinese instructions, batch 1 with accumulation 8."""

import pytest
import torch
from document_runner import files, losses
from transformers import BloomConfig, BloomForCausalLM

import graftlm
from graftlm.data import load_data

LSTM = "encoder_reparameterization_type=PromptEncoderReparameterizationType.LSTM"
SMALL = {"logging_steps=10": "logging_steps=1, learning_rate=5e-3", "MAX_LENGTH = 256": "MAX_LENGTH = 96"}
REPLACED = {"LSTM": SMALL, "MLP": SMALL | {LSTM: LSTM.replace("LSTM", "MLP")}}


@pytest.fixture(scope="module", params=["MLP", pytest.param("LSTM", marks=pytest.mark.slow)])
def outcome(request, workplace, base):
    if not (workplace.folder / "bloom-1b4-zh").exists():
        workplace.model("bloom-1b4-zh", base)
        load_data("alpaca-zh", split="train").save_to_disk("alpaca_data_zh")
    return workplace.run("document_003", replace=REPLACED[request.param], encoder=request.param)


def test_loss_falls(outcome):
    logged = losses(outcome.trainer)
    assert len(logged) == 10 and outcome.trainer.state.global_step == 10
    assert sum(logged[-3:]) < sum(logged[:3])
    assert outcome.config.encoder_reparameterization_type.value == outcome.encoder


def test_a_trainer_checkpoint_holds_the_adapter_only(outcome):
    folder = outcome.trainer.state.best_model_checkpoint or f"{outcome.args.output_dir}/checkpoint-10"
    weights = {"adapter_model.safetensors", "training_state.safetensors", "model.safetensors"}
    assert weights | {"adapter_config.json", "README.md", "optimizer.pt"} <= files(folder)
    base = outcome.model.get_base_model()
    model = graftlm.PeftModel.from_pretrained(base, folder).eval()
    ids = outcome.tokenizer("Human: 给出三个保持健康的建议。\n\nAssistant: ", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, outcome.model.eval()(**ids).logits)


def test_same_losses_as_hf_peft(workplace, outcome):
    theirs = workplace.run("document_003", "peft", REPLACED[outcome.encoder])
    line = next(x for x in outcome.printed.splitlines() if x.startswith("trainable params"))
    assert line in theirs.printed
    assert losses(outcome.trainer) == pytest.approx(losses(theirs.trainer), abs=2e-3)


@pytest.mark.parametrize(
    ("encoder", "line"),
    [
        ("MLP", "trainable params: 12,609,536 || all params: 1,315,721,216 || trainable%: 0.9584"),
        ("LSTM", "trainable params: 193,030,144 || all params: 1,496,141,824 || trainable%: 12.9019"),
    ],
)
def test_the_lines_that_the_document_prints(encoder, line, capsys):
    config = BloomConfig(vocab_size=46_145, hidden_size=2048, n_layer=24, n_head=16)
    with torch.device("meta"):
        model = BloomForCausalLM(config)
        settings = graftlm.PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=10, encoder_reparameterization_type=encoder
        )
        graftlm.get_peft_model(model, settings).print_trainable_parameters()
    assert capsys.readouterr().out.strip() == line
