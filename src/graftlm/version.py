"""The version, importable without the rest."""

__version__ = "0.1.0"
PEFT_VERSION = "0.21.2"  # of HF PEFT, whose names and files these are
