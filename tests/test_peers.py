"""Released tokenizers of other projects agree with their reference implementations.

tests/golden/peers has what those made of weights that follow from names and shapes; its README has
tolerances and quirks.
"""

import atexit
import dataclasses
import functools
import json
import pathlib
import re
import shutil
import struct
import tempfile
import zipfile
import zlib

import jax
import msgpack
import numpy as np
import pytest
from common import GOLDEN, relative
from PIL import Image
from safetensors.numpy import load_file, save_file

from flextok_jax import FlexTok
from flextok_jax.cli import main
from flextok_jax.io import sources
from flextok_jax.io.formats.peers import common, convs, titok
from flextok_jax.io.formats.peers import elastictok as peers_elastictok
from flextok_jax.nn import bottleneck, flextok, fsq, layers, vae
from flextok_jax.nn.config import Compute
from flextok_jax.nn.decoder import Condition, Decoder
from flextok_jax.nn.encoder import Encoder
from flextok_jax.nn.images import to_float
from flextok_jax.nn.tokenizer_config import Bottleneck

PEERS = GOLDEN / "peers"


@functools.cache
def spec(case):
    return json.loads((PEERS / case / "spec.json").read_text())


@functools.cache
def io(case):
    return load_file(PEERS / case / "io.safetensors")


@functools.cache
def weights(case):
    """The tensors of a case by their rule."""
    found, salt = {}, spec(case)["salt"]
    for name, (shape, mean, std) in spec(case)["tensors"].items():
        rng = np.random.Generator(np.random.PCG64(zlib.crc32((salt + name).encode())))
        x = rng.standard_normal(shape, dtype=np.float32)
        found[name] = np.float32(mean) + np.float32(std) * x
    return found


@functools.cache
def folder(case) -> pathlib.Path:
    """A released folder with these tensors; removed at the end of the process."""
    path = pathlib.Path(tempfile.mkdtemp(prefix=case, dir=_temporary()))
    save_file(weights(case), path / "model.safetensors")
    if (PEERS / case / "config.json").exists():
        (path / "config.json").write_text((PEERS / case / "config.json").read_text())
    return path


@functools.cache
def _temporary():
    path = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def tokenizer(case):
    return FlexTok.from_pretrained(folder(case))


def near(case, name, found):
    expected, tolerance = io(case)[name], spec(case)["tolerance"][name]
    difference = relative(np.asarray(found).reshape(expected.shape), expected)
    assert difference <= tolerance, (name, difference, tolerance)


def seen(apply, params, name, *args):
    """(the result of a module, what its part of this name returned)."""
    result, state = jax.jit(
        lambda params: apply(
            {"params": params}, *args, capture_intermediates=lambda m, _: m.name == name
        )
    )(params)
    return result, state["intermediates"][name]["__call__"][0]


def first(x):
    """[B, h, w, C] in [-1, 1] -> [B, C, h, w] in [0, 1]."""
    return np.transpose((np.asarray(x) + 1) / 2, (0, 3, 1, 2))


def channels(x):
    """[B, K, C] -> [B, C, 1, K]."""
    return np.asarray(x).transpose(0, 2, 1)[:, :, None]


TITOK = (
    "titok_vq8k",
    "titok_vae",
    "tatitok_vq",
    pytest.param("titok_legacy_vq", marks=pytest.mark.slow),
)


@pytest.mark.parametrize("case", TITOK)
def test_titok_agrees(case):
    tok, given = tokenizer(case), io(case)
    cfg, params, check = tok.config, tok.params, functools.partial(near, case)
    assert tok.prefixes == (tok.num_tokens,) and tok.discrete == (case != "titok_vae")
    z, features = seen(Encoder(cfg).apply, params["encoder"], "norm", to_float(given["images"]))
    check("encoder_tokens", features)
    if tok.discrete:
        check("z", channels(z))
        codes, ids, loss = flextok.quantize(params, cfg, z)
        np.testing.assert_array_equal(ids, given["ids"][:, 0])
        check("z_quantized", channels(codes))
        check("quantizer_loss", np.mean(loss))
    else:
        check("parameters", channels(z))
        codes, _, loss = flextok.quantize(params, cfg, z, given["noise"][:, :, 0].swapaxes(1, 2))
        check("sample", channels(codes))
        assert relative(loss, given["kl"].sum(1)) < 1e-5
        for name, x in zip(("mean", "logvar"), vae.split_moments(z)):
            check(name, channels(x))
        mean, logvar = vae.split_moments(np.moveaxis(given["probe_parameters"], 1, -1))
        check("probe_logvar", logvar)
        check("probe_std", np.exp(logvar / 2))
        check("probe_kl", jax.vmap(vae.kl, 2)(mean, logvar))
    tokens = np.asarray(tok.tokenize(given["images"]))
    if tok.discrete:
        np.testing.assert_array_equal(tokens, given["ids"][:, 0])
    codes = flextok.codes_of(params, cfg, tokens)
    condition = Condition(codes, np.full(len(codes), tok.num_tokens), np.zeros(len(codes), bool))
    text = {"text": given["text_guidance"]} if case == "tatitok_vq" else {}
    decoder = functools.partial(Decoder(cfg).apply, **text)
    (made,), logits = seen(decoder, params["decoder"], "head", (condition,))
    check("decoded", first(made))
    if case == "titok_legacy_vq":
        side = cfg.sites.grid[0]
        check("logits", np.asarray(logits).transpose(0, 2, 1))
        soft = np.asarray(jax.nn.softmax(logits)) @ params["decoder"]["codebook"]
        check("soft_codes", np.asarray(soft).transpose(0, 2, 1).reshape(len(soft), -1, side, side))
    else:
        pixels = layers.unpatchify(logits, cfg.sites.patch_size, *cfg.image_size)
        check("before_conv_out", np.transpose(pixels, (0, 3, 1, 2)))
    assert relative(tok.detokenize(tokens, **text), made) < 1e-5
    if text:
        with pytest.raises(ValueError, match="null_text.npy"):
            tok.detokenize(tokens)
        np.save(folder(case) / "null_text.npy", text["text"][1])
        again = FlexTok.from_pretrained(folder(case)).detokenize(tokens)
        assert relative(again[1], made[1]) < 1e-5 and relative(again[0], made[0]) > 1e-3


def sized(tok, height, width):
    """A tokenizer without a Transformer for images of another size."""
    cfg, side = tok.config, tok.config.sites.patch_size
    grid = (height // side, width // side)
    sites = dataclasses.replace(cfg.sites, grid=grid)
    tokens = dataclasses.replace(cfg.tokens, count=grid[0] * grid[1])
    cfg = dataclasses.replace(cfg, sites=sites, tokens=tokens)
    return dataclasses.replace(tok, config=cfg)


@pytest.mark.parametrize(
    "case",
    [
        "llamagen_cut",
        pytest.param("maskgit_vqgan", marks=pytest.mark.slow),
        pytest.param("llamagen_vq8", marks=pytest.mark.slow),
        pytest.param("llamagen_vq16", marks=pytest.mark.slow),
    ],
)
def test_convolutions_agree(case):
    given, check = io(case), functools.partial(near, case)
    images = given["images"]
    tok = sized(tokenizer(case), *images.shape[1:3])
    z = tok.registers(images)
    codes, ids, loss = flextok.quantize(tok.params, tok.config, z)
    check("z", np.asarray(z).swapaxes(1, 2))
    check("quantized", np.asarray(codes).swapaxes(1, 2))
    tokens = tok.tokenize(images)
    for found in (ids, tokens):
        np.testing.assert_array_equal(found, given["ids"].reshape(found.shape))
    if "vq_loss" in given:
        np.testing.assert_allclose(
            np.mean(loss), (given["vq_loss"] + given["commit_loss"]).item(), rtol=3e-5
        )
    decoded = np.asarray(tok.detokenize(np.asarray(tokens)))
    decoded = (decoded + 1) / 2 if case == "maskgit_vqgan" else decoded
    check("decoded", decoded.transpose(0, 3, 1, 2))


def stream(tensors, path):
    """Writes tensors as the file `params` of ElasticTok."""
    with path.open("wb") as file:
        for name, x in tensors.items():
            array = msgpack.packb([list(x.shape), str(x.dtype), x.tobytes()])
            data = msgpack.packb(msgpack.ExtType(1, array))
            file.write(msgpack.packb([name.split("/"), data]))


def elastictok(case, tmp_path):
    """The tokenizer of a case; its heads and image size are not in the file."""
    source = PEERS / case
    if not (source / "params").exists():
        source = tmp_path
        stream(weights(case), tmp_path / "params")
    tok = FlexTok.from_pretrained(source)
    given, cfg = spec(case)["config"], tok.config
    dim = given["hidden_size"] // given["num_attention_heads"]
    side = io(case)["images"].shape[1] // 8
    sites = dataclasses.replace(cfg.sites, grid=(side, side))
    blocks = dataclasses.replace(cfg.encoder, head_dim=dim)
    cfg = dataclasses.replace(
        cfg, sites=sites, encoder=blocks,
        decoder=dataclasses.replace(cfg.decoder, head_dim=dim),
        tokens=dataclasses.replace(cfg.tokens, count=given["max_toks"]),
    )  # fmt: skip
    assert cfg.encoder.rope == cfg.decoder.rope == given["theta"]
    return dataclasses.replace(tok, config=cfg)


@pytest.mark.parametrize(
    "case",
    ["elastictok_fsq_stream", "elastictok_vae_stream", "elastictok_fsq", "elastictok_vae"],
)
def test_elastictok_agrees(case, tmp_path):
    given, check = io(case), functools.partial(near, case)
    tok, images, kept = elastictok(case, tmp_path), given["images"], given["kept"]
    cfg, params, count = tok.config, tok.params, tok.num_tokens
    assert tok.prefixes == tuple(range(1, count + 1))
    z = jax.jit(lambda x: flextok.encode(params, cfg, Compute(), x, keep=kept))(to_float(images))
    check("pre_quant", z)
    found = flextok.quantize(params, cfg, z)
    there = given["encoding_mask"].astype(bool)[..., None]
    codes = np.where(there, found.codes, 0)
    if tok.discrete:
        check("codes", codes)
        np.testing.assert_array_equal(fsq.codes_to_indices(codes, cfg.bottleneck.levels),
                                      given["ids"])  # fmt: skip
    else:
        mean, logvar = vae.split_moments(z)
        check("mean", mean)
        check("logvar", logvar)
        check("z", codes)
        of_kept = np.where(np.concatenate([there] * 16, -1), z, 0)
        check("kl", flextok.quantize(params, cfg, of_kept).loss)
    condition = Condition(found.codes, kept, np.zeros(len(kept), bool))
    (made,), written = seen(Decoder(cfg).apply, params["decoder"], "head", (condition,))
    recon = np.tanh(written)
    check("recon", recon)
    assert relative(made, given["recon_frames"][:, 0]) < 3e-5
    error = np.square(recon.clip(-1, 1) - given["vision"]).mean((1, 2))
    check("block_mse", error)
    for row, k in enumerate(kept):
        k = int(k)
        tokens = np.asarray(tok.tokenize(images[row : row + 1], k))
        if tok.discrete:
            np.testing.assert_array_equal(tokens[0], given["ids"][row, :k])
        assert relative(tok.detokenize(tokens)[0], made[row]) < 1e-5


def test_fsq_decides_at_the_boundaries_as_elastictok_does():
    given, cfg = io("elastictok_fsq"), Bottleneck("fsq", eps=-1e-3)
    found = bottleneck.quantize({}, cfg, given["probe_pre_quant"][None])
    np.testing.assert_array_equal(found.ids[0], given["probe_ids"])
    near("elastictok_fsq", "probe_codes", found.codes)
    ours = bottleneck.quantize({}, Bottleneck("fsq"), given["probe_pre_quant"][None]).ids
    assert np.sum(np.asarray(ours[0]) != given["probe_ids"]) == 32


def test_a_stream_that_is_damaged_or_of_another_model_is_refused(tmp_path):
    data = (PEERS / "elastictok_fsq_stream" / "params").read_bytes()
    path = tmp_path / "params"
    for wrong in (data[:-100], data + b"\x93", b"\x92\x90\xa0" + data):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="no whole stream"):
            FlexTok.from_pretrained(tmp_path)
    tensors = dict(weights("elastictok_fsq_stream"))
    tensors["extra"] = tensors.pop("decoder/ln_f/kernel")
    tensors["decoder/out_proj/kernel"] = tensors["decoder/out_proj/kernel"][:, :9]
    stream(tensors, path)
    with pytest.raises(ValueError) as error:
        FlexTok.from_pretrained(tmp_path)
    for words in ("missing tensor decoder/ln_f/kernel", "unknown tensor extra",
                  "decoder/out_proj/kernel has shape (32, 9), expected (32, 192)"):  # fmt: skip
        assert words in str(error.value)


def torch_file(tensors, path):
    """Writes {"model": tensors, "steps": 7} as PyTorch does."""

    def text(word):
        return b"X" + struct.pack("<I", len(word)) + word.encode()

    def ints(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", x) for x in values) + b"t"

    content = b"\x80\x02}" + text("steps") + b"K\x07s" + text("model") + b"}"
    for key, (name, x) in enumerate(tensors.items()):
        storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(str(key)) + text("cpu")
        storage += b"J" + struct.pack("<i", x.size) + b"tQ"
        strides = ints(stride // x.itemsize for stride in x.strides)
        content += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n("
        content += storage + b"K\x00" + ints(x.shape) + strides + b"\x89}tRs"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content + b"s.")
        for key, x in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", x.tobytes())


def test_a_file_of_pytorch_on_the_hub_is_the_same_model(tmp_path, monkeypatch):
    torch_file(weights("llamagen_cut"), tmp_path / "vq.pt")
    asked = []

    def fetch(hub_id, revision, allow_patterns):
        asked.append((hub_id, *allow_patterns))
        return tmp_path

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    for source in (tmp_path / "vq.pt", "owner/name/vq.pt"):
        assert sources.kind_of(source) == "tokenizer"
        assert FlexTok.from_pretrained(source).fingerprint == tokenizer("llamagen_cut").fingerprint
    assert set(asked) == {("owner/name", "vq.pt")}
    torch_file({"weight": np.zeros(3, np.float32)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="convert a PyTorch file"):
        FlexTok.from_pretrained(tmp_path / "other.pt")


@pytest.mark.slow
def test_the_commands_run(tmp_path, capsys):
    data, model = tmp_path / "images", str(folder("titok_vq8k"))
    data.mkdir()
    for i, image in enumerate(io("titok_vq8k")["images"]):
        Image.fromarray(image).save(data / f"{i}.png")
    images, out = ["--images", str(data)], ["--out", str(tmp_path / "out")]
    assert main(["info", model, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"]["total"] == spec("titok_vq8k")["value_count"]
    assert main(["reconstruct", "--model", model, *images, *out]) == 0
    assert (tmp_path / "out" / "k0008" / "1.png").exists()
    file = str(tmp_path / "tokens.npz")
    assert main(["tokenize", "--model", model, *images, "--out", file]) == 0
    assert np.load(file)["tokens"].tolist() == io("titok_vq8k")["ids"][:, 0].tolist()
    out = ["--out", str(tmp_path / "evaluation")]
    assert main(["evaluate", "--model", model, "--data", str(data), *out]) == 0
    assert (tmp_path / "evaluation" / "report.html").exists()
    capsys.readouterr()
    assert main(["tokenize", "--model", model, *images, "--num-tokens", "4", "--out", file]) == 2
    assert "num_tokens=4: allowed are [8]" in capsys.readouterr().err
    model, file = str(folder("tatitok_vq")), str(tmp_path / "others.npz")
    assert main(["tokenize", "--model", model, *images, "--out", file]) == 0
    assert "commands give it none" in capsys.readouterr().err


COUNTS = json.loads((PEERS / "counts.json").read_text())["tokenizers"]
SIZES = {"s": "small", "b": "base", "l": "large"}
DEPTHS = {"small": 8, "base": 12, "large": 24}


def titok_config(name):
    """(config.json, names of tensors that tell the depths) of a released model, by its name."""
    sizes, count, kind = re.fullmatch(
        r".*tokenizer_\w*titok_([sbl]+)(\d+)_(\w+)", name.replace("_c16", "")
    ).groups()
    encoder, decoder = (SIZES[letter] for letter in (sizes[0], sizes[-1]))
    text = "/tokenizer_tatitok" in name
    kind = "vq8k" if text and kind == "vq" else kind.removesuffix("_imagenet")
    model = {
        "vit_enc_model_size": encoder, "vit_dec_model_size": decoder,
        "num_latent_tokens": int(count), "vit_enc_patch_size": 16, "vit_dec_patch_size": 16,
    } | {
        "imagenet": {"codebook_size": 4096, "token_size": 12, "use_l2_norm": True},
        "vq8k": {"codebook_size": 8192, "token_size": 64, "use_l2_norm": False,
                 "is_legacy": False},
        "vae": {"quantize_mode": "vae", "token_size": 16, "is_legacy": False},
    }[kind]  # fmt: skip
    found = {"model": {"vq_model": model}, "dataset": {"preprocessing": {"crop_size": 256}}}
    both = (("encoder", encoder), ("decoder", decoder))
    names = [f"{p}.transformer.{i}.ln_1.weight" for p, size in both for i in range(DEPTHS[size])]
    tensors = dict.fromkeys(names)
    if text:
        tensors["decoder.text_guidance_proj.weight"] = np.zeros((1024, 768))
    return found, tensors


def elastictok_shapes(kl):
    """Those of the released tensors that tell the configuration."""
    width, frames, dim = 1024, 2 if kl else 1, 8 if kl else 6
    norm = "{0}/{0}_blocks/scan_decoder/attention_norm/kernel".format
    return {
        "encoder/in_proj/kernel": (192 * frames, width),
        "encoder/pre_quant/kernel": (width, 2 * dim if kl else dim),
        "decoder/post_quant/kernel": (dim, width),
        "encoder/encoder_blocks/scan_decoder/feed_forward/w1/kernel": (10, width, 2048),
        norm("encoder"): (10, width),
        norm("decoder"): (10, width),
    }


# The tensors of these have the same names and shapes as in the cases of golden numbers.
CONVS = {"vq_ds16": "llamagen_vq16", "vq-ds16": "llamagen_vq16", "vq_ds8": "llamagen_vq8"}


QUICK = ("s128_imagenet", "tatitok_bl32_vq", "vq_ds8_c2i.pt", "maskgit-vqgan", "FSQ")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if any(part in name for part in QUICK) else pytest.mark.slow)
        for name in COUNTS
    ],
)
def test_the_number_of_parameters_is_that_of_the_released_file(name):
    file = name.split("/")[-1]
    if "tokenizer_" in file:
        cfg, problems = titok.read_config(*titok_config(name))
        assert not problems
    elif "maskgit" in file:
        channels = enumerate((128, 128, 256, 256, 512))
        shapes = {f"encoder.down.{i}.block.0.conv1.weight": (n,) for i, n in channels}
        shapes |= {"encoder.down.0.block.1.conv1.weight": (128,)}
        cfg = convs.read_config(shapes | {"quantize.embedding.weight": (1024, 256)})
    elif "ElasticTok" in file:
        shapes = elastictok_shapes(kl="VAE" in file)
        cfg = peers_elastictok.read_config(shapes)
    else:
        case = CONVS[re.match(r"vq.ds\d+", file)[0]]
        shapes = {name: tuple(shape) for name, (shape, *_) in spec(case)["tensors"].items()}
        cfg = convs.read_config(shapes)
    leaves = jax.tree.leaves(common.shapes(cfg))
    assert sum(leaf.size for leaf in leaves) == COUNTS[name]["parameters"]
    assert cfg.image_size == (256, 256)


def test_a_refusal_lists_every_offender(tmp_path):
    source = folder("titok_vae")
    tensors = dict(weights("titok_vae"))
    tensors["extra"] = tensors.pop("latent_tokens")[:1]
    tensors["latent_tokens"] = np.full((9, 512), np.nan, np.float32)
    del tensors["decoder.ln_post.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        FlexTok.from_pretrained(tmp_path)
    shape = "tensor latent_tokens has shape (9, 512), expected (8, 512)"
    for words in ("missing tensor decoder.ln_post.bias", "unknown tensor extra", shape, "finite"):
        assert words in str(error.value)
    config["model"]["vq_model"] |= {"quantize_mode": "lfq", "vit_enc_model_size": "huge"}
    config["dataset"]["preprocessing"]["crop_size"] = 40
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        FlexTok.from_pretrained(tmp_path)
    for words in ("quantize_mode='lfq'", "vit_enc_model_size='huge'", "crop_size=40"):
        assert words in str(error.value)
