"""A model folder's own chat template."""

from __future__ import annotations

import json
from pathlib import Path

_REFUSAL = "System role not supported"


def own_chat_template(folder: Path) -> str | None:
    """The chat template of the model in `folder`, or None where it has none (a base model)."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return _in_tokenizer_config(folder / "tokenizer_config.json")


def _in_tokenizer_config(path: Path) -> str | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    if isinstance(value, list):  # several templates by name; "default" is the one for chats
        value = next((t.get("template") for t in value if t.get("name") == "default"), None)
    return value if isinstance(value, str) else None


def refuses_system_role(template: str) -> bool:
    """Whether `template` raises on a system message, as those of Gemma 1 and 2 do."""
    return _REFUSAL in template
