"""Files that ship with the package."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from gemma_serve.planning.checkpoint import CatalogueEntry


def data_path(*parts: str) -> Path:
    """Where a file or folder of the package's data lies: `data_path("demo")`.

    The package is always installed unzipped, since vLLM reads from there too.
    """
    return Path(str(files("gemma_serve.data").joinpath(*parts)))


def load_catalogue() -> tuple[CatalogueEntry, ...]:
    """The public Gemma models, as `data/catalogue.yaml` lists them."""
    import yaml

    text = data_path("catalogue.yaml").read_text(encoding="utf-8")
    return tuple(
        CatalogueEntry(
            id=model["id"],
            generation=family["generation"],
            model_type=model.get("model_type", family["model_type"]),
            weights_bytes=model["weights_bytes"],
            approximate=model.get("approximate", False),
            max_position_embeddings=model.get(
                "max_position_embeddings", family["max_position_embeddings"]
            ),
            system_role=family["system_role"],
            chat=model["chat"],
        )
        for family in yaml.safe_load(text)
        for model in family["models"]
    )
