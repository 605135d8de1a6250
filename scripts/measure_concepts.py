"""Measure what docs/concepts.md explains, on a running endpoint: batching, paging, sharing.

    python scripts/measure_concepts.py [--url URL] [--prefix-tokens N]

Prints one JSON object. The prompts are token ids at random, so any Gemma takes them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import time
from typing import Any

import httpx

ANSWER_TOKENS = 64


class Server:
    """The endpoint, its model, and its own counters."""

    def __init__(self, client: httpx.AsyncClient, model: str, vocabulary: int) -> None:
        self.client, self.model, self.vocabulary = client, model, vocabulary
        self.random = random.Random(7)

    def prompt(self, tokens: int) -> list[int]:
        """Token ids that nobody sent before."""
        return [self.random.randrange(300, self.vocabulary) for _ in range(tokens)]

    async def ask(self, prompt: list[int], max_tokens: int) -> float:
        """Seconds to the first token of an answer of exactly `max_tokens`."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        begun, first = time.perf_counter(), None
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if first is None and line.startswith("data: {"):
                    first = time.perf_counter() - begun
        assert first is not None
        return first

    async def together(self, count: int) -> float:
        """Tokens a second of `count` requests at once."""
        begun = time.perf_counter()
        await asyncio.gather(*(self.ask(self.prompt(32), ANSWER_TOKENS) for _ in range(count)))
        return count * ANSWER_TOKENS / (time.perf_counter() - begun)

    async def counter(self, name: str) -> float:
        """One of vLLM's counters."""
        text = (await self.client.get("/metrics")).text
        found = re.search(rf"^vllm:{name}(?:{{[^}}]*}})? ([\d.e+]+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    async def cache(self) -> dict[str, Any]:
        """The KV cache as the engine divided it."""
        text = (await self.client.get("/metrics")).text
        found = re.search(r"^vllm:cache_config_info{(.*)} ", text, re.MULTILINE)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', found[1])) if found else {}
        wanted = (
            "block_size",
            "num_gpu_blocks",
            "kv_cache_size_tokens",
            "kv_cache_max_concurrency",
        )
        return {name: labels[name] for name in wanted if name in labels}


async def measure(url: str, prefix_tokens: int, vocabulary: int) -> dict[str, Any]:
    """All figures, as one value."""
    key = os.environ.get("GEMMA_SERVE_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=300) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        server = Server(client, model, vocabulary)
        await server.together(2)  # the first requests pay for warming up
        batching = {n: round(await server.together(n), 1) for n in (1, 2, 4, 8, 16, 32)}
        prefix = server.prompt(prefix_tokens)
        hits = await server.counter("prefix_cache_hits_total")
        new_s = await server.ask(prefix + server.prompt(16), 1)
        shared_s = [await server.ask(prefix + server.prompt(16), 1) for _ in range(5)]
        cached = await server.counter("prefix_cache_hits_total") - hits
        cache = await server.cache()
    return {
        "model": model,
        "tokens_per_second_by_requests_at_once": batching,
        "prefix_tokens": prefix_tokens,
        "first_token_new_prefix_s": round(new_s, 4),
        "first_token_shared_prefix_s": round(sorted(shared_s)[2], 4),
        "tokens_taken_from_the_cache_per_request": cached / 5,
        "kv_cache": cache,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure batching, paging and prefix sharing.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--prefix-tokens", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=1024, help="the model's vocabulary")
    options = parser.parse_args()
    figures = asyncio.run(measure(options.url, options.prefix_tokens, options.vocabulary))
    print(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
