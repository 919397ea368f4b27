"""Pretrain `graftlm-base` from scratch on text of Debian packages.

    python scripts/pretrain_base.py                  # every stage, about 75 minutes on two free cores
    python scripts/pretrain_base.py train --minutes 20
    python scripts/pretrain_base.py export evaluate card

Needs a Debian system (`apt-get download`, `dpkg`; about 1 GB of packages, none is installed) and the project's own
dependencies. A stage that was cut short is started again; `train` goes on from its last checkpoint. The packages and
their share of the mix are in `pretrain/sources.py`, the training settings in `pretrain/train.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

# one thread an operator: the training loop runs its own workers, see pretrain/train.py
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pretrain import corpus, export  # noqa: E402
from pretrain.train import TrainConfig, train  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("corpus", "tokenizer", "pack", "train", "export", "evaluate", "card")


def parse() -> argparse.Namespace:
    """The command line: stages, folders, and every field of `TrainConfig` as an option."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; none means all, in order")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "pretrain", help="packages, corpus, checkpoints")
    parser.add_argument("--target", type=Path, default=ROOT / "src" / "graftlm" / "assets" / "graftlm-base")
    for field in dataclasses.fields(TrainConfig):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = parser.parse_args()
    unknown = [stage for stage in args.stages if stage not in STAGES]
    if unknown:
        parser.error(f"unknown stages {unknown}; choose from {', '.join(STAGES)}")
    return args


def main() -> None:
    """Run the chosen stages in their order."""
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    args.target.mkdir(parents=True, exist_ok=True)
    cfg = TrainConfig(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainConfig)})
    actions: dict[str, Callable[[], object]] = {
        "corpus": lambda: corpus.build_corpus(args.work),
        "tokenizer": lambda: corpus.train_tokenizer(args.work),
        "pack": lambda: corpus.pack(args.work),
        "train": lambda: train(args.work, cfg),
        "export": lambda: export.export(args.work, args.target),
        "evaluate": lambda: print(json.dumps(export.evaluate(args.work, args.target), indent=1)),
        "card": lambda: export.write_card(args.work, args.target),
    }
    for stage in STAGES:
        if stage in (args.stages or STAGES):
            print(f"== {stage}", flush=True)
            actions[stage]()


if __name__ == "__main__":
    main()
