#!/usr/bin/env python3
"""Continue a prompt with a Gemma that gemma-serve (or any vLLM) serves, plain and streamed.

    python scripts/client_completions.py [--url http://127.0.0.1:8000/v1] [--model NAME] [PROMPT]

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


def first_model(client: httpx.Client) -> str:
    """The first model that the server lists."""
    response = client.get("/v1/models").raise_for_status()
    return str(response.json()["data"][0]["id"])


def complete(client: httpx.Client, request: dict[str, Any]) -> str:
    """The whole continuation, in one answer."""
    response = client.post("/v1/completions", json=request).raise_for_status()
    return str(response.json()["choices"][0]["text"])


def stream(client: httpx.Client, request: dict[str, Any]) -> Iterator[str]:
    """The continuation piece by piece, as the model writes it."""
    with client.stream("POST", "/v1/completions", json={**request, "stream": True}) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if line.startswith("data:") and data != "[DONE]":
                for choice in json.loads(data)["choices"]:
                    yield choice["text"]


def main() -> int:
    """Ask, print the answers, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompt", nargs="?", default="The capital of France is")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="by default the first that the server lists")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    key = os.environ.get("GEMMA_SERVE_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    server = options.url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=server, headers=headers, timeout=120) as client:
            request = {
                "model": options.model or first_model(client),
                "prompt": options.prompt,
                "max_tokens": options.max_tokens,
                "temperature": 0,
            }
            print(f"plain:    {options.prompt}{complete(client, request)}")
            print(f"streamed: {options.prompt}", end="", flush=True)
            for text in stream(client, request):
                print(text, end="", flush=True)
            print()
    except httpx.HTTPStatusError as error:
        print(f"{options.url} answered {error.response.status_code}", file=sys.stderr)
        return 1
    except httpx.HTTPError as error:
        print(f"cannot reach {options.url}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
