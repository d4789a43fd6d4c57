#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A robot's three models, side by side: what it sees, what it plans, how it moves. Each has a deadline.

robot.py PERCEPTION PLANNING CONTROL [SECONDS [SLACK]]      run it with flashd's Python

All three are brought up before the robot moves, pinned in memory, and asked at the addresses of their engines, so that
no request waits for a model to come. Then each is asked at its own rate, for so many seconds. At the end it says how
long they took, and fails if one missed a deadline. SLACK multiplies periods and deadlines, for slower machines.
"""

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import flashd
from flashd.client import openai

CAMERA = ["a red cup on the table", "a red cup on the table", "a hand near the cup"]  # frames, in words


@dataclass
class World:
    """What the loops tell each other."""

    seen: object = None
    changes: int = 0
    plans: int = 0
    plan: str = "wait"


@dataclass
class Loop:
    """Work that is due every `period_s`, and then takes `deadline_s` at most."""

    name: str
    period_s: float
    deadline_s: float
    work: object
    took_s: list = field(default_factory=list)

    def run(self, until):
        due = time.monotonic()
        while due < until:
            time.sleep(max(0, due - time.monotonic()))
            self.work(len(self.took_s))
            self.took_s.append(time.monotonic() - due)  # from when it was due: being late counts
            due += self.period_s

    @property
    def missed(self):
        return sum(took > self.deadline_s for took in self.took_s)

    def report(self):
        median, worst = statistics.median(self.took_s), max(self.took_s)
        times = f"{1000 * median:.0f} ms (median), {1000 * worst:.0f} ms (worst)"
        return f"{self.name}: {len(self.took_s)} times, {times}, {self.missed} after {1000 * self.deadline_s:.0f} ms"


def bring_up(names):
    """Where each model answers, once all of them do. They are pinned, until `flash unpin`."""
    with flashd.connect() as client:
        for name in names:
            outcome = client.serve(name)
            client.pin(name)
            print(f"{name} is there after {outcome.seconds:.2f} s ({outcome.how})")
        return [client.endpoint_of(name) for name in names]


def main(perception, planning, control, seconds=5.0, slack=1.0):
    eye, mind, hand = bring_up([perception, planning, control])
    world = World()

    def perceive(frame):
        seen = openai.embeddings(eye, perception, [CAMERA[frame % len(CAMERA)]])
        world.changes += seen != world.seen
        world.seen = seen

    def think(_):
        if world.plans < world.changes:
            world.plans = world.changes
            ask = [{"role": "user", "content": "What next?"}]
            world.plan = openai.chat(mind, planning, ask, temperature=0, max_tokens=8)

    def move(_):
        openai.chat(hand, control, [{"role": "user", "content": world.plan}], temperature=0, max_tokens=1)

    loops = [
        Loop("perception", 0.2 * slack, 0.2 * slack, perceive),
        Loop("planning", 1.0 * slack, 1.0 * slack, think),
        Loop("control", 0.1 * slack, 0.1 * slack, move),
    ]
    perceive(0)  # it looks before it moves
    until = time.monotonic() + seconds
    with ThreadPoolExecutor(len(loops)) as threads:
        for ended in [threads.submit(loop.run, until) for loop in loops]:
            ended.result()  # raises what went wrong in it
    print(*(loop.report() for loop in loops), f"the scene changed {world.changes} times", sep="\n")
    sys.exit(any(loop.missed for loop in loops))


if __name__ == "__main__":
    if not 4 <= len(sys.argv) <= 6:
        sys.exit(__doc__)
    main(*sys.argv[1:4], *map(float, sys.argv[4:]))
