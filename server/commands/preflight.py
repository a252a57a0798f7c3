"""Checks before vLLM is imported: port, model, settings. Each failure is one line, within two seconds."""

import argparse
import json
import os
import re
import socket
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import ficoco_vllm
from ficoco_vllm.environment import METHODS_GROUP, NAME
from ficoco_vllm.server.commands.arguments import names as split_names

_DEFAULT_PORT = 8000
_CONFIG = "config.json"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# Matches the definition of a method, a pipeline or a control in the package's sources.
_METHOD = re.compile(r'(?:\bname=|\b(?:Pipeline|Control)\(\s*)"([\w-]+)"')
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def check_port(args: argparse.Namespace) -> int | None:
    """Check that the server will be able to listen.

    Args:
        args: options, from the light parser.

    Returns:
        The port, or None where the server listens on no port of its own.

    Raises:
        ValueError: naming the option and what is allowed.
    """
    if args.uds or args.headless:
        return None
    text = str(_DEFAULT_PORT) if args.port is None else args.port
    if not text.isdecimal() or int(text) > 65535:
        raise ValueError(f"--port = {text!r} is not allowed; allowed: an integer from 1 to 65535")
    host, port = args.host or "", int(text)
    error = _listen(host, port)
    if error is None:
        return port or None
    if isinstance(error, socket.gaierror):
        raise ValueError(f"--host = {host!r} is not an address of this machine ({error.strerror})")
    free = next(
        (other for other in range(port + 1, min(port + 100, 65536)) if not _listen(host, other)), None
    )
    example = f", for example {free}" if free else ""
    raise ValueError(
        f"--port = {port} cannot be used on {host or 'this machine'} ({error.strerror}); allowed: a free port{example}"
    )


def _listen(host: str, port: int) -> OSError | None:
    """Bind as vLLM does, and release the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error
    return None


def read_model(model: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Check that a model exists, as far as this machine knows.

    Args:
        model: a folder, a file, or a name of the Hugging Face Hub.
        args: options, from the light parser.

    Returns:
        Its config.json, or None where it is not on this machine or the model has another format.

    Raises:
        ValueError: there is no such model, or its configuration cannot be read.
    """
    path = Path(model)
    if path.is_dir():
        config = path / _CONFIG
        if config.is_file():
            return _read(config)
        if args.hf_config_path or any(path.glob("params.json")) or any(path.glob("*.gguf")):
            return None
        raise ValueError(f"model = {model!r} is a folder without {_CONFIG}; allowed: the folder of a model")
    if path.is_file() or "://" in model or os.environ.get("VLLM_USE_MODELSCOPE"):
        return None
    name = model.partition(":")[0]  # what follows selects a file of quantized weights
    if not _HUB_NAME.fullmatch(name) and not name.endswith(".gguf"):
        raise ValueError(
            f"model = {model!r} does not exist; allowed: the folder of a model, or its name on the Hugging Face Hub, "
            "such as llava-hf/llava-1.5-7b-hf"
        )
    return _cached(model, name, args.revision)


def _cached(model: str, name: str, revision: str | None) -> dict[str, Any] | None:
    from huggingface_hub import constants, try_to_load_from_cache

    cached = try_to_load_from_cache(name, _CONFIG, revision=revision)
    if isinstance(cached, str):
        return _read(Path(cached))
    offline = [name for name in _OFFLINE if constants._is_true(os.environ.get(name))]
    if offline and not name.endswith(".gguf"):
        raise ValueError(
            f"model = {model!r} is not a folder on this machine, and {offline[0]}={os.environ[offline[0]]} allows no "
            f"download, while the cache {constants.HF_HUB_CACHE} does not hold it; allowed: a folder, or a cached "
            f"model (`hf download {name}`)"
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: {path} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"model: {path} holds {type(config).__name__}, not a JSON object")
    return config


def method_names() -> tuple[str, ...]:
    """Names of all methods, as in the registry, which imports torch. They are read from the source of the methods."""
    room = Path(ficoco_vllm.__file__).with_name("reduction")
    names = {entry.name for entry in entry_points(group=METHODS_GROUP)}
    for file in (*(room / "methods").glob("*.py"), room / "pipeline.py", room / "control.py"):
        names.update(_METHOD.findall(file.read_text(encoding="utf-8")))
    return tuple(sorted(names))


def check_method(name: str) -> None:
    """Check the name of a method.

    Raises:
        ValueError: the method does not exist; names the allowed ones.
    """
    if name not in (known := method_names()):
        raise ValueError(f"{NAME}: method = {name!r} is not a known method; allowed: {', '.join(known)}")


def check_named_methods(arguments: Sequence[str]) -> None:
    """Check the methods that a command names, whose own parser imports torch: seconds on a busy machine.

    Methods of a server that runs elsewhere are that server's.

    Args:
        arguments: command line without the program's name.

    Raises:
        ValueError: one is not known, naming the allowed ones.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", "--methods", type=split_names, nargs="?", default=(), dest="methods")
    parser.add_argument("--url", nargs="?")
    options, _ = parser.parse_known_args(arguments)
    named = arguments[1:2] if arguments[:1] == ["methods"] else () if options.url else options.methods or ()
    for name in named:
        if not name.startswith("-"):
            check_method(name)


def check_settings(settings: Mapping[str, Any], model: Mapping[str, Any] | None) -> None:
    """Check the two settings that users mistype most. All others need torch, whose import takes seconds on a busy
    machine.

    Args:
        settings: not yet validated.
        model: its config.json, if it is known.

    Raises:
        ValueError: naming the setting, its value and what is allowed.
    """
    method, keep = settings.get("method"), settings.get("keep")
    if method is not None:
        check_method(method)
    most = _num_patches(model or {})
    if keep is None or (type(keep) is int and 1 <= keep <= (most or keep)):
        return
    allowed = f"an integer from 1 to {most}" if most else "an integer of at least 1"
    raise ValueError(f"{NAME}.keep = {keep!r} is not allowed; allowed: {allowed}")


def _num_patches(model: Mapping[str, Any]) -> int | None:
    """Largest budget of a LLaVA-1.5; None for other models, whose budgets count tiles or whole images."""
    vision = model.get("vision_config")
    if model.get("model_type") != "llava" or not isinstance(vision, dict):
        return None
    side, patch = vision.get("image_size"), vision.get("patch_size")
    return (side // patch) ** 2 if isinstance(side, int) and isinstance(patch, int) and patch > 0 else None


def check_architecture(model: str, architectures: list[str]) -> None:
    """Refuse a model that would be served without the requested reduction.

    Raises:
        ValueError: naming its architecture and the allowed ones.
    """
    from ficoco_vllm.planning.families import ARCHITECTURES

    if not set(architectures) & set(ARCHITECTURES):
        raise ValueError(
            f"model = {model!r} has the architecture {', '.join(architectures) or 'none'}, "
            f"whose visual tokens cannot be reduced; allowed: {', '.join(ARCHITECTURES)}"
        )


def as_hf_config(config: dict[str, Any]) -> Any:
    """The fields of transformers' configuration that plans read, without importing transformers, which takes seconds.

    Args:
        config: content of config.json.

    Returns:
        The stand-in, or None where config.json leaves out what only transformers knows.
    """
    from ficoco_vllm.planning.configurations import hf_config_of
    from ficoco_vllm.planning.families import FAMILIES

    known = FAMILIES.get(str(config.get("model_type")))
    if known is None or known.image_settings is not None:
        return None  # vLLM checks these models, when it has read the image processor's settings
    vision, language = config.get("vision_config"), config.get("text_config")
    tiled = config.get("model_type") == "llava_next"
    if not isinstance(vision, dict) or not isinstance(language, dict):
        return None
    if tiled and not config.get("image_grid_pinpoints"):
        return None
    try:
        return hf_config_of(config)
    except ValueError:
        return None  # vLLM names what is wrong, or serves it
