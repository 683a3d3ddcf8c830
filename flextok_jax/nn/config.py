"""What model configurations share: their checks, how they are read, `Blocks` and `Compute`.

The configurations are frozen dataclasses with all that the mathematics needs: `vae_config.py`,
`tokenizer_config.py` and `ar_config.py`.
"""

import dataclasses


def check(config, faults: list[str]) -> None:
    """Raises one ValueError that lists every fault of a configuration."""
    if faults:
        raise ValueError(f"{type(config).__name__}: " + "; ".join(faults))


def choices(config, **allowed) -> list[str]:
    """The faults of fields that are none of the values allowed for them."""
    return [
        f"{name}={getattr(config, name)!r}, allowed: {', '.join(values)}"
        for name, values in allowed.items()
        if getattr(config, name) not in values
    ]


def at_least(config, least: int, *names: str) -> list[str]:
    """The faults of fields that are smaller than `least`."""
    values = {name: getattr(config, name) for name in names}
    return [f"{n}={v}, must be at least {least}" for n, v in values.items() if not v >= least]


def from_dict(cls, values):
    """A configuration from nested dictionaries: the inverse of `dataclasses.asdict`.

    Args:
        cls: the dataclass of a configuration.
        values: a mapping of some or all of its fields; lists become tuples.

    Raises:
        ValueError: unknown fields, all of them named, or values that are not allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(f"{cls.__name__} has no {unknown}; allowed: {sorted(fields)}")

    def value(name, x):
        default = fields[name].default
        if dataclasses.is_dataclass(default):
            return from_dict(type(default), x)
        return tuple(x) if isinstance(x, list) else x

    return cls(**{name: value(name, x) for name, x in values.items()})


@dataclasses.dataclass(frozen=True)
class Blocks:
    """A stack of Transformer blocks; the defaults are FlexTok's.

    Attributes:
        width: D.
        depth: number of blocks; 0: there is no Transformer.
        head_dim: channels per attention head.
        mlp_hidden: hidden width of the MLPs; 0: int(8 D / 3) for SwiGLU, 4 D for the others.
        norm: "layer" (LayerNorm without parameters), "affine" (with scale and bias), or "rms".
        norm_eps: epsilon of every norm.
        qk_norm: what normalises queries and keys per head: "layer" (without parameters; logits are
            then scaled by 8 / head_dim, the muP form), "rms", or "none".
        mlp: "swiglu", "geglu" (the same with tanh-GELU), "gelu" (exact), "gelu_tanh", or
            "quick_gelu".
        bias: whether projections and MLPs have biases.
        layer_scale: whether each branch is multiplied by a learned vector.
        heads: number of attention heads; 0: D / head_dim.
        scale: of the attention's logits; None: 1 / sqrt(head_dim), or the muP form.
        rope: base of the rotary positions of queries and keys; 0: none. Not with a cache.
    """

    width: int = 768
    depth: int = 12
    head_dim: int = 64
    mlp_hidden: int = 0
    norm: str = "layer"
    norm_eps: float = 1e-5
    qk_norm: str = "layer"
    mlp: str = "swiglu"
    bias: bool = False
    layer_scale: bool = False
    heads: int = 0
    scale: float | None = None
    rope: float = 0.0

    def __post_init__(self):
        faults = at_least(self, 1, "width", "head_dim")
        faults += at_least(self, 0, "depth", "mlp_hidden", "heads", "rope")
        faults += choices(
            self,
            norm=("layer", "affine", "rms"),
            qk_norm=("layer", "rms", "none"),
            mlp=("swiglu", "geglu", "gelu", "gelu_tanh", "quick_gelu"),
        )
        if not faults and not self.heads and self.width % self.head_dim:
            faults.append(f"width={self.width}, must be a multiple of head_dim={self.head_dim}")
        if not self.norm_eps > 0:
            faults.append(f"norm_eps={self.norm_eps}, must be positive")
        check(self, faults)

    @property
    def num_heads(self) -> int:
        """H."""
        return self.heads or self.width // self.head_dim

    @property
    def inner(self) -> int:
        """Channels of queries, keys and values, of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def hidden(self) -> int:
        """Hidden width of the MLPs."""
        default = 8 * self.width // 3 if self.mlp == "swiglu" else 4 * self.width
        return self.mlp_hidden or default


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a network is run, without effect on what it computes (beyond rounding).

    Attributes:
        dtype: "float32" or "bfloat16": the type of matrix products and activations.
        attention: "xla", or "cudnn" on a CUDA GPU with bfloat16, or "pallas" on a TPU.
        scan: whether the blocks run as one loop (compiles once) or unrolled.
        remat: what training computes once more in the backward pass, for memory: "none", "full"
            (each block), or "dots" (each block but for products with weights, and the TPU kernel
            of attention).
    """

    dtype: str = "float32"
    attention: str = "xla"
    scan: bool = True
    remat: str = "none"

    def __post_init__(self):
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: allowed are 'float32' and 'bfloat16'")
        if self.attention not in ("xla", "cudnn", "pallas"):
            raise ValueError(f"attention={self.attention!r}: allowed are 'xla', 'cudnn', 'pallas'")
        if self.remat not in ("none", "full", "dots"):
            raise ValueError(f"remat={self.remat!r}: allowed are 'none', 'full' and 'dots'")
        if self.attention == "cudnn" and self.dtype != "bfloat16":
            raise ValueError("attention='cudnn' computes in bfloat16 only: set dtype='bfloat16'")

    def check_platform(self, platform: str) -> None:
        """Raises ValueError where devices of `platform` ("cpu", "gpu" or "tpu") cannot do it."""
        for attention, wanted, devices in (
            ("cudnn", "gpu", "CUDA GPUs"),
            ("pallas", "tpu", "TPUs"),
        ):
            if self.attention == attention and platform != wanted:
                raise ValueError(
                    f"attention={attention!r} is for {devices}; these devices are {platform!r}: "
                    "set it to 'xla'"
                )
