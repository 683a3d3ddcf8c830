"""For mkdocs: the site's first page is the README."""

import pathlib

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


def on_page_markdown(markdown, page, config, files):
    """The README, its links relative to docs/, in place of the empty index.md."""
    if page.file.src_uri != "index.md":
        return markdown
    text = README.read_text(encoding="utf-8").replace("](docs/", "](")
    return text.replace("[NOTICE](NOTICE)", "NOTICE").replace("[LICENSE](LICENSE)", "LICENSE")
