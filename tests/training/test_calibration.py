import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.nn import functional as F

from raysweep.training.calibration import UNIFORM_ROW_WEIGHT, fit_temperature


def overlapping(num_rows=400, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_rows) % 4
    return scale * (torch.eye(4)[labels] * 2 + torch.randn(num_rows, 4, generator=generator)), labels


def least_loss(logits, labels, weight):
    """The temperature with the least loss, with an added row of this weight whose target is uniform."""

    def loss(exponent):
        log_probabilities = (logits.double() / math.exp(exponent)).log_softmax(1)
        return float(F.nll_loss(log_probabilities, labels, reduction="sum") - weight * log_probabilities.mean())

    return math.exp(minimize_scalar(loss, bounds=(-6, 6), method="bounded", options={"xatol": 1e-9}).x)


@pytest.mark.parametrize("scale", [0.2, 1.0, 10.0])
@pytest.mark.parametrize("num_rows", [20, 400])
def test_a_temperature_has_the_lowest_loss(num_rows, scale):
    logits, labels = overlapping(num_rows, scale)
    expected = least_loss(logits, labels, UNIFORM_ROW_WEIGHT)
    assert fit_temperature(logits, labels) == pytest.approx(expected, rel=1e-5)


def test_where_classes_overlap_the_added_row_hardly_matters():
    logits, labels = overlapping()
    assert fit_temperature(logits, labels) == pytest.approx(least_loss(logits, labels, 0), rel=0.01)


def test_it_scales_with_the_logits():
    logits, labels = overlapping()
    assert fit_temperature(100 * logits, labels) == pytest.approx(100 * fit_temperature(logits, labels), rel=1e-5)


def test_few_rows_that_are_all_right_do_not_make_a_classifier_certain():
    labels = torch.arange(12) % 3
    logits = torch.eye(3)[labels]
    probabilities = (logits / fit_temperature(logits, labels)).softmax(1)
    assert 0.9 < probabilities.max() < 0.999


@pytest.mark.parametrize("logits", [torch.zeros(6, 3), torch.full((6, 3), math.nan), torch.full((6, 3), math.inf)])
def test_scores_that_say_nothing_get_temperature_one(logits):
    assert fit_temperature(logits, torch.arange(6) % 3) == 1.0


def test_a_classifier_that_is_mostly_wrong_becomes_uncertain():
    logits, labels = overlapping()
    probabilities = (logits / fit_temperature(logits, (labels + 1) % 4)).softmax(1)
    assert probabilities.max() < 0.5
