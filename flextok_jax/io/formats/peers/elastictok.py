"""ElasticTok (Yan et al., arXiv 2410.08368): one file `params`, a stream of msgpack objects.

Each object is [the parts of a name, bytes]; the bytes are one msgpack extension of type 1, whose
content is [shape, name of the type, raw values]. The released configurations are in scripts, not in
the file: of them are RELEASED, the rest is told by the tensors.
"""

import math

import jax.numpy as jnp
import numpy as np

from flextok_jax.io.formats import names
from flextok_jax.io.formats.peers import common
from flextok_jax.io.paths import local_copy
from flextok_jax.nn.config import Blocks
from flextok_jax.nn.tokenizer_config import Bottleneck, Sites, Target, TokenizerConfig, Tokens
from flextok_jax.nn.vae_config import identity_vae

FILE = "params"
RELEASED = {"image_size": 256, "frames": 4, "patch_size": 8, "head_dim": 128, "norm_eps": 1e-5}
_LEVELS = (8, 8, 8, 5, 5, 5)
_ROPE = {"fsq": 5e7, "kl": 5e6}
_ARRAY = 1  # The type of the extension.
_TYPES = {"float32": np.dtype("<f4"), "bfloat16": np.dtype(jnp.bfloat16)}
_BLOCKS = r"\1/\1_blocks/scan_decoder/"
_TABLE = (
    ("encoder/patch_emb", "encoder/in_proj"),
    ("encoder/kept", "encoder/is_kept_embed"),
    ("encoder/dropped", "encoder/is_masked_embed"),
    ("encoder/head", "encoder/pre_quant"),
    ("decoder/register_proj", "decoder/post_quant"),
    ("decoder/head", "decoder/out_proj"),
    ("(encoder|decoder)/norm", r"\1/ln_f"),
    ("(encoder|decoder)/blocks/norm_1", _BLOCKS + "attention_norm"),
    ("(encoder|decoder)/blocks/norm_2", _BLOCKS + "ffn_norm"),
    ("(encoder|decoder)/blocks/attn/(w[qkv])", _BLOCKS + r"attention/\2"),
    ("(encoder|decoder)/blocks/attn/proj", _BLOCKS + "attention/wo"),
    ("(encoder|decoder)/blocks/mlp/fc1", _BLOCKS + "feed_forward/w1"),
    ("(encoder|decoder)/blocks/mlp/fc2", _BLOCKS + "feed_forward/w2"),
    ("(encoder|decoder)/blocks/mlp/fc3", _BLOCKS + "feed_forward/w3"),
)


def find(path):
    """The file `params` of a folder, or such a file."""
    path = path / FILE if path.is_dir() else path
    return path if path.name == FILE and path.is_file() else None


def load(path) -> tuple[TokenizerConfig, dict]:
    """A configuration, and parameters as nested float32 NumPy arrays.

    Raises:
        ValueError: the file is no such stream, or one error lists all that is not understood.
    """
    tensors = read(path)
    cfg = read_config({name: x.shape for name, x in tensors.items()}, path)
    entries = names.entries(common.shapes(cfg), name_of, lambda path, rank: (tuple(range(rank)), 0))
    return cfg, {"vae": {}} | names.to_params(entries, common.plain(entries, tensors), path)


def name_of(path: str) -> str:
    """Our path -> the name in the file, its parts joined by "/"."""
    name = names.by_table(_TABLE)(path)
    return name.replace(".weight", "/kernel")


def read(path) -> dict[str, np.ndarray]:
    """{name, its parts joined by "/": array of its own type}.

    Raises:
        ValueError: the file is no such stream, or cut off.
    """
    import msgpack

    found = {}
    try:
        with local_copy(path) as local, local.open("rb") as file:
            size = local.stat().st_size
            unpacker = msgpack.Unpacker(file, max_buffer_size=size)
            while unpacker.tell() < size:
                key, data = unpacker.unpack()
                found["/".join(key)] = _array(msgpack.unpackb(data))
    except (ValueError, TypeError, KeyError, msgpack.UnpackException) as error:
        raise ValueError(
            f"{path} is no whole stream of tensors, as ElasticTok's files are "
            f"({type(error).__name__}): fetch it again"
        ) from error
    return found


def _array(extension) -> np.ndarray:
    import msgpack

    if not isinstance(extension, msgpack.ExtType) or extension.code != _ARRAY:
        raise ValueError(f"an object of the kind {extension!r:.60} is not an array")
    shape, dtype, data = msgpack.unpackb(extension.data)
    dtype = _TYPES[dtype if isinstance(dtype, str) else dtype.decode()]
    return np.frombuffer(data, dtype).reshape(shape)


def read_config(shapes: dict, where="") -> TokenizerConfig:
    """The configuration of tensors {name: shape}; ValueError where those that tell it lack."""
    norm = "{0}/{0}_blocks/scan_decoder/attention_norm/kernel".format
    telling = ("encoder/in_proj/kernel", "encoder/pre_quant/kernel", "decoder/post_quant/kernel")
    first = "encoder/encoder_blocks/scan_decoder/feed_forward/w1/kernel"
    ranks = dict.fromkeys(telling, 2) | {first: 3, norm("encoder"): 2, norm("decoder"): 2}
    if missing := [name for name, rank in ranks.items() if len(shapes.get(name, ())) != rank]:
        raise ValueError(f"{where} has no tensors {', '.join(missing)}, which tell its sizes")
    (values, width), (_, features), (dim, _) = (shapes[name] for name in telling)
    side = RELEASED["patch_size"]
    inside = max(1, values // (3 * side**2))  # Frames in a patch.
    kind = "fsq" if features == dim else "kl"
    grid, frames = (RELEASED["image_size"] // side,) * 2, RELEASED["frames"] // inside

    def blocks(part):
        return Blocks(
            width, shapes[norm(part)][0], math.gcd(RELEASED["head_dim"], width), shapes[first][2],
            "rms", RELEASED["norm_eps"], "none", rope=_ROPE[kind],
        )  # fmt: skip

    of_kind = dict(levels=_LEVELS, eps=-1e-3) if kind == "fsq" else dict(levels=(), dim=dim)
    return TokenizerConfig(
        vae=identity_vae(),
        sites=Sites(grid, side, "none", (frames, inside)),
        tokens=Tokens(
            frames * math.prod(grid), False, "full", keep="uniform", dropped="zero", told=True
        ),
        bottleneck=Bottleneck(kind, **of_kind),
        encoder=blocks("encoder"),
        decoder=blocks("decoder"),
        target=Target("values", "tanh"),
        linear_bias=False,
    )
