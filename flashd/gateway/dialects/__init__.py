# SPDX-License-Identifier: Apache-2.0
"""The HTTP interfaces that programs speak: their errors, and their translations to OpenAI's and back. No I/O.

dialect.py          what every dialect has: the form of its errors
by_path.py          which dialect a path belongs to
fields.py           tables of fields of requests: an unknown one is refused, never ignored
chunks.py           an engine's streamed answer, parsed
contents.py         the content of messages
openai.py           OpenAI's
responses.py        OpenAI's responses, as its chat completions
anthropic.py        Anthropic's errors, requests and answers
ollama.py           Ollama's errors, and its descriptions of models
ollama_requests.py  Ollama's requests, as OpenAI's
ollama_answers.py   an engine's answer, as Ollama's
"""
