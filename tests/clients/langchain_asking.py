# SPDX-License-Identifier: Apache-2.0
"""What both LangChain programs are told to do, by the interface that their models have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import told
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage, ToolMessage

LONGEST = 120  # tokens of an answer that is read to its end


def obey(model: Callable[[str, int], BaseChatModel], embed: Callable[[str, str], list[float]]) -> None:
    """`model` takes a name and the most tokens of an answer; `embed` a name and a text."""
    begun = told.Begun()

    def chat(name: str, question: str) -> Any:
        answer = model(name, LONGEST).invoke(question)
        return {"text": answer.text, "tokens": answer.usage_metadata["output_tokens"]}

    def stream(name: str, question: str) -> list[str]:
        return [piece.text for piece in model(name, LONGEST).stream(question)]

    def begin(name: str, question: str) -> str:
        return begun.begin(model(name, told.ENDLESS).stream(question), lambda piece: piece.text)

    def tools(name: str, question: str) -> Any:
        able = model(name, LONGEST).bind_tools([told.FUNCTION])
        messages: list[Any] = [HumanMessage(question)]
        messages.append(able.invoke(messages))
        (call,) = messages[-1].tool_calls
        messages.append(ToolMessage(told.weather(**call["args"]), tool_call_id=call["id"]))
        whole: Any = None
        for piece in able.stream([HumanMessage(question)]):
            whole = piece if whole is None else whole + piece
        streamed = [(each["name"], each["args"]) for each in whole.tool_calls]
        return {"called": [call["name"], call["args"]], "streamed": streamed, "text": able.invoke(messages).text}

    told.obey({"chat": chat, "stream": stream, "begin": begin, "leave": begun.leave, "tools": tools, "embed": embed})
