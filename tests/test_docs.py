"""What README and docs show runs: Python snippets, and command lines as far as their options."""

import dataclasses
import importlib
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import test_text_to_image
from common import ROOT, TINY, tiny_tokenizer

from flextok_jax import FlexTok, ImageGenerator, TextEncoder, cli
from flextok_jax.commands import options

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted(ROOT.glob("flextok_jax/demos/*/MODEL.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def snippets():
    for page in PAGES:
        for i, (language, text) in enumerate(BLOCK.findall(page.read_text())):
            if language == "python":
                marks = () if page.name == "README.md" else pytest.mark.slow
                yield pytest.param(text, id=f"{page.name}-{i}", marks=marks)
    cells = json.loads((ROOT / "notebooks" / "4_released_weights.ipynb").read_text())["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "%pip" in codes[0]  # For Colab.
    yield pytest.param("\n".join(codes[1:]), id="4_released_weights", marks=pytest.mark.slow)


def commands(page: pathlib.Path):
    """(words, whether it is whole) of each command line: of blocks, and between backticks."""
    text = page.read_text()
    blocks = [block for language, block in BLOCK.findall(text) if language in ("", "bash")]
    lines = [(x, True) for x in "\n".join(blocks).replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    for line, whole in lines + [(code.replace("\n", " "), False) for code in inline]:
        line = re.sub(r"\$\([^)]*\)", "FOLDER", line.split(" && ")[0])
        line = re.sub(r"^for .*; do |&? *done$|^srun ", "", line)
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # An apostrophe: no command.
            continue
        if len(words) > 1 and words[0] in ("flextok", "python"):
            yield words, whole and not {"...", "…"} & set(words)


ALL = {page.relative_to(ROOT).as_posix(): list(commands(page)) for page in PAGES}


@pytest.mark.parametrize("text", list(snippets()))
def test_snippets_run(text, tmp_path, monkeypatch):
    """As printed, but for the weights of the hub: tiny models take their place."""
    tiny = {
        FlexTok: lambda: tiny_tokenizer(TINY),
        ImageGenerator: test_text_to_image.generator,
        TextEncoder: test_text_to_image.encoder,
    }

    def patch(cls, made):
        load = cls.from_pretrained

        def from_pretrained(source, **settings):
            hub = str(source).startswith(("EPFL-VILAB/", "google/", "yucornetto/"))
            return made() if hub else load(source, **settings)

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)

    for cls, made in tiny.items():
        patch(cls, made)
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "snippet", "exec"), {})


@pytest.mark.parametrize("page", ALL)
def test_options_of_commands_exist(page):
    for words, whole in ALL[page]:
        if words[0] != "flextok" or words[1].isupper():
            continue
        name = next((w for w in (" ".join(words[1:3]), words[1]) if w in options.COMMANDS), None)
        assert name, words
        if whole:
            cli.parse(name, words[1 + len(name.split()) :])
        fields = {field.name for field in dataclasses.fields(options.COMMANDS[name][0])} | {"help"}
        given = [word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--"]
        assert set(given) <= {*fields, *(f"no_{field}" for field in fields)}, words


@pytest.mark.parametrize("page", ALL)
def test_modules_configs_and_keys_exist(page):
    for words, _ in ALL[page]:
        if words[:2] != ["python", "-m"]:
            continue
        file = ROOT / (words[2].replace(".", "/") + ".py")
        package = ROOT / words[2].replace(".", "/") / "__main__.py"
        assert file.exists() or package.exists() or words[2] == "pytest", words
        found = [w.partition("=")[2] for w in words if w.startswith("--config=")]
        if found and not re.search(r"VARIANT|\.\.\.|FILE", found[0]):
            path, _, variant = found[0].partition(":")
            check_keys(ROOT / path, variant, words)


def check_keys(path, variant, words):
    """Every `--config.KEY=` names a key of the configuration."""
    module = importlib.import_module(f"configs.{path.stem}")
    config = module.get_config(*([variant] if variant else []))
    for word in words:
        key = re.match(r"--config\.([a-z_.]+)=", word)
        node = config
        for part in key[1].split(".") if key else ():
            assert part in node, f"{key[1]} is no key of {path.name}:{variant}"
            node = node[part]


def test_links_lead_to_files():
    more = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("*/*/README.md")]
    for page in [*PAGES, *more]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_files_that_the_design_names_exist():
    names = set(re.findall(r"[\w/]+\.py\b", (ROOT / "docs" / "design.md").read_text()))
    assert len(names) > 30
    folders = ("flextok_jax", "configs", "tests")
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    files = {path.relative_to(ROOT).as_posix() for path in found}
    for name in names:
        known = any(file.endswith(f"/{name}") for file in files)
        assert known or name in files or "NAME" in name, name


def test_docstrings_name_sections_of_the_reference():
    reference = (ROOT / "docs" / "reference.md").read_text()
    titles = set(re.findall(r"^## (.+)$", reference, re.M))
    assert len(titles) >= 10
    for file in (ROOT / "flextok_jax").rglob("*.py"):
        for title in re.findall(r"docs/reference\.md,\s+([A-Z][\w ]*)", file.read_text()):
            assert title.strip() in titles, f"{file}: {title}"


def test_the_pages_are_found():
    """Otherwise the tests above would pass on nothing."""
    assert sum(words[0] == "flextok" for words, _ in ALL["README.md"]) >= 6
    assert sum("flextok_jax.main" in words for words, _ in ALL["README.md"]) >= 4


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Every link leads somewhere, and the interface's docstrings can be read."""
    # Not --quiet: what is not printed does not count as a warning.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True)
    page = (tmp_path / "api" / "index.html").read_text()
    for name in ("FlexTok.detokenize", "ImageGenerator.generate", "TextEncoder.encode"):
        assert f'id="flextok_jax.{name}"' in page
    assert "flextok tokenize" in (tmp_path / "index.html").read_text()
