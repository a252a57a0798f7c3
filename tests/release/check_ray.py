"""`make ray-check`: docker/ray/llava.yaml on a Ray of this machine, with the demo model and two replicas on the CPU."""

import json
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from ray import init, serve, shutdown
from ray.serve.llm import LLMConfig, build_openai_app

from ficoco_vllm.benchmarks.harness.serving import free_port
from ficoco_vllm.demo_model import examples, path
from tests.support.release import ROOT
from tests.support.server import data_url, message

RECIPE = ROOT / "docker" / "ray" / "llava.yaml"
MODEL = "llava"
# What vLLM's CPU build needs, in the actors too.
CPU = {
    name: os.environ[name]
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE")
    if name in os.environ
} | {"OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.timeout(1800)


def config() -> dict[str, Any]:
    """The recipe's, for the demo model and a machine without a GPU."""
    (application,) = yaml.safe_load(RECIPE.read_text())["applications"]
    (recipe,) = application["args"]["llm_configs"]
    recipe["model_loading_config"]["model_source"] = str(path())
    recipe["accelerator_config"] = {"kind": "cpu"}
    recipe["placement_group_config"] = {"bundles": [{"CPU": 1}]}
    recipe["engine_kwargs"]["distributed_executor_backend"] = "uni"
    recipe["deployment_config"] = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 1}}
    recipe["runtime_env"]["env_vars"] |= CPU
    return dict(recipe)


# The demo model's example questions: 64 visual tokens and the text.
PROMPT_TOKENS = (78, 75, 77, 78, 80, 76)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of Ray Serve."""
    port = free_port()
    init(num_cpus=6, num_gpus=0, include_dashboard=False, object_store_memory=200 * 2**20)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build_openai_app({"llm_configs": [LLMConfig(**config())]}))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        shutdown()


def ask(url: str, question: str, image: Path) -> dict[str, Any]:
    body = {
        "model": MODEL,
        "temperature": 0,
        "messages": [message(question, [data_url(Image.open(image))])],
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        parsed: dict[str, Any] = json.load(answer)
    return parsed


def test_replicas_answer_with_a_fraction_of_the_tokens(url: str) -> None:
    for example, num_prompt_tokens in zip(examples(), PROMPT_TOKENS, strict=True):
        answer = ask(url, example.question, example.image)
        assert answer["choices"][0]["message"]["content"].strip() == example.answer
        assert answer["usage"]["prompt_tokens"] == num_prompt_tokens
