"""QLoRA on advertising copy: key words in, a text out, over a base in four bits.

    python examples/qlora_adgen.py
    python examples/qlora_adgen.py --model zai-org/chatglm3-6b --data HasturOfficial/adgen --epochs 1 --learning-rate 1e-3
    python examples/qlora_adgen.py --no-quantization
    python examples/qlora_adgen.py --resume runs/qlora-adgen/checkpoint-20

Data: columns `content` and `summary`. With ChatGLM's tokenizer a row becomes `[gMASK] sop content summary eop`.
"""

import argparse

import rich
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments

from graftlm import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
from graftlm.bundled import resolve
from graftlm.data import LengthSortedCollator, load_data, prepare, prompts_and_targets, show
from graftlm.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
gpu = torch.cuda.is_available()

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="graftlm-base", help="id or path of the base model")
parser.add_argument("--data", default="adgen-zh", help="bundled name, file, folder or id")
parser.add_argument("--no-quantization", action="store_true", help="hold the base in floating point")
parser.add_argument(
    "--compute-dtype", choices=DTYPES, default="fp16" if gpu else "bf16", help="of the four-bit layers' products"
)
parser.add_argument("--epochs", type=float, default=8)
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--batch-size", type=int, default=6)
parser.add_argument("--accumulation", type=int, default=8, help="batches that make one update")
parser.add_argument("--learning-rate", type=float, default=1e-2)
parser.add_argument("--resume", default=None, help="a checkpoint folder to go on from")
parser.add_argument("--output", default="runs/qlora-adgen")
args = parser.parse_args()

name = resolve(args.model)
seed = 8

# 1. Data: a random look, tokenised with the key words masked, shuffled.
raw = load_data(args.data)
rich.print(show(raw["train"], n=3, seed=seed))
tokenizer = AutoTokenizer.from_pretrained(name)
train = prepare(raw["train"], tokenizer, "adgen", max_input_length=512, max_output_length=1536)
rich.print(show(train, tokenizer, n=1, seed=seed))
train = train.shuffle(seed=seed).flatten_indices()
held_out = raw["test" if "test" in raw else "train"]
questions, references = (texts[:2] for texts in prompts_and_targets(held_out, "adgen"))

# 2. The base: four bits a weight (NF4), the scales of the blocks quantised too.
options = {"dtype": torch.float16 if gpu else torch.float32, "device_map": "auto" if gpu else "cpu"}
if not args.no_quantization:
    options["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[args.compute_dtype],
    )
base = AutoModelForCausalLM.from_pretrained(name, **options)
print(f"The base takes {base.get_memory_footprint() / 2**20:.2f} MiB.")


def write(model, question: str) -> str:
    inputs = tokenizer(question, return_tensors="pt").to(model.device)
    outputs = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    return tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


before = [write(base, question) for question in questions]
base = prepare_model_for_kbit_training(base)

# 3. The adapter: on the model family's usual layers, as the table says (for ChatGLM and Bloom: query_key_value).
target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[base.config.model_type]
config = LoraConfig(
    target_modules=target_modules, r=4, lora_alpha=32, lora_dropout=0.05, bias="none", task_type=TaskType.CAUSAL_LM
)
model = get_peft_model(base, config)
model.print_trainable_parameters()

# 4. Training: rows of a batch from long to short, padded on the right; checkpoints hold the adapter only.
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=args.output,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        learning_rate=args.learning_rate,
        num_train_epochs=args.epochs,
        max_steps=args.max_steps,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        logging_steps=5,
        optim="adamw_torch",
        fp16=gpu,
        save_steps=20,
        seed=seed,
        report_to="none",
    ),
    train_dataset=train,
    data_collator=LengthSortedCollator(tokenizer),
)
trainer.train(resume_from_checkpoint=args.resume)

# 5. Save, and the same key words again.
model.save_pretrained(args.output)
model.eval()
for question, reference, plain in zip(questions, references, before, strict=True):
    print(f"\n{question}\nBefore    {plain!r}\nAfter     {write(model, question)!r}\nReference {reference!r}")
print(f"\nSaved in {args.output}")
