# ruff: noqa
# fmt: off
# Document 003, P-Tuning on Alpaca-zh: its code, in order. Of the two configurations the later one (LSTM) is used.
from datasets import Dataset
from transformers import AutoTokenizer, AutoModelForCausalLM, DataCollatorForSeq2Seq, TrainingArguments, Trainer

dataset = Dataset.load_from_disk('alpaca_data_zh/')

tokenizer = AutoTokenizer.from_pretrained('bloom-1b4-zh/')

def process_func(example, MAX_LENGTH = 256):
    input_ids, attention_mask, labels = [], [], []
    instruction = tokenizer("\n".join(['Human: ' + example['instruction'], example['input']]).strip() + '\n\nAssistant: ')
    response = tokenizer(example['output'] + tokenizer.eos_token)
    input_ids = instruction['input_ids'] + response['input_ids']
    attention_mask = instruction['attention_mask'] + response['attention_mask']
    labels = [-100] * len(instruction['input_ids']) + response['input_ids']
    if len(input_ids) > MAX_LENGTH:
        input_ids = input_ids[:MAX_LENGTH]
        attention_mask = attention_mask[:MAX_LENGTH]
        labels = labels[:MAX_LENGTH]
    return {
        'input_ids': input_ids,
        'attention_mask': attention_mask,
        'labels': labels
    }

tokenized_dataset = dataset.map(process_func, remove_columns=dataset.column_names)

model = AutoModelForCausalLM.from_pretrained('bloom-1b4-zh/')

from peft import PromptEncoderConfig, get_peft_model, TaskType, PromptEncoderReparameterizationType

config = PromptEncoderConfig(task_type=TaskType.CAUSAL_LM,
                             num_virtual_tokens=10
                           )

# 这里再提供一个LSTM版本的Config
config = PromptEncoderConfig(task_type=TaskType.CAUSAL_LM,
                             num_virtual_tokens=10,
                             encoder_reparameterization_type=PromptEncoderReparameterizationType.LSTM,
                             # 设置为LSTM后还可以控制LSTM网络的参数
                             # encoder_dropout=0.1,
                             # encoder_num_layers=2,
                             # encoder_hidden_size=1024
                           )

model = get_peft_model(model, config)

model.print_trainable_parameters()

args = TrainingArguments(
    output_dir = './p tuning',
    per_device_train_batch_size=1,
    gradient_accumulation_steps=8,
    logging_steps=10,
    num_train_epochs=1
)

trainer = Trainer(
    args = args,
    train_dataset=tokenized_dataset,
    model = model,
    data_collator = DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)
)

trainer.train()
