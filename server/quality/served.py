"""The budget that a request was served with, read from what goes to the engine."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.kv.admission import visual_range
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.request_fields import BUDGET, KEEP


@dataclass(frozen=True)
class ServedBudget:
    """Budget that one request is served with, wherever it came from.

    Attributes:
        in_tower: the most visual tokens of an image after the tower; 0 where it has seen none, as of image embeddings.
        in_decoder: the same in the decoder's last segment; 0 where the request has no budget there, or none yet.
        entering: visual tokens of the largest image that enter the decoder.
    """

    in_tower: int
    in_decoder: int
    entering: int

    @classmethod
    def of(cls, prompt: Mapping[str, Any], extra_args: Mapping[str, Any]) -> "ServedBudget":
        """The budget of a request that goes to the engine.

        Args:
            prompt: rendered, with images.
            extra_args: the request's `vllm_xargs`, with its budget in the decoder filled in.
        """
        entering = max(visual_range(place)[1] for place in prompt["mm_placeholders"]["image"])
        in_tower = prompt[BUDGET].keep if BUDGET in prompt else 0
        return cls(in_tower, min(extra_args.get(KEEP, 0), entering), entering)

    def is_of(self, plan: ServerPlan, budget: int) -> bool:
        """Whether a request that names this budget is served in the same way."""
        if plan.tower_follows and self.in_tower != plan.tower_keep(budget):
            return False
        return plan.decoder is None or self.in_decoder == min(budget, self.entering)

    def keeps_all(self, plan: ServerPlan) -> bool:
        """Whether no site removes a token."""
        in_decoder = self.entering if plan.decoder is None else self.in_decoder
        return self.in_tower >= plan.tower.most_keep and in_decoder == self.entering
