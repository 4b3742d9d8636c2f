"""The rule of imports: eight floors, downwards only, no circle of files; optional packages are imported where used."""

import ast
from collections.abc import Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "llava_mole"

# From the ground up; `scripts/` stands above all of them. A file imports its own room or a lower floor.
FLOORS = (
    {"common", "constants", "mole"},
    {"config", "conversation", "cli"},
    {"data"},
    {"model"},
    {"inference", "interop", "analysis"},
    {"train", "eval", "serve"},
    {"study"},
    {"__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ALONE = {"mole"}
"""Rooms that import nothing of the package."""
OPTIONAL = {
    "deepspeed",
    "wandb",
    "matplotlib",
    "skimage",
    "easy_vqa",
    "fsspec",
    "bitsandbytes",
    "cma",
    "gguf",
    "gradio",
    "open_clip",
    "openpyxl",
    "rapidfuzz",
    "scipy",
}
Graph = Mapping[str, Mapping[str, int]]
"""File -> the files it imports -> the line of the import."""


def read_graph(package: Path) -> Graph:
    """Every import of the package's files, inside functions and under TYPE_CHECKING too."""
    files = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join([package.name, *path.relative_to(package).with_suffix("").parts])
        files[name.removesuffix(".__init__")] = path
    graph: dict[str, dict[str, int]] = {name: {} for name in files}
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in imported_names(node):
                # `from package import module` names a file by its last word, `from module import thing` by the rest.
                found = next((n for n in (target, target.rpartition(".")[0]) if n in files), None)
                if found is not None and found not in (name, package.name):
                    graph[name].setdefault(found, node.lineno)  # type: ignore[attr-defined]
    return graph


def imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not used"
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []


def room(name: str) -> str:
    return name.split(".")[1]


def wrong_arrows(graph: Graph) -> list[str]:
    """Imports of a neighbour on the same floor or of a floor above."""
    wrong = []
    for name, targets in graph.items():
        for target, line in targets.items():
            own, other = room(name), room(target)
            if own != other and (FLOOR_OF[other] >= FLOOR_OF[own] or own in ALONE):
                wrong.append(f"{name}:{line}: {own} (floor {FLOOR_OF[own]}) imports {target} (floor {FLOOR_OF[other]})")
    return wrong


def circle(graph: Graph) -> list[str]:
    """One circle of files, the first file at both ends; empty if there is none. A depth-first search."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        path.append(name)
        found = next((c for target in graph[name] if (c := visit(target))), [])
        path.pop()
        done.add(name)
        return found

    return next((c for name in graph if (c := visit(name))), [])


@pytest.fixture(scope="module")
def graph() -> Graph:
    return read_graph(PACKAGE)


def test_every_file_stands_on_a_floor(graph: Graph) -> None:
    assert not [name for name in graph if name != "llava_mole" and room(name) not in FLOOR_OF]


def test_imports_point_downwards(graph: Graph) -> None:
    wrong = wrong_arrows({name: targets for name, targets in graph.items() if name != "llava_mole"})
    assert not wrong, "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle(graph: Graph) -> None:
    assert not (found := circle(graph)), " -> ".join(found)


def test_the_house_stays_small(graph: Graph) -> None:
    """Rooms are folders (and the files at the top): more of them, or more arrows between them, need a new plan."""
    homes = {name: ".".join(name.split(".")[:2]) for name in graph if name != "llava_mole"}
    arrows = {(homes[name], homes[t]) for name, targets in graph.items() if name in homes for t in targets}
    assert len(set(homes.values())) <= 16
    assert len({(one, other) for one, other in arrows if one != other}) <= 67


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a.py": "from toy import b", "b.py": "def f():\n    from toy.a import f"}, ["a", "b", "a"]),
        ({"a.py": "import toy.b", "b.py": "if TYPE_CHECKING:\n    import toy.c", "c.py": "import toy.a"}, [*"abca"]),
        ({"a.py": "import toy.b", "b.py": "", "c.py": "import toy.b, toy.a"}, []),
    ],
)
def test_the_search_sees_lazy_and_type_checking_imports(
    tmp_path: Path, files: dict[str, str], expected: list[str]
) -> None:
    package = tmp_path / "toy"
    package.mkdir()
    for name, text in files.items():
        (package / name).write_text(text)
    assert [name.removeprefix("toy.") for name in circle(read_graph(package))] == expected


def test_the_search_sees_imports_upwards_and_sideways() -> None:
    wrong = wrong_arrows(
        {
            "llava_mole.data.store": {"llava_mole.model.builder": 3},
            "llava_mole.eval.answers": {"llava_mole.train.loss": 1},
            "llava_mole.mole.layer": {"llava_mole.common.errors": 1},
            "llava_mole.train.train": {"llava_mole.model.builder": 1},
        }
    )
    assert [line.split(":")[0] for line in wrong] == [
        "llava_mole.data.store", "llava_mole.eval.answers", "llava_mole.mole.layer"
    ]  # fmt: skip


def test_optional_packages_are_imported_where_they_are_used() -> None:
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            wrong += [f"{path}:{node.lineno}: {n}" for n in imported_names(node) if n.split(".")[0] in OPTIONAL]
    assert not wrong, "\n".join(wrong)
