"""The image autoencoder between pixels and latents (layout of diffusers' AutoencoderKL).

Residual blocks with GroupNorm and SiLU at falling, then rising resolutions; one attention head in
the middle; a diagonal Gaussian posterior over latents. Mathematics: Kingma and Welling, arXiv
1312.6114 (posterior, KL); Rombach et al., arXiv 2112.10752 (the network).

Parameter paths are the names in released weight files, split at the dots, with every number glued
to the name before it: `encoder.down_blocks.0.resnets.1.conv1.weight` is
`encoder/down_blocks_0/resnets_1/conv1/kernel`.

The functions at the end are the interface. They take `params` explicitly, so a frozen VAE is an
argument of a compiled step, and they cover the identity VAE, whose parameter tree is `{}`.

Letters: B images, H, W pixels, h, w latent positions (H / downsample, W / downsample), C latent
channels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from flextok_jax.nn.vae_config import Convs, VAEConfig

# Bounds of the log variance: exp stays finite in float32, and the lower one means "no noise".
MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0


class Layers(nn.Module):
    """What all parts share: the configuration, the compute dtype, and their elementary layers."""

    cfg: VAEConfig | Convs
    dtype: jnp.dtype = jnp.float32

    def conv(self, features, name, kernel=3, padding=1, stride=1, bias=True):
        size, options = (kernel, kernel), {"padding": padding, "use_bias": bias}
        return nn.Conv(features, size, stride, dtype=self.dtype, name=name, **options)

    def norm(self, name):
        # Always float32; and the variance about the mean, because E[x^2] - E[x]^2 cancels.
        options = {"epsilon": 1e-6, "dtype": jnp.float32, "use_fast_variance": False}
        return nn.GroupNorm(self.cfg.norm_groups, name=name, **options)

    def part(self, cls, name, *args):
        return cls(self.cfg, self.dtype, *args, name=name)


class Resnet(Layers):
    """Pre-norm residual block: [B, h, w, any] -> [B, h, w, features]."""

    features: int = 0

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.features, "conv1")(nn.silu(self.norm("norm1")(x)))
        y = self.conv(self.features, "conv2")(nn.silu(self.norm("norm2")(y)))
        if x.shape[-1] != self.features:
            x = self.conv(self.features, "conv_shortcut", kernel=1, padding=0)(x)
        return x + y


class Attention(Layers):
    """Residual attention among all positions, one head over all channels, softmax in float32."""

    @nn.compact
    def __call__(self, x):
        B, h, w, D = x.shape
        y = self.norm("group_norm")(x).reshape(B, h * w, 1, D)
        q, k, v = (nn.Dense(D, dtype=self.dtype, name=n)(y) for n in ("to_q", "to_k", "to_v"))
        y = jax.nn.dot_product_attention(q, k, v).reshape(B, h, w, D)
        return x + nn.Dense(D, dtype=self.dtype, name="to_out_0")(y)


class _MidBlock(Layers):
    """Residual block, attention, residual block at the coarsest resolution."""

    @nn.compact
    def __call__(self, x):
        features = x.shape[-1]
        x = self.part(Resnet, "resnets_0", features)(x)
        if self.cfg.mid_attention:
            x = self.part(Attention, "attentions_0")(x)
        return self.part(Resnet, "resnets_1", features)(x)


class Downsample(Layers):
    """Halves the resolution. Padded right and bottom only, as released weights expect."""

    @nn.compact
    def __call__(self, x):
        return self.conv(x.shape[-1], "conv", padding=((0, 1), (0, 1)), stride=2)(x)


class Upsample(Layers):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    @nn.compact
    def __call__(self, x):
        return _UpsampledConv(x.shape[-1], self.dtype, name="conv")(x)


class _UpsampledConv(nn.Module):
    """A 3x3 convolution of the image enlarged twice by its nearest neighbours.

    On CPUs `by_phases`, which a TPU's compiler estimates slower than `enlarged`: of its products it
    saves 5/9, and moves more. Parameters are those of `nn.Conv`.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        """[B, h, w, D] -> [B, 2h, 2w, features]."""
        normal = nn.initializers.lecun_normal()
        kernel = self.param("kernel", normal, (3, 3, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        given = x.astype(self.dtype), kernel
        made = jax.lax.platform_dependent(*given, cpu=by_phases, default=enlarged)
        return made + bias.astype(self.dtype)[None, None, None]


def enlarged(x, kernel):
    """The image is made: [B, h, w, D], [3, 3, D, F] -> [B, 2h, 2w, F]."""
    x = x.repeat(2, axis=1).repeat(2, axis=2)
    return _conv(x, kernel)


def by_phases(x, kernel):
    """The same without making the image, by 4/9 of the products.

    Three rows of the enlarged image show two rows of the image, so an even output row is a
    convolution by the kernel rows (w0, w1 + w2), an odd one by (w0 + w1, w2); columns likewise.
    """
    B, h, w, D = x.shape

    def phases(taps):  # [3, ...] -> [2 phases, 2, ...]
        pairs = (taps[0], taps[1] + taps[2]), (taps[0] + taps[1], taps[2])
        return jnp.stack([jnp.stack(pair) for pair in pairs])

    by_row = jnp.moveaxis(phases(kernel), 2, 0)  # [3 columns, 2 phases, 2 rows, D, features]
    taps = jnp.transpose(phases(by_row), (3, 1, 4, 2, 0, 5))  # rows, columns, D, phases ...
    found = _conv(x, taps.reshape(2, 2, D, -1)).reshape(B, h + 1, w + 1, 2, 2, -1)
    rows = [
        jnp.stack([found[:, i : i + h, j : j + w, i, j] for j in (0, 1)], axis=3) for i in (0, 1)
    ]
    return jnp.stack(rows, axis=2).reshape(B, 2 * h, 2 * w, -1)


def _conv(x, kernel):
    """With one pixel of zeros around x."""
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (1, 1), ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


class _Level(Layers):
    """The residual blocks of one resolution, then the change to the next one, if any."""

    features: int = 0
    layers: int = 0
    resample: type[nn.Module] | None = None

    @nn.compact
    def __call__(self, x):
        for i in range(self.layers):
            x = self.part(Resnet, f"resnets_{i}", self.features)(x)
        if self.resample is not None:
            name = "downsamplers_0" if self.resample is Downsample else "upsamplers_0"
            x = self.part(self.resample, name)(x)
        return x


class _Encoder(Layers):
    """[B, H, W, in_channels] -> [B, h, w, 2C]: mean and log variance, before `quant_conv`."""

    @nn.compact
    def __call__(self, x):
        cfg, last = self.cfg, len(self.cfg.block_out) - 1
        x = self.conv(cfg.block_out[0], "conv_in")(x)
        for i, features in enumerate(cfg.block_out):
            args = features, cfg.layers_per_block, Downsample if i < last else None
            x = self.part(_Level, f"down_blocks_{i}", *args)(x)
        x = self.part(_MidBlock, "mid_block")(x)
        x = nn.silu(self.norm("conv_norm_out")(x))
        return self.conv(2 * cfg.latent_channels, "conv_out")(x)


class _Decoder(Layers):
    """[B, h, w, C], after `post_quant_conv` -> [B, H, W, in_channels]."""

    @nn.compact
    def __call__(self, x):
        cfg, last = self.cfg, len(self.cfg.block_out) - 1
        x = self.conv(cfg.block_out[-1], "conv_in")(x)
        x = self.part(_MidBlock, "mid_block")(x)
        for i, features in enumerate(reversed(cfg.block_out)):
            args = features, cfg.layers_per_block + 1, Upsample if i < last else None
            x = self.part(_Level, f"up_blocks_{i}", *args)(x)
        x = nn.silu(self.norm("conv_norm_out")(x))
        return self.conv(cfg.in_channels, "conv_out")(x)


class AutoencoderKL(Layers):
    """Encoder and decoder. Parameters and results are float32, whatever the compute `dtype`."""

    def setup(self):
        self.encoder = _Encoder(self.cfg, self.dtype)
        self.decoder = _Decoder(self.cfg, self.dtype)
        pointwise = {"kernel_size": (1, 1), "dtype": self.dtype}
        if self.cfg.quant_conv:
            self.quant_conv = nn.Conv(2 * self.cfg.latent_channels, **pointwise)
        if self.cfg.post_quant_conv:
            self.post_quant_conv = nn.Conv(self.cfg.latent_channels, **pointwise)

    def encode(self, images):
        """Images [B, H, W, in_channels] -> (mean, logvar) of the posterior, [B, h, w, C] each."""
        moments = self.encoder(images)
        if self.cfg.quant_conv:
            moments = self.quant_conv(moments)
        return split_moments(moments)

    def decode(self, latents):
        """Unscaled latents [B, h, w, C] -> images [B, H, W, in_channels], not clipped."""
        if self.cfg.post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents).astype(jnp.float32)

    def __call__(self, images):
        """Decodes the posterior mean: touches every parameter, for initialisation."""
        return self.decode(self.encode(images)[0])


def init_vae(cfg: VAEConfig, key) -> dict:
    """Random float32 parameters, `{}` for the identity VAE. Pure, so `jax.eval_shape` takes it."""
    if cfg.kind == "identity":
        return {}
    side = cfg.downsample
    return AutoencoderKL(cfg).init(key, jnp.zeros((1, side, side, cfg.in_channels)))["params"]


def encode_moments(params, cfg: VAEConfig, images, dtype=jnp.float32):
    """The Gaussian posterior of each image's latents, without the scaling factor.

    The identity VAE answers with the images as the mean and the smallest log variance, -30
    (a standard deviation of 3e-7), so that sampling it leaves the pixels as they are.

    Args:
        params: parameter tree of `init_vae`.
        cfg: the configuration that belongs to it.
        images: [B, H, W, in_channels] in [-1, 1]; H and W multiples of `cfg.downsample`.
        dtype: compute dtype of convolutions and attention.

    Returns:
        (mean, logvar), float32 [B, h, w, C] each, logvar within [-30, 20].

    Raises:
        ValueError: the shape of the images does not fit.
    """
    side = cfg.downsample
    fits = images.ndim == 4 and images.shape[3] == cfg.in_channels and min(images.shape[1:3]) > 0
    if not fits or images.shape[1] % side or images.shape[2] % side:
        raise ValueError(
            f"images of shape {images.shape}: the VAE takes [B, H, W, {cfg.in_channels}] with H "
            f"and W multiples of {side}; crop or resize them"
        )
    if cfg.kind == "identity":
        mean = images.astype(jnp.float32)
        return mean, jnp.full_like(mean, MIN_LOGVAR)
    return AutoencoderKL(cfg, dtype).apply({"params": params}, images, method="encode")


def decode_latents(params, cfg: VAEConfig, latents, dtype=jnp.float32):
    """Latents [B, h, w, C] without the scaling factor -> images float32 [B, H, W, in_channels].

    Raises:
        ValueError: the shape of the latents does not fit.
    """
    if latents.ndim != 4 or latents.shape[3] != cfg.latent_channels:
        raise ValueError(
            f"latents of shape {latents.shape}: the VAE takes [B, h, w, {cfg.latent_channels}]"
        )
    if cfg.kind == "identity":
        return latents.astype(jnp.float32)
    return AutoencoderKL(cfg, dtype).apply({"params": params}, latents, method="decode")


def split_moments(moments):
    """[..., 2C] -> (mean, log variance within [-30, 20]) of a Gaussian, float32 [..., C] each."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, MIN_LOGVAR, MAX_LOGVAR)


def sample_posterior(mean, logvar, noise):
    """mean + std * noise, with standard normal noise of the same shape [B, h, w, C]."""
    return mean + jnp.exp(0.5 * logvar) * noise


def kl(mean, logvar):
    """KL divergence to the standard normal in nats, summed per image: [B, ...] -> [B]."""
    terms = mean**2 + jnp.exp(logvar) - 1.0 - logvar
    return 0.5 * jnp.sum(terms, axis=range(1, terms.ndim))


def images_to_latents(params, cfg: VAEConfig, images, dtype=jnp.float32, noise=None):
    """Images as in `encode_moments` -> latents float32 [B, h, w, C], times the scaling factor.

    The posterior mean, or with `noise` (standard normal, [B, h, w, C]) a sample of the posterior.
    """
    mean, logvar = encode_moments(params, cfg, images, dtype)
    latents = mean if noise is None else sample_posterior(mean, logvar, noise)
    return latents * cfg.scaling_factor


def latents_to_images(params, cfg: VAEConfig, latents, dtype=jnp.float32):
    """Inverse of `images_to_latents`: latents [B, h, w, C] -> images float32, not clipped."""
    return decode_latents(params, cfg, latents / cfg.scaling_factor, dtype)
