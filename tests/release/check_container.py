"""`make container-check`: docker/Dockerfile.cpu is built and run without a Docker engine, by buildah in a chroot.

The base image is made by debootstrap, so nothing is pulled from a registry of images. Root is needed.
"""

import configparser
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ficoco_vllm import __version__
from tests.support.release import ROOT
from tests.support.server import Server
from tests.test_readme import transcript_of

CACHE = ROOT / "build" / "container"
BASE = "localhost/ficoco-base"
IMAGE = "localhost/ficoco-vllm:cpu"
BUILD_SECONDS = 1800
START_SECONDS = 600
TOOLS = ("buildah", "debootstrap")

pytestmark = pytest.mark.timeout(2 * BUILD_SECONDS)


def buildah(command: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run buildah with a separate store and return its output."""
    store = ["--root", str(CACHE / "store"), "--runroot", str(CACHE / "run")]
    result = subprocess.run(
        ["buildah", *store, command, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=BUILD_SECONDS,
        cwd=cwd,
    )
    return str(result.stdout).strip()


def pip_configuration(folder: Path) -> list[str]:
    """Arguments of `buildah build` that let pip work as it does here.

    They are its configuration as a secret, and the local files and folders that it names, below /mnt: certificates
    must not lie where the image installs its own.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    settings, mounts = {}, set()
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        words = value.strip("'").replace("\\n", " ").split()
        for index, word in enumerate(words):
            path = word.removeprefix("file://")
            if path.startswith("/") and Path(path).exists():
                words[index] = word.replace(path, f"/mnt{path}")
                # Indices on the disk lead to files beside them.
                mounted = Path(path).parent if Path(path).name == "simple" else Path(path)
                mounts.add(f"--volume={mounted}:/mnt{mounted}:ro")
        settings[name.partition(".")[2].strip(".'")] = " ".join(words)
    parser = configparser.ConfigParser(interpolation=None)
    parser["global"] = settings
    file = folder / "pip.conf"
    with file.open("w") as opened:
        parser.write(opened)
    return [f"--secret=id=pip,src={file}", *sorted(mounts)]


def build(file: str, base: str, tag: str, *arguments: str) -> None:
    """Build one of our images on a custom base."""
    options = ["--isolation=chroot", "--format=docker", "--layers", f"--build-arg=BASE={base}", *arguments]
    buildah("build", *options, "--file", file, "--tag", tag, ".", cwd=ROOT)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image of docker/Dockerfile.cpu; layers are kept in build/container between runs."""
    # Not skipped: who asks for this check must not take its absence for a success.
    if os.geteuid() != 0 or not all(map(shutil.which, TOOLS)):
        pytest.fail(f"needs root and {', '.join(TOOLS)}", pytrace=False)
    CACHE.mkdir(parents=True, exist_ok=True)
    if BASE not in buildah("images", "--format", "{{.Name}}"):
        root = tmp_path_factory.mktemp("base") / "root"
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(root)], check=True)
        container = buildah("from", "scratch")
        buildah("copy", container, str(root), "/")
        buildah("commit", "--rm", container, BASE)
        shutil.rmtree(root)
    build("docker/Dockerfile.cpu", BASE, IMAGE, *pip_configuration(tmp_path_factory.mktemp("pip")))
    return IMAGE


def configuration(image: str) -> dict[str, Any]:
    """Configuration of the image."""
    inspected: dict[str, Any] = json.loads(buildah("inspect", "--type=image", image))["Docker"]["config"]
    return inspected


def test_image_is_not_root_and_says_how_it_is(image: str) -> None:
    config = configuration(image)
    assert config["User"] == "2000"
    assert config["Entrypoint"] == ["ficoco-vllm", "serve"]
    assert "/health" in str(config["Healthcheck"])
    assert config["ExposedPorts"] == {"8000/tcp": {}}


def test_the_image_answers_the_questions_of_the_readme(image: str, tmp_path: Path) -> None:
    """The image's entry point and command, as the image's user."""
    config = configuration(image)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    container = buildah("from", image)
    try:
        run = ["--isolation=chroot", container, "--"]
        assert buildah("run", *run, "id", "-u") == "2000"
        assert (
            buildah("run", *run, "sh", "-c", "touch /opt/ficoco/x 2>/dev/null || echo refused") == "refused"
        )
        store = ["--root", str(CACHE / "store"), "--runroot", str(CACHE / "run")]
        command = ["buildah", *store, "run", *run, *config["Entrypoint"], *config["Cmd"]]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        log = tmp_path / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        server = Server(port, log, process)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not server.is_healthy():
                assert process.poll() is None, log.read_text()[-5000:]
                assert time.monotonic() < deadline, log.read_text()[-5000:]
                time.sleep(1)
            printed, expected = transcript_of(server.url)
            assert printed == expected
            # The image's own health check, in a second process of the same container.
            check = config["Healthcheck"]["Test"]
            assert check[0] == "CMD"
            probe_here = [part.replace(":8000/", f":{port}/") for part in check[1:]]
            buildah("run", *run, *probe_here)
            with pytest.raises(subprocess.CalledProcessError):
                buildah("run", *run, *[part.replace("/health", "/nowhere") for part in probe_here])
        finally:
            process.terminate()
            process.wait(60)
    finally:
        buildah("rm", container)


def test_the_gpu_file_builds_where_vllm_is_installed(
    image: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """On the CPU image's dependencies, since vLLM's image cannot be pulled: as root, with vLLM and pip on the path."""
    pip = pip_configuration(tmp_path_factory.mktemp("pip"))
    build("docker/Dockerfile.cpu", BASE, "localhost/dependencies", "--target=dependencies", *pip)
    container = buildah("from", "localhost/dependencies")
    buildah("config", "--env", "PATH=/opt/ficoco/bin:/usr/sbin:/usr/bin:/sbin:/bin", container)
    buildah("commit", "--rm", container, "localhost/like-vllm-openai")
    build("docker/Dockerfile", "localhost/like-vllm-openai", "localhost/ficoco-vllm:gpu")
    config = configuration("localhost/ficoco-vllm:gpu")
    assert config["User"] == "2000"
    assert "/health" in str(config["Healthcheck"])
    container = buildah("from", "localhost/ficoco-vllm:gpu")
    try:
        run = ["--isolation=chroot", container, "--"]
        assert buildah("run", *run, "ficoco-vllm", "--version") == f"ficoco-vllm {__version__}"
        assert buildah("run", *run, "sh", "-c", "id -u; echo $HOME; touch /models/x") == "2000\n/home/ficoco"
    finally:
        buildah("rm", container)
