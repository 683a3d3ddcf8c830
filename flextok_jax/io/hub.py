"""Publishing a model on the Hugging Face hub: its file, and a model card made from its run."""

import json
import pathlib
import re
import shlex
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np

from flextok_jax.io import storage
from flextok_jax.io.paths import as_path

CARD, PICTURE = "README.md", "picture.png"
# The folders before the last part of a path or an address: of the publisher's machine.
_FOLDERS = re.compile(r"(^|[=:@,])(?:\w+:/|[~.]{0,2})/[^=:@,]*/(?=.)")

Table = Sequence[Sequence[str]]  # The titles, then the rows.


def push(
    repo: str, save: Callable, card: str, picture: str | None = None, private: bool = False
) -> str:
    """Uploads what `save(folder)` writes, a model card, and perhaps a picture, as one commit.

    Args:
        repo: "owner/name"; made where it is not there, `private` or not.

    Returns:
        A source of what was published: "owner/name@COMMIT".

    Raises:
        ValueError: `repo` is no such name.
        OSError: the picture cannot be read, or the hub cannot be reached or refuses.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise ValueError(f"{repo!r} is no repository of the hub: needed is OWNER/NAME")
    import huggingface_hub

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        save(folder)
        (folder / CARD).write_text(card, encoding="utf-8")
        if picture:
            _copy_picture(picture, folder / PICTURE)
        try:
            api = huggingface_hub.HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo, folder_path=folder, commit_message="Model and card of flextok_jax"
            )
        except Exception as error:  # Network, rights, names: of many types.
            raise OSError(
                f"{repo} cannot be written on the Hugging Face hub ({reason(error)}). Log in "
                "by `hf auth login`, with a token that may write there"
            ) from error
    return f"{repo}@{done.oid}"


def _copy_picture(source, path) -> None:
    """The pixels alone: pictures of `flextok` say where the model lies."""
    from PIL import Image

    with as_path(source).open("rb") as file:
        Image.fromarray(np.asarray(Image.open(file).convert("RGB"))).save(path)


def reason(error: Exception) -> str:
    """What the hub's client says, on one line."""
    return " ".join(str(error).split())[:300] or repr(error)


def model_card(
    repo: str,
    license: str,
    about: dict[str, str],
    snippet: str,
    tags: Sequence[str],
    workdir=None,
    picture: bool = False,
    numbers: Table | None = None,
) -> str:
    """The text of a model card. Of paths only the last parts are told.

    Args:
        license: of the weights, as the hub names it, such as "apache-2.0".
        about: what the model is: a word and its value.
        snippet: Python that uses it.
        tags: by which the hub finds it.
        workdir: of its training; None: nothing is said of it.
        picture: whether there is one.
        numbers: a further table.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(license=license, library_name="flextok_jax", tags=[*tags, "flextok"])
    parts = [f"---\n{data.to_yaml()}\n---", f"# {repo.partition('/')[2]}"]
    parts += [f"![images]({PICTURE})"] if picture else []
    parts += [_table([("", ""), *about.items()]), f"```python\n{snippet}\n```"]
    measured = [_table(numbers)] if numbers else []
    if workdir is not None:
        run = storage.read_json(workdir / "config.json")
        parts += ["## Training", *_training(run)]
        measured = _evaluated(workdir) + measured
    parts += ["## Numbers", *measured] if measured else []
    parts += [
        "## License",
        f"{license}. Training data, and weights that were not trained here, have their own.",
    ]
    return "\n\n".join(parts) + "\n"


def parameters(params, fingerprint: str) -> dict[str, str]:
    """What a card says of parameters."""
    count = sum(x.size for x in jax.tree.leaves(params))
    return {"parameters": f"{count:,}", "sha256 over them": f"`{fingerprint}`"}


def _training(run: dict) -> list[str]:
    """Command, data and configuration of a run, by its config.json."""
    config = run.get("config") or {}
    data = config.get("data") or {}
    where = [f"{data[key]}" for key in ("source", "name", "path", "split") if data.get(key)]
    facts = {"data": ", ".join(map(public, where))}
    facts |= {n: f"{config[n]}" for n in ("total_steps", "batch_size", "seed") if n in config}
    if vae := (run.get("model") or {}).get("vae_source"):
        facts["VAE, not trained"] = public(vae)
    command = shlex.join(map(public, shlex.split(run.get("command") or "")))
    if command:
        facts = {"command": f"`{command}`"} | facts
    text = json.dumps(public(config), indent=2)
    details = f"<details><summary>Configuration</summary>\n\n```json\n{text}\n```\n\n</details>"
    return [_table([("", ""), *facts.items()]), details]


def _evaluated(workdir) -> list[str]:
    """The last evaluation in metrics.jsonl, of averaged parameters on validation images."""
    file, found = workdir / "metrics.jsonl", {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        record = json.loads(line)
        values = {name: x for name, x in record.items() if name.startswith("eval/")}
        found = {"step": record["step"], **values} if values else found
    rows = [(name.removeprefix("eval/"), f"{x:.5g}") for name, x in found.items() if x is not None]
    return [_table([("of training", ""), *rows])] if rows else []


def public(value):
    """A text, or what holds texts in JSON terms, without the folders that paths lie in."""
    if isinstance(value, dict):
        return {name: public(x) for name, x in value.items()}
    if isinstance(value, list):
        return [public(x) for x in value]
    return _FOLDERS.sub(r"\1", value) if isinstance(value, str) else value


def _table(rows: Table) -> str:
    """A table of Markdown."""
    titles, *rows = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
