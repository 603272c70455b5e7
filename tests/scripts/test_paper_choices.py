"""The option that an answer takes, of the many ways to say it; and none where none is taken."""

from __future__ import annotations

import string

import pytest

pytest.importorskip("typer", reason="needs the extra `paper`")
from paper.choices import taken_option

OPTIONS = {
    "A": "Aspirin",
    "B": "Iron deficiency anemia",
    "C": "E. coli",
    "D": "A vitamin D supplement",
    "E": "None of the above",
}


@pytest.mark.parametrize(
    "answer",
    [
        # A letter, with or without its text.
        "B", "B.", "(B)", "**B**", "b", "(b)", "B)", "B: Iron deficiency anemia", "B) Iron deficiency anemia",
        "(B) Iron deficiency anemia", "B. Iron deficiency anemia\n\nThe ferritin is low, unlike in A.",
        "Iron deficiency anemia", "iron deficiency anemia.",
        # A box.
        r"So \boxed{B}", r"\boxed{\text{B}}", r"$\boxed{\mathbf{B}}$", r"\boxed{(B)}", r"\boxed{b}",
        r"\boxed{B. Iron deficiency anemia}", r"\boxed{\text{(B) Iron deficiency anemia}}",
        r"\boxed{Iron deficiency anemia}", r"\boxed{Option B}", r"\boxed{A}? No, wait: \boxed{B}",
        r"The answer is C. \boxed{B}", r"\boxed{B}. The answer is not A.",
        "Final Answer: The final answer is $\\boxed{B}$. I hope it is correct.",
        # A statement.
        "The answer is B", "The answer is (B).", "The correct answer is **B**: iron", "the answer is B because of it",
        "**Answer:** B", "Answer:\nB", "Answer: B. Iron deficiency anemia", "Answer - B", "Answer is: \"B\"",
        "Answer: (b)", "The correct option is therefore B.", "The answer is option B", "The answer is clearly B",
        "The correct choice is letter B", "The best answer would be B, since the MCV is low",
        "The answer is Iron deficiency anemia.", "The answer is: **(B)** Iron deficiency anemia",
        "The answer is not A. The answer is B.", "The answer is C. No, the answer is B.",
        "The answer is B.\nOption A is incorrect, since it thins the blood.",
        "B is the correct answer", "(B) is the best choice", "A is incorrect. B is correct.",
        "Option A is wrong; option B is right", "I would choose option B.", "I choose B",
        # A last line.
        "A. Aspirin\nB. Iron deficiency anemia\n\nSo (B).", "B. Iron deficiency anemia\nB. Iron deficiency anemia",
        "B. Iron deficiency anemia\nA. is for headaches.",
        "Let us compare A and C first.\n\nTherefore, B.", "It could be many things.\nB",
        "It could be many things.\n(B) Iron deficiency anemia", "Hm.\n\nFinal answer\nB",
    ],
)  # fmt: skip
def test_b_is_taken(answer: str) -> None:
    assert taken_option(answer, OPTIONS) == "B"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is E. coli.", "C"),
        ("E. coli", "C"),
        ("E. coli is the cause", None),
        ("Answer: C. E. coli", "C"),
        ("A vitamin D supplement", "D"),
        ("The answer is A vitamin D supplement", "D"),
        ("D. A vitamin D supplement", "D"),
        ("Aspirin", "A"),
        (r"\boxed{\text{Aspirin}}", "A"),
        ("The answer is None of the above.", "E"),
    ],
)
def test_texts_that_begin_like_letters(answer: str, letter: str | None) -> None:
    assert taken_option(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    "answer",
    [
        "", "   ", "\n", "I do not know.", "A 45-year-old man has a fever.", "D-dimer is elevated",
        "The answer is D-dimer", "The answer is a matter of taste.", "The answer is not A", "A is not correct",
        "Both A and B are right", "The answer is A or B", "The answer is A, B and C", "A, B",
        r"\boxed{A, B}", r"\boxed{A and B}", r"\boxed{}", r"\boxed{42}", r"\boxed{F}", "F", "Answer: F",
        "The answer is Paracetamol.", r"The answer is B, or rather \boxed{Paracetamol}", "Answer:", "The answer is",
        # The question's options once more.
        "\n".join(f"{letter}. {text}" for letter, text in OPTIONS.items()),
        "A) Aspirin\nB) Iron deficiency anemia", "A\nB\nC\nD\nE", "(A)\n(B)",
        "C'est la vie", "Answer: C'est la vie",
    ],
)  # fmt: skip
def test_no_option_is_taken(answer: str) -> None:
    assert taken_option(answer, OPTIONS) is None


def test_as_many_letters_as_there_are_options() -> None:
    ten = {letter: f"text {number}" for number, letter in enumerate(string.ascii_uppercase[:10])}
    assert taken_option("The answer is J.", ten) == "J"
    assert taken_option("The answer is J.", OPTIONS) is None
    assert taken_option("I think so.", ten) is None
    assert taken_option("I would say text 3", ten) is None
    assert taken_option("The answer is text 3", ten) == "D"


def test_every_letter_is_found_in_every_form() -> None:
    for letter, text in OPTIONS.items():
        for form in (
            "{0}",
            "({0})",
            "\\boxed{{{0}}}",
            "The answer is {0}.",
            "{0}. {1}",
            "Answer: {0}",
            "\\boxed{{{1}}}",
        ):
            assert taken_option(form.format(letter, text), OPTIONS) == letter
