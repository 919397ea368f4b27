"""Does an adapter fit a base? Attached for a check only; every key that does not fit is found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import BaseMismatchError, GraftError
from . import _base

if TYPE_CHECKING:
    from ._adapter_files import AdapterFiles

HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight", "qa_outputs.weight")


def fit(adapter: AdapterFiles, base: str) -> dict[str, Any]:
    """The report: `fits`, the keys `missing`, `unexpected` and `mismatched`, and an `error` in words.

    Raises:
        GraftError: the base cannot be loaded.
    """
    model = base_for_task(base, adapter)
    report: dict[str, Any] = {"base": base, "fits": False, "missing": [], "unexpected": [], "mismatched": []}
    try:
        report |= keys(model, adapter)
    except GraftError as error:
        report["error"] = f"cannot be attached: {error}"
        return report
    wrong = any(report[k] for k in ("missing", "unexpected", "mismatched"))
    errors = [*fingerprint_error(model, adapter), *([] if wrong else loading_error(model, adapter))]
    if errors:
        report["error"] = "\n".join(errors)
    report["fits"] = not wrong and not errors
    if report["fits"]:
        known = "fingerprint and keys agree" if adapter.header.get("base") else "keys and shapes agree (no fingerprint)"
        report["detail"] = known + other_form(model, adapter)
    return report


def keys(model: Any, adapter: AdapterFiles) -> dict[str, list[str]]:
    """Keys that the file lacks, has in excess, or has in another shape."""
    from .. import checkpoint
    from ..model import PeftModel

    config = checkpoint.config_for(adapter.folder, None, False, {})
    wrapped = PeftModel(model, config, "default")
    try:
        wanted = checkpoint.expected(wrapped, "default")
        prefix = wrapped.methods["default"].file_prefix
        found = {checkpoint.normalise(t.key, "default", wanted, prefix): t.shape for t in adapter.tensors}
        excess = sorted(set(found) - set(wanted))
        if excess:
            tensors = checkpoint.load_peft_weights(adapter.folder)
            named = {checkpoint.normalise(k, "default", wanted, prefix): v for k, v in tensors.items()}
            copies = checkpoint.base_tensors(wrapped, {k: named[k] for k in excess})
            excess = [k for k in excess if k not in copies]
        return {
            "missing": [f"{k} {tuple(wanted[k])}" for k in sorted(set(wanted) - set(found))],
            "unexpected": [f"{k} {found[k]}" for k in excess],
            "mismatched": [
                f"{k}: the file has {found[k]}, this base needs {tuple(wanted[k])}"
                for k in sorted(set(found) & set(wanted)) if tuple(wanted[k]) != found[k]
            ],
        }  # fmt: skip
    finally:
        wrapped.unload()


def fingerprint_error(model: Any, adapter: AdapterFiles) -> list[str]:
    """What the base's fingerprint says against the adapter."""
    from .. import fingerprint

    try:
        with _base.notices_on_stderr():
            if adapter.header.get("base"):
                fingerprint.check(model, adapter.header["base"], str(adapter.folder), False)
    except BaseMismatchError as error:
        return [str(error)]
    return []


def other_form(model: Any, adapter: AdapterFiles) -> str:
    """A remark where one of the two bases, the adapter's and this one, is quantised otherwise than the other."""
    from ..quantization import scheme_of

    stored = adapter.header.get("base")
    trained, here = (stored or {}).get("form") if (stored or {}).get("quantized") else None, scheme_of(model)
    if not stored or trained == here:
        return ""
    return f"; trained over {trained or 'an unquantised base'}, this one is {here or 'unquantised'}: outputs differ slightly"


def loading_error(model: Any, adapter: AdapterFiles) -> list[str]:
    """What loading says in the end (values that are not finite, for one)."""
    try:
        _base.attach(model, {"default": str(adapter.folder)}, allow_base_mismatch=True).unload()
    except GraftError as error:
        return [str(error)]
    return []


def base_for_task(base: str, adapter: AdapterFiles) -> Any:
    """The base with the head of the adapter's task."""
    task = adapter.config.get("task_type")
    auto = {
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "AutoModel",
    }.get(str(task))
    if auto is None:
        return _base.load_base(base)[0]
    import transformers

    from ..bundled import resolve
    from ..errors import ConfigError

    _base.quiet_libraries()
    rows = next((t.shape[0] for t in adapter.tensors if t.key.endswith(HEADS)), None)
    options = {"num_labels": rows} if rows and task in ("SEQ_CLS", "TOKEN_CLS") else {}
    path = resolve(base)
    try:
        return getattr(transformers, auto).from_pretrained(path, **options).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{base!r} cannot be loaded for {task}: {error}") from error
