"""For mkdocs: the site's first page is the README, and its tutorials are the notebooks."""

import json
import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parent.parent


def on_files(files, config):
    """The notebooks as pages, with the outputs that they were committed with."""
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n\n".join(part for cell in cells for part in _parts(cell))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
    return files


def _parts(cell):
    """A cell of a notebook in Markdown: its text, or its code and what that showed."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        # Links to other notebooks, not that of the badge, which is an address.
        source = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source)
        yield source.replace("](../docs/", "](../")
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        shown = output.get("data", {"text/plain": output.get("text", "")})
        if "image/png" in shown:
            yield f'<img alt="" src="data:image/png;base64,{"".join(shown["image/png"]).strip()}">'
        else:
            yield f"```\n{''.join(shown['text/plain']).rstrip()}\n```"


def on_page_markdown(markdown, page, config, files):
    """The README in place of the empty index.md, with links relative to docs/.

    What lies outside the site is no part of it: its links become their words.
    """
    if page.file.src_uri != "index.md":
        return markdown
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    text = re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", text)
    return re.sub(r"\[([^\]]+)\]\((?:flextok_jax/[^)]+|NOTICE)\)", r"\1", text)
