"""Right and wrong in mathematics, and pass@k."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest

pytest.importorskip("math_verify", reason="needs the extra `paper`")
from math_verify import parse, verify
from paper.maths import average_of, is_right, pass_at


def test_math_verify_does_what_its_documentation_says() -> None:
    """Its README: the order counts, units and percent, an assignment, rounding."""
    assert verify(parse("${1,3} \\cup {2,4}$"), parse("${1,2,3,4}$"))
    assert verify(parse("$1 < x < 2$"), parse("$(1,2)$"))
    assert not verify(parse("$(1,2)$"), parse("$1 < x < 2$"))
    assert verify(parse("$1/3$"), parse("$0.333333$"))
    assert is_right("$\\frac13$", "$1/3$")
    assert is_right("$x = 1$", "1")
    assert is_right("10 cm", "10")
    assert is_right("$a+2z = 2z + a = 101$", "101")


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        # As GSM8K and AIME have them.
        ("She sells 16 - 3 - 4 = 9 eggs for 9 * 2 = $18.\n#### 18", "18", True),
        ("The total is $1,250 a year. The answer is 1250.", "1,250", True),
        ("The answer is 18.", "81", False),
        ("It takes \\boxed{204} minutes.", "204", True),
        ("It takes \\boxed{204\\text{ minutes}}.", "204", True),
        ("so we get \\boxed{33}", "033", True),
        ("27", "27.0", True),
        # As MATH has them.
        ("$\\boxed{\\dfrac{3}{4}}$", "\\frac{3}{4}", True),
        ("$\\boxed{0.75}$", "\\frac{3}{4}", True),
        ("$\\boxed{\\frac{3}{5}}$", "\\frac{3}{4}", False),
        ("Thus \\boxed{3\\sqrt{13}}.", "3\\sqrt{13}", True),
        ("Thus \\boxed{\\sqrt{117}}.", "3\\sqrt{13}", True),
        ("\\boxed{\\left(3, \\frac{\\pi}{2}\\right)}", "\\left( 3, \\frac{\\pi}{2} \\right)", True),
        ("\\boxed{(3, \\pi)}", "\\left( 3, \\frac{\\pi}{2} \\right)", False),
        ("\\boxed{1,-2}", "-2,1", True),
        ("\\boxed{x^2+2x+1}", "(x+1)^2", True),
        ("\\boxed{90^\\circ}", "90^\\circ", True),
        ("\\boxed{28}", "28\\%", True),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", True),
        ("\\boxed{(-\\infty, 2]}", "(-\\infty,2]", True),
        ("\\boxed{(-\\infty, 2)}", "(-\\infty,2]", False),
        ("\\boxed{\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}}",
         "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", True),
        # The last box counts, and a box counts before a number that comes later.
        ("First \\boxed{4}. No: \\boxed{5}.", "5", True),
        ("First \\boxed{5}. No: \\boxed{4}.", "5", False),
        ("\\boxed{5}, since 2 + 3 is not 6.", "5", True),
        ("\\boxed {5}", "5", True),
        ("\\fbox{5}, since 2 + 3 is not 6.", "5", True),
        ("First \\boxed{4}. No: \\framebox {5}.", "5", True),
        # A reference may be a whole solution, as in Minerva, or be in dollars, as in OlympiadBench.
        ("\\boxed{1.6}", "of $\\boxed{2}$ \\[ s=\\boxed{1.6} \\mathrm{~cm} \\]", True),
        ("\\boxed{2}", "$2$", True),
        # No answer.
        ("", "5", False),
        ("I do not know.", "5", False),
        ("Let me think about \\boxed", "5", False),
    ],
)  # fmt: skip
def test_answers_as_models_give_them(answer: str, reference: str, right: bool) -> None:
    assert is_right(answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("\\boxed{4.5 \\times 10^{33}}", "4.5e33", True),
        ("\\boxed{4.5e33}", "\\boxed{4.5e33} \\mathrm{ergs}", True),
        ("\\boxed{4.5e33}", "4.5 \\times 10^{33}", True),
        ("\\boxed{4.5 \\times 10^{32}}", "4.5e33", False),
        ("\\boxed{e^{33}}", "e^{33}", True),
        ("\\boxed{2e}", "2e", True),
    ],
)
def test_powers_of_ten_as_minerva_writes_them(answer: str, reference: str, right: bool) -> None:
    assert is_right(answer, reference) is right


def test_without_that_math_verify_takes_them_for_eulers_number() -> None:
    assert not verify(parse("$4.5e33$"), parse("$4.5 \\times 10^{33}$"))


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("\\boxed{6.6 \\times 10^{-34}}", "6.6e-34", True),
        ("\\boxed{6.604 \\times 10^{-34}}", "6.6e-34", True),
        ("\\boxed{1.0 \\times 10^{-20}}", "6.6e-34", False),
        ("\\boxed{0}", "6.6e-34", False),
        ("\\boxed{0.0000002}", "0.0000001", False),
        ("\\boxed{0}", "0", True),
    ],
)
def test_small_numbers_are_told_apart(answer: str, reference: str, right: bool) -> None:
    assert is_right(answer, reference) is right


def test_without_that_math_verify_takes_all_small_numbers_for_one() -> None:
    assert verify(parse("$6.6 \\times 10^{-34}$"), parse("$1.0 \\times 10^{-20}$"))


def test_a_number_that_cannot_be_computed_ends_in_wrong() -> None:
    assert not is_right("\\boxed{10^{10^{10^{10}}}}", "2")


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n: int) -> None:
    for right_ones, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [index < right_ones for index in range(n)]
        draws = list(itertools.combinations(samples, k))
        expected = Fraction(sum(map(any, draws)), len(draws))
        assert pass_at(k, [samples]) == pytest.approx(float(expected), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Over many questions of known p: its mean is 1 - (1 - p)^k."""
    generator, p, k = random.Random(0), 0.2, 4
    samples = [[generator.random() < p for _ in range(16)] for _ in range(20_000)]
    assert pass_at(k, samples) == pytest.approx(1 - (1 - p) ** k, abs=5e-3)


def test_pass_at_1_is_the_average_and_pass_at_n_is_any() -> None:
    generator = random.Random(1)
    samples = [[generator.random() < 0.3 for _ in range(16)] for _ in range(30)]
    assert pass_at(1, samples) == pytest.approx(average_of(samples))
    assert pass_at(16, samples) == pytest.approx(sum(map(any, samples)) / 30)


@pytest.mark.parametrize("k", [0, 3])
def test_fewer_samples_than_k_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"pass@{k} needs .* one has 2"):
        pass_at(k, [[True, False], [True, False, False]])
