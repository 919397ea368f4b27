"""Adapters in the forms of other programs: LoRA directories and prompt embeddings for vLLM, GGUF files, Modelfiles."""
