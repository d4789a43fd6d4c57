# SPDX-License-Identifier: Apache-2.0
"""Asks the gateway with langchain-openai, as its user would: by_langchain_openai.py URL."""

import sys

import langchain_asking
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

URL = sys.argv[1] + "/v1"


def model(name: str, max_tokens: int) -> ChatOpenAI:
    return ChatOpenAI(model=name, base_url=URL, api_key="none", temperature=0, max_tokens=max_tokens, max_retries=0)


def embed(name: str, text: str) -> list[float]:
    # Without check_embedding_ctx_length=False it sends the tokens of a model of OpenAI's.
    made = OpenAIEmbeddings(model=name, base_url=URL, api_key="none", check_embedding_ctx_length=False, max_retries=0)
    return made.embed_query(text)


if __name__ == "__main__":
    langchain_asking.obey(model, embed)
