"""Stages of `scripts/pretrain_base.py`: sources, extract, corpus, network, train, export."""
