"""The bundled model loads in Hugging Face, answers its examples, and matches its card."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import ficoco_vllm.demo_model as demo

MAX_BYTES = 12_000_000
ACCURACY = Path(demo.__file__).parents[2] / "tools/demo_model/accuracy.json"


@pytest.fixture(scope="module")
def loaded():
    transformers = pytest.importorskip("transformers")
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        demo.path(), dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), transformers.AutoProcessor.from_pretrained(demo.path()), info


def load_image(example: demo.Example) -> Image.Image:
    with Image.open(example.image) as image:
        return image.convert("RGB")


@torch.no_grad()
def answer(loaded, prompt: str, images: list[Image.Image]) -> str:
    model, processor, _ = loaded
    inputs = processor(text=[prompt], images=images, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return processor.tokenizer.decode(
        tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True
    ).strip()


def chat(question: str, num_images: int = 1) -> list[dict[str, object]]:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def test_every_weight_is_found_and_none_is_left_over(loaded):
    info = loaded[2]
    assert not any(info[part] for part in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_answers_every_example_with_all_tokens(loaded):
    for example in demo.examples():
        prompt = loaded[1].apply_chat_template(chat(example.question), add_generation_prompt=True)
        assert answer(loaded, prompt, [load_image(example)]) == example.answer, example.question


def test_examples_cover_the_types_of_question_and_have_native_size():
    examples = demo.examples()
    answers = {example.answer for example in examples}
    assert len(examples) >= 5
    assert answers & {"yes", "no"}
    assert any(len(text) == 3 and text.isdigit() for text in answers)
    assert any(len(text) == 1 for text in answers)
    assert all(load_image(example).size == (192, 192) for example in examples)


def test_weights_are_one_small_bf16_file_under_the_names_that_vllm_reads():
    files = list(demo.path().glob("*.safetensors"))
    assert [file.name for file in files] == ["model.safetensors"]
    assert files[0].stat().st_size <= MAX_BYTES
    with safe_open(files[0], "pt") as weights:
        names = list(weights.keys())
        assert all(weights.get_slice(name).get_dtype() == "BF16" for name in names)
    towers = [name for name in names if name.startswith("vision_tower.")]
    assert towers
    assert all(name.startswith("vision_tower.vision_model.") for name in towers)


def test_configuration_gives_576_tokens_and_heads_that_vllm_accepts_on_a_cpu(loaded):
    config = loaded[0].config
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size // vision.patch_size) ** 2 == 576
    assert vision.hidden_size // vision.num_attention_heads >= 32
    assert text.head_dim >= 32
    assert min(vision.num_hidden_layers, text.num_hidden_layers) >= 8
    assert text.max_position_embeddings >= 4096
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")


def test_chat_template_takes_a_system_message_several_images_and_several_turns(loaded):
    processor = loaded[1]
    messages = [
        {"role": "system", "content": "Be brief."},
        *chat("red number?", num_images=2),
        {"role": "assistant", "content": "473"},
        {"role": "user", "content": "and the blue one?"},
    ]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == (
        "Be brief. USER: <image>\n<image>\nred number? ASSISTANT: 473</s>USER: and the blue one? ASSISTANT:"
    )
    images = [load_image(demo.examples()[0])] * 2
    tokens = processor(text=[prompt], images=images, return_tensors="pt").input_ids
    assert (tokens == processor.image_token_id).sum() == 2 * 576


def test_tokenizer_takes_any_text_and_splits_numbers_into_digits(loaded):
    tokenizer = loaded[1].tokenizer
    for text in ("Grüße, 東京! 🙂", "x = 4096", ""):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize("4096") == list("4096")


def test_the_card_states_the_measured_accuracy():
    card = (demo.path() / "MODEL_CARD.md").read_text()
    for row in json.loads(ACCURACY.read_text())["rows"]:
        line = next(line for line in card.splitlines() if line.startswith(f"| {row['kind']} |"))
        stated = [float(cell) for cell in line.strip("| ").split(" | ")[1:]]
        assert stated == [row[key] for key in ("count", "accuracy", "majority", "without_image")]
