"""pytest plugin of `hf_tests.py`: GraftLM under the name `peft`, which tests are in scope, and one record a test.

Environment: HF_TESTS_LIBRARY ("graftlm" or "peft"), HF_TESTS_FOLDER (the sdist), HF_TESTS_RESULTS (a file of JSON lines),
HF_TESTS_SAMPLE and HF_TESTS_START (every N-th test, from which on).
"""

from __future__ import annotations

import collections
import functools
import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from graftlm.compat import names

CONFIGS = {"LoraConfig", "PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"}
OTHERS = (  # in a test's name: a method, a variant of LoRA, a kind of file or of hardware that is not in scope
    r"adalora|ia3_is|bdlora|velora|montecl|kasa|(?<![a-z])mica|qalora|arrow|kappa|xlora|poly(?!gon)|shira|vblora|(?<![a-z])cpt|hira|osf"
    r"|pickle|gptq|awq|aqlm|eetq|hqq|megatron|multi_?gpu|deepspeed|from_hub|push_to_hub|diffus|stable|peft_version_(is|warn)"
    r"|get_modules_tied|state_dict_by_key_prefix|test_prefixes_|minimal_target_modules|find_target_modules"  # insides
)
FUNCTIONS = r"(^|_)(ia3|loha|lokr|oft|boft|vera|miss|randlora|fourierft|ln_tuning|adaption_prompt)(_|$)"
CLASSES = rf"::Test\w*({'|'.join(names._METHODS)}|Arrow|Velora|Kasa|MonteC)"
LIBRARY = os.environ["HF_TESTS_LIBRARY"]
FOLDER = Path(os.environ["HF_TESTS_FOLDER"])
torch.set_num_threads(1)


class Absent(type):
    """A stand-in for a name that GraftLM does not have: files import, and tests that use it end by its name."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.used()

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return absent(f"{cls.__name__}.{name}")

    def __getitem__(cls, key: Any) -> Any:
        return cls.used()

    def __instancecheck__(cls, instance: Any) -> bool:
        return False

    def __subclasscheck__(cls, other: type) -> bool:
        return other is cls

    def __iter__(cls) -> Any:
        return iter(())

    def __contains__(cls, key: Any) -> bool:
        return False

    def used(cls) -> Any:
        if os.environ.get("PYTEST_CURRENT_TEST") is None:
            return absent(cls.__name__)
        raise AbsentName(cls.__name__)


class AbsentName(Exception):
    """A test used a name that GraftLM does not have."""


def absent(name: str) -> Any:
    return Absent(name, (), {"__module__": "absent"})


def stand_in() -> None:
    """GraftLM as `peft`, with stand-ins for what it has not, and all of HF PEFT's modules."""
    from graftlm import as_peft

    real = as_peft.lookup

    def lookup(module: str, name: str) -> Any:
        try:
            return real(module, name)
        except (ImportError, AttributeError):
            if name.startswith("is_"):
                return lambda *args, **kwargs: name.startswith("is_transformers_ge")
            return absent(name)

    def known(full: str) -> bool:
        path = FOLDER / "src" / full.replace(".", "/")
        return full.partition(".")[0] == "peft" and (path.is_dir() or path.with_suffix(".py").is_file())

    as_peft.lookup, as_peft.known = lookup, known
    as_peft.MODULES = collections.defaultdict(dict, as_peft.MODULES)
    as_peft.start()


def without_diffusers() -> None:
    """Tests of diffusion models skip; the files that hold them import."""

    class Skips:
        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> None:
            pytest.skip("diffusion models")

    module = ModuleType("diffusers")
    classes = ("StableDiffusionPipeline", "UNet2DConditionModel", "AutoModel")
    module.__dict__.update(__version__="0.30.0", **dict.fromkeys(classes, Skips))
    sys.modules["diffusers"] = module


class OwnWords:
    """`pytest.raises` or `pytest.warns` that ask for the class only: texts of errors and warnings are GraftLM's own."""

    differ = False  # in the test that runs

    def __init__(self, inner: Any, match: str) -> None:
        self.inner, self.match = inner, match

    def __enter__(self) -> Any:
        self.found = self.inner.__enter__()
        return self.found

    def __exit__(self, *error: Any) -> Any:
        done = self.inner.__exit__(*error)
        if error[0] is not None and not done:
            return done
        texts = [str(w.message) for w in self.found] if hasattr(self.found, "list") else [str(self.found.value)]
        OwnWords.differ |= not any(re.search(self.match, text) for text in texts)
        return done


def in_own_words() -> None:
    for name in ("raises", "warns"):
        real = getattr(pytest, name)

        def asks(*args: Any, match: Any = None, real: Any = real, **kwargs: Any) -> Any:
            return real(*args, **kwargs) if match is None else OwnWords(real(*args, **kwargs), match)

        setattr(pytest, name, asks)


without_diffusers()
if LIBRARY == "graftlm":
    stand_in()
    in_own_words()


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--regression", action="store_true")  # HF PEFT's own


def pytest_configure(config: Any) -> None:
    for mark in ("regression", "single_gpu_tests", "multi_gpu_tests", "bitsandbytes"):
        config.addinivalue_line("markers", mark)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def in_scope(item: Any) -> bool:
    """By the configurations among a test's parameters, and by its name."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    classes = {v.__name__ for v in parameters.values() if isinstance(v, type) and v.__name__.endswith("Config")}
    named = re.search(OTHERS, f"{item.nodeid} {parameters}".lower()) or re.search(FUNCTIONS, item.originalname)
    return classes <= CONFIGS and not named and not re.search(CLASSES, item.nodeid)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    step, start = int(os.environ.get("HF_TESTS_SAMPLE", "1")), int(os.environ.get("HF_TESTS_START", "0"))
    files: dict[Path, list[Any]] = collections.defaultdict(list)
    for item in items:
        if in_scope(item):
            files[item.path].append(item)
    items[:] = [item for found in files.values() for item in found[start::step]]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    result = (yield).get_result()
    if result.when != "call" and not (result.when == "setup" and result.outcome != "passed"):
        return
    outcome, why, where = result.outcome, "", ""
    words, OwnWords.differ = OwnWords.differ, False
    if call.excinfo is not None:
        error = call.excinfo.value
        why = f"{call.excinfo.typename}: {str(error)[:300]}"
        outcome = outside(error) or outcome
        lines = [entry for entry in call.excinfo.traceback if f"{os.sep}tests{os.sep}test" in str(entry.path)]
        where = f"{lines[-1].path.name}:{lines[-1].lineno + 1}" if lines else ""
    record = {"id": item.nodeid, "outcome": outcome, "why": why, "where": where, "own_words": words}
    with open(os.environ["HF_TESTS_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def outside(error: BaseException) -> str | None:
    """What an error says of a test that is not in scope after all."""
    if isinstance(error, AbsentName):
        name = str(error).partition(".")[0]
        if names.reason(name) in (names.METHOD, names.PART):
            return "of another method"
        return None if name in public_names() else "of an inner function"
    return None


@functools.cache
def public_names() -> set[str]:
    """What HF PEFT exports: the names in its packages' `__all__`, and the functions of `peft.helpers`."""
    root, found = FOLDER / "src" / "peft", set()
    for path in root.rglob("__init__.py"):
        for listed in re.findall(r"__all__ = \[(.*?)\]", path.read_text(encoding="utf-8"), re.DOTALL):
            found |= set(re.findall(r"\w+", listed))
    helpers = (root / "helpers.py").read_text(encoding="utf-8")
    return found | set(re.findall(r"^(?:def|class) ([a-zA-Z]\w*)", helpers, re.MULTILINE))
