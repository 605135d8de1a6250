"""Which flags an installed vLLM's server takes, read from its source without importing it."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Where the server's parser is made: in 0.30 and later, and in 0.27 and before.
_FRONT_ENDS = ("entrypoints/launchers/cli_args.py", "entrypoints/openai/cli_args.py")
# The parser's own, and one that old releases read before they parse.
_ALWAYS = frozenset({"-h", "--help", "--config"})
# 0.8.5 has 157, 0.32.0 430; fewer means that the source is not what it was taken for.
_FEWEST = 100
# The parser looks at the types inside of these.
_WRAPPERS = ("Optional", "Union", "Annotated", "SkipValidation")


class _NotUnderstoodError(Exception):
    """Flags are added in a way that isn't known here."""


def read_serve_flags(package: Path) -> frozenset[str] | None:
    """Every flag of vLLM's OpenAI server, as its parser has them.

    Args:
        package: the folder of the installed `vllm` package.

    Returns:
        the long and the short ones with their dashes, and `--no-NAME` of each switch; None where
        the source can't be read or isn't understood. What a plugin adds is not among them.
    """
    front_end = next((package / name for name in _FRONT_ENDS if (package / name).is_file()), None)
    if front_end is None:
        return None
    config = package / "config"
    configs = sorted(config.glob("*.py")) if config.is_dir() else [package / "config.py"]
    try:
        server = front_end.read_text("utf-8")
        engine = (package / "engine" / "arg_utils.py").read_text("utf-8")
        source = _Source((server, engine), tuple(file.read_text("utf-8") for file in configs))
        flags = _ALWAYS.union(_of_function(source, _block(server, "def", "make_arg_parser")))
    except (OSError, ValueError, SyntaxError, RecursionError, _NotUnderstoodError):
        return None
    return flags if len(flags) >= _FEWEST else None


@dataclass(frozen=True)
class _Source:
    """The text of the files that make the parser, and of those with the classes of settings."""

    parsers: tuple[str, ...]
    configs: tuple[str, ...]
    fields: dict[str, dict[str, ast.expr]] = field(default_factory=dict)  # read once a class

    def find_class(self, name: str) -> str:
        """The text of a class, or "" if it is elsewhere."""
        texts = (*self.parsers, *self.configs)
        return next((block for text in texts if (block := _block(text, "class", name))), "")


def _block(text: str, keyword: str, name: str) -> str:
    """The text from a class or function to the next, or "".

    Parsing whole files would take too long.
    """
    # The plain search is much quicker, and mostly enough.
    opening = f"{keyword} {name}"
    if opening not in text or not (start := re.search(rf"^( *){opening}\b", text, re.MULTILINE)):
        return ""
    # Only at another definition: texts of several lines may stand at the left edge.
    edge = re.compile(rf"^ {{0,{len(start[1])}}}(?:@|class |def |async def )\w", re.MULTILINE)
    end = edge.search(text, start.end())
    block = text[start.start() : end.start() if end else len(text)]
    return textwrap.dedent(block) if start[1] else block


def _of_function(source: _Source, block: str, owner: str = "") -> Iterator[str]:
    """The flags that a function adds to its parser; `owner` is the class that it is called on."""
    function = _parse(block)
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    variables = {
        node.targets[0].id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    of_all_fields = any(_settings_class(call, {}) in ("cls", owner) for call in calls if owner)
    for call in calls:
        match call.func:
            case ast.Attribute(attr="add_argument") if of_all_fields:
                yield from _of_fields(source, owner)
            case ast.Attribute(attr="add_argument"):
                yield from _of_argument(source, call, variables)
            case ast.Attribute(attr="add_cli_args", value=ast.Name(id=name)):
                yield from _of_function(source, _method(source, name, "add_cli_args"), name)
            # A platform changes the choices of flags that are there already.
            case ast.Attribute(attr="pre_register_and_update"):
                pass
            case _ if any(isinstance(arg, ast.Name) and arg.id == "parser" for arg in call.args):
                raise _NotUnderstoodError(ast.unparse(call))


def _parse(block: str) -> ast.stmt:
    if not block:
        raise _NotUnderstoodError
    return ast.parse(block).body[0]


def _method(source: _Source, owner: str, name: str) -> str:
    """The text of a class's method, its own or inherited."""
    block = source.find_class(owner)
    if own := _block(block, "def", name):
        return own
    return next((found for base in _bases(block) if (found := _method(source, base, name))), "")


def _bases(block: str) -> tuple[str, ...]:
    header = re.match(r"class \w+\(([^)]*)\)", block)
    return tuple(re.findall(r"\w+", header[1])) if header else ()


def _of_argument(
    source: _Source, call: ast.Call, variables: Mapping[str, ast.expr]
) -> Iterator[str]:
    for arg in call.args:
        if not (isinstance(arg, ast.Constant) and isinstance(arg.value, str)):
            raise _NotUnderstoodError(ast.unparse(call))
        if arg.value.startswith("-"):
            yield from _spellings(arg.value, _is_switch(source, call.keywords, variables))


def _spellings(flag: str, is_switch: bool) -> Iterator[str]:
    yield flag
    if is_switch and flag.startswith("--"):
        yield f"--no-{flag[2:]}"


def _of_fields(source: _Source, owner: str) -> Iterator[str]:
    """The flags of a loop over all fields of the class that the function is called on."""
    for name, annotation in _fields(source, owner).items():
        yield from _spellings(f"--{name.replace('_', '-')}", _is_boolean(source, annotation))


def _is_switch(
    source: _Source, keywords: list[ast.keyword], variables: Mapping[str, ast.expr]
) -> bool:
    """Whether an argument of these keywords takes `--no-NAME` too."""
    return any(
        "BooleanOptionalAction" in ast.unparse(keyword.value)
        if keyword.arg == "action"
        else keyword.arg is None and _makes_switch(source, keyword.value, variables)
        for keyword in keywords
    )


def _makes_switch(source: _Source, kwargs: ast.expr, variables: Mapping[str, ast.expr]) -> bool:
    """As `_is_switch`, of what follows `**`. Where it can't be told, `--no-NAME` is taken."""
    match kwargs:
        case ast.Name(id=name) if name in variables:
            return _makes_switch(source, variables[name], variables)
        case ast.Dict(keys=keys, values=values):
            parts = [value for key, value in zip(keys, values, strict=True) if key is None]
            return any(_makes_switch(source, part, variables) for part in parts)
        case ast.Subscript(value=settings, slice=ast.Constant(value=str(name))):
            fields = _fields(source, _settings_class(settings, variables))
            return name not in fields or _is_boolean(source, fields[name])
    return True


def _settings_class(value: ast.expr, variables: Mapping[str, ast.expr]) -> str:
    """`Settings` of `get_kwargs(Settings)`, or "" for anything else."""
    match value:
        case ast.Name(id=name) if name in variables:
            return _settings_class(variables[name], {})
        case ast.Call(func=ast.Name(id="get_kwargs"), args=[ast.Name(id=name)]):
            return name
    return ""


def _fields(source: _Source, name: str) -> dict[str, ast.expr]:
    """The annotated fields of a class and those that it inherits."""
    if name not in source.fields:
        block = source.find_class(name)
        inherited = [_fields(source, base) for base in _bases(block)]
        own = _own_fields(block) if block else {}
        source.fields[name] = {key: of[key] for of in (*inherited, own) for key in of}
    return source.fields[name]


def _own_fields(block: str) -> dict[str, ast.expr]:
    return {
        part.target.id: part.annotation
        for part in getattr(_parse(block), "body", [])
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }


def _is_boolean(source: _Source, annotation: ast.expr) -> bool:
    names = set(_type_names(annotation))
    # Some releases make a flag with an optional value of this one.
    if names == {"bool", "str", "None"} and "{bool, str, type(None)}" in source.parsers[1]:
        return False
    return "bool" in names


def _type_names(annotation: ast.expr) -> Iterator[str]:
    """The types that an annotation is a union of."""
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            yield from _type_names(left)
            yield from _type_names(right)
        case ast.Subscript(value=ast.Name(id=wrapper), slice=inner) if wrapper in _WRAPPERS:
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            for part in parts if wrapper == "Union" else parts[:1]:
                yield from _type_names(part)
        case _:
            yield ast.unparse(annotation)
