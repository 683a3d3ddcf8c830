"""Tokenizers of convolutions alone: the VQ models of LlamaGen, and the VQGAN of MaskGIT.

LlamaGen (Sun et al., arXiv 2406.06525): `vq_ds16_c2i.pt` and `vq_ds8_c2i.pt`, or a folder with
`model.safetensors`. MaskGIT's (Chang et al., arXiv 2202.04200) in PyTorch, of TiTok's authors:
`maskgit-vqgan-imagenet-f16-256.bin`. No configuration comes with them: sizes are those of tensors.
"""

import re

from flextok_jax.io.formats.peers import common
from flextok_jax.nn.config import Blocks
from flextok_jax.nn.tokenizer_config import Bottleneck, Sites, Target, TokenizerConfig, Tokens
from flextok_jax.nn.vae_config import Convs, identity_vae

IMAGE_SIZE = 256  # Of training.
_BOOK = "quantize.embedding.weight"
# A block of each kind: {level} counts from the finest resolution.
_BLOCK = {
    "attentive": "encoder.conv_blocks.{}.res.{}.conv1.weight",
    "plain": "encoder.down.{}.block.{}.conv1.weight",
}
_BUFFERS = ("quantize.codebook_used",)
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out_0": "proj_out"}


def find(path):
    """The file of weights, if its tensors are named as one of these."""
    for block in _BLOCK.values():
        if (found := common.weights(path, block.format(0, 0), _BOOK)) is not None:
            return found
    return None


def load(path) -> tuple[TokenizerConfig, dict]:
    """A configuration, and parameters as nested float32 NumPy arrays.

    Raises:
        ValueError: one error lists all that is not understood.
    """
    tensors = {name: x for name, x in common.read(path).items() if name not in _BUFFERS}
    cfg = read_config({name: x.shape for name, x in tensors.items()})
    name_of = plain_name if cfg.convs.kind == "plain" else _attentive_name(cfg)
    return cfg, common.tokenizer(path, cfg, tensors, name_of)


def read_config(shapes: dict) -> TokenizerConfig:
    """The configuration of tensors {name: shape}, which hold a block and the codebook."""
    kind = next(kind for kind, block in _BLOCK.items() if block.format(0, 0) in shapes)

    def count(level=None):
        places = ((i, 0) if level is None else (level, i) for i in range(len(shapes)))
        return next(n for n, at in enumerate(places) if _BLOCK[kind].format(*at) not in shapes)

    size, dim = shapes[_BOOK]
    block_out = tuple(shapes[_BLOCK[kind].format(level, 0)][0] for level in range(count()))
    features = shapes.get("encoder.conv_out.weight", (dim,))[0]
    convs = Convs(kind, block_out, features, layers=count(0))
    grid = (IMAGE_SIZE // convs.downsample,) * 2
    none = Blocks(depth=0)
    return TokenizerConfig(
        vae=identity_vae(),
        sites=Sites(grid, convs.downsample),
        tokens=Tokens(grid[0] * grid[1], registers=False, order="full", keep="fixed"),
        bottleneck=Bottleneck("vq", (), dim, size, normalize=kind == "attentive"),
        encoder=none,
        decoder=none,
        target=Target("values"),
        convs=convs,
    )


def plain_name(path: str) -> str:
    """Our path -> the name in the file of MaskGIT's VQGAN."""
    if path == "bottleneck/codebook":
        return _BOOK
    part, _, rest = path.split("/", 2)
    levels = {"encoder": "down", "decoder": "up"}[part]
    for ours, theirs in (
        (r"level_(\d+)_resnet_(\d+)", rf"{levels}.\1.block.\2"),
        (r"up_(\d+)/conv", r"up.\1.upsample_conv"),
        (r"mid_(\d)", r"mid.\1"),
    ):
        rest = re.sub(ours, theirs, rest)
    return _ended(part, rest)


def _attentive_name(cfg: TokenizerConfig):
    last = len(cfg.convs.block_out) - 1

    def name(path):
        if path == "bottleneck/codebook":
            return _BOOK
        part, _, rest = path.split("/", 2)
        if rest.startswith("pointwise/"):
            name = {"encoder": "quant_conv", "decoder": "post_quant_conv"}[part]
            return _ended(name, rest.removeprefix("pointwise/"))

        def level(found):  # The decoder's are in the order in which they run.
            i = int(found[2]) if part == "encoder" else last - int(found[2])
            kind = {"resnet": "res", "attention": "attn"}.get(found[3])
            after = f".{kind}.{found[4]}" if kind else f".{found[1]}sample.conv"
            return f"conv_blocks.{i}{after}"

        rest = re.sub(r"(level|up|down)_(\d+)(?:_(resnet|attention)_(\d+)|/conv)", level, rest)
        rest = rest.replace("mid_0", "mid.0").replace("mid_attention", "mid.1")
        return _ended(part, rest.replace("mid_1", "mid.2"))

    return name


def _ended(part: str, rest: str) -> str:
    """The name with the file's words for layers and parameters."""
    *modules, leaf = rest.split("/")
    modules = [_ATTENTION.get(m, m).replace("conv_shortcut", "nin_shortcut") for m in modules]
    return ".".join([part, *modules, "bias" if leaf == "bias" else "weight"])
