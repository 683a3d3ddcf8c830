"""The rules that can be read off the source: imports run downward, few libraries, no eval."""

import ast
import pathlib
import re
import runpy
import sys

import pytest
import setuptools
from common import ROOT

PACKAGE = "flextok_jax"
# An import goes to the same level or a lower one.
LEVELS = (
    ("conditions", "nn", "flow"),
    ("io", "parallel"),
    (
        "tokenizer", "generator", "text", "lengths", "criteria", "token_sampling", "token_search",
        "candidates", "verifiers",
    ),
    ("data", "evaluation"),
    ("demo",),
    ("training",),
    ("commands", "config_flag"),
    ("main", "cli", "compile"),
)  # fmt: skip
LEVEL = {part: i for i, parts in enumerate(LEVELS) for part in parts}
INFERENCE = LEVEL["tokenizer"]  # Levels up to this one run without the libraries of training.

# What inference imports beside the standard library: at the top of a file, and only when used.
AT_IMPORT = {"jax", "flax", "numpy"}
WHEN_USED = AT_IMPORT | {
    "safetensors", "huggingface_hub", "PIL", "tqdm", "yaml", "etils", "fsspec", "tokenizers",
    "msgpack",
}  # fmt: skip
# Libraries that one place alone may import.
ONLY_IN = {
    "orbax": "io/checkpoint.py",
    "tensorflow_datasets": "data/tfds_source.py",
    "grain": "data/",
    "wandb": "training/",
}
CHECKPOINT = "io/checkpoint.py"  # For training, and for reading a workdir: imported when used.

SOURCES = sorted((ROOT / PACKAGE).rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def relative_name(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT / PACKAGE))


def imports(path: pathlib.Path):
    """(absolute dotted name, whether it is imported only when a function runs) of each import."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]

    def visit(node, lazy):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, lazy
        elif isinstance(node, ast.ImportFrom):
            above = list(package[: len(package) - node.level + 1]) if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            for alias in node.names:
                yield f"{base}.{alias.name}", lazy
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy or inside)

    return list(visit(ast.parse(path.read_text()), False))


def part_of(path: pathlib.Path) -> str:
    """The part of the package that a file belongs to: "nn", "tokenizer", ..."""
    return path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]


def parts_imported(name: str) -> list[str]:
    """The part of the package that "flextok_jax.nn.vae.Vae" names; public names lie in a part."""
    if name.split(".")[0] != PACKAGE:
        return []
    part = (name.split(".") + [""])[1]
    public = {
        "FlexTok": "tokenizer", "ImageGenerator": "generator", "TextEncoder": "text",
        "search": "token_search",
    }  # fmt: skip
    return [public.get(part, part)] if part and part != "__version__" else []


# The package's own file gives out public names, lazily; it stands above nothing and below nothing.
PARTS = [path for path in SOURCES if path.parent != ROOT / PACKAGE or path.name != "__init__.py"]


@pytest.mark.parametrize("path", PARTS, ids=relative_name)
def test_imports_run_downward(path):
    part = part_of(path)
    assert part in LEVEL, f"{part} has no level: add it to LEVELS"
    for name, _ in imports(path):
        for other in parts_imported(name):
            assert other in LEVEL, f"{name}: {other} has no level"
            assert LEVEL[other] <= LEVEL[part], f"{relative_name(path)} imports {name} above it"


@pytest.mark.parametrize("path", SOURCES + CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_library_is_called_in_its_place(path):
    name = str(path.relative_to(ROOT)).removeprefix(f"{PACKAGE}/")
    for library in {imported.split(".")[0] for imported, _ in imports(path)}:
        assert library not in ("torch", "torchvision", "tensorflow"), library
        if library in ONLY_IN:
            place = ONLY_IN[library]
            assert name == place or (place.endswith("/") and name.startswith(place)), library


@pytest.mark.parametrize(
    "path", [p for p in PARTS if LEVEL.get(part_of(p), 0) <= INFERENCE], ids=relative_name
)
def test_inference_stands_on_few_libraries(path):
    if relative_name(path) == CHECKPOINT:
        return
    for name, lazy in imports(path):
        assert lazy or not name.startswith(f"{PACKAGE}.io.checkpoint"), name
        library = name.split(".")[0]
        if library != PACKAGE and library not in sys.stdlib_module_names:
            allowed = WHEN_USED if lazy else AT_IMPORT
            assert library in allowed, f"{name}: allowed here are {sorted(allowed)}"


def test_data_libraries_that_not_every_platform_has_are_extras(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    needed, extras = " ".join(given["install_requires"]), given["extras_require"]
    for name in ("array_record", "grain", "tensorflow-datasets"):
        assert name not in needed and any(x.startswith(name) for x in extras["data"])
        assert any(x.startswith(name) for x in extras["train"])


def test_the_check_sees_upward_and_lazy_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / PACKAGE / "nn" / "wrong.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import flextok_jax.data.pipeline\n"
        "from flextok_jax import FlexTok\n"
        "from ..training import loop\n"
        "def f():\n    from flextok_jax.io import storage\n    import torch.nn\n"
    )
    assert imports(path) == [
        ("flextok_jax.data.pipeline", False),
        ("flextok_jax.FlexTok", False),
        ("flextok_jax.training.loop", False),
        ("flextok_jax.io.storage", True),
        ("torch.nn", True),
    ]
    found = [part for name, _ in imports(path) for part in parts_imported(name)]
    assert found == ["data", "tokenizer", "training", "io"]
    with pytest.raises(AssertionError, match="imports flextok_jax.data.pipeline above it"):
        test_imports_run_downward(path)
    with pytest.raises(AssertionError, match="torch"):
        test_each_library_is_called_in_its_place(path)


def test_no_text_becomes_code():
    """Files from outside are data: nothing is evaluated, unpickled or imported by a found name."""
    # Entry points that import by names of their own, written in their source.
    by_own_names = {"__init__.py", "main.py", "cli.py"}
    for path in SOURCES:
        forbidden = {"eval", "exec", "compile", "__import__"}
        called = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not called & forbidden, (path, called & forbidden)
        versions = "importlib.metadata"  # Reads what is installed, and imports nothing.
        names = [name for name, _ in imports(path) if not name.startswith(versions)]
        libraries = {name.split(".")[0] for name in names}
        assert not libraries & {"pickle", "dill", "marshal", "shelve"}, path
        assert "importlib" not in libraries or relative_name(path) in by_own_names, path


def test_no_part_knows_the_name_of_another_project():
    """What a model is stands in fields; names are for the readers of files, and for docs."""
    names = re.compile(
        "titok|llamagen|elastictok|maskgit|one.d.piece|textok|imagefolder|binformer|\\balit\\b",
        re.IGNORECASE,
    )
    for path in SOURCES:
        if not relative_name(path).startswith("io/formats/peers/"):
            assert not names.search(path.read_text()), path
