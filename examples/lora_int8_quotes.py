"""LoRA on English quotes, over a base in int8.

    python examples/lora_int8_quotes.py
    python examples/lora_int8_quotes.py --model facebook/opt-6.7b --learning-rate 2e-4
    python examples/lora_int8_quotes.py --target-modules q_proj v_proj --model facebook/opt-125m
    python examples/lora_int8_quotes.py --no-quantization

Data: a column `quote`, `prompt` or `text`.
"""

import argparse
import logging

import rich
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from graftlm import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from graftlm.bundled import resolve
from graftlm.data import CausalLMCollator, load_data, prepare, show

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="graftlm-base", help="id or path of the base model")
parser.add_argument("--data", default="quotes", help="bundled name, file, folder or id")
parser.add_argument(
    "--target-modules", nargs="+", default=None, help="layers to adapt; all of attention and feed-forward if none"
)
parser.add_argument("--no-quantization", action="store_true", help="hold the base in floating point")
parser.add_argument("--epochs", type=float, default=8)
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--learning-rate", type=float, default=5e-4)
parser.add_argument("--output", default="runs/lora-int8-quotes")
args = parser.parse_args()

name = resolve(args.model)
gpu = torch.cuda.is_available()
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells at every product how it rounds

# 1. The base: eight bits a weight, rounded while it is loaded.
options = {"dtype": torch.float16 if gpu else torch.float32, "device_map": "auto" if gpu else "cpu"}
if not args.no_quantization:
    options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
base = AutoModelForCausalLM.from_pretrained(name, **options)
tokenizer = AutoTokenizer.from_pretrained(name)
if tokenizer.pad_token_id is None:
    tokenizer.pad_token = tokenizer.eos_token


def complete(model, text: str) -> str:
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=25, do_sample=False, repetition_penalty=1.2)
    return tokenizer.decode(outputs[0], skip_special_tokens=True)


texts = ["The best thing about", "A good friend is", "It is better to"]
before = [complete(base, text) for text in texts]

# 2. Made ready for training: frozen, activations recomputed in the backward pass; what is cast is printed.
base = prepare_model_for_kbit_training(base)
print(f"The base takes {base.get_memory_footprint() / 2**20:.1f} MiB.")

# 3. The adapter.
config = LoraConfig(
    r=8,
    lora_alpha=32,
    target_modules=args.target_modules or "all-linear",
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)
model = get_peft_model(base, config)
model.print_trainable_parameters()

# 4. A look at the data, then training.
raw = load_data(args.data)
rich.print(show(raw["train"], n=3))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        per_device_train_batch_size=4,
        learning_rate=args.learning_rate,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        fp16=gpu,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=prepare(raw["train"], tokenizer, "text", max_length=128, end="eos"),
    data_collator=CausalLMCollator(tokenizer),
)
trainer.train()

# 5. Save, and the same beginnings again.
model.save_pretrained(args.output)
model.eval()
for text, plain in zip(texts, before, strict=True):
    print(f"\nBefore {plain!r}\nAfter  {complete(model, text)!r}")
print(f"\nSaved in {args.output}")
