"""The KV cache as `ficoco-vllm plan` prints it, for comparison with what an engine holds."""

import argparse
import json
from pathlib import Path

from ficoco_vllm.reduction.cost import model_shape
from ficoco_vllm.server.commands import plan


def kv_tokens(folder: Path, num_text_tokens: int, *options: str) -> list[int]:
    """Tokens of a prompt in the KV cache of each decoder layer.

    Args:
        folder: of the model.
        num_text_tokens: all tokens but the visual ones.
        *options: of the command.
    """
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    command = ["plan", str(folder), "--text-tokens", str(num_text_tokens), *options]
    report = plan.make_report(parser.parse_args(command))
    width = model_shape(json.loads((folder / "config.json").read_text())).decoder.kv_width
    token_bytes = 2 * width * 2  # keys and values, fp16
    per_layer = report["reduced"]["kv_bytes_per_layer"]
    assert all(num_bytes % token_bytes == 0 for num_bytes in per_layer)
    assert sum(per_layer) == report["reduced"]["kv_bytes"]
    return [num_bytes // token_bytes for num_bytes in per_layer]
