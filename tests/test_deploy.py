"""What `deploy/` says against what the code and the pins are: every file is parsed, nothing is started."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from packaging.requirements import Requirement
from typer.core import TyperGroup

from flows.cli import app
from flows.settings import QUIET

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
ANALYTICS_OFF = (
    "PREFECT_SERVER_ANALYTICS_ENABLED",
    "DO_NOT_TRACK",
    "RAY_USAGE_STATS_ENABLED",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV",
)
IMAGES = {"gigacam:0.1.0-cpu", "gigacam:0.1.0-gpu"}


def load(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


@cache
def pins() -> dict[str, str]:
    """Pinned version of each distribution, by normalised name."""
    lines = (DEPLOY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in rows}


@cache
def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def dockerfile() -> list[tuple[str, str]]:
    """Instruction and argument of each line, continuations joined, comments dropped."""
    lines = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    joined = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile's instructions by stage."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for word, rest in dockerfile():
        if word == "FROM":
            name = rest.split()[-1]
            found[name] = []
        found[name].append((word, rest))
    return found


def assert_quiet(environment: dict[str, str]) -> None:
    assert {name: environment.get(name) for name in ANALYTICS_OFF} == {
        name: QUIET[name] for name in ANALYTICS_OFF
    }


def ray_specs() -> list[dict[str, Any]]:
    cluster, _ = yaml.safe_load_all((DEPLOY / "kuberay/raycluster.yaml").read_text(encoding="utf-8"))
    return [cluster["spec"], load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]]


def pod_templates(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]


def cli_options(command: str) -> set[str]:
    """The long options of a `gigacam` command."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    commands = group.commands
    assert command in commands, f"gigacam has no command {command!r}"
    return {
        option
        for parameter in commands[command].params
        for option in parameter.opts
        if option.startswith("--")
    }


def gigacam_calls(text: str) -> Iterator[tuple[str, list[str]]]:
    """Command and long options of each `gigacam COMMAND ...` in a script."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:^|/)gigacam\"? +([a-z]+)( .*)?$", line)
        if found and not line.lstrip().startswith("#"):
            yield found[1], re.findall(r"(--[a-z-]+)", found[2] or "")


# --- constraints -------------------------------------------------------------------------------------------------------


def test_every_direct_dependency_is_pinned_within_its_bounds() -> None:
    every = [*project()["dependencies"], *project()["optional-dependencies"]["test"]]
    for line in every:
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in pins(), f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pins()[name]), (
            f"{line}, but constraints.txt pins {pins()[name]}"
        )


def test_pins_bring_neither_cuda_nor_torchvision() -> None:
    assert pins()["torch"] == "2.13.0"
    assert not [name for name in pins() if re.match(r"nvidia|cuda|triton|torchvision|gigacam$", name)]
    assert not [version for version in pins().values() if "+" in version]


# --- Prefect -----------------------------------------------------------------------------------------------------------


def test_prefect_yaml_passes_prefects_own_model() -> None:
    from prefect.cli.deploy._models import PrefectYamlModel

    parsed = PrefectYamlModel.model_validate(load("prefect.yaml"))
    assert [deployment.name for deployment in parsed.deployments] == ["on-request", "inbox"]
    assert parsed.pull == []
    assert parsed.prefect_version == pins()["prefect"]


@pytest.mark.parametrize("name", ["on-request", "inbox"])
def test_deployment_matches_the_flow_it_runs(name: str) -> None:
    from prefect.flows import load_flow_from_entrypoint

    deployment = next(d for d in load("prefect.yaml")["deployments"] if d["name"] == name)
    flow: Any = load_flow_from_entrypoint(deployment["entrypoint"], use_placeholder_flow=False)
    signature = inspect.signature(flow.fn)
    given = deployment["parameters"]
    assert set(given) <= set(signature.parameters)
    required = {p.name for p in signature.parameters.values() if p.default is inspect.Parameter.empty}
    # A request comes with the run; a schedule has nobody to ask.
    assert required - set(given) == (set() if "schedules" in deployment else {"request"})
    missing = {name: {"images": ["a.svs"], "model": "m", "out": "o"} for name in required - set(given)}
    flow.validate_parameters({**given, **missing})
    assert_quiet(deployment["work_pool"]["job_variables"]["env"])


def test_the_inbox_is_scanned_by_one_run_at_a_time() -> None:
    from prefect.client.schemas.schedules import CronSchedule

    inbox = next(d for d in load("prefect.yaml")["deployments"] if d["name"] == "inbox")
    (schedule,) = inbox["schedules"]
    CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    assert inbox["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


# --- Docker ------------------------------------------------------------------------------------------------------------


def test_dockerfile_targets_install_the_pins_and_drop_root() -> None:
    found = stages()
    assert set(found) == {"", "base", "cpu", "gpu"}
    (python,) = [rest.partition("=")[2] for word, rest in found[""] if word == "ARG"]
    assert python == "3.11", "constraints.txt was made with Python 3.11"
    for target in ("cpu", "gpu"):
        words = [word for word, _ in found[target]]
        assert found[target][0][1] == f"base AS {target}"
        (install,) = [rest for word, rest in found[target] if word == "RUN"]
        assert install.startswith("pip install ")
        assert "-c deploy/constraints.txt" in install
        assert install.endswith(" .")
        (user,) = [rest for word, rest in found[target] if word == "USER"]
        assert int(user.split(":")[0]) > 0
        assert words.index("USER") > words.index("RUN")
        assert ("ENTRYPOINT", '["gigacam"]') in found[target]
    environment = dict(
        pair.split("=", 1) for word, rest in found["base"] if word == "ENV" for pair in shlex.split(rest)
    )
    assert_quiet(environment)


def test_docker_build_context_holds_what_is_copied() -> None:
    sources = [source for word, rest in stages()["base"] if word == "COPY" for source in rest.split()[:-1]]
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line.startswith("!")
    }
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), f"{source} does not exist"
        assert any(entry == source or entry.startswith(source + "/") for entry in kept), (
            f"{source} is ignored"
        )
    for entry in kept:
        assert (ROOT / entry).exists(), f"{entry} does not exist"


# --- compose -----------------------------------------------------------------------------------------------------------


def test_compose_services_hang_together() -> None:
    compose = load("compose.yaml")
    services = compose["services"]
    assert set(services) == {"postgres", "prefect", "deployments", "worker", "ray-head", "ray-worker"}
    assert {s["image"] for name, s in services.items() if name != "postgres"} <= IMAGES
    for name, service in services.items():
        for needed, condition in service.get("depends_on", {}).items():
            assert needed in services
            if condition["condition"] == "service_healthy":
                assert "healthcheck" in services[needed], (
                    f"{name} waits for {needed}, which has no health check"
                )
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} is open to the network: {port}"
        if name != "postgres":
            assert_quiet(service["environment"])


def test_compose_ray_nodes_share_token_memory_and_data() -> None:
    services = load("compose.yaml")["services"]
    for name in ("worker", "ray-head", "ray-worker"):
        service = services[name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
        assert "ray_token" in service["secrets"]
        command = " ".join([*service["entrypoint"], *service["command"]])
        (store,) = re.findall(r"--object-store-memory=(\d+)", command)
        unit = {"mb": 2**20, "gb": 2**30}[service["shm_size"][-2:]]
        assert int(store) < int(service["shm_size"][:-2]) * unit
    assert services["worker"]["volumes"] == services["ray-worker"]["volumes"] == ["./data:/data"]
    assert services["worker"]["environment"]["RAY_ADDRESS"] == "ray-head:6379"
    assert "--port=6379" in services["ray-head"]["command"]
    assert "--address=ray-head:6379" in services["ray-worker"]["command"]


def test_compose_and_prefect_yaml_name_one_work_pool_and_one_data_folder() -> None:
    services = load("compose.yaml")["services"]
    for deployment in load("prefect.yaml")["deployments"]:
        pool = deployment["work_pool"]["name"]
        assert f"work-pool create {pool} --type process" in services["deployments"]["command"][0]
        assert f"worker start --pool {pool} --type process" in services["worker"]["command"][0]
        for value in deployment["parameters"].values():
            assert not isinstance(value, str) or value.startswith("/data/")
    assert "--prefect-file deploy/prefect.yaml" in services["deployments"]["command"][0]


def test_prefect_settings_named_in_deploy_exist() -> None:
    from prefect.settings.legacy import _get_valid_setting_names
    from prefect.settings.models.root import Settings

    known = _get_valid_setting_names(Settings)
    text = "\n".join(
        path.read_text(encoding="utf-8")
        for path in DEPLOY.rglob("*")
        if path.is_file() and path.suffix != ".png"
    )
    named = set(re.findall(r"\bPREFECT_[A-Z_]+\b", text))
    assert len(named) > 5
    assert named <= {name.upper() for name in known}


# --- KubeRay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ray_specs(), ids=["raycluster", "rayjob"])
def test_ray_cluster_spec(spec: dict[str, Any]) -> None:
    assert spec["rayVersion"] == pins()["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] in IMAGES
        assert_quiet({entry["name"]: entry["value"] for entry in container["env"]})
        assert pod["securityContext"]["runAsNonRoot"] is True
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"data": "/data", "shm": "/dev/shm"}
        (memory,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
        assert memory["medium"] == "Memory"
        assert (
            int(group["rayStartParams"]["object-store-memory"])
            < int(memory["sizeLimit"].removesuffix("Gi")) * 2**30
        )
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
    (gpu,) = spec["workerGroupSpecs"]
    (container,) = gpu["template"]["spec"]["containers"]
    assert container["image"].endswith("-gpu")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert 0 <= gpu["minReplicas"] <= gpu["replicas"] <= gpu["maxReplicas"]


def test_ray_job_runs_on_the_pods_of_the_cluster_manifest() -> None:
    cluster, job = (deepcopy(pod_templates(spec)) for spec in ray_specs())
    assert job[0]["spec"].pop("restartPolicy") == "Never"
    assert job == cluster
    # The pool is sized when the run starts, so its cluster has to be whole by then.
    (gpu,) = ray_specs()[1]["workerGroupSpecs"]
    assert gpu["minReplicas"] == gpu["replicas"] >= 1
    assert ray_specs()[0]["workerGroupSpecs"][0]["minReplicas"] == 0
    spec = load("kuberay/rayjob.yaml")["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0


def test_network_policy_covers_every_ray_pod() -> None:
    _, policy = yaml.safe_load_all((DEPLOY / "kuberay/raycluster.yaml").read_text(encoding="utf-8"))
    selected = policy["spec"]["podSelector"]["matchLabels"]
    for spec in ray_specs():
        for template in pod_templates(spec):
            assert selected.items() <= template["metadata"]["labels"].items()
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["ingress"][0] == {"from": [{"podSelector": {"matchLabels": selected}}]}


# --- scripts and commands ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["deploy/slurm/ray.sbatch", ".ci/run"])
def test_scripts_parse_and_can_be_run(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert os.access(ROOT / script, os.X_OK)


def test_slurm_script_is_quiet_and_closed() -> None:
    text = (DEPLOY / "slurm/ray.sbatch").read_text(encoding="utf-8")
    for name in ANALYTICS_OFF:
        assert f"{name}={QUIET[name]}" in text
    assert "export RAY_AUTH_MODE=token" in text


@pytest.mark.parametrize("source", ["deploy/kuberay/rayjob.yaml", "deploy/slurm/ray.sbatch", "Makefile"])
def test_commands_and_options_exist(source: str) -> None:
    text = (ROOT / source).read_text(encoding="utf-8")
    if source.endswith("rayjob.yaml"):
        text = load("kuberay/rayjob.yaml")["spec"]["entrypoint"]
    calls = list(gigacam_calls(text))
    assert calls, f"{source} calls no gigacam command"
    for command, options in calls:
        assert set(options) <= cli_options(command), f"{source}: gigacam {command}"


def test_makefile_is_quiet() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in ANALYTICS_OFF[:3]:
        assert f"export {name} := {QUIET[name]}" in text


def test_images_carry_the_version_of_the_project() -> None:
    assert {image.rsplit(":", 1)[1].rsplit("-", 1)[0] for image in IMAGES} == {project()["version"]}
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert all(f"--target {image.rsplit('-', 1)[1]} -t {image} ." in text for image in IMAGES)
