"""Training data of the demo model: deterministic, without held-out numbers, with layouts as in generation."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("easy_vqa")
pytest.importorskip("tqdm")

from ficoco_vllm.benchmarks.questions.held_out import KINDS_OF_QUESTION, held_out
from ficoco_vllm.benchmarks.questions.questions import Question
from ficoco_vllm.benchmarks.questions.scene import COLOUR, DIGIT, KIND, PLACE
from ficoco_vllm.benchmarks.questions.shapes import EasyVqa
from ficoco_vllm.benchmarks.questions.signs import HELD_OUT_NUMBERS, TRAINING_NUMBERS, render_signs
from tools.demo_model.decoder import Decoder, Projector
from tools.demo_model.dialogue import Asker
from tools.demo_model.evaluate import Evaluator
from tools.demo_model.export import export
from tools.demo_model.features import choose_tokens, encode, training_scene
from tools.demo_model.load import load_exported
from tools.demo_model.muon import orthogonalize
from tools.demo_model.tokenizer import build_tokenizer
from tools.demo_model.training_questions import sign_questions
from tools.demo_model.vision import VisionTower


def test_the_same_seed_gives_the_same_images_and_questions():
    for kind in KINDS_OF_QUESTION:
        once, again = held_out(kind, 3, seed=5), held_out(kind, 3, seed=5)
        for left, right in zip(once, again, strict=True):
            assert left.question == right.question
            assert np.array_equal(left.scene.image, right.scene.image)
            assert np.array_equal(left.scene.labels, right.scene.labels)
    first, second = (held_out("number", 3, seed=seed)[0].scene.image for seed in (5, 6))
    assert not np.array_equal(first, second)


def test_held_out_numbers_never_reach_training():
    assert len(HELD_OUT_NUMBERS) == 90
    assert len(TRAINING_NUMBERS) == 810
    assert not set(HELD_OUT_NUMBERS) & set(TRAINING_NUMBERS)
    rng, shapes = random.Random(0), EasyVqa("train")
    for _ in range(100):
        scene = training_scene(rng, shapes, shape_share=0.0)
        assert {sign.number for sign in scene.signs} <= set(TRAINING_NUMBERS)
    for kind in ("number", "number_by_colour_3", "yes_no_signs"):
        for example in held_out(kind, 5):
            assert {sign.number for sign in example.scene.signs} <= set(HELD_OUT_NUMBERS)


@pytest.mark.parametrize("kind", ["yes_no_signs", "yes_no_shapes"])
def test_yes_and_no_are_balanced_even_given_the_phrasing(kind):
    requested = [example.question for example in held_out(kind, 40)]
    for negated in (False, True):
        answers = [
            question.answer
            for question in requested
            if (" not " in question.text or " no " in question.text) == negated
        ]
        assert answers.count("yes") == answers.count("no")


def test_labels_mark_the_patches_of_a_digit():
    scene = render_signs(random.Random(3), 192, 192, TRAINING_NUMBERS, 3)
    assert len(scene.signs) == 3
    for sign in scene.signs:
        plate = scene.labels[COLOUR] == sign.colour + 1
        for place, digit in enumerate(sign.number):
            inside = plate & (scene.labels[PLACE] == place + 1)
            assert inside.any()
            assert set(scene.labels[DIGIT][inside]) == {int(digit) + 1}
    assert (scene.labels[KIND] <= 1).all()


def test_subsets_keep_every_digit_while_there_is_room():
    scenes = [render_signs(random.Random(seed), 192, 192, TRAINING_NUMBERS, 3) for seed in range(4)]
    labels = torch.from_numpy(np.stack([scene.labels for scene in scenes])).flatten(2)
    kept = choose_tokens(labels, 128)
    assert torch.equal(kept, kept.sort(dim=1).values)
    seen = labels[:, DIGIT].gather(1, kept)
    assert torch.equal((seen > 0).sum(1), (labels[:, DIGIT] > 0).sum(1))


def test_orthogonalize_brings_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalize(torch.randn(2, 48, 16)).float())
    # Muon's coefficients trade exactness for speed: they leave values between 0.7 and 1.2
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_growing_a_decoder_does_not_change_its_function():
    torch.manual_seed(0)
    decoder = Decoder(40, 2)
    x, position, bias = torch.randn(1, 5, 128), torch.arange(5)[None], torch.zeros(1, 1, 5, 5)
    before, _ = decoder(x, position, bias)
    decoder.grow()
    assert len(decoder.layers) == 4
    assert torch.equal(decoder(x, position, bias)[0], before)


def test_a_chained_dialogue_is_tokenized_as_its_text_would_be():
    asker = Asker(build_tokenizer())
    questions = [
        Question("what number is on the red sign?", "473", "a"),
        Question("is there a blue sign?", "no", "b"),
    ]
    ((tokens, target, owner),) = asker.strands(questions, chained=True)
    text = "\nwhat number is on the red sign? ASSISTANT: 473</s>USER: is there a blue sign? ASSISTANT: no"
    assert tokens == asker.tokenizer(text).input_ids
    answers = [token for token in target if token >= 0]
    assert asker.tokenizer.decode(answers) == " 473</s> no</s>"
    assert [owner[index] for index, token in enumerate(target) if token >= 0] == [0] * 5 + [1] * 2


def test_batched_scores_equal_hugging_face_on_an_exported_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    export(tmp_path, tokenizer, VisionTower(), Projector(), Decoder(len(tokenizer), 8))
    tower, projector, decoder = load_exported(tmp_path)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    scene = render_signs(random.Random(1), 192, 192, TRAINING_NUMBERS, 2)
    questions = sign_questions(scene.signs, random.Random(2), 3)
    asker = Asker(tokenizer)
    with torch.no_grad():
        visual = projector(encode(tower, [scene], torch.float32))
        scores = asker.score(decoder, visual, torch.arange(576)[None], 576, [questions])
        processor = transformers.AutoProcessor.from_pretrained(tmp_path)
        for index, question in enumerate(questions):
            text = f"USER: <image>\n{question.text} ASSISTANT: {question.answer}"
            logits = model(**processor(text=[text], images=[scene.image], return_tensors="pt")).logits[0]
            mine = scores.logits[scores.owner == index]
            # fp32 with other orders of summation
            torch.testing.assert_close(logits[-len(mine) :], mine, atol=1e-4, rtol=1e-4)


def test_the_model_without_its_image_gets_no_visual_token(tmp_path):
    tokenizer = build_tokenizer()
    export(tmp_path, tokenizer, VisionTower(), Projector(), Decoder(len(tokenizer), 8))
    evaluator = Evaluator(tmp_path)
    examples = held_out("number", 4)
    swapped = held_out("shape", 4)
    blind = [
        evaluator.right(
            [type(a)(b.scene, a.question) for a, b in zip(examples, other, strict=True)], with_image=False
        )
        for other in (examples, swapped)
    ]
    assert blind[0] == blind[1]
