"""Publishing on the hub: the model card, and the way there and back through a stand-in."""

import dataclasses
import io
import json
import os
import subprocess
import sys

import hub_server
import jax
import numpy as np
import pytest
import yaml
from common import CONFIGS, GOLDEN, TINY, digits_folder, random_params, tiny_tokenizer
from PIL import Image

from flextok_jax import FlexTok, ImageGenerator
from flextok_jax.evaluation.pictures import write_png
from flextok_jax.io import hub, sources
from flextok_jax.io.checkpoint import Checkpoints, json_config
from flextok_jax.io.formats import vae_files

COMMAND = (
    "python -m flextok_jax.main --config=configs/tokenizer.py:digits --workdir=/home/me/runs/a"
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir of training, as far as inference and the card read it."""
    folder = tmp_path_factory.mktemp("workdir")
    params = {k: v for k, v in random_params(TINY).items() if k != "vae"}
    with Checkpoints(folder, {}) as checkpoints:
        checkpoints.save(7, {"ema": params, "params": jax.tree.map(np.zeros_like, params)})
    config = CONFIGS["tokenizer"].get_config("digits")
    config.data.path = "/home/me/pictures/my digits"
    model = {"kind": "flextok", "config": dataclasses.asdict(TINY), "vae_source": "identity"}
    about = {"config": json_config(config), "model": model, "command": COMMAND}
    (folder / "config.json").write_text(json.dumps(about))
    records = [
        {"step": 3, "loss": 2.0, "eval/reconstruction/psnr": 11.0},
        {
            "step": 6,
            "loss": 1.5,
            "eval/reconstruction/psnr": 12.25,
            "eval/reconstruction/mae": None,
        },
        {"step": 7, "loss": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    return folder


@pytest.mark.parametrize(
    "text, told",
    [
        ("--workdir=/home/me/runs/a", "--workdir=a"),
        ("/home/me/my pictures/", "my pictures/"),
        ("~/me/data", "data"),
        ("../data/in", "in"),
        ("tfds:imagenet2012@/data/tfds", "tfds:imagenet2012@tfds"),
        ("--config.data.path=gs://bucket/data/photos", "--config.data.path=photos"),
        ("--config=configs/ar.py:digits", "--config=configs/ar.py:digits"),
        ("owner/name@main/vae", "owner/name@main/vae"),
        (r"(encoder|decoder)/.*", r"(encoder|decoder)/.*"),
    ],
)
def test_the_card_tells_no_folder_of_the_machine(text, told):
    assert hub.public({"a": [text, 1]}) == {"a": [told, 1]}


def pushed(monkeypatch, model, *args, **options):
    """The card that a model would upload: (what its header says, its text)."""
    cards = []
    monkeypatch.setattr(hub, "push", lambda repo, save, card, picture, private: cards.append(card))
    model.push_to_hub(*args, **options)
    header, text = cards[0].removeprefix("---\n").split("\n---\n", 1)
    return yaml.safe_load(header), text


def test_a_card_is_made_of_the_run(workdir, monkeypatch):
    tok = FlexTok.from_pretrained(workdir)
    numbers = [("tokens", "PSNR"), ("16", "12.3")]
    header, text = pushed(
        monkeypatch, tok, "me/tok", "cc-by-4.0", picture="grid.png", numbers=numbers
    )
    assert header["license"] == "cc-by-4.0" and header["library_name"] == "flextok_jax"
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert ["command", f"`{COMMAND.replace('/home/me/runs/', '')}`"] in rows
    assert ["data", "folder, my digits, train"] in rows and ["VAE, not trained", "identity"] in rows
    assert ["sha256 over them", f"`{tok.fingerprint}`"] in rows
    assert ["step", "6"] in rows and ["reconstruction/psnr", "12.25"] in rows
    assert rows[-2:] == [["---", "---"], ["16", "12.3"]]
    assert 'FlexTok.from_pretrained("me/tok")' in text and f"]({hub.PICTURE})" in text
    config = json.loads(text.split("```json\n")[1].split("```")[0])
    assert config["optim"]["lr"] == CONFIGS["tokenizer"].get_config("digits").optim.lr
    assert "/home" not in text


def test_a_model_without_a_run_has_a_card_without_training(monkeypatch):
    _, text = pushed(monkeypatch, tiny_tokenizer(), "me/tok", "mit")
    assert "## Training" not in text and "## Numbers" not in text and "![" not in text


def test_a_name_without_an_owner_is_refused():
    with pytest.raises(ValueError, match="'tok'.*OWNER/NAME"):
        tiny_tokenizer().push_to_hub("tok", "mit")


STEPS = """
import json, sys
from flextok_jax import cli
for words in json.loads(sys.argv[1]):
    print("code", cli.main(words), flush=True)
"""


def run(server, tmp_path, *commands, token=hub_server.TOKEN):
    """Runs `flextok` commands one after the other against a stand-in: (codes, stdout, stderr)."""
    env = dict(
        os.environ, HF_ENDPOINT=server.url, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1",
        HF_HOME=str(tmp_path / "hf"), HF_TOKEN=token, NO_PROXY="127.0.0.1", no_proxy="127.0.0.1",
    )  # fmt: skip
    words = json.dumps([[str(word) for word in words] for words in commands])
    done = subprocess.run(
        [sys.executable, "-c", STEPS, words], env=env, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    codes = [int(x.split()[1]) for x in done.stdout.splitlines() if x.startswith("code ")]
    return codes, done.stdout, done.stderr


@pytest.mark.slow
def test_a_published_model_comes_back_by_its_revision(workdir, tmp_path):
    second, picture = tmp_path / "second", tmp_path / "grid.png"
    FlexTok(TINY, random_params(TINY, seed=1)).save_pretrained(second)
    write_png(picture, np.full((8, 8, 3), 9, np.uint8), {"model": "/home/me/runs/a"})
    where = ["--repo", "me/tok", "--license", "mit"]
    with hub_server.running() as server:
        codes, _, error = run(server, tmp_path, ["push", "--model", workdir, *where], token="other")
        assert codes == [2] and "401" in error and "hf auth login" in error and not server.repos
        evaluation = ["--data", digits_folder(), "--split", "test", "--limit", 2, "--num-tokens", 4]
        codes, out, error = run(
            server,
            tmp_path,
            ["push", "--model", workdir, *where, "--picture", picture, "--private"],
            ["push", "--model", second, *where],
            ["evaluate", "--model", "me/tok", *evaluation, "--steps", 1, "--out", tmp_path / "e"],
            ["push", "--model", second, *where, "--evaluation", tmp_path / "e"],
            ["push", "--model", workdir, *where, "--evaluation", tmp_path / "e"],
            ["info", "me/tok@main", "--json"],
        )
        assert codes == [0, 0, 0, 0, 2, 0] and "evaluate the model that you publish" in error, error
        commits = [commit for commit, _ in server.repos["me/tok"][1:]]
        assert [x for x in out.splitlines() if x.startswith("me/tok@")] == [
            f"me/tok@{commit}" for commit in commits
        ]
        assert server.private == {"me/tok"}
        first, newest = (server.files("me/tok", commit)[1] for commit in (commits[0], commits[2]))
        shown = Image.open(io.BytesIO(first[hub.PICTURE]))
        assert not shown.info and np.all(np.asarray(shown) == 9)
        assert COMMAND.split("/home")[0] in first[hub.CARD].decode()
        assert (
            "PSNR" in newest[hub.CARD].decode() and "## Training" not in newest[hub.CARD].decode()
        )
        (point,) = (tmp_path / "e" / "points").glob("*.json")
        stamp = json.loads(point.read_text())["metadata"]["model"]
        assert stamp["origin"] == f"me/tok@{commits[1]}"
        assert stamp["fingerprint"] == FlexTok.from_pretrained(second).fingerprint
        info = json.loads(out[out.index("{") : out.rindex("}") + 1])
        assert info["origin"] == f"me/tok@{commits[2]}"
        # The first one again, by its commit; others are refused.
        codes, out, error = run(
            server,
            tmp_path,
            ["info", f"me/tok@{commits[0]}"],
            ["info", "me/tok@nothing"],
            ["info", "me/nothing"],
        )
        assert codes == [0, 2, 2] and tiny_tokenizer().fingerprint in out
        assert "Invalid rev id: nothing" in error and "me/nothing" in error


@pytest.mark.slow
def test_a_generator_names_a_published_tokenizer_and_a_vae_lies_in_a_folder(tmp_path):
    vae = {f"vae/{path.name}": path.read_bytes() for path in (GOLDEN / "vae").iterdir()}
    vae[f"vae/{sources.VAE_HALF}"] = vae.pop(f"vae/{vae_files.WEIGHTS}")
    with hub_server.running() as server:
        server.repos["me/pipeline"] = [("c" * 40, vae | {"model_index.json": b"{}"})]
        push = ["push", "--model", "demo-digits-ar", "--repo", "me/gen", "--license", "apache-2.0"]
        codes, out, error = run(
            server,
            tmp_path,
            [*push, "--tokenizer", "me/tok"],
            ["info", "me/pipeline@main/vae", "--json"],
            ["info", "me/pipeline@main/unet"],
        )
        assert codes == [0, 0, 2], error
        assert "me/pipeline@main/unet: the repository holds no" in error
        found = json.loads(out[out.index("{") : out.rindex("}") + 1])
        assert found["origin"] == f"me/pipeline@{'c' * 40}/vae"
        assert found["kind"] == "vae" and found["config"]["block_out"] == [32, 32, 64]
        files = server.files("me/gen")[1]
    (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    gen = ImageGenerator.from_pretrained(tmp_path)
    assert gen.tokenizer_source == "me/tok"
    assert gen.fingerprint == ImageGenerator.from_pretrained("demo-digits-ar").fingerprint
    assert 'tokenizer=FlexTok.from_pretrained("me/tok")' in files[hub.CARD].decode()
