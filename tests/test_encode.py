"""Encoded data sets: what is written is read, interrupted work is continued, nothing is mixed."""

import functools
import json
import types

import numpy as np
import pytest
from common import digits_folder, tiny_tokenizer
from PIL import Image

from flextok_jax import FlexTok, cli
from flextok_jax.commands import encode as command
from flextok_jax.data import records as record_files
from flextok_jax.data import shards, sources
from flextok_jax.data.pipeline import make_pipeline
from flextok_jax.data.reader import Unreadable
from flextok_jax.data.records import NULL_TEXT, Record

TOKENIZER = {"source": "a", "origin": "model A", "fingerprint": "aaaa", "levels": [8, 5]}


def settings(**changes):
    return {
        "tokenizer": TOKENIZER, "vocab_size": 40, "num_tokens": 4, "crops": 3, "num_shards": 3,
        "num_images": 16, "arrays": {"tokens": [4]},
    } | changes  # fmt: skip


def records(shard, text=False):
    rng = np.random.RandomState(shard)
    return [
        Record(
            f"{shard}/{i}",
            {"tokens": rng.randint(0, 40, (3, 4)).astype(np.uint16)},
            int(rng.randint(10)),
            f"été {i}" if text else None,
            rng.standard_normal((1 + i % 3, 6)).astype(np.float16) if text else None,
        )
        for i in range(5)
    ]


def made(shard, text=False):
    """The records of one shard, and what it leaves out."""
    return records(shard, text) + [Unreadable("broken.jpg", "no image")] * (shard == 1)


def write(folder, split="train", text=False, **changes):
    make, null = functools.partial(made, text=text), np.ones((2, 6)) if text else None
    return shards.write_split(folder / split, settings(**changes), make, null)


def pipeline(folder, train=True, seed=0, batch_size=6, index=0, count=1):
    cfg = types.SimpleNamespace(
        source="tokens",
        path=str(folder),
        split="train",
        eval_split="train",
        max_unreadable=0.1,
    )
    return make_pipeline(
        cfg, seed=seed, batch_size=batch_size, train=train, process_index=index, process_count=count
    )


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# Records.


@pytest.mark.parametrize("vocab, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_a_record_comes_back_with_the_smallest_integers_that_hold_the_ids(vocab, dtype):
    ids = record_files.stored_tokens(np.array([[0, vocab - 1]]), vocab)
    record = Record("ä/1.png", {"tokens": ids}, 7, "Ein Würfel", np.ones((3, 5), np.float16))
    again = record_files.from_bytes(record_files.to_bytes(record))
    assert again.arrays["tokens"].dtype == dtype and again.embedding.dtype == np.float16
    assert (again.key, again.label, again.caption) == ("ä/1.png", 7, "Ein Würfel")
    np.testing.assert_array_equal(again.arrays["tokens"], [[0, vocab - 1]])
    plain = record_files.from_bytes(record_files.to_bytes(Record("b", {"tokens": ids})))
    assert (plain.label, plain.caption, plain.embedding) == (-1, None, None)
    for wrong in (vocab, -1):
        with pytest.raises(ValueError, match=f"id {wrong}: must be in 0..{vocab - 1}"):
            record_files.stored_tokens(np.array([[wrong]]), vocab)


def test_shards_hold_every_record_in_order_and_the_manifest_says_so(tmp_path):
    manifest = write(tmp_path)
    source = shards.ShardSource(tmp_path, "train")
    expected = [record for shard in range(3) for record in records(shard)]
    assert len(source) == len(expected) == 15
    for i, record in enumerate(expected):
        found = source.record(i)
        np.testing.assert_array_equal(found.arrays["tokens"], record.arrays["tokens"])
        assert found.label == record.label and found.key == record.key == source.key(i)
    assert manifest["unreadable"] == {"broken.jpg": "no image"}
    assert manifest == json.loads((tmp_path / "train" / "manifest.json").read_text())
    for name, info in manifest["shards"].items():
        data = (tmp_path / "train" / name).read_bytes()
        assert info["bytes"] == len(data) and info["records"] == 5 and info["max_label"] <= 9


# Batches.


def test_a_batch_is_one_crop_of_each_image_by_seed_and_step(tmp_path):
    write(tmp_path)
    p = pipeline(tmp_path)
    batch = p[0]
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "tokens": ((6, 4), np.int32), "label": ((6,), np.int32),
    }  # fmt: skip
    everything = [record for shard in range(3) for record in records(shard)]
    crops = set()
    for step in range(60):
        for row, label in zip(p[step]["tokens"], p[step]["label"]):
            at = [(i, c) for i, r in enumerate(everything) for c in range(3)
                  if (r.arrays["tokens"][c] == row).all() and r.label == label]  # fmt: skip
            assert len(at) == 1
            crops.add(at[0])
    assert len(crops) == 45  # All crops of all images come, in 24 epochs.
    again = pipeline(tmp_path)[3]
    np.testing.assert_array_equal(again["tokens"], p[3]["tokens"])
    assert (pipeline(tmp_path, seed=1)[3]["tokens"] != p[3]["tokens"]).any()
    parts = [pipeline(tmp_path, index=i, count=2)[3]["tokens"] for i in range(2)]
    np.testing.assert_array_equal(np.concatenate(parts), p[3]["tokens"])
    np.testing.assert_array_equal(next(p.iterate(3))["tokens"], p[3]["tokens"])


def test_evaluation_sees_the_plain_crop_of_every_image_once(tmp_path):
    write(tmp_path)
    batches = list(pipeline(tmp_path, train=False).eval_batches(6))
    assert [b["mask"].tolist() for b in batches] == [[True] * 6] * 2 + [[True] * 3 + [False] * 3]
    rows = np.concatenate([b["tokens"] for b in batches])[:15]
    expected = [record.arrays["tokens"][0] for shard in range(3) for record in records(shard)]
    np.testing.assert_array_equal(rows, expected)


def test_text_is_padded_to_the_longest_caption_with_a_mask(tmp_path):
    write(tmp_path, text=True, text_dim=6)
    (batch, *_) = pipeline(tmp_path, train=False).eval_batches(5)
    assert batch["text"].shape == (5, 3, 6) and batch["text"].dtype == np.float16
    assert batch["text_mask"].sum(1).tolist() == [1, 2, 3, 1, 2]
    for row, mask, record in zip(batch["text"], batch["text_mask"], records(0, text=True)):
        np.testing.assert_array_equal(row[mask], record.embedding)
        assert not row[~mask].any()


def test_long_captions_are_cut_and_other_channels_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_TEXT", 2)
    write(tmp_path, text=True, text_dim=6)
    p = pipeline(tmp_path, train=False)
    (batch, *_) = p.eval_batches(5)
    assert batch["text"].shape == (5, 2, 6)
    assert batch["text_mask"].sum(1).tolist() == [1, 2, 2, 1, 2] and p.source.skipped
    make = functools.partial(made, text=True)
    with pytest.raises(ValueError, match="0/0.*6.*5"):
        shards.write_split(tmp_path / "b" / "train", settings(), make, np.ones((2, 5)))


# Interruption, damage, mixing.


def test_a_run_killed_between_shards_continues_to_the_same_files(tmp_path):
    write(tmp_path / "whole")
    begun = []

    def killed(shard):
        begun.append(shard)
        yield from made(shard)
        if shard == 2 and begun.count(2) == 1:
            raise KeyboardInterrupt

    folder = tmp_path / "killed" / "train"
    with pytest.raises(KeyboardInterrupt):
        shards.write_split(folder, settings(), killed)
    with pytest.raises(ValueError, match="2 of 3 shards.*it continues"):
        shards.ShardSource(tmp_path / "killed", "train")
    (folder / ".records-00002-of-00003.half.array_record").write_bytes(b"half")
    shards.write_split(folder, settings(), killed)
    assert begun == [0, 1, 2, 2]
    assert contents(folder) == contents(tmp_path / "whole" / "train")


def test_a_shortened_shard_is_noticed_and_a_deleted_one_made_again(tmp_path):
    write(tmp_path)
    before = contents(tmp_path / "train")
    shard = tmp_path / "train" / "records-00001-of-00003.array_record"
    shard.write_bytes(before[shard.name][:-9])
    with pytest.raises(ValueError, match="records-00001"):
        shards.ShardSource(tmp_path, "train")
    shard.unlink()
    write(tmp_path)
    assert contents(tmp_path / "train") == before


def test_tokenizers_and_settings_are_not_mixed(tmp_path):
    write(tmp_path)
    before = contents(tmp_path / "train")
    other = TOKENIZER | {"origin": "model B", "fingerprint": "bbbb"}
    for split in ("train", "test"):  # Also beside it.
        with pytest.raises(ValueError, match="(?s)'aaaa' there, 'bbbb' now.*'model A'.*'model B'"):
            write(tmp_path, split, tokenizer=other)
    with pytest.raises(ValueError, match="crops: 3 there, 4 now"):
        write(tmp_path, crops=4)
    assert contents(tmp_path / "train") == before and not (tmp_path / "test").exists()
    write(tmp_path, "test", tokenizer=TOKENIZER | {"origin": "A elsewhere"})  # The same weights.


def test_a_missing_split_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="flextok encode.*--split test"):
        shards.ShardSource(tmp_path, "test")


def test_data_of_another_format_are_refused_with_the_remedy(tmp_path):
    write(tmp_path)
    file = tmp_path / "train" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 1}))
    for read in (
        lambda: shards.ShardSource(tmp_path, "train"),
        lambda: sources.parse(str(tmp_path)),
        lambda: write(tmp_path),
        lambda: write(tmp_path, "test"),
    ):
        with pytest.raises(ValueError, match="has format 1, .* reads 2"):
            read()


def test_too_many_left_out_by_all_processes_together_are_no_finished_split(tmp_path):
    def make(shard):
        return records(shard)[:4] + [Unreadable(f"{shard}.jpg", "no image")]

    folder = tmp_path / "train"
    for index in range(2):
        shards.write_split(folder, settings(num_images=15), make, part=(index, 3))
    with pytest.raises(OSError, match="(?s)Of 15 images, more than 10.0%.*0.jpg.*1.jpg.*2.jpg"):
        shards.write_split(folder, settings(num_images=15), make, part=(2, 3))
    with pytest.raises(ValueError, match="it continues"):
        shards.ShardSource(tmp_path, "train")


def test_a_split_without_a_record_is_refused(tmp_path):
    one = settings(num_shards=1, num_images=1)
    shards.write_split(tmp_path / "train", one, lambda _: [Unreadable("a.jpg", "no image")])
    with pytest.raises(ValueError, match="(?s)holds no records.*a.jpg"):
        shards.ShardSource(tmp_path, "train")


# The command.


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Six images in two classes with captions and embeddings, one broken."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.RandomState(0)
    for i in range(6):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.randint(0, 256, (12, 9 + i, 3), np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"image {i}\n")
        np.save(path.with_suffix(".npy"), np.full((1 + i, 6), i, np.float32))
    np.save(folder / NULL_TEXT, np.zeros((1, 6), np.float32))
    (folder / "class0" / "2.png").write_bytes(b"this is no image")
    return folder


def run(*arguments):
    return cli.main([str(a) for a in ("tokenize", *arguments)])


def test_the_command_writes_the_tokens_of_each_crop(model, images, tmp_path, capsys):
    args = ["--model", model, "--data", images, "--split", "all", "--out", tmp_path / "out"]
    args += ["--crops", 3, "--num-tokens", 4, "--shard-size", 4, "--batch-size", 5]
    assert run(*args) == 0
    out, err = capsys.readouterr()
    assert "4 tokens of each of 5 images" in out
    assert "1 of 6 images" in err and "class0/2.png: UnidentifiedImageError" in err
    source = shards.ShardSource(tmp_path / "out", "all")
    manifest, tok = source.manifest, FlexTok.from_pretrained(model)
    assert manifest["tokenizer"]["fingerprint"] == tok.fingerprint
    assert (manifest["classes"], manifest["vocab_size"]) == (["class0", "class1"], 200)
    found = [source.record(i) for i in range(len(source))]
    assert [r.label for r in found] == [0, 0, 1, 1, 1]
    assert [r.caption for r in found] == [f"image {i}" for i in (0, 4, 1, 3, 5)]
    assert [len(r.embedding) for r in found] == [1, 5, 2, 4, 6] and source.text == (6, 6)
    from flextok_jax.data.decode import upright
    from flextok_jax.data.transforms import center_crop

    plain = center_crop(upright((images / "class0" / "0.png").read_bytes()), 8)
    np.testing.assert_array_equal(found[0].arrays["tokens"][0], tok.tokenize(plain[None], 4)[0])
    assert all(len(np.unique(r.arrays["tokens"], axis=0)) > 1 for r in found)
    # Other sizes of batches and shards change nothing; another order of work does not either.
    args[args.index("--out") + 1] = tmp_path / "again"
    args[-1], args[-3] = 2, 99
    assert run(*args) == 0
    again = shards.ShardSource(tmp_path / "again", "all")
    assert [again.record(i).arrays["tokens"].tolist() for i in range(5)] == [
        source.record(i).arrays["tokens"].tolist() for i in range(5)
    ]


def test_an_interrupted_command_continues(model, tmp_path, monkeypatch):
    args = ["--model", model, "--data", digits_folder(), "--limit", 9, "--out", tmp_path]
    args += ["--shard-size", 4, "--split", "test"]
    monkeypatch.setattr(command, "side", lambda tok: 16)
    calls = []

    def tokenize(tok, images, k):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return np.zeros((len(images), k), np.int32)

    monkeypatch.setattr(FlexTok, "tokenize", tokenize)
    assert run(*args) == 130
    assert run(*args) == 0 and len(calls) == 4
    assert len(shards.ShardSource(tmp_path, "test")) == 9
    assert run(*args) == 0 and len(calls) == 4  # Nothing is left to do.


@pytest.mark.parametrize("command", ["encode", "reconstruct", "evaluate", "tokenize", "pack"])
def test_encoded_data_are_refused_where_images_are_wanted(command, model, tmp_path, capsys):
    write(tmp_path / "data")
    given, out = str(tmp_path / "data"), ["--out", str(tmp_path / "out")]
    images = "--data" if command in ("encode", "evaluate") else "--images"
    arguments = [command, "--model", model, images, given, *out]
    if command == "pack":
        arguments = ["data", "pack", given, *out]
    assert cli.main(arguments) == 2
    assert f"error: {given} holds what `flextok encode` made" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
