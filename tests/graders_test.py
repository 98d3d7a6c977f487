"""Graders, by tables of hand-written responses: right, wrong, unreadable, and made to mislead."""

import json
from pathlib import Path

import pytest

from ctxjax.data.grading import graders, math_answers, numbers
from ctxjax.data.grading.graders import NO_NUMBER, NO_PLACE, NO_TAGS, NO_VALUE, NOT_CLOSED, TWO
from ctxjax.data.grading.reasoning import EMPTY, ENDLESS_REASONING, ONLY_REASONING

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_test.jsonl"
NOT_YES_NO, NOT_LETTER = "not yes or no", "not one of ABCD"

# response, reference, right, lenient, parsed or the reason why not (in capitals above, or as it is said)
YES_NO = [
    ("<answer>yes</answer>", "yes", True, True, "yes"),
    ("<answer>no</answer>", "no", True, True, "no"),
    ("<answer>no</answer>", "yes", False, False, "no"),
    ("<answer>yes</answer>", "no", False, False, "yes"),
    ("<answer>Yes</answer>", "yes", True, True, "yes"),
    ("<ANSWER>NO</ANSWER>", "no", True, True, "no"),
    ("<answer> yes </answer>", "yes", True, True, "yes"),
    ("<answer>\nno\n</answer>\n", "no", True, True, "no"),
    ("<answer>yes.</answer>", "yes", True, True, "yes"),
    ('<answer>"no"</answer>', "no", True, True, "no"),
    ("<answer>**yes**</answer>", "yes", True, True, "yes"),
    ("It insults a group. <answer>yes</answer> That is why.", "yes", True, True, "yes"),
    ("No slur is used, so <answer>no</answer>", "no", True, True, "no"),
    ("No doubt about it: <answer>yes</answer>", "yes", True, True, "yes"),
    ("<answer>yes</answer> To sum up: <answer>yes</answer>", "yes", True, True, "yes"),
    ("<answer>yes</answer> On reflection <answer>no</answer>", "no", False, True, TWO),
    ("<answer>yes</answer> or <answer>no</answer>", "yes", False, False, TWO),
    ("<answer>yes</answer><answer>maybe</answer>", "yes", False, False, NOT_YES_NO),
    ("<answer>yes or no</answer>", "yes", False, True, NOT_YES_NO),
    ("<answer>yes, it is</answer>", "yes", False, True, NOT_YES_NO),
    ("<answer>not offensive</answer>", "no", False, False, NOT_YES_NO),
    ("<answer>hateful</answer>", "yes", False, False, NOT_YES_NO),
    ("<answer>1</answer>", "yes", False, False, NOT_YES_NO),
    ("<answer>１</answer>", "yes", False, False, NOT_YES_NO),
    ("<answer>ｙｅｓ</answer>", "yes", True, True, "yes"),  # full width
    ("<answer>уеs</answer>", "yes", False, False, NOT_YES_NO),  # Cyrillic letters that look alike
    ("<answer>да</answer>", "yes", False, False, NOT_YES_NO),
    ("<answer></answer>", "no", False, False, NOT_YES_NO),
    ("<answer>yes", "yes", False, True, NOT_CLOSED),
    ("yes</answer>", "yes", False, True, NO_TAGS),
    ("answer: yes", "yes", False, True, NO_TAGS),
    ("Yes", "yes", False, True, NO_TAGS),
    ("No, this is a compliment.", "no", False, True, NO_TAGS),
    ("Yes. It is not a question of no or yes.", "yes", False, True, NO_TAGS),
    ("I would say yes, others would say no.", "yes", False, False, NO_TAGS),
    ("This is offensive.", "yes", False, False, NO_TAGS),
    ("I know nothing of yesterday.", "no", False, False, NO_TAGS),  # neither "no" nor "yes" is a word here
    ("I'm sorry, but I can't help with hateful content.", "yes", False, False, NO_TAGS),
    ("", "no", False, False, EMPTY),
    ("   \n", "no", False, False, EMPTY),
    ("<think>It is <answer>yes</answer></think>I cannot say.", "yes", False, False, ONLY_REASONING),
    ("<think><answer>yes</answer></think>", "yes", False, False, ONLY_REASONING),
    ("<think><answer>yes</answer></think><answer>no</answer>", "no", True, True, "no"),
    ("<think>Is it <answer>yes</answer>? I still wonder", "yes", False, False, ENDLESS_REASONING),
    ("reasoning without its opening mark</think>\n<answer>no</answer>", "no", True, True, "no"),
    ("<answer>{yes}</answer>", "yes", False, True, NOT_YES_NO),
    ("<final>yes</final>", "no", False, False, NO_TAGS),
]

LETTER = [
    ("<answer>A</answer>", "A", True, True, "A"),
    ("<answer>D</answer>", "D", True, True, "D"),
    ("<answer>B</answer>", "C", False, False, "B"),
    ("<answer>c</answer>", "C", True, True, "C"),
    ("<answer>(B)</answer>", "B", True, True, "B"),
    ("<answer>B.</answer>", "B", True, True, "B"),
    ("<answer>B)</answer>", "B", True, True, "B"),
    ("<answer>B. Insulin</answer>", "B", True, True, "B"),
    ("<answer>B: Insulin\nbecause of its half-life</answer>", "B", True, True, "B"),
    ("<answer>**D**</answer>", "D", True, True, "D"),
    ("<answer>\nA\n</answer>", "A", True, True, "A"),
    ("<Answer>C</Answer>", "C", True, True, "C"),
    ("The liver does this. <answer>C</answer>", "C", True, True, "C"),
    ("A and B are wrong. <answer>C</answer>", "C", True, True, "C"),
    ("<answer>C</answer> again: <answer>C. Liver</answer>", "C", True, True, "C"),
    ("<answer>A</answer> no, <answer>B</answer>", "B", False, True, TWO),
    ("<answer>A</answer> or <answer>B</answer>", "A", False, False, TWO),
    ("<answer>A or B</answer>", "A", False, False, NOT_LETTER),
    ("<answer>A, B</answer>", "A", False, False, NOT_LETTER),
    ("<answer>AB</answer>", "A", False, False, NOT_LETTER),
    ("<answer>Aspirin</answer>", "A", False, False, NOT_LETTER),
    ("<answer>Insulin</answer>", "B", False, False, NOT_LETTER),
    ("<answer>Option B</answer>", "B", False, True, NOT_LETTER),
    ("<answer>E</answer>", "A", False, False, NOT_LETTER),
    ("<answer>2</answer>", "B", False, False, NOT_LETTER),
    ("<answer>②</answer>", "B", False, False, NOT_LETTER),
    ("<answer>Ｂ</answer>", "B", True, True, "B"),  # full width
    ("<answer>𝐂</answer>", "C", True, True, "C"),  # mathematical bold
    ("<answer>В</answer>", "B", False, False, NOT_LETTER),  # Cyrillic
    ("<answer></answer>", "A", False, False, NOT_LETTER),
    ("<answer>B", "B", False, True, NOT_CLOSED),
    ("B", "B", False, True, NO_TAGS),
    ("The answer is B.", "B", False, True, NO_TAGS),
    ("Answer: (D)", "D", False, True, NO_TAGS),
    ("**Answer:** C", "C", False, True, NO_TAGS),
    ("The right choice is option D", "D", False, True, NO_TAGS),
    ("Not option A. The answer is C", "C", False, True, NO_TAGS),
    ("A vitamin that the body cannot make.", "A", False, False, NO_TAGS),  # an article
    ("The answer is a vitamin.", "A", False, False, NO_TAGS),
    ("The answer is A vitamin.", "A", False, False, NO_TAGS),
    ("Option B is correct.", "B", False, True, NO_TAGS),
    ("Option A is correct.", "A", False, True, NO_TAGS),
    ("The answer is B because it is.", "B", False, True, NO_TAGS),
    ("Option B is correct, not A.", "B", False, True, NO_TAGS),
    ("Option B is correct, not A.", "A", False, False, NO_TAGS),
    ("Choice A would be best, not B.", "A", False, True, NO_TAGS),
    ("The answer is A because it is.", "A", False, True, NO_TAGS),
    ("The right option is A, since it is.", "A", False, True, NO_TAGS),
    ("Vitamin C deficiency", "C", False, False, NO_TAGS),
    ("A is correct.", "A", False, False, NO_TAGS),  # it might be an article
    ("A or B", "A", False, False, NO_TAGS),
    ("Vitamin C or vitamin D", "C", False, False, NO_TAGS),
    ("It is C. Liver", "C", False, True, NO_TAGS),
    ("I am not a doctor and cannot answer that.", "A", False, False, NO_TAGS),
    ("", "A", False, False, EMPTY),
    ("<think>Surely <answer>B</answer></think>I am not sure.", "B", False, False, ONLY_REASONING),
    ("<think>Option B</think>", "B", False, False, ONLY_REASONING),
    ("<think>B, or A?</think><answer>A</answer>", "A", True, True, "A"),
    ("<think>The answer is B", "B", False, False, ENDLESS_REASONING),
]

MATH = [
    ("#### 72", "72", True, True, "72"),
    (r"\boxed{72}", "72", True, True, "72"),
    ("Answer: 72", "72", True, True, "72"),
    (r"\boxed{71}", "72", False, False, "71"),
    ("#### 72", "27", False, False, "72"),
    ("so\n#### 1,234", "1234", True, True, "1,234"),
    (r"\boxed{1{,}234}", "1,234", True, True, "1{,}234"),
    (r"\boxed{1\,234\,567}", "1234567", True, True, r"1\,234\,567"),
    ("Answer: 1 234", "1234", True, True, "1 234"),
    ("Answer: 12,34", "1234", False, True, None),  # no thousands are written so; the lenient reader only counts digits
    (r"\boxed{\frac{1}{2}}", "0.5", True, True, r"\frac{1}{2}"),
    (r"\boxed{\dfrac{6}{8}}", r"\frac{3}{4}", True, True, r"\dfrac{6}{8}"),
    (r"\boxed{\frac12}", "1/2", True, True, r"\frac12"),
    ("Answer: 3/4", "0.75", True, True, "3/4"),
    ("Answer: 1 1/2", "1.5", True, True, "1 1/2"),
    (r"\boxed{0.33}", "1/3", False, False, "0.33"),
    ("#### 5.0", "5", True, True, "5.0"),
    ("#### .5", "1/2", True, True, ".5"),
    ("#### -3", "-3", True, True, "-3"),
    ("#### 3", "-3", False, False, "3"),
    ("#### $18", "18", True, True, "$18"),
    ("Answer: 18 dollars per day.", "18", True, True, "18 dollars per day."),
    ("Answer: $18.00", "18", True, True, "$18.00"),
    (r"\boxed{\$18}", "18", True, True, r"\$18"),
    (r"\boxed{5\text{ km}}", "5", True, True, r"5\text{ km}"),
    (r"\boxed{12\ \text{cm}^2}", "12", True, True, r"12\ \text{cm}^2"),
    (r"\boxed{\text{5 km}}", "5", True, True, r"\text{5 km}"),
    (r"\boxed{90^\circ}", "90", True, True, r"90^\circ"),
    ("Answer: 25%", "25", True, True, "25%"),
    (r"\boxed{2\sqrt{2}}", r"\sqrt{8}", True, True, r"2\sqrt{2}"),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}", True, True, r"\{1, 2\}"),
    (r"\boxed{(1, 2)}", "(2, 1)", False, False, "(1, 2)"),
    (r"\boxed{x = 5}", "5", True, True, "x = 5"),
    (r"\boxed{x^2 + 1}", "1 + x^2", True, True, "x^2 + 1"),
    ("**Answer:** $\\frac{3}{4}$.", "3/4", True, True, "$\\frac{3}{4}$."),
    (r"First \boxed{10}." "\n" r"Then \boxed{12}.", "12", True, True, "12"),
    (r"\boxed{3} or \boxed{4}", "3", False, False, TWO),
    (r"\boxed{3} and again \boxed{3.0}", "3", True, True, "3.0"),
    ("#### 3\n#### 4", "4", True, True, "4"),
    ("Answer: 3 or 4", "3", False, False, None),
    (r"#### 7" "\n" r"\boxed{8}", "8", True, True, "8"),
    ("The answer is 72.", "72", False, True, NO_PLACE),
    ("72", "72", False, True, NO_PLACE),
    ("It took 72 steps and gave 18.", "72", False, False, NO_PLACE),
    (r"\boxed{72", "72", False, True, NO_PLACE),
    (r"\boxed{}", "72", False, False, NO_VALUE),
    (r"\boxed{seven}", "7", False, False, NO_VALUE),
    ("Answer: I cannot say", "7", False, False, NO_VALUE),
    ("I'm sorry, I cannot do this.", "7", False, False, NO_PLACE),
    ("#### １２", "12", True, True, "12"),  # full width
    ("#### ٤٢", "42", True, True, "٤٢"),  # Arabic digits
    ("", "7", False, False, EMPTY),
    (r"<think>\boxed{7}</think>I do not know.", "7", False, False, ONLY_REASONING),
    (r"<think>\boxed{7}</think>", "7", False, False, ONLY_REASONING),
    (r"<think>\boxed{8}</think>\boxed{7}", "7", True, True, "7"),
    (r"<think>\boxed{7}", "7", False, False, ENDLESS_REASONING),
    (r"\boxed{172}", "72", False, False, "172"),  # "72" is a part of it
    (r"\boxed{7}2", "72", False, False, "7"),
    # Signs and exponents are read, and digits are compared exactly.
    ("#### \N{MINUS SIGN}3", "-3", True, True, None),
    ("#### 3", "\N{MINUS SIGN}3", False, False, "3"),
    ("Answer: 9007199254740993", "9007199254740992", False, False, "9007199254740993"),
    (r"\boxed{9007199254740993}", "9,007,199,254,740,993", True, True, None),
    (f"#### 1{'0' * 400}1", f"1{'0' * 400}2", False, False, None),
    (f"#### 1{'0' * 400}1", f"1{'0' * 400}1", True, True, None),
    (r"\boxed{1e-7}", "3e-7", False, False, "1e-7"),
    (r"\boxed{3e-7}", "0.0000003", True, True, "3e-7"),
    (r"\boxed{2 \times 10^{-7}}", r"3 \times 10^{-7}", False, False, None),
    (r"\boxed{2 \times 10^{-7}}", r"2 \times 10^{-7}", True, True, None),
    (r"\boxed{0.333333}", "0.3333333", True, True, None),  # rounded to six places
    (r"\boxed{0.33}", "0.3333333", False, False, None),
    (r"\boxed{0.333333}", r"\frac{1}{3}", True, True, None),
    # Text and matrices, as in MATH; a list item.
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True, True, None),
    (r"\boxed{Evelyn}", r"\text{Evelyn}", True, True, None),
    (r"\boxed{\textbf{(B)}}", r"\text{B}", True, True, None),
    (r"\boxed{\text{even}}", r"\text{odd}", False, False, None),
    (r"\boxed{even}", "2", False, False, NO_VALUE),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", True, True, None),
    (r"\boxed{\begin{pmatrix} 1 \\ 3 \end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}", False, False, None),
    # Powers and fractions of one character keep their value.
    (r"\boxed{10²}", "100", True, True, "10^{2}"),
    (r"\boxed{10²}", "102", False, False, "10^{2}"),
    (r"\boxed{2³}", "8", True, True, None),
    (r"\boxed{10⁻³}", "0.001", True, True, None),
    (r"\boxed{3 × 10⁵}", "300000", True, True, None),
    (r"\boxed{x² + 1}", "x^2 + 1", True, True, None),
    (r"\boxed{xⁿ⁺¹}", "x^{n+1}", True, True, None),
    (r"\boxed{1½}", "1.5", True, True, "1 1/2"),
    (r"\boxed{½}", "0.5", True, True, "1/2"),
    (r"\boxed{-1½}", "-3/2", True, True, None),
    (r"\boxed{11⁄2}", "5.5", True, True, "11/2"),
    ("Answer: 1 1/2", "1½", True, True, None),
    ("Answer: 25 m²", "25", True, True, None),
    ("Answer: 25 cm^2", "25", True, True, None),
    ("Answer: 25 m/s²", "25", True, True, None),
    (r"\boxed{25 \text{ cm}²}", "25", True, True, None),
    ("Answer: 25 x²", "25", False, False, None),
    ("so it is 1/3", r"\frac{1}{3}", False, True, NO_PLACE),
    ("so it is 3/4", "0.75", False, True, NO_PLACE),
    ("- **Answer**: 42", "42", True, True, "42"),
    ("* Final answer: 42", "42", True, True, "42"),
    # A heading is no answer, and what comes last counts.
    ("#### Step 1: Add\n\n#### Step 2: Double it\n\nAnswer: 42", "42", True, True, "42"),
    ("#### 41\nI forgot one.\nAnswer: 42", "42", True, True, "42"),
    ("Answer: 41\nI forgot one.\n#### 42", "42", True, True, "42"),
    ("### Answer: 42", "42", True, True, "42"),
    ("#### Answer: 42", "42", True, True, "42"),
    # A letter at the end is a variable, and no unit.
    (r"\boxed{\pi r^2}", r"\pi r^2 h", False, False, None),
    (r"\boxed{\pi r^2 h}", r"\pi r^2 h", True, True, None),
    (r"\boxed{2}", "2t", False, False, None),
    (r"\boxed{a^2 + 2}", "a^2 + 2ab", False, False, None),
    # A loop of digits is no number, and no error.
    (f"Answer: 1e{'1' * 22}", "42", False, False, NO_VALUE),
]  # fmt: skip


def check(grade, right, lenient, outcome):
    assert (grade.correct, grade.lenient) == (right, lenient)
    assert (grade.parsed is None) == (grade.reason is not None)
    if outcome is not None:
        assert outcome in (grade.parsed, grade.reason)


@pytest.mark.parametrize(("response", "reference", "right", "lenient", "outcome"), YES_NO)
def test_yes_or_no(response, reference, right, lenient, outcome):
    check(graders.grade_yes_no(response, reference), right, lenient, outcome)


@pytest.mark.parametrize(("response", "reference", "right", "lenient", "outcome"), LETTER)
def test_letters(response, reference, right, lenient, outcome):
    check(graders.grade_letter(response, reference), right, lenient, outcome)


@pytest.mark.parametrize(("response", "reference", "right", "lenient", "outcome"), MATH)
def test_mathematics(response, reference, right, lenient, outcome):
    check(graders.grade_math(response, reference), right, lenient, outcome)


@pytest.mark.parametrize(
    ("response", "reference", "right", "outcome"),
    [
        ("It is 1,234.50 then", "#### 1234.5", True, "1234.5"),
        ("first 3, then 4", "3", False, "4"),
        ("<<48/2=24>>24 ... #### 1,234", "1234", True, "1234"),
        ("It costs $2.50.", "2.5", True, "2.5"),
        ("3.0", "3", True, "3"),
        ("-7 degrees", "-7", True, "-7"),
        ("<think>7</think>8", "8", True, "8"),
        ("<think>8</think>none", "8", False, NO_NUMBER),
        ("no number", "8", False, NO_NUMBER),
        ("", "8", False, EMPTY),
        ("12-5 = 7", "7", True, "7"),
        ("1,000", "1000", True, "1000"),
        ("5%", "5", True, "5"),
        ("$5", "5", True, "5"),
        ("#### 72", "72", True, "72"),
        ("2/3 of 9 is 6", "6", True, "6"),
        # Fractions and powers are read as one number, and the power of a unit does not count.
        ("3/4", "0.75", True, "0.75"),
        ("1/4", "0.75", False, "0.25"),
        ("It is 3 / 4.", "4", False, "0.75"),
        ("1/3", "2/6", True, "1/3"),
        ("-1/3", "1/3", False, "-1/3"),
        ("1 1/2 cups", "1.5", True, "1.5"),
        ("1½ cups", "1.5", True, "1.5"),
        ("³⁄₄", "0.75", True, "0.75"),
        (r"so \boxed{1\frac{1}{2}}", "1.5", True, "1.5"),
        (r"so -\dfrac{3}{4}", "-0.75", True, "-0.75"),
        ("The area is 25 m²", "25", True, "25"),
        ("25 cm^2", "25", True, "25"),
        ("25cm^{2}.", "25", True, "25"),
        ("25 m2", "25", True, "25"),
        (r"$25\text{ m}^2$", "25", True, "25"),
        ("9.8 m/s²", "9.8", True, "9.8"),
        ("5 kg·m⁻³", "5", True, "5"),
        ("3 × 10⁻⁷", "3e-7", True, "0.0000003"),
        (r"3 \times 10^{-7}", "3e-7", True, "0.0000003"),
        ("10²", "100", True, "100"),
        ("2^10", "1024", True, "1024"),
        ("2^10", "10", False, "1024"),
        (".5", "0.5", True, "0.5"),
        ("-.5", "-0.5", True, "-0.5"),
        ("Well...5", "5", True, "5"),
        ("-$5", "-5", True, "-5"),
        (r"-\$5", "-5", True, "-5"),
        ("$3-$5", "5", True, "5"),
        ("5%-10%", "10", True, "10"),
        ("1{,}000", "1000", True, "1000"),
        (r"1\,000", "1000", True, "1000"),
        ("on 10/12/2024", "2024", True, "2024"),
        ("5/0", "0", True, "0"),
        ("1e999999999/3", "3", True, "3"),
        ("9^999999999", "999999999", True, "999999999"),
    ],
)
def test_last_numbers(response, reference, right, outcome):
    grade = graders.grade_number(response, reference)
    assert grade.correct == right and outcome in (grade.parsed, grade.reason)


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        (" Two\n words ", "two words", True),
        ("two", "two words", False),
        ("", "", False),
        ("<think>x</think>y", "Y", True),
    ],
)
def test_exact_texts(response, reference, right):
    assert graders.grade_exact(response, reference).correct == right


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10-12", "12"), ("from 10\N{EN DASH}12", "12"), ("COVID-19", "19"), ("it is -12", "-12"), ("$-5.50", "-5.5"),
        ("x = \N{MINUS SIGN}7", "-7"), ("9007199254740993", "9007199254740993"), (f"1{'0' * 399}1", f"1{'0' * 399}1"),
        ("1e-7", "0.0000001"), ("3E5 items", "300000"), ("2.500", "2.5"), ("-0.0", "0"), ("5e", "5"),
        ("1,234,567.", "1234567"),
        ("1e999999999", "1E+999999999"), ("none", None),
    ],
)  # fmt: skip
def test_the_last_number_has_its_sign_and_all_its_digits(text, number):
    assert numbers.find_last_number(text) == number


@pytest.mark.parametrize(
    ("grading", "value", "reference"),
    [
        ("numeric", "so it is #### 1,072", "1072"), ("numeric", 72, "72"), ("numeric", 72.5, "72.5"),
        ("numeric", "none", None), ("numeric", True, None),
        ("numeric", "3/4", "0.75"), ("numeric", "1/3", "1/3"), ("numeric", "1½", "1.5"), ("numeric", "25 m²", "25"),
        ("numeric", "50 cm^2", "50"), ("numeric", ".5", "0.5"), ("numeric", "-$5", "-5"),
        ("numeric", "1{,}000", "1000"), ("numeric", "3 × 10⁻⁷", "0.0000003"), ("numeric", "10²", "100"),
        ("numeric", "12-5 = 7", "7"), ("numeric", "<<48/2=24>>24", "24"), ("numeric", r"\boxed{24}", "24"),
        ("numeric", "It is $24.", "24"), ("numeric", "10,00,000", "1000000"), ("numeric", "COVID-19", "19"),
        ("numeric", "3, 4", None), ("numeric", "(1, 2)", None), ("numeric", "5 ± 1", None), ("numeric", "2 + 3", None),
        ("numeric", "In 2020, 5 of them", "5"),
        ("numeric", "10:30", None), ("numeric", "2024-05-17", None), ("numeric", "10-12", None),
        ("numeric", "10–12", None), ("numeric", "10/12/2024", None), ("numeric", "5/0", None),
        ("numeric", "1.2.3", None), ("numeric", "1'000", None), ("numeric", "1 000", None), ("numeric", "3,14", None),
        ("numeric", r"\sqrt{2}", None), ("numeric", r"2\pi", None), ("numeric", "√2", None),
        ("numeric", r"\frac{x}{2}", None), ("numeric", "x^2", None), ("numeric", "10^n", None),
        ("exact", "Two words", "Two words"), ("exact", 7, "7"), ("exact", True, "True"), ("exact", "  ", None),
        ("yes_no", "Yes", "yes"), ("yes_no", " NO. ", "no"), ("yes_no", True, "yes"), ("yes_no", False, "no"),
        ("yes_no", "<answer>no</answer>", "no"), ("yes_no", "hateful", None), ("yes_no", 1, None),
        ("letter", "b", "B"), ("letter", "B. liver", "B"), ("letter", "(C)", "C"),
        ("letter", "<answer>D</answer>", "D"),
        ("letter", 0, "A"), ("letter", 3, "D"), ("letter", 4, None), ("letter", "2", None), ("letter", "E", None),
        ("letter", "Liver", None), ("letter_of_ten", "j", "J"), ("letter_of_ten", 9, "J"), ("letter", True, None),
        ("math", "Half of 8 is 4.\n#### 4", "4"), ("math", r"so \boxed{4}", "4"),
        ("math", r"\frac{1}{2}", r"\frac{1}{2}"),
        ("math", 4, "4"), ("math", r"\text{even}", r"\text{even}"), ("math", "I do not know", None),
        ("math", 0.5, "0.5"),
        ("math", r"\boxed{3} or \boxed{4}", None), ("math", "10²", "10^{2}"), ("math", "1½", "1 1/2"),
    ],
)  # fmt: skip
def test_references_are_read_as_they_are_graded_or_refused(grading, value, reference):
    grader = graders.GRADERS[grading]
    if reference is None:
        with pytest.raises(ValueError, match="cannot be a reference"):
            grader.read_reference(value)
    else:
        assert grader.read_reference(reference) == reference
        assert grader.read_reference(value) == reference


def test_a_reference_of_which_a_number_is_only_a_part_names_other_gradings():
    for value in ("10:30", "2024-05-17", "none"):
        with pytest.raises(ValueError, match=f"'{value}' cannot be a reference; .* math .* short"):
            graders.read_number(value)


@pytest.mark.parametrize(
    ("response", "lenient"),
    [
        ("Option I is correct.", False), ("Option I.", True), ("The option I know best", False),
        ("The answer I gave", False), ("The answer is I because it is.", True),
    ],
)  # fmt: skip
def test_the_ninth_letter_may_be_a_pronoun(response, lenient):
    assert graders.GRADERS["letter_of_ten"].grade(response, "I").lenient == lenient


@pytest.mark.parametrize(
    ("text", "letter"),
    [("D-dimer", None), ("C-reactive protein", None), ("B - the spleen", "B"), ("b-", "B"), ("A -- both", "A")],
)
def test_the_text_of_an_option_that_begins_with_a_letter_is_no_letter(text, letter):
    assert graders.grade_letter(f"<answer>{text}</answer>", "D").parsed == letter
    if letter is None:
        with pytest.raises(ValueError, match="cannot be a reference"):
            graders.read_letter(text)


def test_ten_options_have_ten_letters():
    grade = graders.GRADERS["letter_of_ten"].grade
    assert grade("<answer>J</answer>", "J").correct and not graders.grade_letter("<answer>J</answer>", "J").correct


def test_a_number_too_large_to_compare_is_wrong_and_not_waited_for(monkeypatch):
    monkeypatch.setattr(math_answers, "SECONDS", 1)
    assert not graders.grade_math(r"\boxed{9^{9^{9^{9}}}}", "5").correct


def test_every_gsm8k_reference_parses_to_itself():
    if not GSM8K.exists():
        pytest.skip(f"{GSM8K} is not here")
    answers = [json.loads(line)["answer"] for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    right = sum(graders.grade_math(text, math_answers.find_answers(text)[-1]).correct for text in answers)
    assert (right, len(answers)) == (1319, 1319)


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        ("Oakfield", "Oakfield", True), ("The capital is **Oakfield**.", "Oakfield", True),
        ("oakfield's harbour", "Oakfield", True), ("Oakfields", "Oakfield", False), ("Oak field", "Oakfield", False),
        ("It is a Red Fox!", "the red fox", True), ("red, and a fox", "red fox", False), ("fox red", "red fox", False),
        ("on July 9th, I think", "July 9", True), ("on July 19", "July 9", False), ("July 9", "July 19", False),
        ("1,840 metres", "1840", True), ("It was 1840.", "1,840", True), ("in 18400", "1840", False),
        ("between 12 and 1840.0", "1840", True), ("no idea", "1840", False), ("-5", "5", False),
        ("Yes, it has.", "yes", True), ("No. Yes.", "yes", False), ("nobody yesterday", "no", False),
        ("<think>Oakfield</think>Ashton", "Oakfield", False), ("", "Oakfield", False), ("", "no", False),
        ("", "7", False),
        # A number in a reference of several words counts as a whole, in any notation.
        ("0.5 mg", "5 mg", False), ("5.0 mg", "5 mg", True), ("5mg", "5 mg", True), ("12.5 %", "5%", False),
        ("5 %", "5%", True), ("1,500 kg", "500 kg", False), ("1500 kg", "1,500 kg", True), ("5 °C", "-5 °C", False),
        ("It is \N{MINUS SIGN}5.0 °C.", "-5 °C", True), ("-5 °C", "5 °C", False), ("3-5 mg", "5 mg", True),
        ("3–5 mg", "3-5 mg", True), ("5%-10% of it", "10% of it", True), ("0.75 cups", "3/4 cups", True),
        ("1 3/4 cups", "3/4 cups", False), ("5 m", "25 m²", False), ("25 m2", "25 m²", True), ("25 m", "25 m²", False),
        ("102 m", "10² m", False), ("vitamin B1", "vitamin B12", False), ("in room 12B", "room 12A", False),
        ("in room 12A", "room 12A", True), ("at 11:30", "10:30", False), ("at 10:30", "10:30", True),
        ("on May 5,2024", "May 5, 2024", True), ("rooms 1,2 and 3", "rooms 1, 2 and 3", True),
        ("rooms 1,2 and 4", "rooms 1, 2 and 3", False), ("10,00,000 kg", "1000000 kg", True),
        ("It is vitamin C.", "Vitamin A", False), ("Vitamin A is needed.", "vitamin A", True),
        ("Plan B", "Plan A", False), ("C#", "C++", False), ("I use c++.", "C++", True), ("C", "C++", False),
        ("a B-", "B+", False), ("a B+.", "B+", True),
        (f"1e{'1' * 22}", "7", False), (f"7, then 1e{'1' * 22}", "7", True),
        ("on 3/4/2024", "3/4/2024", True), ("on 4/3/2024", "3/4/2024", False), ("$50", "$5", False),
    ],
)  # fmt: skip
def test_short_answers(response, reference, right):
    grade = graders.grade_short(response, graders.read_short(reference))
    assert grade.correct == right
    if not response:
        assert grade.parsed is None and grade.reason == EMPTY


def test_a_short_answer_that_is_not_there_has_its_reason():
    for reference, reason in (("yes", graders.NO_YES_NO), ("12", graders.NO_NUMBER), ("fox", graders.NO_WORDS)):
        assert graders.grade_short("...", reference) == graders.Grade(None, False, reason)
    assert graders.read_short(True) == "yes" and graders.read_short(12) == "12"
    with pytest.raises(ValueError, match="'the' cannot be a reference"):
        graders.read_short("the")
