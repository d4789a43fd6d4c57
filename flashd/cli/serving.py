# SPDX-License-Identifier: Apache-2.0
"""Commands about answers: swapping to models and talking to them."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from flashd import inference
from flashd.cli import output
from flashd.cli.models import pulled
from flashd.cli.session import ModelName, session
from flashd.client import Client, SwapOutcome
from flashd.errors import FlashdError, InvalidArgument, NotFound
from flashd.units import format_bytes, format_seconds

PANEL = "Answers"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def register(app: typer.Typer) -> None:
    for command in (run, swap, park, load, evict):
        app.command(rich_help_panel=PANEL)(command)


MaxTokens = Annotated[int | None, typer.Option(min=1, help="The most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(min=0, help="0 takes the likeliest token every time.")]
EngineKind = Annotated[str, typer.Option("--engine", help="torch or vllm. Default: engines.default.")]
Adapter = Annotated[str, typer.Option(help="Applied to it by vLLM; one of engines.vllm.adapters.")]
Seed = Annotated[int | None, typer.Option(help="For the same dice again.")]
System = Annotated[str | None, typer.Option(help="A system message.")]


def run(
    context: typer.Context,
    model: ModelName,
    prompt: Annotated[list[str] | None, typer.Argument(help="What to ask; - reads it from standard input.")] = None,
    system: System = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = None,
    raw: Annotated[bool, typer.Option(help="Continue the text, without the chat template.")] = False,
    engine: EngineKind = "",
    adapter: Adapter = "",
) -> None:
    """Swaps to a model and asks it. Without a prompt, a chat."""
    client = session(context).client
    swapped = _swapped(client, model, engine or ("vllm" if adapter else ""))
    asked = adapter or swapped.model
    given = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    parameters = {name: value for name, value in given.items() if value is not None}
    question = _question(prompt)
    opening = [{"role": "system", "content": system}] if system else []
    if question is None:
        _chat(client.endpoint(), asked, opening, parameters)
    elif raw:
        _print_stream(inference.stream_completion(client.endpoint(), asked, question, **parameters))
    else:
        messages = [*opening, {"role": "user", "content": question}]
        _print_stream(inference.stream_chat(client.endpoint(), asked, messages, **parameters))


def swap(context: typer.Context, model: ModelName, engine: EngineKind = "") -> None:
    """Makes a model the active one. The one that runs now answers until the new one can."""
    outcome = _swapped(session(context).client, model, engine)
    if outcome.how == "already-active":
        output.say(f"{outcome.model} is active already")
    else:
        took = format_seconds(outcome.seconds)
        output.say(f"{outcome.model} is active: {took} ({outcome.how}, weights from {outcome.from_tier})")


def park(context: typer.Context) -> None:
    """Parks the active engine: its weights may go, its process stays."""
    session(context).client.park()


def load(
    context: typer.Context,
    model: ModelName,
    tier: Annotated[str, typer.Option(help="host, or device: the memory of a GPU.")] = "host",
    device: Annotated[str, typer.Option(help="Which, if there are several GPUs: cuda:1.")] = "",
) -> None:
    """Brings a model into memory, so that a swap to it is fast."""
    with output.job_progress(f"loading {model}") as progress:
        result = session(context).client.load(model, tier, progress, device=device)
    rate = result["size_bytes"] / max(result["seconds"], 1e-9) / 1e9
    took = format_seconds(result["seconds"])
    output.say(
        f"{model} is in the {result['residency']} tier: {format_bytes(result['size_bytes'])}, {took}, {rate:.2f} GB/s"
    )


def evict(context: typer.Context, model: ModelName) -> None:
    """Takes a model out of memory; it stays in the store."""
    session(context).client.evict(model)


def _swapped(client: Client, model: str, engine: str) -> SwapOutcome:
    """Swaps; a model that is not here, and may be on the hub, is pulled first if the person in front of us says so."""
    try:
        client.model(model)
    except NotFound as error:
        if not _HUB_NAME.fullmatch(model):
            raise
        if not (sys.stdin.isatty() and sys.stderr.isatty()):
            raise NotFound(error.message, hint=f"download it from the Hugging Face Hub: flash pull {model}") from None
        typer.confirm(f"{model} is not here. Download it from the Hugging Face Hub?", abort=True, err=True)
        pulled(client, model)
    result = output.wait(lambda: client.begin_swap(model, engine=engine), f"swapping to {model}")
    return SwapOutcome.from_result(result)


def _question(prompt: list[str] | None) -> str | None:
    """What to ask; None for a chat."""
    if prompt and prompt != ["-"]:
        return " ".join(prompt)
    if prompt == ["-"] or not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise InvalidArgument("standard input has no question", hint='flash run MODEL "a question"')
        return question
    return None


def _print_stream(pieces: Iterator[str]) -> str:
    """Prints an answer as it grows; returns all of it. Ctrl-C ends the answer, not the program that reads it."""
    answer = ""
    try:
        for piece in pieces:
            answer += piece
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
    return answer


def _chat(endpoint: inference.Endpoint, model: str, opening: list[dict[str, str]], parameters: dict[str, Any]) -> None:
    output.say(f"[dim]{model}. An empty line or Ctrl-D ends the chat, /new starts over.[/]")
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
            answer = _print_stream(inference.stream_chat(endpoint, model, messages, **parameters))
            messages.append({"role": "assistant", "content": answer})
        except KeyboardInterrupt:
            messages.pop()
        except FlashdError as error:  # a model swapped away by somebody else ends the answer, not the conversation
            messages.pop()
            output.show_error(error)
