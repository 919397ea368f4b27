"""A fleet's configuration and catalogue: what is wrong is told before anything starts, and by the nearest name."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from fleet_helpers import written  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from graftlm import cluster  # noqa: E402
from graftlm.cli import app, with_ray  # noqa: E402
from graftlm.errors import AdapterError, CheckpointError, ConfigError, UnknownAdapterError  # noqa: E402
from graftlm.fleet.catalogue import Catalogue, digest_of  # noqa: E402
from graftlm.fleet.config import FleetConfig  # noqa: E402
from graftlm.fleet.start import deploy  # noqa: E402


def test_every_mistake_is_told_at_once() -> None:
    wrong = {
        "bases": "x", "replicas": {"min": 3, "max": 2}, "replica": {"thread": 1, "max_rows": 0}, "quantization": "int3",
        "http": {"port": 0}, "adapters": {"a+b": "x"},
    }  # fmt: skip
    with pytest.raises(ConfigError) as found:
        FleetConfig.from_dict(wrong)
    told = str(found.value)
    for part in ("did you mean 'base'", "max 2 is below min 3", "did you mean 'threads'", "replica.max_rows", "http.port"):
        assert part in told
    with pytest.raises(ConfigError, match="cannot have the base's name"):
        FleetConfig.from_dict({"base": "x/y", "adapters": {"y": "z"}})
    with pytest.raises(ConfigError, match="replica.max_adapters 1"):
        FleetConfig.from_dict({"adapters": {"a": "x", "b": "y"}, "replica": {"max_adapters": 1}})
    with pytest.raises(ConfigError, match="empty key"):
        FleetConfig.from_dict({"http": {"api_keys": [""]}})


def test_a_file_and_what_is_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("base: ./tiny\nreplicas: 3\nadapters: {a: ./a}\nadapter_dirs: [more]\n")
    made = FleetConfig.from_yaml(file, ["replica.threads=2"])
    assert made.base == str(tmp_path / "tiny") and made.adapters == {"a": str(tmp_path / "a")}
    assert (made.replicas.min, made.replicas.most, made.replica.threads) == (3, 3, 2)
    assert FleetConfig.from_dict(made.model_dump()) == made
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match="expected keys and values"):
        FleetConfig.from_yaml(file)
    with pytest.raises(ConfigError, match="cannot read"):
        FleetConfig.from_yaml(tmp_path / "none.yaml")


def test_the_command_checks_a_file(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    file = tmp_path / "fleet.yaml"
    file.write_text("base: tiny\nreplicas: {min: 1, max: 4}\n")
    found = CliRunner().invoke(app, ["deploy", str(file), "--check"])
    assert found.exit_code == 0 and "tiny on 1 to 4 replicas" in found.output
    file.write_text("base: tiny\nreplica: {thread: 1}\n")
    found = CliRunner().invoke(app, ["deploy", str(file), "--check"])
    assert found.exit_code == 2 and "did you mean 'threads'" in found.output
    file.write_text(f"base: tiny\nadapter_dirs: [{tmp_path / 'none'}]\n")
    found = CliRunner().invoke(app, ["deploy", str(file)])
    assert found.exit_code == 2 and "is no folder" in found.output
    file.write_text(f"base: tiny\naddress: 127.0.0.1:{free()}\n")
    found = CliRunner().invoke(app, ["deploy", str(file)])
    assert found.exit_code == 2 and "Nothing answers at the Ray address" in found.output


def free() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1", "host:port", "127.0.0.1:70000", ":6379"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError, match="Ray address"):
        cluster.answers(address)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="choose another one"):
            cluster.port_is_free("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ConfigError, match="choose another one"):  # before Ray is started
            deploy(FleetConfig.from_dict({"http": {"port": taken.getsockname()[1]}}), print)
    cluster.port_is_free("127.0.0.1", free())


def test_versions_that_differ_are_named() -> None:
    own = cluster.versions()
    assert cluster.differences(own, own) == ""
    assert cluster.differences(own, own | {"torch": "0.1"}) == f"torch 0.1 (here {own['torch']})"
    assert "graftlm missing" in cluster.differences(own, {k: v for k, v in own.items() if k != "graftlm"})


def test_ray_without_an_address() -> None:
    assert with_ray(["compare", "--ray", "--base", "x"]) == ["compare", "--ray=local", "--base", "x"]
    assert with_ray(["compare", "--ray"]) == ["compare", "--ray=local"]
    assert with_ray(["compare", "--ray", "auto"]) == ["compare", "--ray", "auto"]


def test_the_catalogue_seals_what_it_is_given(tmp_path: Path) -> None:
    _, folders = written(tmp_path)
    catalogue = Catalogue("tiny")
    catalogue.configure({"mine": folders["style"]}, [str(tmp_path / "adapters")])
    assert sorted(catalogue.entries) == ["block", "memory", "mine", "style", "task"]
    assert catalogue.entries["task"].front == 3 and not catalogue.entries["task"].digest
    sealed = catalogue.seal("style")
    assert sealed.digest == catalogue.entries["mine"].digest == digest_of(catalogue.files(sealed.digest))
    shutil.rmtree(folders["style"])
    assert catalogue.seal("style") == sealed and Path(sealed.folder, "adapter_config.json").is_file()
    with pytest.raises(UnknownAdapterError, match="did you mean 'task'"):
        catalogue.named("tusk")
    with pytest.raises(CheckpointError, match="is not a directory"):
        catalogue.read("x", str(tmp_path / "none"), False)
    for name in ("", "a+b", "tiny"):
        with pytest.raises(AdapterError, match="cannot be called"):
            catalogue.read(name, folders["task"], False)
    before = catalogue.number
    catalogue.drop("task")
    catalogue.look()
    assert [e.name for e in catalogue.changed(before)] == ["task"] and catalogue.entries["task"].gone
    with pytest.raises(PermissionError):
        catalogue.allowed("/etc")
    with pytest.raises(CheckpointError, match="nothing sealed"):
        catalogue.files("")
    with pytest.raises(ConfigError, match="adapter_dirs"):
        catalogue.configure({}, [str(tmp_path / "none")])
    store = catalogue.store
    catalogue.close()
    assert not store.exists()
