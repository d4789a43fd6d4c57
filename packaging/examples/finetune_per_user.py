#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A chat server with a fine-tune for each of its users.

finetune_per_user.py serve PORT                   needs: pip install openai httpx starlette uvicorn
finetune_per_user.py measure URL USERS REQUESTS   asks as so many users do, and says how long they waited

POST /chat with a question as its body and the name of its user in the header `User` (put your own sign-in there) is
answered, as text that grows, by the model user-NAME. All of them share one engine: flashd points it at the fine-tune
whose turn it is. FLASHD_URL is the address of flashd-gateway, if it is not http://127.0.0.1:8434.
"""

import asyncio
import os
import random
import statistics
import sys
import time

import openai

gateway = os.environ.get("FLASHD_URL", "http://127.0.0.1:8434")


def serve(port):
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, StreamingResponse
    from starlette.routing import Route

    client = openai.AsyncOpenAI(base_url=gateway + "/v1", api_key="none")

    async def chat(request):
        name, question = request.headers.get("user", ""), (await request.body()).decode()
        messages = [{"role": "user", "content": question}]
        try:
            answer = await client.chat.completions.create(
                model=f"user-{name}", messages=messages, temperature=0, max_tokens=200, stream=True
            )
        except openai.NotFoundError:
            return PlainTextResponse(f"{name!r} has no model here\n", status_code=404)

        async def text():
            async for chunk in answer:
                for choice in chunk.choices:
                    yield choice.delta.content or ""

        return StreamingResponse(text(), media_type="text/plain; charset=utf-8")

    uvicorn.run(Starlette(routes=[Route("/chat", chat, methods=["POST"])]), port=int(port), log_level="warning")


async def measure(url, users, requests):
    """Users ask all at once; some ask far more often than others, as people do (Zipf's law)."""
    import httpx

    users, requests = int(users), int(requests)
    chosen = random.Random(0).choices(range(users), weights=[1 / (i + 1) for i in range(users)], k=requests)
    waited_s = []

    async def ask(web, user):
        asked = time.monotonic()
        async with web.stream("POST", "/chat", headers={"User": str(user)}, content="Who are you?") as answer:
            answer.raise_for_status()
            pieces = answer.aiter_text()
            text = await anext(pieces)
            waited_s.append(time.monotonic() - asked)
            return user, text + "".join([piece async for piece in pieces])

    async with httpx.AsyncClient(base_url=url, timeout=600) as web:
        began = time.monotonic()
        answers = await asyncio.gather(*(ask(web, user) for user in chosen))
        took_s = time.monotonic() - began
    for user, text in sorted(set(answers)):
        print(f"{user}: {text}")
    waited_s.sort()
    print(f"{requests} answers of {len(set(chosen))} models in {took_s:.1f} s, {requests / took_s:.1f} a second")
    print(
        f"first words after {statistics.median(waited_s):.2f} s (median), {waited_s[int(0.95 * requests)]:.2f} s (p95)"
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", port]:
            serve(port)
        case ["measure", url, users, requests]:
            asyncio.run(measure(url, users, requests))
        case _:
            sys.exit(__doc__)
