"""The distillation stage: what equals the teacher, what is trained, and what comes out."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import TINY, changed, random_params, relative, tiny_tokenizer

from configs import distill as CONFIGS
from examples.digits import arrays
from flextok_jax import FlexTok
from flextok_jax.nn import flextok, layout
from flextok_jax.nn.config import Compute
from flextok_jax.nn.decoder import Condition, unconditional
from flextok_jax.training.distill_stage import DistillStage, student
from flextok_jax.training.loop import train

TEACHER = changed(TINY, encoder__depth=1, decoder__depth=1, sites__patch_size=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a small teacher of 16x16 images, of random weights."""
    folder = tmp_path_factory.mktemp("teacher")
    tiny_tokenizer(TEACHER).save_pretrained(folder)
    return folder


def config(teacher, **changes):
    c = CONFIGS.get_config("digits,batch=8")
    c.init_from = str(teacher)
    c.update(total_steps=4, log_every=2)
    c.checkpoint.every, c.evaluation.num_images, c.mesh.data = 2, 0, 1
    for key, value in changes.items():
        c.update_from_flattened_dict({key.replace("__", "."): value})
    return c


@pytest.fixture(scope="module")
def trained(teacher, tmp_path_factory):
    """A run of four steps: (workdir, outcome)."""
    workdir, c = tmp_path_factory.mktemp("run"), config(teacher)
    return workdir, train(DistillStage(c), c, workdir)


def test_a_student_begins_as_the_conditional_velocity_of_its_teacher(teacher):
    """For a step of any length; guidance is learned from the targets."""
    c = config(teacher)
    stage = DistillStage(c)
    params = stage.init_from(c.init_from)
    x, t = jax.random.normal(jax.random.key(0), (3, 16, 16, 3)), jnp.array([1.0, 0.6, 0.2])
    codes = jax.random.uniform(jax.random.key(1), (3, 4, 3), minval=-1)
    conditions = (Condition(codes, jnp.array([1, 3, 4]), jnp.zeros(3, bool)),)
    length = jnp.array([1.0, 0.3, 0.0])

    @jax.jit
    def both(student, teacher):
        (ours,) = flextok.velocities(
            student, stage.model, Compute(), x, t, conditions, None, length
        )
        (wanted,) = flextok.velocities(teacher, TEACHER, Compute(), x, t, conditions)
        return ours, wanted

    ours, wanted = both(params, random_params(TEACHER))
    assert relative(ours, wanted) < 1e-6


def test_the_loss_is_the_error_of_average_velocities_along_the_teachers_steps(teacher, monkeypatch):
    """One image, two Euler steps of the teacher with plain guidance, in a few lines."""
    how = dict(steps=2, solver="euler", guidance_scale=2.0, norm_guidance=False, time_shift=0.5)
    c = config(teacher, jumps=(1, 2), **{f"teacher__{name}": x for name, x in how.items()})
    stage = DistillStage(c)
    params, frozen = stage.init_from(c.init_from), layout.unbox(stage.load_frozen())
    original = flextok.velocities

    @jax.jit
    def run(params, frozen, batch):
        """The loss, and what the student is asked for and answers."""
        seen = {}

        def spy(params, cfg, compute, x, t, conditions, capture=None, length=None):
            found = original(params, cfg, compute, x, t, conditions, capture, length)
            if cfg == stage.model:
                seen.update(x=x, t=t, length=length, velocity=found[0], condition=conditions[0])
            return found

        monkeypatch.setattr(flextok, "velocities", spy)
        loss, _ = stage.loss(params, frozen, batch, jax.random.key(3), jnp.int32(0))
        monkeypatch.undo()
        return loss, seen

    @jax.jit
    def guided(frozen, x, t):
        pair = (one, unconditional(1, TEACHER.code_dim))
        v, null = original({"decoder": frozen["teacher"]}, TEACHER, Compute(), x, t, pair)
        return null + 2.0 * (v - null)

    loss, seen = run(params, frozen, {"image": arrays("train")[0][:1]})
    third = 1 / 3
    np.testing.assert_allclose(seen["t"], [1, 1, third], rtol=1e-6)
    np.testing.assert_allclose(seen["length"], [1, 1 - third, third], rtol=1e-6)
    one = Condition(*(part[:1] for part in seen["condition"]))
    states = [seen["x"][:1]]
    for t, length in ((1.0, 1 - third), (third, third)):
        v = guided(frozen, states[-1], jnp.array([t]))
        states.append(states[-1] - length * v)
    assert relative(seen["x"], jnp.concatenate([states[0], states[0], states[1]])) < 1e-5
    targets = [
        states[0] - states[2],
        (states[0] - states[1]) / (1 - third),
        (states[1] - states[2]) / third,
    ]
    wanted = np.mean(np.square(seen["velocity"] - jnp.concatenate(targets)))
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.slow
def test_only_the_decoder_is_trained_and_tokens_stay(trained, teacher, tmp_path):
    workdir, outcome = trained
    before, images = random_params(TEACHER), arrays("test")[0][:4]
    jax.tree.map(np.testing.assert_array_equal, outcome.state.params["encoder"], before["encoder"])
    changed = outcome.state.params["decoder"]["length_mlp"]["kernel"]
    assert np.abs(changed).max() > 0
    FlexTok.from_pretrained(workdir).save_pretrained(tmp_path)
    tok = FlexTok.from_pretrained(tmp_path)
    assert tok.decodes(FlexTok.from_pretrained(teacher).fingerprint) and not tok.decodes("f00")
    assert tok.config == student(TEACHER, steps=2, time_shift=0.5)
    tokens = tok.tokenize(images)
    np.testing.assert_array_equal(tokens, FlexTok.from_pretrained(teacher).tokenize(images))
    np.testing.assert_array_equal(tok.detokenize(tokens), tok.detokenize(tokens, steps=2))
    for wrong in (dict(solver="midpoint"), dict(guidance_scale=3.0)):
        with pytest.raises(ValueError, match=f"(?s){next(iter(wrong))}.*guidance is built in"):
            tok.detokenize(tokens, **wrong)


@pytest.mark.slow
def test_a_continued_run_is_bitwise_the_one_never_stopped(trained, teacher, tmp_path):
    workdir, outcome = trained
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    c = config(teacher)
    again = train(DistillStage(c), c, tmp_path / "run")
    for a, b in zip(jax.tree.leaves(again.state), jax.tree.leaves(outcome.state), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_teacher_that_does_not_fit_is_refused(trained, teacher):
    for changes, words in (
        (dict(init_from=""), "names no teacher"),
        (dict(init_from=str(trained[0])), "without jumps"),
        (dict(data__image_size=32), "image_size"),
        (dict(jumps=(1, 3)), "divisors of teacher.steps=4"),
    ):
        with pytest.raises(ValueError, match=words):
            DistillStage(config(teacher, **changes))
