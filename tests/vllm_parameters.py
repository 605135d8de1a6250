"""What vLLM itself allocates for a model: run by the engine's interpreter, never imported.

Reads a list of cases from standard input, as JSON, builds each case's model on the meta device,
which holds shapes and no values, and prints one line of JSON per case:

    {"name", "parameters": bytes, "buffers": bytes, "plain": bytes, "tensors": [[name, dtype,
    shape], ...]}

`plain` are tensors that are neither parameters nor buffers. With "checkpoint" in a case, `tensors`
is what transformers would save of the same model; otherwise it is empty.
"""

import importlib.abc
import importlib.machinery
import json
import os
import sys
import tempfile
import types
from pathlib import Path

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}

# What is printed before the first case (warnings of libraries) must not mix with the answers.
ANSWERS = os.dup(1)
os.dup2(2, 1)

import torch  # noqa: E402

SAFETENSORS_NAMES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


class _Anything(type):
    """A class that has whatever is asked of it."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Stub(types.ModuleType):
    """A module in which everything can be found, and nothing works."""

    __path__ = ()

    def __getattr__(self, name):
        return _Anything.__getattr__(type(self), name)


class _StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, which image processors import and no model's shape needs."""

    def find_spec(self, fullname, path, target=None):
        if fullname.partition(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Stub(spec.name)

    def exec_module(self, module):
        return None


class _Ranks:
    """A group of processes of which only the first exists."""

    rank = rank_in_group = local_rank = first_rank = last_rank = 0
    is_first_rank = is_last_rank = True
    device_group = cpu_group = device_communicator = None
    unique_name = "none"

    def __init__(self, world_size):
        self.world_size = world_size
        self.ranks = list(range(world_size))


def pretend_ranks(tensor_parallel_size):
    import vllm.distributed.parallel_state as state

    for name in ("_TP", "_PP", "_DP", "_EP", "_DCP", "_PCP", "_EPLB", "_WORLD"):
        if hasattr(state, name):
            split = name in ("_TP", "_EP", "_WORLD")
            setattr(state, name, _Ranks(tensor_parallel_size if split else 1))


def build(case, folder):
    """The model of a case as vLLM builds it, without values."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    tensor_parallel_size = case.get("tensor_parallel_size", 1)
    pretend_ranks(tensor_parallel_size)
    rotary_embedding._ROPE_DICT.clear()
    config = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype=case.get("dtype", "bfloat16"),
        max_num_batched_tokens=case["max_num_batched_tokens"],
        enforce_eager=True,
        **({"language_model_only": True} if case.get("language_model_only") else {}),
    ).create_engine_config()
    config.parallel_config.tensor_parallel_size = tensor_parallel_size
    dtype = config.model_config.dtype
    with (
        set_current_vllm_config(config),
        set_default_torch_dtype(dtype),
        torch.device("meta"),
    ):
        return initialize_model(config)


def saved_tensors(folder):
    """Names, dtypes and shapes of the checkpoint that transformers would save."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    architecture = getattr(transformers, config.architectures[0])
    with torch.device("meta"):
        model = architecture._from_config(config, dtype=torch.bfloat16)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    return [
        [name, SAFETENSORS_NAMES[tensor.dtype], list(tensor.shape)]
        for name, tensor in model.state_dict().items()
        if name not in tied or not getattr(config, "tie_word_embeddings", True)
    ]


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def plain_tensors(model):
    """Tensors that modules keep as mere attributes, but not the KV cache's place."""
    seen = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        for name, value in vars(module).items():
            if name == "kv_cache" or name.endswith("_cpu") or id(value) in seen:
                continue
            if isinstance(value, torch.Tensor):
                seen.add(id(value))
                yield value


def measure(case):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(case["config"]))
        # First, since vLLM changes the classes that it runs in transformers' code.
        tensors = saved_tensors(folder) if case.get("checkpoint") else []
        model = build(case, folder)
        return {
            "name": case["name"],
            "parameters": size(model.parameters()),
            "buffers": size(model.buffers()),
            "plain": size(plain_tensors(model)),
            "tensors": tensors,
        }


def main():
    cases = json.load(sys.stdin)
    from vllm.model_executor.layers import activation
    from vllm.model_executor.models import registry

    # Only now, when transformers knows that torchvision is missing.
    sys.meta_path.append(_StubFinder())

    # In a process of its own it would take seconds for each architecture.
    registry._run_in_subprocess = lambda inspect: inspect()
    # It computes a number on the way, for which it needs values.
    sparse_init = activation.GeluAndMulSparse.__init__

    def with_values(self, *args, **kwargs):
        with torch.device("cpu"):
            sparse_init(self, *args, **kwargs)

    activation.GeluAndMulSparse.__init__ = with_values
    for case in cases:
        os.write(ANSWERS, (json.dumps(measure(case)) + "\n").encode())


if __name__ == "__main__":
    main()
