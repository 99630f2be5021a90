import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, log_loss

from raysweep.experiment.metrics import TEST_METRICS
from raysweep.training.evaluation import evaluate_test
from raysweep.training.intervals import accuracy_interval


def test_metrics_of_the_test_rows_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 4)).astype(np.float32), rng.integers(0, 4, 50)
    result = evaluate_test(logits, labels)
    predicted = logits.argmax(1)
    assert result.num_rows == 50
    assert result.values["accuracy"] == pytest.approx((predicted == labels).mean())
    assert result.values["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    expected = log_loss(labels, torch.from_numpy(logits).softmax(1).numpy())
    assert result.values["loss"] == pytest.approx(expected, rel=1e-4)
    assert np.array_equal(result.confusion_matrix, confusion_matrix(labels, predicted))
    assert (result.hit_table() == (predicted == labels)[None]).all()
    assert (result.accuracy_low, result.accuracy_high) == accuracy_interval(result.hit_table())
    assert (result.num_seeds, result.accuracies) == (1, (pytest.approx(result.values["accuracy"]),))
    assert result.accuracy_low < result.values["accuracy"] < result.accuracy_high


def test_one_test_row_of_three_classes():
    result = evaluate_test(np.array([[0.0, 5.0, 0.0]], np.float32), np.array([1]))
    assert (result.values["accuracy"], result.accuracy_low, result.accuracy_high) == (1.0, pytest.approx(0.025), 1.0)
    assert result.values["macro_f1"] == 1.0
    assert "auroc" not in result.values, "there is no row of another class"
    assert result.confusion_matrix == ((0, 0, 0), (0, 1, 0), (0, 0, 0))


def test_a_temperature_changes_nothing_but_the_calibrated_error():
    (logits,), labels = few_shot(1)
    plain, divided = evaluate_test(logits, labels), evaluate_test(logits, labels, [2.5])
    assert plain.values["calibrated_ece"] == plain.values["ece"]
    assert plain.temperatures == (1.0,)
    expected = evaluate_test(logits / 2.5, labels).values["ece"]
    assert divided.values == plain.values | {"calibrated_ece": pytest.approx(expected, abs=1e-6)}
    assert divided.values["calibrated_ece"] != divided.values["ece"]


def few_shot(num_seeds, seed=0, num_rows=60):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, num_rows)
    logits = [(rng.normal(size=(num_rows, 4)) + 1.5 * np.eye(4)[labels]).astype(np.float32) for _ in range(num_seeds)]
    return logits, labels


def test_figures_of_several_seeds_are_means_of_those_of_each():
    logits, labels = few_shot(5)
    temperatures = (0.3, 0.7, 1.0, 2.0, 5.0)
    result = evaluate_test(logits, labels, temperatures)
    pairs = zip(logits, temperatures, strict=True)
    alone = [evaluate_test(each, labels, [temperature]) for each, temperature in pairs]
    for name in TEST_METRICS:
        assert result.values[name] == pytest.approx(np.mean([each.values[name] for each in alone]))
    assert result.accuracies == pytest.approx(tuple(each.values["accuracy"] for each in alone))
    assert result.hits == tuple(text for each in alone for text in each.hits)
    assert result.hit_table().shape == (5, 60)
    assert (result.accuracy_low, result.accuracy_high) == accuracy_interval(result.hit_table())
    assert np.array_equal(result.confusion_matrix, sum(np.array(each.confusion_matrix) for each in alone))
    assert (result.num_seeds, result.num_rows) == (5, 60)
    assert result.temperatures == temperatures


def test_one_seed_in_a_list_is_one_model():
    (logits,), labels = few_shot(1)
    assert evaluate_test([logits], labels) == evaluate_test(logits, labels)
