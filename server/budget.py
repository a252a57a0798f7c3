"""Default budget of a server on which it follows the load, the quality of the answers, or both."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.families import tower_shape
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.quality.settings import LADDER, OPTION, QualitySettings
from ficoco_vllm.request_fields import KEEP, METHOD

# Interval between two updates.
UPDATE_SECONDS = 0.25

# A child of vLLM's logger, whose handlers and level it shares.
logger = logging.getLogger("vllm.ficoco.budget")


class Source(Protocol):
    """Source of a moving budget."""

    @property
    def budgets(self) -> tuple[int, ...]:
        """All budgets, ascending."""

    def __call__(self) -> int:
        """The present one, visual tokens of an image. Thread-safe: prompts are processed outside of the event loop."""

    def update(self) -> None:
        """Exchange what was observed with the other processes of the server."""


@dataclass(frozen=True)
class DefaultBudget:
    """Budget of requests that name none: the largest that one of several sources asks for."""

    sources: tuple[Source, ...]

    @cached_property
    def budgets(self) -> tuple[int, ...]:
        """All budgets, ascending."""
        return tuple(sorted({budget for source in self.sources for budget in source.budgets}))

    def __call__(self) -> int:
        """Visual tokens of an image. Called for each request before its prompt is sized; thread-safe."""
        return max(source() for source in self.sources)

    def reachable(self, check: Callable[[int], Any]) -> int:
        """Find the lowest budget from the current one upwards that a method can reach.

        Args:
            check: called with a budget; raises ValueError where the method cannot reach it.

        Returns:
            The current budget where the method reaches none: the request is then refused as if it had named it.
        """
        current = self()
        for budget in self.budgets:
            if budget >= current:
                try:
                    check(budget)
                except ValueError:
                    continue
                return budget
        return current

    async def follow(self, show: Callable[[int], None]) -> None:
        """Update for as long as the server runs.

        Args:
            show: called with the budget after each update, for the metrics.
        """
        warned = ""
        while True:
            try:
                for source in self.sources:
                    source.update()
            except (OSError, ValueError) as error:  # a full disk, or a shared file that was changed by hand
                if str(error) != warned:
                    warned = str(error)
                    logger.warning("ficoco: the default budget stays at %d visual tokens: %s", self(), warned)
            show(self())
            await asyncio.sleep(UPDATE_SECONDS)


@dataclass(frozen=True)
class TowerBudget:
    """Visual tokens after the tower for a request that names no budget."""

    budget: DefaultBudget
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

    budget: DefaultBudget
    plan: ServerPlan

    @cached_property
    def _levels(self) -> dict[int, int]:
        """Map from the tokens that the tower leaves to the budget of the whole model that they belong to."""
        if not self.plan.tower_follows:
            return {}
        return {self.plan.tower_keep(budget): budget for budget in self.budget.budgets}

    def __call__(self, method: str | None, entering: int) -> int:
        """Visual tokens of each image.

        Args:
            method: that the request names, or None.
            entering: visual tokens of its largest image that enter the decoder. If they match a budget
                that the tower has just used, the decoder uses the same.
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


def most_tokens(config: FicocoConfig, hf_config: Any) -> int:
    """Visual tokens of an image without reduction, before the server has a plan.

    Args:
        config: settings of the server.
        hf_config: transformers' configuration of the model.
    """
    shape = tower_shape(hf_config)
    return shape.num_units if shape.tiling is None else ServerPlan.of(config, hf_config).most


def on_server(
    settings: QualitySettings, config: FicocoConfig, hf_config: Any, min_keep: int = 1
) -> QualitySettings:
    """A target agreement with the ladder that a server serves.

    Args:
        settings: as the operator gave them. A ladder that is not theirs leaves out what the method cannot reach.
        config: settings of the server.
        hf_config: transformers' configuration of the model.
        min_keep: the operator's lower bound on a request's budget.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    most = most_tokens(config, hf_config)
    served = settings.on_model(most, min_keep)
    ladder = served.ladder or ()
    if settings.ladder is not None:
        check_budgets(LADDER, ladder, config, hf_config)
        return served
    check_budgets(OPTION, (most,), config, hf_config)
    plan = ServerPlan.of(config.model_copy(update={"keep": most}), hf_config)

    def reached(budget: int) -> bool:
        try:
            plan.check_budget(budget)
        except ValueError:
            return False
        return True

    return served.model_copy(update={"ladder": tuple(filter(reached, ladder))})


def check_budgets(name: str, budgets: Sequence[int], config: FicocoConfig, hf_config: Any) -> None:
    """Plan every budget once, so that none fails at the first request that gets it.

    Args:
        name: name of the option, for error texts.
        budgets: ascending.
        config: settings of the server.
        hf_config: transformers' configuration of the model.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    if config.kv_budget is not None:
        raise ValueError(
            f"kv_budget = {config.kv_budget} is not allowed with {name}, which says what is left in the "
            "last layers; allowed: keep, or neither"
        )
    # The largest is the easiest to reach, so its plan exists and each other one is checked by name.
    fixed = config.encoder.get("keep")
    most = budgets[-1] if fixed is None else min(budgets[-1], fixed)
    plan = ServerPlan.of(config.model_copy(update={"keep": most}), hf_config)
    for budget in budgets:
        try:
            plan.check_budget(budget)
        except ValueError as error:
            raise ValueError(
                f"{name}: the budget {budget} of {', '.join(map(str, budgets))} cannot be served: {error}"
            ) from error
