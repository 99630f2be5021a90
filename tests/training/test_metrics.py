import math

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    log_loss,
    roc_auc_score,
    top_k_accuracy_score,
)

from raysweep.experiment.metrics import METRICS, TEST_METRICS, VALIDATION_METRICS, validation_key
from raysweep.training import metrics as module
from raysweep.training.evaluation import evaluate_test
from raysweep.training.metrics import MetricSums, calibration_error, macro_auroc, top_k, validation_metrics
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
@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
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
        balanced = balanced_accuracy_score(labels, predicted)
        assert metrics["balanced_accuracy"][head] == pytest.approx(balanced, abs=1e-6)
        brier = brier_score_loss(labels, probabilities, labels=range(num_classes))
        assert metrics["brier"][head] == pytest.approx(brier, abs=1e-6)


@pytest.mark.parametrize(("num_classes", "k"), [(3, 2), (5, 4), (6, 5), (30, 5)])
def test_top_k_accuracy_is_that_of_scikit_learn(num_classes, k):
    logits, labels = outputs(200, 3, num_classes)
    found = computed(logits, labels)["top_k_accuracy"]
    assert top_k(num_classes) == k
    for head in range(3):
        expected = top_k_accuracy_score(labels, logits[:, head], k=k, labels=range(num_classes))
        assert found[head] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_classes", [1, 2])
def test_top_k_accuracy_of_two_classes_is_accuracy(num_classes):
    metrics = computed(*outputs(50, 3, num_classes))
    assert metrics["top_k_accuracy"] == metrics["accuracy"]


def test_of_equal_scores_the_first_are_among_the_top_k():
    assert computed(torch.zeros(9, 1, 9), torch.arange(9))["top_k_accuracy"] == pytest.approx([5 / 9])


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
    assert all(math.isnan(metrics[name][1]) for name in METRICS)
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
    assert list(evaluate_test(logits[:, 0].numpy(), labels.numpy()).values) == list(TEST_METRICS)
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


# From all scores of a split


def test_auroc_is_that_of_scikit_learn():
    for num_classes in (3, 12):
        logits, labels = outputs(200, 1, num_classes)
        probabilities = logits[:, 0].double().softmax(-1)
        expected = roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
        assert macro_auroc(logits[:, 0], labels) == pytest.approx(expected, abs=1e-6)
    logits, labels = outputs(200, 1, 2)
    expected = roc_auc_score(labels, logits[:, 0].softmax(-1)[:, 1])
    assert macro_auroc(logits[:, 0], labels) == pytest.approx(expected, abs=1e-6)


def test_ties_count_half_in_auroc():
    _, labels = outputs(200, 1, 3)
    votes = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.5, 0.3, 0.2], [0.3, 0.5, 0.2]])[torch.arange(200) % 4]
    expected = roc_auc_score(labels, votes.double(), multi_class="ovr", average="macro")
    assert macro_auroc(votes.log(), labels) == pytest.approx(expected, abs=1e-6)


def test_classes_without_rows_have_no_part_in_auroc():
    logits, labels = outputs(100, 1, 6)
    labels[labels > 3] = 0
    probabilities = logits[:, 0].double().softmax(-1)
    areas = [roc_auc_score(labels == number, probabilities[:, number]) for number in range(4)]
    assert macro_auroc(logits[:, 0], labels) == pytest.approx(np.mean(areas), abs=1e-6)


def test_one_class_has_no_auroc():
    logits, labels = outputs(10, 1, 3)
    assert macro_auroc(logits[:, 0], torch.ones_like(labels)) is None
    assert "auroc" not in evaluate_test(logits[:, 0].numpy(), np.ones(10, int)).values


@pytest.mark.parametrize("temperature", [1.0, 0.3, 4.0])
@pytest.mark.parametrize("chunk_rows", [7, 4096])
def test_calibration_error_is_that_of_guo_et_al(monkeypatch, temperature, chunk_rows):
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk_rows)
    logits, labels = outputs(300, 1, 4)
    probabilities = (logits[:, 0].double() / temperature).softmax(-1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    expected = 0.0
    for number in range(15):
        members = (confidence > number / 15) & (confidence <= (number + 1) / 15)
        if members.any():
            expected += members.mean() * abs(right[members].mean() - confidence[members].mean())
    assert calibration_error(logits[:, 0], labels, temperature) == pytest.approx(expected, abs=1e-9)


def test_who_is_certain_and_wrong_has_the_whole_error():
    logits = 1e4 * torch.eye(3)
    assert calibration_error(logits, torch.arange(3)) == 0.0
    assert calibration_error(logits, torch.tensor([1, 2, 0])) == 1.0
