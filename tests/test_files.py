"""Files: what is read is what is written; what is not understood is refused, with all reasons."""

import dataclasses
import json
import math
import pathlib
import re
import shutil
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from common import CONFIGS, GOLDEN, TINY, changed, last, random_params, small_vae, tiny_tokenizer
from huggingface_hub import constants as hub_constants
from safetensors import safe_open

from flextok_jax import FlexTok, ImageGenerator
from flextok_jax.io import models, sources, storage
from flextok_jax.io.formats import flexar, flextok_config, names, vae_files
from flextok_jax.nn import vae
from flextok_jax.nn.config import from_dict
from flextok_jax.nn.vae_config import VAEConfig
from flextok_jax.training.distill_stage import student
from flextok_jax.training.tokenizer_stage import TokenizerStage

WITH_VAE = dataclasses.replace(TINY, vae=small_vae())


@pytest.fixture(scope="module")
def file():
    """(tensors, metadata) of the golden tokenizer, straight from its file."""
    return contents(GOLDEN / "tokenizer" / "model.safetensors")


def contents(path):
    with safe_open(str(path), "numpy") as f:
        return {name: f.get_tensor(name) for name in f.keys()}, f.metadata()


def write(folder, tensors, metadata) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata)
    return folder


def assert_saved_again_bitwise(source, folder):
    """Loads `source`, saves it into `folder`: the same keys, metadata and bytes."""
    tensors, metadata = contents(source / "model.safetensors")
    models.save(folder, models.load(source))
    again, metadata_again = contents(folder / "model.safetensors")
    assert metadata_again == metadata
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape, name
        assert again[name].tobytes() == tensor.tobytes(), name


def configuration(metadata) -> dict:
    return flextok_config.parse_metadata(metadata)


def as_metadata(config) -> dict:
    return {key: str(value) for key, value in config.items()}


def module(config, path) -> dict:
    """The module "enc_x" or "dec_x", or the top-level entry of that name."""
    part = {"enc": "encoder", "dec": "decoder"}.get(path[:3])
    return config[part]["module_dict"][path] if part else config[path]


def test_load_save_load_is_bitwise(tmp_path):
    assert_saved_again_bitwise(GOLDEN / "tokenizer", tmp_path / "once")
    assert_saved_again_bitwise(tmp_path / "once", tmp_path / "twice")


def test_a_configuration_beside_the_file_is_read(file, tmp_path):
    source = write(tmp_path / "a", file[0], {"format": "pt"})
    with pytest.raises(ValueError, match="no configuration"):
        models.load(source)
    (source / "config.json").write_text("{'not': json}")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        models.load(source)
    shutil.copy(GOLDEN / "tokenizer" / "config.json", source)
    models.save(tmp_path / "b", models.load(source))
    inside = models.load(GOLDEN / "tokenizer").config
    assert models.load(tmp_path / "b" / "model.safetensors").config == inside


def test_names_of_old_and_of_wrapped_files_are_read(file, tmp_path):
    old = {}
    for name, tensor in file[0].items():
        if "attentions.0." in name:
            for before, today in names.OLD_ATTENTION.items():
                name = name.replace(f".{today}.", f".{before}.")
        name = re.sub(r"(_transformer\.blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", name)
        old[name] = tensor
    assert sum(name not in file[0] for name in old) > 16
    found, golden = models.load(write(tmp_path, old, file[1])), models.load(GOLDEN / "tokenizer")
    assert storage.fingerprint(found.params) == storage.fingerprint(golden.params)


def test_bfloat16_files_load_as_their_float32_values(file, tmp_path):
    tensors, metadata = file
    half = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
    params = models.load(write(tmp_path, half, metadata)).params
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    name = "decoder.module_dict.dec_to_patches.proj.weight"
    kernel = params["decoder"]["head"]["kernel"]
    np.testing.assert_array_equal(kernel.T, half[name].astype(np.float32))


def test_every_fault_of_a_configuration_is_listed_in_one_error(file, tmp_path):
    tensors, metadata = file
    config = configuration(metadata)
    module(config, "enc_to_latents")["_target_"] = "flextok.model.postprocessors.heads.OtherHead"
    module(config, "enc_seq_packer")["mask_mode"] = "full"
    module(config, "dec_patches_posemb_module")["posemb_type"] = "learnable"
    module(config, "dec_transformer")["qk_norm"] = False
    module(config, "dec_transformer")["window"] = 7
    module(config, "enc_register_module")["dim"] = 96
    module(config, "enc_transformer")["depth"] = "two"
    module(config, "dec_nested_dropout")["size_sampling_mode"] = "cubic"
    module(config, "dec_seq_packer")["per_subseq_embs"] = False
    del module(config, "dec_time_embedder")["max_timestep"]
    config["vae"]["_target_"] = "flextok.vae_wrapper.OtherVAE"
    with pytest.raises(ValueError) as error:
        models.load(write(tmp_path, tensors, as_metadata(config)))
    lines = str(error.value).splitlines()
    for words in (
        "vae._target_ OtherVAE",
        "enc_to_latents._target_ OtherHead LinearHead",
        "enc_seq_packer.mask_mode full causal_last",
        "dec_patches_posemb_module.posemb_type learnable sincos",
        "dec_transformer.qk_norm False True",
        "dec_transformer.window 7",
        "enc_register_module.dim=96 dim=64",
        "enc_transformer.depth two",
        "cubic pow2",
        "dec_seq_packer.per_subseq_embs False",
        "dec_time_embedder.max_timestep is missing",
    ):
        assert any(all(word in line for word in words.split()) for line in lines), words
    assert len(lines) == 1 + 11


def test_a_value_of_another_type_is_a_fault_and_arguments_without_effect_are_not(file):
    config = configuration(file[1])
    module(config, "dec_transformer")["drop_path_rate"] = 0.3
    module(config, "enc_seq_packer")["max_seq_len"] = 9
    config["something_else"] = {1: 2}
    assert flextok_config.read_config(config)[1] == []
    for path, key, value in (
        ("dec_transformer", "depth", True),
        ("dec_transformer", "depth", 0),
        ("dec_transformer", "head_dim", 64.0),
        ("dec_latent_dropout", "dropout_prob", "high"),
        ("enc_patch_emb", "patch_sizes", [2, 4]),
        ("dec_transformer", 3, "a key that is no name"),
        ("regularizer", "levels", [8, -8]),
    ):
        broken = configuration(file[1])
        module(broken, path)[key] = value
        cfg, problems = flextok_config.read_config(broken)
        assert cfg is None and any(f"{path}.{key}" in line for line in problems), (path, key)


@pytest.mark.parametrize(
    "missing",
    [
        "decoder.module_dict.dec_transformer.blocks.1.mlp.fc2.weight",
        "vae.vae.encoder.conv_in.weight",  # the VAE's layout is read from it
    ],
)
def test_every_fault_of_the_tensors_is_listed_in_one_error(file, tmp_path, missing):
    tensors, metadata = dict(file[0]), file[1]
    misshapen = "encoder.module_dict.enc_register_module.registers"
    infinite = "decoder.module_dict.dec_to_patches.proj.bias"
    del tensors[missing]
    tensors["decoder.module_dict.dec_extra.weight"] = np.zeros(3, np.float32)
    tensors[misshapen] = tensors[misshapen][..., :-1, :-1].copy()
    tensors[infinite] = tensors[infinite].copy()
    tensors[infinite][0] = np.inf
    with pytest.raises(ValueError) as error:
        models.load(write(tmp_path, tensors, metadata))
    lines = str(error.value).splitlines()
    for words in (missing, "dec_extra.weight", misshapen, infinite):
        assert sum(words in line for line in lines) == 1, words
    assert len(lines) == 1 + 4


def test_numbers_that_are_not_finite_are_not_saved(tmp_path):
    tok = tiny_tokenizer()
    params = jax.tree.map(lambda x: x, tok.params)
    params["decoder"]["null"] = params["decoder"]["null"] * np.nan
    with pytest.raises(ValueError, match="nullcond"):
        dataclasses.replace(tok, params=params).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_nothing_that_a_file_names_is_imported_or_evaluated(file, tmp_path, monkeypatch):
    tensors, metadata = file
    trace = tmp_path / "was_run"
    code = f"import pathlib; pathlib.Path({str(trace)!r}).touch()"
    (tmp_path / "named_by_a_file.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    call = f"__import__('os').system('touch {trace}')"

    harmless = metadata | {"note": call, "other": "__import__('named_by_a_file')"}
    source = write(tmp_path / "a", tensors, harmless)
    assert_saved_again_bitwise(source, tmp_path / "b")

    config = configuration(metadata)
    module(config, "dec_transformer")["_target_"] = "named_by_a_file.Anything"
    hostile = as_metadata(config) | {"pipeline": call, "regularizer": "{[]: named_by_a_file}"}
    with pytest.raises(ValueError) as error:
        models.load(write(tmp_path / "c", tensors, hostile))
    assert "named_by_a_file.Anything" in str(error.value) and "__import__" in str(error.value)
    assert not trace.exists() and "named_by_a_file" not in sys.modules


# Sources.


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, and no way out."""
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(hub, hub_id, folder, revision="main"):
    """Puts the files of `folder` into the cache as the hub's own client lays them out."""
    repo, commit = hub / ("models--" + hub_id.replace("/", "--")), 5 * "01234567"
    snapshot = repo / "snapshots" / commit
    for made in (repo / "refs", repo / "blobs", snapshot):
        made.mkdir(parents=True)
    (repo / "refs" / revision).write_text(commit)
    for i, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, repo / "blobs" / f"blob{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{i}")
    return snapshot


def test_a_hub_id_is_found_in_the_cache_of_the_hub_without_a_network(file, hub, tmp_path):
    beside = write(tmp_path / "beside", file[0], {"format": "pt"})
    shutil.copy(GOLDEN / "tokenizer" / "config.json", beside)
    snapshot = cached(hub, "owner/flextok-beside.v1", beside)
    loaded = models.load("owner/flextok-beside.v1")
    assert loaded.config == models.load(GOLDEN / "tokenizer").config
    assert loaded.origin == f"owner/flextok-beside.v1@{snapshot.name}"
    assert models.load(loaded.origin).config == loaded.config  # What a record says is a source.
    assert models.load(snapshot / "model.safetensors").config == loaded.config  # links to a blob
    commit = cached(hub, "owner/vae", GOLDEN / "vae", "v2").name
    wanted = vae_files.load_folder(GOLDEN / "vae")[0]
    for given in ("owner/vae@v2", f"owner/vae@{commit}"):
        assert models.load_vae(given)[0] == wanted
    assert sources.pinned("owner/vae@v2") == f"owner/vae@{commit}"
    for wrong in ("owner/vae", "owner/vae@v3"):
        with pytest.raises(FileNotFoundError, match="owner/vae.*by hand"):
            models.load_vae(wrong)
    with pytest.raises(ValueError, match="revision already.*'v3'"):
        sources.find("owner/vae@v2", revision="v3")


def test_a_run_records_the_commit_of_its_vae(hub):
    commit = cached(hub, "owner/vae-of-a-run", GOLDEN / "vae").name
    sizes = "width=64,enc_depth=1,dec_depth=1,num_tokens=4,image=32"
    config = CONFIGS["tokenizer"].get_config(f"d18_d28,{sizes}")
    config.vae.source, config.evaluation.num_images = "owner/vae-of-a-run", 0
    about = TokenizerStage(config).export_config()
    assert about["vae_source"] == f"owner/vae-of-a-run@{commit}"
    params = models.vae_params(about["vae_source"], from_dict(VAEConfig, about["config"]["vae"]))
    assert storage.fingerprint(params) == about["vae_fingerprint"]


def test_one_question_is_asked_of_the_hub(monkeypatch):
    asked = []

    def nobody(hub_id, **options):
        asked.append(hub_id)
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", nobody)
    with pytest.raises(FileNotFoundError, match="owner/not_there.*no network.*model.safetensors"):
        models.load("owner/not_there")
    assert asked == ["owner/not_there"]


def test_what_looks_like_a_path_is_never_sent_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_fetch", lambda *args: pytest.fail(f"asked for {args}"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for text in ("a/b/c", "./x", "../x/y", "/nowhere/x", "runs/typo", "name", "~/nowhere/x"):
        with pytest.raises(FileNotFoundError, match="demo-digits"):
            models.load(text)
    for load in (FlexTok.from_pretrained, ImageGenerator.from_pretrained):
        with pytest.raises(ValueError, match="revision='v1'"):
            load(GOLDEN / "tokenizer", revision="v1")
        with pytest.raises(ValueError, match="revision='v1'"):
            load("demo-digits", revision="v1")


@pytest.mark.parametrize(
    "there, words",
    [
        (["model_index.json", "unet"], "pipeline.*vae"),
        (["model.fp16.safetensors", "config.json"], "model.fp16.safetensors.*rename"),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], "several files"),
        (["pytorch_model.bin", "config.json"], "pytorch_model.bin.*convert"),
        (["config.json", vae_files.WEIGHTS], "VAE"),
        (["diffusion_pytorch_model.fp16.safetensors"], "fp16.*VAE"),
        (["diffusion_pytorch_model.bf16.safetensors"], f"bf16.*rename it to {vae_files.WEIGHTS}"),
        (["a.txt"], "a.txt"),
        ([], "empty"),
    ],
)
def test_a_folder_of_something_else_is_named_for_what_it_is(tmp_path, there, words):
    for name in there:
        (tmp_path / name).touch()
    for load in (models.load, flexar.load):
        with pytest.raises(FileNotFoundError, match=f"no model.safetensors.*{words}"):
            load(tmp_path)


def test_a_model_of_another_kind_is_named(tmp_path):
    for folder, load in (
        ("ar_c2i", models.load),
        ("tokenizer", flexar.load),
        ("ar_c2i", lambda path: models.load_vae(str(path / "model.safetensors"))),
    ):
        with pytest.raises(ValueError, match="an AR model" if folder == "ar_c2i" else "tokenizer"):
            load(GOLDEN / folder)
    kinds = {"ar_t2i": "ar", "tokenizer": "tokenizer", "vae": "vae", "dinov2": "dinov2"}
    assert {name: sources.kind_of(GOLDEN / name) for name in kinds} == kinds
    with pytest.raises(ValueError, match="'dinov2'"):
        models.load(GOLDEN / "dinov2")
    (tmp_path / "x.bin").touch()
    with pytest.raises(ValueError, match="x.bin.*convert"):
        models.load(tmp_path / "x.bin")


# Workdirs.


def test_a_workdir_is_a_model_of_its_averaged_parameters(tmp_path, monkeypatch):
    from flextok_jax.io import checkpoint

    params = random_params(TINY)
    (tmp_path / "checkpoints").mkdir()
    about = {"kind": "flextok", "config": dataclasses.asdict(TINY), "vae_source": "identity"}
    (tmp_path / "config.json").write_text(json.dumps({"model": about}))
    ema = {name: params[name] for name in ("encoder", "decoder")} | {"repa": np.ones(3)}
    found = checkpoint.Averaged(ema, {}, 7, {"a": 1})
    monkeypatch.setattr(checkpoint, "restore_ema", lambda path: found)
    loaded = models.load(tmp_path)
    assert loaded.config == TINY and loaded.step == 7 and loaded.origin.endswith("step 7")
    assert storage.fingerprint(loaded.params) == storage.fingerprint(params)
    with pytest.raises(ValueError, match="tokenizer of pixels"):
        models.load_vae(str(tmp_path))
    ema["repa"][1] = np.nan
    with pytest.raises(ValueError, match="repa"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": about | {"kind": "ar"}}))
    with pytest.raises(ValueError, match="an AR model"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="config.json"):
        models.load(tmp_path)


def test_the_vae_of_a_tokenizer_is_a_source_of_a_vae():
    cfg, params = models.load_vae("demo-emoji")
    whole = models.load("demo-emoji")
    assert cfg == whole.config.vae and models.load_vae("demo-emoji", 2.0)[0].scaling_factor == 2
    assert storage.fingerprint(params) == storage.fingerprint(whole.params["vae"])
    with pytest.raises(ValueError, match="demo-digits is a tokenizer of pixels"):
        models.load_vae("demo-digits")


def test_the_scaling_factor_of_a_vae_workdir(tmp_path, monkeypatch):
    from flextok_jax.io import checkpoint

    cfg, params = vae_files.load_folder(GOLDEN / "vae")
    (tmp_path / "checkpoints").mkdir()
    about = {"kind": "vae", "config": dataclasses.asdict(cfg)}
    (tmp_path / "config.json").write_text(json.dumps({"model": about}))

    def factor(extra, given=None):
        found = checkpoint.Averaged({"vae": params}, {}, 7, extra)
        monkeypatch.setattr(checkpoint, "restore_ema", lambda path: found)
        models.load_vae.cache_clear()
        return models.load_vae(str(tmp_path), given)[0].scaling_factor

    assert factor({"scaling_factor": 0.7}) == 0.7 and factor({}, 0.5) == 0.5
    with pytest.raises(ValueError, match="vae.scaling_factor"):
        factor({})


# Configurations and names.


@pytest.mark.parametrize(
    "cfg",
    [
        WITH_VAE,
        changed(
            TINY,
            sites=dict(grid=(2, 4), patch_size=1),
            tokens=dict(count=12, keep="uniform_pow2"),
            bottleneck__levels=(4, 4),
            encoder__depth=1,
            encoder__mlp_hidden=131,
            decoder__mlp_hidden=64,
            decoder__head_dim=16,
            target__flow=dict(
                max_timestep=1.0,
                null_prob=0.1,
                time_frequencies=64,
                mode_scale=0.0,
                log_normal_time=True,
                sampler=dict(
                    steps=7,
                    guidance_scale=1.5,
                    solver="midpoint",
                    time_shift=2.0,
                    guidance_interval=(0.25, 0.5),
                ),
            ),
        ),
        dataclasses.replace(WITH_VAE, vae=VAEConfig(latent_channels=8, scaling_factor=0.88)),
        dataclasses.replace(
            WITH_VAE, vae=dataclasses.replace(small_vae(), norm_groups=8, sample_posterior=False)
        ),
    ],
)
def test_configurations_survive_writing_and_reading(cfg):
    metadata = as_metadata(flextok_config.write_config(cfg))
    again, problems = flextok_config.read_config(flextok_config.parse_metadata(metadata))
    assert problems == []
    shapes = ("block_out", "layers_per_block", "mid_attention", "quant_conv", "post_quant_conv")
    layout = {name: getattr(cfg.vae, name) for name in shapes}  # What only tensors tell.
    assert dataclasses.replace(again, vae=dataclasses.replace(again.vae, **layout)) == cfg
    standard = cfg.vae.kind != "identity" and cfg.vae.block_out == (128, 256, 512, 512)
    assert ("flextok_jax" in metadata["vae"]) is not standard
    through_json = json.loads(json.dumps(dataclasses.asdict(cfg)))
    assert flextok_config.config_from_dict(through_json) == cfg


def test_flat_configurations_of_older_workdirs_are_read():
    vae = dataclasses.asdict(small_vae()) | {"block_out": [32, 32]}
    old = {
        "vae": vae, "grid": [2, 4], "patch_size": 1, "num_tokens": 12, "levels": [8, 5, 5],
        "enc_width": 64, "enc_depth": 1, "dec_width": 96, "dec_depth": 3, "head_dim": 32,
        "mlp_ratio": 3.0, "max_timestep": 1.0, "time_frequencies": 64, "mode_scale": 0.5,
        "log_normal_time": True, "keep_mode": "uniform", "null_prob": 0.1, "guidance_scale": 2.0,
    }  # fmt: skip
    assert flextok_config.config_from_dict(old) == changed(
        TINY,
        vae=dataclasses.asdict(small_vae()),
        sites=dict(grid=(2, 4), patch_size=1),
        tokens=dict(count=12, keep="uniform"),
        encoder=dict(width=64, depth=1, head_dim=32, mlp_hidden=128),
        decoder=dict(width=96, depth=3, head_dim=32, mlp_hidden=192),
        target__flow=dict(
            max_timestep=1.0,
            null_prob=0.1,
            time_frequencies=64,
            mode_scale=0.5,
            log_normal_time=True,
            sampler=dict(guidance_scale=2.0),
        ),
    )


def test_the_golden_configuration_is_written_as_it_was_read(file):
    config = configuration(file[1])
    written = flextok_config.write_config(flextok_config.read_config(config)[0])
    for part in ("encoder", "decoder"):
        ratio = written[part]["module_dict"][f"{part[:3]}_transformer"].pop("mlp_ratio")
        assert ratio == 4.0  # The default, which that file leaves out.
    assert written == config


@pytest.mark.parametrize(
    "cfg",
    [
        TINY,
        changed(WITH_VAE, target__flow__sampler__guidance_scale=2.0),
        changed(TINY, target__flow__predicts="image"),
        student(TINY, steps=2, time_shift=0.5),
    ],
)
def test_a_new_model_saved_and_loaded_is_the_same_model(cfg, tmp_path):
    tok = tiny_tokenizer(cfg)
    tok.save_pretrained(tmp_path / "new" / "folder")
    again = FlexTok.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == cfg and again.fingerprint == tok.fingerprint
    assert_saved_again_bitwise(tmp_path / "new" / "folder", tmp_path / "again")
    with pytest.raises(ValueError, match="is a file"):
        tok.save_pretrained(tmp_path / "again" / "model.safetensors")


# VAEs in the layout of diffusers.


def test_a_vae_folder_loads_and_encodes_as_its_reference():
    cfg, params = vae_files.load_folder(GOLDEN / "vae")
    assert (cfg.scaling_factor, cfg.block_out, cfg.latent_channels) == (0.88, (32, 32, 64), 4)
    assert vae_files.load_folder(GOLDEN / "vae", scaling_factor=2.0)[0].scaling_factor == 2.0
    io = safetensors.numpy.load_file(GOLDEN / "vae" / "io.safetensors")
    encode = jax.jit(vae.encode_moments, static_argnums=1)
    mean, _ = encode(params, cfg, last(io["images"]))
    wanted = last(io["mean"])
    assert np.abs(mean - wanted).max() < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("layout", ["half", "parts"])
def test_a_vae_in_half_precision_or_in_several_files_is_the_same_vae(layout, tmp_path):
    cfg, params = vae_files.load_folder(GOLDEN / "vae")
    tensors, _ = contents(GOLDEN / "vae" / vae_files.WEIGHTS)
    shutil.copy(GOLDEN / "vae" / "config.json", tmp_path)
    if layout == "half":
        half = {name: x.astype(np.float16) for name, x in tensors.items()}
        safetensors.numpy.save_file(half, tmp_path / sources.VAE_HALF)
        params = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), params)
    else:
        parts = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
        for part in set(parts.values()):
            some = {name: x for name, x in tensors.items() if parts[name] == part}
            safetensors.numpy.save_file(some, tmp_path / part)
        (tmp_path / vae_files.INDEX).write_text(json.dumps({"weight_map": parts}))
    assert sources.kind_of(tmp_path) == "vae"
    found = models.load_vae(str(tmp_path))
    assert found[0] == cfg
    jax.tree.map(np.testing.assert_array_equal, found[1], params)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"shift_factor": 0.1, "_class_name": "VQModel"}, "VQModel.*shift_factor=0.1"),
        ({"scaling_factor": None}, "scaling_factor=None.*--scaling-factor"),
        ({"scaling_factor": -1.0}, "scaling_factor=-1.0"),
        ({"scaling_factor": math.nan}, "scaling_factor=nan"),
        ({"norm_num_groups": 24}, "24"),
    ],
)
def test_a_vae_that_is_not_implemented_is_refused(tmp_path, change, message):
    shutil.copytree(GOLDEN / "vae", tmp_path / "vae")
    about = json.loads((GOLDEN / "vae" / "config.json").read_text()) | change
    (tmp_path / "vae" / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message):
        vae_files.load_folder(tmp_path / "vae")


def test_an_incomplete_vae_folder_lists_what_is_wrong(tmp_path):
    shutil.copy(GOLDEN / "vae" / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match="diffusion_pytorch_model.safetensors"):
        models.load_vae(str(tmp_path))
    tensors, _ = contents(GOLDEN / "vae" / vae_files.WEIGHTS)
    gone, extra = "decoder.conv_out.bias", "decoder.conv_out.scale"
    tensors[extra] = tensors.pop(gone)
    safetensors.numpy.save_file(tensors, tmp_path / vae_files.WEIGHTS)
    with pytest.raises(ValueError, match=f"(?s)missing tensor {gone}.*unknown tensor {extra}"):
        models.load_vae(str(tmp_path))


# Damaged files.


@pytest.mark.parametrize("length", [0, 1000, 200_000])
def test_a_cut_file_is_named_as_such(tmp_path, length):
    whole = (GOLDEN / "tokenizer" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:length])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        models.load(tmp_path)


def test_a_type_that_numpy_lacks_is_refused_by_name(tmp_path):
    header = b'{"a":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[0,3]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abc")
    with pytest.raises(ValueError, match="float8"):
        storage.read(path)
