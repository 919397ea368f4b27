"""The comparison of methods: each trained on the same base and data, measured on the same held-out rows, in one report.

from graftlm.comparison import compare

result = compare(base="graftlm-base", data="tweets", methods=["lora", "prompt-tuning"], output_dir="comparison")
print(result.best.label, result.report_path)
"""

from .findings import MethodRun, Row
from .result import ComparisonResult
from .run import compare
from .spec import METHODS, MethodSpec, parse

__all__ = ["METHODS", "ComparisonResult", "MethodRun", "MethodSpec", "Row", "compare", "parse"]
