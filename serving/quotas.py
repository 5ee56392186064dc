"""What an owner may use: how many sessions and bytes, how many tokens a minute, how long a prompt."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

from .refusals import QuotaExceeded


MINUTE = 60.0


@dataclass(frozen=True)
class Limits:
    """
    `None` is no limit.

    Attributes:
        sessions: at a time.
        bytes: of the files of all sessions; a turn that begins below it is kept, whatever it comes to.
        tokens_per_minute: read and said; as many may be used at once after a minute's rest.
        prompt_tokens: in one request.
    """

    sessions: int | None = None
    bytes: int | None = None
    tokens_per_minute: int | None = None
    prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"`{name}` must be a whole number of at least 1, or None for no limit, got {value!r}.")

    def to_json(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value is not None})

    @classmethod
    def from_json(cls, text: str) -> Limits:
        return cls(**json.loads(text))

    def over(self, defaults: Limits) -> Limits:
        """These where they are set, else the defaults."""
        merged = {}
        for field in fields(self):
            own = getattr(self, field.name)
            merged[field.name] = getattr(defaults, field.name) if own is None else own
        return Limits(**merged)


NO_LIMITS = Limits()


class Charge:
    """Tokens that a request may use, taken from its owner's minute before it runs. Settled once, by whichever thread."""

    def __init__(self, settle: Callable[[int], None], tokens: int):
        self._settle, self.tokens = settle, tokens

    def settle(self, used: int) -> None:
        """It has used so many; what is left is given back."""
        tokens, self.tokens = self.tokens, 0
        if tokens:
            self._settle(used - tokens)


class Quotas:
    """
    Watches what the owners use in this process, from any thread. Sessions and bytes are the store's to count.

    The tokens of a minute are a bucket that fills evenly: what a request may use at most is taken before it runs, and
    what it has not used is given back when it ends. One that may use more than a whole minute's is let in when the
    bucket is full, and paid for by those after it. Each process of several has buckets of its own.

    Args:
        limits: of an owner, looked up for each request.
        clock: seconds, that never go back.
    """

    def __init__(self, limits: Callable[[str], Limits], clock: Callable[[], float] = time.monotonic):
        self.limits, self._clock = limits, clock
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # by owner: tokens used up, and when that was so

    def admit(self, owner: str, prompt_tokens: int, new_tokens: int) -> Charge:
        """
        Let a request in that reads `prompt_tokens` and says at most `new_tokens`.

        Raises:
            QuotaExceeded: the prompt is too long, or the minute's tokens are used up; `retry_after` says until when.
        """
        limits = self.limits(owner)
        if limits.prompt_tokens is not None and prompt_tokens > limits.prompt_tokens:
            raise QuotaExceeded(
                "prompt_tokens",
                f"The prompt has {prompt_tokens:,} tokens, and {limits.prompt_tokens:,} are allowed: send it in parts.",
            )
        rate = limits.tokens_per_minute
        if rate is None:
            return Charge(lambda change: None, 0)
        wanted = prompt_tokens + new_tokens
        with self._lock:
            used = self._used(owner, rate)
            excess = used + min(wanted, rate) - rate
            if excess > 0:
                seconds = excess * MINUTE / rate
                raise QuotaExceeded(
                    "tokens_per_minute",
                    f"The request may use {wanted:,} tokens, {max(int(rate - used), 0):,} are left of the {rate:,} a minute: "
                    f"try again in {seconds:.0f} s, or ask for fewer new tokens.",
                    seconds,
                )
            self._buckets[owner] = used + wanted, self._clock()
        return Charge(lambda change: self._add(owner, rate, change), wanted)

    def _used(self, owner: str, rate: int) -> float:
        used, since = self._buckets.get(owner, (0.0, 0.0))
        return max(used - (self._clock() - since) * rate / MINUTE, 0.0)

    def _add(self, owner: str, rate: int, change: int) -> None:
        with self._lock:
            self._buckets[owner] = max(self._used(owner, rate) + change, 0.0), self._clock()
