"""Token allowance of second answers: a share of the tokens of first answers, and a limit per minute."""

from dataclasses import dataclass

from ficoco_vllm.quality.settings import QualitySettings

# Answers of the full model for which tokens are set aside, to look closely when the answers get worse.
NUM_RESERVED = 24
# Times as many requests are chosen while there is a suspicion.
BOOST = 10


@dataclass
class Allowance:
    """Tokens that may be spent, in one process.

    Attributes:
        settings: share and bounds.
        now_seconds: time of the last call on a monotonic clock.
        earned: tokens at hand.
        reserved: further tokens, spent only during a suspicion.
        in_minute: tokens that the bound for a minute leaves.
        is_ready: whether the reserve has been full: nothing is tried before it can be watched closely.
    """

    settings: QualitySettings
    now_seconds: float
    earned: float = 0.0
    reserved: float = 0.0
    in_minute: float = 0.0
    is_ready: bool = False

    def __post_init__(self) -> None:
        self.in_minute = float(self.settings.max_tokens_per_minute)

    def earn(self, num_tokens: int) -> None:
        """Count the tokens of a first answer, prompt and output."""
        more = self.settings.max_extra * num_tokens
        assert self.settings.ladder is not None
        missing = NUM_RESERVED * self.settings.ladder[-1] - self.reserved
        kept = min(more / 2 if self.is_ready else more, missing)
        self.reserved += kept
        self.is_ready = self.is_ready or kept == missing
        self.earned = min(self.earned + more - kept, float(self.settings.max_tokens_per_minute))

    def share(self, now_seconds: float, *, suspects: bool) -> float:
        """Share of the requests that may be chosen now.

        Args:
            now_seconds: time on the clock of the last call.
            suspects: whether the answers seem to have become worse.
        """
        self._pass(now_seconds)
        at_hand = self.earned + (self.reserved if suspects else 0.0)
        if not self.is_ready or at_hand <= 0 or self.in_minute <= 0:
            return 0.0
        return min(1.0, self.settings.share * (BOOST if suspects else 1))

    def spend(self, num_tokens: int, *, suspects: bool) -> None:
        """Count the tokens of a comparison. Its cost is known only afterwards, so the allowance may become negative.

        Args:
            num_tokens: number of tokens of prompts and outputs.
            suspects: as when the request was chosen.
        """
        self.in_minute -= num_tokens
        self.earned -= num_tokens
        if suspects and self.earned < 0:
            from_reserve = min(self.reserved, -self.earned)
            self.reserved -= from_reserve
            self.earned += from_reserve

    def _pass(self, now_seconds: float) -> None:
        per_minute = self.settings.max_tokens_per_minute
        gained = max(0.0, now_seconds - self.now_seconds) * per_minute / 60
        self.in_minute = min(float(per_minute), self.in_minute + gained)
        self.now_seconds = now_seconds
