"""How fast this engine is, learned from its own steps: seeds of routing costs and of the load gate."""

from __future__ import annotations

#: Weight of the newest observation: half of an old belief is gone after 7 steps.
_WEIGHT = 0.1

#: Prefills of fewer tokens are bound by reading the weights and say nothing about the rate of long ones.
_MIN_PREFILL_TOKENS = 64


class Rates:
    """Exponentially weighted means; 0 until the first observation."""

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        self.decode_step_s = 0.0

    def observe(self, *, prefill_tokens: int, decodes: int, seconds: float) -> None:
        """One step: what it computed and how long it took. A mixed step's decode share is taken as known."""
        if not prefill_tokens:
            self.decode_step_s = _mean(self.decode_step_s, seconds)
        elif prefill_tokens >= _MIN_PREFILL_TOKENS and seconds > 0:
            decode_s = min(self.decode_step_s, seconds / 2) if decodes else 0.0
            self.prefill_tokens_per_s = _mean(
                self.prefill_tokens_per_s, prefill_tokens / (seconds - decode_s)
            )

    def prefill_s(self, tokens: int) -> float:
        """Predicted seconds to compute `tokens` prompt tokens; infinite while nothing is known."""
        return tokens / self.prefill_tokens_per_s if self.prefill_tokens_per_s else float("inf")

    def step_s(self, prefill_tokens: int, decodes: int) -> float:
        """Predicted seconds of a step."""
        prefill_s = self.prefill_s(prefill_tokens) if prefill_tokens else 0.0
        return prefill_s + (self.decode_step_s if decodes else 0.0)

    @property
    def step_tokens(self) -> float:
        """Tokens that could be prefilled in what a step costs whatever it does: reading the weights."""
        return self.decode_step_s * self.prefill_tokens_per_s


def _mean(old: float, new: float) -> float:
    return new if not old else old + _WEIGHT * (new - old)
