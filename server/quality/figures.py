"""Prometheus metrics of the comparisons."""

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

from ficoco_vllm.quality.evidence import interval
from ficoco_vllm.server.quality.budget import QualityBudget

_LABELS = ("model_name", "engine", "method")


class Figures:
    """The metric families of one process. Counters of all processes add up; gauges are the same in each."""

    def __init__(
        self, model_name: str, engine: str, budget: QualityBudget, registry: CollectorRegistry = REGISTRY
    ) -> None:
        """Report for one server.

        Args:
            model_name: as served.
            engine: index of the engine, as in the other metrics.
            budget: whose states are shown.
            registry: of the families.
        """

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"ficoco:quality_{name}", text, (*_LABELS, *more), registry=registry)

        def gauge(name: str, text: str, *more: str) -> Gauge:
            return Gauge(
                f"ficoco:quality_{name}",
                text,
                (*_LABELS, *more),
                registry=registry,
                multiprocess_mode="mostrecent",
            )

        self._labels = (model_name, engine, budget.method)
        self._budget = budget
        self._compared = counter(
            "comparisons",
            "Answers at a budget that were compared with the full model's.",
            "keep",
            "traffic",
        )
        self._score = counter(
            "score",
            "Sum of their scores: 1 for the same text, for sampled answers the mean probability at which the full "
            "model would have accepted a token.",
            "keep",
            "traffic",
        )
        self._tokens = counter("tokens", "Tokens of second answers, prompts and outputs.")
        self._skipped = counter(
            "skipped", "Requests that were chosen and not compared: no room, failed.", "reason"
        )
        self._falls = gauge("falls", "Times that the budget went back to the top of the ladder.", "traffic")
        self._served = gauge(
            "budget_tokens", "Visual tokens of an image that requests without a budget keep now.", "traffic"
        )
        self._low = gauge(
            "agreement_low",
            "Lower bound of the agreement at the budget served now, in the present trial.",
            "traffic",
        )
        self._high = gauge("agreement_high", "Upper bound of the same.", "traffic")
        self._count = gauge("trial_comparisons", "Comparisons of the same.", "traffic")
        gauge("target", "Target agreement.").labels(*self._labels).set(budget.settings.target_agreement)

    def score(self, keep: int, traffic: str, score: float) -> None:
        """Count one comparison.

        Args:
            keep: visual tokens of an image.
            traffic: class.
            score: 0 to 1.
        """
        labels = (*self._labels, str(keep), traffic)
        self._compared.labels(*labels).inc()
        self._score.labels(*labels).inc(score)

    def spend(self, num_tokens: int) -> None:
        """Count the tokens of a second answer."""
        self._tokens.labels(*self._labels).inc(num_tokens)

    def skip(self, reason: str) -> None:
        """Count a request that was chosen and not compared."""
        self._skipped.labels(*self._labels, reason).inc()

    def show(self) -> None:
        """Report the states."""
        budget = self._budget
        for traffic in {"", *budget.states}:
            state, labels = budget.state(traffic), (*self._labels, traffic)
            tally = state.rungs[state.served].tally
            low, high = interval(tally, budget.settings.confidence)
            self._served.labels(*labels).set(budget.budgets[state.served])
            self._falls.labels(*labels).set(state.num_falls)
            self._count.labels(*labels).set(tally.count)
            self._low.labels(*labels).set(low)
            self._high.labels(*labels).set(high)
