# SPDX-License-Identifier: Apache-2.0
"""The gateway: one HTTP address for all models, in a process of its own, which is an ordinary client of the daemon.

A request names a model. If that model serves, its engine gets the request as it came; else the request waits for its
turn, and the gateway asks the daemon to swap.

    main.py       the program: arguments and sockets
    server.py     runs the application behind uvicorn
    app.py        routes, and which dialect each belongs to
    guard.py      who may ask, and what: Host, Origin, tokens
    tokens.py     the file of tokens
    access.py     what the client of a request may do
    directory.py  the daemon's models and engines, kept up to date by its signals
    turns.py      whose turn it is: the policy, without I/O
    pulls.py      pulls from the hub that requests wait for
    dispatch.py   carries a request through its turn to an engine and back
    answering.py  a request and its answer, with errors in the form of a dialect
    metrics/      counts and times, for Prometheus
    tracing.py    traces, for OpenTelemetry
    passed.py, responses_endpoint.py, audio_endpoints.py, anthropic_endpoints.py, ollama_endpoints.py
                  what answers the requests of each dialect
    translated.py what is translated for engines that lack a dialect
    forms.py      the fields of a form
    dialects/     errors and translations: OpenAI, Anthropic, Ollama
"""
