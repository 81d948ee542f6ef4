"""What is told of a server while it runs: numbers for Prometheus, and a line of JSON on standard error a request.

Neither holds a prompt, an answer or a key. Left out: who may read them.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

QUIET = ("/health", "/metrics")
"""routes that are asked for all the time, and only logged when something is wrong"""
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass
class Seen:
    """One request."""

    id: str
    route: str
    key: str = "-"
    model: str = "-"
    status: int = 0
    n_prompt: int = 0
    n_written: int = 0
    n_choices: int = 0
    steering: str | None = None
    """sha256 of what steered it; none: nothing"""
    first_s: float | None = None
    """seconds to the first token"""
    total_s: float = 0.0
    why: str | None = None
    """of what was refused, failed or given up"""


class Watch:
    """Counts and logs."""

    def __init__(self, n_running: Callable[[], int], log: Callable[[str], Any] | None = None):
        """Args: log: told each line; none: standard error is."""
        self._log = log
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("saekit_requests", "Requests", ["route", "status"], registry=registry)
        self._tokens = Counter("saekit_tokens", "Tokens", ["kind"], registry=registry)
        self._steered = Counter("saekit_steered_requests", "Requests that were steered", registry=registry)
        self._cancelled = Counter("saekit_cancelled_requests", "Requests given up", ["why"], registry=registry)
        self._first = Histogram("saekit_first_token_seconds", "To the first token", buckets=SECONDS, registry=registry)
        self._total = Histogram("saekit_request_seconds", "To the end", ["route"], buckets=SECONDS, registry=registry)
        Gauge("saekit_answers", "Answers that run or wait", registry=registry).set_function(n_running)

    def end(self, seen: Seen) -> None:
        """Of a request that has ended, however."""
        self._requests.labels(seen.route, str(seen.status)).inc()
        self._total.labels(seen.route).observe(seen.total_s)
        self._tokens.labels("prompt").inc(seen.n_prompt)
        self._tokens.labels("written").inc(seen.n_written)
        if seen.steering is not None:
            self._steered.inc()
        if seen.first_s is not None:
            self._first.observe(seen.first_s)
        if seen.why in ("gone", "timeout"):
            self._cancelled.labels(seen.why).inc()
        if seen.route in QUIET and seen.status == 200:
            return
        told = {key: round(each, 4) if isinstance(each, float) else each for key, each in vars(seen).items()}
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **told}
        (self._log or sys.stderr.write)(json.dumps(line) + "\n")

    def text(self) -> bytes:
        """All numbers, as Prometheus reads them."""
        return generate_latest(self.registry)
