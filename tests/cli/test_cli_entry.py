"""The entry point: help, version, errors, laziness."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graftlm import cli as package
from graftlm.errors import ConfigError

HEAVY = ("torch", "transformers", "datasets", "pydantic")


def test_help_lists_every_command(cli):
    result = cli("--help")
    assert result.exit_code == 0
    for name in package.COMMANDS:
        assert name in result.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv=['graftlm','--help']\nfrom graftlm.cli import app\ntry:\n app()\nexcept SystemExit: pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip().endswith("[]")


@pytest.mark.parametrize("name", package.COMMANDS)
def test_help_of_each_command(cli, name):
    result = cli(name, "--help")
    assert result.exit_code == 0, result.output
    assert "Usage" in result.stdout


def test_version(cli):
    result = cli("--version")
    assert result.exit_code == 0
    assert result.stdout.split()[0] == "graftlm"


@pytest.mark.parametrize("module", ["graftlm", "graftlm.cli"])
def test_python_m(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.split()[0] == "graftlm", done.stderr
    done = subprocess.run([sys.executable, "-m", module, "nothing"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "No such command" in done.stderr


def test_unknown_command_names_the_nearest(cli):
    result = cli("inspct")
    assert result.exit_code == 2
    assert "inspect" in result.stderr


def raising(error: BaseException):
    def command() -> None:
        """Raise."""
        raise error

    return command


def call_raising(cli, monkeypatch, error: BaseException, *arguments: str):
    import types

    module = types.ModuleType("graftlm.cli.boom")
    module.boom = raising(error)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "graftlm.cli.boom", module)
    monkeypatch.setitem(package.COMMANDS, "boom", ("boom", "boom", "fails"))
    return cli(*arguments)


def test_mistakes_are_one_message_and_code_2(cli, monkeypatch):
    monkeypatch.delenv("GRAFTLM_DEBUG", raising=False)
    result = call_raising(cli, monkeypatch, ConfigError("r=0 is too small"), "boom")
    assert result.exit_code == 2
    assert result.stderr.strip() == "Error: r=0 is too small"


def test_debug_anywhere_shows_the_traceback(cli, monkeypatch):
    monkeypatch.setenv("GRAFTLM_DEBUG", "0")
    result = call_raising(cli, monkeypatch, ConfigError("r=0 is too small"), "boom", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_interrupt_is_130_with_a_sentence(cli, monkeypatch):
    result = call_raising(cli, monkeypatch, KeyboardInterrupt(), "boom")
    assert result.exit_code == 130
    assert "Interrupted" in result.stderr
