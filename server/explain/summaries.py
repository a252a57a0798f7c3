"""One-line summary of each method, for users."""

from collections.abc import Mapping

from ficoco_vllm.reduction.method import Site

SUMMARIES: Mapping[str, str] = {
    "best": "Keeps tokens that differ most from each other and merges the others into similar ones.",
    "cdpruner": "Keeps a varied set of tokens that matter for the question; drops the others.",
    "divprune": "Keeps tokens that differ most from each other; drops the others.",
    "evit": "Keeps the tokens that the image summary attends to most; fuses the others into one new token.",
    "fastv": "Drops the tokens that receive the least attention, once, early in the language model.",
    "ficoco-l": "Merges tokens that the question attends to least, layer by layer in the language model.",
    "ficoco-v": "Merges redundant tokens into related ones, layer by layer in the vision tower.",
    "ficoco-vl": "Merges in the vision tower first, then again in the language model, guided by the question.",
    "fitprune": "Drops tokens that neither the image nor the question attends to, by a recipe fitted beforehand.",
    "prumerge": "Keeps the tokens that the image summary attends to most and adds their neighbours to them.",
    "prumerge-plus": "As PruMerge, with tokens spread evenly over the image in addition.",
    "pyramiddrop": "Drops the same share of tokens at a few layers of the language model.",
    "random": "Keeps tokens at random: the baseline that any method should beat.",
    "recoverable": "Keeps tokens by attention, recovers some that match the question and merges the others.",
    "scope": "Keeps tokens that matter and that stand for parts of the image that no kept token covers yet.",
    "sparsevlm": "Rates tokens by the question's words and recycles the best of the dropped ones.",
    "spatial-pool": "Averages neighbouring patches, like a smaller image.",
    "tome": "Merges the most similar pairs of tokens, layer by layer in the vision tower.",
    "tops": "Keeps tokens that matter, cover the image and differ, after the vision tower and in the language model.",
    "tops-l": "As TOPS's first stage, for the question, at two layers of the language model.",
    "tops-v": "Keeps tokens that matter, that cover the image and that differ from each other; drops the others.",
    "topk-cls": "Keeps the tokens that the image summary attends to most; drops the others.",
    "trim": "Keeps the tokens that match the question and averages the others into one new token.",
    "turbo": "Merges similar tokens as ToMe does, and spares those that carry much information.",
    "visionzip": "Keeps the tokens with the most attention and merges the others into evenly spread ones.",
    "vscan": "Keeps the best tokens of each part of the image and of all of it, then drops more in the language model.",
    "vscan-l": "Drops the tokens that receive the least attention, once, in the middle of the language model.",
    "vscan-v": "Keeps the best tokens of each part of the image and of all of it; merges the others into them.",
}
_BY_SITE: Mapping[Site, str] = {
    "encoder": "Reduces tokens layer by layer in the vision tower.",
    "features": "Reduces tokens once, after the vision tower.",
    "decoder": "Reduces tokens layer by layer in the language model.",
}


def summary(name: str, site: Site) -> str:
    """Summary of a method; for a third-party method, of its site.

    Args:
        name: name of the method.
        site: where it reduces.
    """
    return SUMMARIES.get(name, _BY_SITE[site])
