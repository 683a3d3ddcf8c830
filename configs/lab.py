"""The laboratory: other tokenizers and generators on the parts of FlexTok, on 16x16 digits.

    python -m flextok_jax.main --config=configs/lab.py:one_pass --workdir=runs/one_pass

Each variant is the base with a few fields changed; minutes on two CPU cores. docs/systems.md says
of each what is in and what is left out.
"""

from ml_collections import ConfigDict

from configs import ar, tokenizer
from configs.base import choose
from examples import canvas, paper
from examples.digits import classifier


def get_config(arg: str = "one_pass") -> ConfigDict:
    """The configuration of a variant; see VARIANTS."""
    sizes = ar.SIZES if arg.split(",")[0] in GENERATORS else tokenizer.SIZES
    return choose(arg, VARIANTS, sizes)


def _base() -> ConfigDict:
    """The digits of configs/tokenizer.py for a tenth of its steps."""
    c = tokenizer.get_config("digits")
    c.total_steps, c.eval_every, c.optim.warmup_steps = 2500, 2500, 100
    return c


def _one_pass() -> ConfigDict:
    """TiTok-like: all tokens attend to each other, VQ, and pixels in one pass with an L2 loss."""
    c = _base()
    c.model.tokens.update(order="full", keep="fixed")
    c.model.bottleneck.update(kind="vq", levels=(), dim=8, size=512)
    c.model.target.kind = "values"
    c.model.decoder.depth = 2
    return c


def _continuous() -> ConfigDict:
    """FlexTok with a KL bottleneck: ordered tokens of four numbers."""
    c = _base()
    c.model.bottleneck.update(kind="kl", levels=(), dim=4)
    c.loss.bottleneck_weight = 1e-4  # of nats per image
    return c


def _titok() -> ConfigDict:
    """TiTok: a ViT with a class token; its decoder writes codes, whose mean convolutions read.

    The released models learn the codes first and then the pixels; here both are learned at once.
    """
    c = _one_pass()
    vit = dict(norm="affine", bias=True, mlp="gelu", qk_norm="none")
    c.model.sites.update(positions="learned", patch_size=2)
    c.model.tokens.reshaped = True
    c.model.encoder.update(vit)
    c.model.decoder.update(vit)
    c.model.target.update(output="codes", codes=64)
    c.model.convs.update(kind="plain", block_out=(32, 32), features=16, norm_groups=8)
    # With commitment=0.25 all images end at one code (those of `one_d_piece` at lr=3e-3 only).
    c.optim.update(rule="adam", lr=1e-3)
    c.model.bottleneck.commitment = 0.0
    return c


def _one_d_piece() -> ConfigDict:
    """One-D-Piece: TiTok whose decoder sees a random number of first tokens; the others are cut."""
    c = _titok()
    c.model.tokens.update(keep="uniform", dropped="cut")
    c.model.target.update(output="conv", codes=0)
    c.model.convs.block_out = ()
    return c


def _llamagen() -> ConfigDict:
    """The baseline in two dimensions: convolutions, one token per position of the grid, VQ."""
    c = _one_pass()
    c.model.sites.patch_size, c.model.tokens.count = 4, 16
    c.model.tokens.registers = False
    c.model.encoder.depth = c.model.decoder.depth = 0
    c.model.convs.update(block_out=(16, 32, 32), features=16, layers=1, norm_groups=8)
    return c


def _imagefolder() -> ConfigDict:
    """ImageFolder: tokens in pairs of two codebooks; the second one follows given features."""
    c = _one_pass()
    c.data.path = classifier.folder()
    c.model.bottleneck.books = 2
    c.repa.update(weight=0.1, width=classifier.FEATURES, book=True)
    return c


def _elastictok() -> ConfigDict:
    """ElasticTok: tokens are the patches, in raster order; the encoder is told how many are kept.

    The image is read as two equal frames.
    """
    c = _one_pass()
    blocks = dict(norm="rms", rope=5e6, qk_norm="none")
    c.model.sites.update(positions="none", patch_size=4, repeat=(2, 1))
    c.model.tokens.update(count=32, registers=False, keep="uniform", dropped="zero", told=True)
    c.model.bottleneck.update(kind="fsq", levels=(8, 5, 5, 5), eps=-1e-3, dim=0, size=0)
    c.model.encoder.update(blocks)
    c.model.decoder.update(blocks)
    c.model.target.output = "tanh"
    c.model.linear_bias = False
    return c


def _spectral() -> ConfigDict:
    """Spectral Image Tokenizer: three scales of a Haar transform, 16 tokens each."""
    c = _one_pass()
    c.model.sites.levels = 2
    c.model.tokens.update(order="scales", registers=False, count=48)
    return c


def _binformer() -> ConfigDict:
    """T2T-BinFormer: worn pages to clean ones; patches are the tokens, nothing is quantised.

    The patches that are read overlap: windows of 3x3 pixels, and of 3x3 windows.
    """
    c = _one_pass()
    c.data.update(path=paper.folder(), image_size=32, paired=True)
    c.evaluation.update(num_images=200, batch_size=100)
    c.model.sites.update(patch_size=4, strides=(2, 2))
    c.model.tokens.update(count=64, registers=False)
    c.model.bottleneck.update(kind="none", dim=64, size=0)
    return c


def _cleaner() -> ConfigDict:
    """The same by ordered tokens: a clean page from the first of 16 tokens of a worn one."""
    c = _base()
    c.data.update(path=paper.folder(), image_size=32, paired=True)
    c.evaluation.update(num_images=200, batch_size=100)
    c.model.sites.patch_size = 4
    c.model.target.kind = "values"
    return c


def _on_canvas(c: ConfigDict, patch: int) -> ConfigDict:
    c.data.update(path=canvas.folder(), image_size=32)
    c.evaluation.update(num_images=400, batch_size=100)
    c.model.sites.patch_size = patch
    return c


def _canvas() -> ConfigDict:
    """Ordered tokens of canvases of one to four digits, in one pass."""
    c = _on_canvas(_base(), 4)
    c.model.tokens.count = 32
    c.model.target.kind = "values"
    return c


def _canvas_elastic() -> ConfigDict:
    """The same by ElasticTok."""
    return _on_canvas(_elastictok(), 8)


def _alit() -> ConfigDict:
    """ALIT: eight more tokens in each of four rounds of the encoder, which revise the others."""
    c = _on_canvas(_one_pass(), 4)
    c.model.tokens.update(count=32, rounds=4, keep="uniform", dropped="cut")
    return c


def _textok() -> ConfigDict:
    """TexTok: encoder and decoder read the caption, so that tokens need not say it."""
    c = _on_canvas(_one_pass(), 4)
    c.model.tokens.count = 4
    c.model.bottleneck.update(kind="none", dim=8, size=0)
    c.model.text.update(dim=canvas.CHANNELS, length=4, encoder=True, padded=True)
    return c


def _tatitok() -> ConfigDict:
    """TA-TiTok's way with the caption: the decoder alone reads it."""
    c = _textok()
    c.model.text.encoder = False
    return c


def _textless() -> ConfigDict:
    """The same without captions, to compare with."""
    c = _textok()
    c.model.text.update(dim=0, length=0, encoder=False, padded=False)
    return c


def _shorter(c: ConfigDict) -> ConfigDict:
    c.total_steps = c.eval_every = 1000
    return c


def _single() -> ConfigDict:
    """One token of `demo-digits` after the other: configs/ar.py:digits, to compare with."""
    return _shorter(ar.get_config("digits"))


def _pairs() -> ConfigDict:
    """Two tokens of `demo-digits` per step, drawn independently: 8 steps for 16 tokens."""
    c = _single()
    c.model.group = 2
    return c


def _folded() -> ConfigDict:
    """Token-Shuffle of ordered tokens: pairs that are one position of the Transformer."""
    c = _pairs()
    c.model.folded = True
    return c


def _doubling() -> ConfigDict:
    """One step for each doubling of the tokens of `demo-digits`: 1, 1, 2, 4, 8."""
    c = _pairs()
    c.model.group = 0
    return c


def _masked() -> ConfigDict:
    """MaskGIT's generator, of TiTok and One-D-Piece too: all tokens in a few passes."""
    c = _single()
    c.model.masked = True
    return c


def _coarse() -> ConfigDict:
    """CTF: ids of 108 cells of `demo-digits` one by one, then all 1 000 ids of them in one step."""
    c = _single()
    c.model.update(depth=2, levels=(8, 5, 5, 5), coarse=(2, 2, 2, 2))
    return c


def _token_flow() -> ConfigDict:
    """A flow over the continuous tokens of `continuous`, from noise, by class."""
    c = _single()
    c.tokenizer.source = ""  # --config.tokenizer.source=runs/continuous
    c.model.update(channels=4, guidance_scale=2.0)
    c.time_shift = 4.0
    return c


def _flowtok() -> ConfigDict:
    """FlowTok: the same from the text, captions such as "the digit three", without noise beside."""
    c = _shorter(ar.get_config("digits_text"))
    c.tokenizer.source = ""
    c.model.update(channels=4, guidance_scale=2.0)
    c.time_shift = 4.0  # With 1 too few times are near the text: 40 % are read as asked, not 73 %.
    return c


TOKENIZERS = {
    "flow": _base,
    "elastictok": _elastictok,
    "one_pass": _one_pass,
    "continuous": _continuous,
    "titok": _titok,
    "one_d_piece": _one_d_piece,
    "llamagen": _llamagen,
    "spectral": _spectral,
    "imagefolder": _imagefolder,
}
IMAGE_TO_IMAGE = {"binformer": _binformer, "cleaner": _cleaner}
CANVAS = {"canvas": _canvas, "canvas_elastic": _canvas_elastic, "alit": _alit}
TEXT = {"textok": _textok, "tatitok": _tatitok, "textless": _textless}
GENERATORS = {
    "single": _single,
    "pairs": _pairs,
    "folded": _folded,
    "doubling": _doubling,
    "masked": _masked,
    "coarse": _coarse,
    "token_flow": _token_flow,
    "flowtok": _flowtok,
}
FLOWS = {"token_flow": "continuous", "flowtok": "continuous"}  # Over whose tokens.
VARIANTS = TOKENIZERS | IMAGE_TO_IMAGE | CANVAS | TEXT | GENERATORS
