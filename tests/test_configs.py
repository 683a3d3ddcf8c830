"""Every kind of shipped configuration, cut down: one step and one evaluation on a folder."""

import json
import math

import pytest
from common import GOLDEN

from configs import ar, distill, tokenizer, vae
from examples import digits, photos
from flextok_jax import main
from flextok_jax.io import storage
from flextok_jax.io.checkpoint import ADDED, HARMLESS, json_config
from flextok_jax.training.loop import train

CUT = [  # (module, variant with sizes); what is cut equal to another one is left out.
    (vae, "digits,width=8"),
    (vae, "photos,width=8,image=32"),
    (vae, "c16,width=32,layers=1,channels=2,image=32"),
    (tokenizer, "digits,width=32,enc_depth=1,dec_depth=1"),
    (tokenizer, "photos,width=32,enc_depth=1,dec_depth=1,num_tokens=4,image=16"),
    (tokenizer, "folder,width=48,enc_depth=1,dec_depth=1,num_tokens=4,image=16"),
    (tokenizer, "d18_d28,width=64,enc_depth=1,dec_depth=1,num_tokens=4,image=32"),
    (distill, "digits"),
    (ar, "digits,width=32,depth=1"),
    (ar, "c2i_d12,width=64,depth=1"),
]


def shrunken(module, arg, workdir):
    """(the configuration on a folder, DIR)."""
    c = module.get_config(f"{arg},batch=4")
    folder = photos.folder() if "photos" in arg else digits.folder()
    c.data.update(source="folder", path=folder)
    c.update(total_steps=1, eval_every=0)
    c.mesh.data = 1
    c.evaluation.update(num_images=6, batch_size=4)
    if module is vae:
        c.evaluation.num_latents, c.discriminator.width = 4, 8
    if module is tokenizer and c.vae.source != "identity":
        c.vae.source = str(GOLDEN / "vae")
    if module is ar:
        c.tokenizer.source, c.data.image_size = "demo-digits", 16
    return c, workdir


QUICK = [x for x in CUT if x[0] is ar and "digits" in x[1]]


@pytest.mark.parametrize(
    "module, arg",
    [pytest.param(*x, marks=() if x in QUICK else pytest.mark.slow) for x in CUT],
)
def test_a_config_trains_and_evaluates_on_a_folder(module, arg, tmp_path):
    c, workdir = shrunken(module, arg, tmp_path)
    state = train(main.make_stage(c), c, workdir).state
    assert (int(state.step), int(state.skipped)) == (1, 0)
    record = json.loads((workdir / "metrics.jsonl").read_text())
    found = {name: value for name, value in record.items() if name.startswith("eval/")}
    assert found and all(math.isfinite(value) for value in found.values())


@pytest.mark.parametrize("module", [vae, tokenizer, distill, ar])
def test_every_variant_can_be_made_and_its_sizes_set(module):
    for variant in module.VARIANTS:
        c = module.get_config(f"{variant},batch=3")
        assert c.batch_size == 3 and c.total_steps > 0 and c.stage in main.STAGES
    for arg, word in (("nope", "digits"), ("digits,colour=3", "batch")):
        with pytest.raises(ValueError, match=f"(?s){arg.split(',')[-1][:4]}.*{word}"):
            module.get_config(arg)


@pytest.mark.parametrize("module", [vae, tokenizer, ar])
def test_every_key_that_came_later_says_what_was_done_before(module):
    """golden/configs.json was saved by an earlier version. Keys of `model`: test_checkpoint.py."""
    old = json.loads((GOLDEN / "configs.json").read_text())[module.__name__.split(".")[-1]]
    now = json_config(module.get_config())
    absent = ADDED | {"model": now["model"]}
    found = storage.differences(old, now, ignore=HARMLESS, absent=absent)
    assert not [line for line in found if "(absent)" in line]
