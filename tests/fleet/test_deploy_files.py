"""The files below deploy/: their structure is Kubernetes' and KubeRay's as far as they use it, and what they name is there.

The models below are of those parts of the schemas (apps/v1, v1, ray.io/v1) that the files use, by hand: unknown keys fail.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from graftlm.cli import load  # noqa: E402
from graftlm.fleet.config import FleetConfig  # noqa: E402
from graftlm.serving.doors import OPEN  # noqa: E402
from graftlm.serving.run import GRACE  # noqa: E402

FOLDER = Path(__file__).resolve().parents[2] / "deploy"
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti|k|M|G)?$")]
Port = Annotated[int, Field(ge=1, le=65535)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Meta(Part):
    name: Name | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class ContainerPort(Part):
    containerPort: Port
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,15}$")]


class HttpGet(Part):
    path: str
    port: str | int


class Probe(Part):
    httpGet: HttpGet
    periodSeconds: int = 10
    timeoutSeconds: int = 1
    failureThreshold: int = 3


class Resources(Part):
    requests: dict[Literal["cpu", "memory"], Quantity]
    limits: dict[Literal["cpu", "memory"], Quantity]


class Mount(Part):
    name: Name
    mountPath: str
    readOnly: bool = False


class Env(Part):
    name: str
    value: str


class Container(Part):
    name: Name
    image: str
    command: list[str] = []
    args: list[str] = []
    env: list[Env] = []
    ports: list[ContainerPort] = []
    startupProbe: Probe | None = None
    readinessProbe: Probe | None = None
    livenessProbe: Probe | None = None
    resources: Resources
    volumeMounts: list[Mount] = []

    @model_validator(mode="after")
    def _probes_find_their_ports(self) -> Container:
        names = {port.name for port in self.ports}
        for probe in (self.startupProbe, self.readinessProbe, self.livenessProbe):
            assert probe is None or isinstance(probe.httpGet.port, int) or probe.httpGet.port in names
        return self


class Claim(Part):
    claimName: Name
    readOnly: bool = False


class Volume(Part):
    name: Name
    persistentVolumeClaim: Claim


class PodSpec(Part):
    terminationGracePeriodSeconds: int = 30
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []

    @model_validator(mode="after")
    def _mounts_find_their_volumes(self) -> PodSpec:
        names = {volume.name for volume in self.volumes}
        assert all(mount.name in names for container in self.containers for mount in container.volumeMounts)
        return self


class Pod(Part):
    metadata: Meta = Meta()
    spec: PodSpec


class Selector(Part):
    matchLabels: dict[str, str]


class Rolling(Part):
    maxUnavailable: int
    maxSurge: int


class Strategy(Part):
    type: Literal["RollingUpdate"]
    rollingUpdate: Rolling


class DeploymentSpec(Part):
    replicas: int
    selector: Selector
    strategy: Strategy
    template: Pod

    @model_validator(mode="after")
    def _selects_its_pods(self) -> DeploymentSpec:
        assert self.selector.matchLabels.items() <= self.template.metadata.labels.items()
        return self


class Deployment(Part):
    apiVersion: Literal["apps/v1"]
    kind: Literal["Deployment"]
    metadata: Meta
    spec: DeploymentSpec


class ServicePort(Part):
    name: str
    port: Port
    targetPort: str | int


class ServiceSpec(Part):
    selector: dict[str, str]
    ports: list[ServicePort]


class Service(Part):
    apiVersion: Literal["v1"]
    kind: Literal["Service"]
    metadata: Meta
    spec: ServiceSpec


class HeadGroup(Part):
    rayStartParams: dict[str, str]
    template: Pod


class WorkerGroup(Part):
    groupName: Name
    replicas: int
    minReplicas: int
    maxReplicas: int
    rayStartParams: dict[str, str]
    template: Pod


class RayCluster(Part):
    rayVersion: str
    enableInTreeAutoscaling: bool
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayServiceSpec(Part):
    serveConfigV2: str
    rayClusterConfig: RayCluster


class RayService(Part):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Meta
    spec: RayServiceSpec


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def test_deployment() -> None:
    first, second = documents("deployment.yaml")
    deployment, service = Deployment.model_validate(first), Service.model_validate(second)
    pod = deployment.spec.template
    (container,) = pod.spec.containers
    for probe in (container.startupProbe, container.readinessProbe, container.livenessProbe):
        assert probe is not None and probe.httpGet.path in OPEN  # without a key
    assert service.spec.selector.items() <= pod.metadata.labels.items()
    assert service.spec.ports[0].targetPort in {port.name for port in container.ports}
    assert pod.spec.terminationGracePeriodSeconds > GRACE
    command = load(container.command[1])
    known = {flag for parameter in command.params for flag in parameter.opts}
    assert {flag for flag in container.args if flag.startswith("--")} <= known


def test_rayservice() -> None:
    (document,) = documents("rayservice.yaml")
    made = RayService.model_validate(document).spec
    served = yaml.safe_load(made.serveConfigV2)
    (app,) = served["applications"]
    config = FleetConfig.from_dict(app["args"])
    assert (served["http_options"]["host"], served["http_options"]["port"]) == (config.http.host, config.http.port)
    (workers,) = made.rayClusterConfig.workerGroupSpecs
    assert workers.minReplicas <= workers.replicas <= workers.maxReplicas
    assert config.replicas.most <= workers.maxReplicas
    assert config.replica.threads <= int(workers.template.spec.containers[0].resources.requests["cpu"])
    pinned = (FOLDER.parent / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(rf"^ray=={re.escape(made.rayClusterConfig.rayVersion)}$", pinned, re.MULTILINE)


def test_serve_takes_what_the_rayservice_says() -> None:
    pytest.importorskip("ray.serve", reason="the extra `ray` is not installed")
    from ray.serve.schema import ServeDeploySchema

    made = RayService.model_validate(documents("rayservice.yaml")[0]).spec
    found = ServeDeploySchema.model_validate(yaml.safe_load(made.serveConfigV2))
    module, _, name = str(found.applications[0].import_path).partition(":")
    application = getattr(import_module(module), name)(found.applications[0].args)
    assert type(application).__name__ == "Application"


def test_fleet_file() -> None:
    assert FleetConfig.from_yaml(FOLDER / "fleet.yaml").base_name == "smollm2"
