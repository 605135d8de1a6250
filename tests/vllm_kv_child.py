"""Asks vLLM's own functions what KV cache they would lay out. Run by an interpreter with vLLM.

    python vllm_kv_child.py [FOLDER-WITH-vllm] < cases.json > results.json

No GPU is needed: the CUDA platform is vLLM's own class with a compute capability put in, its
kernels are absent, and the attention layers are replaced by values (their `get_kv_cache_spec`, the
backends, the platform's block size and everything of v1/core run as they are).
"""

import contextlib
import importlib.abc
import importlib.machinery
import json
import logging
import os
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

ABSENT = (
    "flashinfer",
    "vllm._C",
    "vllm._C_stable_libtorch",
    "vllm._moe_C",
    "vllm._qutlass_C",
    "vllm.vllm_flash_attn._vllm_fa2_C",
    "vllm.vllm_flash_attn._vllm_fa3_C",
    "vllm.vllm_flash_attn.cute",
)


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for compiled modules: whatever is asked of them exists and does nothing."""

    def find_spec(self, name, path=None, target=None):
        if any(name == absent or name.startswith(absent + ".") for absent in ABSENT):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: MagicMock()
        return module

    def exec_module(self, module):
        pass


if len(sys.argv) > 1:
    sys.path.insert(0, sys.argv[1])
sys.meta_path.insert(0, Absent())
os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")

import torch  # noqa: E402
import vllm  # noqa: E402
import vllm.platforms as platforms  # noqa: E402
from vllm.platforms.cpu import CpuPlatform  # noqa: E402
from vllm.platforms.cuda import CudaPlatformBase  # noqa: E402
from vllm.platforms.interface import DeviceCapability  # noqa: E402

logging.disable(logging.CRITICAL)


class Cuda(CudaPlatformBase):
    """vLLM's CUDA platform with a capability of our choice."""

    capability = (9, 0)

    @classmethod
    def get_device_capability(cls, device_id=0):
        return DeviceCapability(*cls.capability)

    @classmethod
    def has_device_capability(cls, capability, device_id=0):
        wanted = capability if isinstance(capability, tuple) else divmod(capability, 10)
        return cls.capability >= tuple(wanted)

    @classmethod
    def is_device_capability(cls, capability, device_id=0):
        wanted = capability if isinstance(capability, tuple) else divmod(capability, 10)
        return cls.capability == tuple(wanted)

    @classmethod
    def is_device_capability_family(cls, capability, device_id=0):
        return cls.capability[0] == capability // 10

    @classmethod
    def get_device_name(cls, device_id=0):
        return "any"


class Either:
    """The platform that all modules hold on to: the CPU's while they load, then as we say."""

    now = CpuPlatform()

    def __getattr__(self, name):
        return getattr(Either.now, name)


platforms._current_platform = Either()

import vllm.config.vllm as config_module  # noqa: E402
import vllm.utils.flashinfer as flashinfer_utils  # noqa: E402
import vllm.v1.attention.backends.fa_utils as fa_utils  # noqa: E402
import vllm.v1.core.kv_cache_utils as planning  # noqa: E402
import vllm.vllm_flash_attn.flash_attn_interface as fa_interface  # noqa: E402
from vllm.config import VllmConfig  # noqa: E402
from vllm.model_executor.layers.attention.attention import Attention  # noqa: E402
from vllm.model_executor.models.config import Gemma4Config  # noqa: E402
from vllm.v1.attention.backend import AttentionType  # noqa: E402
from vllm.v1.attention.backends.registry import AttentionBackendEnum  # noqa: E402
from vllm.v1.attention.selector import AttentionSelectorConfig  # noqa: E402

for name in ("FA2_AVAILABLE", "FA3_AVAILABLE", "FA4_AVAILABLE"):
    setattr(fa_interface, name, True)
for name in (
    "compile_flash_attn_varlen_func_from_specs",
    "flash_attn_varlen_func",
    "get_scheduler_metadata",
    "reshape_and_cache_flash",
):
    if not hasattr(fa_utils, name):
        setattr(fa_utils, name, None)
for name in ("supports_trtllm_attention", "can_use_trtllm_attention"):
    if hasattr(flashinfer_utils, name):
        setattr(flashinfer_utils, name, lambda *args, **kwargs: Cuda.capability[0] == 10)
with contextlib.suppress(ImportError):
    import vllm.v1.core.kv_cache_planning as planning  # since 0.33
try:
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
except ImportError:
    from vllm.v1.kv_cache_interface import kv_cache_dtype_str_to_dtype
try:
    from vllm.v1.worker.utils import customize_attention_spec
except ImportError:

    def customize_attention_spec(backend, spec):
        if hasattr(spec, "indexes_kv_by_block_stride"):
            from dataclasses import replace

            indexes = backend.indexes_kv_by_block_stride()
            spec = replace(spec, indexes_kv_by_block_stride=indexes)
        return backend.customize_spec(spec) if hasattr(backend, "customize_spec") else spec


@contextlib.contextmanager
def current_config(config):
    config_module._current_vllm_config = config
    yield
    config_module._current_vllm_config = None


class ArchConfig:
    """The model's whole configuration and, by index, that of one layer."""

    def __init__(self, case):
        self.layers = case["layers"]
        self.total_num_hidden_layers = len(self.layers)
        self.head_size = max(layer["head_size"] for layer in self.layers)
        self.total_num_kv_heads = max(layer["kv_heads"] for layer in self.layers)

    def __getitem__(self, index):
        return SimpleNamespace(**self.layers[index])


def vllm_config(case):
    """As much of a VllmConfig as the planning reads, with VllmConfig's own arithmetic."""
    arch = ArchConfig(case)
    heads = [layer["head_size"] for layer in case["layers"]]
    kinds = ["full_attention" if h == max(heads) else "sliding_attention" for h in heads]
    text = SimpleNamespace(
        head_dim=min(heads),
        global_head_dim=max(heads),
        layer_types=kinds,
        attn_logit_softcapping=50.0 if case["softcaps"] else None,
    )
    model = SimpleNamespace(
        max_model_len=case["max_model_len"],
        original_max_model_len=case["max_model_len"],
        dtype=getattr(torch, case["dtype"]),
        hf_text_config=text,
        hf_config=SimpleNamespace(model_type=case["model_type"]),
        model_arch_config=arch,
        is_mm_prefix_lm=case["mm_prefix"],
        is_diffusion=False,
        is_hybrid=False,
        supports_kv_cache_grouping=False,
        rswa_window=None,
        get_head_size=lambda: arch.head_size,
        get_num_attention_heads=lambda parallel: case["query_heads"],
        get_num_kv_heads=lambda parallel: arch.total_num_kv_heads,
    )
    user_block = case.get("block_size")
    config = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(
            block_size=user_block or 16,
            user_specified_block_size=user_block is not None,
            cache_dtype=case["kv_cache_dtype"],
            kv_cache_dtype_skip_layers=[],
            skip_page_size_padded=None,
            num_gpu_blocks_override=case.get("num_gpu_blocks_override"),
            prefix_cache_retention_interval=None,
            get_resolved_kv_cache_layout=default_layout,
        ),
        scheduler_config=SimpleNamespace(
            async_scheduling=case["async_scheduling"],
            max_num_batched_tokens=case["max_num_batched_tokens"],
            disable_hybrid_kv_cache_manager=not case.get("hybrid_kv_cache_manager", True),
        ),
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            tensor_parallel_size=case["tensor_parallel_size"],
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
        ),
        attention_config=SimpleNamespace(
            backend=None, flash_attn_version=None, hisparse_config=None, use_non_causal=False
        ),
        speculative_config=None,
        kv_transfer_config=None,
        diffusion_config=None,
        num_prefill_lookahead_tokens=0,
        use_v2_model_runner=True,
    )
    if case.get("attention_backend"):
        config.attention_config.backend = AttentionBackendEnum[case["attention_backend"]]
    config.max_concurrent_batches = VllmConfig.max_concurrent_batches.fget(config)
    config.max_in_flight_tokens = VllmConfig.max_in_flight_tokens.fget(config)
    return config


def default_layout():
    from vllm.v1.kv_cache_interface import KVCacheLayout

    return KVCacheLayout.LBNHC


def backend_of(case, config, head_size, sliding):
    if case["capability"] is None:
        return AttentionBackendEnum.CPU_ATTN.get_class()
    wanted = AttentionSelectorConfig(
        head_size=head_size,
        dtype=config.model_config.dtype,
        kv_cache_dtype=case["kv_cache_dtype"],
        block_size=case.get("block_size"),
        use_mm_prefix=case["mm_prefix"],
        has_sliding_window=sliding,
    )
    path = Cuda.get_attn_backend_cls(config.attention_config.backend, wanted, case["query_heads"])
    from vllm.utils.import_utils import resolve_obj_by_qualname

    return resolve_obj_by_qualname(path)


def refuse_at_start(case, backends):
    """Builds the attention of each Triton layer, as the engine does once it has chosen it."""
    triton = AttentionBackendEnum.TRITON_ATTN.get_class()
    for layer, backend in zip(case["layers"], backends, strict=True):
        if backend is triton:
            backend.get_impl_cls()(
                num_heads=case["query_heads"],
                head_size=layer["head_size"],
                scale=1.0,
                num_kv_heads=layer["kv_heads"],
                alibi_slopes=None,
                sliding_window=layer["window"],
                kv_cache_dtype=case["kv_cache_dtype"],
            )


def set_block_size(case, config, backends):
    cache = config.cache_config
    if cache.user_specified_block_size:
        return
    if case["capability"] is None:
        cache.block_size = 128  # CpuPlatform.check_and_update_config
        return
    unique = list(dict.fromkeys(backends))
    if hasattr(Cuda, "_preferred_block_size_for_backends"):
        cache.block_size = Cuda._preferred_block_size_for_backends(unique, 16, config)
    else:
        cache.block_size = unique[0].get_preferred_block_size(16)


def specs_of(case, config):
    owners = [layer for layer in case["layers"] if not layer["shares_kv"]]
    tp = case["tensor_parallel_size"]
    backends = [
        backend_of(case, config, layer["head_size"], layer["window"] is not None)
        for layer in case["layers"]
    ]
    if case["capability"]:
        refuse_at_start(case, backends)
    set_block_size(case, config, backends)
    backend_by_head = {
        layer["head_size"]: backend for layer, backend in zip(case["layers"], backends, strict=True)
    }
    specs = {}
    for index, layer in enumerate(owners):
        backend = backend_by_head[layer["head_size"]]
        module = SimpleNamespace(
            attn_type=AttentionType.DECODER,
            attn_backend=backend,
            kv_cache_dtype=case["kv_cache_dtype"],
            kv_cache_torch_dtype=kv_cache_dtype_str_to_dtype(
                case["kv_cache_dtype"], config.model_config
            ),
            sliding_window=layer["window"],
            num_kv_heads=max(1, layer["kv_heads"] // tp),
            head_size=layer["head_size"],
            head_size_v=layer["head_size"],
        )
        spec = Attention.get_kv_cache_spec(module, config)
        specs[f"layers.{index}"] = customize_attention_spec(backend, spec)
    return specs, [backend.get_name() for backend in dict.fromkeys(backends)]


def answer(case):
    Cuda.capability = tuple(case["capability"] or (8, 0))
    Either.now = Cuda() if case["capability"] else CpuPlatform()
    config = vllm_config(case)
    with current_config(config):
        if case["model_type"].startswith("gemma4") and case["capability"]:
            Gemma4Config.verify_and_update_config(config)
        specs, backends = specs_of(case, config)
        available = case["available_bytes"]
        groups_of = getattr(planning, "get_global_kv_cache_groups", None)
        extra = (groups_of(config, [dict(specs)]),) if groups_of else ()
        result = {"backends": backends, "cache_block_size": config.cache_config.block_size}
        try:
            (layout,) = planning.get_kv_cache_configs(config, [specs], [available], *extra)
        except ValueError as error:
            return {**result, **refused(str(error))}
        scheduler = planning_function("generate_scheduler_kv_cache_config")([layout])
        tokens, concurrency = planning_function("get_kv_cache_capacity")(config, scheduler)
        return {
            **result,
            "fits": True,
            "groups": sorted(
                [g.kv_cache_spec.block_size, len(g.layer_names)] for g in scheduler.kv_cache_groups
            ),
            "num_blocks": layout.num_blocks,
            "tokens": tokens,
            "max_concurrency": concurrency,
        }


def refused(message):
    """What vLLM says of a cache that is too small: the longest length that would fit."""
    found = message.partition("maximum model length is ")[2].partition(".")[0]
    known = "model's max seq len" in message or "No available memory" in message
    if not known:
        raise ValueError(message)
    return {"fits": False, "longest_model_len": int(found or 0)}


def planning_function(name):
    import vllm.v1.core.kv_cache_utils as utils

    return getattr(utils, name, None) or getattr(planning, name)


def main():
    config_module.set_current_vllm_config = lambda config: contextlib.nullcontext()
    results = []
    for case in json.load(sys.stdin):
        try:
            results.append(answer(case))
        except (ValueError, NotImplementedError) as error:
            results.append({"refused": str(error)})
    json.dump({"version": vllm.__version__, "results": results}, sys.stdout)


if __name__ == "__main__":
    main()
