"""What is installed can be imported from anywhere."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from common import ROOT


@pytest.mark.slow
def test_an_editable_install_is_found_from_the_folder_above_the_clone(tmp_path):
    """There `flextok_jax`, the clone, is a package without an __init__.py."""
    clone = tmp_path / "above" / "flextok_jax"
    shutil.copytree(ROOT / "flextok_jax", clone / "flextok_jax")
    for name in ("setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, clone)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def python(code, folder):
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    python(f"import setuptools.build_meta as b; b.build_editable({str(tmp_path)!r})", clone)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    # The environment of the tests has the project itself, elsewhere.
    others = "[p for p in sys.path[1:] if not pathlib.Path(p, 'flextok_jax').exists()]"
    add = f"import pathlib, site, sys; sys.path[1:] = {others}\n"
    add += f"site.addsitedir({str(tmp_path / 'site')!r})\n"
    found = "from flextok_jax import FlexTok, tokenizer; print(tokenizer.__file__)"
    assert python(add + found, clone.parent) == str(clone / "flextok_jax" / "tokenizer.py")
