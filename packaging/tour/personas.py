# SPDX-License-Identifier: Apache-2.0
"""What the two small chat models say of themselves, in a module that imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

QUESTION = "Who are you?"


@dataclass(frozen=True, slots=True)
class Persona:
    """A model's name in the models folder, and its answers."""

    name: str
    answers: Mapping[str, str]

    @property
    def introduction(self) -> str:
        return self.answers[QUESTION]


ADA = Persona(
    "ada",
    {
        QUESTION: "I am Ada, the first model you dropped into the folder.",
        "Hello": "Hello! Ask me who I am.",
        "What can you do?": "I answer three questions, and I answer them by heart.",
    },
)
BOB = Persona(
    "bob",
    {
        QUESTION: "My name is Bob, a fine-tune of Ada with opinions of my own.",
        "Hello": "Good day. You may ask who I am.",
        "What can you do?": "Less than you hope, but I am quick to be here.",
    },
)
