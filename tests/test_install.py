"""What is installed can be imported from anywhere."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
from common import ROOT, digits_folder
from packaging.requirements import Requirement

ENV = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def copied(folder):
    """What a wheel is built from."""
    shutil.copytree(ROOT / "flextok_jax", folder / "flextok_jax")
    for name in ("setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(*command, folder):
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def link_requirements(wheel, site):
    """Puts all that a wheel asks for, and what that asks for, into an empty site-packages.

    As links to what is installed here, instead of a download of the same.
    """
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    lines = re.findall(r"^Requires-Dist: (.*)$", text, re.M)
    todo, seen = [(line, "") for line in lines], set()
    while todo:
        line, extra = todo.pop()
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
            continue
        found = importlib.metadata.distribution(wanted.name)
        assert found.version in wanted.specifier, line
        for file in found.files:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(found.locate_file(top))
        for more in {"", *wanted.extras}:
            if (wanted.name, more) not in seen:
                seen.add((wanted.name, more))
                todo += [(line, more) for line in found.requires or ()]


@pytest.mark.slow
def test_a_wheel_runs_the_demos_in_an_environment_with_its_requirements_alone(tmp_path):
    source, env, images = tmp_path / "source", tmp_path / "env", digits_folder()
    source.mkdir()
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    run(sys.executable, "-c", code, folder=copied(source))
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", env, folder=tmp_path)
    python, flextok = env / "bin" / "python", env / "bin" / "flextok"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel, folder=tmp_path)
    (site,) = env.glob("lib/python*/site-packages")
    link_requirements(wheel, site)
    found = run(python, "-c", "import flextok_jax; print(flextok_jax.__file__)", folder=tmp_path)
    assert found == str(site / "flextok_jax" / "__init__.py")
    which = "--images", images, "--limit", "2", "--num-tokens", "1,16", "--out", "pictures"
    run(flextok, "reconstruct", "--model", "demo-digits", *which, folder=tmp_path)
    assert len(list(tmp_path.glob("pictures/k0016/**/*.png"))) == 2
    which = "--labels", "3", "--per-label", "2", "--out", "samples"
    run(flextok, "generate", "--model", "demo-digits-ar", *which, folder=tmp_path)
    assert len(list(tmp_path.glob("samples/k0016/*.png"))) == 2
    which = "--text", "red heart", "--num-tokens", "8", "--out", "prompted"
    run(flextok, "generate", "--model", "demo-emoji-t2i", *which, folder=tmp_path)
    assert len(list(tmp_path.glob("prompted/k0008/*.png"))) == 1
    for extra in ("gradio", "matplotlib"):  # Nothing else of the environment of the tests.
        code = f"import importlib.util as u; print(u.find_spec({extra!r}))"
        assert run(python, "-c", code, folder=tmp_path) == "None"


def test_the_dockerfile_names_what_is_there():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    names = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert {"setup.py", "flextok_jax", "configs"} <= set(names)
    assert all((ROOT / name).exists() for name in names)
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:] for line in kept if line.startswith("!")} == set(names)
    extras = re.search(r'"\.\[(.*)\]"', "\n".join(lines))[1].replace("${CUDA}", "cuda13,cuda12")
    there = re.findall(r'^ {8}"(\w+)": ', (ROOT / "setup.py").read_text(), re.M)
    assert set(extras.split(",")) <= set(there)


@pytest.mark.slow
def test_an_editable_install_is_found_from_the_folder_above_the_clone(tmp_path):
    """There `flextok_jax`, the clone, is a package without an __init__.py."""
    clone = tmp_path / "above" / "flextok_jax"
    clone.mkdir(parents=True)
    copied(clone)

    def python(code, folder):
        return run(sys.executable, "-c", code, folder=folder)

    python(f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})", clone)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # The environment of the tests has the project itself, elsewhere.
    others = "[p for p in sys.path[1:] if not pathlib.Path(p, 'flextok_jax').exists()]"
    add = f"import pathlib, site, sys; sys.path[1:] = {others}\n"
    add += f"site.addsitedir({str(tmp_path / 'site')!r})\n"
    found = "from flextok_jax import FlexTok, tokenizer; print(tokenizer.__file__)"
    assert python(add + found, clone.parent) == str(clone / "flextok_jax" / "tokenizer.py")
