# SPDX-License-Identifier: Apache-2.0
"""The common part of all campaigns: command line, seed, time limit, counts and the last line.

A campaign is a script beside this file:

    from campaign import Campaign, main

    def run(campaign: Campaign) -> None:  # or a coroutine function
        while campaign.goes_on():
            case = campaign.random.choice(CASES)
            campaign.count("executions")
            if (wrong := tried(case)):
                campaign.finding(f"{case}: {wrong}")

    if __name__ == "__main__":
        main(run, whole_s=600)

Its exit status is 1 if it found something. The last line it prints is JSON: the campaign, its seed, how long it took,
what it counted, and how many findings there were. The same seed makes the same choices.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import inspect
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))  # waiting.py, processes.py: what tests share serves campaigns too
sys.path.insert(0, str(ROOT / "tests" / "bus"))  # running.py: a daemon
sys.path.insert(0, str(ROOT / "packaging" / "tour"))  # small_models.py

from flashd.bench.report import Row, report  # noqa: E402

RESULTS = ROOT / "tests" / "bench" / "results"
ENOUGH = 20  # findings after which a campaign ends: more of them say nothing new


@dataclass(slots=True)
class Campaign:
    """One run: `random` is the only source of chance, and `goes_on` says when the time is over."""

    name: str
    seed: int
    seconds: float | None
    random: random.Random
    options: argparse.Namespace = field(default_factory=argparse.Namespace)  # options of this campaign only
    counts: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    variant: str = ""  # a result of each is kept
    told: str = ""  # further options, as on the command line

    def goes_on(self) -> bool:
        """Whether there is time for one more; always, without a limit, until there are findings enough."""
        return len(self.findings) < ENOUGH and (self.seconds is None or self.took_s() < self.seconds)

    def took_s(self) -> float:
        return time.monotonic() - self.began

    def count(self, what: str, number: int = 1) -> None:
        """Counts executions, faults, swaps, answers: what stands in the last line."""
        self.counts[what] += number

    def finding(self, words: str) -> None:
        """Something that flashd did wrong. `words` say what it was given and what it did."""
        self.findings.append(words)
        print(f"finding {len(self.findings)} (seed {self.seed}): {words}", file=sys.stderr, flush=True)

    def last_line(self) -> str:
        told = {"campaign": self.name, "seed": self.seed, "seconds": round(self.took_s(), 1), **self.counts}
        return json.dumps({**told, "findings": len(self.findings)})

    def keep(self) -> Path:
        """Writes the result beside those of the benchmarks."""
        counted = {**self.counts, "findings": len(self.findings)}
        rows = [Row(what, value, "", None, None, (value,)) for what, value in counted.items()]
        limit = "" if self.seconds is None else f" --seconds {self.seconds:g}"
        command = f"tests/campaigns/{self.name}.py{self.told} --seed {self.seed}{limit}"
        made = report(f"{self.name}-{self.variant}" if self.variant else self.name, command, rows)
        path = RESULTS / f"{made.date[:10]}-campaign-{made.benchmark}.json"
        kept = {**dataclasses.asdict(made), "seed": self.seed, "seconds": round(self.took_s(), 1)}
        path.write_text(json.dumps(kept, indent=2) + "\n")
        return path


def main(
    run: Callable[[Campaign], Coroutine[Any, Any, None] | None],
    *,
    whole_s: float | None = None,
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Runs a campaign as its command line says. `whole_s` is how long all of it takes; None if it ends by itself.
    `arguments` adds what only this campaign takes."""
    name = Path(sys.argv[0]).stem
    words = inspect.getdoc(sys.modules["__main__"]) or name
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="repeats the run that printed it; without it a new one is taken")
    parser.add_argument("--seconds", type=float, default=whole_s, help="ends about then; without it all is tried")
    parser.add_argument("--keep", action="store_true", help=f"writes the result below {RESULTS.relative_to(ROOT)}")
    arguments(parser)
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    campaign = Campaign(name, seed, given.seconds, random.Random(seed), given)
    limit = "all of it" if given.seconds is None else f"{given.seconds:g} s"
    print(f"{name}: seed {seed}, {limit}", file=sys.stderr, flush=True)
    ran = run(campaign)
    if ran is not None:
        asyncio.run(ran)
    if given.keep:
        campaign.keep()
    print(campaign.last_line(), flush=True)
    sys.exit(1 if campaign.findings else 0)
