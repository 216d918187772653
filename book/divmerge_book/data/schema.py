"""YAML and JSON files that users write: validated by pydantic, with the line in every error."""

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

KINDS = (".yaml", ".yml", ".json")
PAIR = re.compile(r"\\ud[89ab]..\\ud[c-f]..", re.IGNORECASE)  # a character beyond 16 bits


class Text(str):
    """A scalar as written; `value` is what YAML reads in it.

    `labels: [no, yes]` are two words for a field of type str, and not two truth values.
    """

    value: object


class Fields(BaseModel):
    """A mapping with these fields and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def known(cls, data: Any) -> Any:
        return data if isinstance(data, cls) else check_names(data, cls.model_fields)


Schema = TypeVar("Schema", bound=Fields)


def check_names(data: Any, allowed: Iterable[str]) -> Any:
    """The data itself. Raises an error that names the nearest allowed field."""
    allowed = list(allowed)
    if not isinstance(data, Mapping):
        raise PydanticCustomError("mapping", f"must be fields with values: {', '.join(allowed)}")
    for name in data:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            text = f"unknown field {name!r}; allowed: {', '.join(allowed)}{hint}"
            raise error_at(name, text)
    return data


def error_at(field: str, text: str) -> PydanticCustomError:
    """An error of a mapping, reported at the line of one of its fields."""
    return PydanticCustomError("field", "{text}", {"text": text, "field": field})


def at_home(path: Path) -> Path:
    """The path with a home folder for its ~. Raises ValueError where no such user is here."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{path} begins with ~ and no user here is called so; write ./~"
        ) from error


def from_the_folder(path: Path, info: Any) -> Path:
    """A path of the file; relative paths start at the file's folder."""
    return Path(info.context["folder"] if info.context else "", at_home(path))


FilePath = Annotated[Path, AfterValidator(from_the_folder)]


def read_file(
    path: str | os.PathLike, schema: type[Schema], what: str, **context: object
) -> Schema:
    """The file as a `schema`; fields whose value is null count as absent.

    what: how errors call the file, such as `description`. context: passed to validators, with the
    file's `folder`. Raises ValueError, with file and line, for a file that is missing, empty or no
    YAML or JSON, for repeated, unknown or missing fields, and for values of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no {what} {path}; it is a YAML or JSON file")
    root = nodes(path, what)
    if root is None:
        needed = ", ".join(schema.model_fields)
        raise ValueError(f"{path} is empty; a {what} has the fields {needed}")
    try:
        context = {**context, "folder": path.parent}
        return schema.model_validate(plain(path, root), context=context)
    except RecursionError:
        raise ValueError(
            f"{path}: an alias (*) stands inside of what it names; write it out"
        ) from None
    except ValidationError as error:
        raise ValueError(error_message(path, root, error)) from None


def nodes(path: Path, what: str) -> yaml.Node | None:
    """The file as a tree of YAML nodes, which know their lines."""
    if path.suffix not in KINDS:
        raise ValueError(f"{path}: a {what} ends in {', '.join(KINDS)}")
    try:
        text = path.read_text("utf-8-sig")
        if path.suffix == ".json":
            json.loads(text)
            text = text.replace("\t", " ")  # JSON may indent with tabs, YAML may not,
            text = PAIR.sub(lambda found: json.loads(f'"{found[0]}"'), text)  # nor escape so
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        hint = "; indent with spaces" * ("\\t" in str(error.problem))
        hint += "; give each a file of its own" * ("another document" in str(error.problem))
        raise ValueError(f"{path}, line {line}: {error.problem}{hint}") from error
    except yaml.YAMLError as error:  # a character that cannot be printed
        raise ValueError(f"{path} is no YAML: {error}") from error


def plain(path: Path, node: yaml.Node) -> Any:
    """Dictionaries, lists and `Text` of a tree."""
    if isinstance(node, yaml.MappingNode):
        names = [str(key.value) for key, _ in node.value]
        for number, (key, _) in enumerate(node.value):
            at_line = f"{path}, line {key.start_mark.line + 1}:"
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{at_line} a list or mapping is no name of a field")
            if key.tag == "tag:yaml.org,2002:merge":
                raise ValueError(f"{at_line} fields behind << are not read; write them out")
            if names[number] in names[:number]:
                raise ValueError(f"{at_line} field {key.value!r} stands twice")
        entries = zip(names, (value for _, value in node.value), strict=True)
        return {n: plain(path, v) for n, v in entries if v.tag != "tag:yaml.org,2002:null"}
    if isinstance(node, yaml.SequenceNode):
        return [plain(path, one) for one in node.value]
    text = Text(node.value.strip())
    try:
        text.value = yaml.SafeLoader("").construct_object(node, deep=True)
    except (ValueError, yaml.YAMLError):  # a date that does not exist
        text.value = str(text)
    return text


def typed(data: Any) -> Any:
    """The data with the values that YAML reads in its scalars."""
    if isinstance(data, Mapping):
        return {name: typed(value) for name, value in data.items()}
    if isinstance(data, list):
        return [typed(one) for one in data]
    return data.value if isinstance(data, Text) else data


def error_message(path: Path, root: yaml.Node, error: ValidationError) -> str:
    """All that is wrong, each with its line; missing fields of one place together."""
    missing: dict[tuple, list[str]] = {}
    problems: list[tuple[tuple, str]] = []
    for one in error.errors(include_url=False):
        place, context = one["loc"], one.get("ctx", {})
        if one["type"] == "missing":
            missing.setdefault(place[:-1], []).append(str(place[-1]))
            continue
        text = one["msg"].removeprefix("Value error, ")
        if one["type"] == "field":
            place = (*place, context["field"])
        elif place:
            given = f", got {str(one['input'])!r}" if isinstance(one["input"], str) else ""
            text = f"{dotted(place)}: {text}" + given * (one["type"] != "value_error")
        problems.append((place, text))
    for place, names in missing.items():
        problems.append((place, f"{dotted(place)} lacks {', '.join(names)}"))
    lines = sorted({(line_of(root, place), text) for place, text in problems})
    texts = [f"{path}, line {line}: {text}" for line, text in lines]
    return "\n".join([f"{len(texts)} problems:", *texts] if len(texts) > 1 else texts)


def dotted(place: tuple) -> str:
    """`("tasks", 0, "labels")` as `tasks[1].labels`: entries are counted from 1."""
    names = "".join(f"[{p + 1}]" if isinstance(p, int) else f".{p}" for p in place)
    return names.removeprefix(".") or "the file"


def line_of(node: yaml.Node, place: tuple) -> int:
    """The line of a field's name, or of a list's entry; the innermost that the file has."""
    line = node.start_mark.line + 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value}
            if part not in pairs:
                break
            key, node = pairs[part]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line
