"""Which arguments vLLM's parser would refuse, and what may have been meant."""

import pytest

from gemma_serve.planning.engine_arguments import closest_flags, unknown_flags

KNOWN = frozenset(
    (
        "-h",
        "--help",
        "--model",
        "--max-model-len",
        "--max-num-seqs",
        "--max-log-len",
        "--chat-template",
        "--enforce-eager",
        "--no-enforce-eager",
        "--enable-log-requests",
        "--no-enable-log-requests",
        "--disable-log-stats",
        "--enable-auto-tool-choice",
        "--gpu-memory-utilization",
        "--tensor-parallel-size",
        "-tp",
        "--quantization",
        "-q",
        "--compilation-config",
        "-cc",
        "--optimization-level",
        "--seed",
    )
)

# Arguments, and the flags of them that are refused; the values are right, so that a real parser
# has nothing else to refuse.
ARGUMENTS = [
    ("--model x --max-model-len 4096 --enforce-eager --no-enforce-eager -tp 2", ""),
    ("--max-modl-len 4096", "--max-modl-len"),
    ("--max-modl-len=4096 --typo --max-modl-len 8", "--max-modl-len --typo"),
    ("--max_model_len 4096 --max_model_len=4096", ""),
    ("--max_modl_len 4096", "--max_modl_len"),
    ("--max-model 4096 --tensor 2", ""),  # beginnings of one flag
    ("--max 4096", "--max"),  # of several
    ("--max-model-length 4096", "--max-model-length"),
    ("--no-max-model-len", "--no-max-model-len"),
    ("--compilation-config.mode 3 -cc.mode=3 --compilation_config.splitting_ops+ b", ""),
    ("--compilation-config.backend --typo", ""),  # the value
    ("--compilation-confg.mode 3 --seed 1", "--compilation-confg"),
    (
        "--gpu-memory-utilization=.5 --gpu-memory-utilisation=.5",
        "--gpu-memory-utilisation",
    ),  # the dot is in the value
    ("-O3 -O 3 -O=3", ""),
    ("-tp=2 -t 2 -qfp8 -q=fp8", ""),
    ("-tpp 2 -host 0.0.0.0 -x", "-tpp -host -x"),
    ("--seed -1", ""),
    ("--model - x", ""),
    ("--seed 1 -- --typo", ""),
]


@pytest.mark.parametrize(("args", "refused"), ARGUMENTS)
def test_unknown_flags(args, refused):
    assert unknown_flags(args.split(), KNOWN) == tuple(refused.split())


def test_what_a_release_of_python_takes_for_a_number_is_no_flag():
    assert unknown_flags(["--seed", "-.5", "--seed", "-1e5", "-0x1"], KNOWN) == ()


def test_a_value_with_a_space_is_no_flag():
    args = ["--chat-template", "--{{ x }}", "--{% if x == 1 %}", "--max-m={{ x }}"]
    assert unknown_flags(args, KNOWN) == ()
    assert unknown_flags(["--max={{ x }}"], KNOWN) == ("--max",)


@pytest.mark.parametrize(
    ("flag", "closest"),
    [
        ("--max-modl-len", "--max-model-len --max-log-len"),
        ("--gpu_memory_utilisation", "--gpu-memory-utilization"),
        ("--max", "--max-log-len --max-num-seqs"),
        ("--enforce-eagr", "--enforce-eager"),
        ("--no-enforce-eagr", "--no-enforce-eager --enforce-eager"),
        ("--auto-tool-choice", "--enable-auto-tool-choice"),
        ("--tp", "-tp"),
        ("--disable-log-requests", "--disable-log-stats"),
        ("--swap-space", ""),
    ],
)
def test_closest_flags(flag, closest):
    assert closest_flags(flag, KNOWN) == tuple(closest.split())
