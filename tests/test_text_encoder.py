"""T5's encoder agrees with transformers, is read from published folders, and refuses others."""

import json
import pickle
import shutil
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
from common import GOLDEN, relative
from safetensors.numpy import load_file, save_file
from test_sharding import BIG, MESH, boxes

from flextok_jax import TextEncoder
from flextok_jax.io import sources, storage
from flextok_jax.io.formats import t5 as files
from flextok_jax.io.formats import weights
from flextok_jax.nn import layout, t5
from flextok_jax.parallel.mesh import make_mesh

KINDS = ("t5_a", "t5_b")


def folder(kind):
    return GOLDEN / "text" / kind


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    """(the encoder, its prompts, the reference's numbers)."""
    place = folder(request.param)
    prompts = json.loads((place / "prompts.json").read_text())
    encoder = TextEncoder.from_pretrained(place)
    return encoder, prompts, load_file(place / "io.safetensors")


@pytest.mark.filterwarnings("ignore:the prompt")
def test_ids_masks_and_embeddings_agree_with_transformers(model):
    encoder, prompts, io = model
    most = io["ids"].shape[1]  # Of t5_a what texts are cut to, of t5_b the longest.
    ids, mask = encoder.tokenize(prompts, most)
    np.testing.assert_array_equal(ids[:, :most], io["ids"])
    np.testing.assert_array_equal(mask[:, :most], io["mask"])
    found, mask = encoder.encode(prompts, most)
    assert found.dtype == np.float32 and found.shape[:2] == mask.shape
    assert not mask[:, most:].any() and mask.shape[1] & (mask.shape[1] - 1) == 0
    assert relative(found[mask], io["last_hidden_state"]) < 1e-5


def test_an_embedding_depends_on_its_prompt_alone(model):
    """Not on the padding, nor on the others in the batch."""
    encoder, prompts, _ = model
    short = [p for p in prompts if len(p) < 100]
    together, mask = encoder.encode(short)
    for i in (1, len(short) - 1):
        (alone,), (kept,) = encoder.encode(short[i : i + 1])
        assert relative(alone[kept], together[i][mask[i]]) < 1e-5
    (null,), (kept,) = encoder.null
    assert kept.tolist() == [True] and encoder.null is encoder.null
    np.testing.assert_array_equal(null, encoder.encode([""])[0][0])
    assert relative(null, together[0][mask[0]]) < 1e-5


def test_bfloat16_stays_close_and_is_stored_as_such(model):
    encoder, prompts, io = model
    half = TextEncoder.from_pretrained(encoder.origin, dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}
    short = [p for p in prompts if len(p) < 100]
    (wanted, mask), (found, _) = encoder.encode(short), half.encode(short)
    assert found.dtype == np.float32
    assert relative(found[mask], wanted[mask]) < 0.03


def test_a_mesh_changes_nothing():
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    one, other = (TextEncoder.from_pretrained(folder("t5_a"), mesh=m) for m in (None, mesh))
    prompts = ["a red cube", "", "cat"]
    for found, wanted in zip(other.encode(prompts), one.encode(prompts)):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_distances_have_the_published_buckets():
    """Up to 7 one each, then from 8, 12, 16, 23, 32, 46, 64 and 91 on."""
    distance = np.arange(300)[None] - np.arange(300)[:, None]
    bounds = np.array([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91])
    wanted = (np.abs(distance)[..., None] >= bounds).sum(-1) + 16 * (distance > 0)
    np.testing.assert_array_equal(t5.buckets(300, 32, 128), wanted)


@pytest.mark.parametrize(
    "sizes, count",
    [
        (dict(width=512, depth=8, num_heads=6, mlp_hidden=1024), 35.3),
        (dict(width=768, depth=12, num_heads=12, mlp_hidden=2048), 109.6),
        (dict(width=1024, depth=24, num_heads=16, mlp_hidden=2816), 341.2),
        (dict(), 1223.4),
        (dict(width=4096, num_heads=64, mlp_hidden=10240), 4762),
    ],
)
def test_published_sizes_have_the_published_numbers_of_parameters(sizes, count):
    shapes = t5.shapes(t5.T5Config(**sizes))
    found = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
    assert found == pytest.approx(count, rel=2e-3)
    for path, box in boxes(shapes).items():
        assert box.value.size <= BIG or any(layout.spec(box, MESH)), path


# Files.


def split(out, write=save_file, index=weights.INDEX, name="model-{}.safetensors"):
    """t5_b in three files, of which the last holds nothing of the encoder, and is not there."""
    out.mkdir()
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(folder("t5_b") / file, out)
    tensors = load_file(folder("t5_b") / "model.safetensors")
    parts = {name.format(i): {} for i in range(3)}
    for i, key in enumerate(sorted(tensors)):
        mine = key.startswith(("encoder.", "shared."))
        parts[name.format(i % 2 if mine else 1 if i % 2 else 2)][key] = tensors[key]
    where = {key: file for file, part in parts.items() for key in part}
    (out / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    *files_there, absent = parts
    for file in files_there:
        write(parts[file], out / file)
    assert any(key.startswith("decoder.") for key in parts[absent])
    return out


def test_only_files_and_tensors_of_the_encoder_are_read(tmp_path, monkeypatch):
    wanted = TextEncoder.from_pretrained(folder("t5_b")).fingerprint
    place, read = split(tmp_path / "in"), []
    monkeypatch.setattr(storage.Lazy, "__array__", counted(read))
    assert TextEncoder.from_pretrained(place).fingerprint == wanted
    assert len(read) == 4 * 9 + 3 and all(name.startswith(("enc", "shared")) for name in read)


def counted(read):
    real = storage.Lazy.__array__

    def array(self, *args, **options):
        read.append(self._name)
        return real(self, *args, **options)

    return array


def test_of_the_hub_only_what_the_index_names_is_fetched(tmp_path, monkeypatch):
    place, asked = split(tmp_path / "in"), []

    def fetch(hub_id, names, revision):
        asked.extend(names)
        return place

    monkeypatch.setattr(sources, "_fetch", fetch)
    assert TextEncoder.from_pretrained("owner/t5").config.depth == 4
    weights = [name for name in asked if name.endswith((".safetensors", ".bin"))]
    assert sorted(weights) == ["model-0.safetensors", "model-1.safetensors"]


def write_torch(tensors, path):
    """What torch.save writes of a state dict."""

    class FloatStorage:
        pass

    class Tensor:
        def __init__(self, key, array):
            self.key, self.array = key, array

        def __reduce__(self):
            steps = tuple(s // 4 for s in self.array.strides)
            return rebuild, (("storage", self.key), 0, self.array.shape, steps, False, {})

    def rebuild():
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, tuple) and value[:1] == ("storage",):
                return ("storage", FloatStorage, value[1], "cpu", 0)

    FloatStorage.__module__, FloatStorage.__qualname__ = "torch", "FloatStorage"
    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    modules = {name: types.ModuleType(name) for name in ("torch", "torch._utils")}
    modules["torch"].FloatStorage = FloatStorage
    modules["torch._utils"]._rebuild_tensor_v2 = rebuild
    with pytest.MonkeyPatch.context() as patch, zipfile.ZipFile(path, "w") as archive:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        with archive.open("archive/data.pkl", "w") as file:
            state = {key: Tensor(str(i), array) for i, (key, array) in enumerate(tensors.items())}
            Pickler(file, 2).dump(state)
        for i, (key, array) in enumerate(tensors.items()):
            if not key.startswith("decoder."):  # Whose bytes nobody may ask for.
                archive.writestr(f"archive/data/{i}", array.tobytes())


def test_pytorch_files_are_read_by_the_names_of_the_encoder(tmp_path):
    wanted = TextEncoder.from_pretrained(folder("t5_b")).fingerprint
    place = split(tmp_path / "in", write_torch, weights.TORCH_INDEX, "pytorch_model-{}.bin")
    assert TextEncoder.from_pretrained(place).fingerprint == wanted


def changed(out, config=(), tensors=None, without=()):
    """t5_b with other keys of config.json, other tensors, without some files."""
    shutil.copytree(folder("t5_b"), out)
    found = json.loads((out / "config.json").read_text()) | dict(config)
    (out / "config.json").write_text(json.dumps(found))
    if tensors:
        both = load_file(out / "model.safetensors")
        tensors(both)
        save_file(both, out / "model.safetensors")
    for name in without:
        (out / name).unlink()
    return out


FIRST = "encoder.block.0.layer.1.DenseReluDense."


def as_v1_0(tensors):
    for i in range(4):
        name = FIRST.replace("0", str(i), 1)
        tensors[name + "wi.weight"] = tensors.pop(name + "wi_0.weight")
        del tensors[name + "wi_1.weight"]


def spoil(tensors):
    del tensors[FIRST + "wo.weight"]
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"] + 1


REFUSED = {
    "v1.0": (dict(tensors=as_v1_0, config={"feed_forward_proj": "relu"}), ["v1.0", "Flan-T5"]),
    "other": (dict(config={"model_type": "umt5"}), ["'umt5'"]),
    "tokenizer": (dict(without=["tokenizer.json"]), ["no tokenizer.json", "google/flan-t5-small"]),
    "weights": (dict(without=["model.safetensors"]), ["no model.safetensors or pytorch_model.bin"]),
    "all reasons": (
        dict(tensors=spoil, config={"num_heads": 4, "feed_forward_proj": "gated-silu"}),
        ["missing tensor " + FIRST + "wo.weight", "embed_tokens.weight differ", "num_heads=4"]
        + ["feed_forward_proj='gated-silu'"],
    ),
}


@pytest.mark.parametrize("change, parts", REFUSED.values(), ids=REFUSED)
def test_what_is_not_understood_is_refused_with_every_reason(change, parts, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        TextEncoder.from_pretrained(changed(tmp_path / "in", **change))
    for part in parts:
        assert part in str(error.value)


def test_early_configurations_that_say_gelu_are_gated(tmp_path):
    config = {"feed_forward_proj": "gelu", "is_gated_act": True}
    place = changed(tmp_path / "in", config)
    assert files.load(place).assumed == (files.ASSUMED_GELU,)
    assert files.load(folder("t5_b")).assumed == ()
    assert files.load(place).config.blocks.mlp == "geglu"


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    place = changed(tmp_path / "in")
    shutil.copy(folder("t5_a") / "tokenizer.json", place)
    (place / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        TextEncoder.from_pretrained(place)
    small = lambda tensors: tensors.update({"shared.weight": tensors["shared.weight"][:50]})  # noqa: E731
    place = changed(tmp_path / "small", {"vocab_size": 50}, small)
    with pytest.raises(ValueError, match="50 rows"):
        TextEncoder.from_pretrained(place)


def test_float16_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="65504.*bfloat16"):
        TextEncoder.from_pretrained(folder("t5_a"), dtype="float16")


def test_long_prompts_are_cut_with_a_warning_and_keep_the_end(model):
    encoder, *_ = model
    with pytest.warns(UserWarning, match="tokens: the first 511 and the end"):
        ids, mask = encoder.tokenize(["cat " * 10_000, "cat"])
    assert ids.shape == (2, 512) and mask[0].all()
    assert ids[0, -1] == 1 and (ids[0, :-1] != 1).all()
    for wrong in ("a cat", [], [b"a cat"]):
        with pytest.raises(ValueError, match="list of at least one text"):
            encoder.encode(wrong)
