"""Model configurations: frozen dataclasses with all that the mathematics needs."""

import dataclasses
import math

SAMPLING_MODES = ("pow2", "uniform", "uniform_pow2", "fixed")


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

    @property
    def downsample(self) -> int:
        """Pixels per latent position along one side."""
        return 1 if self.kind == "identity" else 2 ** (len(self.block_out) - 1)


def identity_vae(channels: int = 3) -> VAEConfig:
    """Latents are the pixels: for training small images without a VAE."""
    return VAEConfig("identity", channels, channels, block_out=(), layers_per_block=0)


@dataclasses.dataclass(frozen=True)
class FlexTokConfig:
    """A FlexTok model: VAE, encoder, quantiser, decoder (REFERENCE names in brackets).

    Attributes:
        vae: the autoencoder.
        grid: patches (rows, columns) of a full-size image; N is their product.
        patch_size: latent positions per patch side.
        num_tokens: R, the number of registers.
        levels: FSQ levels; F = len(levels).
        enc_width, enc_depth, dec_width, dec_depth: D and depth of the two Transformers.
        head_dim: channels per attention head.
        mlp_ratio: the SwiGLU hidden width is int(2/3 * mlp_ratio * D).
        max_timestep: scale of the time embedding's frequencies (1000 or 1).
        time_frequencies: size of the sinusoidal time embedding (cosines and sines together).
        mode_scale: s of the "mode" time sampling.
        log_normal_time: time is sampled logit-normally instead.
        keep_mode: how nested dropout samples the number of kept tokens, one of SAMPLING_MODES.
        null_prob: probability per image of the null condition in training.
        guidance_scale: what `detokenize` uses when it is not told.
    """

    vae: VAEConfig = VAEConfig()
    grid: tuple[int, int] = (16, 16)
    patch_size: int = 2
    num_tokens: int = 256
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)
    enc_width: int = 768
    enc_depth: int = 12
    dec_width: int = 768
    dec_depth: int = 12
    head_dim: int = 64
    mlp_ratio: float = 4.0
    max_timestep: float = 1000.0
    time_frequencies: int = 256
    mode_scale: float = 0.25
    log_normal_time: bool = False
    keep_mode: str = "pow2"
    null_prob: float = 0.2
    guidance_scale: float = 7.5

    def __post_init__(self):
        for name in ("enc_width", "dec_width"):
            width = getattr(self, name)
            if width % self.head_dim or width % 4:
                raise ValueError(
                    f"{name}={width}: must be a multiple of head_dim={self.head_dim} and of 4"
                )
        if self.keep_mode not in SAMPLING_MODES:
            raise ValueError(f"keep_mode={self.keep_mode!r}: allowed are {SAMPLING_MODES}")
        if self.keep_mode == "pow2" and self.num_tokens & (self.num_tokens - 1):
            raise ValueError(
                f"keep_mode='pow2' needs a power of two of tokens, not {self.num_tokens}; "
                "use 'uniform_pow2' or 'uniform'"
            )
        if min(self.levels, default=0) < 2:
            raise ValueError(f"levels={self.levels}: every FSQ level must be at least 2")

    @property
    def num_patches(self) -> int:
        """N, for a full-size image."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_pixels(self) -> int:
        """Pixels per patch side."""
        return self.patch_size * self.vae.downsample

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of a full-size image in pixels."""
        return self.grid[0] * self.patch_pixels, self.grid[1] * self.patch_pixels

    @property
    def patch_dim(self) -> int:
        """Channels of a flattened patch."""
        return self.patch_size**2 * self.vae.latent_channels

    @property
    def code_dim(self) -> int:
        """F, channels of a code."""
        return len(self.levels)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        size = 1
        for level in self.levels:
            size *= level
        return size


@dataclasses.dataclass(frozen=True)
class ARConfig:
    """A decoder-only Transformer over ordered tokens: by class, by text, or without condition.

    Attributes:
        vocab_size: V, number of token ids.
        num_tokens: L, number of positions.
        width, depth: D and the number of blocks.
        head_dim: channels per attention head.
        mlp_hidden: hidden width of the SwiGLU.
        num_classes: number of class embeddings, 0: not conditioned on a class.
        text_dim: E, channels of the text embeddings that blocks attend to, 0: no text.
        text_hidden: hidden width of the two layers from E to D, 0 without text.
        text_gelu_tanh: whether their GELU is the tanh approximation.
        qk_norm: whether queries and keys are normalised per head.
        norm_eps: epsilon of every RMSNorm.
        guidance_scale: what generation uses when it is not told.
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

    def __post_init__(self):
        for name in ("vocab_size", "num_tokens", "width", "depth", "head_dim", "mlp_hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        for name in ("num_classes", "text_dim", "text_hidden"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be 0 (none) or more")
        if self.width % self.head_dim:
            raise ValueError(f"width={self.width}: must be a multiple of head_dim={self.head_dim}")
        if self.num_classes and self.text_dim:
            raise ValueError(
                f"num_classes={self.num_classes} and text_dim={self.text_dim}: a model is "
                "conditioned on a class or on text; set one of them to 0"
            )
        if (self.text_dim > 0) != (self.text_hidden > 0):
            raise ValueError(
                f"text_dim={self.text_dim} and text_hidden={self.text_hidden}: both must be "
                "positive (a text model) or both 0"
            )
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps={self.norm_eps}: must be positive")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale}: must be finite")

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
