# SPDX-License-Identifier: Apache-2.0
"""Asks the gateway with langchain-openai, as its user would: by_langchain_openai.py URL."""

import sys
from typing import Any

import told
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

URL = sys.argv[1] + "/v1"
begun = told.Begun()


def model(name: str, **more: Any) -> ChatOpenAI:
    made = {"model": name, "base_url": URL, "api_key": "none", "temperature": 0, "max_tokens": 120, "max_retries": 0}
    return ChatOpenAI(**{**made, **more})


def chat(name: str, question: str) -> Any:
    answer = model(name).invoke(question)
    return {"text": answer.text, "tokens": answer.usage_metadata["output_tokens"]}


def stream(name: str, question: str) -> list[str]:
    return [piece.text for piece in model(name).stream(question)]


def begin(name: str, question: str) -> str:
    return begun.begin(model(name, max_tokens=told.ENDLESS).stream(question), lambda piece: piece.text)


def tools(name: str, question: str) -> Any:
    able = model(name).bind_tools([told.FUNCTION])
    messages = [HumanMessage(question)]
    messages.append(able.invoke(messages))
    (call,) = messages[-1].tool_calls
    messages.append(ToolMessage(told.weather(**call["args"]), tool_call_id=call["id"]))
    whole = None
    for piece in able.stream([HumanMessage(question)]):
        whole = piece if whole is None else whole + piece
    streamed = [(each["name"], each["args"]) for each in whole.tool_calls]
    return {"called": [call["name"], call["args"]], "streamed": streamed, "text": able.invoke(messages).text}


def embed(name: str, text: str) -> list[float]:
    # Without check_embedding_ctx_length=False it sends the tokens of a model of OpenAI's.
    made = OpenAIEmbeddings(model=name, base_url=URL, api_key="none", check_embedding_ctx_length=False, max_retries=0)
    return made.embed_query(text)


if __name__ == "__main__":
    told.obey({"chat": chat, "stream": stream, "begin": begin, "leave": begun.leave, "tools": tools, "embed": embed})
