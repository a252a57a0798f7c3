"""Metrics of the comparisons in one process: counters of all processes add up, gauges are the same in each."""

from ficoco_vllm.metrics.families import metrics
from ficoco_vllm.quality.evidence import interval
from ficoco_vllm.server.quality.budget import QualityBudget


class Figures:
    """Reports for one server."""

    def __init__(self, model_name: str, engine: str, budget: QualityBudget) -> None:
        """Report the target.

        Args:
            model_name: as served.
            engine: index of the engine, as in the other metrics.
            budget: whose states are shown.
        """
        self._labels = (model_name, engine, budget.method)
        self._budget = budget
        self._metrics = metrics()
        self._metrics.quality_target.labels(*self._labels).set(budget.settings.target_agreement)

    def score(self, keep: int, traffic: str, score: float) -> None:
        """Count one comparison.

        Args:
            keep: visual tokens of an image.
            traffic: class.
            score: 0 to 1.
        """
        labels = (*self._labels, str(keep), traffic)
        self._metrics.quality_comparisons.labels(*labels).inc()
        self._metrics.quality_score.labels(*labels).inc(score)

    def spend(self, num_tokens: int) -> None:
        """Count the tokens of a second answer."""
        self._metrics.quality_tokens.labels(*self._labels).inc(num_tokens)

    def skip(self, reason: str) -> None:
        """Count a request that was chosen and not compared."""
        self._metrics.quality_skipped.labels(*self._labels, reason).inc()

    def show(self) -> None:
        """Report the states."""
        budget = self._budget
        for traffic in {"", *budget.states}:
            state, labels = budget.state(traffic), (*self._labels, traffic)
            tally = state.rungs[state.served].tally
            low, high = interval(tally, budget.settings.confidence)
            for gauge, value in (
                (self._metrics.quality_budget_tokens, budget.budgets[state.served]),
                (self._metrics.quality_falls, state.num_falls),
                (self._metrics.quality_trial_comparisons, tally.count),
                (self._metrics.quality_agreement_low, low),
                (self._metrics.quality_agreement_high, high),
            ):
                gauge.labels(*labels).set(value)
