"""For mkdocs: the site's first page is the README."""

import pathlib
import re

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


def on_page_markdown(markdown, page, config, files):
    """The README in place of the empty index.md, with links relative to docs/.

    What lies outside docs/ is no part of the site: its links become their words.
    """
    if page.file.src_uri != "index.md":
        return markdown
    text = README.read_text(encoding="utf-8").replace("](docs/", "](")
    return re.sub(r"\[([^\]]+)\]\((?:(?:notebooks|flextok_jax)/[^)]+|NOTICE)\)", r"\1", text)
