"""`flextok search`: what it writes, what it refuses, and how it goes on after an interruption."""

import dataclasses
import json

import numpy as np
import pytest
from common import TINY, changed, tiny_generator
from PIL import Image

from flextok_jax import cli, token_search
from flextok_jax.io.formats import flexar

CFG = changed(TINY, tokens__count=4, encoder__depth=1, decoder__depth=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(the arguments of a search with an AR model and its tokenizer, as files)."""
    folder = tmp_path_factory.mktemp("models")
    gen = tiny_generator(CFG)
    names = {"classes": ["cat", "dog", *"23456789"]}
    gen = dataclasses.replace(gen, _file=flexar.LoadedAR(gen.config, {}, names))
    gen.save_pretrained(folder / "ar")
    gen.tokenizer.save_pretrained(folder / "tokenizer")
    Image.new("RGB", (8, 8), "white").save(folder / "white.png")
    return ["--model", folder / "ar", "--tokenizer", folder / "tokenizer", "--steps", 2,
            "--search-steps", 1, "--beams", 2, "--candidates", 3]  # fmt: skip


def run(*arguments) -> int:
    return cli.main(["search", *map(str, arguments)])


def test_a_search_is_written_and_continued(models, tmp_path, monkeypatch, capsys):
    white = models[1].parent / "white.png"
    args = [*models, "--labels", "dog,0", "--verifier", "psnr,agreement", "--reference", white]
    args += ["--results", 2, "--judge", "likelihood,psnr"]
    real, calls = token_search._scored, []

    def fifth_fails(*given, **more):
        calls.append(given)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(token_search, "_scored", fifth_fails)
    out = tmp_path / "parts"
    assert run(*args, "--out", out) == 130
    assert run(*args, "--out", out) == 0 and len(calls) == 6 + 3
    assert run(*args, "--out", out) == 0 and len(calls) == 6 + 3  # Nothing is left to do.
    monkeypatch.undo()
    assert run(*args, "--out", tmp_path / "whole") == 0
    assert "psnr+agreement" in capsys.readouterr().out
    found = json.loads((out / "search.json").read_text())
    whole = json.loads((tmp_path / "whole" / "search.json").read_text())
    assert [one["class"] for one in found["searches"]] == ["dog", "cat"]
    for one, same in zip(found["searches"], whole["searches"]):
        assert one["scores"] == pytest.approx(same["scores"], rel=1e-4)
        assert set(one["judged"]) == {"likelihood", "psnr"} and len(one["files"]) == 2
        assert [step["num_tokens"] for step in one["steps"]] == [1, 2, 4]
        for name, score in zip(one["files"], one["scores"]):
            with Image.open(out / name) as image, Image.open(tmp_path / "whole" / name) as other:
                assert float(image.text["score"]) == score
                assert image.text["verifier"] == "psnr+agreement"
                assert np.abs(np.asarray(image).astype(int) - np.asarray(other)).max() <= 1
    assert found["cost"]["images"] == whole["cost"]["images"] == 2 * (3 * 6 + 2)
    with np.load(out / "tokens.npz") as a, np.load(tmp_path / "whole" / "tokens.npz") as b:
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        assert a["names"].tolist() == sum((one["files"] for one in found["searches"]), [])
    page = (out / "report.html").read_text()
    assert page.count("Beams") == 2 and "from 1" in page
    assert run(*args, "--branch", "last", "--out", out) == 2
    assert "branch" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, named",
    [
        (
            ["--verifier", "beauty"],
            "allowed are likelihood, agreement, psnr, dino:SOURCE",
        ),
        (["--verifier", "clip"], "clip:SOURCE"),
        (["--verifier", "agreement:x"], "'agreement:x'"),
        (["--verifier", "psnr"], "--reference"),
        (["--verifier", "aesthetic:x"], "--aesthetic-head"),
        (["--verifier", "agreement", "--labels", "10"], "'10' is no class"),
        (["--verifier", "agreement", "--text", "a cat"], "no text model"),
        (["--verifier", "agreement", "--schedule", "2,1"], "ascending"),
        (["--verifier", "agreement", "--results", "3"], "results=3"),
        ([], "--verifier"),
    ],
)
def test_what_cannot_be_searched_is_refused(models, tmp_path, capsys, arguments, named):
    assert run(*models, *arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert named in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()
