"""Write the tables of docs/planner.md that the planner itself can fill.

    python scripts/generate_planner_tables.py [--check]

Each table stands between two marks in the page. With --check nothing is written, and the exit code
is 1 where the page is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from gemma_serve.adapters.package_data import load_catalogue, load_engine_rules, load_gpu_cards
from gemma_serve.planning.memory.attention_backend import choose_attention
from gemma_serve.planning.memory.engine_rules import rules_for
from gemma_serve.planning.memory.kv_cache import KvCacheGroup, KvCacheLayout, plan_kv_cache
from gemma_serve.planning.model.geometry import Geometry
from gemma_serve.planning.model.model_config import read_geometry
from gemma_serve.planning.model.weights import weights_bytes

TARGET = Path(__file__).parent.parent / "docs" / "planner.md"
VERSION = "0.32.0"
HOPPER = (9, 0)
LENGTH = 8192
BATCHED_TOKENS = 8192
BUDGET = 10 * 2**30
# One of each generation and of each way to keep less.
MODELS = (
    "google/gemma-7b",
    "google/gemma-2-9b",
    "google/gemma-3-27b-it",
    "google/gemma-3n-E4B-it",
    "google/gemma-4-E4B-it",
    "google/gemma-4-12B-it",
    "google/gemma-4-31B-it",
)


def geometry_of(model: str) -> Geometry:
    """The shape of a model of the catalogue."""
    entry = next(entry for entry in load_catalogue() if entry.id == model)
    return read_geometry(entry.config)


def layout_of(geometry: Geometry) -> KvCacheLayout:
    """Its KV cache on a Hopper GPU, at the length and the batch of the page."""
    rules, _ = rules_for(VERSION, load_engine_rules())
    attention = choose_attention(geometry, rules=rules, capability=HOPPER, dtype="bfloat16")
    return plan_kv_cache(
        geometry,
        rules=rules,
        attention=attention,
        tensor_parallel_size=1,
        max_model_len=LENGTH,
        max_num_batched_tokens=BATCHED_TOKENS,
        async_scheduling=True,
    )


def weights_table() -> Iterable[str]:
    """Where the bytes of the weights are."""
    yield "| model | layers | embeddings | RoPE tables | towers | the rest | in all, bytes | GiB |"
    yield "|---|--:|--:|--:|--:|--:|--:|--:|"
    for model in MODELS:
        weights = weights_bytes(
            geometry_of(model), dtype="bfloat16", max_num_batched_tokens=BATCHED_TOKENS
        )
        assert weights is not None
        rest = weights.buffers_bytes + weights.staging_bytes
        parts = (weights.text_bytes, weights.embeddings_bytes, weights.rope_bytes)
        cells = [f"{part / 2**30:.3f}" for part in (*parts, weights.towers_bytes, rest)]
        total = weights.total_bytes
        yield f"| {model} | {' | '.join(cells)} | {total:,} | {total / 2**30:.3f} |"


def kv_table() -> Iterable[str]:
    """Groups, blocks and what ten GiB of cache hold."""
    yield (
        "| model | groups | bytes per block | blocks per request | bytes per request "
        "| blocks in 10 GiB | tokens | at once |"
    )
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for model in MODELS:
        layout = layout_of(geometry_of(model))
        capacity = layout.with_memory(BUDGET)
        yield (
            f"| {model} | {groups_text(layout.groups)} | {layout.pool_bytes_per_block:,} "
            f"| {layout.blocks_per_request:,} | {layout.bytes_per_sequence:,} "
            f"| {capacity.num_blocks:,} | {capacity.tokens:,} | {capacity.max_concurrency:.2f} |"
        )


def groups_text(groups: Iterable[KvCacheGroup]) -> str:
    """Groups that are alike, counted: "5 sliding of 8 layers, blocks of 16"."""
    counted: dict[str, int] = {}
    for group in groups:
        text = f"{group.kind} of {group.layers} layers, blocks of {group.block_size}"
        counted[text] = counted.get(text, 0) + 1
    return "; ".join(f"{count} {text}" for text, count in counted.items())


def cards_table() -> Iterable[str]:
    """The names that --for-gpu takes."""
    yield "| name | card | GiB | compute capability | figure |"
    yield "|---|---|--:|--:|---|"
    for card in load_gpu_cards():
        major, minor = card.compute_capability
        size = f"{card.total_bytes / 2**30:.2f}"
        yield f"| `{card.key}` | {card.name} | {size} | {major}.{minor} | {card.source} |"


TABLES = {"cards": cards_table, "weights": weights_table, "kv cache": kv_table}


def filled(page: str) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        mark = f"<!-- table: {name} -->"
        text = "\n".join(table())
        page, found = re.subn(
            rf"{mark}\n.*?<!-- end -->",
            lambda _, mark=mark, text=text: f"{mark}\n{text}\n<!-- end -->",  # type: ignore[misc]
            page,
            flags=re.DOTALL,
        )
        assert found == 1, name
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of docs/planner.md.")
    parser.add_argument("--check", action="store_true", help="only say whether they are up to date")
    page = TARGET.read_text(encoding="utf-8")
    if parser.parse_args().check:
        return 0 if filled(page) == page else 1
    TARGET.write_text(filled(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
