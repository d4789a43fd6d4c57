# SPDX-License-Identifier: Apache-2.0
"""Asks the gateway with langchain-ollama, as its user would: by_langchain_ollama.py URL."""

import sys

import langchain_asking
from langchain_ollama import ChatOllama, OllamaEmbeddings

URL = sys.argv[1]


def model(name: str, max_tokens: int) -> ChatOllama:
    return ChatOllama(model=name, base_url=URL, temperature=0, num_predict=max_tokens)


def embed(name: str, text: str) -> list[float]:
    return OllamaEmbeddings(model=name, base_url=URL).embed_query(text)


if __name__ == "__main__":
    langchain_asking.obey(model, embed)
