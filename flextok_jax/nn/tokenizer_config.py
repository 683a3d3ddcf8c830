"""The configuration of a tokenizer: one frozen dataclass per part of it."""

import dataclasses
import math

from flextok_jax.flow.sampler import Sampler
from flextok_jax.nn.config import Blocks, at_least, check, choices
from flextok_jax.nn.vae_config import Convs, VAEConfig

KEEP_MODES = ("pow2", "uniform", "uniform_pow2", "fixed")


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
        faults = at_least(self, 1, "patch_size") + at_least(self, 0, "levels")
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
        faults += choices(self, positions=("sincos", "learned", "none"))
        if len(self.repeat) != 2 or min(self.repeat) < 1:
            faults.append(f"repeat={self.repeat}, must be two positive numbers")
        if len(self.grid) != 2 or min(self.grid) < 1:
            faults.append(f"grid={self.grid}, must be two positive numbers")
        check(self, faults)


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
        faults = at_least(self, 1, "count", "rounds")
        faults += choices(
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
        check(self, faults)

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
        faults = choices(self, kind=("fsq", "vq", "kl", "none")) + at_least(self, 1, "books")
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
        check(self, faults)

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
        faults += choices(self, predicts=("velocity", "image"))
        for name in ("max_timestep", "time_frequencies"):
            if not getattr(self, name) > 0:
                faults.append(f"{name}={getattr(self, name)}, must be positive")
        check(self, faults)


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
        faults = choices(self, kind=("flow", "values"), output=outputs)
        if self.kind == "flow" and self.output != "linear":
            faults.append(f"output={self.output!r}, must be 'linear' for kind='flow'")
        if (self.output == "codes") != (self.codes > 1):
            faults.append(f"codes={self.codes}, at least 2 for output='codes' and 0 for others")
        check(self, faults)


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
        faults = at_least(self, 0, "dim", "length")
        if (self.dim > 0) != (self.length > 0):
            faults.append(f"dim={self.dim}, length={self.length}: both must be 0, or neither")
        if not self.dim and (self.encoder or self.padded):
            faults.append("encoder and padded are of a text: set dim and length, or both to False")
        check(self, faults)


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
        check(self, faults)

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
