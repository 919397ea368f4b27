"""Two Prompt Tuning adapters over one base: one for prompts, one for quotes, switched at run time.

python examples/prompt_two_adapters.py
python examples/prompt_two_adapters.py --model bigscience/bloomz-560m --epochs 6
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from graftlm import PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from graftlm.bundled import resolve
from graftlm.data import CausalLMCollator, load_data, prepare

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="graftlm-base", help="id or path of the base model")
parser.add_argument("--data", default="prompts", help="data of the first adapter: bundled name, file, folder or id")
parser.add_argument("--data2", default="quotes", help="data of the second adapter")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--learning-rate", type=float, default=3e-2)
parser.add_argument("--virtual-tokens", type=int, default=4)
parser.add_argument("--output", default="runs/two-adapters")
args = parser.parse_args()

name = resolve(args.model)
questions = ["I want you to act as a motivational coach. ", "There are two nice things that should matter to you:"]

# 1. The base, and what it says by itself.
tokenizer = AutoTokenizer.from_pretrained(name)
base = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if torch.cuda.is_available() else "float32")


def answer(model, question: str) -> str:
    inputs = tokenizer(question, return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=30, do_sample=False, repetition_penalty=1.5)
    return tokenizer.decode(outputs[0], skip_special_tokens=True)


before = [answer(base, question) for question in questions]

# 2. Two adapters. Each model adds a few virtual tokens; the base is one and the same and stays as it is.
config = PromptTuningConfig(
    task_type=TaskType.CAUSAL_LM,
    prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,  # starts from real tokens: learns faster than RANDOM
    num_virtual_tokens=args.virtual_tokens,
    tokenizer_name_or_path=name,
)
folders = [str(Path(args.output) / "prompts"), str(Path(args.output) / "quotes")]
for source, folder in zip((args.data, args.data2), folders, strict=True):
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=folder,
            auto_find_batch_size=True,
            learning_rate=args.learning_rate,
            num_train_epochs=args.epochs,
            max_steps=args.max_steps,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=prepare(load_data(source, split="train"), tokenizer, "text"),
        data_collator=CausalLMCollator(tokenizer),
    )
    trainer.train()
    trainer.model.save_pretrained(folder)

# 3. One base in memory, both adapters on it.
model = PeftModel.from_pretrained(base, folders[0], adapter_name="prompts")
model.load_adapter(folders[1], adapter_name="quotes")
for adapter, question, plain in zip(("prompts", "quotes"), questions, before, strict=True):
    model.set_adapter(adapter)
    print(f"\nBefore            {plain!r}\nAfter ({adapter}) {answer(model, question)!r}")
with model.disable_adapter():
    assert [answer(model, question) for question in questions] == before, "the base has changed"
print(f"\nSaved in {folders[0]} and {folders[1]}; without adapters the base answers as before.")
