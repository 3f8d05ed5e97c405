"""The house: imports run one way, the library does not print, everything public is explained."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_runs import REPOSITORY, world_editor

from callbacks.editing import Editing

LIBRARY = REPOSITORY / "repair_lightning"
SOURCES = sorted([*LIBRARY.rglob("*.py"), *(REPOSITORY / "callbacks").glob("*.py"), *REPOSITORY.glob("*.py")])

ORDER = (
    ("types", "errors", "functional", "world"),
    ("storage", "texts"),
    ("memory",),
    ("models",),
    ("training",),
    ("edits",),
    ("editors",),
    ("scoring",),
    ("packs",),
    ("reports",),
    ("callbacks",),
    ("commands",),
    ("__init__", "__main__", "compare", "train", "evaluate"),
)
"""Each part may import what stands in a line above its own, for its types too."""
LINE = {part: line for line, parts in enumerate(ORDER) for part in parts}


def part_of(path: Path) -> str:
    """The part of the house that a file belongs to: the package or module below `repair_lightning`, or its own name."""
    parts = path.relative_to(LIBRARY if path.is_relative_to(LIBRARY) else REPOSITORY).with_suffix("").parts
    return parts[0]


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Absolute names of what is imported, wherever in the file, and the level of relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module or ''}.{alias.name}".strip("."), node.level) for alias in node.names)


def parts_imported(path: Path) -> set[str]:
    """The parts of the house that a file imports, and `.` for itself; foreign packages are left out."""
    found = set()
    for name, level in imports(ast.parse(path.read_text())):
        words = name.split(".")
        if level == 1:
            found.add(part_of(path))
        elif level > 1:
            found.add(words[0])
        elif words[0] == "repair_lightning":
            found.add(words[1] if len(words) > 1 and words[1] in LINE else "__init__")
        elif words[0] in ("callbacks", "train", "evaluate"):
            found.add(words[0])
    return found


def test_the_table_names_every_part():
    assert {part_of(path) for path in SOURCES} == set(LINE)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_imports_run_one_way(path):
    part = part_of(path)
    assert {other for other in parts_imported(path) - {part} if LINE[other] >= LINE[part]} == set()


def test_nothing_in_the_library_imports_callbacks():
    for path in LIBRARY.rglob("*.py"):
        assert not {"callbacks", "train", "evaluate"} & parts_imported(path) - {part_of(path)}, path


@pytest.mark.parametrize("path", sorted((LIBRARY / "functional").glob("*.py")), ids=name_of)
def test_pure_tensors_know_torch_and_nothing_else(path):
    standard = {"__future__", "collections", "math", "typing", "dataclasses", "itertools", "functools"}
    tops = {name.split(".")[0] for name, level in imports(ast.parse(path.read_text())) if level == 0}
    assert tops <= {"torch", "repair_lightning", *standard}
    assert parts_imported(path) <= {"functional"}


def calls_of(tree: ast.AST, name: str) -> list[int]:
    """Lines that call a builtin by name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [call.lineno for call in calls if call.func.id == name]  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_library_does_not_print(path):
    """It logs. The command line may: a module that is run (`__main__`), and the last line of a command, `cli._end`."""
    if path.name == "__main__.py":
        return
    tree = ast.parse(path.read_text())
    lines = calls_of(tree, "print")
    if path == LIBRARY / "commands" / "cli.py":
        (end,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_end")
        lines = [line for line in lines if line not in calls_of(end, "print")]
    assert lines == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_error_is_swallowed_unseen(path):
    """No bare except, and none that catches everything and passes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
            assert not (broad and isinstance(node.body[0], ast.Pass)), f"line {node.lineno}: swallows everything"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_seeding_and_no_device_choice_outside_the_entry_points(path):
    text = path.read_text()
    assert "CUDA_VISIBLE_DEVICES" not in text
    if part_of(path) not in ("world", "cli", "train"):
        assert "seed_everything(" not in text
        assert "torch.manual_seed(" not in text


def public(node: ast.AST) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_everything_public_is_explained(path):
    tree = ast.parse(path.read_text())
    assert (path.name == "__init__.py" and not path.read_text().strip()) or ast.get_docstring(tree), "the module"
    scopes = [tree, *(node for node in ast.iter_child_nodes(tree) if isinstance(node, ast.ClassDef) and public(node))]
    bare = [
        node.name  # type: ignore[attr-defined]
        for scope in scopes
        for node in ast.iter_child_nodes(scope)
        if public(node) and not ast.get_docstring(node)  # type: ignore[arg-type]
    ]
    assert bare == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_stay_short(path):
    """What spoils a codebase is its longest function: at most fifty lines, docstring included."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    long = {node.name: node.end_lineno - node.lineno + 1 for node in nodes}  # type: ignore[operator]
    assert {name: lines for name, lines in long.items() if lines > 50} == {}


@pytest.mark.parametrize(
    "name", ["LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "README.md", "pyproject.toml"]
)
def test_the_usual_files_are_there(name):
    assert (REPOSITORY / name).stat().st_size > 200


def test_entry_points_stay_small():
    for name in ("train.py", "evaluate.py"):
        assert len((REPOSITORY / name).read_text().splitlines()) <= 45


def test_a_light_import():
    """`import repair_lightning` alone must not load torch: the heavy parts come when they are asked for."""
    names = {name.split(".")[0] for name, _ in imports(ast.parse((LIBRARY / "__init__.py").read_text()))}
    top = ast.parse((LIBRARY / "__init__.py").read_text()).body
    eager = [node for node in top if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert {node.module for node in eager if isinstance(node, ast.ImportFrom)} <= {"__future__", "typing"}
    assert not [node for node in eager if isinstance(node, ast.Import)]
    assert "torch" not in names


MOST_LINES, MOST_METHODS = 250, 25


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_classes_stay_small(path):
    """One class, one reason to exist: over these it is two."""
    large = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) for part in node.body)
            size = node.end_lineno - node.lineno + 1
            if size > MOST_LINES or methods > MOST_METHODS:
                large[node.name] = (size, methods)
    assert large == {}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "callbacks").glob("*.py")), ids=name_of)
def test_callbacks_meet_editors_through_their_protocol(path):
    """Only Lightning's own hooks take a `pl_module: Any`."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    taken = [(node.name, arg) for node in nodes for arg in (*node.args.args, *node.args.kwonlyargs) if arg.annotation]
    loose = {(name, arg.arg) for name, arg in taken if ast.unparse(arg.annotation) == "Any"}  # type: ignore[arg-type]
    assert {pair for pair in loose if not (pair[0].startswith("on_") and pair[1] == "pl_module")} == set()
    assert {ast.unparse(arg.annotation) for _, arg in taken if arg.arg == "editor"} <= {"Editing"}  # type: ignore[arg-type]


def test_the_protocol_names_what_an_editor_has():
    """All of it the closed loop's own method has, once its base is loaded; no member is one that no callback uses."""
    texts = [path.read_text() for path in (REPOSITORY / "callbacks").glob("*.py") if path.name != "editing.py"]
    editor = world_editor()
    methods = [name for name in vars(Editing) if not name.startswith("_")]
    for name in (*Editing.__annotations__, *methods):
        assert hasattr(editor, name), name
        assert any(re.search(rf"(editor|pl_module)\.{name}\b", text) for text in texts), name
