"""The running fleet, as others find it in a cluster."""

from __future__ import annotations

from typing import Any

NAME = "graftlm"  # of the application


def manager() -> Any:
    """A handle of its manager."""
    from ray import serve

    return serve.get_deployment_handle("Manager", NAME)
