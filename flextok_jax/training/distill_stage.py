"""The distillation stage: a decoder of a few steps out of any FlexTok with a flow."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average

from flextok_jax.flow import sampler
from flextok_jax.flow.sampler import Sampler
from flextok_jax.io import models
from flextok_jax.io.paths import as_path, reached, resolved
from flextok_jax.io.sources import pinned
from flextok_jax.nn import flextok, layout
from flextok_jax.nn.config import Compute
from flextok_jax.nn.decoder import Condition, unconditional
from flextok_jax.nn.tokenizer_config import TokenizerConfig
from flextok_jax.nn.vae_config import identity_vae
from flextok_jax.training.tokenizer_stage import TokenizerStage


class DistillStage(TokenizerStage):
    """The decoder learns to jump along the flow that its teacher samples with guidance.

    From noise the teacher runs its flow by `teacher`, a sampler of n steps, with the momentum that
    APG has after many steps. For every s of `jumps` the trajectory is cut into s equal parts, and
    the student's velocity at the beginning of a part, told its length, is regressed to the average
    of it: what a perfect student writes in s steps is the teacher's own image for that noise.
    Guidance is in the targets, so the student needs no null pass. (Compare progressive
    distillation, arXiv 2202.00512, and average velocities, arXiv 2505.13447.)

    Encoder, bottleneck and VAE are the teacher's and are not trained: tokens stay what they are.
    """

    def __init__(self, config, teacher: TokenizerConfig | None = None):
        """`teacher` replaces that of the model which `init_from` names, and nothing is read.

        Raises:
            ValueError: there is no teacher, or it does not fit the configuration.
        """
        source = config.init_from
        if not source and teacher is None:
            raise ValueError("init_from='' names no teacher: needed is a tokenizer with a flow")
        if source and reached(as_path(source)).exists():
            source = str(resolved(as_path(source)))
        self._source = source
        self._teacher = models.load_once(source)[0].config if teacher is None else teacher
        size = (config.data.image_size,) * 2
        if not self._teacher.is_flow or self._teacher.target.flow.jumps:
            raise ValueError(f"init_from={source}: a teacher has a flow without jumps")
        if self._teacher.image_size != size:
            raise ValueError(f"data.image_size={size[0]}: {source} has {self._teacher.image_size}")
        own = self._teacher.sampler
        given = {name: x for name, x in config.teacher.to_dict().items() if x is not None}
        self._how = dataclasses.replace(own, **given)
        wrong = [s for s in config.jumps if s < 1 or self._how.steps % s]
        if wrong or not config.jumps:
            raise ValueError(
                f"jumps={tuple(config.jumps)}: needed are divisors of teacher.steps="
                f"{self._how.steps}"
            )
        self._jumps = tuple(config.jumps)
        self.model = student(self._teacher, config.steps, self._how.time_shift)
        self.compute = Compute(**config.compute)
        self._data, self._evaluation = config.data, config.evaluation
        identity = self.model.vae.kind == models.IDENTITY
        self._vae_source = models.IDENTITY if identity else source
        self._bottleneck_weight, self._repa = 0.0, types.SimpleNamespace(weight=0.0)
        self._grouped, self._time_shift = len(self.model.prefixes) > 1, 1.0
        if config.data.source == "encoded":
            self._check_encoded()

    def init(self, key):
        """{"encoder", "decoder"} and perhaps {"bottleneck"}, in boxes; for their shapes."""
        identity = identity_vae(self.model.vae.latent_channels)
        params = flextok.init(dataclasses.replace(self.model, vae=identity), key)
        return models.trained(params)

    def init_from(self, source: str):
        """The teacher's parameters; what the decoder does with a step's length is zero."""
        params = models.load_once(source)[0].params
        shapes = layout.unbox(jax.eval_shape(self.init, jax.random.key(0)))
        new = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes["decoder"]["length_mlp"])
        return models.trained(params) | {"decoder": params["decoder"] | {"length_mlp": new}}

    def load_frozen(self):
        """{"teacher"}: its decoder; {"vae"}, not for the identity."""
        params, like = models.load_once(self._source)[0].params, flextok.shapes(self._teacher)
        frozen = {"teacher": layout.box(params["decoder"], like["decoder"])}
        return frozen | ({"vae": params["vae"]} if params["vae"] else {})

    def trainable(self, path: str) -> bool:
        return path.startswith("decoder/") and super().trainable(path)

    def _flow(self, params, frozen, batch, x0, codes, keep, step):
        """Returns as `TokenizerStage._flow`: the error of the average velocity of all jumps."""
        condition = Condition(codes, keep, batch["null"])
        times, n = jnp.asarray(self._how.times(), jnp.float32), self._how.steps
        states = jax.lax.stop_gradient(self._trajectory(frozen, batch["noise"], condition))
        parts = [(i * n // s, (i + 1) * n // s) for s in self._jumps for i in range(s)]
        first, last = np.array(parts).T
        length = times[first] - times[last]
        target = (states[:, first] - states[:, last]) / length[None, :, None, None, None]

        def flat(x):  # [B, J, ...] -> [B J, ...]
            return x.reshape(-1, *x.shape[2:])

        count, size = len(parts), len(x0)
        repeated = Condition(*(jnp.repeat(x, count, axis=0) for x in condition))
        (velocity,) = flextok.velocities(
            params, self.model, self.compute, flat(states[:, first]), jnp.tile(times[first], size),
            (repeated,), length=jnp.tile(length, size),
        )  # fmt: skip
        error = jnp.square(velocity.astype(jnp.float32) - flat(target))
        error = jnp.mean(error, axis=(1, 2, 3)).reshape(size, count)
        start, logged = 0, {}
        for s in self._jumps:
            mean = jnp.mean(error[:, start : start + s], axis=1)
            logged[f"loss_by_steps/{s}"] = Average.from_model_output(mean)
            start += s
        return jnp.mean(error), jnp.mean(error, axis=1), logged

    def _trajectory(self, frozen, noise, condition):
        """The teacher's states at its sampler's times, float32 [B, n + 1, h, w, C]."""
        how, params = self._how, {"decoder": frozen["teacher"]}
        schedule = sampler.Schedule(*map(jnp.asarray, how.schedule()))
        conditions = (condition, unconditional(len(noise), self._teacher.code_dim))
        conditions = conditions if how.guided else conditions[:1]

        def step(state, i):
            def guided(x, t, length, _):
                found = flextok.velocities(params, self._teacher, self.compute, x, t, conditions)
                v, *null = (v.astype(jnp.float32) for v in found)
                if not null:
                    return (v,)
                if not how.normalized:
                    return (sampler.classifier_free(v, *null, schedule.scales[i]),)
                momentum = sampler.settled_momentum(v, *null)
                return sampler.adaptive_projected(v, *null, schedule.scales[i], momentum)[:1]

            plain = sampler.Method(how.solver)
            state = sampler.integrate(guided, state, schedule, i, i + 1, plain)
            return state, state.x

        _, states = jax.lax.scan(step, sampler.start(noise), jnp.arange(how.steps))
        return jnp.moveaxis(jnp.concatenate([noise[None], states]), 0, 1)

    def export_config(self):
        """As of a tokenizer; also "teacher_source" and "teacher_fingerprint"."""
        fingerprint = models.load_once(self._source)[1]
        teacher = {"teacher_source": pinned(self._source), "teacher_fingerprint": fingerprint}
        return super().export_config() | teacher


def student(teacher: TokenizerConfig, steps: int, time_shift: float) -> TokenizerConfig:
    """The teacher's model with a decoder of jumps, sampled in `steps` of them without guidance."""
    how = Sampler(steps, 1.0, time_shift=time_shift)
    flow = dataclasses.replace(teacher.target.flow, jumps=True, null_prob=0.0, sampler=how)
    return dataclasses.replace(teacher, target=dataclasses.replace(teacher.target, flow=flow))
