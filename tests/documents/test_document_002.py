"""Document 002: two Prompt Tuning adapters on one base, trained by a plain Trainer, saved, reloaded and switched."""

import pytest
import torch
from document_runner import files
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

NAME = "bigscience/bloomz-560m"
REPLACED = {"NUM_EPOCHS = 6": "NUM_EPOCHS = 1", "range(50)": "range(24)", "max_new_tokens=100": "max_new_tokens=24"}


@pytest.fixture(scope="module")
def outcome(workplace, base):
    workplace.model(NAME, base)
    return workplace.run("document_002", replace=REPLACED)


def prompt_of(folder: str) -> torch.Tensor:
    return load_file(f"{folder}/adapter_model.safetensors")["prompt_embeddings"]


def test_two_adapters_of_one_base(outcome, base):
    assert outcome.printed.count("trainable params: 1,024 || all params: ") == 2
    for folder in (outcome.output_directory_prompt, outcome.output_directory_sentences):
        assert files(folder) == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        assert prompt_of(folder).shape == (4, 256)
    assert not torch.allclose(prompt_of(outcome.output_directory_prompt), prompt_of(outcome.output_directory_sentences))
    untouched = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(torch.equal(v, untouched[k]) for k, v in outcome.foundational_model.state_dict().items())


def test_training_changed_what_was_saved(outcome):
    """Both start from the same seed's numbers one after the other, and the Trainer moved each by its own data."""
    for trainer in (outcome.trainer_prompt, outcome.trainer_sentences):
        assert trainer.state.global_step > 0 and trainer.state.log_history[-1]["train_loss"] > 0
        assert trainer.args.auto_find_batch_size and trainer.args.device.type == "cpu"


def test_loaded_adapters_generate_as_the_trained_ones(outcome):
    loaded, get_outputs = outcome.loaded_model_prompt, outcome.get_outputs
    assert torch.equal(
        get_outputs(outcome.peft_model_prompt, outcome.input_prompt, 20),
        outcome.loaded_model_prompt_outputs[:, : outcome.input_prompt["input_ids"].shape[1] + 20],
    )
    assert loaded.active_adapter == "quotes"
    assert torch.equal(
        get_outputs(outcome.peft_model_sentences, outcome.input_sentences, 20),
        get_outputs(loaded, outcome.input_sentences, 20),
    )
    with torch.no_grad():
        quotes = loaded(**outcome.input_sentences).logits[:, -1]
        loaded.set_adapter("default")
        prompts = loaded(**outcome.input_sentences).logits[:, -1]
        loaded.set_adapter("quotes")
    assert not torch.allclose(quotes, prompts)
    assert torch.equal(
        get_outputs(outcome.foundational_model, outcome.input_prompt, 50), outcome.foundational_outputs_prompt
    )


def test_same_result_as_hf_peft(workplace, outcome):
    """In batches of one: in padded rows HF PEFT puts the padding between virtual and real tokens, which changes the loss."""
    alone = REPLACED | {
        "auto_find_batch_size=True": "auto_find_batch_size=True, per_device_train_batch_size=1",
        "range(24)": "range(5)",
        "range(25)": "range(5)",
    }
    ours, theirs = [], []
    for library, kept in (("graftlm", ours), ("peft", theirs)):
        run = workplace.run("document_002", library, alone)
        kept += [prompt_of(run.output_directory_prompt), prompt_of(run.output_directory_sentences)]
        kept += [run.loaded_model_prompt_outputs, run.loaded_model_sentences_outputs]
    for mine, other in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    assert [t.tolist() for t in ours[2:]] == [t.tolist() for t in theirs[2:]]
