"""Prefix Tuning on labelled tweets, in a plain PyTorch loop.

    python examples/prefix_tweets.py
    python examples/prefix_tweets.py --model bigscience/bloomz-560m --data my_tweets.csv --epochs 50

Data: columns `Tweet text` and `Label`, or any text and label column that `graftlm.data` finds.
"""

import argparse
from itertools import islice

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, get_linear_schedule_with_warmup

from graftlm import PeftConfig, PeftModel, PrefixTuningConfig, TaskType, get_peft_model
from graftlm.bundled import resolve
from graftlm.data import load_data, prepare, prompts_and_targets

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="graftlm-base", help="id or path of the base model")
parser.add_argument("--data", default="tweets", help="bundled name, file, folder or id")
parser.add_argument("--epochs", type=int, default=8)
parser.add_argument("--max-steps", type=int, default=None, help="stop each epoch after so many batches")
parser.add_argument("--learning-rate", type=float, default=1e-2)
parser.add_argument("--output", default="runs/prefix-tweets")
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
name = resolve(args.model)

# 1. Data: every row 64 tokens, padded on the left, the loss on the label only.
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
raw = load_data(args.data)
held_out = raw["test" if "test" in raw else "train"]
train = prepare(raw["train"], tokenizer, "label", padding="max_length", max_length=64)
test = prepare(held_out, tokenizer, "label", padding="max_length", max_length=64)
train_loader = DataLoader(train, shuffle=True, collate_fn=default_data_collator, batch_size=8)
test_loader = DataLoader(test, collate_fn=default_data_collator, batch_size=16)
prompts, targets = prompts_and_targets(held_out, "label")


def show(title: str, model: torch.nn.Module) -> None:
    """What the model answers to a few held-out tweets."""
    picks = range(0, len(prompts), max(1, len(prompts) // 5))
    inputs = tokenizer([prompts[i] for i in picks], return_tensors="pt", padding=True).to(device)
    outputs = model.generate(**inputs, max_new_tokens=8, do_sample=False, eos_token_id=tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"\n{title}")
    for i, answer in zip(picks, answers, strict=True):
        print(f"  {prompts[i][:70]!r}… -> {answer.strip()!r} (label: {targets[i]!r})")


# 2. The model: the base is frozen, a network of two layers makes the prefix.
base = AutoModelForCausalLM.from_pretrained(name, dtype="auto" if device == "cuda" else "float32").to(device)
show("Before", base)
config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=30, prefix_projection=True)
model = get_peft_model(base, config)
model.print_trainable_parameters()

# 3. Training: AdamW, a linear schedule, loss and perplexity an epoch.
batches = min(len(train_loader), args.max_steps or len(train_loader))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=args.learning_rate)
schedule = get_linear_schedule_with_warmup(optimizer, 0, batches * args.epochs)


def held_out_loss() -> float:
    model.eval()
    with torch.no_grad():
        losses = [model(**{k: v.to(device) for k, v in b.items()}).loss for b in islice(test_loader, args.max_steps)]
    return torch.stack(losses).mean().item()


for epoch in range(args.epochs):
    model.train()
    total = 0.0
    for batch in islice(train_loader, batches):
        loss = model(**{k: v.to(device) for k, v in batch.items()}).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.item()
    train_loss, test_loss = torch.tensor(total / batches), torch.tensor(held_out_loss())
    print(
        f"epoch {epoch}: train loss {train_loss:.4f} ppl {train_loss.exp():.3f}   "
        f"held-out loss {test_loss:.4f} ppl {test_loss.exp():.3f}"
    )

# 4. Save: the prefix alone, and beside it what training could go on from. Then load it as a user would.
model.save_pretrained(args.output)
config = PeftConfig.from_pretrained(args.output)
base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, dtype=base.dtype).to(device)
show("After", PeftModel.from_pretrained(base, args.output))
print(f"\nSaved in {args.output}")
