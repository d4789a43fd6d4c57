# SPDX-License-Identifier: Apache-2.0
"""Removes secrets, and names of hidden models, from the configuration for users who do not administer the daemon.

Values of environment variables are never shown. Arguments of engines are hidden if their name or the preceding option
means a secret, or if they look like one. In doubt a value is hidden, because its name tells enough.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence

from flashd.config.settings import Config, ModelConfig

HIDDEN = "(hidden)"
_SHORTEST_SECRET = 4  # shorter secrets would match in many texts

_CALLED_SECRET = re.compile(
    r"(?:^|[^a-z])(?:(?:api|access|private|secret|auth|encryption|signing)?[-_.]?keys?|token|secrets?|pass|passw\w*|"
    r"passphrase|auth|authorization|credentials?|bearer|cookies?|headers?)(?:$|[^a-z])",
    re.IGNORECASE,
)
_LOOKS_SECRET = re.compile(
    r"(?i:\b(?:hf|sk|pk|rk|gh[pousr]|github_pat|glpat|xox[abprs]|nvapi|AKIA|ASIA|AIza|eyJ)[-_]?[\w.-]{8,})"
    r"|://[^\s/@]+@"  # a password in an address
    r"|(?i:\b(?:bearer|basic)\s+\S)"
    r"|(?=[\w+=-]*[a-z])(?=[\w+=-]*[A-Z])(?=[\w+=-]*\d)[\w+=-]{32,}"
)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")


def disclosed(config: Config, sees: Callable[[str], bool]) -> Config:
    """Returns the configuration for a user who `sees` the models with these names."""
    vllm = dataclasses.replace(
        config.engines.vllm,
        environment=tuple(_without_value(assignment) for assignment in config.engines.vllm.environment),
        arguments=tuple(_arguments(config.engines.vllm.arguments)),
        adapters=tuple(map(_hidden_if_secret, config.engines.vllm.adapters)),
    )
    prewarm = config.engines.prewarm if sees(config.engines.prewarm) else ""
    return dataclasses.replace(
        config,
        engines=dataclasses.replace(config.engines, vllm=vllm, prewarm=prewarm),
        memory=dataclasses.replace(config.memory, prewarm=tuple(filter(sees, config.memory.prewarm))),
        models={name: _of_model(chosen) for name, chosen in config.models.items() if sees(name)},
        bus=dataclasses.replace(config.bus, address=_hidden_if_secret(config.bus.address)),
    )


def without_secrets(text: str, config: Config) -> str:
    """Removes secrets from a text by engines, which may quote their arguments and environment."""
    given = [config.engines.vllm.arguments, *(chosen.arguments for chosen in config.models.values())]
    secrets = [value for arguments in given for value in _secret_values(arguments)]
    for assignment in config.engines.vllm.environment:
        name, _, value = assignment.partition("=")
        if _is_secret_name(name) or _has_secret(value):
            secrets.append(value)
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, HIDDEN)
    return text


def _secret_values(arguments: Sequence[str]) -> Iterator[str]:
    for argument, shown in zip(arguments, _arguments(arguments), strict=True):
        if shown.endswith(HIDDEN):
            yield argument[len(shown) - len(HIDDEN) :]


def _of_model(chosen: ModelConfig) -> ModelConfig:
    return dataclasses.replace(chosen, arguments=tuple(_arguments(chosen.arguments)))


def _without_value(assignment: str) -> str:
    """Hides the value of an assignment. Text without a name counts as a value."""
    name, is_assigned, _ = assignment.partition("=")
    return f"{name}={HIDDEN}" if is_assigned else HIDDEN


def _arguments(arguments: Sequence[str]) -> Iterator[str]:
    option = ""  # the option of which this argument may be a value; there may be several values
    previous = ""
    for argument in arguments:
        is_first_value = previous == option and _is_secret_name(option)  # even if the value begins like an option
        previous = argument
        if is_first_value or not argument.startswith("-"):
            yield HIDDEN if _is_secret_name(option) or _has_secret(argument) else argument
            continue
        option, separator, value = _split(argument)
        yield f"{option}{separator}{HIDDEN}" if value and (_is_secret_name(option) or _has_secret(value)) else argument


def _split(argument: str) -> tuple[str, str, str]:
    """Splits an option from its value, if that is in the same argument."""
    found = re.match(r"([^=\s]+)([=\s])(.*)", argument, re.DOTALL)
    return (found[1], found[2], found[3]) if found else (argument, "", "")


def _is_secret_name(option: str) -> bool:
    return _CALLED_SECRET.search(_CAMEL.sub("_", option)) is not None


def _has_secret(value: str) -> bool:
    return _is_secret_name(value) or _LOOKS_SECRET.search(value) is not None


def _hidden_if_secret(value: str) -> str:
    return HIDDEN if _LOOKS_SECRET.search(value) else value
