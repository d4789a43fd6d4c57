# SPDX-License-Identifier: Apache-2.0
"""Asks the gateway with litellm, as its user would: by_litellm.py URL.

The name of a model begins with the interface to use: `openai/`, `hosted_vllm/`, `ollama_chat/` or `anthropic/`.
"""

import json
import sys
from typing import Any

import litellm
import told

URL = sys.argv[1]
begun = told.Begun()


def base(name: str) -> str:
    return URL + ("/v1" if name.startswith(("openai/", "hosted_vllm/")) else "")


def ask(name: str, messages: Any, **more: Any) -> Any:
    asked = {"model": name, "api_base": base(name), "api_key": "none", "messages": messages}
    return litellm.completion(**{**asked, "temperature": 0, "max_tokens": 120, "max_retries": 0, **more})


def user(question: str) -> Any:
    return {"role": "user", "content": question}


def chat(name: str, question: str) -> Any:
    answer = ask(name, [user(question)])
    return {"text": answer.choices[0].message.content, "tokens": answer.usage.completion_tokens}


def stream(name: str, question: str) -> list[str]:
    return [chunk.choices[0].delta.content or "" for chunk in ask(name, [user(question)], stream=True)]


def begin(name: str, question: str) -> str:
    chunks = ask(name, [user(question)], stream=True, max_tokens=told.ENDLESS)
    return begun.begin(chunks, lambda chunk: chunk.choices[0].delta.content, chunks.completion_stream)


def tools(name: str, question: str) -> Any:
    messages = [user(question)]
    answer = ask(name, messages, tools=[told.FUNCTION]).choices[0].message
    (call,) = answer.tool_calls
    arguments = json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": told.weather(**arguments)}
    chunks = list(ask(name, messages, tools=[told.FUNCTION], stream=True))
    whole = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
    streamed = [(each.function.name, json.loads(each.function.arguments)) for each in whole.tool_calls]
    text = ask(name, [*messages, answer.model_dump(), result], tools=[told.FUNCTION]).choices[0].message.content
    return {"called": [call.function.name, arguments], "streamed": streamed, "text": text}


def embed(name: str, text: str) -> list[float]:
    made = litellm.embedding(
        model=name.replace("ollama_chat/", "ollama/"), api_base=base(name), api_key="none", input=[text]
    )
    return made.data[0]["embedding"]


if __name__ == "__main__":
    told.obey({"chat": chat, "stream": stream, "begin": begin, "leave": begun.leave, "tools": tools, "embed": embed})
