"""Checks before vLLM is imported: port, model, settings. Each failure is one line, within two seconds."""

import argparse
import json
import os
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_DEFAULT_PORT = 8000
_CONFIG = "config.json"
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
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
    """Bind as vLLM does, and let go."""
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
        Its config.json, or None where it is not here or the model has another format.

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

    found = try_to_load_from_cache(name, _CONFIG, revision=revision)
    if isinstance(found, str):
        return _read(Path(found))
    offline = [name for name in _OFFLINE if constants._is_true(os.environ.get(name))]
    if offline and not name.endswith(".gguf"):
        raise ValueError(
            f"model = {model!r} is no folder here, and {offline[0]}={os.environ[offline[0]]} allows no download, while "
            f"the cache {constants.HF_HUB_CACHE} does not hold it; allowed: a folder, or a cached model "
            f"(`hf download {name}`)"
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
    """What plans read of transformers' configuration, from config.json alone: importing transformers takes seconds.

    Args:
        config: content of config.json.

    Returns:
        The stand-in, or None where config.json leaves out what only transformers knows.
    """
    from ficoco_vllm.planning.families import FAMILIES
    from ficoco_vllm.reduction.cost.shapes import CLIP_DEFAULTS, LLAMA_DEFAULTS

    known = FAMILIES.get(str(config.get("model_type")))
    if known is None or known.image_settings is not None:
        return None  # vLLM checks these models, when it has read the image processor's settings
    vision, language = config.get("vision_config"), config.get("text_config")
    tiled = config.get("model_type") == "llava_next"
    if not isinstance(vision, dict) or not isinstance(language, dict):
        return None
    if tiled and not config.get("image_grid_pinpoints"):
        return None
    text = SimpleNamespace(**{**LLAMA_DEFAULTS, **language})
    return SimpleNamespace(
        model_type=config.get("model_type"),
        vision_config=SimpleNamespace(**{"model_type": "clip_vision_model", **CLIP_DEFAULTS, **vision}),
        vision_feature_layer=config.get("vision_feature_layer", -2),
        vision_feature_select_strategy=config.get("vision_feature_select_strategy", "default"),
        image_grid_pinpoints=config.get("image_grid_pinpoints"),
        get_text_config=lambda: text,
    )
