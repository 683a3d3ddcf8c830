"""The released FlexTok configuration as one template, for reading and for writing.

A `Field` stands for a field of our configuration, `Free` for a value without effect; every other
value is fixed mathematics that a file must agree with.
"""

import dataclasses
from typing import Any

MISSING = object()


@dataclasses.dataclass(frozen=True)
class Field:
    """A value of the file that is a field of our configuration.

    Attributes:
        name: of the field, as in `flextok_config.to_fields`; several places of a file may hold the
            same one and must agree.
        form: how the file writes it: "value", "pair" ([x, x]), "list", "one" ([x]).
        default: what an absent argument means; without one it must be there.
    """

    name: str
    form: str = "value"
    default: Any = MISSING

    def encode(self, value):
        """The field's value as the file writes it."""
        if self.form == "value":
            return value
        return list(value) if self.form == "list" else [value] * {"pair": 2, "one": 1}[self.form]

    def decode(self, value, kind: type):
        """The field's value. Sizes are positive integers; other fields are of type `kind`.

        Raises:
            ValueError: the file's value has another form.
        """
        if self.form == "value":
            if kind is float and type(value) in (int, float):
                return float(value)
            if kind is type(value) and (kind is not int or value > 0):
                return value
        elif isinstance(value, list | tuple) and all(type(x) is int and x > 0 for x in value):
            if self.form == "list":
                return tuple(value)
            if len(set(value)) == 1 and len(value) == {"pair": 2, "one": 1}[self.form]:
                return value[0]
        raise ValueError


@dataclasses.dataclass(frozen=True)
class Free:
    """A value that is written as it stands and read whatever it is."""

    value: Any


# The fields that several modules hold: widths, channels, sizes.
_ENC, _DEC, _C = Field("encoder.width"), Field("decoder.width"), Field("vae.latent_channels")
_GRID, _PATCH = Field("sites.grid", "list"), Field("sites.patch_size", "pair")
COUNT = "levels"  # Of the quantiser: how many.
_R, _F, _MODEL = Field("tokens.count"), Field(COUNT), "model."


def _module(target: str, **arguments):
    return {"_target_": "flextok." + target, **arguments}


def _channels(order: str, read: str, write: str):
    ops = _MODEL + "utils.dict_ops."
    operation = _module(f"{ops}channels_{order}", _partial_=True)
    return _module(ops + "PerSampleOp", read_key=read, write_key=write, per_sample_op=operation)


def _patches(read: str, write: str, count: str, width: Field):
    return _module(
        _MODEL + "preprocessors.patching.PatchEmbedder", input_tensor_list_read_key=read,
        patches_list_write_key=write, n_patches_write_key=count, channels_in=_C, dim=width,
        patch_sizes=_PATCH, flatten_patches=False,
    )  # fmt: skip


def _positions(read: str, write: str, width: Field, sizes: Field, kind: str):
    return _module(
        _MODEL + "utils.posembs.PositionalEmbeddingAdder", read_key=read, write_key=write,
        dim=width, max_sizes=sizes, posemb_type=kind, posemb_scaling="absolute",
    )  # fmt: skip


def _packer(prefix: str, inputs: list[str], mode: str, **more):
    return _module(
        _MODEL + "preprocessors.flex_seq_packing.BlockWiseSequencePacker",
        input_list_read_keys=inputs, packed_seq_write_key=f"{prefix}_packed_seq",
        block_mask_write_key=f"{prefix}_block_mask", mask_mode=mode, pad_to_multiple=128,
        inner_packed_shapes_write_key=f"{prefix}_ps_inner",
        outer_packed_shapes_write_key=f"{prefix}_ps_outer", **more,
    )  # fmt: skip


def _unpacker(prefix: str, sequence: str, outputs: list[str]):
    return _module(
        _MODEL + "postprocessors.seq_unpacking.SequenceUnpacker", packed_seq_read_key=sequence,
        inner_seq_write_keys=outputs, inner_packed_shapes_read_key=f"{prefix}_ps_inner",
        outer_packed_shapes_read_key=f"{prefix}_ps_outer",
    )  # fmt: skip


def _transformer(prefix: str, part: str, **more):
    return _module(
        _MODEL + "trunks.transformers.FlexTransformer", input_seq_read_key=f"{prefix}_packed_seq",
        output_seq_write_key=f"{prefix}_packed_seq", dim=Field(f"{part}.width"),
        depth=Field(f"{part}.depth"), head_dim=Field(f"{part}.head_dim", default=64),
        mlp_ratio=Field(f"{part}.mlp_ratio", default=4.0), qk_norm=True, gated_mlp=True,
        block_mask_read_key=f"{prefix}_block_mask", **more,
    )  # fmt: skip


def _sequence(modules: dict):
    return _module(_MODEL + "utils.wrappers.SequentialModuleDictWrapper", module_dict=modules)


ENCODER = {
    "enc_channels_to_last": _channels("first_to_last", "vae_latents", "vae_latents_bhwc"),
    "enc_patch_emb": _patches("vae_latents_bhwc", "enc_vae_latents_patched", "enc_n_patches", _ENC),
    "enc_posemb_module": _positions(
        "enc_vae_latents_patched", "enc_vae_latents_patched", _ENC, _GRID, "sincos"
    ),
    "enc_register_module": _module(
        _MODEL + "preprocessors.registers.Registers1D", dim=_ENC, n_min=_R, n_max=_R,
        input_tensor_list_read_key="enc_vae_latents_patched", ordering_mode="nested",
        register_sizes_read_write_key="register_sizes", registers_write_key="enc_registers",
        size_sampling_mode=Free("uniform"),  # n_min = n_max: there is nothing to sample
    ),
    "enc_seq_packer": _packer("enc", ["enc_vae_latents_patched", "enc_registers"], "causal_last"),
    "enc_transformer": _transformer("enc", "encoder"),
    "enc_unpacker": _unpacker(
        "enc", "enc_packed_seq", ["enc_vae_latents_patched", "enc_registers"]
    ),
    "enc_to_latents": _module(
        _MODEL + "postprocessors.heads.LinearHead", read_key="enc_registers",
        write_key="enc_registers", dim=_ENC, dim_out=_F, use_mup_readout=False,
        weight_init_style="zero", dtype_override=None,
    ),
}  # fmt: skip

DECODER = {
    "dec_from_latents": _module(
        _MODEL + "preprocessors.linear.LinearLayer", read_key="enc_registers_quant",
        write_key="dec_registers_proj", dim_in=_F, dim=_DEC,
    ),
    "dec_registers_posemb_module": _positions(
        "dec_registers_proj", "dec_registers_proj", _DEC, Field("tokens.count", "one"),
        "learnable_sum",
    ),
    "dec_nested_dropout": _module(
        _MODEL + "preprocessors.token_dropout.MaskedNestedDropout", dim=_DEC,
        read_write_key="dec_registers_proj", eval_keep_k_read_key="eval_keep_k",
        train_keep_k_write_key="train_keep_k", size_sampling_mode=Field("tokens.keep"),
    ),
    "dec_latent_dropout": _module(
        _MODEL + "preprocessors.nullcond.LearnedNullCond", read_write_key="dec_registers_proj",
        dim=_DEC, dropout_prob=Field("target.flow.null_prob"),
    ),
    "dec_noise_channels_to_last": _channels(
        "first_to_last", "vae_latents_noised", "vae_latents_noised_bhwc"
    ),
    "dec_noise_patch_emb": _patches(
        "vae_latents_noised_bhwc", "vae_latents_noised_patched", "dec_n_patches", _DEC
    ),
    "dec_patches_posemb_module": _positions(
        "vae_latents_noised_patched", "dec_patches", _DEC, _GRID, "sincos"
    ),
    "dec_seq_packer": _packer(
        "dec", ["dec_patches", "dec_registers_proj"], "full",
        emb_packing_fn_write_key="emb_packing_fn", per_subseq_embs=True,
    ),
    "dec_time_embedder": _module(
        _MODEL + "preprocessors.time_embedding.TimestepEmbedder", dim=_DEC,
        timesteps_read_key="timesteps", time_embedding_write_key="dec_temb",
        frequency_embedding_size=Field("target.flow.time_frequencies", default=256),
        max_timestep=Field("target.flow.max_timestep"),
    ),
    "dec_transformer": _transformer(
        "dec", "decoder", adaLN_emb_read_key="dec_temb", adaLN_expansion=2,
        adaLN_packing_fn_read_key="emb_packing_fn", intermediate_layers=[1],
        intermediate_layer_write_key="dec_packed_seq_repa_layer",
    ),
    "dec_unpacker": _unpacker("dec", "dec_packed_seq", ["dec_patches", "dec_registers_proj"]),
    "dec_repa_unpacker": _unpacker(
        "dec", "dec_packed_seq_repa_layer", ["dec_patches_repa_layer", "dec_registers_repa_layer"]
    ),
    "dec_to_patches": _module(
        _MODEL + "postprocessors.heads.ToPatchesLinearHead", read_key="dec_patches",
        write_key="dec_patches", dim=_DEC, channels_out=_C, patch_sizes=_PATCH,
        use_mup_readout=False, adaLN_emb_read_key="dec_temb",
    ),
    "dec_channels_to_first": _channels("last_to_first", "dec_patches", "vae_latents_reconst"),
}  # fmt: skip

VAE = {
    "images_read_key": "rgb", "vae_latents_read_key": "vae_latents_reconst",
    "vae_latents_write_key": "vae_latents", "images_reconst_write_key": "rgb_reconst",
    "vae_kl_loss_write_key": "kl_loss", "latent_channels": _C,
    "scaling_factor": Field("vae.scaling_factor"), "dtype_override": "fp32",
    "sample_posterior": Field("vae.sample_posterior", default=True), "frozen": True,
}  # fmt: skip
RELEASED_VAE = "flextok.vae_wrapper.StableDiffusionVAE"
# Ours only: the reference does not read these.
OWN_VAE = "flextok_jax.AutoencoderKL"
IDENTITY_VAE = "flextok_jax.IdentityVAE"
VAES = {
    RELEASED_VAE: VAE,
    OWN_VAE: VAE | {"norm_groups": Field("vae.norm_groups")},
    IDENTITY_VAE: {"latent_channels": _C},
}

TEMPLATE = {
    "_target_": "flextok.flextok_wrapper.FlexTok",
    "encoder": _sequence(ENCODER),
    "decoder": _sequence(DECODER),
    "regularizer": _module(
        "regularizers.quantize_fsq.FSQ", latents_read_key="enc_registers",
        quants_write_key="enc_registers_quant", tokens_write_key="tokens",
        levels=Field("bottleneck.levels", "list"),
    ),
    "flow_matching_noise_module": _module(
        "flow_matching.noise_modules.MinRFNoiseModule", clean_images_read_key="vae_latents",
        noised_images_write_key="vae_latents_noised", timesteps_write_key="timesteps",
        sigmas_write_key="sigmas", ln=Field("target.flow.log_normal_time", default=False),
        mode_scale=Field("target.flow.mode_scale", default=0.25),
    ),
    "pipeline": _module(
        "flow_matching.pipelines.MinRFPipeline", _partial_=True, noise_read_key=None,
        target_sizes_read_key=None, latents_read_key="enc_registers_quant",
        timesteps_read_key="timesteps", noised_images_read_key="vae_latents_noised",
        reconst_write_key="vae_latents_reconst", out_channels=_C,
    ),
}  # fmt: skip
OWN_KEY = "flextok_jax"  # Our own top-level entry, written only where a default of ours differs.
_SAMPLER = "target.flow.sampler."
OWN = {
    "guidance_scale": Field(_SAMPLER + "guidance_scale"),
    "steps": Field(_SAMPLER + "steps", default=20),
    "norm_guidance": Field(_SAMPLER + "norm_guidance", default=True),
    "solver": Field(_SAMPLER + "solver", default="euler"),
}
