"""Token counts of a reduction."""

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

from torch import Tensor

from ficoco_vllm.planning.server import ServerPlan

# Guards the counts of all reductions; as an attribute it would keep a reduced model from being copied.
_counting = Lock()


class TokenCounts(NamedTuple):
    """Visual tokens of the images that a model has read.

    Attributes:
        images: number of images; a beam or a returned sequence of its own counts its images again.
        before: without reduction.
        after: in the last decoder layer.
        kv: in the KV cache, averaged over the decoder's layers.
    """

    images: int = 0
    before: int = 0
    after: int = 0
    kv: float = 0.0


@dataclass
class Reduction:
    """A reduction that is applied to a model.

    Attributes:
        method: name.
        plan: token counts, the same as those of a server with these settings.
        tokens: counts of all images since the reduction was applied.
        kept: for each image of the latest prompts, the patches whose tokens are left in the last decoder layer, (K,)
            int64: index in the grid, for LLaVA-NeXT tile by tile with the base view first; -1 for a fused token, [CLS]
            and a newline.
    """

    method: str
    plan: ServerPlan
    tokens: TokenCounts
    kept: Sequence[Tensor] = ()

    def note(self, before: int, held: float, kept: Sequence[Tensor]) -> None:
        """Count prompts that have been computed.

        Args:
            before: visual tokens of their images without reduction.
            held: those in the KV cache, averaged over the decoder's layers.
            kept: see the attribute.
        """
        after = sum(len(patch) for patch in kept)
        with _counting:
            images, all_before, all_after, kv = self.tokens
            self.tokens = TokenCounts(images + len(kept), all_before + before, all_after + after, kv + held)
            self.kept = kept
