"""Imports run one way and never in a circle, for types as well; optional and heavy libraries stay where they belong, and the
public names are these."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import graftlm

SOURCE = Path(graftlm.__file__).parent
PACKAGE = "graftlm"

# Lower floors first. A module may import from its own floor and from those below it; what it imports for types counts.
# (Some rooms are still to come.)
FLOORS: list[set[str]] = [
    {"errors", "files", "processes", "cluster", "version", "naming", "bundled", "gguf"},
    {"kernels"},
    {"routing"},
    {"placing", "modes"},
    {"architectures", "quantization", "preparation", "checkpointing"},
    {"layers"},
    {"methods", "fingerprint"},
    {"attached", "adapters"},
    {"passes"},
    {"mixing", "joint", "merging", "status", "checkpoint", "card", "generating", "injecting", "hotswap", "converting"},
    {"model", "delegating"},
    {"data"},
    {"training", "inference"},
    {"planning"},
    {
        "comparison", "serving", "fleet", "exporting", "studio", "cli", "utils", "compat", "as_peft", "functional",
        "registering", "helpers", "__init__", "__main__",
    },
]  # fmt: skip
APART = [("training", "inference"), ("inference", "training")]
# What a method's file may take from another: shared modules, not other methods, but those that it is a variant of.
SHARED = {
    "base", "config", "soft_prompt", "layered", "lora_change", "lora_conv", "lora_init", "lora_experts", "lora_combine",
    "targets", "lora_replicated", "lora_tied", "tokens", "prompt_tuning", "projected", "biased", "orthogonal",
    "lora_data_config", "lora_data_init", "lora_invoked", "prefix_tuning",
}  # fmt: skip
METHOD_IMPORTS = {
    "layered": {"targets"},
    "lora": {
        "biased",
        "layered",
        "lora_change",
        "lora_conv",
        "lora_data_config",
        "lora_data_init",
        "lora_experts",
        "lora_init",
        "lora_invoked",
        "lora_replicated",
        "lora_tied",
        "targets",
        "tokens",
    },  # fmt: skip
    "lora_conv": {"lora_change"},
    "lora_tied": {"lora_change", "targets"},
    "lora_change": {"lora_data_config", "lora_data_init", "lora_init"},
    "lora_data_init": {"lora_data_config", "targets"},
    "lora_eva": {"lora_change", "lora_data_init", "targets"},
    "lora_experts": {"lora_change"},
    "lora_combine": {"lora_change", "tokens"},
    "biased": {"layered"},
    "adalora": {"lora"},
    "boft": {"biased", "orthogonal"},
    "miss": {"biased"},
    "oft": {"biased", "orthogonal"},
    "bottleneck": {"targets"},
    "fourierft": {"layered", "targets"},
    "ia3": {"layered"},
    "ln_tuning": {"layered", "targets"},
    "loha": {"layered", "targets"},
    "lokr": {"layered", "targets"},
    "projected": {"layered"},
    "randlora": {"projected"},
    "vera": {"projected"},
    "p_tuning": {"soft_prompt"},
    "prompt_tuning": {"soft_prompt"},
    "prefix_tuning": {"soft_prompt"},
    "multitask_prompt_tuning": {"prompt_tuning"},
    "cartridge": {"prefix_tuning"},
    "tokens": {"layered", "targets"},
    "trainable_tokens": {"layered", "targets", "tokens"},
}


def files() -> list[Path]:
    return sorted(p for p in SOURCE.rglob("*.py") if "assets" not in p.parts)


def dotted(path: Path) -> str:
    """graftlm.methods.lora for src/graftlm/methods/lora.py; a package's __init__ is the package."""
    parts = [PACKAGE, *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(path: Path) -> list[str]:
    """The package that relative imports of this file start from."""
    return [PACKAGE, *path.relative_to(SOURCE).parts[:-1]]


def only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(path: Path, types: bool) -> Iterator[tuple[str, str, int]]:
    """Every module that a file imports when it runs (with `types` those for types, too), absolute, with what of it and the
    line."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if only_for_types(node) and not types:
            pending += node.orelse  # type: ignore[attr-defined]
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package_of(path)[: len(package_of(path)) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((source, alias.name, node.lineno) for alias in node.names)
        pending += ast.iter_child_nodes(node)


def imports(path: Path, types: bool = False) -> Iterator[tuple[str, int]]:
    """The same as names; `from x import y` gives x and x.y."""
    for source, name, line in imported(path, types):
        yield source, line
        if name:
            yield f"{source}.{name}", line


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Those of the package itself and those for types, as module paths that exist."""
    for name, line in imports(path, types=True):
        parts = name.split(".")
        if parts[0] == PACKAGE and len(parts) > 1 and exists(parts[1:]):
            yield name, line


def exists(parts: list[str]) -> bool:
    place = SOURCE.joinpath(*parts)
    return place.is_dir() or place.with_suffix(".py").is_file()


def top(name: str) -> str:
    """First part below the package: `methods` for graftlm.methods.lora."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def floor(part: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if part in names)


def links(path: Path) -> set[str]:
    """The files of the package that a file takes something from, by their dotted names; a package is its __init__."""
    known = {dotted(p) for p in files()}
    found = {next((n for n in (f"{a}.{b}", a) if n in known), "") for a, b, _ in imported(path, types=True)}
    return found - {"", dotted(path)}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """What is left when whoever imports nothing of the rest, or is imported by nothing of it, has been taken away."""
    left = dict(graph)
    while True:
        taken = {name for there in left.values() for name in there}
        ends = [name for name, there in left.items() if name not in taken or not there & left.keys()]
        if not ends:
            return [[name, *sorted(there & left.keys())] for name, there in sorted(left.items())]
        for name in ends:
            del left[name]


def test_no_circles() -> None:
    """Neither among files nor among the parts of the package, at run time or in types."""
    by_file = {dotted(p): links(p) for p in files()}
    by_part: dict[str, set[str]] = {top(name): set() for name in by_file}
    for name, there in by_file.items():
        by_part[top(name)] |= {top(other) for other in there} - {top(name)}
    for graph in (by_file, by_part):
        left = circles(graph)
        assert not left, "circles: " + "; ".join(f"{name} -> {', '.join(there)}" for name, *there in left)


def test_every_file_has_its_floor() -> None:
    known = set.union(*FLOORS)
    assert {top(dotted(p)) for p in files()} <= known


@pytest.mark.parametrize("path", files(), ids=lambda p: dotted(p))
def test_imports_run_one_way(path: Path) -> None:
    here = top(dotted(path))
    for name, line in own_imports(path):
        there = top(name)
        assert floor(there) <= floor(here), f"{path.name}:{line}: {here} imports {there}, which stands above it"
        assert (here, there) not in APART, f"{path.name}:{line}: {here} imports {there}"


@pytest.mark.parametrize("path", sorted((SOURCE / "methods").glob("*.py")), ids=lambda p: p.stem)
def test_no_method_imports_another(path: Path) -> None:
    if path.stem == "__init__":
        return
    for name, line in own_imports(path):
        parts = name.split(".")
        if parts[1] != "methods" or len(parts) < 3:
            continue
        allowed = METHOD_IMPORTS.get(path.stem, set()) | {"base", "config", "fields"}
        assert parts[2] in allowed, f"{path.name}:{line}: imports {parts[2]}"
    assert METHOD_IMPORTS.get(path.stem, set()) - {"soft_prompt", "lora"} <= SHARED


@pytest.mark.parametrize("path", files(), ids=lambda p: dotted(p))
def test_foreign_libraries_stay_where_they_belong(path: Path) -> None:
    roots = {name.split(".")[0] for name, _ in imports(path)}
    assert "peft" not in roots
    if top(dotted(path)) not in ("cluster", "comparison", "fleet", "cli"):
        assert "ray" not in roots
    if path != SOURCE / "quantization.py":
        assert "bitsandbytes" not in roots
    here = top(dotted(path))
    if here not in ("cli", "training", "comparison", "data", "serving", "studio", "fleet"):
        own = {"accelerate"} if here == "processes" else set()  # they meet by its state
        assert not roots & {"typer", "rich", "pydantic", "yaml", "matplotlib", "fastapi", "datasets", "accelerate"} - own
    if path not in (SOURCE / "model.py", SOURCE / "delegating.py"):  # a wrapper can be pickled; no file is read that way
        assert "pickle" not in roots


@pytest.mark.parametrize("path", files(), ids=lambda p: dotted(p))
def test_nothing_switches_on_remote_code_or_pickle(path: Path) -> None:
    """`trust_remote_code` is only ever False, and `torch.load` only ever `weights_only=True`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        assert given.get("trust_remote_code", "False") == "False"
        if ast.unparse(node.func) == "torch.load":
            assert given.get("weights_only") == "True"


def test_the_checker_sees_what_it_should(tmp_path: Path) -> None:
    """The reading of imports itself: relative, nested, by name, for types."""
    found = {name for name, _ in own_imports(SOURCE / "methods" / "lora.py")}
    assert {"graftlm.methods.base", "graftlm.errors", "graftlm.quantization", "graftlm.architectures"} <= found
    assert "graftlm.model" not in found
    inspected = SOURCE / "data" / "_base.py"
    assert "datasets" in {name for name, _ in imports(inspected, types=True)} - {name for name, _ in imports(inspected)}
    for graph in ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, {"a": {"b"}, "b": {"a"}}):
        assert {name for name, *_ in circles(graph)} == graph.keys() - {"d"}
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})
    assert "graftlm.merging" in {name for name, _ in own_imports(SOURCE / "model.py")}
    assert "bitsandbytes.functional" in {name for name, _ in imports(SOURCE / "quantization.py")}


def test_public_names() -> None:
    assert sorted(graftlm.__all__) == list(graftlm.__all__) == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(graftlm, name) is not None
    assert set(PUBLIC) <= set(dir(graftlm))


PUBLIC = [
    "AdaLoraConfig",
    "AdaLoraModel",
    "AdaptionPromptConfig",
    "AdaptionPromptModel",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "BOFTConfig",
    "BOFTModel",
    "BottleneckConfig",
    "BottleneckPlacement",
    "CartridgeConfig",
    "CordaConfig",
    "EvaConfig",
    "FourierFTConfig",
    "FourierFTModel",
    "IA3Config",
    "IA3Model",
    "LNTuningConfig",
    "LNTuningModel",
    "LoHaConfig",
    "LoHaModel",
    "LoKrConfig",
    "LoKrModel",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "MissConfig",
    "MissModel",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "NoMatchingPeftModuleError",
    "OFTConfig",
    "OFTModel",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "PeftConfig",
    "PeftError",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PeftWarning",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "RandLoraConfig",
    "RandLoraModel",
    "RankSchedule",
    "TaskType",
    "TrainableTokensConfig",
    "TrainableTokensModel",
    "Trainer",
    "VeraConfig",
    "VeraModel",
    "__version__",
    "as_peft",
    "cast_mixed_precision_params",
    "compose_cartridge_adapters",
    "convert_to_lora",
    "get_base_model_state_dict",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "hotswap_adapter",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "load_peft_weights",
    "plan",
    "prepacked",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "preprocess_corda",
    "preprocess_loraga",
    "prompt_embeddings_from_past_key_values",
    "rescale_adapter_scale",
    "save_as_lora",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
    "shift_tokens_right",
    "train_together",
]
