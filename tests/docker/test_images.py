"""Dockerfiles and compose: pinned, not root, with health checks, and consistent with the other files in docker/."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.prometheus import ROOT
from tests.support.server import options_of_serve

DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
DOCKERFILES = (DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu")
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
PULLED = {name: service for name, service in SERVICES.items() if "build" not in service}


# Variables of the environment that both servers read.
READ = {"FICOCO_MODEL", "FICOCO_METHOD", "FICOCO_KEEP", "FICOCO_BIND", "HF_TOKEN", "VLLM_API_KEY"}


def client() -> list[str] | None:
    """The compose client, as a plugin of docker's or as Debian's."""
    if shutil.which("docker"):
        plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
        if plugin.returncode == 0:
            return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


needs_client = pytest.mark.needs(
    client() is not None, "compose's tests: no docker compose (or Debian's docker-compose)"
)


def render(profile: str, file: Path = COMPOSE, **variables: str) -> subprocess.CompletedProcess[str]:
    """What the client makes of the file, with only these variables of ours in its environment."""
    compose = client()
    assert compose is not None
    inherited = {name: value for name, value in os.environ.items() if name not in READ}
    command = [*compose, "-f", str(file), "--profile", profile, "config"]
    return subprocess.run(
        command, env=inherited | variables, capture_output=True, text=True, check=False, timeout=60
    )


def words(command: str | list[str]) -> list[str]:
    """Arguments of a service: Debian's client renders the string, the plugin a list."""
    return shlex.split(command) if isinstance(command, str) else command


@needs_client
@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_client_accepts_compose(profile: str, tmp_path: Path) -> None:
    rendered = render(profile)
    assert rendered.returncode == 0, rendered.stderr
    services = yaml.safe_load(rendered.stdout)["services"]
    # Debian's client renders every profile, the plugin only the requested one.
    assert {f"server-{profile}", "prometheus", "grafana"} <= set(services)
    mistyped = tmp_path / "compose.yaml"
    mistyped.write_text(COMPOSE.read_text().replace("read_only:", "readonly:"))
    assert render(profile, mistyped).returncode != 0


@needs_client
@pytest.mark.parametrize(("profile", "default"), [("cpu", []), ("gpu", ["llava-hf/llava-1.5-7b-hf"])])
def test_variables_reach_the_server(profile: str, default: list[str]) -> None:
    def server(**variables: str) -> dict[str, Any]:
        rendered = render(profile, **variables)
        assert rendered.returncode == 0, rendered.stderr
        service: dict[str, Any] = yaml.safe_load(rendered.stdout)["services"][f"server-{profile}"]
        return service

    fixed = ["--shutdown-timeout=90"]
    assert words(server()["command"]) == [*default, "--ficoco-method=ficoco-v", "--ficoco-keep=64", *fixed]
    chosen = server(
        FICOCO_MODEL="me/llava", FICOCO_METHOD="tome", FICOCO_KEEP="96", HF_TOKEN="token", VLLM_API_KEY="key"
    )
    assert words(chosen["command"]) == ["me/llava", "--ficoco-method=tome", "--ficoco-keep=96", *fixed]
    assert chosen["environment"]["HF_TOKEN"] == "token"
    assert chosen["environment"]["VLLM_API_KEY"] == "key"


def test_both_profiles_read_the_documented_variables() -> None:
    documented = set(
        re.findall(r"`((?:FICOCO|HF|VLLM)_[A-Z_]+)`", (ROOT / "docs" / "operate.md").read_text())
    )
    for name in ("server-cpu", "server-gpu"):
        read = set(re.findall(r"\$\{([A-Z_]+):-", json.dumps(SERVICES[name])))
        assert documented & read >= READ, name


def test_each_profile_is_whole() -> None:
    """One server, Prometheus and Grafana, and the server answers to the name that Prometheus scrapes."""
    for profile in ("cpu", "gpu"):
        names = {name for name, service in SERVICES.items() if profile in service["profiles"]}
        assert names == {f"server-{profile}", "prometheus", "grafana"}
    scraped = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = scraped[0]["static_configs"][0]["targets"]
    for name in ("server-cpu", "server-gpu"):
        assert target.split(":")[0] in SERVICES[name]["networks"]["default"]["aliases"]
        assert SERVICES[name]["ports"][0].endswith(f":{target.split(':')[1]}")


def test_images_are_pinned() -> None:
    bases = re.findall(r"^ARG BASE=(\S+)", "\n".join(file.read_text() for file in DOCKERFILES), re.MULTILINE)
    assert len(bases) == len(DOCKERFILES)
    for image in [*bases, *(service["image"] for service in PULLED.values())]:
        assert re.search(r":v?\d+\.\d+\.\d+$|-\d{8}-slim$", image), image
    assert bases[0].endswith(":v0.32.0")  # the minor that pyproject.toml pins


def test_images_do_not_run_as_root() -> None:
    for file in DOCKERFILES:
        assert re.findall(r"^USER (\S+)", file.read_text(), re.MULTILINE)[-1].isdigit()
    for service in PULLED.values():
        assert int(service["user"]) > 0
    for service in SERVICES.values():
        assert service["cap_drop"] == ["ALL"]


def test_everything_says_whether_it_is_healthy() -> None:
    for file in DOCKERFILES:
        assert "HEALTHCHECK" in file.read_text()
    for service in PULLED.values():
        assert service["healthcheck"]["test"][0] == "CMD"


def test_mounted_files_exist_where_the_provisioning_looks() -> None:
    targets = {}
    for service in PULLED.values():
        for volume in service["volumes"]:
            source, target = volume.split(":")[:2]
            if source.startswith("."):
                assert (DOCKER / source).exists(), source
                targets[target] = DOCKER / source
    provider = yaml.safe_load((DOCKER / "grafana" / "provisioning" / "dashboards" / "ficoco.yml").read_text())
    assert provider["providers"][0]["options"]["path"] in targets
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert json.loads((targets[str(home.parent)] / home.name).read_text())["title"]
    rules = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())["rule_files"]
    assert rules == ["rules/*.yml"]
    assert list(targets["/etc/prometheus/rules"].glob("*.yml"))


def test_options_of_the_commands_exist() -> None:
    known = options_of_serve()
    for service in ("server-cpu", "server-gpu"):
        options = {
            part.split("=")[0] for part in words(SERVICES[service]["command"]) if part.startswith("--")
        }
        assert options
        assert options <= known


def test_the_context_has_what_the_images_copy() -> None:
    """`.dockerignore` includes the sources of the wheel."""
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {"LICENSE", "README.md", "pyproject.toml", "requirements"} <= allowed
    mapped = re.findall(
        r'^"?ficoco_vllm[\w.]*"? = "(\w+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert set(mapped) <= allowed
    assert all((ROOT / name).exists() for name in allowed)
