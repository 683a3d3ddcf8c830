"""Linear probing: how much of an image's class its first k registers hold, linearly."""

from collections.abc import Iterator, Sequence

import numpy as np

from flextok_jax.evaluation.pictures import Pictures
from flextok_jax.evaluation.reconstruction import side
from flextok_jax.parallel.sharding import padded
from flextok_jax.tokenizer import FlexTok

STRENGTHS = tuple(10.0**power for power in range(-4, 3))  # Inverse regularisation that is tried.
FOLDS = 5  # Of the training images, to choose it by.


def registers(tok: FlexTok, pictures: Pictures, num_tokens: int, batch_size: int):
    """The registers before quantisation: (float32 [n, num_tokens, F], labels int [n]).

    Raises ValueError for a picture without a label, or registers that are not finite.
    """
    from tqdm import tqdm

    found, labels = [], []
    batch_size = min(batch_size, len(pictures))
    with tqdm(total=len(pictures), unit="image", disable=None) as bar:
        for batch in pictures.batches(side(tok), batch_size):
            images = padded(batch.images, batch_size)
            found.append(np.asarray(tok.registers(images, num_tokens))[: len(batch.images)])
            labels.append(batch.labels)
            bar.update(len(batch.images))
    labels, found = np.concatenate(labels), np.concatenate(found)
    if (labels < 0).any():
        raise ValueError(
            f"{np.sum(labels < 0)} images of {pictures.title} have no label: put the images of a "
            "class into a folder"
        )
    if not np.isfinite(found).all():
        raise ValueError(f"{tok.origin} makes registers that are not finite: check its parameters")
    return found, labels


def probe(train, test, counts: Sequence[int]) -> Iterator[tuple[str, object]]:
    """An evaluator: logistic regression on the first k standardised registers, for each k.

    The strength of the regularisation is chosen by cross-validation of the training images.

    Args:
        train, test: (float [n, K, F], labels int [n]); see `registers`.
        counts: numbers of registers.

    Yields:
        "count", "train_count"; "accuracy" and "strength", by k; "chance", the share of the
        commonest class of the test images.
    """
    import joblib
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    (x, y), (x_test, y_test) = train, test
    accuracy, strength = {}, {}
    for k in counts:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        search = GridSearchCV(model, {"logisticregression__C": STRENGTHS}, cv=FOLDS, n_jobs=-1)
        with joblib.parallel_config("threading"):
            search.fit(x[:, :k].reshape(len(x), -1), y)
        accuracy[k] = float(search.score(x_test[:, :k].reshape(len(x_test), -1), y_test))
        strength[k] = search.best_params_["logisticregression__C"]
    yield "count", len(y_test)
    yield "train_count", len(y)
    yield "accuracy", accuracy
    yield "strength", strength
    yield "chance", float(np.bincount(y_test).max() / len(y_test))
