#!/usr/bin/env python3
"""Use OpenAI's SDK, unchanged, with a Gemma that gemma-serve (or any vLLM) serves.

    pip install openai
    python scripts/client_openai.py [--url http://127.0.0.1:8000/v1] [--model NAME]

The API key, where the server wants one, is read from GEMMA_SERVE_API_KEY.
"""

from __future__ import annotations

import argparse
import os
import sys

from openai import APIConnectionError, APIStatusError, OpenAI

QUESTION = "What is the capital of France?"


def show_answers(client: OpenAI, model: str) -> None:
    """Ask for a completion, a chat, and a streamed chat with a system message."""
    completion = client.completions.create(
        model=model, prompt="The capital of France is", max_tokens=64, temperature=0
    )
    print(f"completion:    {completion.choices[0].text}")

    chat = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=64,
        temperature=0,
    )
    print(f"chat:          {chat.choices[0].message.content}")

    stream = client.chat.completions.create(
        model=model,
        messages=[
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": QUESTION},
        ],
        max_tokens=64,
        temperature=0,
        stream=True,
    )
    print("streamed chat: ", end="", flush=True)
    for event in stream:
        for choice in event.choices:
            print(choice.delta.content or "", end="", flush=True)
    print()


def main() -> int:
    """Ask, print the answers, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="by default the first that the server lists")
    options = parser.parse_args()
    # The SDK wants a key even where the server doesn't.
    key = os.environ.get("GEMMA_SERVE_API_KEY") or "none"
    server = options.url.rstrip("/").removesuffix("/v1")
    try:
        with OpenAI(base_url=f"{server}/v1", api_key=key) as client:
            show_answers(client, options.model or client.models.list().data[0].id)
    except APIStatusError as error:
        print(f"{options.url} answered {error.status_code}", file=sys.stderr)
        return 1
    except APIConnectionError as error:
        print(f"cannot reach {options.url}: {error.__cause__ or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
