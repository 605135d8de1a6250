"""Every generation's shape, as far as its KV cache goes, written down by hand.

Independent of `read_geometry`, so that a mistake in reading a config.json shows up as a difference.
"""

from __future__ import annotations

from gemma_serve.planning.model.geometry import Attention, Geometry, Layer


def make_geometry(
    layers: list[Attention],
    *,
    model_type: str,
    max_model_len: int,
    architecture: str = "",
    softcaps: bool = False,
    both_ways: bool = False,
    pooling: bool = False,
) -> Geometry:
    """A geometry of which only the attention means anything."""
    return Geometry(
        model_type=model_type,
        architecture=architecture or "GemmaForCausalLM",
        hidden_size=1024,
        vocab_size=262144,
        layers=tuple(Layer(attention=layer, intermediate_size=8192) for layer in layers),
        ropes=(),
        max_model_len=max_model_len,
        softcaps_attention=softcaps,
        attends_both_ways_to_images=both_ways,
        is_pooling=pooling,
    )


def gemma1(layers: int, heads: int, kv_heads: int) -> Geometry:
    return make_geometry(
        [Attention(heads, kv_heads, 256)] * layers, model_type="gemma", max_model_len=8192
    )


def gemma2(
    layers: int, heads: int, kv_heads: int, head_size: int, *, model_type: str = "gemma2"
) -> Geometry:
    return make_geometry(
        [
            Attention(heads, kv_heads, head_size, window=4096 if (index + 1) % 2 else None)
            for index in range(layers)
        ],
        model_type=model_type,
        max_model_len=8192,
        softcaps=model_type == "gemma2",
    )


def gemma3(
    layers: int, heads: int, kv_heads: int, head_size: int, window: int, *, text: bool = False
) -> Geometry:
    return make_geometry(
        [
            Attention(heads, kv_heads, head_size, window=window if (index + 1) % 6 else None)
            for index in range(layers)
        ],
        model_type="gemma3_text" if text else "gemma3",
        max_model_len=32768 if text else 131072,
        both_ways=not text,
    )


def gemma3n(layers: int, shared: int) -> Geometry:
    return make_geometry(
        [
            Attention(
                8,
                2,
                256,
                window=512 if (index + 1) % 5 else None,
                shares_kv=index >= layers - shared,
            )
            for index in range(layers)
        ],
        model_type="gemma3n",
        max_model_len=32768,
    )


def gemma4(
    layers: int,
    period: int,
    heads: int,
    local: int,
    whole: int,
    window: int,
    *,
    shared: int = 0,
    both_ways: bool = False,
    model_type: str = "gemma4",
) -> Geometry:
    return make_geometry(
        [
            Attention(
                heads,
                local if (index + 1) % period else whole,
                256 if (index + 1) % period else 512,
                window=window if (index + 1) % period else None,
                shares_kv=index >= layers - shared,
            )
            for index in range(layers)
        ],
        model_type=model_type,
        max_model_len=262144 if both_ways else 131072,
        both_ways=both_ways,
    )


def paligemma(geometry: Geometry) -> Geometry:
    layers = [layer.attention for layer in geometry.layers]
    return make_geometry(
        layers,
        model_type="paligemma",
        max_model_len=8192,
        softcaps=geometry.softcaps_attention,
        both_ways=True,
    )


MODELS: dict[str, Geometry] = {
    "gemma-2b": gemma1(18, 8, 1),
    "gemma-7b": gemma1(28, 16, 16),
    "gemma-2-2b": gemma2(26, 8, 4, 256),
    "gemma-2-9b": gemma2(42, 16, 8, 256),
    "gemma-2-27b": gemma2(46, 32, 16, 128),
    "gemma-3-270m": gemma3(18, 4, 1, 256, 512, text=True),
    "gemma-3-1b": gemma3(26, 4, 1, 256, 512, text=True),
    "gemma-3-4b": gemma3(34, 8, 4, 256, 1024),
    "gemma-3-12b": gemma3(48, 16, 8, 256, 1024),
    "gemma-3-27b": gemma3(62, 32, 16, 128, 1024),
    "gemma-3n-E2B": gemma3n(30, 10),
    "gemma-3n-E4B": gemma3n(35, 15),
    "gemma-4-E2B": gemma4(35, 5, 8, 1, 1, 512, shared=20),
    "gemma-4-E4B": gemma4(42, 6, 8, 2, 2, 512, shared=18),
    "gemma-4-12B": gemma4(48, 6, 16, 8, 1, 1024, both_ways=True, model_type="gemma4_unified"),
    "gemma-4-26B-A4B": gemma4(30, 6, 16, 8, 2, 1024, both_ways=True),
    "gemma-4-31B": gemma4(60, 6, 32, 16, 4, 1024, both_ways=True),
    "paligemma-3b": paligemma(gemma1(18, 8, 1)),
    "paligemma2-3b": paligemma(gemma2(26, 8, 4, 256)),
    "vaultgemma-1b": make_geometry(
        [Attention(4, 4, 256)] * 26, model_type="vaultgemma", max_model_len=1024
    ),
    # What its configuration class defaults to.
    "vaultgemma-sliding": gemma2(26, 4, 4, 256, model_type="vaultgemma"),
}
