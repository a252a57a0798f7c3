"""Methods that reduce twice: in the vision encoder, then in the decoder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.methods.ficoco_l import FICOCO_L
from ficoco_vllm.reduction.methods.ficoco_v import FICOCO_V


@dataclass(frozen=True)
class Pipeline:
    """Two methods one after the other; each has its own settings.

    Attributes:
        name: as users write it.
        title: as its authors write it.
        source: arXiv identifier.
        encoder: what reduces in the vision encoder.
        decoder: what reduces the survivors in the decoder.
    """

    name: str
    title: str
    source: str
    encoder: Method
    decoder: Method

    def encoder_keep(self, num_tokens: int, keep: int) -> int:
        """How many tokens leave the encoder where only the final count is given: both parts halve alike.

        The geometric mean of what goes in and what is to be left. The source fixes no split.

        Args:
            num_tokens: N, patches that enter.
            keep: tokens after the decoder's last reduction.

        Raises:
            ValueError: `keep` is not within 1 to N.

        Source: arXiv:2411.17686, Sec. 3.2, "FiCoCo-VL".
        """
        if not 1 <= keep <= num_tokens:
            raise ValueError(f"keep = {keep}: allowed is 1 to {num_tokens}, the number of visual tokens")
        return math.isqrt(num_tokens * keep)


FICOCO_VL = Pipeline("ficoco-vl", "FiCoCo-VL", "2411.17686", FICOCO_V, FICOCO_L)

PIPELINES: Mapping[str, Pipeline] = {FICOCO_VL.name: FICOCO_VL}
