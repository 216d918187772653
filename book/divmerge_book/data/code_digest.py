"""Digests of code: of what a measurement reaches, and of nothing else.

A definition (a function, a class, an assignment) reaches what it names, wherever in both packages
that stands; a registry reaches its entries. Comments, docstrings, words of errors, imports and the
modules' names do not count, so better words invalidate nothing, nor does a move.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import types
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import divmerge_core

ROOT = (Path(divmerge_core.__file__).parent, Path(__file__).parents[1])  # of both packages
NAMES = frozenset(folder.name for folder in ROOT)
# What sets runs going, and what writes pages, decides no number.
DRIVERS = {
    "divmerge_book.__main__",
    *(f"divmerge_book.runner.{name}" for name in ("book", "collect", "executors", "grid")),
    *(f"divmerge_book.runner.{name}" for name in ("grid_file", "method_pages")),
}
# What fetches and keeps things decides no number either: what is fetched is in a key itself.
KEEPERS = {
    *("divmerge_core.registry", "divmerge_core.storage", "divmerge_book.evaluation.cache"),
    *(f"divmerge_book.data.{name}" for name in ("code_digest", "downloads", "glue", "splits")),
    "divmerge_book.data.tasks",
}
# What these hold is in a key by its value: sizes by their numbers, models by their digests.
VALUES = frozenset({"ENCODERS", "LANGUAGE_SIZES", "MODELS", "SIZES"})
WORDS = {"cite", "label", "source"}  # facts of an entry that only pages show
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scipy")
installed = functools.cache(metadata.version)  # which parses a file at every call

Place = tuple[str, int]  # a module and the number of a statement in it


def versions(*libraries: str) -> dict[str, str]:
    """The versions of these libraries, or of all that results depend on."""
    return {name: installed(name) for name in libraries or LIBRARIES}


def key_of(*what: object) -> str:
    """A key of these facts: numbers, words, lists, dictionaries and dataclasses of them."""
    text = json.dumps(what, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def code_digest(*things: object, apart: str | None = None) -> str:
    """A digest of all code that these functions, classes, objects or full names reach.

    A function reaches the definition that contains it, and its closure; of a function defined in a
    notebook, its text counts. apart: a registry whose entries do not count.
    """
    chosen = list(leaves(thing for thing in things if not isinstance(thing, str)))
    places = [place for one in chosen for place in start(one)]
    for source, _, name in (thing.rpartition(".") for thing in things if isinstance(thing, str)):
        places += module(source).find(name)
    texts = [inspect.getsource(one) for one in chosen if one.__module__ == "__main__"]
    reached = reached_digest(frozenset(places), apart)
    return hashlib.sha256(repr((reached, texts)).encode()).hexdigest()


@cache
def package_digest() -> str:
    """A digest of all code of this package that a notebook's numbers may depend on."""
    return module_digest(*(name for name in modules() if name not in DRIVERS))


@cache
def module_digest(*names: str) -> str:
    """A digest of all code of these modules."""
    return digest_of((n, k) for n in names for k in range(len(module(n).body)))


@cache
def reached_digest(places: frozenset[Place], apart: str | None) -> str:
    return digest_of(reached(places, apart))


def digest_of(places: Iterable[Place]) -> str:
    texts = sorted(module(name).statement(number)[0] for name, number in places)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def reached(places: Iterable[Place], apart: str | None) -> set[Place]:
    """All statements that these reach, with themselves."""
    found, ahead = set(), list(places)
    while ahead:
        place = ahead.pop()
        if place not in found:
            found.add(place)
            own = module(place[0])
            ahead += own.statement(place[1])[1]
            if not any(place[1] in own.bound[name] for name in {*VALUES, apart} & {*own.bound}):
                ahead += registrations().get(place, ())
    return found


def leaves(things: Iterable[object]) -> Iterator[type | types.FunctionType]:
    """Functions and classes that these call or are: parts of partials, and what is closed over."""
    seen, ahead = set(), list(things)
    while ahead:
        thing = inspect.unwrap(ahead.pop())
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, functools.partial):
            ahead += [thing.func, *thing.args, *thing.keywords.values()]
        elif isinstance(thing, types.MethodType):
            ahead += [thing.__self__]
        else:
            ahead += [cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()]
            yield thing if isinstance(thing, type | types.FunctionType) else type(thing)


def start(thing: type | types.FunctionType) -> list[Place]:
    """Where a function or class of this package is defined."""
    name = thing.__module__
    own = name.partition(".")[0] in NAMES
    return module(name).find(thing.__qualname__.split(".")[0]) if own else []


@cache
def module(name: str) -> "Module":
    return Module(name)


@cache
def modules() -> frozenset[str]:
    """Full names of the modules of both packages."""
    paths = [path.relative_to(root.parent) for root in ROOT for path in root.rglob("*.py")]
    names = (".".join(path.with_suffix("").parts) for path in paths)
    return frozenset(name.removesuffix(".__init__") for name in names)


def path_of(name: str) -> Path:
    top, *parts = name.split(".")
    path = next(folder for folder in ROOT if folder.name == top).joinpath(*parts)
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


class Module:
    """A module's statements: what each binds, and what it uses."""

    def __init__(self, name: str):
        self.name = name
        self.body = ast.parse(path_of(name).read_text("utf-8")).body
        self.imported: dict[str, tuple[str, str]] = {}  # name -> module and name there
        self.bound: dict[str, list[int]] = defaultdict(list)
        self.entries: dict[int, list[str]] = {}  # registries that a statement files into
        self.always: list[int] = []  # done whenever the module is imported
        for number, part in enumerate(self.body):
            if isinstance(part, ast.Import | ast.ImportFrom):
                self.imported |= own_imports(part)
                continue
            names, entries = bound_names(part), registries(part)
            if entries:
                self.entries[number] = entries
            elif not names and acts(part):
                self.always.append(number)
            for bound in names:
                self.bound[bound].append(number)

    def find(self, name: str) -> list[Place]:
        """The statements that bind a name, here or where it is imported from."""
        if name in self.bound:
            return [(self.name, number) for number in (*self.bound[name], *self.always)]
        return self.foreign(*self.imported[name]) if name in self.imported else []

    def foreign(self, source: str, name: str) -> list[Place]:
        """The statements that bind a name of another module; none for a module itself."""
        if source in KEEPERS or f"{source}.{name}" in modules():
            return []
        if not (found := module(source).find(name)):
            raise ValueError(f"module {self.name} imports {name} of {source}, which binds none")
        return found

    @cache  # noqa: B019
    def statement(self, number: int) -> tuple[str, list[Place]]:
        """What counts of a statement, all but words and own imports; and the statements it names.

        It is rewritten in place.
        """
        plain, found = Plain(), []
        tree = plain.visit(self.body[number])
        imported = self.imported | plain.imported
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                source = ".".join(imported.get(node.value.id, ()))
                if source in modules():
                    found += self.foreign(source, node.attr)
            elif isinstance(node, ast.Name):
                local = plain.imported.get(node.id)
                found += self.foreign(*local) if local else self.find(node.id)
        return ast.dump(tree), found


@cache
def registrations() -> dict[Place, list[Place]]:
    """What every registry is given, by the statement that makes the registry."""
    found = defaultdict(list)
    for name in modules() - KEEPERS:
        if ".register(" not in path_of(name).read_text("utf-8"):
            continue
        own = module(name)
        for number, entries in own.entries.items():
            for place in (place for entry in entries for place in own.find(entry)):
                found[place].append((name, number))
    return found


def registries(part: ast.stmt) -> list[str]:
    """Names of the registries that a statement files something in."""
    where = getattr(part, "decorator_list", [part])
    calls = (node for one in where for node in ast.walk(one) if isinstance(node, ast.Call))
    heads = [call.func for call in calls if getattr(call.func, "attr", "") == "register"]
    return [head.value.id for head in heads if isinstance(head.value, ast.Name)]


def own_imports(node: ast.AST) -> dict[str, tuple[str, str]]:
    """What a statement imports from these packages: name here -> module and name there."""
    source = getattr(node, "module", None) or ""
    if not isinstance(node, ast.ImportFrom) or source.partition(".")[0] not in NAMES:
        return {}
    return {alias.asname or alias.name: (source, alias.name) for alias in node.names}


def bound_names(part: ast.stmt) -> list[str]:
    """Names that a top-level statement binds; a loop that fills a registry binds none."""
    if isinstance(part, ast.FunctionDef | ast.ClassDef):
        return [part.name]
    if registries(part):
        return []
    nodes = list(ast.walk(part))
    names = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    names += [n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return names + [n.asname or n.name for n in nodes if isinstance(n, ast.alias)]


def acts(part: ast.stmt) -> bool:
    """Whether a statement that binds nothing does something when its module is imported."""
    main = isinstance(part, ast.If) and "__name__" in ast.dump(part.test)
    return not main and not (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant))


class Plain(ast.NodeTransformer):
    """Takes away docstrings, words of errors, registries' names, facts that only pages show, and
    imports from these packages, which it notes."""

    def __init__(self):
        self.imported: dict[str, tuple[str, str]] = {}

    def visit(self, node: ast.AST) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body[0].value.value = ""
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "register":
            node.func = ast.Constant("register")  # an entry does not reach the other entries
            node.keywords = [one for one in node.keywords if one.arg not in WORDS]
        elif own := own_imports(node):
            self.imported |= own
            return ast.Pass()
        return node
