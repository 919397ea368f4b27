"""How many of HF PEFT's own tests pass under GraftLM's name, by file, and why others do not.

    pip download --no-deps --no-binary :all: peft==0.21.2 && tar xf peft-0.21.2.tar.gz
    python scripts/hf_tests.py peft-0.21.2 --sample 8             # every 8th test
    python scripts/hf_tests.py peft-0.21.2 --only test_config -k from_json

The tests run in a subprocess under `graftlm.as_peft` on the CPU, offline, on tiny models with random weights that are made
once under the names that the tests ask the hub for (`hf_peft/models.py`). They need `scipy` and `parameterized`.

What is in scope (the rules stand in `hf_peft/plugin.py`): LoRA, Prompt Tuning, P-Tuning, Prefix Tuning. Not counted:

* tests whose parameters, or whose use of a name, are of a method or a variant that GraftLM says it has not;
* tests of pickles, of hub downloads, of GPUs, of other quantisers, and whatever HF PEFT's own tests skip here;
* tests that fail with HF PEFT itself in this place (its models are others, its hub is not there): what fails is run again
  with HF PEFT's source.

Texts of errors and warnings are not compared, their classes are; how many tests would fail by a text alone is said.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent / "hf_peft"
FILES = (
    "auto", "config", "custom_models", "decoder_models", "encoder_decoder_models", "feature_extraction_models", "helpers",
    "initialization", "integrations", "lora_conversion", "lora_ga", "lora_variants", "loraplus", "low_level_api", "mapping",
    "other", "seq_classifier", "target_parameters", "token_classification_qa", "trainable_tokens", "tuners_utils",
)  # fmt: skip


def run(folder: Path, work: Path, library: str, tests: list[str], options: dict[str, str], more: list[str]) -> list[dict]:
    """Run tests with `library` ("graftlm", or "peft" for HF PEFT's own source); one record a test."""
    results = work / f"{library}.jsonl"
    results.unlink(missing_ok=True)
    own, theirs = str(HERE.parent.parent / "src"), str(folder / "src")
    paths = [own if library == "graftlm" else theirs, str(HERE), own, *filter(None, [os.environ.get("PYTHONPATH")])]
    told = {"HF_TESTS_LIBRARY": library, "HF_TESTS_FOLDER": str(folder), "HF_TESTS_RESULTS": str(results), **options}
    environment = {**os.environ, **told, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "plugin", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short"]
    with open(work / f"{library}.log", "w", encoding="utf-8") as log:
        subprocess.run(
            [*command, "-c", os.devnull, f"--rootdir={work}", *more, *tests],
            cwd=work / "hub", env=environment, stdout=log, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
    if not results.exists():
        raise SystemExit(f"No test ran; see {work / f'{library}.log'}")
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def prepare(folder: Path, work: Path) -> None:
    """A package of links to the tests, and the tiny models."""
    (work / "tests").mkdir(parents=True, exist_ok=True)
    (work / "tests" / "__init__.py").touch()
    for path in sorted((folder / "tests").glob("*.py")):
        link = work / "tests" / path.name
        if path.name != "conftest.py" and not link.exists():
            link.symlink_to(path.resolve())
    if not (work / "hub").exists():
        subprocess.run([sys.executable, str(HERE / "models.py"), str(work / "hub")], check=True)


def judged(records: list[dict], folder: Path, work: Path, again: bool) -> list[dict]:
    """The records, where failures that HF PEFT's own source shares are told apart."""
    failed = [r["id"] for r in records if r["outcome"] == "failed"]
    if failed and again:
        tests = [str(work / test) for test in failed]
        own = {r["id"]: r["outcome"] for r in run(folder, work, "peft", tests, {"HF_TESTS_SAMPLE": "1"}, [])}
        for record in records:
            if record["outcome"] == "failed" and own.get(record["id"]) != "passed":
                record["outcome"] = "not with HF PEFT either"
    return records


def report(records: list[dict], details: bool) -> None:
    """Counts by file, the share, and failures by reason."""
    by_file: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for record in records:
        counts = by_file[Path(record["id"].partition("::")[0]).name]
        counts[record["outcome"]] += 1
        counts["passed in other words"] += record["outcome"] == "passed" and record["own_words"]
    total: collections.Counter = sum(by_file.values(), collections.Counter())
    for name, counts in [*sorted(by_file.items()), ("all", total)]:
        passed, counted = counts["passed"], counts["passed"] + counts["failed"]
        rest = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()) if n and kind not in ("passed", "failed"))
        print(f"{name:36}{passed:5} of {counted:5} {100 * passed / max(counted, 1):6.1f} %   {rest}")
    groups: dict[str, list[dict]] = collections.defaultdict(list)
    for record in records:
        if record["outcome"] == "failed":
            line = record["why"].split("\n")[0]
            groups[re.sub(r"\d+", "#", re.sub(r"/\S+", "", line))[:150]].append(record)
    for reason, found in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(found)}  {reason}")
        for record in found if details else found[:3]:
            print(f"      {record['id'].partition('test_')[1]}{record['id'].partition('test_')[2]}  ({record['where']})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="HF PEFT's unpacked sdist")
    parser.add_argument("--sample", type=int, default=1, help="every N-th test in scope of each file")
    parser.add_argument("--start", type=int, default=0, help="begin with this one of the N")
    parser.add_argument("--only", nargs="+", metavar="FILE", help="these files (test_config …)")
    parser.add_argument("-k", default="", help="pytest's expression")
    parser.add_argument("--work", type=Path, help="folder of links, models and logs, kept (default: a temporary one)")
    parser.add_argument("--no-peft", action="store_true", help="do not run failures with HF PEFT itself")
    parser.add_argument("--details", action="store_true", help="name every failure")
    args = parser.parse_args()
    work = args.work.resolve() if args.work else Path(tempfile.mkdtemp(prefix="hf-tests-"))
    prepare(args.folder, work)
    names = [Path(name).stem for name in args.only or [f"test_{name}" for name in FILES]]
    options = {"HF_TESTS_SAMPLE": str(args.sample), "HF_TESTS_START": str(args.start)}
    tests = [str(work / "tests" / f"{name}.py") for name in names]
    records = run(args.folder.resolve(), work, "graftlm", tests, options, ["-k", args.k] if args.k else [])
    report(judged(records, args.folder.resolve(), work, not args.no_peft), args.details)


if __name__ == "__main__":
    main()
