"""OpenAI's API over one base and its adapters of every kind (needs the extra `serve`)."""
