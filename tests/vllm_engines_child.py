"""Starts real vLLM engines one after another on the CPU and says what KV cache each has.

    python vllm_engines_child.py < cases.json

Run by an interpreter with vLLM. A case is {"model": FOLDER, ...engine arguments...}; each line of
the output answers one: the fields of `vllm:cache_config_info`, or vLLM's refusal.
"""

import gc
import json
import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: no import for each
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",  # nothing is generated, so compiling is lost time
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM
from vllm.distributed import cleanup_dist_env_and_memory


def answer(case):
    try:
        llm = LLM(
            **case, enforce_eager=True, skip_tokenizer_init=True, disable_log_stats=True, seed=0
        )
    except (ValueError, RuntimeError) as error:
        return {"refused": str(error)}
    info = llm.llm_engine.vllm_config.cache_config.metrics_info()
    llm.llm_engine.engine_core.shutdown()
    return info


for case in json.load(sys.stdin):
    print("answer", json.dumps(answer(case)), flush=True)
    gc.collect()
    cleanup_dist_env_and_memory()
