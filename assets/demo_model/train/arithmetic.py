"""Arithmetic on small numbers: questions in digits and words, answers as plain equations."""

from __future__ import annotations

import random

from assets.demo_model.train.knowledge import Reply, load, patterns

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
CHINESE_DIGITS = "零一二三四五六七八九"
SIGNS = {"add": "+", "subtract": "-", "multiply": "×", "divide": "÷"}


def english_words(number: int) -> str:
    """0..999 in words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens - 2] + (f"-{ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{ONES[hundreds]} hundred" + (f" and {english_words(rest)}" if rest else "")


def chinese_words(number: int) -> str:
    """0..999 in Chinese numerals."""
    if number < 10:
        return CHINESE_DIGITS[number]
    if number < 20:
        return "十" + (CHINESE_DIGITS[number % 10] if number % 10 else "")
    if number < 100:
        tens, ones = divmod(number, 10)
        return CHINESE_DIGITS[tens] + "十" + (CHINESE_DIGITS[ones] if ones else "")
    hundreds, rest = divmod(number, 100)
    tail = chinese_words(rest) if rest >= 20 else "一" + chinese_words(rest)
    if 0 < rest < 10:
        tail = "零" + chinese_words(rest)
    return CHINESE_DIGITS[hundreds] + "百" + (tail if rest else "")


def operands(rng: random.Random, operation: str) -> tuple[int, int]:
    """Two numbers; for a division the quotient is whole."""
    if operation == "multiply":
        high = 12 if rng.random() < 0.75 else 20
        return rng.randint(0, high), rng.randint(0, high)
    if operation == "divide":
        divisor, quotient = rng.randint(1, 12), rng.randint(0, 12)
        return divisor * quotient, divisor
    if rng.random() < 0.25:
        return rng.randint(0, 20), rng.randint(0, 20)
    high = 200 if rng.random() < 0.1 else 100
    return rng.randint(0, high), rng.randint(0, high)


def result(operation: str, a: int, b: int) -> int:
    """The exact result. Raises ValueError for a division that is not whole."""
    if operation == "add":
        return a + b
    if operation == "subtract":
        return a - b
    if operation == "multiply":
        return a * b
    if b == 0 or a % b:
        raise ValueError(f"{a} / {b} is not whole")
    return a // b


def equation(operation: str, a: int, b: int) -> Reply:
    """The answer: ``12 + 30 = 42.``"""
    value = result(operation, a, b)
    text = f"{a} {SIGNS[operation]} {b} = {value}"
    return Reply(f"{text}.", f"{text}。", intent="arithmetic", value=value)


class Arithmetic:
    """Asks and answers sums."""

    def __init__(self) -> None:
        table = load("arithmetic")
        self.direct = {
            language: {op: patterns(table[language][op]) for op in SIGNS}
            for language in ("en", "zh")
        }
        self.stories = {
            language: {op: patterns(table[language]["story"][op]) for op in SIGNS}
            for language in ("en", "zh")
        }
        self.next_step = {
            language: {op: patterns(table[language]["next"][op]) for op in SIGNS}
            for language in ("en", "zh")
        }
        self.special = {
            language: {k: patterns(v) for k, v in table[language]["special"].items()}
            for language in ("en", "zh")
        }
        self.things: dict[str, list[str]] = {k: table[k]["things"] for k in ("en", "zh")}

    def _written(self, rng: random.Random, language: str, number: int) -> str:
        if rng.random() < 0.75:
            return str(number)
        return chinese_words(number) if language == "zh" else english_words(number)

    def question(self, rng: random.Random, language: str) -> tuple[str, Reply]:
        """A question and its answer."""
        kind = rng.random()
        if kind < 0.1:
            return self._special(rng, language)
        operation = rng.choices(tuple(SIGNS), (4, 4, 3, 2))[0]
        a, b = operands(rng, operation)
        if kind < 0.2:
            if operation == "subtract":
                a, b = max(a, b), min(a, b)
            text = rng.choice(self.stories[language][operation]).expand(rng)
            text = text.replace("{thing}", rng.choice(self.things[language]))
        else:
            text = rng.choice(self.direct[language][operation]).expand(rng)
        words = rng.random()
        if words < 0.2:
            first, second = self._written(rng, language, a), self._written(rng, language, b)
        else:
            first, second = str(a), str(b)
        text = text.replace("{a}", first).replace("{b}", second)
        if rng.random() < 0.15:
            text = text.replace(" ", "") if language == "zh" or "+" in text else text
        return text, equation(operation, a, b)

    def following(self, rng: random.Random, language: str, value: int) -> tuple[str, Reply]:
        """``plus 5?`` after a result."""
        operation = rng.choices(tuple(SIGNS), (4, 4, 2, 1))[0]
        b = rng.randint(1, 20 if rng.random() < 0.6 else 50)
        if operation == "multiply":
            b = rng.randint(2, 12 if abs(value) <= 12 else 3)
        elif operation == "divide":
            whole = [n for n in range(2, 13) if value % n == 0]
            if not whole or value <= 0:
                operation = "add"
            else:
                b = rng.choice(whole)
        text = rng.choice(self.next_step[language][operation]).expand(rng)
        return text.replace("{b}", str(b)), equation(operation, value, b)

    def _special(self, rng: random.Random, language: str) -> tuple[str, Reply]:
        """Doubles, halves, squares, larger and smaller, remainders, zero, numbers too large."""
        kind = rng.choice(tuple(self.special[language]))
        text = rng.choice(self.special[language][kind]).expand(rng)
        a, b = rng.randint(0, 100), rng.randint(0, 100)
        if kind == "double":
            reply = equation("multiply", 2, a)
        elif kind == "half":
            a *= 2
            reply = equation("divide", a, 2)
        elif kind == "square":
            a = rng.randint(0, 20)
            reply = equation("multiply", a, a)
        elif kind in ("larger", "smaller"):
            b += a == b
            high, low = max(a, b), min(a, b)
            if kind == "larger":
                reply = Reply(f"{high} is larger than {low}.", f"{high} 比 {low} 大。")
            else:
                reply = Reply(f"{low} is smaller than {high}.", f"{low} 比 {high} 小。")
        elif kind == "remainder":
            b = rng.randint(2, 12)
            whole, rest = divmod(a, b)
            if rest:
                reply = Reply(
                    f"{a} ÷ {b} = {whole} remainder {rest}.", f"{a} ÷ {b} = {whole} 余 {rest}。"
                )
            else:
                reply = equation("divide", a, b)
        elif kind == "zero":
            reply = Reply("Division by zero is not defined.", "不能除以零。")
        elif kind == "three":
            a, b, c = (rng.randint(0, 30) for _ in range(3))
            text = text.replace("{c}", str(c))
            value = a + b + c
            reply = Reply(
                f"{a} + {b} + {c} = {value}.", f"{a} + {b} + {c} = {value}。", value=value
            )
        else:  # too large
            a, b = rng.randint(1000, 99999), rng.randint(200, 99999)
            reply = Reply(
                "These numbers are too large for me. I calculate with small numbers, up to 100; "
                "please use a calculator.",
                "这些数字对我来说太大了。我只会 100 以内的计算，请用计算器。",
            )
        return text.replace("{a}", str(a)).replace("{b}", str(b)), reply
