"""The table of what differs between vLLM's releases."""

import pytest

from gemma_serve.adapters.package_data import load_engine_rules
from gemma_serve.planning.memory.engine_rules import least_version, parse_engine_rules, rules_for

TABLE = load_engine_rules()


def test_every_minor_release_of_the_tested_range_has_rules_in_order():
    assert [rules.release for rules in TABLE] == [(0, minor) for minor in range(26, 34)]


@pytest.mark.parametrize(
    ("version", "minor", "known"),
    [
        ("0.26.0", 26, True),
        ("0.27.1", 27, True),
        ("0.32.0+cpu", 32, True),
        ("0.33.0rc1", 33, True),
        ("v0.30.2.dev17+g0a1b2c3", 30, True),
        ("0.33", 33, True),
        (" 0.31.0\n", 31, True),
        ("0.25.1", 26, False),
        ("0.3.0", 26, False),
        ("0.34.0", 33, False),
        ("0.330.0", 33, False),
        ("1.0.0", 33, False),
        (None, 33, False),
        ("", 33, False),
        ("nightly", 33, False),
    ],
)
def test_a_version_finds_its_rules_or_the_nearest(version, minor, known):
    rules, is_known = rules_for(version, TABLE)
    assert (rules.release, is_known) == ((0, minor), known)


def test_the_rules_of_a_release_hold_until_changed():
    by_release = {rules.release[1]: rules for rules in TABLE}
    reserved = [r.release[1] for r in TABLE if r.fit_check_reserves_null_block]
    assert reserved == [29, 30, 31, 32, 33]
    assert {r.default_gpu_memory_utilization for r in TABLE} == {0.92}
    assert "fp8" in by_release[30].online_quantization_methods
    assert "fp8" not in by_release[31].online_quantization_methods
    assert "fp8_per_tensor" in by_release[26].online_quantization_methods
    assert "fp8" in by_release[33].checkpoint_quantization_methods


@pytest.mark.parametrize(
    ("architecture", "version"),
    [
        ("GemmaForCausalLM", "0.26"),
        ("Gemma4UnifiedForConditionalGeneration", "0.26"),
        ("VaultGemmaForCausalLM", "0.27"),
        ("EmbeddingGemma2Model", "0.32"),
        ("T5GemmaForConditionalGeneration", None),
    ],
)
def test_the_least_release_that_serves_an_architecture(architecture, version):
    assert least_version(architecture, TABLE) == version


def test_a_rule_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="unheard_of"):
        parse_engine_rules([{"since": "0.26", "unheard_of": 1, "architectures": []}])
