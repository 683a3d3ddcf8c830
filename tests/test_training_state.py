"""One training step: optimizer, averaging, accumulation, freezing, and steps that are skipped.

The stage of these tests is a small denoising autoencoder on the digits.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from clu import metrics
from flax.traverse_util import flatten_dict

from examples.digits import folder
from flextok_jax.nn.vae_config import VAEConfig
from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.parallel.rng import named
from flextok_jax.training import optimizer
from flextok_jax.training.stage import Stage
from flextok_jax.training.state import build


class Coder(nn.Module):
    """An MLP with the parameter names that the sharding rules know."""

    first: str
    hidden: int
    out: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.hidden, name=self.first)(x)
        x = nn.relu(x + self.param("sincos", nn.initializers.ones, (1, self.hidden)))
        return nn.Dense(self.out, name="head")(x)


class ToyStage(Stage):
    """See training/stage.py."""

    model = VAEConfig()  # In name only.

    def __init__(self, config):
        self.noise = config.noise
        self.encoder = Coder("patch_emb", 12, 4)
        self.decoder = Coder("register_proj", 12, 768)
        self.traces = 0

    def init(self, key):
        encoder = self.encoder.init(named(key, "encoder"), jnp.zeros((1, 768)))
        decoder = self.decoder.init(named(key, "decoder"), jnp.zeros((1, 4)))
        return {"encoder": encoder["params"], "decoder": decoder["params"]}

    def init_from(self, source):
        params = host(jax.jit(self.init)(jax.random.key(int(source))))
        return {"encoder": params["encoder"]} if source == "13" else params

    def load_frozen(self):
        return {"vae": {"scale": np.float32(1.0)}}

    def loss(self, params, frozen, batch, key, step):
        self.traces += 1
        x = batch["image"].reshape(-1, 768) / 127.5 - 1
        x = x * frozen["vae"]["scale"]
        noisy = x + self.noise * jax.random.normal(named(key, "noise"), x.shape)
        codes = self.encoder.apply({"params": params["encoder"]}, noisy)
        error = ((self.decoder.apply({"params": params["decoder"]}, codes) - x) ** 2).mean(-1)
        logged = {"by_half": metrics.Average.from_model_output(error), "codes": PerCode.of(codes)}
        return error.mean(), logged

    def trainable(self, path):
        return not path.endswith("sincos")

    def measure(self, ema, frozen, mesh):
        return {"bias": float(ema["encoder"]["head"]["bias"][0])}

    def evaluators(self):
        def size(ema, frozen, mesh):
            yield "norm", float(optax.tree.norm(ema))

        return {"size": size}

    def export_config(self):
        return {"kind": "toy", "config": dataclasses.asdict(self.model)}


@jax.tree_util.register_dataclass
class PerCode(metrics.Average):
    """A metric of several values, one of them a vector."""

    @classmethod
    def of(cls, codes):
        return cls(total=jnp.abs(codes).sum(0), count=jnp.int32(codes.shape[0]))

    def compute(self):
        return {"mean": super().compute(), "count": self.count}


def get_config(**changes):
    """A small run; changes by dotted keys with __ for the dot."""
    config = ml_collections.ConfigDict(
        {
            "stage": "toy",
            "noise": 0.1,
            "seed": 3,
            "total_steps": 6,
            "batch_size": 8,
            "log_every": 1,
            "eval_every": 0,
            "ema_decay": 0.9,
            "init_from": "",
            "freeze": (),
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
            "checkpoint": {"every": 3, "keep": 3},
            "max_skipped_in_row": 20,
            "profile": "",
            "wandb": {"project": ""},
            "compute": {"dtype": "float32"},
            "evaluation": {"num_images": 8, "batch_size": 8},
            "data": {
                "source": "folder", "path": folder(), "name": "",
                "split": "train", "eval_split": "test",
                "image_size": 16, "crop": "none", "crop_scale": (0.5, 1.0), "flip": False,
                "quarter_turns": False, "shift": 1.0, "rotate": 0.0, "zoom": 0.0, "color": 0.0,
                "max_unreadable": 0.1, "paired": False,
            },
            "optim": {
                "lr": 1e-2, "warmup_steps": 2, "final_lr_fraction": 0.1, "b1": 0.9, "b2": 0.99,
                "eps": 1e-8, "weight_decay": 0.1, "grad_clip": 1.0, "accumulate": 1,
                "mup_base_width": None,
            },
        }
    )  # fmt: skip
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def get_batch(size=8, seed=0):
    random = np.random.RandomState(seed)
    return {
        "image": random.randint(0, 256, (size, 16, 16, 3)).astype(np.uint8),
        "label": random.randint(0, 10, size).astype(np.int32),
    }


def start(**changes):
    """(program, state, frozen) of a small run."""
    program = _program(tuple(changes.items()))
    return program, program.init(), ToyStage(get_config()).load_frozen()


@functools.cache
def _program(changes):
    config = get_config(**dict(changes))
    return build(ToyStage(config), config, make_mesh(devices=jax.devices()[:1]))


def host(tree):
    """A copy in numpy, which outlives donation."""
    return jax.tree.map(lambda x: np.array(x), tree)


def equal(a, b):
    """Bitwise, leaf by leaf."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def close(a, b, rtol=1e-5):
    """Leaf by leaf, to `rtol` of the largest number in the tree."""
    scale = max(np.abs(y).max() for y in jax.tree.leaves(b))
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * scale, err_msg=str(path))


def test_learning_rate_rises_linearly_and_falls_by_a_cosine():
    config = get_config(total_steps=110, optim__lr=2.0, optim__warmup_steps=10)
    rate = [float(x) for x in jax.vmap(optimizer.lr_schedule(config))(jnp.arange(130))]
    np.testing.assert_allclose(rate[:10], 0.2 * np.arange(1, 11), rtol=1e-6)
    np.testing.assert_allclose(rate[60], 2.0 * (0.1 + 0.9 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(rate[110:], 0.2, rtol=1e-6)


def test_only_kernels_decay():
    mask = optimizer.decayed(start()[0].shapes.params)
    assert mask["encoder"] == {
        "patch_emb": {"kernel": True, "bias": False},
        "sincos": False,
        "head": {"kernel": True, "bias": False},
    }
    # With zero gradients the update is the decay alone.
    tx = optimizer.make_optimizer(get_config(optim__warmup_steps=0, optim__lr=0.5))
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "null": jnp.ones((1, 2))}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.5 * 0.1, rtol=1e-6)
    assert not updates["bias"].any() and not updates["null"].any()


def test_mup_divides_the_rate_of_wide_kernels_by_their_fan_in():
    shapes = {"wide": (3, 64, 8), "base": (16, 64), "narrow": (6, 64), "embedding": (64, 64)}
    params = {k: {"kernel": jnp.zeros(s)} for k, s in shapes.items() if k != "embedding"}
    params["embedding"] = jnp.zeros(shapes["embedding"])
    ones = jax.tree.map(jnp.ones_like, params)
    tx = optimizer.scale_by_mup(16)
    updates, _ = tx.update(ones, tx.init(params), params)
    got = {k: float(jax.tree.leaves(u)[0].flatten()[0]) for k, u in updates.items()}
    assert got == {"wide": 0.25, "base": 1.0, "narrow": 1.0, "embedding": 1.0}


def test_the_update_is_that_of_optax_adamw():
    config = get_config(optim__warmup_steps=0, optim__weight_decay=0.3, optim__grad_clip=None)
    params = {"kernel": jnp.arange(6.0).reshape(2, 3) - 2, "bias": jnp.ones(3)}
    grads = {"kernel": jnp.linspace(-1, 3, 6).reshape(2, 3), "bias": jnp.array([0.5, -2, 1])}
    ours, adamw = optimizer.make_optimizer(config), optax.adamw(
        optimizer.lr_schedule(config), 0.9, 0.99, 1e-8, weight_decay=0.3, mask=optimizer.decayed
    )  # fmt: skip
    states = ours.init(params), adamw.init(params)
    for _ in range(2):
        updates, states = zip(
            *(tx.update(grads, state, params) for tx, state in zip((ours, adamw), states))
        )
        close(*updates)


def test_muon_orthogonalises_the_gradients_of_convolutions_attention_and_mlps_only():
    rng = np.random.default_rng(0)
    shapes = {
        "conv": {"kernel": (3, 3, 2, 8), "bias": (8,)},
        "dense": {"kernel": (6, 8)},
        "decoder": {
            "blocks": {
                "attn": {"wq": {"kernel": (2, 8, 8)}},
                "mlp": {"fc1": {"kernel": (2, 8, 12)}},
                "adaln": {"kernel": (2, 8, 16), "bias": (2, 16)},
            }
        },
    }
    grads = jax.tree.map(
        lambda x: jnp.float32(rng.standard_normal(x)), shapes, is_leaf=lambda x: type(x) is tuple
    )
    options = dict(optim__warmup_steps=0, optim__weight_decay=0.0, optim__grad_clip=None)

    def update(rule, **values):
        config = get_config(**options)
        config.optim.update(rule=rule, **values)
        tx = optimizer.make_optimizer(config)
        return tx.update(grads, tx.init(grads), jax.tree.map(jnp.zeros_like, grads))[0]

    muon, adam = flatten_dict(update("muon"), sep="/"), flatten_dict(update("adam"), sep="/")
    matrices = {
        "conv/kernel": (1, 18, 8),
        "decoder/blocks/attn/wq/kernel": (2, 8, 8),
        "decoder/blocks/mlp/fc1/kernel": (2, 8, 12),
    }
    for path, x in muon.items():
        if path not in matrices:
            np.testing.assert_array_equal(x, adam[path])
            continue
        for update_, grad in zip(
            *(np.reshape(y, matrices[path]) for y in (x, flatten_dict(grads, sep="/")[path]))
        ):
            # Newton-Schulz steps: the singular values are nearly equal.
            assert np.linalg.cond(update_) < 2 < np.linalg.cond(grad)
    with pytest.raises(ValueError, match="mup_base_width is for optim.rule='adam'"):
        update("muon", mup_base_width=8)
    with pytest.raises(ValueError, match="optim.rule='sgd'.*'adam' and 'muon'"):
        update("sgd")
    options["optim__mu_dtype"] = "half"
    with pytest.raises(ValueError, match="optim.mu_dtype='half'.*'bfloat16'"):
        update("adam")


def test_accumulation_equals_the_large_batch():
    gradients, logs = [], []
    for parts in (1, 4):
        program, state, frozen = start(
            noise=0.0, optim__accumulate=parts, optim__grad_clip=None, optim__b1=0.0
        )
        state, logged = program.step(state, frozen, get_batch())
        gradients.append(host(optax.tree.get(state.opt_state, "mu")))  # b1 = 0: the gradient.
        logs.append({name: host(metric.compute()) for name, metric in logged.items()})
    close(*gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), *logs)


def test_microbatches_have_their_own_noise():
    losses = []
    for parts in (1, 2):
        program, state, frozen = start(noise=0.5, optim__accumulate=parts)
        image = np.repeat(get_batch(1)["image"], 8, 0)
        _, logged = program.step(state, frozen, {"image": image, "label": np.zeros(8, np.int32)})
        losses.append(float(logged["loss"].compute()))
    assert abs(losses[0] - losses[1]) > 1e-6


def test_clipping_bounds_the_gradient_and_logs_it_unclipped():
    tx = optimizer.make_optimizer(get_config(optim__grad_clip=0.5))
    params = {"kernel": jnp.zeros((1, 1))}
    _, state = tx.update({"kernel": jnp.full((1, 1), 7.0)}, tx.init(params), params)
    mu = optax.tree.get(state, "mu")["kernel"]
    np.testing.assert_allclose(mu, 0.1 * 0.5, rtol=1e-5)
    program, state, frozen = start(optim__grad_clip=1e-6)
    _, logged = program.step(state, frozen, get_batch())
    assert logged["grad_norm"].compute() > 1e-3


def test_ema_follows_its_closed_form():
    program, state, frozen = start()
    history = [host(state.params)]
    for i in range(4):
        state, _ = program.step(state, frozen, get_batch(seed=i))
        history.append(host(state.params))
    decays = [min(0.9, (1 + n) / (10 + n)) for n in range(4)]
    weights = [np.prod(decays)] + [(1 - d) * np.prod(decays[i + 1 :]) for i, d in enumerate(decays)]
    expected = jax.tree.map(lambda *xs: sum(w * x for w, x in zip(weights, xs)), *history)
    for got, want in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_non_finite_gradient_changes_nothing_and_is_counted(accumulate):
    program, state, frozen = start(optim__accumulate=accumulate)
    state, _ = program.step(state, frozen, get_batch())
    before = host(state)
    state, logged = program.step(state, {"vae": {"scale": np.float32("nan")}}, get_batch())
    after = host(state)
    assert (after.step, after.skipped) == (2, 1)
    assert (logged["skipped"].compute(), logged["skipped_in_row"].compute()) == (1, 1)
    assert logged["loss"].count == 0  # Averages do not count it.
    assert equal(before.params, after.params) and equal(before.ema, after.ema)
    assert equal(before.opt_state.inner_state, after.opt_state.inner_state)
    # The next good step is the one that would have followed, rate included.
    state, logged = program.step(state, frozen, get_batch(seed=1))
    assert not equal(after.params, state.params) and int(state.skipped) == 1
    rate = optimizer.lr_schedule(get_config())
    np.testing.assert_allclose(logged["lr"].compute(), rate(1), rtol=1e-6)


def test_frozen_leaves_stay_bitwise_and_have_no_slots():
    program, state, frozen = start(freeze=("encoder/.*",), optim__weight_decay=1.0)
    before = host(state)
    for i in range(2):
        state, _ = program.step(state, frozen, get_batch(seed=i))
    assert equal(state.params["encoder"], before.params["encoder"])
    assert equal(state.ema["encoder"], before.params["encoder"])
    assert equal(state.params["decoder"]["sincos"], before.params["decoder"]["sincos"])
    assert not equal(state.params["decoder"]["head"], before.params["decoder"]["head"])
    mu = optax.tree.get(state.opt_state, "mu")
    assert set(mu) == {"decoder"} and set(mu["decoder"]) == {"register_proj", "head"}


@pytest.mark.parametrize(
    "freeze, message",
    [
        (("encoder",), "match no parameter"),
        ((".*",), "no parameter to train"),
        (("[",), "regular expression"),
    ],
)
def test_a_freeze_that_cannot_be_meant_is_refused(freeze, message):
    with pytest.raises(ValueError, match=message):
        start(freeze=freeze)


def test_init_from_names_every_leaf_that_does_not_fit():
    program, state, _ = start()
    params = host(state.params)
    params["encoder"]["extra"] = np.zeros(3)
    params["encoder"]["head"]["bias"] = np.zeros(5)
    del params["decoder"]["sincos"]
    with pytest.raises(ValueError) as error:
        program.init_from(params)
    for part in ("decoder/sincos", "encoder/extra", "encoder/head/bias: [5] given, [4] needed"):
        assert part in str(error.value)


def test_init_from_leaves_the_given_arrays_alone_and_makes_them_float32():
    program, state, frozen = start()
    given = jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.params)
    other = jax.tree.map(jnp.copy, state.params)
    for params in (given, other):
        before = host(params)
        started = program.init_from(params)
        assert {x.dtype for x in jax.tree.leaves(started.params)} == {jnp.dtype("float32")}
        program.step(started, frozen, get_batch())
        assert equal(host(params), before)


def test_first_moment_may_be_bfloat16():
    program, state, frozen = start()
    config = get_config()
    config.optim.mu_dtype = "bfloat16"
    program = build(ToyStage(config), config, make_mesh(devices=jax.devices()[:1]))
    slots = optax.tree.get(program.shapes.opt_state, "mu")
    assert {x.dtype for x in jax.tree.leaves(slots)} == {jnp.dtype("bfloat16")}
    second = optax.tree.get(program.shapes.opt_state, "nu")
    assert {x.dtype for x in jax.tree.leaves(second)} == {jnp.dtype("float32")}
    state, _ = program.step(program.init(), frozen, get_batch())
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
