#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""An agent that gives easy questions to a small model and hard ones to a large model, at one address.

route_by_difficulty.py SMALL LARGE < QUESTIONS      needs: pip install openai

Whether a question is easy is decided by the small model's embeddings, which torch engines make of any model: is it
nearer to the easy examples below, or to the hard ones? Put some of your own there. Answers come as they grow; at the
end it says how long they took. FLASHD_URL is the address of flashd-gateway, if it is not http://127.0.0.1:8434.
"""

import os
import statistics
import sys
import time
from collections import defaultdict

import openai

EASY = ["Who are you?", "Hello", "What is the capital of France?", "Translate 'good morning' to Italian."]
HARD = [
    "Prove that there are infinitely many primes.",
    "Plan the migration of a database without downtime.",
    "Why does this program deadlock, and how would you mend it?",
]

client = openai.OpenAI(base_url=os.environ.get("FLASHD_URL", "http://127.0.0.1:8434") + "/v1", api_key="none")


def embedded(model, texts):
    return [each.embedding for each in client.embeddings.create(model=model, input=texts).data]


def likeness(one, other):
    """The cosine of the angle between two vectors."""

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    return dot(one, other) / (dot(one, one) * dot(other, other)) ** 0.5


class Router:
    def __init__(self, small, large):
        self.small, self.large = small, large
        vectors = embedded(small, EASY + HARD)
        self.examples = [(vector, small if i < len(EASY) else large) for i, vector in enumerate(vectors)]

    def model_for(self, question):
        (vector,) = embedded(self.small, [question])
        return max((likeness(vector, example), model) for example, model in self.examples)[1]

    def ask(self, question):
        """Yields the model's name, then its answer piece by piece."""
        model = self.model_for(question)
        yield model
        messages = [{"role": "user", "content": question}]
        options = {"temperature": 0, "max_tokens": 200, "stream": True}
        for chunk in client.chat.completions.create(model=model, messages=messages, **options):
            yield from (choice.delta.content for choice in chunk.choices if choice.delta.content)


def main(small, large):
    router = Router(small, large)
    first_s = defaultdict(list)
    for question in filter(None, map(str.strip, sys.stdin)):
        asked, pieces = time.monotonic(), router.ask(question)
        model, piece = next(pieces), next(pieces, "")
        first_s[model].append(time.monotonic() - asked)
        print(f"{question}\n{model}: {piece}", *pieces, sep="", end="\n\n", flush=True)
    for model, seconds in first_s.items():
        print(f"{model}: {len(seconds)} answers, first words after {statistics.median(seconds):.3f} s (median)")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
