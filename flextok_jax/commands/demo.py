"""`flextok demo`: the page, drawn by gradio; `flextok_jax.demo` computes what it shows.

Pictures are part of the page's HTML, so no file of them is written; each visitor's tokens are a
state of the visit. Nothing is asked of other machines: no analytics, no fonts of the web.
"""

import base64
import contextlib
import html
import io
import os
import socket
import sys
from collections.abc import Iterable

import numpy as np
from PIL import Image
from tqdm import tqdm

from flextok_jax import demo as playing
from flextok_jax.commands import common, options
from flextok_jax.data import reader
from flextok_jax.demo import Demo, How

MAX_FILE = "30mb"
MOST_STEPS = 64
_AT_ONCE = 8  # Visitors that one action serves at once; others wait in line.
_NOISES = 5
_SMOOTH = 128  # Pictures from so many pixels on are enlarged smoothly; smaller ones show pixels.

_CSS = """
.pictures {display: grid; grid-template-columns: repeat(auto-fill, minmax(58px, 1fr)); gap: 10px}
.large {display: flex; gap: 12px}
.large figure {flex: 1 1 0; min-width: 0; max-width: 280px}
.picks {display: grid; grid-template-columns: repeat(auto-fill, minmax(52px, 1fr)); gap: 6px}
figure {margin: 0 !important; text-align: center}
figcaption {font-size: 13px; color: var(--body-text-color)}
figure img, .picks img {width: 100%; aspect-ratio: 1; display: block; margin: 0 !important;
  border-radius: 4px; border: 1px solid var(--border-color-primary)}
.picks button {padding: 0; margin: 0 !important; border: 0; background: none; cursor: pointer}
.picks button:hover img, .picks button:focus-visible img {outline: 2px solid var(--color-accent)}
@media (max-width: 480px) {.tab-container button {padding: 0 8px !important}}
.pixels {image-rendering: pixelated}
.bytes {border-collapse: collapse; border: 0 !important}
.bytes tr {border: 0 !important}
.bytes th, .bytes td {text-align: right; padding: 3px 0 3px 16px !important;
  border: 0 !important; white-space: nowrap}
.bytes th:first-child, .bytes td:first-child {text-align: left; padding-left: 0 !important}
.ids {font-family: monospace; overflow-wrap: anywhere}
"""
_PICK = """element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (button) trigger('click', {index: Number(button.dataset.index)});
});"""


def demo(args: options.Demo) -> None:
    """Serves the page until Ctrl-C."""
    _gradio()  # Before models are loaded: the extra may be missing.
    models = playing.load(args.model, args.generator, args.text_encoder, args.images, args.dtype)
    common.note_texts(models.tokenizer)
    run(models, args.host, args.port)


def run(models: Demo, host: str = "127.0.0.1", port: int | None = None) -> None:
    """Serves the page of these models to `host` until Ctrl-C. ValueError: it cannot be there."""
    page = build(models)
    url = serve(page, host, port)
    warm_up(models)
    print(f"{url} shows {models.name}; Ctrl-C ends it", flush=True)
    page.block_thread()


def _gradio():
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Read when it is imported.
    import gradio

    return gradio


def serve(page, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Opens the page to `host`, and returns its address.

    Raises ValueError where the port is taken, or the address is not this machine's.
    """
    gr = _gradio()
    system = ["ui-sans-serif", "system-ui", "sans-serif"]
    theme = gr.themes.Default(font=system, font_mono=["ui-monospace", "monospace"])
    try:
        socket.create_server((host, port or 0)).close()
    except (OSError, OverflowError) as error:
        where = f"{host}:{port}" if port else host
        raise ValueError(
            f"no page can be opened at {where} ({error}): give others by --port and --host"
        ) from error
    _, url, _ = page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, share=False, quiet=True,
        show_error=False, ssr_mode=False, run_history=False, footer_links=[], theme=theme,
        css=_CSS, max_file_size=MAX_FILE,
    )  # fmt: skip
    return url


def warm_up(models: Demo) -> None:
    """Compiles what the page needs, so that its first answers are as fast as all others."""
    calls = models.programs()
    made = reader.ahead(lambda call: call(), calls)
    for _ in tqdm(made, total=len(calls), desc="compiling", unit="program", file=sys.stderr):
        pass


def build(models: Demo):
    """The page of a model, a `gradio.Blocks`."""
    gr = _gradio()
    with gr.Blocks(analytics_enabled=False, title=models.name, delete_cache=(600, 600)) as page:
        gr.HTML(_heading(models))
        settings: list = []  # Made below the tabs that use it, in its place on the page.
        with gr.Accordion("How pictures are decoded", render=False) as accordion, gr.Row():
            settings += _settings(gr, models)
        with gr.Tab("Prefixes"):
            _one_image(gr, page, models, settings)
        with gr.Tab("Mix"):
            _mixture(gr, page, models, settings)
        if models.generator:
            with gr.Tab("Generate"):
                _generation(gr, models, settings)
        if models.generator and not models.generator.config.whole:
            with gr.Tab("Search"):
                _search(gr, page, models, settings)
        accordion.render()
    page.queue(default_concurrency_limit=_AT_ONCE, api_open=False)
    return page


def _heading(models: Demo) -> str:
    tok, name = models.tokenizer, html.escape(models.name)
    each = f"one of {tok.config.vocab_size:,} ids" if tok.discrete else "a few numbers"
    count = f"1 to {tok.num_tokens}" if len(tok.prefixes) > 1 else f"{tok.num_tokens}"
    order = " The first tokens say what is most important; a picture can be made of any number."
    return (
        f"<h2>Images as ordered tokens</h2><p><b>{name}</b> writes a picture of {models.side} x "
        f"{models.side} pixels as {count} tokens, each {each}.{order * (len(tok.prefixes) > 1)}</p>"
    )


def _settings(gr, models: Demo) -> list:
    """The controls of `How`: steps, guidance, seed."""
    flow = models.tokenizer.config.is_flow
    own = models.tokenizer.config.sampler if flow else None
    scale = own.guidance_scale if flow and not callable(own.guidance_scale) else 1.0
    return [
        gr.Slider(
            1, MOST_STEPS, own.steps if flow else 1, step=1, label="Steps", visible=flow,
            info="from noise to the picture",
        ),
        gr.Slider(
            0, max(10.0, 2 * scale), scale, step=0.1, label="Guidance", visible=flow,
            info="how strongly tokens are followed; 1: none",
        ),
        gr.Number(
            0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed", info="of all that is random"
        ),
    ]  # fmt: skip


def _how(models: Demo, steps, guidance, seed) -> How:
    if not models.tokenizer.config.is_flow:
        return How(seed=int(seed or 0))
    return How(int(steps), float(guidance), int(seed or 0))


@contextlib.contextmanager
def _told(gr):
    """What a person can mend is said on the page; other errors are printed here only."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _picker(gr, page, models: Demo, first: int):
    """A choice of images: (the state (image, tokens) or None, the events after which it is new)."""
    chosen = gr.State(None)
    count = len(models.pictures)
    words = "Pick a picture, or upload one of the kind that the model has learned."
    gr.HTML(words if count else "Upload a picture of the kind that the model has learned.")
    picks = gr.HTML(_picks(models.pictures), js_on_load=_PICK, visible=count > 0)
    file = gr.File(label="Upload an image", file_types=["image"], type="binary", height=140)

    def opened(image):
        return image, models.tokens(image)

    def start():
        return opened(models.pictures[first % count]) if count else None

    def pick(event: gr.EventData):
        return opened(models.pictures[int(event.index) % count])

    def upload(data):
        with _told(gr):
            image = models.read(data)
        return opened(image)

    quiet = dict(outputs=chosen, show_progress="hidden")
    return chosen, [
        page.load(start, **quiet), picks.click(pick, **quiet), file.upload(upload, file, chosen)
    ]  # fmt: skip


def _one_image(gr, page, models: Demo, settings: list) -> None:
    ordered = len(models.tokenizer.prefixes) > 1
    most = models.tokenizer.num_tokens
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            chosen, events = _picker(gr, page, models, first=0)
        with gr.Column(scale=2, min_width=300):
            pair = gr.HTML()
            k = gr.Slider(1, most, 1 if ordered else most, step=1, label="Tokens", visible=ordered)
            table = gr.HTML()
    gr.Markdown("### The picture from 1 token to all", visible=ordered)
    strip = gr.HTML(visible=ordered)
    again = gr.Button("Another noise, same tokens", visible=models.tokenizer.config.is_flow)
    noises = gr.HTML()

    def one(chosen, k, *how):
        if chosen is None:
            return "", ""
        (image, tokens), how = chosen, _how(models, *how)
        decoded = models.decode(tokens, int(k), how)
        return (
            _figures("large", [("original", image), (_count(k), decoded)]),
            _table(models.sizes(image, int(k), decoded)),
        )

    def everything(chosen, k, *how):
        if chosen is None:
            return
        yield *one(chosen, k, *how), gr.skip(), ""
        pictures = []
        for count, picture in models.prefixes(chosen[1], _how(models, *how)):
            pictures.append((str(count), picture))
            yield gr.skip(), gr.skip(), _figures("pictures", pictures), gr.skip()

    def others(chosen, k, *how):
        if chosen is None:
            return
        seeds = np.random.default_rng().integers(10_000, size=_NOISES).tolist()
        pictures = []
        for seed, picture in models.noises(chosen[1], int(k), _how(models, *how), seeds):
            pictures.append((f"seed {seed}", picture))
            yield _figures("pictures", pictures)
        difference = playing.spread([picture for _, picture in pictures])
        yield _figures("pictures", [*pictures, ("where they differ", difference)])

    inputs = [chosen, k, *settings]
    k.change(one, inputs, [pair, table], trigger_mode="always_last", show_progress="hidden")
    outputs = [pair, table, strip, noises]
    last = dict(trigger_mode="always_last", show_progress="hidden")
    for event in events:
        event.success(everything, inputs, outputs, **last)
    gr.on([control.change for control in settings], everything, inputs, outputs, **last)
    again.click(others, inputs, noises, show_progress="hidden")


def _mixture(gr, page, models: Demo, settings: list) -> None:
    most = models.tokenizer.num_tokens
    with gr.Row():
        with gr.Column(min_width=240):
            gr.Markdown("### First tokens from")
            first, events = _picker(gr, page, models, first=1)
        with gr.Column(min_width=240):
            gr.Markdown("### The others from")
            rest, more = _picker(gr, page, models, first=2)
    k = gr.Slider(0, most, min(2, most), step=1, label="Tokens of the first picture")
    pair, strip = gr.HTML(), gr.HTML()

    def one(first, rest, k, *how):
        if first is None or rest is None:
            return ""
        mixed = models.mixed(first[1], rest[1], int(k), _how(models, *how))
        given = [(f"gives the first {int(k)}", first[0]), (f"the other {most - int(k)}", rest[0])]
        return _figures("large", [*given, ("mixed", mixed)])

    def everything(first, rest, k, *how):
        yield one(first, rest, k, *how), gr.skip()
        if first is None or rest is None:
            return
        pictures = []
        for count, picture in models.mixtures(first[1], rest[1], _how(models, *how)):
            pictures.append((f"{count} + {most - count}", picture))
            yield gr.skip(), _figures("pictures", pictures)

    inputs, last = [first, rest, k, *settings], dict(trigger_mode="always_last")
    last["show_progress"] = "hidden"
    k.change(one, inputs, pair, **last)
    for event in events + more:
        event.success(everything, inputs, [pair, strip], **last)
    gr.on([control.change for control in settings], everything, inputs, [pair, strip], **last)


def _generation(gr, models: Demo, settings: list) -> None:
    with gr.Row(equal_height=True):
        label, text = _condition(gr, models)
        button = gr.Button("Make a new image", variant="primary")
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            large = gr.HTML("As its tokens come. Another seed, below, makes another image.")
        with gr.Column(scale=2, min_width=300):
            ids, strip = gr.HTML(), gr.HTML()

    def grow(label, text, *how):
        with _told(gr):
            condition = models.condition(label, text)
        pictures = []
        for tokens, picture in models.grow(condition, _how(models, *how)):
            pictures.append((str(len(tokens)), picture))
            words = f"<p class='ids'>{' '.join(map(str, tokens.tolist()))}</p>"
            newest = _figures("large", [(_count(len(tokens)), picture)])
            yield words, newest, _figures("pictures", pictures)

    gr.on(
        [button.click, text.submit], grow, [label, text, *settings], [ids, large, strip],
        show_progress="hidden",
    )  # fmt: skip


def _condition(gr, models: Demo) -> tuple:
    """The controls of what is generated: (a class, a prompt), of which one is seen, or none."""
    names, by_text = models.class_names, bool(models.generator.config.text_dim)
    label = gr.Dropdown(
        [(name, i) for i, name in enumerate(names)], value=0, label="Class", visible=bool(names),
        filterable=len(names) > 20,
    )  # fmt: skip
    text = gr.Textbox(label="What the image should show", visible=by_text, max_length=1000)
    return label, text


def _search(gr, page, models: Demo, settings: list) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=240):
            chosen, _ = _picker(gr, page, models, first=3)
            label, text = _condition(gr, models)
            button = gr.Button("Search", variant="primary")
        with gr.Column(scale=2, min_width=300):
            large = gr.HTML(
                "The generator draws tokens for the class or the prompt; of many images from few "
                "tokens those most like the picture go on. The first search takes longer."
            )
            strip = gr.HTML()

    def find(chosen, label, text, *how):
        if chosen is None:
            raise gr.Error("Pick or upload a picture first.", print_exception=False)
        with _told(gr):
            condition = models.condition(label, text)
        rows = ""
        for k, images, scores in models.search(condition, chosen[0], _how(models, *how)):
            given = [("the picture", chosen[0]), (f"{_count(k)}, {scores[0]:.1f} dB", images[0])]
            beams = [(f"{score:.1f} dB", image) for score, image in zip(scores, images)]
            if len(beams) > 1:
                rows += f"<p>{_count(k)}</p>" + _figures("pictures", beams)
            yield _figures("large", given), rows

    inputs = [chosen, label, text, *settings]
    button.click(find, inputs, [large, strip], show_progress="minimal")


# HTML.


def _count(k) -> str:
    return "1 token" if int(k) == 1 else f"{int(k)} tokens"


def _figures(kind: str, pictures: Iterable[tuple[str, np.ndarray]]) -> str:
    """Pictures with their captions, laid out as the CSS class `kind` says."""
    figures = (
        f"<figure>{_img(picture, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, picture in pictures
    )
    return f"<div class='{kind}'>{''.join(figures)}</div>"


def _picks(pictures: np.ndarray) -> str:
    buttons = (
        f"<button data-index='{i}'>{_img(picture, f'picture {i + 1}')}</button>"
        for i, picture in enumerate(pictures)
    )
    return f"<div class='picks'>{''.join(buttons)}</div>"


def _img(picture: np.ndarray, words: str) -> str:
    file, small = io.BytesIO(), len(picture) < _SMOOTH
    Image.fromarray(picture).save(file, "PNG" if small else "WEBP", quality=90)
    data = base64.b64encode(file.getvalue()).decode()
    kind = "class='pixels' src='data:image/png" if small else "src='data:image/webp"
    return f"<img {kind};base64,{data}' alt='{html.escape(words, quote=True)}'>"


def _table(sizes: list[playing.Size]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(size.name)}</td><td>{size.count:,}</td><td>{size.psnr:.1f}</td></tr>"
        for size in sizes
    )
    head = "<tr><th></th><th>bytes</th><th>PSNR, dB</th></tr>"
    note = "<p>A JPEG file holds more than the picture: its own tables.</p>"
    return f"<table class='bytes'>{head}{rows}</table>{note}"
