"""What our own OpenAPI description allows never makes the server fail: by schemathesis, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from serving_helpers import saved, served  # noqa: E402


@pytest.mark.slow
def test_no_operation_fails(tmp_path: Path) -> None:
    root = tmp_path / "roots"
    folders = saved(root, ["style", "task"])
    limits = {"cache_tokens": 2048, "max_rows": 4}
    with served(folders, limits, adapter_dirs=[root], admin_key="admin", timeout=20) as (client, service):
        schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
        operations = [found.ok() for found in schema.get_all_operations()]
        assert len(operations) == len([1 for methods in client.app.openapi()["paths"].values() for _ in methods])
        for operation in operations:
            assert tried(operation)
        assert service.engine.health().alive


def tried(operation: Any) -> set[int]:
    """What an operation answers to 60 requests that its description allows, or just does not."""
    statuses: set[int] = set()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    @given(case=operation.as_strategy())
    def run(case: Any) -> None:
        if isinstance(case.body, dict) and "model" in case.body and len(str(case.body)) % 3:
            case.body["model"] = "style"  # else next to nothing comes past the name
        found = case.call(headers={"Authorization": "Bearer admin"})
        statuses.add(found.status_code)
        assert found.status_code < 500, (case.path, case.body, found.text)
        if found.status_code >= 400:
            assert found.json()["error"]["message"]

    run()
    return statuses
