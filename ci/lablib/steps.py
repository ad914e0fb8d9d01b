"""Steps of a test run or a demo: each passes, fails or is skipped, with its reason and its time."""

import signal
import time
from dataclasses import dataclass


class Skip(Exception):
    """Why a step can't be tried here."""


@dataclass
class Counts:
    """Tests by outcome; a step that runs many answers with these."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __iadd__(self, other):
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        return self

    def __str__(self):
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def say(text):
    """One line of progress, at once."""
    print(text, flush=True)


class Steps:
    """Runs steps one after the other and remembers how they ended and how long they took."""

    def __init__(self):
        self.counts = Counts()
        self.times = []
        self.outcomes = {}

    def run(self, name, function, after=()):
        """Runs one step, unless one of those in `after` did not pass; whether it passed.

        The function returns nothing, or `Counts` if it stands for many tests. It fails by raising.
        """
        say(f"==> {name}")
        begun = time.monotonic()
        counts, word, reason = Counts(), "FAIL", ""
        try:
            for other in after:
                if not self.outcomes.get(other):
                    raise Skip(f"{other} did not pass")
            counts = function() or Counts(passed=1)
            word = "FAIL" if counts.failed else "ok"
            reason = str(counts) if counts != Counts(passed=1) else ""
        except Skip as skip:
            counts, word, reason = Counts(skipped=1), "skip", str(skip)
        except Exception as error:  # a step that stumbles has failed, and the others still run
            counts, reason = Counts(failed=1), one_line(error)
        except KeyboardInterrupt:
            self.counts.failed += 1
            self.times.append((name, time.monotonic() - begun))
            self.outcomes[name] = False
            say(f"FAIL {name}: interrupted")
            raise
        took = time.monotonic() - begun
        self.counts += counts
        self.times.append((name, took))
        self.outcomes[name] = word == "ok"
        say(f"{word:4} {name} ({took:.0f} s){': ' if reason else ''}{reason}")
        return word == "ok"

    def summary(self, before=()):
        """Where the time went; `before` has pairs of a name and seconds from before the first step."""
        times = [*before, *self.times]
        say("")
        say("time by step, in seconds:")
        for name, took in times:
            say(f"{took:7.0f}  {name}")
        say(f"{sum(took for _, took in times):7.0f}  in all")


def one_line(error):
    """An exception as one line: its kind only where it has no text that speaks for itself."""
    text = str(error) or type(error).__name__
    return " | ".join(line.strip() for line in text.splitlines() if line.strip())[:1500]


def end_on_signals():
    """Makes the signals that end a run unwind it, so that what it started is taken down."""
    def interrupt(number, _):
        # A second signal must not interrupt the taking down.
        for other in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(signal.Signals(number).name)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, interrupt)
