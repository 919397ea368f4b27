"""HF PEFT's names that are not ours by design: what they stand for here, and programs that ask for `peft`.

The core has one wrapper, one layer and one base class of methods. HF PEFT has a class for each task, method and kind of
layer, and programs ask `isinstance` of them; the classes here answer.

| file | names |
|---|---|
| `names.py` | which names of HF PEFT there are, where they live here, and why others are not here |
| `tasks.py` | `PeftModelForCausalLM` and its like, `AutoPeftModel*`, `PeftMixedModel` |
| `tuners.py` | `LoraModel`, `BaseTunerLayer`, `LoraLayer` and their like |
| `encoders.py` | `PromptEmbedding`, `PromptEncoder`, `PrefixEncoder` in HF PEFT's signature |
| `mappings.py` | tables by method and by task |
| `optimizers.py` | `create_loraplus_optimizer` |
| `helpers.py` | functions of `peft.utils`, `peft.helpers`, `peft.functional` |
"""
