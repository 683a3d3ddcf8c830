"""FID, Inception score, precision and recall, and the network they stand on, agree with others."""

import importlib.util

import jax
import numpy as np
import pytest
from common import GOLDEN, last, relative
from safetensors.numpy import load_file, save_file
from skimage.metrics import structural_similarity

from flextok_jax.evaluation import metrics, statistics
from flextok_jax.evaluation.statistics import FeatureSet
from flextok_jax.io.formats import names
from flextok_jax.io.formats import networks as files
from flextok_jax.nn import inception

SPEC = importlib.util.spec_from_file_location("make_fidelity", GOLDEN / "fidelity" / "make.py")
MAKE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(MAKE)


@pytest.fixture(scope="module")
def io():
    return load_file(GOLDEN / "fidelity" / "io.safetensors")


@pytest.fixture(scope="module")
def features():
    return MAKE.features()


# InceptionV3.


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the golden's random weights under the published names."""
    tensors = {"fc.bias": np.zeros(1008, np.float32)}
    for entry in names.entries(inception.shapes(), names.by_dots):
        tensors[entry.name] = MAKE.random_tensor(entry.name, entry.shape)
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


def feature_set(features):
    return FeatureSet(features, np.zeros((len(features), 1)), np.zeros(len(features), int))


def test_distances_agree_with_torch_fidelity(io, features):
    real = feature_set(features["real"]).gaussian
    for name in ("made", "few"):
        found = statistics.fid(real, feature_set(features[name]).gaussian)
        assert found == pytest.approx(io[f"fid_{name}"][0], rel=1e-6), name
    assert abs(statistics.fid(real, real)) < 1e-9 * np.trace(real.covariance)


def test_inception_score_agrees_with_torch_fidelity(io, features):
    found = statistics.inception_score(features["logits"])
    assert found == pytest.approx(tuple(io["inception_score"]), rel=1e-6)
    sure = np.repeat(1e4 * np.eye(5), 4, axis=0)  # Each of five classes as often, without doubt.
    assert statistics.inception_score(sure, splits=1) == pytest.approx((5, 0))


@pytest.mark.parametrize("chunk", [7, 1000])
def test_precision_and_recall_agree_with_torch_fidelity(io, features, chunk, monkeypatch):
    monkeypatch.setattr(statistics, "CHUNK", chunk)
    real, made = (feature_set(features[name]) for name in ("real", "made"))
    found = statistics.precision_recall(real, made)
    assert found == pytest.approx(tuple(io["precision_recall"]), rel=1e-6)
    assert statistics.precision_recall(real, real) == (1, 1)


def test_reference_statistics_are_read_as_they_were_written(features, tmp_path):
    gaussian = feature_set(features["real"]).gaussian
    statistics.write_gaussian(tmp_path / "reference.npz", gaussian)
    again, digest = statistics.read_gaussian(tmp_path / "reference.npz")
    np.testing.assert_array_equal(again.covariance, gaussian.covariance)
    np.testing.assert_array_equal(again.mean, gaussian.mean)
    more = dict(mu=gaussian.mean, sigma=gaussian.covariance, arr_0=np.zeros(3))
    np.savez(tmp_path / "more.npz", **more)
    assert statistics.read_gaussian(tmp_path / "more.npz")[1] == digest
    np.savez(tmp_path / "other.npz", **more | {"mu": gaussian.mean + 1e-9})
    assert statistics.read_gaussian(tmp_path / "other.npz")[1] != digest


def test_a_file_without_statistics_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        statistics.read_gaussian(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("mu")
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.zeros((3, 4)))
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    for name in ("text", "wrong", "nan"):
        with pytest.raises(ValueError, match=f"{name}.npz"):
            statistics.read_gaussian(tmp_path / f"{name}.npz")


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
