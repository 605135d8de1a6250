"""The towers that a config.json describes, with transformers' defaults for what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_serve.planning.model import towers
from gemma_serve.planning.model.config_reader import MOST_LAYERS, ConfigReader
from gemma_serve.planning.model.geometry import Modality, Parameter, Tower

# What Gemma 4's video processor takes: 32 frames of up to 70 tokens, each with two marks and up to
# six tokens of its time (gemma4_mm.py).
_VIDEO_TOKENS = 32 * (70 + 2 + 6)

# The processor's own limit; config.json doesn't have it.
_GEMMA_4_AUDIO_TOKENS = 750

_SIGLIP: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
}
# What PaliGemma takes where a config has no vision_config at all.
_PALIGEMMA_VISION: Mapping[str, Any] = {
    **_SIGLIP,
    "hidden_size": 1152,
    "intermediate_size": 4096,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
}
_GEMMA_3N_VISION: Mapping[str, Any] = {
    "architecture": "mobilenetv5_300m_enc",
    "hidden_size": 2048,
    "vocab_size": 128,
}
_GEMMA_3N_AUDIO: Mapping[str, Any] = {
    "vocab_size": 128,
    "input_feat_size": 128,
    "hidden_size": 1536,
    "conf_attention_chunk_size": 12,
    "conf_attention_context_left": 13,
    "conf_attention_context_right": 0,
    "conf_num_attention_heads": 8,
    "conf_num_hidden_layers": 12,
    "conf_conv_kernel_size": 5,
    "sscp_conv_channel_size": (128, 32),
    "sscp_conv_kernel_size": ((3, 3), (3, 3)),
    "sscp_conv_stride_size": ((2, 2), (2, 2)),
}
_GEMMA_4_VISION: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "head_dim": 64,
    "patch_size": 16,
    "position_embedding_size": 10 * 1024,
    "use_clipped_linears": False,
    "standardize": False,
    "default_output_length": 280,
}
_GEMMA_4_AUDIO: Mapping[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "subsampling_conv_channels": (128, 32),
    "conv_kernel_size": 5,
    "use_clipped_linears": True,
    "output_proj_dims": 1536,
}
_UNIFIED_VISION: Mapping[str, Any] = {
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "mm_embed_dim": 3840,
    "mm_posemb_size": 1120,
    "output_proj_dims": 3840,
    "num_soft_tokens": 280,
}
_UNIFIED_AUDIO: Mapping[str, Any] = {"audio_embed_dim": 640}
_WRAPPER: Mapping[str, Any] = {
    "mm_tokens_per_image": 256,
    "vision_soft_tokens_per_image": 256,
    "audio_soft_tokens_per_image": 188,
    "projection_dim": 2048,
}


def read_towers(model_type: str, config: ConfigReader, text_size: int) -> tuple[Tower, ...]:
    """The towers of a model; none for one that only reads text.

    Args:
        text_size: the width of the language model.

    Raises:
        ModelConfigError: a tower's sizes make no sense.
    """
    config = config.with_defaults(_WRAPPER)
    if model_type == "gemma3":
        return _gemma3(config, text_size)
    if model_type == "paligemma":
        return _paligemma(config)
    if model_type == "gemma3n":
        return _gemma3n(config, text_size)
    if model_type == "gemma4":
        return _gemma4(config, text_size)
    if model_type == "gemma4_unified":
        return _gemma4_unified(config, text_size)
    return ()


def _tower(
    modality: Modality, tokens: int, contents: list[Parameter], *, optional: bool = True
) -> Tower:
    weights = towers.count_weights(contents)
    return Tower(modality, weights, tokens, tuple(contents), optional)


def _sizes(tower: ConfigReader) -> towers.EncoderSizes:
    """Sizes under their usual keys; a config without key-value heads has as many as heads."""
    hidden, heads = tower.whole("hidden_size"), tower.whole("num_attention_heads")
    if not tower.get("head_dim") and hidden % heads:
        raise tower.error("hidden_size", f"a multiple of the {heads} attention heads")
    return towers.EncoderSizes(
        hidden_size=hidden,
        intermediate_size=tower.whole("intermediate_size"),
        layers=tower.whole("num_hidden_layers", most=MOST_LAYERS),
        heads=heads,
        head_size=tower.whole("head_dim") if tower.get("head_dim") else hidden // heads,
        kv_heads=tower.whole("num_key_value_heads") if tower.get("num_key_value_heads") else heads,
    )


def _siglip(vision: ConfigReader) -> tuple[int, int, list[Parameter]]:
    """SigLIP's width, how many patches it makes of an image, and its tensors."""
    side = vision.whole("image_size") // vision.whole("patch_size")
    if not side:
        raise vision.error("image_size", "at least one patch")
    sizes = _sizes(ConfigReader({**vision.values, "head_dim": None}, vision.place, vision.defaults))
    contents = towers.siglip(
        sizes,
        channels=vision.whole("num_channels"),
        patch=vision.whole("patch_size"),
        positions=side**2,
    )
    return sizes.hidden_size, side**2, contents


def _gemma3(config: ConfigReader, text_size: int) -> tuple[Tower, ...]:
    width, _, contents = _siglip(config.section_or_empty("vision_config", _SIGLIP))
    contents += towers.gemma3_projector(width, text_size)
    return (_tower("image", config.whole("mm_tokens_per_image"), contents),)


def _paligemma(config: ConfigReader) -> tuple[Tower, ...]:
    vision = config.section("vision_config", _SIGLIP)
    width, patches, contents = _siglip(
        vision or ConfigReader({}, "vision_config.", _PALIGEMMA_VISION)
    )
    # The wrapper's own value replaces the one that stands in vision_config.
    contents += towers.paligemma_projector(width, config.whole("projection_dim"))
    return (_tower("image", patches, contents),)


def _gemma3n(config: ConfigReader, text_size: int) -> tuple[Tower, ...]:
    vision = config.section_or_empty("vision_config", _GEMMA_3N_VISION)
    if vision.text("architecture") != _GEMMA_3N_VISION["architecture"]:
        raise vision.error("architecture", "mobilenetv5_300m_enc")
    vision_embedder = towers.gemma3n_embedder(
        vision.whole("hidden_size"), vision.whole("vocab_size"), text_size
    )
    audio = config.section_or_empty("audio_config", _GEMMA_3N_AUDIO)
    audio_embedder = towers.gemma3n_embedder(
        audio.whole("hidden_size"), audio.whole("vocab_size"), text_size
    )
    return (
        _tower(
            "image",
            config.whole("vision_soft_tokens_per_image"),
            towers.mobilenet_v5() + vision_embedder,
        ),
        _tower(
            "audio",
            config.whole("audio_soft_tokens_per_image"),
            towers.gemma3n_audio(_gemma3n_audio_sizes(audio)) + audio_embedder,
        ),
    )


def _gemma3n_audio_sizes(audio: ConfigReader) -> towers.Gemma3nAudioSizes:
    kernels = audio.two_pairs("sscp_conv_kernel_size")
    frequencies = audio.whole("input_feat_size")
    for (_, kernel), (_, stride) in zip(
        kernels, audio.two_pairs("sscp_conv_stride_size"), strict=True
    ):
        # One frequency is added on either side.
        frequencies = (frequencies + 2 - kernel) // stride + 1
    if frequencies < 1:
        raise audio.error("sscp_conv_kernel_size", "a kernel within the features")
    chunk = audio.whole("conf_attention_chunk_size")
    left = audio.whole("conf_attention_context_left", least=0)
    return towers.Gemma3nAudioSizes(
        hidden_size=audio.whole("hidden_size"),
        layers=audio.whole("conf_num_hidden_layers", most=MOST_LAYERS),
        heads=audio.whole("conf_num_attention_heads"),
        channels=audio.pair("sscp_conv_channel_size"),
        kernels=kernels,
        frequencies=frequencies,
        conv_kernel=audio.whole("conf_conv_kernel_size"),
        chunk=chunk,
        context=chunk + max(left - 1, 0) + audio.whole("conf_attention_context_right", least=0),
    )


def _gemma4(config: ConfigReader, text_size: int) -> tuple[Tower, ...]:
    vision = config.section("vision_config", _GEMMA_4_VISION)
    if vision is None:
        return ()
    sizes = _sizes(vision)
    quantizable = towers.gemma4_quantizes_towers(sizes)
    contents = towers.gemma4_vision(
        sizes,
        patch=vision.whole("patch_size"),
        positions=vision.whole("position_embedding_size"),
        clipped=vision.switch("use_clipped_linears"),
        standardize=vision.switch("standardize"),
    )
    contents += towers.gemma4_embedder(sizes.hidden_size, text_size, quantizable=quantizable)
    found = [_tower("image", vision.whole("default_output_length"), contents)]
    found.append(Tower("video", 0, _VIDEO_TOKENS))
    if audio := config.section("audio_config", _GEMMA_4_AUDIO):
        found.append(_gemma4_audio(audio, text_size, quantizable=quantizable))
    return tuple(found)


def _gemma4_audio(audio: ConfigReader, text_size: int, *, quantizable: bool) -> Tower:
    output = audio.whole("output_proj_dims")
    contents = towers.gemma4_audio(
        _sizes(ConfigReader({**audio.values, "intermediate_size": 1}, audio.place, audio.defaults)),
        channels=audio.pair("subsampling_conv_channels"),
        conv_kernel=audio.whole("conv_kernel_size"),
        output_size=output,
        clipped=audio.switch("use_clipped_linears"),
        quantizable=quantizable,
    )
    contents += towers.gemma4_embedder(output, text_size, quantizable=quantizable)
    return _tower("audio", _GEMMA_4_AUDIO_TOKENS, contents)


def _gemma4_unified(config: ConfigReader, text_size: int) -> tuple[Tower, ...]:
    """vLLM builds these embedders even where only text is served."""
    found: list[Tower] = []
    if vision := config.section("vision_config", _UNIFIED_VISION):
        side = vision.whole("patch_size") * vision.whole("pooling_kernel_size")
        size = vision.whole("mm_embed_dim")
        contents = towers.unified_vision_embedder(side, vision.whole("mm_posemb_size"), size)
        output = vision.whole("output_proj_dims")
        contents += towers.gemma4_embedder(output, text_size, quantizable=False)
        tokens = vision.whole("num_soft_tokens")
        found.append(_tower("image", tokens, contents, optional=False))
        found.append(Tower("video", 0, _VIDEO_TOKENS, optional=False))
    if audio := config.section("audio_config", _UNIFIED_AUDIO):
        contents = towers.gemma4_embedder(
            audio.whole("audio_embed_dim"), text_size, quantizable=False
        )
        found.append(_tower("audio", _GEMMA_4_AUDIO_TOKENS, contents, optional=False))
    return tuple(found)
