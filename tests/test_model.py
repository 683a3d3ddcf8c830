"""The model: running it another way changes nothing; closed forms of its parts."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    TINY,
    changed,
    golden_io,
    golden_tokenizer,
    last,
    new_params,
    random_params,
    relative,
)

from flextok_jax.flow import path, sampler
from flextok_jax.flow.sampler import Sampler
from flextok_jax.nn import flextok, fsq, layers
from flextok_jax.nn.config import Blocks, Compute, from_dict
from flextok_jax.nn.decoder import Condition, unconditional
from flextok_jax.nn.tokenizer_config import Bottleneck, TokenizerConfig, Tokens


def outputs(compute, key=3):
    """Registers and velocities, and the gradient of a loss through both."""
    params = random_params(TINY)
    x0 = jax.random.normal(jax.random.key(key), (2, 8, 8, 3))
    keep, null = jnp.array([3, 16]), jnp.array([False, True])

    def loss(params):
        registers = flextok.encode(params, TINY, compute, x0)
        codes = flextok.quantize(params, TINY, registers).codes
        (v,) = flextok.velocities(
            params, TINY, compute, x0, jnp.array([0.2, 0.7]), (Condition(codes, keep, null),)
        )
        return path.flow_loss(v, x0).sum(), (registers, v)

    gradient, values = jax.jit(jax.grad(loss, has_aux=True))(params)
    return jax.tree.leaves((values, gradient))


@pytest.mark.parametrize(
    "compute",
    [
        Compute(scan=False, remat="dots"),
        pytest.param(Compute(scan=False), marks=pytest.mark.slow),
        pytest.param(Compute(remat="full"), marks=pytest.mark.slow),
    ],
)
def test_unrolling_and_remat_change_nothing(compute):
    for a, b in zip(outputs(compute), outputs(Compute()), strict=True):
        assert np.abs(a - b).max() <= 2e-5 * max(np.abs(b).max(), 1e-3)


@pytest.mark.slow
def test_bfloat16_velocity_is_within_2_percent_and_few_tokens_change():
    tok, io = golden_tokenizer(), golden_io()
    condition = Condition(
        jnp.asarray(io["quants"]), jnp.asarray(io["keep_k"], jnp.int32), jnp.zeros(4, bool)
    )

    def velocity(dtype):
        (v,) = flextok.velocities(
            tok.params, tok.config, Compute(dtype), last(io["x_t"]), io["t"], (condition,)
        )
        return np.asarray(v)

    exact, rounded = velocity("float32"), velocity("bfloat16")
    assert np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 2e-2
    half = dataclasses.replace(tok, compute=Compute("bfloat16"))
    changed = np.mean(np.asarray(half.tokenize(last(io["images"]))) != io["tokens"])
    print(f"{changed:.1%} of the tokens change in bfloat16")
    assert changed < 0.25


def test_straight_through_gradient_is_that_of_the_bounded_value():
    levels, z = (8, 5), jnp.array([[0.3, -0.2], [1.5, 2.0]])
    half = (np.array(levels) - 1) * 1.001 / 2
    shift = np.arctanh(np.array([0.5, 0.0]) / half)
    gradient = jax.grad(lambda z: fsq.quantize(z, levels).sum())(z)
    expected = (1 - np.tanh(np.asarray(z) + shift) ** 2) * half / (np.array(levels) // 2)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_every_id_survives_the_round_trip_through_codes():
    levels = (8, 5, 5)
    ids = jnp.arange(200)
    codes = fsq.indices_to_codes(ids, levels)
    assert np.abs(codes).max() <= 1
    np.testing.assert_array_equal(fsq.codes_to_indices(codes, levels), ids)


def test_patches_are_ordered_row_column_channel():
    x = jnp.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = layers.patchify(x, 2)
    np.testing.assert_array_equal(patches[1, 4], np.asarray(x)[1, 2:4, 2:4].reshape(-1))
    np.testing.assert_array_equal(layers.unpatchify(patches, 2, 4, 6), x)


@pytest.mark.parametrize(
    "mode, allowed",
    [
        ("pow2", {1, 2, 4, 8, 16}),
        ("uniform", set(range(1, 17))),
        ("uniform_pow2", {1, 2, 4, 8, 16}),
        ("fixed", {16}),
    ],
)
def test_nested_dropout_samples_what_its_mode_says(mode, allowed):
    keep = np.asarray(path.kept((jnp.arange(4000) + 0.5) / 4000, 16, mode))
    assert np.all(np.diff(keep) >= 0)
    assert set(keep.tolist()) == allowed
    share = (keep == 16).mean()
    expected = {"pow2": 1 / 5, "uniform": 1 / 16, "uniform_pow2": 8 / 16, "fixed": 1.0}[mode]
    assert abs(share - expected) < 1e-3


def test_uniform_pow2_clamps_to_a_count_that_is_no_power_of_two():
    keep = path.kept(jnp.arange(1000) / 1000, 12, "uniform_pow2")
    assert set(np.asarray(keep).tolist()) == {1, 2, 4, 8, 12}


def test_logit_normal_times_have_the_median_of_the_logistic_of_zero():
    t = np.asarray(path.logit_normal_time(jax.random.key(1), 4096))
    assert abs(np.median(t) - 0.5) < 0.03
    assert abs((t < jax.nn.sigmoid(1.0)).mean() - 0.8413) < 0.03


def test_shifted_times_divide_the_ratio_of_signal_to_noise_by_the_shift():
    t = jnp.linspace(0.05, 0.95, 19)
    shifted = path.shift_time(t, 3.5)
    np.testing.assert_allclose((1 - shifted) / shifted, (1 - t) / t / 3.5, rtol=2e-5)
    np.testing.assert_array_equal(path.shift_time(t, 1.0), t)


def integrated(velocities, noise, how):
    """The end of a flow whose velocities are (x, t) -> (v_cond, ...)."""
    state, steps = sampler.start(noise), how.schedule()

    def both(x, t, length, guided):
        return velocities(x, t)[: 2 if guided else 1]

    return sampler.integrate(both, state, steps, 0, how.steps, how.method)


@pytest.mark.parametrize("solver", sampler.SOLVERS)
def test_solvers_are_exact_for_a_constant_velocity(solver):
    noise = jax.random.normal(jax.random.key(0), (2, 4, 4, 1))
    how = Sampler(7, 1.0, solver=solver)
    found = integrated(lambda x, t: (jnp.ones_like(x),), noise, how)
    np.testing.assert_allclose(found.x, noise - 1, atol=1e-5)


@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize("solver, order", [("euler", 1), ("midpoint", 2), ("multistep", 2)])
def test_the_error_of_a_solver_falls_with_its_order(solver, order, shift):
    """dx/dt = x from t = 1 to 0 takes 1 to 1/e."""
    x, errors = jnp.ones((1, 1, 1, 1)), []
    for steps in (16, 32):
        how = Sampler(steps, 1.0, solver=solver, time_shift=shift)
        end = integrated(lambda x, t: (x,), x, how).x
        errors.append(abs(float(end[0, 0, 0, 0]) - np.exp(-1)))
    assert 0.8 * 2**order < errors[0] / errors[1] < 1.25 * 2**order


def test_multistep_is_exact_for_a_velocity_linear_in_time_but_for_its_first_step():
    """dx/dt = 3 + 4 t takes x to x - 5 from t = 1 to 0."""
    how = Sampler(5, 1.0, solver="multistep", time_shift=1.5)
    x, first = jnp.zeros((1, 1, 1, 1)), float(how.schedule().lengths[0])
    end = integrated(lambda x, t: (jnp.full_like(x, 3 + 4 * t[0]),), x, how).x
    np.testing.assert_allclose(end, -5 - 2 * first**2, rtol=1e-5)


@pytest.mark.parametrize("normalized", [False, True])
def test_outside_its_interval_guidance_is_off_and_costs_nothing(normalized):
    """Five of the ten steps begin between 0.25 and 0.75: they alone run a null pass."""
    passes = []

    def velocities(x, t, length, guided):
        jax.debug.callback(lambda _, n=1 + guided: passes.append(n), t)
        return (x, 3 * x - t[0])[: 1 + guided]

    def end(interval, scale):
        how = Sampler(10, scale, normalized, guidance_interval=interval)
        x = jax.random.normal(jax.random.key(0), (2, 2, 2, 1))
        state, steps = sampler.start(x), how.schedule()
        found = sampler.integrate(velocities, state, steps, 0, 10, how.method).x
        jax.effects_barrier()
        return found

    within = end((0.25, 0.75), 4.0)
    assert sorted(passes) == [1] * 5 + [2] * 5
    if not normalized:  # The momentum of APG rests outside.
        same = end((0.0, 1.0), lambda t: 4.0 if 0.25 < t < 0.75 else 1.0)
        np.testing.assert_allclose(within, same, rtol=1e-5)
    np.testing.assert_allclose(end((0.0, 0.05), 4.0), end((0.0, 1.0), 1.0), rtol=1e-6)


def test_a_schedule_calls_guidance_by_time():
    schedule = Sampler(4, lambda t: 2 * t).schedule()
    np.testing.assert_allclose(schedule.scales[:4], [2, 1.5, 1, 0.5])
    np.testing.assert_allclose(schedule.times[:4], [1, 0.75, 0.5, 0.25])
    for wrong in (
        dict(steps=0),
        dict(steps=True),
        dict(solver="rk9"),
        dict(guidance_scale="x"),
        dict(guidance_scale=-2),
        dict(time_shift=0.0),
        dict(guidance_interval=(0.5, 0.2)),
    ):
        with pytest.raises(ValueError, match=re.escape(str(next(iter(wrong.values()))))):
            Sampler(**wrong)
    for wrong in (float("nan"), -1.0):
        with pytest.raises(ValueError, match="finite, from 0 on"):
            Sampler(2, lambda t: wrong).schedule()


def apg_in_float64(v_cond, v_null, scale, momentum):
    """Sadat et al. (arXiv 2410.02416), one image at a time, in float64."""
    out, carried = np.empty_like(v_cond), np.empty_like(v_cond)
    for i, (c, n, m) in enumerate(zip(v_cond, v_null, momentum)):
        m = (c - n) - 0.5 * m
        u = m * min(1.0, 2.5 / np.sqrt((m**2).sum()))
        unit = c / np.sqrt((c**2).sum())
        out[i] = c + (scale - 1) * (u - (u * unit).sum() * unit)
        carried[i] = m
    return out, carried


def test_adaptive_projected_guidance_equals_the_float64_oracle():
    rng = np.random.default_rng(0)
    exact = np.zeros((3, 4, 4, 2))
    ours = jnp.zeros((3, 4, 4, 2))
    for _ in range(4):
        c, n = rng.standard_normal((2, 3, 4, 4, 2)) * np.array([0.1, 1, 3]).reshape(3, 1, 1, 1)
        wanted, exact = apg_in_float64(c, n, 5.0, exact)
        v, ours = sampler.adaptive_projected(
            jnp.asarray(c, jnp.float32), jnp.asarray(n, jnp.float32), 5.0, ours
        )
        assert relative(v, wanted) < 1e-5 and relative(ours, exact) < 1e-5


def test_a_settled_momentum_stays_and_many_steps_approach_it():
    c, n = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 2))
    momentum = jnp.zeros_like(c)
    for _ in range(20):
        _, momentum = sampler.adaptive_projected(c, n, 5.0, momentum)
    assert relative(sampler.settled_momentum(c, n), momentum) < 1e-5


def test_sincos_table_follows_its_closed_form():
    table = np.asarray(layers.sincos_table((3, 5), 16))
    omega = 10000.0 ** (-np.arange(4) / 4)
    for row, col in ((0, 0), (2, 1), (1, 4)):
        parts = (np.sin(row * omega), np.cos(row * omega), np.sin(col * omega), np.cos(col * omega))
        np.testing.assert_allclose(table[row, col], np.concatenate(parts), atol=1e-6)


def test_configurations_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="pow2.*12"):
        Tokens(12)
    with pytest.raises(ValueError, match="width=100"):
        Blocks(width=100)
    with pytest.raises(ValueError, match="levels.*size"):  # Every fault in one error.
        Bottleneck("kl", dim=4, size=8)
    with pytest.raises(ValueError, match="widht"):
        from_dict(TokenizerConfig, {"encoder": {"widht": 64}})
    with pytest.raises(ValueError, match="float16"):
        Compute(dtype="float16")


def test_null_condition_ignores_the_codes():
    params, x = random_params(TINY), jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    codes = jax.random.uniform(jax.random.key(1), (2, 16, 3), minval=-1)
    null = Condition(codes, jnp.array([5, 16]), jnp.ones(2, bool))
    a, b = flextok.velocities(
        params, TINY, Compute(), x, jnp.full((1,), 0.5), (null, unconditional(2, 3))
    )
    assert relative(a, b) < 1e-5


def test_the_velocity_to_an_image_is_the_target_up_to_its_limit():
    x0, noise = (jax.random.normal(jax.random.key(i), (3, 4, 4, 3)) for i in (0, 1))
    t = jnp.array([1.0, 0.3, 0.01])
    found = path.velocity_to(x0, path.interpolate(x0, noise, t), t)
    expected = path.target(x0, noise) * np.array([1, 1, 0.01 / 0.05])[:, None, None, None]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_a_decoder_that_predicts_the_image_gives_the_velocity_to_it():
    params, x_t = random_params(TINY), jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    t, keep = jnp.array([0.02, 0.7]), jnp.array([3, 16])
    condition = Condition(jnp.zeros((2, 16, 3)), keep, jnp.array([False, True]))
    image = changed(TINY, target__flow__predicts="image")
    ((written,), a), ((velocity,), b) = (
        flextok.velocities(params, cfg, Compute(), x_t, t, (condition,), capture=0)
        for cfg in (TINY, image)
    )
    expected = (x_t - written) / np.array([0.05, 0.7])[:, None, None, None]
    np.testing.assert_allclose(velocity, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="predicts='noise'"):
        changed(TINY, target__flow__predicts="noise")


def test_an_untrained_predictor_of_images_decodes_to_the_zeros_that_it_writes():
    cfg = changed(TINY, target__flow__predicts="image", decoder__depth=1)
    params = new_params(functools.partial(flextok.init, cfg))  # The last layer is zero.
    noise = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    codes, keep = jnp.zeros((2, 16, 3)), jnp.array([3, 16])
    how = Sampler(steps=20, guidance_scale=1.0)
    decode = jax.jit(lambda params: flextok.decode(params, cfg, Compute(), codes, keep, noise, how))
    made = decode(params)
    np.testing.assert_allclose(made, 0, atol=1e-5)
