"""Model configurations: frozen dataclasses with all that the mathematics needs."""

import dataclasses
import math

from flextok_jax.flow.sampler import Sampler

KEEP_MODES = ("pow2", "uniform", "uniform_pow2", "fixed")


def _check(config, faults: list[str]) -> None:
    """Raises one ValueError that lists every fault of a configuration."""
    if faults:
        raise ValueError(f"{type(config).__name__}: " + "; ".join(faults))


def _choices(config, **allowed) -> list[str]:
    return [
        f"{name}={getattr(config, name)!r}, allowed: {', '.join(values)}"
        for name, values in allowed.items()
        if getattr(config, name) not in values
    ]


def _at_least(config, least: int, *names: str) -> list[str]:
    values = {name: getattr(config, name) for name in names}
    return [f"{n}={v}, must be at least {least}" for n, v in values.items() if not v >= least]


def from_dict(cls, values):
    """A configuration from nested dictionaries: the inverse of `dataclasses.asdict`.

    Args:
        cls: one of the dataclasses of this file.
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


def nested(fields: dict) -> dict:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    tree = {}
    for path, value in fields.items():
        *parents, last = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The image autoencoder between pixels and latents.

    Attributes:
        kind: "autoencoder_kl" (the diffusers layout) or "identity" (latents are the pixels).
        in_channels: channels of the image, read and written.
        latent_channels: C.
        block_out: channels of each resolution, from the finest to the coarsest.
        layers_per_block: residual blocks per resolution of the encoder (the decoder has one more).
        norm_groups: groups of every GroupNorm. Not recorded in weight files.
        mid_attention: whether the middle blocks hold an attention layer.
        quant_conv: whether a 1x1 convolution follows the encoder.
        post_quant_conv: whether a 1x1 convolution precedes the decoder.
        scaling_factor: latents are multiplied by it after encoding, divided before decoding.
        sample_posterior: whether the released configuration samples the posterior by default.
    """

    kind: str = "autoencoder_kl"
    in_channels: int = 3
    latent_channels: int = 16
    block_out: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    scaling_factor: float = 1.0
    sample_posterior: bool = True

    def __post_init__(self):
        if self.kind not in ("autoencoder_kl", "identity"):
            raise ValueError(f"VAE kind {self.kind!r}: allowed are 'autoencoder_kl' and 'identity'")
        if self.kind == "identity" and self.latent_channels != self.in_channels:
            raise ValueError(
                f"the identity VAE has latent_channels == in_channels, "
                f"not {self.latent_channels} and {self.in_channels}"
            )
        if self.kind != "identity" and not self.block_out:
            raise ValueError("block_out=(): name the channels of each resolution")
        if not 0 < self.scaling_factor < math.inf:
            raise ValueError(f"scaling_factor={self.scaling_factor}: must be positive and finite")

    @property
    def downsample(self) -> int:
        """Pixels per latent position along one side."""
        return 1 if self.kind == "identity" else 2 ** (len(self.block_out) - 1)


def identity_vae(channels: int = 3) -> VAEConfig:
    """Latents are the pixels: for training small images without a VAE."""
    return VAEConfig("identity", channels, channels, block_out=(), layers_per_block=0)


@dataclasses.dataclass(frozen=True)
class Convs:
    """Residual convolutions between images and a coarse grid (nn/convs.py).

    Attributes:
        kind: "attentive": attention after each block of the coarsest resolution, learned changes
            of resolution, a 1x1 convolution on each side of the codes, and one block more per
            resolution in the decoder; "plain": none of these, and no biases in blocks.
        block_out: channels of each resolution, from the finest to the coarsest; (): none.
        features: channels of the grid.
        layers: residual blocks per resolution.
        norm_groups: groups of every GroupNorm.
    """

    kind: str = "attentive"
    block_out: tuple[int, ...] = ()
    features: int = 256
    layers: int = 2
    norm_groups: int = 32

    def __post_init__(self):
        faults = _choices(self, kind=("attentive", "plain"))
        faults += _at_least(self, 1, "features", "layers", "norm_groups")
        if any(channels % self.norm_groups for channels in self.block_out):
            faults.append(
                f"block_out={self.block_out}, must be multiples of norm_groups={self.norm_groups}"
            )
        _check(self, faults)

    @property
    def downsample(self) -> int:
        """Pixels per position along one side."""
        return 2 ** (len(self.block_out) - 1) if self.block_out else 1


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
        faults = _at_least(self, 1, "width", "head_dim")
        faults += _at_least(self, 0, "depth", "mlp_hidden", "heads", "rope")
        faults += _choices(
            self,
            norm=("layer", "affine", "rms"),
            qk_norm=("layer", "rms", "none"),
            mlp=("swiglu", "geglu", "gelu", "gelu_tanh", "quick_gelu"),
        )
        if not faults and not self.heads and self.width % self.head_dim:
            faults.append(f"width={self.width}, must be a multiple of head_dim={self.head_dim}")
        if not self.norm_eps > 0:
            faults.append(f"norm_eps={self.norm_eps}, must be positive")
        _check(self, faults)

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
class Sites:
    """How an image is cut.

    Attributes:
        grid: patches (rows, columns) of a full-size image; N is their product.
        patch_size: latent positions per patch side.
        positions: "sincos": fixed, added to patches; "learned": as a ViT has it, learned vectors
            for patches and for the encoder's registers, a class token in front, and a norm before
            the first block; "none".
        repeat: (how often the sequence repeats the patches, how often a patch repeats its values):
            a model of videos reads an image as equal frames, and the first one is what it decodes.
        levels: L of a Haar transform of the patches (nn/haar.py), whose L + 1 scales are read and
            written by positions of their own, coarse to fine; 0: none.
        strides: of windows that overlap (nn/windows.py), whose product is the patch size; (): the
            patches that are read do not overlap.
    """

    grid: tuple[int, int] = (16, 16)
    patch_size: int = 2
    positions: str = "sincos"
    repeat: tuple[int, int] = (1, 1)
    levels: int = 0
    strides: tuple[int, ...] = ()

    def __post_init__(self):
        faults = _at_least(self, 1, "patch_size") + _at_least(self, 0, "levels")
        if self.strides and (
            self.levels or min(self.strides) < 1 or math.prod(self.strides) != self.patch_size
        ):
            faults.append(
                f"strides={self.strides}, must be positive, with the product "
                f"patch_size={self.patch_size}, and levels=0"
            )
        if self.levels and (
            self.patch_size % 2**self.levels
            or self.positions != "sincos"
            or tuple(self.repeat) != (1, 1)
        ):
            faults.append(
                f"levels={self.levels}, needs a patch_size that 2^{self.levels} divides, "
                "positions='sincos' and repeat=(1, 1)"
            )
        faults += _choices(self, positions=("sincos", "learned", "none"))
        if len(self.repeat) != 2 or min(self.repeat) < 1:
            faults.append(f"repeat={self.repeat}, must be two positive numbers")
        if len(self.grid) != 2 or min(self.grid) < 1:
            faults.append(f"grid={self.grid}, must be two positive numbers")
        _check(self, faults)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The registers that become tokens.

    Attributes:
        count: R, the number of tokens.
        registers: whether they are learned registers beside the patches; else they are the patches.
        order: "causal": token i does not depend on later ones, so that every prefix is exact;
            "full": every token depends on all; "scales": on those of its scale and of coarser ones
            (`Sites.levels`), and so does what the decoder writes.
        keep: how nested dropout samples the number of kept tokens, one of KEEP_MODES.
        dropped: what the decoder reads for a token that is not kept: "mask": a learned vector;
            "zero": a code of zeros; "cut": nothing, its position is left out.
        told: whether the encoder knows how many tokens are kept. Then tokens for another number
            are other tokens.
        rounds: how often the encoder runs: each time over patches and tokens as the last run left
            them, and R / rounds new registers. Then `keep` samples a number of rounds, and tokens
            for another number are other tokens.
        reshaped: whether the features [R, D] of the registers are read as [D, R] before the
            bottleneck: a reshape, no transposition. For all R of them alone.
    """

    count: int = 256
    registers: bool = True
    order: str = "causal"
    keep: str = "pow2"
    dropped: str = "mask"
    told: bool = False
    rounds: int = 1
    reshaped: bool = False

    def __post_init__(self):
        faults = _at_least(self, 1, "count", "rounds")
        faults += _choices(
            self,
            order=("causal", "full", "scales"),
            keep=KEEP_MODES,
            dropped=("mask", "zero", "cut"),
        )
        if self.keep == "pow2" and self.units & (self.units - 1):
            faults.append(
                f"keep='pow2' needs a power of two of tokens (or rounds), not {self.units}; use "
                "'uniform_pow2' or 'uniform'"
            )
        if self.rounds > 1 and (
            self.count % self.rounds
            or not (self.order == "full" and self.registers and self.dropped == "cut")
            or (self.told or self.reshaped)
        ):
            faults.append(
                f"rounds={self.rounds}, must divide count={self.count}, with order='full', "
                "registers, dropped='cut', and neither told nor reshaped"
            )
        if self.order == "full" and self.keep != "fixed" and self.dropped == "mask":
            faults.append(f"order='full' with keep={self.keep!r} needs dropped 'zero' or 'cut'")
        if self.order != "full" and (self.reshaped or self.told):
            faults.append(f"order={self.order!r}, must be 'full' if told or reshaped")
        if (self.order == "causal" and not self.registers) or (
            self.order == "scales" and (self.registers or self.keep != "fixed")
        ):
            faults.append(
                f"order={self.order!r} with registers={self.registers}, keep={self.keep!r}: "
                "'causal' is of registers, 'scales' is not, and keeps a 'fixed' number"
            )
        if self.keep == "fixed" and (self.told or self.dropped != "mask"):
            faults.append("keep='fixed' drops nothing: told must be False and dropped 'mask'")
        _check(self, faults)

    @property
    def units(self) -> int:
        """How many numbers of tokens an image may keep: one for each round, or for each token."""
        return self.rounds if self.rounds > 1 else self.count

    @property
    def revised(self) -> bool:
        """Whether the tokens for fewer of them are not the first of all."""
        return self.told or self.rounds > 1


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """What turns features into codes (nn/bottleneck.py).

    Attributes:
        kind: "fsq", "vq", "kl" (continuous, regularised), or "none" (continuous).
        levels: of "fsq"; their number is F.
        dim: F of the other kinds; 0 for "fsq".
        size: number of codes of "vq", 0 for the others.
        eps: of "fsq": a level's half width is (1 + eps) times as large as the outermost code.
        normalize: of "vq": whether features and codes are compared and used at length 1.
        commitment: of "vq": weight of the loss that moves features towards their codes.
        books: of "vq": codebooks of `size` codes each; token i is an id of book i modulo `books`.
    """

    kind: str = "fsq"
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    dim: int = 0
    size: int = 0
    eps: float = 1e-3
    normalize: bool = True
    commitment: float = 0.25
    books: int = 1

    def __post_init__(self):
        faults = _choices(self, kind=("fsq", "vq", "kl", "none")) + _at_least(self, 1, "books")
        if self.books > 1 and self.kind != "vq":
            faults.append(f"books={self.books}, must be 1 for kind={self.kind!r}")
        if self.kind == "fsq":
            if min(self.levels, default=0) < 3:
                faults.append(f"levels={self.levels}, every FSQ level must be at least 3")
            if math.prod(self.levels) >= 2**31:
                faults.append(f"levels={self.levels} give {math.prod(self.levels)} ids: too many")
        elif self.levels:
            faults.append(f"levels={self.levels} are of 'fsq', not of {self.kind!r}: must be ()")
        if (self.kind == "fsq") != (self.dim == 0):
            faults.append(f"dim={self.dim}, must be 0 for 'fsq' and positive for the other kinds")
        if (self.kind == "vq") != (self.size > 1):
            faults.append(f"size={self.size}, must be at least 2 for 'vq' and 0 for other kinds")
        if not self.commitment >= 0:
            faults.append(f"commitment={self.commitment}, must not be negative")
        _check(self, faults)

    @property
    def code_dim(self) -> int:
        """F, channels of a code."""
        return self.dim or len(self.levels)

    @property
    def has_loss(self) -> bool:
        """Whether training it needs a loss of its own."""
        return self.kind in ("vq", "kl")

    @property
    def discrete(self) -> bool:
        """Whether codes have ids."""
        return self.kind in ("fsq", "vq")

    @property
    def vocab_size(self) -> int:
        """Number of ids; 0 where there are none."""
        return math.prod(self.levels) if self.kind == "fsq" else self.size


@dataclasses.dataclass(frozen=True)
class Flow:
    """Rectified flow, for the target "flow".

    Attributes:
        max_timestep: scale of the time embedding's frequencies (1000 or 1).
        time_frequencies: size of the sinusoidal time embedding (cosines and sines together).
        mode_scale: s of the "mode" time sampling.
        log_normal_time: time is sampled logit-normally instead.
        null_prob: probability per image of the null condition in training.
        jumps: whether the decoder is told how far a step goes, and writes the average velocity over
            it: a few Euler steps then decode. Guidance is part of what it learned.
        predicts: what the decoder's last layer writes: the "velocity", or the clean "image" (in
            latents), from which the velocity follows (flow/path.py, `velocity_to`). A velocity
            holds noise, which a decoder narrower than a patch cannot carry.
        sampler: how images are sampled when it is not said otherwise.
    """

    max_timestep: float = 1000.0
    time_frequencies: int = 256
    mode_scale: float = 0.25
    log_normal_time: bool = False
    null_prob: float = 0.2
    jumps: bool = False
    predicts: str = "velocity"
    sampler: Sampler = Sampler()

    def __post_init__(self):
        faults = (
            [] if 0 <= self.null_prob < 1 else [f"null_prob={self.null_prob}, must be in [0, 1)"]
        )
        how = self.sampler
        if self.jumps and (how.solver != "euler" or how.guided):
            faults.append(
                f"solver={how.solver!r}, guidance_scale={how.guidance_scale}: a decoder of whole "
                "steps needs solver='euler' and guidance_scale=1, because guidance is built in"
            )
        faults += _choices(self, predicts=("velocity", "image"))
        for name in ("max_timestep", "time_frequencies"):
            if not getattr(self, name) > 0:
                faults.append(f"{name}={getattr(self, name)}, must be positive")
        _check(self, faults)


@dataclasses.dataclass(frozen=True)
class Target:
    """What the decoder writes.

    Attributes:
        kind: "flow": a velocity, of noised latents and a time; "values": the latents, in one pass.
        output: how values leave the Transformer: "linear": as patches; "tanh": of these the tanh;
            "conv": as patches, then a 3x3 convolution; "codes": probabilities of a codebook's
            vectors, whose mean goes through convolutions (`TokenizerConfig.convs`).
        codes: vectors of the codebook of "codes".
        flow: of the kind "flow".
    """

    kind: str = "flow"
    output: str = "linear"
    codes: int = 0
    flow: Flow = Flow()

    def __post_init__(self):
        outputs = ("linear", "tanh", "conv", "codes")
        faults = _choices(self, kind=("flow", "values"), output=outputs)
        if self.kind == "flow" and self.output != "linear":
            faults.append(f"output={self.output!r}, must be 'linear' for kind='flow'")
        if (self.output == "codes") != (self.codes > 1):
            faults.append(f"codes={self.codes}, at least 2 for output='codes' and 0 for others")
        _check(self, faults)


@dataclasses.dataclass(frozen=True)
class Text:
    """Features of a text that the decoder reads beside the tokens.

    Attributes:
        dim: E, their channels; 0: none.
        length: T, vectors of a text.
        encoder: whether the encoder reads them too. Then tokens with another text are other tokens.
        padded: whether a vector of zeros is padding, which nobody attends to: zeros alone are no
            text. Else all are attended to.
    """

    dim: int = 0
    length: int = 0
    encoder: bool = False
    padded: bool = False

    def __post_init__(self):
        faults = _at_least(self, 0, "dim", "length")
        if (self.dim > 0) != (self.length > 0):
            faults.append(f"dim={self.dim}, length={self.length}: both must be 0, or neither")
        if not self.dim and (self.encoder or self.padded):
            faults.append("encoder and padded are of a text: set dim and length, or both to False")
        _check(self, faults)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """A tokenizer: VAE, encoder, bottleneck, decoder. The defaults are FlexTok d12-d12's.

    With encoder and decoder of depth 0 the convolutions alone are encoder and decoder.
    `linear_bias`: whether the linear layers before and after the Transformers have biases.
    """

    vae: VAEConfig = VAEConfig()
    sites: Sites = Sites()
    tokens: Tokens = Tokens()
    bottleneck: Bottleneck = Bottleneck()
    encoder: Blocks = Blocks()
    decoder: Blocks = Blocks()
    target: Target = Target()
    convs: Convs = Convs()
    text: Text = Text()
    linear_bias: bool = True

    def __post_init__(self):
        blocks = {"encoder": self.encoder, "decoder": self.decoder}
        depths, count = (self.encoder.depth, self.decoder.depth), self.tokens.count
        faults = [
            f"{name}.width={part.width}, must be a multiple of 4 (sine-cosine positions)"
            for name, part in blocks.items()
            if part.width % 4
        ]
        if count % self.bottleneck.books:
            faults.append(
                f"tokens.count={count}, must be a multiple of {self.bottleneck.books} books"
            )
        sites = self.num_patches * self.sites.repeat[0] * self.num_scales
        if not self.tokens.registers and count != sites:
            faults.append(f"tokens.count={count}, without registers there are {sites}")
        scales = self.tokens.order == "scales"
        if scales != bool(self.sites.levels) or (scales and self.target.kind != "values"):
            faults.append(
                f"sites.levels={self.sites.levels}: tokens.order='scales' needs some, no other "
                "order has any, and target.kind is 'values'"
            )
        if self.tokens.registers and self.sites.repeat != (1, 1):
            faults.append(f"sites.repeat={self.sites.repeat}, with registers it must be (1, 1)")
        if self.is_flow and (
            self.sites.positions != "sincos"
            or self.tokens.dropped != "mask"
            or not self.tokens.registers
        ):
            faults.append(
                "target.kind='flow' needs sites.positions='sincos', tokens.registers=True and "
                "tokens.dropped='mask'"
            )
        if self.text.dim and (self.is_flow or not self.tokens.registers):
            faults.append("text.dim needs target.kind='values' and tokens.registers=True")
        if min(depths) == 0 and (max(depths) or self.tokens.registers):
            faults.append(
                f"depths {depths} of encoder and decoder: without a Transformer both are 0, and "
                "tokens.registers is False"
            )
        if self.has_convs != bool(self.convs.block_out):
            wanted = "resolutions" if self.has_convs else "()"
            faults.append(
                f"convs.block_out={self.convs.block_out}, must be {wanted}: convolutions are for "
                "target.output='codes' and for depths of 0"
            )
        if self.has_convs and self.convs.downsample != self.sites.patch_size:
            faults.append(
                f"sites.patch_size={self.sites.patch_size}, convolutions have patches of "
                f"{self.convs.downsample}"
            )
        _check(self, faults)

    @property
    def has_convs(self) -> bool:
        """Whether convolutions are a part of it."""
        return self.target.output == "codes" or not self.encoder.depth

    @property
    def num_tokens(self) -> int:
        """R, the most tokens an image can have."""
        return self.tokens.count

    @property
    def discrete(self) -> bool:
        """Whether tokens are ids; else they are float codes."""
        return self.bottleneck.discrete

    @property
    def vocab_size(self) -> int:
        """Number of token ids; 0 where codes are continuous."""
        return self.bottleneck.vocab_size

    @property
    def code_dim(self) -> int:
        """F, channels of a code."""
        return self.bottleneck.code_dim

    @property
    def prefixes(self) -> tuple[int, ...]:
        """The numbers of tokens that stand for an image: all, whole scales or rounds, or R."""
        count = self.num_tokens
        if self.tokens.order == "scales":
            return tuple(self.num_patches * (i + 1) for i in range(self.num_scales))
        if self.tokens.rounds > 1:
            each = count // self.tokens.rounds
            return tuple(range(each, count + 1, each))
        ordered = self.tokens.order == "causal" or self.tokens.keep != "fixed"
        return tuple(range(1, count + 1)) if ordered else (count,)

    @property
    def is_flow(self) -> bool:
        """Whether decoding samples a flow, with steps and guidance."""
        return self.target.kind == "flow"

    @property
    def sampler(self) -> Sampler:
        """The model's own way to sample."""
        return self.target.flow.sampler

    def sampler_with(self, **changes) -> Sampler:
        """The same with some fields changed. Raises ValueError where the model cannot."""
        sampler = dataclasses.replace(self.sampler, **changes)
        return dataclasses.replace(self.target.flow, sampler=sampler).sampler

    @property
    def num_scales(self) -> int:
        """S, of the Haar transform; 1 without."""
        return self.sites.levels + 1

    @property
    def num_patches(self) -> int:
        """N, for a full-size image."""
        return self.sites.grid[0] * self.sites.grid[1]

    @property
    def patch_pixels(self) -> int:
        """Pixels per patch side."""
        return self.sites.patch_size * self.vae.downsample

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of a full-size image in pixels."""
        return self.sites.grid[0] * self.patch_pixels, self.sites.grid[1] * self.patch_pixels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of a full-size image."""
        rows, columns = (side * self.sites.patch_size for side in self.sites.grid)
        return rows, columns, self.vae.latent_channels

    @property
    def patch_dim(self) -> int:
        """Channels of a flattened patch."""
        return self.sites.patch_size**2 * self.vae.latent_channels


@dataclasses.dataclass(frozen=True)
class ARConfig:
    """A decoder-only Transformer over ordered tokens: by class, by text, or without condition.

    Attributes:
        vocab_size: V, number of token ids.
        num_tokens: L, number of positions.
        width, depth, head_dim, norm, norm_eps, mlp: see `Blocks`; norm is "rms" or "affine".
        mlp_hidden: hidden width of the MLPs.
        num_classes: number of class embeddings, 0: not conditioned on a class.
        text_dim: E, channels of the text embeddings that blocks attend to, 0: no text.
        text_hidden: hidden width of the two layers from E to D, 0 without text.
        text_gelu_tanh: whether their GELU is the tanh approximation.
        qk_norm: whether queries and keys are normalised per head, by RMSNorm.
        guidance_scale: the default of generation.
        group: tokens that are predicted at once, independently of each other given all before
            them; it divides L. 0: as many as there are (1, 1, 2, 4, ..., L / 2), one step for each
            doubling; L is a power of two.
        folded: whether the tokens of a group are one position of the blocks (see nn/fold.py), which
            then compute L / group of them; needs group > 1 that divides the width.
        masked: whether each position reads its own token or the start vector in its place, and all
            attend to all (see nn/masked.py); else each reads tokens before it.
        levels: of the FSQ whose ids are predicted in two steps; () else.
        coarse: for each of these levels, how many neighbouring values are one in a coarse id.
            Coarse ids are predicted as any, then all ids at once from all coarse ones, by as many
            blocks of their own (see nn/refiner.py).
        channels: F of continuous tokens, which a flow generates all at once (nn/token_flow.py):
            by class from noise, by text from the text; 0: tokens are ids.
        scale: what tokens are divided by in a flow, their standard deviation.
    """

    vocab_size: int = 64000
    num_tokens: int = 256
    width: int = 768
    depth: int = 12
    head_dim: int = 64
    mlp_hidden: int = 2048
    num_classes: int = 0
    text_dim: int = 0
    text_hidden: int = 0
    text_gelu_tanh: bool = True
    qk_norm: bool = False
    norm_eps: float = 1e-6
    guidance_scale: float = 1.5
    norm: str = "rms"
    mlp: str = "swiglu"
    group: int = 1
    masked: bool = False
    folded: bool = False
    levels: tuple[int, ...] = ()
    coarse: tuple[int, ...] = ()
    channels: int = 0
    scale: float = 1.0

    def __post_init__(self):
        faults = _at_least(self, 1, "num_tokens", "depth", "mlp_hidden")
        faults += _at_least(
            self, 0, "num_classes", "text_dim", "text_hidden", "group", "vocab_size", "channels"
        )
        plain = (self.group, self.masked, self.folded, self.coarse) == (1, False, False, ())
        if (self.channels > 0) == (self.vocab_size > 0) or (self.channels and not plain):
            faults.append(
                f"vocab_size={self.vocab_size}, channels={self.channels}: one of them must be 0; "
                "with channels group, masked, folded and coarse mean nothing"
            )
        if not 0 < self.scale < math.inf:
            faults.append(f"scale={self.scale}, must be positive and finite")
        faults += _choices(self, norm=("rms", "affine"))
        if self.num_classes and self.text_dim:
            faults.append(
                f"num_classes={self.num_classes} and text_dim={self.text_dim}: a model is "
                "conditioned on a class or on text; set one of them to 0"
            )
        if (self.text_dim > 0) != (self.text_hidden > 0):
            faults.append(
                f"text_dim={self.text_dim} and text_hidden={self.text_hidden}: both must be "
                "positive (a text model) or both 0"
            )
        if not math.isfinite(self.guidance_scale):
            faults.append(f"guidance_scale={self.guidance_scale}, must be finite")
        if not faults and sum(size * count for _, size, count in self.runs) != self.num_tokens:
            wanted = f"a multiple of {self.group}" if self.group else "a power of two"
            faults.append(
                f"num_tokens={self.num_tokens} and group={self.group}: num_tokens must be {wanted}"
            )
        if self.masked and self.group != 1:
            faults.append(f"masked=True and group={self.group}: a masked model has no groups")
        if self.folded and (self.group < 2 or self.width % self.group):
            faults.append(
                f"folded=True, group={self.group} and width={self.width}: group must be 2 or more "
                "and divide the width"
            )
        if self.coarse and (self.masked or math.prod(self.levels) != self.vocab_size):
            faults.append(
                f"coarse={self.coarse}, levels={self.levels}, masked={self.masked}: the product of "
                f"the levels must be vocab_size={self.vocab_size}, and masked False"
            )
        if len(self.levels) != len(self.coarse) or min(self.coarse, default=1) < 1:
            faults.append(
                f"coarse={self.coarse}, must have a positive number for each of {self.levels}"
            )
        _check(self, faults)
        _ = self.blocks  # checks the rest

    @property
    def blocks(self) -> Blocks:
        """The Transformer's blocks."""
        return Blocks(
            self.width,
            self.depth,
            self.head_dim,
            self.mlp_hidden,
            self.norm,
            self.norm_eps,
            "rms" if self.qk_norm else "none",
            self.mlp,
        )

    @property
    def num_ids(self) -> int:
        """How many ids are predicted in order: V, or the number of coarse ids."""
        if not self.coarse:
            return self.vocab_size
        return math.prod(-(-n // size) for n, size in zip(self.levels, self.coarse))

    @property
    def refiner(self) -> "ARConfig":
        """Of a model with coarse ids: the one that reads all of them."""
        changes = dict(levels=(), coarse=(), vocab_size=self.num_ids, masked=True)
        return dataclasses.replace(self, **changes, group=1, folded=False)

    @property
    def source(self) -> "ARConfig":
        """Of a flow from text: what makes its beginning, by half as many blocks."""
        changes = dict(channels=0, vocab_size=2 * self.channels, masked=True)
        return dataclasses.replace(self, **changes, depth=max(1, self.depth // 2))

    @property
    def whole(self) -> bool:
        """Whether tokens depend on later ones too: some of them cost as much as all."""
        return self.masked or bool(self.coarse or self.channels)

    @property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Groups of one size in a row: (their first position, their size, how many they are)."""
        if self.group:
            return ((0, self.group, self.num_tokens // self.group),)
        doublings = range(self.num_tokens.bit_length() - 1)
        return ((0, 1, 1), *((1 << n, 1 << n, 1) for n in doublings))

    @property
    def folds(self) -> int:
        """How many tokens one position of the blocks stands for."""
        return self.group if self.folded else 1

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each position the first one of its group: who attends to whom, see nn/order.py."""
        if self.masked:
            return (0,) * self.num_tokens
        groups = ((a + i * size, size) for a, size, count in self.runs for i in range(count))
        return tuple(first for first, size in groups for _ in range(size))

    @property
    def num_heads(self) -> int:
        """H."""
        return self.width // self.head_dim

    @property
    def conditional(self) -> bool:
        """Whether there is a condition, and so something to guide."""
        return bool(self.num_classes or self.text_dim)


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
