# SPDX-License-Identifier: Apache-2.0
"""The gateway's routes."""

from __future__ import annotations

import dataclasses

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flashd._version import __version__
from flashd.errors import NotFound, Unavailable
from flashd.gateway import audio_endpoints
from flashd.gateway.answering import Answer, Endpoint
from flashd.gateway.anthropic_endpoints import AnthropicEndpoints
from flashd.gateway.dialects import anthropic, openai, responses
from flashd.gateway.dialects.by_path import dialect_of
from flashd.gateway.dialects.dialect import Dialect, NoSuchRoute, status_of
from flashd.gateway.directory import Connect
from flashd.gateway.dispatch import Dispatcher
from flashd.gateway.exchange import BodyBudget, Message, Receive, Send
from flashd.gateway.guard import Application
from flashd.gateway.listening import Opened
from flashd.gateway.metrics.daemon_news import DaemonNews
from flashd.gateway.metrics.measures import Measures
from flashd.gateway.metrics.page import MetricsPage
from flashd.gateway.ollama_endpoints import OllamaEndpoints
from flashd.gateway.page.endpoints import PageEndpoints
from flashd.gateway.page.files import FOLDER
from flashd.gateway.passed import Passed
from flashd.gateway.responses_endpoint import ResponsesEndpoint

# What names its model in the body, and is an engine's to answer.
_PASSED = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/rerank", "/rerank"),
    *("/v1/score", "/score", "/pooling", "/classify", "/tokenize", "/detokenize"),
)
_ANTHROPICS = "anthropic-version"  # a header that Anthropic's clients send, and no others
_AT_ONCE = frozenset({"/", "/health", "/metrics"})
_SHOWN = 200


def paths(application: Starlette) -> list[str]:
    """The paths that it answers, without those that name a model."""
    return [route.path for route in application.routes if "{" not in route.path]


def application(
    dispatcher: Dispatcher,
    connect: Connect,
    measures: Measures,
    news: DaemonNews,
    opened: Opened,
    page: PageEndpoints,
) -> Starlette:
    """`opened` is where it is reached."""
    ollama = OllamaEndpoints(dispatcher, connect)
    messages = AnthropicEndpoints(dispatcher)
    passed = Passed(dispatcher)
    audio = audio_endpoints.AudioEndpoints(dispatcher)
    budget = BodyBudget()
    metrics = MetricsPage(dispatcher, measures, news, budget)

    def route(path: str, answer: Answer, method: str = "POST") -> Route:
        return Route(path, Endpoint(dialect_of(path), answer, budget), methods=[method])

    async def models(request: Request) -> Response:
        found = dispatcher.directory.listed()
        if _ANTHROPICS in request.headers:
            return JSONResponse(anthropic.listed(found))
        return JSONResponse({"object": "list", "data": [openai.entry(name, model) for name, model in found]})

    async def model(request: Request) -> Response:
        is_anthropics = _ANTHROPICS in request.headers
        try:
            found = await dispatcher.described(request.path_params["name"])
        except (NotFound, Unavailable) as error:
            dialect: Dialect = anthropic.Anthropic() if is_anthropics else openai.OpenAI()
            return JSONResponse(dialect.described(error), status_code=status_of(error))
        return JSONResponse(anthropic.entry(*found) if is_anthropics else openai.entry(*found))

    async def health(_: Request) -> Response:
        known = dispatcher.directory
        said = {
            "status": "ok" if known.is_connected else "the daemon does not run",
            "version": __version__,
            "active": known.active or None,
            "resting": known.resting or None,
            "models": len(known.models),
            "addresses": opened.addresses,
            "refused": [dataclasses.asdict(each) for each in opened.refused],
        }
        return JSONResponse(said, status_code=200 if known.is_connected else 503)

    return Starlette(
        routes=[
            *page.routes(budget),
            Route("/health", health),
            Route("/metrics", metrics.answer),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            *(route(path, passed) for path in _PASSED),
            *(route(path, audio) for path in audio_endpoints.PATHS),
            route(responses.PATH, ResponsesEndpoint(dispatcher)),
            route("/v1/messages", messages.messages),
            route("/v1/messages/count_tokens", messages.count_tokens),
            route("/api/version", ollama.version, "GET"),
            route("/api/tags", ollama.tags, "GET"),
            route("/api/ps", ollama.ps, "GET"),
            route("/api/show", ollama.show),
            route("/api/chat", ollama.chat),
            route("/api/generate", ollama.generate),
            route("/api/embed", ollama.embed),
            route("/api/embeddings", ollama.embeddings),
            route("/api/pull", ollama.pull),
            route("/api/delete", ollama.delete, "DELETE"),
        ],
        exception_handlers={HTTPException: _not_found},
    )


class OnceSettled:
    """Has the first requests wait until the daemon was asked what there is: they may have started it, and us."""

    def __init__(self, inside: Application, dispatcher: Dispatcher) -> None:
        self._inside = inside
        self._dispatcher = dispatcher

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not _is_at_once(scope["path"]):
            await self._dispatcher.settled()
        await self._inside(scope, receive, send)


def _is_at_once(path: str) -> bool:
    """Tells whether a path is answered without the daemon."""
    return path in _AT_ONCE or path.startswith(FOLDER)


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    allowed = dict(error.headers or {})
    path = request.url.path
    message = f"there is no {request.method} {path[:_SHOWN]} here"
    if error.status_code == 405:
        message += f": it answers {allowed.get('Allow', 'GET')}"
    said = dialect_of(path).described(NoSuchRoute(message, status=error.status_code))
    return JSONResponse(said, status_code=error.status_code, headers=allowed)
