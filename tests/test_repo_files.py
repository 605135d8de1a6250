"""Which files of a repository are brought: what vLLM reads, each weight once."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gemma_serve.planning.model.repo_files import (
    INDEX,
    RepoFile,
    files_to_serve,
    weight_names,
    with_shards_of_index,
)

TOKENIZER = [
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
]
NOT_NEEDED = [".gitattributes", "README.md"]
EXAMPLES = [
    "examples/example_fsdp.py",
    "examples/example_sft_qlora.py",
    "examples/notebook_sft_peft.ipynb",
]
EMBEDDING_PARTS = [
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "3_Dense/config.json",
    "3_Dense/model.safetensors",
]


def shards(count: int, stem: str = "model", ending: str = "safetensors") -> list[str]:
    return [f"{stem}-{n:05}-of-{count:05}.{ending}" for n in range(1, count + 1)]


def listing(names: Sequence[str]) -> list[RepoFile]:
    """A repository's files, each of another size."""
    return [RepoFile(name, size) for size, name in enumerate(names, 1)]


def chosen(names: Sequence[str]) -> list[str]:
    files = listing(names)
    found = files_to_serve(files)
    assert set(found) <= set(files)
    return [file.name for file in found]


# What is in the repository and not wanted; then what is wanted, in the order in which it is.
MODELS = {
    "gemma-2b": (
        [*NOT_NEEDED, "gemma-2b.gguf"],
        ["config.json", "generation_config.json", INDEX, *TOKENIZER, *shards(2)],
    ),
    "gemma-7b": (
        [*NOT_NEEDED, *EXAMPLES, "gemma-7b.gguf"],
        ["config.json", "generation_config.json", INDEX, *TOKENIZER, *shards(4)],
    ),
    "gemma-2-9b": (
        NOT_NEEDED,
        ["config.json", "generation_config.json", INDEX, *TOKENIZER, *shards(8)],
    ),
    "gemma-3-4b-it": (
        NOT_NEEDED,
        [
            "added_tokens.json",
            "chat_template.json",
            "config.json",
            "generation_config.json",
            INDEX,
            "preprocessor_config.json",
            "processor_config.json",
            *TOKENIZER,
            *shards(2),
        ],
    ),
    "gemma-3n-E4B-it": (
        NOT_NEEDED,
        [
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            INDEX,
            "preprocessor_config.json",
            "processor_config.json",
            *TOKENIZER,
            *shards(4),
        ],
    ),
    "embeddinggemma-300m": (
        NOT_NEEDED,
        [
            *EMBEDDING_PARTS,
            "added_tokens.json",
            "config.json",
            "config_sentence_transformers.json",
            "generation_config.json",
            "modules.json",
            "sentence_bert_config.json",
            *TOKENIZER,
            "model.safetensors",
        ],
    ),
    "pickles alone": (
        [*NOT_NEEDED, "training_args.bin", "optimizer.pt"],
        [
            "config.json",
            "pytorch_model.bin.index.json",
            "tokenizer.json",
            *shards(2, "pytorch_model", "bin"),
        ],
    ),
    "one pickle": (NOT_NEEDED, ["config.json", "tokenizer.model", "pytorch_model.bin"]),
    "both formats": (
        [*NOT_NEEDED, *shards(2, "pytorch_model", "bin"), "pytorch_model.bin.index.json"],
        ["config.json", INDEX, "tokenizer.json", *shards(2)],
    ),
    "one file in both formats": (
        ["pytorch_model.bin", "flax_model.msgpack", "tf_model.h5"],
        ["config.json", "tokenizer.json", "model.safetensors"],
    ),
    "the authors' own layout as well": (
        [
            "consolidated.safetensors",
            "consolidated.00.pth",
            "original/model.safetensors",
            "original/params.json",
            "original/tokenizer.model",
        ],
        ["config.json", "tokenizer.json", "model.safetensors"],
    ),
    "other runtimes' files": (
        [
            "gemma-Q4_K_M.gguf",
            "onnx/config.json",
            "onnx/model.onnx",
            "onnx/model.onnx_data",
            "onnx/tokenizer.json",
            "openvino/openvino_model.bin",
            "gemma.task",
            "assets/plot.png",
        ],
        ["config.json", "tokenizer.json", "model.safetensors"],
    ),
    "the whole model beside its shards": (
        ["model.safetensors"],
        ["config.json", INDEX, "tokenizer.json", *shards(2)],
    ),
    "chat templates of their own": (
        ["additional_chat_templates/notes/old.jinja"],
        [
            "additional_chat_templates/tool_use.jinja",
            "chat_template.jinja",
            "config.json",
            "model.safetensors",
        ],
    ),
}


@pytest.mark.parametrize("model", MODELS)
def test_what_vllm_needs_is_chosen_and_the_small_files_come_first(model: str) -> None:
    unwanted, wanted = MODELS[model]
    assert chosen([*unwanted, *wanted]) == wanted
    # Whatever the order in which the Hub lists them.
    assert chosen([*reversed(wanted), *reversed(unwanted)]) == wanted


def test_nothing_is_chosen_of_nothing() -> None:
    assert chosen([]) == []
    assert chosen(["gemma.gguf", ".gitattributes", "README.md"]) == []


def test_weights_are_those_of_one_format() -> None:
    assert weight_names(["b.safetensors", "a.safetensors"]) == ["b.safetensors", "a.safetensors"]
    assert weight_names([*shards(2), "adapter.safetensors"]) == [*shards(2), "adapter.safetensors"]
    assert weight_names([INDEX, *shards(2), "adapter.safetensors"]) == shards(2)
    assert weight_names([INDEX, "part-1.safetensors"]) == ["part-1.safetensors"]
    assert weight_names(["2_Dense/model.safetensors", "config.json"]) == []


def test_the_index_has_the_last_word_on_which_weights_these_are() -> None:
    # A commit with the shards of two sharding runs, as some repositories have.
    files = listing(["config.json", INDEX, *shards(2), *shards(3), "odd.safetensors"])
    first = files_to_serve(files)
    assert {file.name for file in first} == {"config.json", INDEX, *shards(2), *shards(3)}

    def named(names: Sequence[str] | None) -> list[str]:
        return [
            file.name
            for file in with_shards_of_index(first, files, None if names is None else set(names))
        ]

    assert named(shards(2)) == ["config.json", INDEX, *shards(2)]
    # It may name what did not look like a shard.
    assert named(["odd.safetensors", shards(3)[0]]) == [
        "config.json",
        INDEX,
        shards(3)[0],
        "odd.safetensors",
    ]
    # What the Hub does not list can't be brought.
    assert named([*shards(2), "lost.safetensors"]) == ["config.json", INDEX, *shards(2)]
    assert named([]) == ["config.json", INDEX]
    # Nor is anything written beside the model's own folder.
    outside = ["../up.safetensors", "a/../../up.safetensors", "/tmp/up.safetensors"]
    files += listing(outside)
    assert named([*outside, *shards(2)]) == ["config.json", INDEX, *shards(2)]
    assert with_shards_of_index(first, files, None) == first
