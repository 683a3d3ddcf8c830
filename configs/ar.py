"""The AR stage: a Transformer over the tokens of a trained tokenizer, by class or by text.

    python -m flextok_jax.main --config=configs/ar.py:digits --workdir=runs/ar

Tokens are made once, several crops of each image, and read from then on:

    flextok tokenize --model EPFL-VILAB/flextok_d18_d28_in1k --data IMAGENET --split train \
        --crops 10 --flip --out TOKENS          (and --split validation)
    python -m flextok_jax.main --config=configs/ar.py:c2i_d24 --workdir=DIR \
        --config.data.path=TOKENS --config.mesh.fsdp=16

or from images, by a frozen tokenizer in every step, as the digits are:

    ... --config.tokenizer.source=MODEL --config.data.source=folder --config.data.path=FOLDER \
        --config.data.image_size=256 --config.data.crop=center

A text variant learns from images with captions and their embeddings: beside NAME.jpg lie NAME.npy
(float [T, 2048], of Flan-T5-XL, without padding) and perhaps NAME.txt; null_text.npy in the folder
is the embedding of the empty prompt. `flextok embed` writes the embeddings (docs/text.md), and
`flextok tokenize` takes them along.

A variant may carry sizes after commas, which override the variant's own:
    --config=configs/ar.py:c2i_d24,depth=2,width=64,batch=4,vocab=1000,num_tokens=16

Sources of the numbers: [paper] arXiv 2502.13967, class-conditional models, ImageNet; [released] the
released inference code and checkpoints; [assumed] recollected or not published, chosen by us.
"""

import functools

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs.base import base, choose
from examples import digits

C2I = (10, 12, 16, 20, 24, 30)  # Depths; 49 M to 1.33 B parameters in the blocks [paper].
T2I = (12, 18, 26, 36)  # [released]: 113 M, 382 M, 1 B, 3 B.
IMAGENET = 1_281_167  # Images.


def get_config(arg: str = "digits") -> ConfigDict:
    """The configuration of a variant; see VARIANTS."""
    return choose(arg, VARIANTS, SIZES)


def _base() -> ConfigDict:
    """What every variant shares, and every key there is."""
    c = base(
        "ar",
        ema_decay=0.9999,  # [assumed]
        compute=dict(dtype="float32", attention="xla", scan=True, remat="none"),
        time_shift=1.0,  # of a flow; moves the sampled times towards the source
        tokenizer=dict(source=""),  # images are tokenised in every step; "": data is tokens
        condition=dict(null_prob=0.1),  # [paper]: class dropout
        # Of a text model: whose embeddings the data has (`flextok embed`), or "": a T5 of these
        # sizes is trained with the model, on the captions of the data.
        text_encoder=dict(
            source="", length=32, vocab_size=1024, depth=2, num_heads=2, head_dim=32, mlp_hidden=128
        ),
        loss=dict(
            chunk=32,  # positions whose logits exist at a time; no effect on the result
            z_loss=0.0,  # 1e-4 (PaLM) where logits drift
            kl_weight=0.1,  # of `token_flow.source_loss`, nats per image of a flow from text
        ),
        model=dict(
            # None: as the tokens or the tokenizer have them.
            vocab_size=placeholder(int),
            num_tokens=placeholder(int),
            num_classes=placeholder(int),  # as many as the data's classes; 0: unconditional
            text_dim=0,
            text_hidden=0,
            width=768,
            depth=12,
            head_dim=64,  # [paper]: width 64 d, d heads
            mlp_hidden=2048,
            qk_norm=False,  # [assumed]
            norm_eps=1e-6,  # [assumed]
            group=1,  # tokens at once; 0: 1, 1, 2, 4, ..., one step for each doubling
            folded=False,  # a group as one position of the Transformer
            masked=False,  # hidden tokens from all others, in place of the next from those before
            levels=(),  # of the tokens' FSQ, for ...
            coarse=(),  # so many of each are one in a coarse id, which is predicted first
            channels=0,  # of continuous tokens, for a flow in place of ids
            guidance_scale=1.5,  # [released]: recommended by class
        ),
    )
    c.data.update(source="tokens", image_size=256, crop_scale=(0.8, 1.0))
    c.optim.update(
        lr=1.2e-3,  # [paper]: approximately
        final_lr_fraction=0.01,  # [paper]: cosine to 1 %
        b2=0.95,  # [paper], as are b1 = 0.9, weight decay and clipping; eps [assumed]
    )  # mup_base_width: the paper's is not published
    return c


def _digits() -> ConfigDict:
    """The tokens of `demo-digits`: 16 per image, 1 000 ids, 10 classes; minutes on a CPU core.

    1 500 images are few: slightly turned and scaled copies, tokenised in every step, weight decay
    and averaging hold overfitting back. This variant trained the shipped model
    `demo-digits-ar`; the metrics lie beside its weights.
    """
    c = _base()
    c.total_steps, c.batch_size = 1500, 64
    c.log_every, c.eval_every, c.checkpoint.every = 100, 300, 300
    c.ema_decay = 0.99
    c.evaluation.num_images, c.evaluation.batch_size = 297, 160
    c.tokenizer.source = "demo-digits"
    c.data.update(source="folder", path=digits.folder(), image_size=16, rotate=8.0, zoom=0.08)
    c.loss.chunk = 16  # all positions: their logits are small
    c.model.update(
        width=128,
        depth=4,
        head_dim=32,
        mlp_hidden=mlp_hidden(128),
    )
    c.optim.update(warmup_steps=100, weight_decay=0.1)
    c.compute.scan = False  # a small model on a CPU runs faster unrolled
    return c


def _digits_text() -> ConfigDict:
    """Digits by text: captions such as "the digit three", a T5 of 0.1 million parameters with it.

    Everything else is as in `digits`. 93 % of its digits are read as asked (docs/text.md).
    """
    c = _digits()
    c.data.path = digits.folder(captions=True)
    c.model.update(num_classes=0, text_dim=64, text_hidden=128, guidance_scale=1.5)
    c.text_encoder.update(length=16, vocab_size=320)
    return c


def _emoji() -> ConfigDict:
    """The tokens of `demo-emoji` by the nine groups of emoji: 32 per image, 1 000 ids.

    --config.data.path=FOLDER of examples/emoji/make_data.py. 75 minutes on a CPU core. This variant
    trained the shipped model `demo-emoji-ar`.
    """
    c = _digits()
    c.total_steps = 4000
    c.evaluation.update(num_images=398, batch_size=64)
    c.tokenizer.source = "demo-emoji"
    c.data.update(path="", image_size=64, crop="center", rotate=4.0, zoom=0.06)
    c.model.update(width=160, depth=5, mlp_hidden=448, guidance_scale=3.0)
    c.optim.update(rule="muon", lr=3e-3)
    return c


def _emoji_text() -> ConfigDict:
    """The same by the emoji's names, with a T5 of its own, shorter; trained `demo-emoji-t2i`."""
    c = _emoji()
    c.total_steps = 1200
    c.model.update(num_classes=0, text_dim=96, text_hidden=192)
    c.text_encoder.update(length=24, num_heads=3, mlp_hidden=192)
    return c


def _folder() -> ConfigDict:
    """The tokens of a person's own images (configs/tokenizer.py:folder), some thousands.

    Numbers of ids, tokens and classes are those of the tokens.
    """
    c = _digits()
    c.total_steps, c.eval_every, c.checkpoint.every = 2000, 500, 500
    c.evaluation.update(num_images=256, batch_size=64)
    c.tokenizer.source = ""
    c.data.update(source="tokens", path="", rotate=0.0, zoom=0.0)
    return c


def _full(depth: int, text: bool) -> ConfigDict:
    """The full-size models: width 64 d, d heads, on tokens of ImageNet by class, or by text.

    300 epochs in batches of 1024, the first 30 of them warm-up (from 1e-6 in the paper, from
    lr / warmup_steps here) [paper]. The training of the text models is not published: the same
    recipe, for as many steps.
    """
    c = _base()
    c.batch_size = 1024  # [paper]
    epoch = IMAGENET / c.batch_size
    c.total_steps, c.optim.warmup_steps = round(300 * epoch), round(30 * epoch)  # [paper]
    c.eval_every, c.checkpoint.every = 5000, 5000
    c.compute.update(dtype="bfloat16", remat="full")  # [assumed]
    c.evaluation.update(num_images=10_240, batch_size=1024)
    c.data.crop = "center"  # of images: crops beforehand are the paper's, 10 of each image
    width = 64 * depth
    c.model.update(width=width, depth=depth, mlp_hidden=mlp_hidden(width))
    if text:
        # Flan-T5-XL, 2048 channels, and a hidden width of 2048; scale 3 [released].
        c.model.update(num_classes=0, text_dim=2048, text_hidden=2048, guidance_scale=3.0)
        c.text_encoder.source = "google/flan-t5-xl"  # [released]
    return c


def mlp_hidden(width: int) -> int:
    """int(8/3 width), at which a block has 12 width^2 weights [paper], up to a multiple of 128."""
    return -(-int(8 * width / 3) // 128) * 128


def _width(c: ConfigDict, value: int):
    c.model.update(width=value, mlp_hidden=mlp_hidden(value))


def _text(c: ConfigDict, value: int):
    if not c.model.text_dim:
        raise ValueError("text (channels of the embeddings) is for a text variant")
    c.model.text_dim = c.model.text_hidden = value


VARIANTS = {"digits": _digits, "folder": _folder, "digits_text": _digits_text}
VARIANTS |= {"emoji": _emoji, "emoji_text": _emoji_text}
VARIANTS |= {f"c2i_d{d}": functools.partial(_full, d, text=False) for d in C2I}
VARIANTS |= {f"t2i_d{d}": functools.partial(_full, d, text=True) for d in T2I}
SIZES = {
    "width": _width,
    "depth": lambda c, n: c.model.update(depth=n),
    "batch": lambda c, n: c.update(batch_size=n),
    "vocab": lambda c, n: c.model.update(vocab_size=n),
    "num_tokens": lambda c, n: c.model.update(num_tokens=n),
    "text": _text,
}
