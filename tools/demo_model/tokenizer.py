"""A byte-level BPE tokenizer that writes every digit as a token of its own."""

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ficoco_vllm.benchmarks.questions.scene import COLOUR_NAMES, KINDS, PLACES, SHAPES, Scene, Shape, Sign
from ficoco_vllm.benchmarks.questions.signs import TRAINING_NUMBERS
from tools.demo_model.architecture import ARCHITECTURE
from tools.demo_model.training_questions import training_questions

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
UNK, BOS, EOS, PAD, IMAGE = range(len(SPECIAL))
MAX_VOCABULARY = 512
PREFIX = "USER: "
NUM_SCENES = 1500


def corpus(seed: int = 0) -> list[str]:
    """Dialogues on made-up scenes; no image is rendered."""
    rng = random.Random(seed)
    lines = []
    for _ in range(NUM_SCENES):
        colours = rng.sample(range(len(COLOUR_NAMES)), 3)
        signs = tuple(Sign(colour, rng.choice(TRAINING_NUMBERS)) for colour in colours[: rng.randint(1, 3)])
        shape = Shape(rng.randrange(len(COLOUR_NAMES)), rng.randrange(len(SHAPES)))
        for scene in (Scene(None, None, signs), Scene(None, None, shape=shape)):  # type: ignore[arg-type]
            for question in training_questions(scene, rng, 5):
                lines.append(f"{PREFIX}\n{question.text} ASSISTANT: {question.answer}")
    words = [*COLOUR_NAMES, *KINDS, *PLACES]
    return lines + [f" {word}" for word in words for _ in range(500)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer. The vocabulary is deterministic.

    No special token is added around a text, so that a raw prompt and a chat template give the same tokens.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[UNK],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        additional_special_tokens=[SPECIAL[IMAGE]],
        model_max_length=ARCHITECTURE.max_position_embeddings,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def word_token(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    """The one token of a word that follows a space, or of a digit.

    Raises:
        ValueError: the word is not one token.
    """
    ids: list[int] = tokenizer(word if word.isdigit() else f" {word}", add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens; the visual vocabulary needs one")
    return ids[0]
