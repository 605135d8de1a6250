# ruff: noqa: E501  # log lines are as long as they are
"""What the engine's log says: its phases, and the error that ended it."""

import pytest

from gemma_serve.engine.last_error import last_error
from gemma_serve.engine.log import LogLines, PhaseSeen, bare_message, phase_of

CORE = "(EngineCore pid=20534) "
API = "(APIServer pid=20441) "


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (API + "INFO 11-22 10:51:10 [model.py:733] Resolved architecture: GemmaForCausalLM",
         PhaseSeen("configuration")),
        (CORE + "INFO 11-22 10:51:16 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='x'",
         PhaseSeen("engine core")),
        ("(Worker pid=20621) INFO 11-22 10:51:23 [cpu_model_runner.py:68] Starting to load model /models/tiny-gemma...",
         PhaseSeen("weights")),
        ("Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:00<00:00, 352.76it/s]",
         PhaseSeen("weights", "50 %")),
        (CORE + "INFO 11-22 09:50:13 [backends.py:1105] Dynamo bytecode transform time: 3.2 s",
         PhaseSeen("compilation")),
        (CORE + "INFO 11-22 10:51:24 [kv_cache_utils.py:2327] CPU KV cache size: 4,194,304 tokens, Maximum",
         PhaseSeen("KV cache")),
        (CORE + "INFO 11-22 09:50:13 [gpu_worker.py:440] Available KV cache memory: 108.13 GiB",
         PhaseSeen("KV cache")),
        ("Capturing CUDA graphs (decode, FULL):  50%|█████     | 18/35", PhaseSeen("CUDA graphs")),
        (API + "INFO 11-22 10:51:28 [entry.py:140] Starting vLLM server on http://127.0.0.1:8011",
         PhaseSeen("API server")),
        (API + "WARNING 11-22 10:51:10 [vllm.py:1703] Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup.", None),
        ("nobody knows this line", None),
        ("", None),
    ],
)  # fmt: skip
def test_a_line_tells_its_phase(line, seen):
    assert phase_of(line) == seen


def test_lines_come_out_whole_however_they_arrive():
    text = "one\ntwo 10%\rtwo 20%\r\nthree\nrest"
    for size in (1, 2, 5, 100):
        lines = LogLines()
        found = [x for i in range(0, len(text), size) for x in lines.feed(text[i : i + size])]
        assert found == ["one", "two 10%", "two 20%", "three"]


def test_a_message_without_its_prefixes():
    assert (
        bare_message("\x1b[0;36m(EngineCore pid=1)\x1b[0m ERROR 11-22 10:51:24 [core.py:1] x")
        == "x"
    )
    assert bare_message("plain") == "plain"


FAILED_START = f"""\
{CORE}ERROR 11-22 10:51:24 [core.py:1510] EngineCore failed to start.
{CORE}ERROR 11-22 10:51:24 [core.py:1510] Traceback (most recent call last):
{CORE}ERROR 11-22 10:51:24 [core.py:1510]   File "/venv/vllm/v1/engine/core.py", line 900, in run
{CORE}ERROR 11-22 10:51:24 [core.py:1510] ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`
{CORE}Process EngineCore:
{CORE}Traceback (most recent call last):
{CORE}ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`
{API}Traceback (most recent call last):
{API}RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (FAILED_START,
         "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`"),
        ("api_server.py: error: unrecognized arguments: --nonsense\n",
         "unrecognized arguments: --nonsense"),
        (API + "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
         + API + "  Value error, User-specified max_model_len (99999) is greater than the derived "
         "max_model_len. [type=value_error, input_value=ArgsKwargs(), input_type=ArgsKwargs]\n",
         "ValueError: User-specified max_model_len (99999) is greater than the derived max_model_len."),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 96.00 MiB.\n",
         "OutOfMemoryError: CUDA out of memory. Tried to allocate 96.00 MiB."),
        ("RuntimeError: Engine core initialization failed. See root cause above.\n", None),
        ("INFO:     Application startup complete.\nValueError:\n", None),
        ("", None),
    ],
)  # fmt: skip
def test_the_last_error_that_is_no_wrapper(log, error):
    assert last_error(log.splitlines(keepends=True)) == error
