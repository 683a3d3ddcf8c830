"""The options of every command: one frozen dataclass each, with the groups that several share.

tyro makes the parser from the fields and the comment beside each. `--help` imports nothing more.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Literal

from tyro.conf import Positional, arg, create_mutex_group
from tyro.constructors import PrimitiveConstructorSpec


def _checked(kind: type, allowed: Callable, words: str) -> Callable:
    def convert(text: str):
        with contextlib.suppress(ValueError):
            if math.isfinite(value := kind(text)) and allowed(value):
                return value
        raise ValueError(f"{text!r} is not {words}")

    return convert


_positive = _checked(int, lambda x: x >= 1, "a whole number from 1 on")
_whole = _checked(int, lambda x: x >= 0, "a whole number from 0 on")
_seed = _checked(int, lambda x: 0 <= x < 2**32, f"a whole number from 0 to {2**32 - 1}")
_share = _checked(float, lambda x: 0 < x <= 1, "a share above 0, at most 1")
_number = _checked(float, lambda x: True, "a finite number")
_scale = _checked(float, lambda x: x >= 0, "a number from 0 on")
_factor = _checked(float, lambda x: x > 0, "a number above 0")
_probability = _checked(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")


def _text(text: str) -> str:
    if not text.strip():
        raise ValueError("it is empty")
    return text


def _process(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"{text!r} is not I/N with I from 0 to N - 1, such as 0/4")
    return int(index), int(count)


def _several(convert: Callable) -> Callable[[str], tuple]:
    return lambda text: tuple(convert(part) for part in text.split(","))


def _option(
    metavar: str, convert: Callable = _text, help: str | None = None, hint: str | None = ""
):
    """An option with one value; `hint` follows the help, None: the default, or "required"."""
    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: convert(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )
    return spec, arg(help_behavior_hint=hint, help=help)


_DATA = (
    "a folder of images (its subfolders are the classes), of tar shards (WebDataset), or of shards "
    "that flextok wrote; tfds:NAME@DIR; KIND:PATH names the kind: folder, webdataset, array_record"
)
_MODEL = (
    "a hub id such as EPFL-VILAB/flextok_d12_d12_in1k (or OWNER/NAME@REVISION), a folder or "
    "model.safetensors in the released format, a workdir of training (its averaged weights), or "
    "demo-digits"
)
_AR_MODEL = "a hub id, a folder of released files, a workdir of the AR stage, or demo-digits-ar"
_T5 = "of prompts: google/flan-t5-xl, another T5 v1.1 or Flan, or a folder of one"
_LABELS = "classes: all, numbers, ranges and names such as 0-9,42,cat, or a file with one per line"
_TASK = "reconstruct --data, generate images to compare with --data, or classify registers"
_TARGET = "a value of the criterion to reach"
_WITHIN = "how much worse than with all tokens it may be"
_RULE = "first: the smallest number that meets; stable: it and all larger ones meet"
_CRITERION = (
    "flow: share of the flow's loss that tokens explain, without sampling; latent: relative error "
    "of latents; psnr (dB), mae, lpips; dino, clip: cosine of features"
)
_VERIFIERS = (
    "likelihood, agreement (of the AR model with what is asked), psnr (to --reference), "
    "dino:SOURCE (likewise), clip:SOURCE (CLIP or PickScore), aesthetic:SOURCE (a CLIP); several "
    "by commas are an ensemble"
)
_JUDGE = "verifiers that score the results and do not steer, by commas"
_BRANCH = "candidates of a beam go apart at the first or at the last of their new tokens"
_PRIOR = "what proposes tokens: the model, the model without what is asked, or any id alike"
_REFERENCE = "an image, or a folder with one for each label or prompt, in the order of names"
_SCHEDULE = "numbers of tokens of the steps, by commas (1, 2, 4, ... up to all; best_of: all)"
_K = "tokens per image (all); the cost follows their number"

Tokenizer = Annotated[str, *_option("SOURCE", _text, _MODEL, None)]
Data = Annotated[str, *_option("DATA", _text, _DATA, None)]
Generator = Annotated[str, *_option("SOURCE", _text, _AR_MODEL, None)]
Labels = Annotated[str | None, *_option("LABELS", _text, _LABELS, "(all)")]
Prompt = Annotated[str | None, *_option("PROMPT", str, "a prompt, for text models")]
Prompts = Annotated[str | None, *_option("FILE", _text, "a file with a prompt on each line")]
Encoder = Annotated[str | None, *_option("SOURCE", _text, _T5, "(the one MODEL names)")]
Folder = Annotated[str, *_option("DIR", _text, "folder for the results", None)]
Source = Annotated[str | None, *_option("SOURCE")]
File = Annotated[str | None, *_option("FILE")]
Split = Annotated[str | None, *_option("SPLIT")]
Limit = Annotated[int | None, *_option("N", _positive, "only the first N images")]
Tokens = Annotated[int | None, *_option("K", _positive, _K)]
Counts = Annotated[tuple[int, ...] | None, *_option("N[,N...]", _several(_positive))]
Whole = Annotated[int, *_option("N", _whole, None, None)]
Positive = Annotated[int, *_option("N", _positive, None, None)]
Seed = Annotated[int, *_option("N", _seed, None, None)]
Share = Annotated[float, *_option("SHARE", _share, None, None)]
Probability = Annotated[float, *_option("P", _probability, None, None)]
Temperature = Annotated[float, *_option("X", _scale, None, None)]
Count = Annotated[int | None, *_option("N", _positive)]
Scale = Annotated[float | None, *_option("SCALE", _scale)]
Scales = Annotated[tuple[float, ...] | None, *_option("SCALE[,SCALE...]", _several(_scale))]
Factor = Annotated[float | None, *_option("FACTOR", _factor)]
Solver = Annotated[
    Literal["euler", "midpoint", "multistep"] | None,
    arg(metavar="{euler,midpoint,multistep}", help_behavior_hint=""),
]
Interval = Annotated[tuple[float, ...] | None, *_option("LOW,HIGH", _several(_probability))]
Process = Annotated[tuple[int, int], *_option("I/N", _process, "process I, from 0, of N (0/1)")]
Task = Literal["reconstruction", "generation", "probe"]
Criterion = Annotated[
    Literal["flow", "latent", "psnr", "mae", "lpips", "dino", "clip"], arg(help=_CRITERION)
]
Flag = Annotated[bool, arg(help_behavior_hint="")]


def _options(cls):
    """A frozen dataclass. Its own options come before those of its groups."""
    own = cls.__annotations__
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = sorted(cls.__dataclass_fields__.items(), key=lambda item: item[0] not in own)
    cls.__dataclass_fields__ = dict(fields)
    return cls


@_options
class Sampling:
    """How images are sampled from tokens."""

    steps: Count = None  # steps of the solver (the model's own default)
    guidance: Scale = None  # guidance scale; 1: none, at half the cost (the model's own default)
    norm_guidance: Flag = True  # plain guidance instead of adaptive projected guidance
    guidance_interval: Interval = None  # guide from time LOW (0: data) to HIGH (1: noise) only
    solver: Solver = None  # multistep: second order at the cost of euler (the model's own default)
    time_shift: Factor = None  # above 1: more steps near noise (the model's own default)
    seed: Seed = 0  # of the noise


@_options
class TokenSampling:
    """How an AR model samples tokens."""

    tokenizer: Source = None  # of the AR model (the one that its file names)
    per_label: Positive = 1  # samples of each label or prompt
    token_guidance: Scale = None  # of the logits; 1: none, at half the cost (the model's own)
    temperature: Temperature = 1.0  # of the logits; 0 is greedy
    top_k: Whole = 0  # sample from the N likeliest tokens; 0: off
    top_p: Probability = 0.0  # sample from the likeliest tokens, together P; 0: off


@_options
class Shards:
    """How a data set is written in shards."""

    split: Split = "train"  # train, validation or all; of TFDS any of its own (train)
    shard_size: Positive = 4096  # images per file
    process: Process = (0, 1)


@_options
class Crops(Shards):
    """How shards of crops are written."""

    crops: Positive = 1  # crops per image: the first is the centre crop, the others are random
    crop_scale: Share = 0.8  # least share of an image that a random crop keeps; 1: the centre crop
    flip: Flag = False  # mirror half of the random crops
    shift: Whole = 0  # shift random crops by up to so many pixels
    seed: Seed = 0  # of the random crops


@_options
class Devices:
    """How networks are run; commands with these options print the devices first."""

    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    batch_size: Positive = 32  # images (or texts) at a time


@_options
class Compute(Devices):
    """How networks with kernels for accelerators are run."""

    attention: Literal["xla", "cudnn", "pallas"] = "xla"  # cudnn: GPUs with bfloat16; pallas: TPUs


@_options
class Reconstruct(Compute, Sampling):
    """Images from their first k tokens: a grid, pictures, metrics.

    Writes DIR/grid.png, DIR/k0016/NAME.png and so on, and DIR/metrics.json.
    Images are cropped and resized. The same command continues after a stop.

    example:
      flextok reconstruct --model EPFL-VILAB/flextok_d12_d12_in1k \\
          --images my_photos --num-tokens 1,4,16,64,256 --out reconstructions
    """

    model: Tokenizer
    images: Data
    limit: Limit = None
    num_tokens: Counts = None  # numbers of tokens, by commas (1, 2, 4, ... up to all)
    out: Folder


_IMAGES_OR_DATA = create_mutex_group(required=True, title="one of")
_TARGET_OR_WITHIN = create_mutex_group(required=True, title="one of")
_LENGTHS = "lengths.json of flextok lengths: a length for each image"
LengthsFile = Annotated[str | None, *_option("FILE", _text, _LENGTHS)]


@_options
class Tokenize(Compute, Crops):
    """Images to a file of tokens, or a data set to shards to train on.

    Of --images: an .npz of int32 tokens [images, K], names and the model's
    sha256. Of --data: shards in OUT/SPLIT for the AR stage; the same command
    continues after a stop.

    example:
      flextok tokenize --model EPFL-VILAB/flextok_d12_d12_in1k \\
          --images my_photos --num-tokens 16 --out tokens.npz
      flextok tokenize --model runs/mine --data my_photos --split train \\
          --crops 10 --flip --out photo_tokens
      flextok tokenize --model demo-digits --images FOLDER \\
          --lengths chosen/lengths.json --out tokens.npz
    """

    model: Tokenizer
    images: Annotated[str | None, *_option("DATA", _text, "as --data"), _IMAGES_OR_DATA] = None
    data: Annotated[str | None, *_option("DATA", _text, _DATA), _IMAGES_OR_DATA] = None
    limit: Limit = None
    num_tokens: Tokens = None
    lengths: LengthsFile = None
    out: Annotated[str, *_option("OUT", hint=None)]  # FILE.npz for --images, a folder for --data


@_options
class Encode(Compute, Crops):
    """A data set to shards of tokens, latents or features to train on.

    Writes DIR/SPLIT with shards and manifest.json. The same command continues
    after a stop; processes with one file system share the work by --process.

    example:
      flextok encode --vae runs/vae --model runs/mine --data FOLDER \\
          --split train --crops 10 --flip --out encoded
      for i in 0 1 2 3; do flextok encode ... --process $i/4 & done
    """

    data: Data
    limit: Limit = None
    model: Source = None  # tokens: a tokenizer, as in flextok tokenize
    num_tokens: Tokens = None
    lengths: LengthsFile = None
    vae: Source = None  # moments: a VAE (workdir, diffusers folder, hub id), or a tokenizer's
    dinov2: Source = None  # features for REPA: facebook/dinov2-large or a folder
    dinov2_size: Positive = 518  # pixels of a side for DINOv2 (large: 2.8 MB per crop; 224: 0.5 MB)
    image_size: Count = None  # side of the crops in pixels (the tokenizer's own; without one 256)
    out: Folder


@_options
class Embed(Devices):
    """Captions beside images to embeddings, to train text models.

    Writes NAME.npy beside each image with a caption, and null_text.npy, of the
    empty caption, into the folder. What is there is kept.

    example:
      flextok embed --data photos --text-encoder google/flan-t5-xl
    """

    data: Annotated[
        str, *_option("FOLDER", _text, "image files with captions, see docs/data.md", None)
    ]
    text_encoder: Annotated[str, *_option("SOURCE", _text, _T5, None)]


@_options
class Detokenize(Compute, Sampling):
    """A file of tokens to images.

    Writes DIR/k0016/NAME.png and so on, with the model that made the tokens; of
    tokens with a length for each image DIR/own/NAME.png, from so many. The same
    command continues after a stop.

    example:
      flextok detokenize --model EPFL-VILAB/flextok_d12_d12_in1k \\
          --tokens tokens.npz --num-tokens 4,16 --out pictures
    """

    model: Tokenizer
    tokens: Annotated[str, *_option("FILE.npz", _text, "of flextok tokenize or generate", None)]
    num_tokens: Counts = None  # use the first so many, several by commas (own lengths, or all)
    out: Folder


@_options
class Lengths(Compute, Sampling):
    """The smallest number of tokens of each image that meets a target.

    Writes DIR/lengths.json (name, k, met, value), DIR/curves.npz (all values)
    and DIR/lengths.png (a histogram, and images from fewest to most tokens).
    The same command continues after a stop.

    example:
      flextok lengths --model demo-digits --images FOLDER --within 0.05 \\
          --out chosen
      flextok lengths --model runs/mine --images FOLDER --criterion psnr \\
          --target 20 --rule stable --out chosen
    """

    model: Tokenizer
    images: Data
    split: Split = None  # train, validation or all; of TFDS any of its own (all)
    limit: Limit = None
    criterion: Criterion = "flow"
    target: Annotated[float | None, *_option("X", _number, _TARGET), _TARGET_OR_WITHIN] = None
    within: Annotated[float | None, *_option("X", _scale, _WITHIN), _TARGET_OR_WITHIN] = None
    rule: Annotated[Literal["first", "stable"], arg(help=_RULE)] = "first"
    counts: Counts = None  # numbers of tokens to choose from, by commas (1, 2, 4, ... up to all)
    samples: Count = None  # noises that the criterion is averaged over (flow: 16, else 1)
    lpips_vgg: File = None  # vgg16-397923af.pth or .safetensors
    lpips_heads: File = None  # weights/v0.1/vgg.pth of lpips
    dinov2: Source = None  # for dino: facebook/dinov2-large or a folder
    clip: Source = None  # openai/clip-vit-base-patch32, another CLIP, or a folder
    out: Folder


@_options
class Generate(Compute, Sampling, TokenSampling):
    """Classes or prompts to tokens to images, with an AR model.

    Writes DIR/grid.png, DIR/k0016/NUMBER_classLABEL.png (or NUMBER_PROMPT.png)
    and so on, DIR/tokens.npz (for flextok detokenize) and DIR/generation.json.
    Prompts are encoded first; then the text encoder is freed. The same command
    continues after a stop.

    example:
      flextok generate --model demo-digits-ar --labels 0-9 --per-label 10 \\
          --out samples
      flextok generate --model EPFL-VILAB/FlexAR-3B-T2I --dtype bfloat16 \\
          --text "a red cube on a blue sphere" --out samples
    """

    model: Generator
    labels: Labels = None
    text: Prompt = None
    prompts: Prompts = None
    text_encoder: Encoder = None
    num_tokens: Counts = None  # images from the first so many tokens, several by commas (all)
    passes: Count = (
        None  # in which a masked model makes its tokens (8), or steps of a flow of tokens (20)
    )
    out: Folder


@_options
class Demo:
    """A page in the browser to play with a model.

    From one token to all, other noise for the same tokens, tokens of two images
    mixed, new images as their tokens come. The page is for this machine alone,
    unless --host says otherwise; Ctrl-C ends it. It needs the extra "demo"
    (gradio).

    example:
      flextok demo
      flextok demo --model runs/mine --generator runs/gen --images my_photos
    """

    model: Annotated[str | None, *_option("SOURCE", _text, _MODEL, "(a shipped one)")] = None
    generator: Annotated[str | None, *_option("SOURCE", _text, _AR_MODEL)] = None
    text_encoder: Annotated[str | None, *_option("SOURCE", _text, _T5, "(the one it names)")] = None
    images: Annotated[str | None, *_option("DATA", _text, "whose first 20 can be picked")] = None
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation
    host: Annotated[str, *_option("ADDRESS", hint=None)] = "127.0.0.1"  # 0.0.0.0: for everybody
    port: Annotated[int | None, *_option("N", _positive, hint="(first free one from 7860)")] = None


@_options
class Search(Compute, Sampling, TokenSampling):
    """Images that a verifier likes, by search over their tokens.

    Each step draws continuations of the best beams, decodes them in few steps and
    scores them; the last beams are decoded with full steps and scored again.
    Writes DIR/NUMBER_classLABEL.png (or NUMBER_PROMPT.png), DIR/search.json,
    DIR/tokens.npz (for flextok detokenize), and DIR/report.html with the beams of
    every step. The same command continues after a stop.

    example:
      flextok search --model demo-digits-ar --labels 0-9 \\
          --verifier agreement --out found
      flextok search --model EPFL-VILAB/FlexAR-3B-T2I --dtype bfloat16 \\
          --text "a red cube on a blue sphere" \\
          --verifier clip:yuvalkirstain/PickScore_v1 \\
          --judge clip:openai/clip-vit-large-patch14 --out found
    """

    model: Generator
    labels: Labels = None
    text: Prompt = None
    prompts: Prompts = None
    text_encoder: Encoder = None
    verifier: Annotated[str, *_option("VERIFIERS", _text, _VERIFIERS, None)]
    judge: Annotated[str | None, *_option("VERIFIERS", _text, _JUDGE)] = None
    reference: Annotated[str | None, *_option("IMAGES", _text, _REFERENCE)] = None
    aesthetic_head: File = None  # sac+logos+ava1-l14-linearMSE.pth or .safetensors
    ensemble: Literal["rank", "zscore"] = "rank"  # how an ensemble joins its scores
    algorithm: Literal["beam", "best_of"] = "beam"  # best_of: independent samples, one step
    beams: Positive = 4  # beams that go on from a step, and are decoded with full steps at last
    candidates: Positive = 8  # continuations of each beam
    schedule: Annotated[
        tuple[int, ...] | None, *_option("N[,N...]", _several(_positive), _SCHEDULE)
    ] = None
    branch: Annotated[Literal["first", "last"], arg(help=_BRANCH)] = "first"
    lookahead: Whole = 0  # tokens that candidates are continued by, greedily, to be scored
    prior: Annotated[Literal["model", "null", "uniform"], arg(help=_PRIOR)] = "model"
    results: Positive = 1  # images of each label or prompt, best first
    search_steps: Positive = 4  # steps of decoding candidates
    out: Folder


@_options
class Evaluate(Compute, TokenSampling, Sampling):
    """Metrics and a report of reconstructions, samples or registers.

    Evaluates every combination of --num-tokens, --steps and --guidance; writes
    DIR/points/NAME.json and DIR/report.html. The same command continues after a
    stop. Reconstruction: PSNR, MAE, SSIM, LPIPS, error by frequency, codebook
    usage, FID, Inception score, precision, recall. Generation: those that need
    no original. Probe: accuracy of a linear classifier of the first k registers.

    example:
      flextok evaluate --model runs/mine --data FOLDER --num-tokens 1,4,16 \\
          --guidance 1,3 --out evaluation
      flextok evaluate --task generation --model demo-digits-ar --data FOLDER \\
          --per-label 100 --out samples_evaluation
      flextok evaluate --task probe --model runs/mine --data FOLDER --out probe
    """

    task: Annotated[Task, arg(help=_TASK)] = "reconstruction"
    model: Tokenizer
    data: Data
    split: Split = None  # train, validation or all; of TFDS any of its own (all; probe: validation)
    limit: Limit = None
    num_tokens: Counts = None  # by commas (1, 2, 4, ... up to all; of generation all)
    steps: Counts = None  # steps of the solver, several by commas (the model's own default)
    guidance: Scales = None  # guidance scales, by commas (the model's own default)
    token_guidance: Scales = None  # of the logits, by commas (the model's own default)
    inception: File = None  # for FID: pt_inception-2015-12-05-6726825d.pth or .safetensors
    lpips_vgg: File = None  # vgg16-397923af.pth or .safetensors
    lpips_heads: File = None  # weights/v0.1/vgg.pth of lpips
    reference: File = None  # .npz with mu and sigma for FID, such as DIR/reference.npz (of --data)
    export: File = None  # write the images of one setting as the array arr_0 of an .npz file
    out: Folder


@_options
class Compare:
    """Two results of evaluate: how metrics and settings differ.

    example:
      flextok compare a/points/k0016_steps20_guidance3.json \\
          b/points/k0016_steps20_guidance3.json
    """

    first: Annotated[Positional[str], *_option("A.json", hint=None)]  # a result of flextok evaluate
    second: Annotated[Positional[str], *_option("B.json", hint=None)]  # another


@_options
class Check:
    """What is in a data set, what cannot be read, and a picture of it.

    Opens images, prints formats, sizes, labels and captions, names the unreadable
    ones, and writes a contact sheet. Shards: verifies every byte.

    example:
      flextok data check photos
      flextok data check tfds:imagenet2012@/data --split validation --all
    """

    source: Positional[Data]
    split: Split = None  # train, validation or all; of TFDS any of its own (all)
    sample: Positive = 1000  # open so many, evenly chosen
    all: Flag = False  # open every image
    out: Annotated[str, *_option("FILE.png", hint=None)] = "data_check.png"  # the contact sheet


@_options
class Pack(Shards):
    """The images of a data set, as they are, in ArrayRecord shards.

    Writes DIR/SPLIT with shards and manifest.json for data.source=array_record:
    a mounted bucket or a network disk reads few large files much faster.

    example:
      flextok data pack FOLDER --split train --out packed
    """

    source: Positional[Data]
    limit: Limit = None
    out: Folder


@_options
class Convert:
    """A model from any source to the released format.

    Writes DIR/model.safetensors, of a workdir its averaged weights. A VAE on its
    own becomes a folder in the layout of diffusers.

    example:
      flextok convert --model runs/mine --out my-model
    """

    model: Tokenizer
    scaling_factor: Factor = None  # of a VAE whose files have none
    half: Flag = False  # write float16: half the size; reading makes it float32 again
    out: Folder


@_options
class Push:
    """A model to the Hugging Face hub, with a model card.

    The card says what the model is and how to load it; of a workdir also command,
    configuration, data and the last evaluation of the run, without the folders on
    this machine. Prints OWNER/NAME@COMMIT, a source. First: `hf auth login`.

    example:
      flextok push --model runs/mine --repo OWNER/NAME --license apache-2.0 \\
          --picture reconstructions/grid.png --evaluation evaluation
    """

    model: Tokenizer
    repo: Annotated[str, *_option("OWNER/NAME", hint=None)]  # made where it is not there
    license: Annotated[str, *_option("ID", hint=None)]  # of the weights, such as apache-2.0
    picture: File = None  # for the card, such as the grid.png of reconstruct or generate
    evaluation: Annotated[str | None, *_option("DIR", _text, "of evaluate, for the card")] = None
    tokenizer: Source = None  # of an AR model: where others find it (the one that its file names)
    private: Flag = False  # make a private repository


@_options
class Info:
    """What a model is: configuration, parameter counts, sha256.

    Of released AR models and text encoders also all that their files say, and
    what had to be assumed.

    example:
      flextok info demo-digits --json
      flextok info EPFL-VILAB/FlexAR-3B-T2I
    """

    source: Positional[Tokenizer]
    scaling_factor: Factor = None  # of a VAE whose files have none
    json: Flag = False  # everything, as JSON


COMMANDS = {  # Words: options, MODULE:FUNCTION below flextok_jax.commands.
    "reconstruct": (Reconstruct, "images:reconstruct"),
    "tokenize": (Tokenize, "images:tokenize"),
    "detokenize": (Detokenize, "images:detokenize"),
    "lengths": (Lengths, "lengths:lengths"),
    "generate": (Generate, "images:generate"),
    "demo": (Demo, "demo:demo"),
    "search": (Search, "search:search"),
    "embed": (Embed, "text:embed"),
    "evaluate": (Evaluate, "evaluate:evaluate"),
    "compare": (Compare, "evaluate:compare"),
    "encode": (Encode, "encode:encode"),
    "data check": (Check, "data:check"),
    "data pack": (Pack, "data:pack"),
    "convert": (Convert, "model:convert"),
    "push": (Push, "model:push"),
    "info": (Info, "model:info"),
}
