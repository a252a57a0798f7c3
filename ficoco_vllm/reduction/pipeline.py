"""Methods that reduce twice: in the vision encoder, then in the decoder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.methods.ficoco_l import FICOCO_L
from ficoco_vllm.reduction.methods.ficoco_v import FICOCO_V
from ficoco_vllm.reduction.methods.tops_l import TOPS_L
from ficoco_vllm.reduction.methods.tops_v import TOPS_V
from ficoco_vllm.reduction.methods.vscan_l import VSCAN_L
from ficoco_vllm.reduction.methods.vscan_v import VSCAN_V

# Tokens that leave the encoder for each one that is left in the end, where no split is given and the number of tokens
# that enter is unknown: the even split of a ninth.
EVEN_RATIO = 3


@dataclass(frozen=True)
class Pipeline:
    """Two methods one after the other; each has its own settings.

    Attributes:
        name: as users write it.
        title: as its authors write it.
        source: arXiv identifier.
        summary: what it does, in one line for users.
        encoder: method in the vision encoder.
        decoder: method in the decoder, for the tokens that the encoder keeps.
        ratio: tokens that leave the encoder for each one that is left in the end; None shares the loss evenly.
    """

    name: str
    title: str
    source: str
    summary: str
    encoder: Method
    decoder: Method
    ratio: int | None = None

    def encoder_keep(self, num_tokens: int, keep: int) -> int:
        """Number of tokens that leave the encoder if only the final count is given.

        It is `ratio` times as many, at most N. Without a ratio it is the geometric mean of N and `keep`: both parts
        keep the same share. FiCoCo's source fixes no split.

        Args:
            num_tokens: N, patches that enter.
            keep: tokens after the decoder's last reduction.

        Raises:
            ValueError: `keep` is not within 1 to N.

        Source: arXiv:2411.17686, Sec. 3.2, "FiCoCo-VL".
        """
        if not 1 <= keep <= num_tokens:
            raise ValueError(f"keep = {keep}: allowed is 1 to {num_tokens}, the number of visual tokens")
        return math.isqrt(num_tokens * keep) if self.ratio is None else min(num_tokens, self.ratio * keep)

    def encoder_share(self, share: float) -> float:
        """Share of the tokens that leaves the encoder: `encoder_keep` for images whose number of tokens varies.

        Args:
            share: share of the tokens after the decoder's last reduction, above 0, at most 1.
        """
        return math.sqrt(share) if self.ratio is None else min(1.0, self.ratio * share)

    def encoder_most(self, keep: int) -> int:
        """The most tokens that leave the encoder for a final count, of images whose number of tokens varies.

        Deviation: without a ratio it is three times the final count, not the geometric mean, which needs the number of
        tokens that enter. Both are equal where a ninth is left.

        Args:
            keep: tokens after the decoder's last reduction.
        """
        return (EVEN_RATIO if self.ratio is None else self.ratio) * keep

    def decoder_keep(self, num_tokens: int) -> int:
        """Tokens after the decoder's last reduction where no final count is given.

        They are a ninth of the image's where the encoder's budget is not given either.

        Args:
            num_tokens: number of tokens of the image as it leaves the encoder.
        """
        return max(1, round(num_tokens / (EVEN_RATIO if self.ratio is None else self.ratio)))


_ALL = (
    Pipeline(
        "ficoco-vl",
        "FiCoCo-VL",
        "2411.17686",
        "Merges in the vision tower first, then again in the language model, guided by the question.",
        FICOCO_V,
        FICOCO_L,
    ),
    # Table 9: 2T tokens of a budget T enter the decoder, T / 4 leave it.
    Pipeline(
        "tops",
        "TOPS",
        "2606.27161",
        "Keeps tokens that matter, cover the image and differ, after the vision tower and in the language model.",
        TOPS_V,
        TOPS_L,
        ratio=8,
    ),
    # The authors' scripts: 96 tokens enter the decoder, 32 leave it.
    Pipeline(
        "vscan",
        "VScan",
        "2505.22654",
        "Keeps the best tokens of each part of the image and of all of it, then drops more in the language model.",
        VSCAN_V,
        VSCAN_L,
        ratio=3,
    ),
)

PIPELINES: Mapping[str, Pipeline] = {pipeline.name: pipeline for pipeline in _ALL}
