# SPDX-License-Identifier: Apache-2.0
"""Commands that swap to models and ask them."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

from flashd.cli import output
from flashd.cli.parameters import Argument, Context, Option
from flashd.cli.session import ModelName, session
from flashd.errors import FlashdError, InvalidArgument, NotFound
from flashd.legible import legible
from flashd.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from flashd.client import openai
    from flashd.client.client import Client
    from flashd.client.results import SwapOutcome

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?::[\w.-]+)?", re.ASCII)


MaxTokens = Annotated[int | None, Option(min=1, help="Most tokens to generate.")]
Temperature = Annotated[float | None, Option(min=0, help="Sampling temperature; 0 always takes the likeliest token.")]
EngineKind = Annotated[
    str, Option("--engine", help="Kind of engine: torch, vllm, llama.cpp. Default: engines.default.")
]
Adapter = Annotated[str, Option(help="LoRA adapter for vLLM to apply; one of engines.vllm.adapters.")]
Seed = Annotated[int | None, Option(help="Seed of the random numbers, for repeatable answers.")]
System = Annotated[str | None, Option(help="System message.")]


def run(
    context: Context,
    model: ModelName,
    prompt: Annotated[list[str] | None, Argument(help="Prompt; - reads it from standard input.")] = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    raw: Annotated[bool, Option(help="Continue the text, without the chat template.")] = False,
    engine: EngineKind = "",
    adapter: Adapter = "",
) -> None:
    """Swaps to a model and asks it. Without a prompt, starts a chat."""
    from flashd.client import openai

    client = session(context).client
    if not adapter and (base := _base_of(client, model)):
        model, adapter = base, model
    swapped = _swapped(client, model, engine or ("vllm" if adapter else ""))
    asked = adapter or swapped.model
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    parameters = {name: value for name, value in given.items() if value is not None}
    question = _question(prompt)
    opening = [{"role": "system", "content": system}] if system else []
    if question is None:
        _chat(client.endpoint(), asked, opening, parameters)
    elif raw:
        _print_stream(openai.stream_completion(client.endpoint(), asked, question, **parameters))
    else:
        messages = [*opening, {"role": "user", "content": question}]
        _print_stream(openai.stream_chat(client.endpoint(), asked, messages, **parameters))


def swap(context: Context, model: ModelName, engine: EngineKind = "") -> None:
    """Makes a model the active one. The previous model answers until the new one can."""
    outcome = _swapped(session(context).client, model, engine)
    if outcome.how == "already-active":
        output.say(f"{outcome.model} is already active")
    else:
        took = format_seconds(outcome.seconds)
        output.say(f"{outcome.model} is active: {took} ({outcome.how}, weights from {outcome.from_tier})")


def serve(context: Context, model: ModelName, engine: EngineKind = "") -> None:
    """Starts to serve a model beside the active one, which stays active.

    Models that fit into memory together serve together. Where they do not, idle ones make way.
    """
    client = session(context).client
    result = output.wait(lambda: client.begin_serve(model, engine=engine), f"starting to serve {model}")
    from flashd.client.results import SwapOutcome

    outcome = SwapOutcome.from_result(result)
    output.say(f"{outcome.model} answers at {outcome.endpoint}")


def park(
    context: Context,
    model: Annotated[str, Argument(help="Model that serves. Default: the active one.")] = "",
) -> None:
    """Parks the engine of a model: it gives up its weights and keeps its process."""
    session(context).client.park(model)


def load(
    context: Context,
    model: ModelName,
    tier: Annotated[str, Option(help="host, or device for the memory of a GPU.")] = "host",
    device: Annotated[str, Option(help="GPU to load to, if there are several, such as cuda:1.")] = "",
) -> None:
    """Brings a model into memory, so that a swap to it is fast."""
    with output.job_progress(f"loading {model}") as progress:
        result = session(context).client.load(model, tier, progress, device=device)
    rate = result["size_bytes"] / max(result["seconds"], 1e-9) / 1e9
    took = format_seconds(result["seconds"])
    output.say(
        f"{model} is in the {result['residency']} tier: {format_bytes(result['size_bytes'])}, {took}, {rate:.2f} GB/s"
    )


def evict(context: Context, model: ModelName) -> None:
    """Evicts a model from memory; it stays in the store."""
    session(context).client.evict(model)


def _base_of(client: Client, name: str) -> str:
    """The model to which vLLM applies the adapter of this name; empty if there is a model of the name, or neither."""
    try:
        client.model(name)
    except NotFound:
        return next((model.name for model in client.models() if name in model.adapters), "")
    return ""


def _swapped(client: Client, model: str, engine: str) -> SwapOutcome:
    """Swaps to a model, which is pulled from the hub first if it is missing and the user agrees."""
    try:
        client.model(model)
    except NotFound as error:
        if not _HUB_NAME.fullmatch(model):
            raise
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise NotFound(error.message, hint=f"download it from the Hugging Face Hub: flash pull {model}") from None
        output.confirm(f"{model} is not here. Download it from the Hugging Face Hub?", on_stderr=True)
        from flashd.cli.models import pulled

        pulled(client, model)
    from flashd.client.results import SwapOutcome

    result = output.wait(lambda: client.begin_swap(model, engine=engine), f"swapping to {model}")
    return SwapOutcome.from_result(result)


def _question(prompt: list[str] | None) -> str | None:
    """Returns the prompt; None for a chat."""
    if prompt and prompt != ["-"]:
        return " ".join(prompt)
    if prompt == ["-"] or not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise InvalidArgument("standard input is empty", hint='flash run MODEL "a question"')
        return question
    return None


def _print_stream(pieces: Iterator[str]) -> str:
    """Prints an answer as it arrives and returns all of it. Ctrl-C ends the answer, not the program."""
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            print(_shown(piece), end="", flush=True)
    finally:
        print(flush=True)
    return answer


def _shown(piece: str) -> str:
    """Makes a piece of an answer safe for a terminal; in a pipe, returns it unchanged."""
    if not sys.stdout.isatty():
        return piece
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in {"Cc", "Cf"} else legible(c) for c in piece)


def _chat(endpoint: openai.Endpoint, model: str, opening: list[dict[str, str]], parameters: dict[str, Any]) -> None:
    from flashd.client import openai

    output.say("", label=f"{model}. An empty line or Ctrl-D ends the chat, /new starts over.", style="dim")
    messages = list(opening)
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question:
            return
        if question == "/new":
            messages = list(opening)
            continue
        messages.append({"role": "user", "content": question})
        try:
            answer = _print_stream(openai.stream_chat(endpoint, model, messages, **parameters))
            messages.append({"role": "assistant", "content": answer})
        except KeyboardInterrupt:
            messages.pop()
        except FlashdError as error:  # a swap to another model by another program ends the answer, not the chat
            messages.pop()
            output.show_error(error)
