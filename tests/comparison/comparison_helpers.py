"""What the tests of the comparison compare."""

BROKEN = "lora:r=-1"
DIVERGING = "bottleneck:training.learning_rate=1e30"
DATA = {"source": "tweets", "max_examples": 8, "max_eval_examples": 6}
SETTINGS = {"training": {"epochs": 2, "batch_size": 4, "logging_steps": 1}}
