"""P-Tuning on instructions (`Human: … Assistant: …`), with an MLP or an LSTM behind the virtual tokens.

    python examples/p_tuning_alpaca.py --encoder mlp
    python examples/p_tuning_alpaca.py --encoder lstm --model Langboat/bloom-1b4-zh --data my_instructions.json

Data: columns `instruction`, `input` (may be empty) and `output`.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from graftlm import PeftModel, PromptEncoderConfig, PromptEncoderReparameterizationType, TaskType, get_peft_model
from graftlm.bundled import resolve
from graftlm.data import load_data, prepare, prompts_and_targets

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="graftlm-base", help="id or path of the base model")
parser.add_argument("--data", default="alpaca-zh", help="bundled name, file, folder (save_to_disk too) or id")
parser.add_argument("--encoder", choices=("mlp", "lstm"), default="mlp")
parser.add_argument("--epochs", type=float, default=2)
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--output", default="runs/p-tuning-alpaca")
args = parser.parse_args()

name = resolve(args.model)

# 1. Data: the loss is on the answer and its end token, 256 tokens at most.
raw = load_data(args.data)
tokenizer = AutoTokenizer.from_pretrained(name)
train = prepare(raw["train"], tokenizer, "alpaca", max_length=256)
held_out = raw["test" if "test" in raw else "train"]
questions, references = (texts[:2] for texts in prompts_and_targets(held_out, "alpaca"))

# 2. The base, and its answers.
base = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if torch.cuda.is_available() else "float32")


def answer(model, question: str) -> str:
    inputs = tokenizer(question, return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=30, do_sample=False, repetition_penalty=1.2)
    return tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


before = [answer(base, question) for question in questions]

# 3. The adapter: ten virtual tokens, made by the network from a trained table.
config = PromptEncoderConfig(
    task_type=TaskType.CAUSAL_LM,
    num_virtual_tokens=10,
    encoder_reparameterization_type=PromptEncoderReparameterizationType(args.encoder.upper()),
)
model = get_peft_model(base, config)
model.print_trainable_parameters()

# 4. Training: one row a batch, eight batches a step.
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        learning_rate=args.learning_rate,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=train,
    data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
)
trainer.train()

# 5. Save and use. What is used is ten vectors; the network is kept beside them, to train on.
model.save_pretrained(args.output)
loaded = PeftModel.from_pretrained(base, args.output)
for question, reference, plain in zip(questions, references, before, strict=True):
    print(f"\n{question!r}\nBefore    {plain!r}\nAfter     {answer(loaded, question)!r}\nReference {reference!r}")
print(f"\nSaved in {args.output}")
