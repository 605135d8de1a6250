#!/usr/bin/env python3
"""Chat with a Gemma that gemma-serve (or any vLLM) serves: two turns, plain and streamed.

    python scripts/client_chat.py [--url http://127.0.0.1:8000/v1] [--model NAME] [--system TEXT]

The API key, where the server wants one, is read from GEMMA_SERVE_API_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

import httpx

TURNS = ("Tell me a fun fact about space.", "Tell me another one.")
Message = dict[str, str]


def first_model(client: httpx.Client) -> str:
    """The first model that the server lists."""
    response = client.get("/v1/models").raise_for_status()
    return str(response.json()["data"][0]["id"])


def answer(client: httpx.Client, request: dict[str, Any]) -> str:
    """The whole answer at once."""
    response = client.post("/v1/chat/completions", json=request).raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


def stream(client: httpx.Client, request: dict[str, Any]) -> Iterator[str]:
    """The answer piece by piece, as the model writes it."""
    body = {**request, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if line.startswith("data:") and data != "[DONE]":
                for choice in json.loads(data)["choices"]:
                    yield choice["delta"].get("content") or ""


def converse(client: httpx.Client, model: str, system: str | None) -> None:
    """Two turns. The model remembers nothing: every request carries all turns before it."""
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    request = {"model": model, "messages": messages, "max_tokens": 128, "temperature": 0}

    messages.append({"role": "user", "content": TURNS[0]})
    said = answer(client, request)
    print(f"user:  {TURNS[0]}\nmodel: {said}")

    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": TURNS[1]}]
    print(f"user:  {TURNS[1]}\nmodel: ", end="", flush=True)
    for text in stream(client, request):
        print(text, end="", flush=True)
    print()


def main() -> int:
    """Ask, print the answers, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="by default the first that the server lists")
    parser.add_argument("--system", help="a system message to begin with")
    options = parser.parse_args()
    key = os.environ.get("GEMMA_SERVE_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    server = options.url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=server, headers=headers, timeout=120) as client:
            converse(client, options.model or first_model(client), options.system)
    except httpx.HTTPStatusError as error:
        print(f"{options.url} answered {error.response.status_code}", file=sys.stderr)
        return 1
    except httpx.HTTPError as error:
        print(f"cannot reach {options.url}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
