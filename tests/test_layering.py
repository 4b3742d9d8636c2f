"""Imports inside the package point downwards only, and optional packages are imported where they are used."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "llava_mole"

# Longest prefix wins. A module may import its own layer and lower ones.
LAYERS = {
    "constants": 0,
    "errors": 0,
    "log": 0,
    "distributed": 0,
    "hardware": 0,
    "config": 1,
    "config_rules": 1,
    "check_config": 1,
    "conversation": 1,
    "templates": 1,
    "mole": 2,
    "data": 2,
    "model": 3,
    "train": 4,
    "decoding": 4,
    "prompts": 4,
    "likelihood": 4,
    "inference": 4,
    "eval": 5,
    "eval.metrics": 1,
    "serve": 5,
    "tiny": 5,
    "analysis": 5,
    "prepare": 6,
    "cli": 6,
}
INDEPENDENT = {"mole": {"mole", "constants", "errors", "log", "distributed"}}
OPTIONAL = {
    "deepspeed",
    "wandb",
    "matplotlib",
    "skimage",
    "easy_vqa",
    "bitsandbytes",
    "gradio",
    "open_clip",
    "rapidfuzz",
}


def layer(name: str) -> int | None:
    """Of a module, by its longest prefix in LAYERS."""
    parts = name.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((LAYERS[prefix] for prefix in prefixes if prefix in LAYERS), None)


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), path


def internal_imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "llava_mole":
            inner = node.module.split(".")[1:]
            if inner:
                yield ".".join(inner), node.lineno
            else:
                yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("llava_mole."):
                    yield alias.name.removeprefix("llava_mole."), node.lineno


def test_every_module_has_a_layer() -> None:
    unknown = [name for name, _ in modules() if name != "__init__" and layer(name) is None]
    assert not unknown


def test_imports_point_downwards() -> None:
    wrong = []
    for name, path in modules():
        top = name.split(".")[0]
        if top == "__init__":
            continue
        own = layer(name)
        for target, line in internal_imports(ast.parse(path.read_text(encoding="utf-8"))):
            other, theirs = target.split(".")[0], layer(target)
            if theirs is not None and theirs > own:
                wrong.append(f"{path.name}:{line}: {name} (layer {own}) imports {target} ({theirs})")
            if top in INDEPENDENT and other in LAYERS and other not in INDEPENDENT[top]:
                wrong.append(f"{path.name}:{line}: {name} must stand alone but imports {target}")
            if top != other and theirs == own == 2:
                wrong.append(f"{path.name}:{line}: {name} imports its neighbour {target}")
    assert not wrong, "\n".join(wrong)


def test_optional_packages_are_imported_where_they_are_used() -> None:
    wrong = []
    for name, path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            wrong += [f"{name}:{node.lineno}: {n}" for n in names if n.split(".")[0] in OPTIONAL]
    assert not wrong, "\n".join(wrong)


def test_files_stay_small() -> None:
    long = {name: n for name, path in modules() if (n := len(path.read_text(encoding="utf-8").splitlines())) > 360}
    assert not long
