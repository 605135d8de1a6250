"""What a tower needs in vLLM's profile run: the encoder's own forward, and the outputs it leaves.

The forward follows from the sources, not from a measurement; its margin says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_serve.planning.model.geometry import Geometry, Parameter, Tower

# A soft token stands for 3 x 3 patches (transformers, Gemma4VisionConfig.pooling_kernel_size).
_GEMMA_4_PATCHES_PER_TOKEN = 9

# The widest step of MobileNet V5 on 768 x 768 pixels: an expanded block at a quarter of the
# resolution, its input and output (timm, mobilenetv5_300m).
_MOBILENET_ELEMENTS_PER_ITEM = 3 * 192 * 192 * 256


@dataclass(frozen=True)
class EncoderMemory:
    """`forward_bytes` at the encoder's peak, `cached_bytes` of outputs kept until the run's end.

    `margin_share` is the part of the forward that the formula leaves open.
    """

    forward_bytes: int
    cached_bytes: int
    margin_share: float


def encoder_memory(
    geometry: Geometry,
    *,
    tokens: int,
    sequences: int,
    max_model_len: int,
    element_bytes: int,
    tensor_parallel_size: int,
) -> EncoderMemory:
    """The memory of encoding as many of the largest items as one batch of `tokens` can hold.

    Source: multimodal/encoder_budget.py, v1/worker/gpu/mm/encoder_runner.py
    (profile_encoder_cache).
    """
    if not geometry.towers:
        return EncoderMemory(0, 0, 0.0)
    largest = max(geometry.towers, key=lambda tower: (tower.tokens_per_item, tower.modality))
    per_item = max(1, largest.tokens_per_item)
    items = max(tokens, per_item) // per_item
    items = max(1, min(items, sequences * max(1, max_model_len // per_item)))
    contents = largest.contents or _image_contents(geometry.towers)
    elements, share = _item_elements(largest, contents, tensor_parallel_size)
    return EncoderMemory(
        forward_bytes=items * elements * element_bytes,
        cached_bytes=items * per_item * geometry.hidden_size * element_bytes,
        margin_share=share,
    )


def _image_contents(towers: tuple[Tower, ...]) -> tuple[Parameter, ...]:
    """Videos go through the tower of the images."""
    images = (tower.contents for tower in towers if tower.modality == "image")
    return next(images, ())


def _item_elements(
    tower: Tower, contents: tuple[Parameter, ...], tensor_parallel_size: int
) -> tuple[int, float]:
    """Elements at the peak of encoding one item, and the share that is open."""
    matrices = {parameter.name: parameter for parameter in contents}
    if "fc1" in matrices:
        return _siglip_elements(matrices, tensor_parallel_size), 0.3
    if "input_proj" in matrices:
        return tower.tokens_per_item * _gemma4_patch_elements(matrices), 0.5
    if "timm_model" in matrices:
        return _MOBILENET_ELEMENTS_PER_ITEM, 1.0
    if "patch_dense" in matrices:
        dense = matrices["patch_dense"]
        return tower.tokens_per_item * (3 * dense.columns + 2 * dense.rows[0]), 0.5
    # A tower of sound alone: its tokens are few beside those of the language model.
    return 0, 0.0


def _siglip_elements(matrices: Mapping[str, Parameter], tensor_parallel_size: int) -> int:
    """SigLIP runs eagerly: its input, the layer's, the residual, the normed one, and one step.

    Source: model_executor/models/siglip.py, SiglipEncoder and SiglipEncoderLayer.
    """
    pixels = matrices["patch_embedding"]
    hidden, inner = pixels.rows[0], matrices["fc1"].rows[0]
    mlp = 4 * hidden + 2 * inner // tensor_parallel_size
    attention = 5 * hidden + 6 * hidden // tensor_parallel_size
    patches = matrices["position_embedding"].rows[0]
    return patches * (pixels.columns + max(mlp, attention))


def _gemma4_patch_elements(matrices: Mapping[str, Parameter]) -> int:
    """Gemma 4's vision tower is transformers' own, whole on each GPU.

    Source: transformers, Gemma4VisionEncoderLayer and Gemma4VisionMLP.
    """
    pixels = matrices["input_proj"]
    hidden, inner = pixels.rows[0], matrices["gate_proj, up_proj"].rows[0]
    step = max(4 * hidden + 3 * inner, 10 * hidden)
    return _GEMMA_4_PATCHES_PER_TOKEN * (pixels.columns + step)
