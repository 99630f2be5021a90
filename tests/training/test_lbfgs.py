import pytest
import torch

from raysweep.training.lbfgs import minimize


class Quadratics:
    """Convex quadratic functions with known minima, 1 at each; counts the problems that it is asked about."""

    def __init__(self, num_problems, size):
        generator = torch.Generator().manual_seed(0)
        factors = torch.randn(num_problems, 2 * size, size, generator=generator)
        self.hessians = factors.transpose(1, 2) @ factors / (2 * size) + 0.5 * torch.eye(size)
        self.minima = torch.randn(num_problems, size, generator=generator)
        self.asked = []

    def __call__(self, points, problems):
        self.asked.append(problems.tolist())
        distances = points - self.minima[problems]
        gradients = torch.einsum("bij,bj->bi", self.hessians[problems], distances)
        return 1 + (gradients * distances).sum(1).double() / 2, gradients


def test_each_problem_gets_to_its_own_minimum():
    problem = Quadratics(5, 12)
    found = minimize(problem, torch.zeros(5, 12), torch.ones(5, 12), 1e-10)
    torch.testing.assert_close(found, problem.minima, atol=2e-3, rtol=2e-3)


def test_problems_do_not_depend_on_one_another():
    problem = Quadratics(4, 12)
    together = minimize(problem, torch.zeros(4, 12), torch.ones(4, 12), 1e-8)
    for number in range(4):
        alone = minimize(
            lambda points, problems, number=number: problem(points, problems + number),
            torch.zeros(1, 12),
            torch.ones(1, 12),
            1e-8,
        )
        torch.testing.assert_close(together[number], alone[0], atol=1e-5, rtol=1e-5)


def test_solved_problems_leave_the_batch():
    problem = Quadratics(3, 12)
    start = torch.zeros(3, 12)
    start[1] = problem.minima[1]
    found = minimize(problem, start, torch.ones(3, 12), 1e-6)
    assert torch.equal(found[1], problem.minima[1])
    assert problem.asked[0] == [0, 1, 2]
    assert all(1 not in asked for asked in problem.asked[1:])


def test_steps_that_are_too_long_are_halved():
    problem = Quadratics(3, 12)
    found = minimize(problem, torch.zeros(3, 12), torch.full((3, 12), 1e4), 1e-10)
    torch.testing.assert_close(found, problem.minima, atol=2e-3, rtol=2e-3)
    assert problem(found, torch.arange(3))[0].tolist() == pytest.approx([1] * 3)
