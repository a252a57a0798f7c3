"""The default budget of a request, in tower and decoder, on a server whose budget follows the load."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.families import tower_shape
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.request_fields import KEEP, METHOD
from ficoco_vllm.server.elastic.settings import OPTION, ElasticSettings

if TYPE_CHECKING:  # it imports vLLM, which needs the environment that the command line sets
    from ficoco_vllm.server.elastic.budget import ElasticBudget


def check_elastic(settings: ElasticSettings, config: FicocoConfig, hf_config: Any, min_keep: int = 1) -> None:
    """Validate settings against model, method and operator, before anything is loaded.

    Args:
        settings: of the controller.
        config: settings of the server.
        hf_config: transformers' configuration of the model.
        min_keep: the fewest visual tokens that the operator lets a request have.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    if config.kv_budget is not None:
        raise ValueError(
            f"kv_budget = {config.kv_budget} is not allowed with {OPTION}, which says what is left in the "
            "last layers; allowed: keep, or neither"
        )
    shape = tower_shape(hf_config)
    most = shape.num_units if shape.tiling is None else ServerPlan.of(config, hf_config).most
    settings.check_bounds(min_keep, most)
    # The ceiling is the easiest to reach, so the plan at the ceiling exists and each other level is checked by name.
    fixed = config.encoder.get("keep")
    most = settings.ceiling if fixed is None else min(settings.ceiling, fixed)
    at_ceiling = ServerPlan.of(config.model_copy(update={"keep": most}), hf_config)
    settings.check_served(at_ceiling.check_budget)


@dataclass(frozen=True)
class TowerBudget:
    """Visual tokens after the tower for a request that names no budget."""

    budget: "ElasticBudget"
    plan: ServerPlan

    def __call__(self, method: str | None) -> int:
        """Visual tokens of an image.

        Args:
            method: that the request names, or None.
        """
        tower_keep = self.plan.tower_keep
        if method is None:
            return tower_keep(self.budget())
        return tower_keep(
            self.budget.reachable(lambda budget: self.plan.tower.budget(method, tower_keep(budget)))
        )


@dataclass(frozen=True)
class DecoderBudget:
    """Visual tokens in the decoder's last segment for a request that names no budget."""

    budget: "ElasticBudget"
    plan: ServerPlan

    @cached_property
    def _levels(self) -> dict[int, int]:
        """Map from the tokens that the tower leaves to the budget of the whole model that they belong to."""
        if not self.plan.tower_follows:
            return {}
        return {self.plan.tower_keep(budget): budget for budget in self.budget.settings.budgets}

    def __call__(self, method: str | None, entering: int) -> int:
        """Visual tokens of each image.

        Args:
            method: that the request names, or None.
            entering: visual tokens of its largest image that enter the decoder. If they reveal the budget that the
                tower got a moment ago, the decoder takes the same.
        """
        decoder = self.plan.decoder
        assert decoder is not None
        budget = self._levels.get(entering, self.budget())
        if method is None:
            return min(budget, entering)
        images = [(0, entering)]
        return min(
            self.budget.reachable(
                lambda level: decoder.plan(entering + 1, images, {KEEP: min(level, entering), METHOD: method})
            ),
            entering,
        )
