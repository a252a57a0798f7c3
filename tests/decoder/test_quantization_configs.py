"""Configurations that need a GPU to run: layers, KV cache and refusals, without any weights.

An fp8 KV cache, which vLLM's CPU build has too, is also used.
"""

import json
import math
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from PIL import Image

from ficoco_vllm.benchmarks.harness.quantization import IGNORED, quantization_config
from ficoco_vllm.models.llava import FicocoLlava
from ficoco_vllm.models.llava_next import FicocoLlavaNext
from tests.decoder import calls
from tests.decoder.calls import Ask
from tests.decoder.other_engines import cache_of, layers_of
from tests.decoder.test_reference import left
from tests.reference.algorithm2 import ReferenceDecoder, Shown
from tests.support.engine import PROMPT
from tests.support.quantized import HAS_FP8_CACHE, needs_fp8_cache, to_e4m3
from tests.support.remote import Host, Remote

pytestmark = [pytest.mark.compat, pytest.mark.engine]

V = {"method": "ficoco-v", "keep": 16}
L = {"method": "ficoco-l", "keep": 16}
# As published checkpoints say it, and the class of vLLM that computes the decoder's projections then. Only GPTQ and FP8
# as they stand here say nothing of tower and projector, which are quantized with the rest.
CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "AWQ": (
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 32,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["vision_tower", "multi_modal_projector"],
        },
        "AWQ",
    ),
    "GPTQ": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
        "GPTQ",
    ),
    "FP8": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "Fp8"),
    "FP8 of llm-compressor": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "ignore": IGNORED,
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"},
                    "input_activations": {
                        "num_bits": 8,
                        "type": "float",
                        "symmetric": True,
                        "strategy": "token",
                        "dynamic": True,
                    },
                }
            },
        },
        "CompressedTensors",
    ),
    "W8A8": (quantization_config("int8"), "CompressedTensors"),
    "W4A16": (quantization_config("int4"), "CompressedTensors"),
}


@pytest.fixture(scope="module")
def engine(host: Host, small_llava: Path) -> Remote:
    """FiCoCo-L with an fp8 KV cache where the CPU supports one; most tests need only its process."""
    cache = "fp8" if HAS_FP8_CACHE else "auto"
    return host.get(small_llava, L, block_size=32, kv_cache_dtype=cache)


def quantized_as(model: Path, folder: Path, config: dict[str, Any]) -> str:
    """A copy of a model with a quantization config. Its weights are not read."""
    shutil.copytree(model, folder)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    return str(folder)


def is_quantized(layer: str) -> bool:
    """Whether a layer's implementation, as named by `layers_of`, has quantized weights."""
    return not layer.startswith("Unquantized")


@pytest.mark.parametrize("ficoco", [V, L], ids=["V", "L"])
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_those_of_stock_vllm(
    engine: Remote, small_llava: Path, tmp_path: Path, name: str, ficoco: dict[str, Any]
) -> None:
    config, method = CONFIGS[name]
    model = quantized_as(small_llava, tmp_path / "model", config)
    options = {"dtype": "bfloat16"}
    ours = engine.call(layers_of, model, ficoco, options, False)
    assert ours == engine.call(layers_of, model, {}, options, True)
    projections = {layer: result for layer, result in ours.items() if layer.endswith("_proj")}
    decoder = [result for layer, result in projections.items() if layer.startswith("language_model.")]
    assert len(decoder) == 8 * 4  # of each layer: qkv, o, gate_up, down
    assert all(result.startswith((method, f"Auto{method}")) for result in decoder), decoder
    tower = [result for layer, result in projections.items() if layer.startswith("vision_tower.")]
    assert {is_quantized(result) for result in tower} == {name in ("GPTQ", "FP8")}


@pytest.mark.parametrize("ours", [FicocoLlava, FicocoLlavaNext])
def test_names_in_checkpoints_mean_what_they_mean_to_vllm(ours: Any) -> None:
    """With both mappings vLLM finds the layers that a quantization names, and loads adapters and weights."""
    stock = next(base for base in ours.__mro__ if base.__module__.startswith("vllm."))
    assert ours.packed_modules_mapping == stock.packed_modules_mapping
    assert ours.hf_to_vllm_mapper is stock.hf_to_vllm_mapper


@pytest.mark.parametrize("ficoco", [V, L], ids=["V", "L"])
def test_vllm_knows_no_bitsandbytes(
    engine: Remote, small_llava: Path, tmp_path: Path, ficoco: dict[str, Any]
) -> None:
    """With and without our plugin. Once this fails, docs/quantization.md needs another row."""
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    model = quantized_as(small_llava, tmp_path / "model", config)
    for settings in (ficoco, {}):
        result = engine.call(calls.start_up_error, model, settings, {"dtype": "bfloat16"})
        assert "Unknown quantization method: bitsandbytes" in result


@pytest.mark.parametrize("ficoco", [V, L], ids=["V", "L"])
@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e5m2", "llm-compressor"])
def test_an_fp8_cache_has_twice_the_blocks(
    engine: Remote, small_llava: Path, tmp_path: Path, cache_dtype: str, ficoco: dict[str, Any]
) -> None:
    """The same memory holds twice the tokens: one byte a value, in metrics and viewer; by option or by checkpoint."""
    options: dict[str, Any] = {"dtype": "bfloat16", "block_size": 32}
    stock = engine.call(cache_of, str(small_llava), ficoco, options)
    model = str(small_llava)
    if cache_dtype == "llm-compressor":
        config, _ = CONFIGS["FP8 of llm-compressor"]
        scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
        model = quantized_as(small_llava, tmp_path / "model", config | {"kv_cache_scheme": scheme})
    else:
        options["kv_cache_dtype"] = cache_dtype
    result = engine.call(cache_of, model, ficoco, options)
    # 2 KV heads of size 32, keys and values; eight segments of one layer, or one group of eight layers.
    assert (stock.token_bytes, result.token_bytes) == (2 * 2 * 32 * 2, 2 * 2 * 32)
    assert result.page_bytes == [32 * result.token_bytes] * (8 if ficoco is L else 1)
    assert result.segments == (list(range(8)) if ficoco is L else [None])
    assert result.num_blocks == 2 * stock.num_blocks


@pytest.mark.parametrize("ficoco", [V, L], ids=["V", "L"])
def test_layers_left_out_of_an_fp8_cache(engine: Remote, small_llava: Path, ficoco: dict[str, Any]) -> None:
    """Blocks of all segments come out of one pool."""
    options = {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0", "7"]}
    result = engine.call(calls.start_up_error, str(small_llava), ficoco, options)
    assert ("--kv-cache-dtype-skip-layers 0 7 (with --kv-cache-dtype fp8) is not allowed" in result) == (
        ficoco is L
    ), result
    assert ficoco is L or result == ""


@needs_fp8_cache
def test_an_fp8_cache_in_use(engine: Remote, small_llava: Path, images: list[Image.Image]) -> None:
    """Compared with an oracle whose attention reads rounded keys and values and whose reduction reads exact ones."""
    exact, rounded = ReferenceDecoder(small_llava), ReferenceDecoder(small_llava)
    rounded.stored = to_e4m3
    shown = [Shown(image, 144, left("ficoco-l", 144, 16)) for image in images]
    unreduced = [Shown(image, 144, {}) for image in images]
    answers = engine.call(calls.ask, [Ask(PROMPT, [image], 1) for image in images])

    def distance(reference: ReferenceDecoder, pictures: list[Shown]) -> float:
        return fmean(
            float((answer.logprobs - reference.judge("ficoco-l", PROMPT, [one], answer.tokens)).abs().max())
            for answer, one in zip(answers, pictures, strict=True)
        )

    near, far = distance(rounded, shown), min(distance(exact, shown), distance(rounded, unreduced))
    assert near < 0.1 * far, (near, far)


@needs_fp8_cache
def test_an_fp8_cache_holds_what_the_plan_says(engine: Remote, images: list[Image.Image]) -> None:
    """Slots are counted in the cache itself; in a few of them a value is so small that it became zero."""
    written, blocks, num_tokens = engine.call(calls.written_slots, Ask(PROMPT, [images[0]], num_tokens=5))
    visual = [144] * 4 + list(left("ficoco-l", 144, 16).values())
    expected = [num_tokens - 144 + count for count in visual]
    assert [math.ceil(slots) for slots in written] == expected
    assert blocks == [-(-tokens // 32) for tokens in expected]
