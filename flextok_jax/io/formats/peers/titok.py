"""TiTok (Yu et al., arXiv 2406.07550): `model.safetensors` and `config.json`.

And what has the same names: TA-TiTok (Kim et al., arXiv 2501.07730), whose decoder reads features
of a text, and One-D-Piece (Miwa et al., arXiv 2501.10064), whose decoder was trained with a random
number of first tokens.

Images of these files are in [0, 1]. Ours are in [-1, 1], so the first and the last layer are
rescaled when a file is read.
"""

import re

import numpy as np

from flextok_jax.io import storage
from flextok_jax.io.formats import names
from flextok_jax.io.formats.peers import common, convs
from flextok_jax.nn.config import Blocks
from flextok_jax.nn.tokenizer_config import Bottleneck, Sites, Target, Text, TokenizerConfig, Tokens
from flextok_jax.nn.vae_config import Convs, identity_vae

_WIDTHS = {"small": 512, "base": 768, "large": 1024}
_DEFAULTS = {"quantize_mode": "vq", "is_legacy": True, "vit_enc_patch_size": 16}
_TEXT_LENGTH = 77  # Of CLIP.
_TEXT = "decoder.text_guidance_proj.weight"
_BUFFERS = ("quantize.embed_prob",)
_CODES = Convs("plain", (128, 128, 256, 256, 512), features=256)
_BLOCK = r"\1.transformer.{i}."
_TABLE = (
    ("encoder/registers", "latent_tokens"),
    ("(encoder|decoder)/register_pos", r"\1.latent_token_positional_embedding"),
    ("(encoder|decoder)/class_token", r"\1.class_embedding"),
    ("(encoder|decoder)/positions", r"\1.positional_embedding"),
    ("encoder/patch_emb", "encoder.patch_embed"),
    ("(encoder|decoder)/pre_norm", r"\1.ln_pre"),
    ("(encoder|decoder)/norm", r"\1.ln_post"),
    ("(encoder|decoder)/blocks/norm_([12])", _BLOCK + r"ln_\2"),
    *((f"(encoder|decoder)/blocks/attn/w{name}/{leaf}", f"{_BLOCK}attn.in_proj_{theirs}#{i}")
      for i, name in enumerate("qkv") for leaf, theirs in (("kernel", "weight"), ("bias", "bias"))),
    ("(encoder|decoder)/blocks/attn/proj", _BLOCK + "attn.out_proj"),
    ("(encoder|decoder)/blocks/mlp/fc1", _BLOCK + "mlp.c_fc"),
    ("(encoder|decoder)/blocks/mlp/fc2", _BLOCK + "mlp.c_proj"),
    ("encoder/head", "encoder.conv_out"),
    ("decoder/query", "decoder.mask_token"),
    ("decoder/register_proj", "decoder.decoder_embed"),
    ("decoder/head_hidden", "decoder.ffn.0"),
    ("decoder/head_conv", "decoder.conv_out"),
    ("decoder/codebook", "pixel_quantize.embedding.weight"),
    ("decoder/text_proj", "decoder.text_guidance_proj"),
    ("decoder/text_pos", "decoder.text_guidance_positional_embedding"),
    ("bottleneck/codebook", "quantize.embedding.weight"),
)  # fmt: skip


def find(path):
    """The file of weights, if its tensors are named as TiTok's."""
    return common.weights(path, "latent_tokens", "encoder.latent_token_positional_embedding")


def load(path) -> tuple[TokenizerConfig, dict]:
    """A configuration, and parameters as nested float32 NumPy arrays.

    Raises:
        ValueError: one error lists all that is not understood.
    """
    tensors = {name: x for name, x in common.read(path).items() if name not in _BUFFERS}
    cfg, problems = read_config(storage.read_json(path.parent / "config.json"), tensors)
    if cfg is None:
        raise ValueError(
            f"{path.parent}/config.json is not understood:\n  " + "\n  ".join(problems)
        )
    head = "decoder.ffn.2" if cfg.target.output == "codes" else "decoder.ffn.0"
    table = names.by_table((("decoder/head", head), *_TABLE))

    def name_of(path):
        pixels = path.startswith("decoder/convs/")
        return "pixel_" + convs.plain_name(path) if pixels else table(path)

    return cfg, _signed(common.tokenizer(path, cfg, tensors, name_of))


def read_config(found: dict, tensors: dict) -> tuple[TokenizerConfig | None, list[str]]:
    """(our configuration, []), or (None, every problem); `tensors` have their names as keys."""
    model = found.get("model", {}).get("vq_model", {})
    values = _DEFAULTS | model
    values["crop_size"] = found.get("dataset", {}).get("preprocessing", {}).get("crop_size")
    mode, problems = values["quantize_mode"], []

    def number(name):
        value = values.get(name)
        if type(value) is int and 0 < value <= 2**20:
            return value
        problems.append(f"{name}={value!r}: must be a positive number")
        return 1

    def one_of(name, allowed):
        value = values.get(name)
        if value in allowed:
            return value
        problems.append(f"{name}={value!r}; implemented: {', '.join(map(str, allowed))}")
        return next(iter(allowed))

    legacy = one_of("is_legacy", (True, False))
    one_of("quantize_mode", ("vq", "vae"))
    width = {part: _WIDTHS[one_of(f"vit_{part}_model_size", _WIDTHS)] for part in ("enc", "dec")}
    patch, size = number("vit_enc_patch_size"), number("crop_size")
    values.setdefault("vit_dec_patch_size", patch)
    one_of("vit_dec_patch_size", (patch,))
    if size % patch:
        problems.append(f"crop_size={size}: must be a multiple of vit_enc_patch_size={patch}")
    dim, count = number("token_size"), number("num_latent_tokens")
    if mode == "vae":
        bottleneck = dict(kind="kl")
    else:
        l2 = one_of("use_l2_norm", (True, False))
        bottleneck = dict(kind="vq", size=number("codebook_size"), normalize=l2)
    if legacy and patch != _CODES.downsample:
        problems.append(f"vit_enc_patch_size={patch}; implemented with is_legacy: 16")
    if problems:
        return None, problems
    any_length = values.get("strict_length_assertion") is False
    any_length = any_length or found["model"].get("type") == "one_d_piece"
    keep = dict(keep="uniform", dropped="cut") if any_length else dict(keep="fixed")

    def blocks(part):
        layer = re.compile(rf"{part}oder\.transformer\.\d+\.ln_1\.weight")
        depth = max(1, sum(bool(layer.fullmatch(name)) for name in tensors))
        return Blocks(width[part], depth, 64, norm="affine", qk_norm="none", mlp="gelu", bias=True)

    return TokenizerConfig(
        vae=identity_vae(),
        sites=Sites((size // patch,) * 2, patch, "learned"),
        tokens=Tokens(count, order="full", reshaped=legacy, **keep),
        bottleneck=Bottleneck(levels=(), dim=dim, **bottleneck),
        encoder=blocks("enc"),
        decoder=blocks("dec"),
        target=Target("values", "codes", 1024) if legacy else Target("values", "conv"),
        convs=_CODES if legacy else Convs(),
        text=Text(tensors[_TEXT].shape[-1], _TEXT_LENGTH) if _TEXT in tensors else Text(),
    ), []


def _signed(params: dict) -> dict:
    """Parameters for images in [-1, 1] of those for [0, 1]."""
    first, decoder = params["encoder"]["patch_emb"], params["decoder"]
    first["kernel"] = first["kernel"] / 2
    first["bias"] = (first["bias"] + first["kernel"].sum(0, np.float64)).astype(np.float32)
    if last := decoder.get("head_conv"):
        last.update(kernel=2 * last["kernel"], bias=2 * last["bias"] - 1)
    return params
