"""Recipes for many replicas: existing settings, plugins and versions. `make charts-check` renders the charts."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import yaml

from ficoco_vllm import __version__
from ficoco_vllm.config import FicocoConfig
from tests.support.prometheus import ROOT

DOCKER = ROOT / "docker"
KUBERNETES = DOCKER / "kubernetes"


def read(*path: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(DOCKER.joinpath(*path).read_text())
    return values


def plugins(listed: str) -> None:
    """Plugins that are named must be entry points of ours: the list keeps out all others."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["entry-points"].values()
    names = {name for group in groups for name in group}
    assert "ficoco" in listed.split(",")
    assert set(listed.split(",")) <= names


def test_production_stack_starts_vllm_with_our_settings() -> None:
    (model,) = read("kubernetes", "production-stack.yaml")["servingEngineSpec"]["modelSpec"]
    option, given = model["vllmConfig"]["extraArgs"]
    assert option == "--additional-config"
    assert FicocoConfig.model_validate(json.loads(given)["ficoco"]).keep == 64
    plugins({entry["name"]: entry["value"] for entry in model["env"]}["VLLM_PLUGINS"])


def test_ray_starts_vllm_with_our_settings() -> None:
    (application,) = read("ray", "llava.yaml")["applications"]
    (config,) = application["args"]["llm_configs"]
    settings = FicocoConfig.model_validate(config["engine_kwargs"]["additional_config"]["ficoco"])
    assert settings.method == "ficoco-v"
    plugins(config["runtime_env"]["env_vars"]["VLLM_PLUGINS"])


def test_the_page_s_lines_put_in_a_registry(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "many-machines.md").read_text()
    (lines,) = re.findall(r"^export REGISTRY.*?^```", page, re.MULTILINE | re.DOTALL)
    (registry,) = re.findall(r"REGISTRY=(\S+)", lines)
    shutil.copytree(KUBERNETES, tmp_path / "docker" / "kubernetes")
    commands = "docker() { true; }\n" + lines.removesuffix("```")
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path, check=True)
    for file in KUBERNETES.glob("*.yaml"):
        text = (tmp_path / "build" / file.name).read_text()
        assert "example.com" not in text
        assert f"{registry}/ficoco-vllm" in str(yaml.safe_load(text))


def test_images_have_this_version() -> None:
    for file in [*KUBERNETES.glob("*.yaml"), ROOT / "docs" / "many-machines.md"]:
        tags = set(re.findall(r"gpu-([\d.]+\d)", file.read_text()))
        assert tags == {__version__}, file.name
