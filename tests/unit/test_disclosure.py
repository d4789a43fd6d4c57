# SPDX-License-Identifier: Apache-2.0
"""The configuration as shown to users who do not administer the daemon."""

from __future__ import annotations

import dataclasses

import pytest

from flashd.config import loading
from flashd.config.settings import Config, EnginesConfig, MemoryConfig, ModelConfig
from flashd.daemon.access.disclosure import HIDDEN, disclosed, without_secrets


def shown(**settings: tuple[str, ...]) -> Config:
    engines = Config().engines
    vllm = dataclasses.replace(engines.vllm, **settings)
    return disclosed(Config(engines=dataclasses.replace(engines, vllm=vllm)), lambda name: True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--api-key", "swordfish"),
        ("--api-key", "swordfish", "swordfish"),
        ("--api-key=swordfish",),
        ("--api-key swordfish",),
        ("--api-key", "-swordfish"),
        ("--hf_token", "swordfish"),
        ("--hf-token=swordfish",),
        ("--hf-overrides", '{"auth_token": "swordfish"}'),
        ("--kv-transfer-config={'password': 'swordfish'}",),
        ('--x={"apiKey": "swordfish"}',),
        ("--otlp-traces-endpoint", "http://me:swordfish@collector"),
        ("--anything", "hf_swordfish123"),
        ("--anything", "Authorization: Bearer swordfish"),
        ("--middleware", "key=swordfish"),
        ("--secret", "swordfish"),
        ("--ssl-password", "swordfish"),
        ("swordfish_sk-abcdefgh", "sk-swordfish"),
    ],
    ids=str,
)
def test_arguments_that_may_be_secret_are_hidden(arguments: tuple[str, ...]) -> None:
    (*found,) = shown(arguments=arguments).engines.vllm.arguments
    assert "swordfish" not in " ".join(a for a in found if not a.startswith("swordfish_"))
    assert HIDDEN in " ".join(found)


def test_other_arguments_are_shown() -> None:
    arguments = (
        *("--max-model-len", "4096", "--tokenizer-mode=auto", "--max-num-batched-tokens", "8192", "--enforce-eager"),
        *("--dtype", "bfloat16", "--tokenizer", "/srv/models/Qwen/Qwen3-0.6B", "--hf-overrides", '{"layers": 3}'),
    )
    assert shown(arguments=arguments).engines.vllm.arguments == arguments


def test_what_an_engine_quotes_of_its_secrets_is_hidden() -> None:
    vllm = dataclasses.replace(
        Config().engines.vllm,
        environment=("HF_TOKEN=hf_swordfish123", "NCCL_DEBUG=INFO", "ODD_KEY=ab"),
        arguments=("--api-key=swordfish", "--hf-token", "sword fish", "--enforce-eager"),
    )
    whole = Config(
        engines=dataclasses.replace(Config().engines, vllm=vllm),
        models={"m": ModelConfig(arguments=("--api-key", "mackerel"))},
    )
    said = "status 2; wrong: --api-key=swordfish mackerel 'sword fish' hf_swordfish123 INFO: able --enforce-eager"
    expected = f"status 2; wrong: --api-key={HIDDEN} {HIDDEN} '{HIDDEN}' {HIDDEN} INFO: able --enforce-eager"
    assert without_secrets(said, whole) == expected


def test_of_the_environment_only_names_are_shown() -> None:
    environment = shown(environment=("HF_TOKEN=x", "NCCL_DEBUG=INFO", "=odd", "no assignment")).engines.vllm.environment
    assert environment == (f"HF_TOKEN={HIDDEN}", f"NCCL_DEBUG={HIDDEN}", f"={HIDDEN}", HIDDEN)


def test_models_that_somebody_may_not_see_are_nowhere() -> None:
    whole = Config(
        models={"secret": ModelConfig(arguments=("--x",)), "open": ModelConfig(arguments=("--api-key", "swordfish"))},
        memory=MemoryConfig(prewarm=("open", "secret")),
        engines=EnginesConfig(prewarm="secret"),
    )
    text = loading.dump(disclosed(whole, lambda name: name == "open"))
    assert "secret" not in text
    assert "swordfish" not in text
    assert 'prewarm = [\n    "open",\n]' in text
