"""FID, Inception score, precision and recall, and the network they stand on, agree with others."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from common import GOLDEN, last, relative
from safetensors.numpy import load_file, save_file
from skimage.metrics import structural_similarity
from test_processes import finish, start

from examples.digits import arrays
from examples.digits.classifier import feature_network
from flextok_jax.evaluation import metrics, statistics
from flextok_jax.evaluation.statistics import Moments
from flextok_jax.io.formats import names
from flextok_jax.io.formats import networks as files
from flextok_jax.nn import inception
from flextok_jax.parallel.mesh import make_mesh
from flextok_jax.parallel.sharding import batch_sharding

SPEC = importlib.util.spec_from_file_location("make_fidelity", GOLDEN / "fidelity" / "make.py")
MAKE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MAKE)


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "fidelity" / "io.safetensors")


@pytest.fixture(scope="module")
def features():
    return MAKE.features()


def moments(features):
    return Moments.empty(features.shape[1]).add(features)


# InceptionV3.


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the golden's random weights under the published names."""
    tensors = {"fc.bias": np.zeros(1008, np.float32)}
    for path, leaf in names.flatten(inception.shapes()).items():
        name = names.by_dots(path)
        tensors[name] = MAKE.random_tensor(name, names.file_shape(path, leaf.shape))
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_file(tensors | {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.zeros(1, np.int64)}, path)
    return path


def test_resizing_is_that_of_tensorflow_1(io):
    for name, images in MAKE.images().items():
        ours = inception.resize(last(images))[:, :: MAKE.EVERY, :: MAKE.EVERY]
        np.testing.assert_allclose(ours, last(io[f"{name}_resized"]), rtol=1e-6, err_msg=name)


def test_features_and_logits_agree_with_torch_fidelity(io, weights):
    params = files.load_inception(weights)
    features, logits = jax.jit(inception.features)(params, last(MAKE.images()["small"]))
    assert relative(features, io["small_features"]) < 1e-5
    assert relative(logits, io["small_logits"]) < 1e-5


def test_a_wrong_file_is_refused_with_every_reason(weights, tmp_path):
    tensors = load_file(weights)
    tensors["extra"] = tensors.pop("Mixed_7c.branch_pool.bn.running_var")
    tensors["fc.weight"] = tensors["fc.weight"][:1000]
    save_file(tensors, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError) as error:
        files.load_inception(tmp_path / "wrong.safetensors")
    for reason in (
        "missing tensor Mixed_7c.branch_pool.bn.running_var", "unknown tensor extra",
        "fc.weight has shape (1000, 2048), expected (1008, 2048)",
    ):  # fmt: skip
        assert reason in str(error.value)
    with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
        files.load_inception(tmp_path / "nowhere.pth")


def test_a_hash_in_the_name_is_checked(tmp_path):
    content = (GOLDEN / "lpips" / "new.pth").read_bytes()
    digest = files.sha256(GOLDEN / "lpips" / "new.pth")
    good, bad = tmp_path / f"net-{digest[:8]}.pth", tmp_path / "net-01234567.pth"
    for path in (good, bad):
        path.write_bytes(content)
    assert files.sha256(good) == digest
    with pytest.raises(ValueError, match=digest):
        files.sha256(bad)


# Statistics of features.


def test_distances_agree_with_torch_fidelity(io, features):
    real = moments(features["real"]).gaussian()
    for name in ("made", "few"):
        found = statistics.fid(real, moments(features[name]).gaussian())
        assert found == pytest.approx(io[f"fid_{name}"][0], rel=1e-6), name
    assert abs(statistics.fid(real, real)) < 1e-9 * np.trace(real.covariance)


def test_inception_score_agrees_with_torch_fidelity(io, features):
    found = statistics.inception_score(features["logits"])
    assert found == pytest.approx(tuple(io["inception_score"]), rel=1e-6)
    sure = np.repeat(1e4 * np.eye(5), 4, axis=0)  # Each of five classes as often, without doubt.
    assert statistics.inception_score(sure, splits=1) == pytest.approx((5, 0))
    assert statistics.inception_score(sure * [1, 1, 1, 1, 0], splits=1)[0] < 5


def test_precision_and_recall_agree_with_torch_fidelity(io, features):
    for chunk in (7, 1000):
        found = statistics.precision_recall(features["real"], features["made"], chunk=chunk)
        assert found == pytest.approx(tuple(io["precision_recall"]), rel=1e-6)
    assert statistics.precision_recall(features["real"], features["real"]) == (1, 1)


def test_moments_merge_to_those_of_all_and_leave_out_what_is_masked(features):
    """Also far from the origin, where sums of squares would have lost most digits."""
    x = features["real"] + 1e6
    streamed = Moments.empty(24)
    for first in range(0, 150, 40):
        batch = np.full((40, 24), np.nan)  # What fills the last batch counts for nothing.
        part = x[first : first + 40]
        batch[: len(part)] = part
        streamed = streamed.add(batch, np.arange(40) < len(part))
    merged = moments(x[:3]).merge(Moments.empty(24)).merge(moments(x[3:]))
    for found in (streamed, merged):
        assert found.count == 150
        np.testing.assert_allclose(found.gaussian().mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(
            found.gaussian().covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9
        )


def test_reference_statistics_are_read_as_they_were_written(features, tmp_path):
    gaussian = moments(features["real"]).gaussian()
    statistics.write_gaussian(tmp_path / "reference.npz", gaussian)
    with np.load(tmp_path / "reference.npz") as found:
        assert sorted(found) == ["mu", "sigma"]
    again, digest = statistics.read_gaussian(tmp_path / "reference.npz")
    np.testing.assert_array_equal(again.covariance, gaussian.covariance)
    np.testing.assert_array_equal(again.mean, gaussian.mean)
    more = dict(mu=gaussian.mean, sigma=gaussian.covariance, arr_0=np.zeros(3))
    np.savez(tmp_path / "more.npz", **more)
    assert statistics.read_gaussian(tmp_path / "more.npz")[1] == digest
    np.savez(tmp_path / "other.npz", **more | {"mu": gaussian.mean + 1e-9})
    assert statistics.read_gaussian(tmp_path / "other.npz")[1] != digest


def test_what_cannot_be_computed_is_refused(features, tmp_path):
    real = moments(features["real"]).gaussian()
    with pytest.raises(ValueError, match="24 and of 23 features"):
        statistics.fid(real, moments(features["real"][:, 1:]).gaussian())
    with pytest.raises(ValueError, match="1 images have no covariance"):
        moments(features["real"][:1]).gaussian()
    with pytest.raises(ValueError, match="9 images in 10 parts"):
        statistics.inception_score(features["logits"][:9])
    with pytest.raises(ValueError, match="more than k=3"):
        statistics.precision_recall(features["real"][:3], features["made"])
    with pytest.raises(FileNotFoundError):
        statistics.read_gaussian(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("mu")
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.zeros((3, 4)))
    for name in ("text", "wrong"):
        with pytest.raises(ValueError, match=f"{name}.npz"):
            statistics.read_gaussian(tmp_path / f"{name}.npz")


def measured(mesh, process=0, processes=1):
    """(count, FID, Inception score, mean) of 21 images in batches of 8, by a small network."""
    random = np.random.RandomState(0)
    images = random.uniform(-1, 1, (21, 8, 8, 3)).astype(np.float32)
    weights = random.randn(8 * 8 * 3, 12).astype(np.float32)
    network = jax.jit(lambda x: (jax.nn.relu(x.reshape(len(x), -1) @ weights), x.sum((1, 2))))
    moments, logits = Moments.empty(12), []
    for begin in range(0, 21, 8):
        batch = np.full((8, 8, 8, 3), 7, np.float32)
        part = images[begin : begin + 8]
        batch[: len(part)] = part
        rows = np.arange(8).reshape(processes, -1)[process]
        placed = [
            jax.make_array_from_process_local_data(batch_sharding(mesh), x[rows])
            for x in (batch, np.arange(8) < len(part))
        ]
        (features, scores), mask = statistics.gather((network(placed[0]), placed[1]))
        moments = moments.add(features, mask)
        logits.append(scores[mask])
    plain = statistics.Gaussian(np.zeros(12), np.eye(12))
    score = statistics.inception_score(np.concatenate(logits), splits=3)
    return [moments.count, statistics.fid(moments.gaussian(), plain), *score, *moments.mean]


def looked(mesh):
    """The mean features of 21 digits in batches of 6, as `flextok evaluate` has them."""
    images = arrays("test")[0][:21]
    found = feature_network(mesh)(images, 6)
    assert found["features"].shape == (21, 64) and found["logits"].shape == (21, 10)
    return found["features"].mean(0, dtype=np.float64).tolist()


BY_TWO_PROCESSES = """
import json, sys
import jax
from flextok_jax.parallel import startup
coordinator, count, index = (arg.partition("=")[2] for arg in sys.argv[2:])
startup.start(coordinator, int(count), int(index))
from test_fidelity import looked, make_mesh, measured
found = [measured(make_mesh(devices=jax.local_devices()[:n])) for n in (1, 2, 4)]
found.append(measured(make_mesh(), int(index), int(count)))
seen = [looked(make_mesh(devices=jax.local_devices()[:n])) for n in (1, 2, 4)]
print("FOUND", json.dumps([found, seen, jax.device_count()]))
"""


def test_sums_are_equal_on_any_number_of_devices_and_by_two_processes(tmp_path):
    expected = measured(make_mesh(devices=jax.devices()[:1]))
    assert expected[0] == 21
    alone = looked(None)
    codes, outputs = finish(tmp_path, start(tmp_path, BY_TWO_PROCESSES, 2, 4, lambda i: ["-"]))
    assert codes == [0, 0], "\n".join(outputs)
    for output in outputs:
        (line,) = [x for x in output.splitlines() if x.startswith("FOUND ")]
        found, seen, devices = json.loads(line.removeprefix("FOUND "))
        assert devices == 8 and len(found) == 4
        for numbers in found:
            assert numbers[0] == 21
            np.testing.assert_allclose(numbers, expected, rtol=1e-5)
        for features in seen:
            np.testing.assert_allclose(features, alone, rtol=0, atol=1e-5 * np.abs(alone).max())


# Reconstructions against originals.


@pytest.fixture(scope="module")
def pairs():
    random = np.random.default_rng(0)
    originals = random.uniform(-1, 1, (3, 24, 20, 3)).astype(np.float32)
    images = np.clip(originals + 0.4 * random.standard_normal(originals.shape), -1, 1)
    images[2] = originals[2]
    return images.astype(np.float32), originals


def test_structural_similarity_agrees_with_scikit_image(pairs):
    expected = [
        structural_similarity(
            (a.astype(np.float64) + 1) / 2, (b.astype(np.float64) + 1) / 2, channel_axis=-1,
            data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )
        for a, b in zip(*pairs)
    ]  # fmt: skip
    np.testing.assert_allclose(metrics.ssim(*pairs), expected, rtol=1e-5)
    assert expected[0] < 0.9 and expected[2] == 1
    with pytest.raises(ValueError, match="11 pixels per side"):
        metrics.ssim(pairs[0][:, :10], pairs[1][:, :10])


def test_the_error_of_all_frequencies_sums_to_the_mean_squared_error(pairs):
    bands = metrics.error_by_frequency(*pairs)
    mse = np.mean(np.square(pairs[0].astype(np.float64) - pairs[1]), axis=(1, 2, 3))
    assert bands.shape == (3, len(metrics.frequency_bands(24, 20)))
    np.testing.assert_allclose(bands.sum(1), mse, rtol=1e-5, atol=1e-12)
    assert (bands[0] > 0).all()


@pytest.mark.parametrize("cycles, band", [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (15, 4), (16, 5)])
def test_a_wave_is_an_error_of_its_own_frequency_only(cycles, band):
    wave = np.cos(2 * np.pi * cycles * np.arange(32) / 32)
    for images in (wave[:, None], wave[None]):
        images = np.broadcast_to(images, (32, 32))[None, :, :, None]
        bands = metrics.error_by_frequency(images, np.zeros_like(images))[0]
        assert metrics.frequency_bands(32, 32) == [0, 1, 2, 4, 8, 16]
        assert bands[band] > 0.4 and np.delete(bands, band).max() < 1e-9
