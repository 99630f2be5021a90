import math

import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss

from raysweep.experiment.metrics import METRICS, VALIDATION_METRICS, validation_key
from raysweep.training.evaluation import evaluate_test
from raysweep.training.metrics import MetricSums, validation_metrics
from raysweep.training.metrics import confusion_matrix as our_confusion_matrix
from raysweep.training.population import FeatureSet, train_population


def outputs(num_rows, num_heads, num_classes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_rows, num_heads, num_classes, generator=generator)
    return logits, torch.randint(0, num_classes, (num_rows,), generator=generator)


def computed(logits, labels, splits=None):
    sums = MetricSums(logits.shape[1], logits.shape[2])
    splits = splits or [len(labels)]
    for chunk, chunk_labels in zip(logits.split(splits), labels.split(splits), strict=True):
        sums.add(chunk, chunk_labels)
    return {name: values.tolist() for name, values in sums.compute().items()}


# With 30 classes and 12 rows most classes are absent, some of them predicted all the same.
@pytest.mark.parametrize(("num_rows", "num_classes"), [(200, 3), (12, 30), (1, 5), (64, 2)])
def test_metrics_are_those_of_scikit_learn(num_rows, num_classes):
    logits, labels = outputs(num_rows, 3, num_classes)
    metrics = computed(logits, labels)
    assert metrics["num_rows"] == [num_rows] * 3
    for head in range(3):
        predicted = logits[:, head].argmax(-1)
        assert metrics["accuracy"][head] == pytest.approx(accuracy_score(labels, predicted))
        assert metrics["macro_f1"][head] == pytest.approx(f1_score(labels, predicted, average="macro"))
        probabilities = logits[:, head].double().softmax(-1)
        expected = log_loss(labels, probabilities, labels=range(num_classes))
        assert metrics["loss"][head] == pytest.approx(expected, rel=1e-5)


def test_macro_f1_counts_a_class_that_is_only_predicted_and_not_one_that_never_occurs():
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 1, 2]), 5).float()[:, None]
    assert computed(logits, labels)["macro_f1"] == pytest.approx([(1 + 2 / 3 + 0) / 3])


def test_sums_over_batches_equal_one_batch():
    logits, labels = outputs(101, 2, 4)
    whole = computed(logits, labels)
    for splits in ([1] * 101, [64, 0, 37], [100, 1]):
        parts = computed(logits, labels, splits)
        assert {name: pytest.approx(values, rel=1e-6) for name, values in whole.items()} == parts


def test_half_precision_logits_are_summed_in_single():
    logits, labels = outputs(50, 1, 3)
    assert computed(logits.bfloat16(), labels) == computed(logits.bfloat16().float(), labels)


def test_computing_leaves_the_sums_as_they_are():
    logits, labels = outputs(20, 2, 3)
    sums = MetricSums(2, 3)
    sums.add(logits, labels)
    first = {name: values.clone() for name, values in sums.compute().items()}
    assert all(torch.equal(first[name], values) for name, values in sums.compute().items())
    sums.add(logits, labels)
    assert sums.compute()["num_rows"].tolist() == [40, 40]


def test_a_head_of_nan_has_no_accuracy_and_its_neighbour_keeps_its_own():
    logits, labels = outputs(20, 2, 3)
    expected = computed(logits, labels)
    logits[7, 1] = math.nan
    metrics = computed(logits, torch.zeros_like(labels))
    assert all(math.isnan(metrics[name][1]) for name in ("loss", "accuracy", "macro_f1"))
    assert metrics["num_rows"] == [20, 20]
    for name, values in computed(logits, labels).items():
        assert values[0] == expected[name][0]


def test_confusion_matrix_is_that_of_scikit_learn():
    logits, labels = outputs(40, 1, 6)
    predicted = logits[:, 0].argmax(-1)
    labels[labels == 2] = 3
    found = our_confusion_matrix(predicted, labels, 6)
    assert found.tolist() == confusion_matrix(labels, predicted, labels=range(6)).tolist()


def test_every_place_that_computes_metrics_computes_those_of_the_table():
    """The training loop's history is in test_loop.py."""
    logits, labels = outputs(20, 1, 3)
    assert set(computed(logits, labels)) == {*METRICS, "num_rows"}
    assert set(evaluate_test(logits[:, 0].numpy(), labels.numpy()).values) == set(METRICS)
    rows = FeatureSet({"cls": logits[:, 0]}, labels)
    setting = {"learning_rate": 0.1, "weight_decay": 0.0, "epochs": 2, "features": "cls", "normalize": "none"}
    (head,) = train_population(rows, rows, [setting], sources={"cls": ("cls",)}, num_classes=3, batch_size=8, seed=0)
    for epoch in head.history:
        assert {name for name in epoch if name.startswith("val/")} == set(VALIDATION_METRICS)


def test_validation_metrics_are_those_of_one_head_as_floats():
    logits, labels = outputs(20, 3, 4)
    sums = MetricSums(3, 4)
    sums.add(logits, labels)
    expected = computed(logits, labels)
    for head in range(3):
        found = validation_metrics(sums.compute(), head)
        assert found == {validation_key(name): expected[name][head] for name in METRICS}
        assert {type(value) for value in found.values()} == {float}
    assert validation_metrics(sums.compute()) == validation_metrics(sums.compute(), 0)
