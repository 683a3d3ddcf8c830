"""`flextok demo`: what its page shows, and the page itself in a browser."""

import concurrent.futures
import dataclasses
import functools
import io
import math
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
import setuptools
import test_text_to_image
import yaml
from common import ROOT, TINY, changed, tiny_generator
from PIL import Image

from flextok_jax import demo
from flextok_jax.demo import Demo, How
from flextok_jax.nn.images import psnr, to_float

SMALL = changed(TINY, tokens__count=4, encoder__depth=1, decoder__depth=1)
FAST = How(steps=1, guidance=1.0, seed=3)
SIZE = SMALL.image_size[0]
SPACE = ROOT / "examples" / "space"


@functools.cache
def models() -> Demo:
    gen = tiny_generator(SMALL)
    pictures = np.random.default_rng(0).integers(256, size=(3, SIZE, SIZE, 3), dtype=np.uint8)
    return Demo(gen.tokenizer, gen, pictures, "tiny")


@functools.cache
def tokens_of(index: int) -> np.ndarray:
    return models().tokens(models().pictures[index])


def direct(tokens, k, seed=FAST.seed) -> np.ndarray:
    """The same by the tokenizer alone."""
    images = models().tokenizer.detokenize(
        tokens[None], k, steps=FAST.steps, guidance_scale=FAST.guidance, key=seed
    )
    return demo.to_uint8(np.asarray(images))[0]


def same(images, expected):
    for image, other in zip(images, expected, strict=True):
        np.testing.assert_array_equal(image, other)


def test_prefixes_and_noises_are_what_the_tokenizer_makes():
    tokens = tokens_of(0)
    counts, images = zip(*models().prefixes(tokens, FAST))
    assert counts == (1, 2, 3, 4)
    same(images, [direct(tokens, k) for k in counts])
    seeds, images = zip(*models().noises(tokens, 2, FAST, [3, 8]))
    same(images, [direct(tokens, 2, seed) for seed in (3, 8)])
    assert (images[0] != images[1]).any()
    difference = demo.spread(images)
    assert difference.shape == images[0].shape and difference.max() == 255
    assert demo.spread([images[0]] * 2).max() == 0


def test_a_mixture_has_the_first_tokens_of_one_and_the_others_of_the_other():
    first, rest = tokens_of(0), tokens_of(1)
    counts, images = zip(*models().mixtures(first, rest, FAST))
    assert counts == (0, 1, 2, 3, 4)
    given = [[*first[:k], *rest[k:]] for k in counts]
    same(images, [direct(np.array(tokens), 4) for tokens in given])


def test_a_new_image_grows_to_the_one_that_is_generated_at_once():
    gen, condition = models().generator, models().condition(label=7)
    assert condition.names == ("class 7",) and len(models().class_names) == 10
    tokens, images = zip(*models().grow(condition, FAST))
    expected = np.asarray(gen.generate_tokens(labels=[7], key=FAST.seed))[0]
    same(tokens, [expected[:k] for k in (1, 2, 3, 4)])
    same(images, [direct(expected, k) for k in (1, 2, 3, 4)])


def test_a_model_that_makes_all_tokens_at_once_shows_their_prefixes():
    gen, condition = models().generator, models().condition(label=7)
    gen = dataclasses.replace(gen, config=dataclasses.replace(gen.config, masked=True))
    page = dataclasses.replace(models(), generator=gen)
    tokens, _ = zip(*page.grow(condition, FAST))
    expected = np.asarray(gen.generate_tokens(labels=[7], key=FAST.seed))[0]
    same(tokens, [expected[:k] for k in (1, 2, 3, 4)])


@pytest.mark.slow
def test_a_page_has_a_search_where_tokens_are_drawn_in_order():
    pytest.importorskip("gradio")
    from flextok_jax.commands.demo import build

    def tabs(model):
        parts = build(model).config["components"]
        return [part["props"]["label"] for part in parts if part["type"] == "tabitem"]

    assert tabs(models()) == ["Prefixes", "Mix", "Generate", "Search"]
    masked = dataclasses.replace(models().generator.config, masked=True)
    gen = dataclasses.replace(models().generator, config=masked)
    assert tabs(dataclasses.replace(models(), generator=gen)) == ["Prefixes", "Mix", "Generate"]


@pytest.mark.slow
def test_a_search_shows_its_beams_and_ends_with_the_best():
    wanted = models().pictures[0]
    *steps, (k, images, scores) = models().search(models().condition(1), wanted, FAST)
    assert [step[0] for step in steps] == [1, 2, 4] and k == 4
    for _, beams, each in steps:
        assert beams.shape == (demo.BEAMS, SIZE, SIZE, 3) and (np.diff(each) <= 0).all()
    found = psnr(to_float(images), to_float(wanted[None]))
    assert images.shape == (1, SIZE, SIZE, 3) and images.dtype == np.uint8
    np.testing.assert_allclose(scores, found, atol=0.1)  # Of images before they are rounded.


def test_prompts_become_conditions():
    drawn = Demo(models().tokenizer, test_text_to_image.generator(), models().pictures, "text")
    condition = drawn.condition(text="two cats")
    embeddings, mask = test_text_to_image.encoder().encode(["two cats"])
    np.testing.assert_array_equal(condition.text, embeddings)
    np.testing.assert_array_equal(condition.text_mask, mask)
    assert condition.names == ("two cats",) and drawn.class_names == ()
    with pytest.raises(ValueError, match="prompt is empty"):
        drawn.condition(text=" ")


def test_people_who_ask_at_once_get_what_they_would_get_alone():
    def ask(index):
        return [image for _, image in models().prefixes(tokens_of(index), FAST)]

    alone = [ask(index) for index in range(3)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for index, images in zip([0, 1, 2] * 4, pool.map(ask, [0, 1, 2] * 4)):
            same(images, alone[index])


def test_bytes_of_tokens_and_of_jpeg_files():
    image = models().pictures[0]
    token, smallest, usual = models().sizes(image, 3, image)
    assert token.count == math.ceil(3 * math.log2(8 * 5 * 5) / 8) == 3 and token.psnr > 100
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=75, optimize=True)
    assert usual.count == file.tell() > smallest.count and usual.psnr > smallest.psnr


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


WHOLE = Image.fromarray(np.random.default_rng(1).integers(256, size=(40, 60, 3), dtype=np.uint8))


def test_any_image_is_read(monkeypatch):
    for data in (
        encoded(WHOLE, "PNG"),
        encoded(WHOLE.convert("RGBA"), "WEBP"),
        encoded(WHOLE.convert("L"), "JPEG"),
        encoded(WHOLE.convert("P"), "GIF"),
        encoded(WHOLE.resize((1, 500)), "BMP"),
    ):
        image = models().read(data)
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
    png = encoded(WHOLE, "PNG")
    for data in (b"", b"no image", png[:500], png[:30]):
        with pytest.raises(ValueError, match="This file cannot be read as an image") as error:
            models().read(data)
        assert "/" not in str(error.value) and "0x" not in str(error.value)
    monkeypatch.setattr(demo, "MOST_PIXELS", 40 * 60 - 1)
    with pytest.raises(ValueError, match="60 x 40 pixels"):
        models().read(png)


def test_sources_are_named_without_their_folders(tmp_path):
    gen = models().generator
    gen.tokenizer.save_pretrained(tmp_path / "tok")
    gen.save_pretrained(tmp_path / "gen")
    WHOLE.save(tmp_path / "image.png")
    found = demo.load(str(tmp_path / "tok"), str(tmp_path / "gen"), images=str(tmp_path))
    assert found.name == "tok" and len(found.pictures) == 1 and found.generator.tokenizer
    alone = demo.load(str(tmp_path / "tok"))
    assert alone.generator is None and alone.class_names == () and not len(alone.pictures)
    with pytest.raises(ValueError, match="names no tokenizer"):
        demo.load(generator=str(tmp_path / "gen"))


# In a browser.

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def url():
    """The page of the shipped models, served by the command."""
    pytest.importorskip("gradio")
    command = [sys.executable, "-m", "flextok_jax.cli", "demo"]
    command += ["--port", str(free_port())]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert "shows demo-emoji" in line, line
            yield line.split()[0]
        finally:
            process.terminate()


def browsers():
    return pytest.importorskip("playwright.sync_api")


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    with browsers().sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


PATIENCE = 240_000  # Milliseconds, on a busy machine.


@pytest.fixture
def page(browser, url):
    """A visit, after which nothing was asked of other machines and no script failed."""
    visit = browser.new_context(viewport={"width": 1200, "height": 900})
    visit.set_default_timeout(PATIENCE)
    page = visit.new_page()
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    open_page(page, url)
    yield page
    own = (url, "data:", "blob:")
    assert asked and not [address for address in asked if not address.startswith(own)]
    assert not errors
    visit.close()


def open_page(page, url):
    page.goto(url)
    page.wait_for_function("document.querySelectorAll('.pictures img').length >= 32")


def sources(page, where: str) -> list[str]:
    """The pictures of a part of the page that is seen, as they are."""
    return page.locator(f"{where}:visible img").evaluate_all("all => all.map(one => one.src)")


def move_to(page, k: int):
    box = page.locator("input[type=range]:visible").first
    box.fill(str(k))
    words = "1 token" if k == 1 else f"{k} tokens"
    page.locator(".large:visible figcaption", has_text=re.compile(f"^{words}$")).wait_for()


def open_tab(page, name: str):
    """In a narrow window, or with wide letters, the last tabs are in a menu."""
    try:
        page.get_by_role("tab", name=name).click(timeout=10_000)
    except browsers().TimeoutError:
        page.get_by_label("More tabs").click()
        page.locator(".overflow-dropdown button", has_text=name).click()


@pytest.mark.slow
def test_the_slider_shows_the_prefix_of_the_strip(page):
    strip = sources(page, ".pictures")
    assert len(set(strip)) > 16 and len(strip) == 32
    for k in (5, 32, 1):
        start = time.monotonic()
        move_to(page, k)
        print(f"{k} tokens, seconds until the browser shows them: {time.monotonic() - start:.2f}")
        assert sources(page, ".large")[1] == strip[k - 1]
        assert page.locator(".bytes td:visible").first.text_content() == f"{k} token{'s' * (k > 1)}"


@pytest.mark.slow
def test_uploads_are_shown_or_refused_with_a_reason(page, tmp_path):
    before = sources(page, ".large")
    broken = tmp_path / "broken.png"
    broken.write_bytes(encoded(WHOLE, "PNG")[:200])
    page.locator("input[type=file]").first.set_input_files(broken)
    toast = page.locator(".toast-body")
    toast.wait_for()
    assert "cannot be read as an image" in toast.text_content()
    assert sources(page, ".large") == before
    for path in (str(tmp_path), str(ROOT), "Traceback"):
        assert path not in page.content()
    toast.wait_for(state="hidden")
    page.get_by_label("Clear").first.click()
    large = tmp_path / "large.png"
    large.write_bytes(bytes(32_000_000))
    page.locator("input[type=file]").first.set_input_files(large)
    toast.wait_for()
    assert re.search(r"\b30\b.*large\.png", toast.text_content())
    move_to(page, 3)  # The page goes on.
    before = sources(page, ".large")
    page.locator("input[type=file]").first.set_input_files(ROOT / "docs" / "astronaut.jpg")
    page.wait_for_function("old => document.querySelector('.large img').src != old", arg=before[0])


@pytest.mark.slow
def test_noise_mixtures_new_images_and_narrow_windows(page, tmp_path):
    page.get_by_role("button", name="Another noise").click()
    page.locator("figcaption", has_text="where they differ").wait_for()
    open_tab(page, "Mix")
    page.locator("figcaption", has_text=re.compile("^32 . 0$")).wait_for()
    assert len(sources(page, ".large")) == 3 and len(sources(page, ".pictures")) == 33
    open_tab(page, "Generate")
    page.get_by_role("button", name="Make a new image").click()
    page.locator(".large:visible figcaption", has_text="32 tokens").wait_for()
    assert len(page.locator(".ids:visible").text_content().split()) == 32
    open_tab(page, "Search")
    page.get_by_role("button", name="Search").click()
    page.locator(".large:visible figcaption", has_text="32 tokens").wait_for()
    for width in (250, 360, 1200):
        page.set_viewport_size({"width": width, "height": 800})
        for tab in ("Prefixes", "Mix", "Generate", "Search"):
            open_tab(page, tab)
            page.locator(".pictures:visible").first.wait_for()
            page.screenshot(path=tmp_path / f"{tab}{width}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_two_visitors_do_not_mix(page, browser, url):
    other = browser.new_page()
    other.set_default_timeout(PATIENCE)
    open_page(other, url)
    for visitor, index in ((page, 3), (other, 5)):
        visitor.locator(f".picks:visible button >> nth={index}").click()
    for visitor, index in ((page, 3), (other, 5)):
        picks = sources(visitor, ".picks")
        visitor.wait_for_function(
            "wanted => document.querySelector('.large img').src == wanted", arg=picks[index]
        )
    first, second = sources(page, ".large")[1], sources(other, ".large")[1]
    move_to(page, 4)
    move_to(other, 4)
    assert sources(page, ".large")[1] != sources(other, ".large")[1] and first != second
    # Nor does one wait for the other.
    open_tab(page, "Search")
    page.get_by_role("button", name="Search").click()
    page.locator(".large:visible figcaption", has_text=re.compile("^1 token,")).wait_for()
    move_to(other, 8)
    found = page.locator(".large:visible figcaption", has_text=re.compile("^32 tokens,"))
    assert found.count() == 0
    found.wait_for()
    other.close()


@pytest.mark.slow
def test_the_page_is_for_this_machine_and_gives_no_files(url):
    port = int(url.split(":")[-1].strip("/"))
    with pytest.raises(ConnectionRefusedError):  # As 0.0.0.0 it would answer here too.
        socket.create_connection(("127.0.0.2", port), timeout=30).close()
    for path in ("/etc/passwd", str(ROOT / "setup.py"), "setup.py"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{url}gradio_api/file={path}", timeout=60)
        assert error.value.code in (403, 404)
    config = urllib.request.urlopen(f"{url}config", timeout=60).read().decode()
    assert str(ROOT) not in config and '"analytics_enabled":false' in config.replace(" ", "")


def test_the_space_needs_what_setup_says(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    wanted = [*given["install_requires"], *given["extras_require"]["demo"]]
    assert (SPACE / "requirements.txt").read_text().splitlines() == wanted
    facts = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert (SPACE / facts["app_file"]).exists() and facts["sdk"] == "gradio"


@pytest.mark.slow
def test_the_space_runs_from_a_copy(tmp_path):
    """As its page says to copy it; the page itself is not opened again."""
    shutil.copytree(SPACE, tmp_path, dirs_exist_ok=True)
    shutil.copytree(ROOT / "flextok_jax", tmp_path / "flextok_jax")
    code = (
        "import runpy, flextok_jax.commands.demo as page\n"
        "page.run = lambda *models, host: print(models[0].name, host, page.__file__)\n"
        "runpy.run_path('app.py', run_name='__main__')"
    )
    pytest.importorskip("gradio")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith(f"demo-emoji 0.0.0.0 {tmp_path}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "host, port", (("127.0.0.1", None), ("127.0.0.1", 65536), ("no.invalid", 1))
)
def test_an_address_where_no_page_can_be_is_refused(host, port):
    pytest.importorskip("gradio")
    from flextok_jax.commands import demo as page

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = port or taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"no page can be opened at {host}:{port}"):
            page.serve(None, host, port)
