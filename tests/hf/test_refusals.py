"""What cannot be reduced is refused with its reason, and leaves the model as it was."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    SiglipVisionConfig,
    VipLlavaForConditionalGeneration,
)

from ficoco_vllm.hf import apply, reduce_tokens, remove
from tests.support.hugging_face import HfLlava

ROOT = Path(__file__).parents[2]
PROMPT = "<s>USER: <image>\nwhat number is on the sign? ASSISTANT:"


def tiny(model_class: Any = LlavaForConditionalGeneration, **changes: Any) -> Any:
    """A model of a few thousand parameters."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    parts = {
        "vision_config": CLIPVisionConfig(image_size=32, patch_size=8, **sizes),
        "text_config": LlamaConfig(vocab_size=64, **sizes),
        "image_token_index": 4,
    }
    return model_class(model_class.config_class(**(parts | changes))).eval()


SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("make", "method", "settings", "message"),
    [
        (object, "ficoco-v", {}, "model = object is not known; allowed: LlavaFor.* and LlavaNextFor"),
        (lambda: tiny(VipLlavaForConditionalGeneration), "ficoco-v", {}, "model = VipLlava.* is not known"),
        (lambda: tiny(vision_config=SiglipVisionConfig(image_size=32, patch_size=8, **SIZES)), "ficoco-v", {},
         "vision_config.model_type = 'siglip_vision_model' cannot be reduced"),
        (lambda: tiny(text_config=MistralConfig(vocab_size=64, num_key_value_heads=2, **SIZES)), "ficoco-l", {},
         r"reduces in the decoder: the decoder \('mistral'\) attends to the last 4096 tokens only"),
        (lambda: tiny(text_config=GemmaConfig(vocab_size=64, num_key_value_heads=2, head_dim=16, **SIZES)), "ficoco-l",
         {}, "reduces in the decoder: the decoder is 'gemma'; allowed: 'llama', .*, or a method of the tower"),
        (lambda: tiny(vision_feature_layer=[-2, -1]), "ficoco-v", {}, r"vision_feature_layer = \[-2, -1\]"),
        (lambda: torch.compile(tiny()), "ficoco-v", {}, "a compiled model is not allowed"),
        (tiny, "ficoco-v", {"text_encoder": "clip"}, "text_encoder is a setting of the server"),
        (tiny, "magic", {}, "method = 'magic' is not a known method; allowed: "),
        (tiny, "ficoco-v", {"keep": 17}, "ficoco.keep = 17 is not allowed; allowed: an integer from 1 to 16"),
        (tiny, "ficoco-v", {"keep": 0}, "ficoco.keep = 0 is not allowed"),
        (tiny, "ficoco-v", {"lamb": 0.3}, "lamb"),
        (tiny, "ficoco-v", {"explain": True}, "explain is a setting of the server"),
        (tiny, "ficoco-l", {"kv_budget": 99.0}, "ficoco.kv_budget = 99.0 is not allowed"),
    ],
)  # fmt: skip
def test_models_and_settings(
    make: Callable[[], Any], method: str, settings: dict[str, Any], message: str
) -> None:
    model = make()
    with pytest.raises(ValueError, match=message):
        apply(model, method, **settings)
    if hasattr(model, "model"):
        assert "forward" not in vars(model.model)


def test_a_model_that_was_compiled_in_place() -> None:
    model = tiny()
    model.compile()
    with pytest.raises(ValueError, match="a compiled model is not allowed"):
        apply(model)


def test_mistral_reduces_in_the_tower() -> None:
    model = tiny(text_config=MistralConfig(vocab_size=64, num_key_value_heads=2, **SIZES))
    ids = torch.tensor([[1, *[4] * 16, 7]])
    with torch.no_grad(), reduce_tokens(model, "ficoco-v", 4) as reduction:
        model.generate(ids, pixel_values=torch.randn(1, 3, 32, 32), max_new_tokens=2, pad_token_id=0)
    assert reduction.tokens == (1, 16, 4, 4)


def test_layers_on_several_devices() -> None:
    """A method of the tower leaves the language model to transformers, wherever its layers are."""
    model = tiny()
    model.model.language_model.layers[1].to("meta")
    with pytest.raises(
        ValueError, match="language model, in which ficoco-l reduces is spread over cpu, meta"
    ):
        apply(model, "ficoco-l", 4)
    apply(model, "ficoco-v", 4)
    remove(model)
    model.model.vision_tower.encoder.layers[1].to("meta")
    with pytest.raises(ValueError, match="vision tower is spread over cpu, meta; allowed: one device"):
        apply(model, "ficoco-v", 4)


def test_offloaded_weights_are_where_their_hooks_bring_them() -> None:
    """Weights that accelerate offloads are on "meta"; its hooks bring them to one device before each call."""
    model = tiny()
    cpu, other = (SimpleNamespace(execution_device=device) for device in ("cpu", "cuda:1"))
    offloaded = model.model.vision_tower.encoder.layers[1].to("meta")
    for part in offloaded.modules():
        part._hf_hook = SimpleNamespace(hooks=(SimpleNamespace(), cpu))
    apply(model, "ficoco-v", 4)
    remove(model)
    for part in offloaded.modules():
        part._hf_hook = other
    with pytest.raises(ValueError, match="vision tower is spread over cpu, cuda:1; allowed: one device"):
        apply(model, "ficoco-v", 4)


def test_an_old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ficoco_vllm.hf.reduce.transformers.__version__", "4.57.1")
    with pytest.raises(
        ValueError, match=r"transformers = 4\.57\.1 is not supported; allowed: 5\.19 or later"
    ):
        apply(tiny())


def test_a_second_reduction() -> None:
    """Nested blocks, also of two threads: the first one goes on undisturbed."""
    model = tiny()
    with reduce_tokens(model, "ficoco-v", 4):
        with (
            pytest.raises(ValueError, match="already reduced, by ficoco-v"),
            reduce_tokens(model, "tome", 4),
        ):
            pass
        assert "forward" in vars(model.model)
    with pytest.raises(ValueError, match="the model is not reduced"):
        remove(model)

    def try_once(_: int) -> bool:
        try:
            apply(model, "ficoco-v", 4)
        except ValueError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(try_once, range(32))) == 1
    remove(model)


def test_an_exception_in_the_block() -> None:
    model = tiny()
    with pytest.raises(KeyError), reduce_tokens(model, "ficoco-v", 4):
        raise KeyError
    assert "forward" not in vars(model.model)


def test_methods_that_were_replaced_before_and_after() -> None:
    """As accelerate's hooks do: those from before come back, those from after are not thrown away."""
    model = tiny()
    hooked = model.model.forward
    model.model.forward = hooked
    with reduce_tokens(model, "ficoco-v", 4):
        assert vars(model.model)["forward"] is not hooked
    assert vars(model.model)["forward"] is hooked
    apply(model, "ficoco-v", 4)
    ours, model.model.forward = model.model.forward, lambda *_, **__: None
    with pytest.raises(RuntimeError, match="forward of the model has been replaced since"):
        remove(model)
    model.model.forward = ours
    remove(model)


def test_an_adapter_model_is_unwrapped() -> None:
    """As peft wraps models: its `get_base_model` returns the LLaVA whose linear layers it has exchanged."""
    model = tiny()
    wrapped = SimpleNamespace(get_base_model=lambda: model)
    with reduce_tokens(wrapped, "ficoco-v", 4):
        assert "forward" in vars(model.model)


def test_calls(small_hf: HfLlava, images: list[Image.Image]) -> None:
    inputs = small_hf.inputs([(PROMPT, images[:1])])
    model = small_hf.model
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"output_attentions": True}, "output_attentions = True is not allowed while tokens are reduced"),
        ({"output_hidden_states": True}, "output_hidden_states = True is not allowed"),
        ({"vision_feature_layer": -1}, "vision_feature_layer = -1 is not allowed .* allowed: -2"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask of four dimensions is not allowed"),
        ({"attention_mask": torch.ones(1, 7)}, "attention_mask has 7 columns"),
        ({"input_ids": inputs["input_ids"][:, :100]}, r"input_ids has \[9\d\] image placeholders .*\[144\] tokens"),
        ({"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}, r"\[144, 144\] tokens"),
    ]  # fmt: skip
    with torch.no_grad(), reduce_tokens(model, "ficoco-v", 16):
        for changes, message in wrong:
            arguments = {**inputs, **changes}
            if "input_ids" in changes:
                arguments["attention_mask"] = torch.ones_like(changes["input_ids"])
            with pytest.raises(ValueError, match=message):
                model(**arguments)
        with pytest.raises(ValueError, match="a static cache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        with pytest.raises(ValueError, match="inputs_embeds is not allowed"):
            model(inputs_embeds=embeddings, pixel_values=inputs["pixel_values"])
        model.train()
        try:
            with pytest.raises(ValueError, match="training mode"):
                model(**inputs)
        finally:
            model.eval()
    with reduce_tokens(model, "ficoco-v", 16), pytest.raises(ValueError, match=r"torch\.no_grad"):
        model(**inputs)


def test_a_third_partys_method(tmp_path: Path) -> None:
    """The package of docs/adding-a-method.md, found by its entry point."""
    (code,) = [
        block
        for block in (ROOT / "docs" / "adding-a-method.md").read_text().split("```python\n")[1:]
        if "METHOD = Method(" in block
    ]
    (tmp_path / "small_norm.py").write_text(code.split("```")[0])
    metadata = tmp_path / "small_norm-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: small-norm\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[ficoco_vllm.reductions]\nsmall-norm = small_norm:METHOD\n")
    script = """
import sys, torch
from ficoco_vllm.hf import reduce_tokens
from tests.hf.test_refusals import tiny

model, ids = tiny(), torch.tensor([[1, *[4] * 16, 7]])
with reduce_tokens(model, "small-norm", 4, power=1.5) as reduction:
    model.generate(ids, pixel_values=torch.randn(1, 3, 32, 32), max_new_tokens=2, pad_token_id=0)
assert reduction.tokens.after == 4
for name in ("vllm", "prometheus_client", "matplotlib", "fastapi"):
    assert name not in sys.modules, name
"""
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
