"""Which of several processes keeps the others waiting, from what each last said of itself.

1. Each tells, now and then, how many points of the program it has passed, all of them in one order, how many signs of
work it gave since, and what it does. 2. `Stalls` adds up the time in which none of them passed a point or gave a sign:
all wait for the slowest, so that time is nobody's but that one's. 3. Once it is as long as allowed, the one that hangs
is the one that says nothing any more, or else the one that passed the fewest points, or gave fewer signs since.

Time is counted in steps of a beat at most, so that a watcher that was itself stopped does not blame the others.
Left out: how they tell each other (`sae.hosts`).
"""

from typing import NamedTuple

BEATS = 10
"""times that each tells in the time that a stall may take"""
SILENT = 0.5
"""share of that time without a word that means that a process is frozen, and not only stuck"""


class Report(NamedTuple):
    """Where a process is."""

    passed: int
    """points of the program, which all pass in one order"""
    signs: int
    """of work since then: a long evaluation gives some"""
    doing: str


class Stalls:
    """What is known of some processes."""

    def __init__(self, processes: list[int], patience_s: float):
        """Nothing yet.

        Args:
          processes: their numbers.
          patience_s: seconds in which one of them at least has to get on.
        """
        self._patience_s, self.beat_s = patience_s, patience_s / BEATS
        self._reports = dict.fromkeys(processes, Report(0, 0, "its start"))
        self._silent_s = dict.fromkeys(processes, 0.0)
        self._still_s = 0.0

    def heard(self, process: int, report: Report) -> None:
        """Told where a process is."""
        if report != self._reports[process]:
            self._still_s = 0.0
        self._reports[process], self._silent_s[process] = report, 0.0

    def gone(self, process: int) -> None:
        """Told that a process is through and will say no more."""
        self._reports.pop(process, None)
        self._silent_s.pop(process, None)

    def wait(self, seconds: float) -> str:
        """Let time go by; returns which process hangs, or nothing.

        >>> stalls = Stalls([0, 1], patience_s=5.0)
        >>> for _ in range(10):
        ...     stalls.heard(0, Report(12, 0, "step 13"))
        ...     stalls.heard(1, Report(10, 0, "batch 12"))
        ...     found = stalls.wait(0.5)
        >>> found
        'process 1 hangs: no progress for 5 s at batch 12'
        """
        seconds = min(seconds, self.beat_s)
        self._still_s += seconds
        for process in self._silent_s:
            self._silent_s[process] += seconds
        return self._who() if self._still_s >= self._patience_s else ""

    def _who(self) -> str:
        silent = [process for process, s in self._silent_s.items() if s >= SILENT * self._patience_s]
        passed = {process: (report.passed, report.signs) for process, report in self._reports.items()}
        behind = [process for process, n in passed.items() if n == min(passed.values())]
        stuck = silent or behind
        if not silent and len(behind) == len(passed) > 1:
            doing = self._reports[behind[0]].doing
            return f"no process gets on: no progress for {self._patience_s:g} s, all at {doing}"
        how = "no word" if silent else "no progress"
        which = f"process {stuck[0]} hangs" if len(stuck) == 1 else f"processes {', '.join(map(str, stuck))} hang"
        return f"{which}: {how} for {self._patience_s:g} s at {self._reports[stuck[0]].doing}"
