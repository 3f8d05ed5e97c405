"""The house: imports run one way, the library does not print, functions and classes stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from helpers_runs import REPOSITORY, world_editor

from callbacks.editing import Editing

LIBRARY = REPOSITORY / "repair_lightning"
SOURCES = sorted([*LIBRARY.rglob("*.py"), *(REPOSITORY / "callbacks").glob("*.py"), *REPOSITORY.glob("*.py")])
TREES = {path: ast.parse(path.read_text()) for path in SOURCES}

ORDER = (
    ("types", "errors", "functional", "starting", "world"),
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
    ("serving",),
    ("__init__", "__main__", "compare", "train", "evaluate"),
)
"""Each part may import what stands in a line above its own, for its types too."""
LINE = {part: line for line, parts in enumerate(ORDER) for part in parts}


def part_of(path: Path) -> str:
    """The part of the house that a file belongs to: the package or module below `repair_lightning`, or its own name."""
    parts = path.relative_to(LIBRARY if path.is_relative_to(LIBRARY) else REPOSITORY).with_suffix("").parts
    return parts[0]


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
    for name, level in imports(TREES[path]):
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


def test_imports_run_one_way():
    for path in SOURCES:
        part = part_of(path)
        assert {other for other in parts_imported(path) - {part} if LINE[other] >= LINE[part]} == set(), path
        if path.is_relative_to(LIBRARY):  # callbacks/ are the program's, on top of the library
            assert not {"callbacks", "train", "evaluate"} & parts_imported(path) - {part}, path


def test_pure_tensors_know_torch_and_nothing_else():
    known = {"torch", "repair_lightning", "__future__", "collections", "math", "typing", "dataclasses", "itertools"}
    for path in (LIBRARY / "functional").glob("*.py"):
        tops = {name.split(".")[0] for name, level in imports(TREES[path]) if level == 0}
        assert tops <= known | {"functools"}, path
        assert parts_imported(path) <= {"functional"}, path


def calls_of(tree: ast.AST, name: str) -> list[int]:
    """Lines that call a builtin by name."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [call.lineno for call in calls if call.func.id == name]  # type: ignore[attr-defined]


def test_the_library_does_not_print():
    """It logs. The command line may: a module that is run (`__main__`), and the last line of a command, `cli._end`."""
    for path, tree in TREES.items():
        allowed = []
        if path == LIBRARY / "commands" / "cli.py":
            (end,) = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "_end")
            allowed = calls_of(end, "print")
        assert path.name == "__main__.py" or calls_of(tree, "print") == allowed, path


def test_no_error_is_swallowed_unseen():
    """None that catches everything and passes; ruff finds the bare ones."""
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
                assert not (broad and isinstance(node.body[0], ast.Pass)), f"{path}:{node.lineno} swallows everything"


def test_no_seeding_and_no_device_choice_outside_the_entry_points():
    for path in SOURCES:
        text = path.read_text()
        assert "CUDA_VISIBLE_DEVICES" not in text, path
        if part_of(path) not in ("world", "cli", "train"):
            assert "seed_everything(" not in text, path
            assert "torch.manual_seed(" not in text, path


def test_functions_and_classes_stay_small():
    """What spoils a codebase is its longest function, docstring included; a class over these limits is two."""
    large = {}
    for path, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                lines = node.end_lineno - node.lineno + 1  # type: ignore[operator]
                methods = sum(isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) for part in node.body)
                if lines > (250 if isinstance(node, ast.ClassDef) else 50) or methods > 25:
                    large[f"{path.name}:{node.name}"] = (lines, methods)
    assert large == {}


def test_a_light_import():
    """`import repair_lightning` alone must not load torch: the heavy parts come when they are asked for."""
    eager = [node for node in TREES[LIBRARY / "__init__.py"].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {getattr(node, "module", None) for node in eager} <= {"__future__", "typing"}


def test_a_program_imports_all_of_us_without_a_look_for_garbage():
    programs = [*REPOSITORY.glob("*.py"), LIBRARY / "__main__.py", LIBRARY / "compare.py"]
    for path in programs:
        outside = [node for node in TREES[path].body if isinstance(node, ast.Import | ast.ImportFrom)]
        ours = {name for node in outside for name, _ in imports(node) if name.startswith(("repair_", "callbacks"))}
        assert ours == {"repair_lightning.starting.uncollected"}, path
    code = "import evaluate, gc; assert gc.isenabled() and gc.get_freeze_count() > 500_000"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_callbacks_meet_editors_through_their_protocol():
    """Only Lightning's own hooks take a `pl_module: Any`."""
    for path in (REPOSITORY / "callbacks").glob("*.py"):
        nodes = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef)]
        arguments = [(n.name, a) for n in nodes for a in (*n.args.args, *n.args.kwonlyargs) if a.annotation]
        taken = [(name, a.arg, ast.unparse(a.annotation)) for name, a in arguments]
        loose = {(name, arg) for name, arg, kind in taken if kind == "Any"}
        assert {pair for pair in loose if not (pair[0].startswith("on_") and pair[1] == "pl_module")} == set(), path
        assert {kind for _, arg, kind in taken if arg == "editor"} <= {"Editing"}, path


def test_the_protocol_names_what_an_editor_has():
    """All of it the closed loop's own method has, once its base is loaded; no member is one that no callback uses."""
    texts = [path.read_text() for path in (REPOSITORY / "callbacks").glob("*.py") if path.name != "editing.py"]
    editor = world_editor()
    methods = [name for name in vars(Editing) if not name.startswith("_")]
    for name in (*Editing.__annotations__, *methods):
        assert hasattr(editor, name), name
        assert any(re.search(rf"(editor|pl_module)\.{name}\b", text) for text in texts), name
