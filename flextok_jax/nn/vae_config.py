"""Configurations of the VAE, and of convolutions around codes."""

import dataclasses
import math

from flextok_jax.nn.config import at_least, check, choices


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
        faults = choices(self, kind=("attentive", "plain"))
        faults += at_least(self, 1, "features", "layers", "norm_groups")
        if any(channels % self.norm_groups for channels in self.block_out):
            faults.append(
                f"block_out={self.block_out}, must be multiples of norm_groups={self.norm_groups}"
            )
        check(self, faults)

    @property
    def downsample(self) -> int:
        """Pixels per position along one side."""
        return 2 ** (len(self.block_out) - 1) if self.block_out else 1
