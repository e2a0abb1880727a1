"""Arithmetic problems with worked solutions, generated: the `maths` domain of the embedded corpus.

Every template draws its numbers, names and wording from the generator that it is given, states a
problem and works it out step by step, so that a small model can learn the form and some sums.
"""

from collections.abc import Callable
from math import gcd

import numpy as np

NAMES = ["Ada", "Ben", "Chloe", "Dev", "Emil", "Fatima", "Grace", "Hugo", "Ines", "Kira", "Leo"]
THINGS = ["apples", "pencils", "coins", "stamps", "books", "cards", "marbles", "tickets", "shells"]
SHOPS = ["the market", "a kiosk", "the school shop", "a flea market", "the station"]
PROBLEMS_PER_SET = 12

Rng = np.random.Generator
Template = Callable[[Rng], str]


def _int(g: Rng, low: int, high: int) -> int:
    """Uniform in low … high, both included."""
    return int(g.integers(low, high + 1))


def _pick(g: Rng, choices: list[str]) -> str:
    return choices[int(g.integers(len(choices)))]


def _sum(g: Rng) -> str:
    a, b, c = (_int(g, 11, 989) for _ in range(3))
    ask = _pick(g, ["Compute", "Work out", "Find the value of", "Evaluate"])
    return (
        f"{ask} {a} + {b} - {c}.\nFirst {a} + {b} = {a + b}.\n"
        f"Then {a + b} - {c} = {a + b - c}.\nAnswer: {a + b - c}"
    )


def _product(g: Rng) -> str:
    a, b = _int(g, 12, 99), _int(g, 11, 39)
    tens, ones = b // 10 * 10, b % 10
    ask = _pick(g, ["Multiply", "Find the product of", "Compute the product of"])
    return (
        f"{ask} {a} and {b}.\nSplit {b} = {tens} + {ones}.\n"
        f"{a} * {tens} = {a * tens} and {a} * {ones} = {a * ones}.\n"
        f"{a * tens} + {a * ones} = {a * b}.\nAnswer: {a * b}"
    )


def _division(g: Rng) -> str:
    b, q = _int(g, 3, 24), _int(g, 4, 60)
    r = _int(g, 0, b - 1)
    a = b * q + r
    ask = _pick(g, ["Divide", "Share out"])
    rest = "There is no remainder." if r == 0 else f"The remainder is {a} - {b * q} = {r}."
    return (
        f"{ask} {a} by {b}; give quotient and remainder.\n{b} * {q} = {b * q}.\n{rest}\n"
        f"Answer: {q} remainder {r}"
    )


def _shopping(g: Rng) -> str:
    who, thing, where = _pick(g, NAMES), _pick(g, THINGS), _pick(g, SHOPS)
    price, count = _int(g, 2, 19), _int(g, 3, 25)
    total = price * count
    paid = (total // 50 + 1) * 50
    ask = _pick(g, ["How much change is there?", "What change comes back?"])
    return (
        f"{who} buys {count} {thing} at {where} for {price} each and pays with {paid}. {ask}\n"
        f"The {thing} cost {count} * {price} = {total}.\nThe change is {paid} - {total} = "
        f"{paid - total}.\nAnswer: {paid - total}"
    )


def _giving(g: Rng) -> str:
    one, two, thing = _pick(g, NAMES), _pick(g, NAMES), _pick(g, THINGS)
    start, given, found = _int(g, 30, 90), _int(g, 3, 29), _int(g, 2, 40)
    left = start - given
    return (
        f"{one} has {start} {thing}, gives {given} of them to {two} and then finds {found} more. "
        f"How many {thing} does {one} have now?\nAfter giving: {start} - {given} = {left}.\n"
        f"After finding: {left} + {found} = {left + found}.\nAnswer: {left + found}"
    )


def _equation(g: Rng) -> str:
    a, x, b = _int(g, 2, 15), _int(g, -12, 30), _int(g, 1, 60)
    c = a * x + b
    ask = _pick(g, ["Solve for x", "Find x", "Which x satisfies this"])
    return (
        f"{ask}: {a}x + {b} = {c}.\nSubtract {b} from both sides: {a}x = {c - b}.\n"
        f"Divide both sides by {a}: x = {x}.\nAnswer: x = {x}"
    )


def _percent(g: Rng) -> str:
    percent, base = 5 * _int(g, 1, 19), 20 * _int(g, 2, 60)
    part = percent * base // 100
    new = base - part
    thing = _pick(g, ["coat", "lamp", "bicycle", "camera", "desk", "radio"])
    return (
        f"A {thing} costs {base} and is reduced by {percent} percent. What is the new price?\n"
        f"{percent} percent of {base} is {percent} * {base} / 100 = {part}.\n"
        f"{base} - {part} = {new}.\nAnswer: {new}"
    )


def _fractions(g: Rng) -> str:
    b, d = _int(g, 2, 12), _int(g, 2, 12)
    a, c = _int(g, 1, b), _int(g, 1, d)
    top, bottom = a * d + c * b, b * d
    common = gcd(top, bottom)
    last = f"Divide both by {common}: " if common > 1 else "It is already in lowest terms: "
    return (
        f"Add {a}/{b} and {c}/{d}.\nThe common denominator is {b} * {d} = {bottom}.\n"
        f"{a}/{b} = {a * d}/{bottom} and {c}/{d} = {c * b}/{bottom}.\n"
        f"The sum is {top}/{bottom}. {last}{top // common}/{bottom // common}.\n"
        f"Answer: {top // common}/{bottom // common}"
    )


def _journey(g: Rng) -> str:
    speed, hours, stop = 5 * _int(g, 6, 24), _int(g, 2, 9), _int(g, 1, 3)
    how = _pick(g, ["train", "lorry", "bus", "cyclist", "boat"])
    return (
        f"A {how} covers {speed} km every hour for {hours} hours, rests for {stop} hours and goes "
        f"on for {stop} hours at the same speed. How far does it get?\n"
        f"First part: {speed} * {hours} = {speed * hours} km.\n"
        f"Second part: {speed} * {stop} = {speed * stop} km.\n"
        f"Together {speed * hours} + {speed * stop} = {speed * (hours + stop)} km.\n"
        f"Answer: {speed * (hours + stop)} km"
    )


def _sequence(g: Rng) -> str:
    first, step, n = _int(g, 1, 40), _int(g, 2, 17), _int(g, 8, 25)
    shown = ", ".join(str(first + step * i) for i in range(4))
    last = first + step * (n - 1)
    return (
        f"The sequence {shown}, ... goes on in equal steps. What is term number {n}?\n"
        f"The step is {first + step} - {first} = {step}.\n"
        f"Term {n} is {first} + {n - 1} * {step} = {first} + {step * (n - 1)} = {last}.\n"
        f"Answer: {last}"
    )


def _mean(g: Rng) -> str:
    mean, count = _int(g, 10, 60), _int(g, 3, 6)
    values = [mean + _int(g, -9, 9) for _ in range(count - 1)]
    values.append(mean * count - sum(values))
    shown = ", ".join(map(str, values))
    return (
        f"Find the mean of {shown}.\nTheir sum is {' + '.join(map(str, values))} = {sum(values)}.\n"
        f"There are {count} numbers, and {sum(values)} / {count} = {mean}.\nAnswer: {mean}"
    )


def _rectangle(g: Rng) -> str:
    a, b = _int(g, 3, 40), _int(g, 3, 40)
    what = _pick(g, ["garden", "field", "sheet", "floor", "board"])
    return (
        f"A rectangular {what} is {a} m long and {b} m wide. Give its area and its perimeter.\n"
        f"Area: {a} * {b} = {a * b} square metres.\n"
        f"Perimeter: 2 * ({a} + {b}) = 2 * {a + b} = {2 * (a + b)} metres.\n"
        f"Answer: {a * b} and {2 * (a + b)}"
    )


TEMPLATES: tuple[Template, ...] = (
    _sum, _product, _division, _shopping, _giving, _equation,
    _percent, _fractions, _journey, _sequence, _mean, _rectangle,
)  # fmt: skip


def problem_set(g: Rng) -> str:
    """One document: problems of different kinds in random order, numbered."""
    chosen = g.permutation(len(TEMPLATES))[:PROBLEMS_PER_SET]
    problems = [
        f"Problem {n}. {TEMPLATES[kind](g)}" for n, kind in enumerate(chosen.tolist(), start=1)
    ]
    return "\n\n".join(problems)
