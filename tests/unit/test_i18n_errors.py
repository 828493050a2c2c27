"""The backend's sentences in Chinese: templates as the source has them, values kept."""

from __future__ import annotations

import ast
import json
import string
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from backend.config import EngineConfig, SamplingParams, validate
from backend.engine_manager import RepliesOpenError
from backend.errors import ContextLengthError, UserError
from backend.job_events import JobProgress
from backend.jobs import Job
from quantize.verdict import Comparison, Measured, judge
from ui import i18n, job_view
from ui.answer import sentence
from ui.sentences import LONGEST, Template, error_text, templates, translated

ROOT = Path(__file__).resolve().parents[2]
LOCALES = [path.parent.name for path in i18n.LOCALES.glob(f"*/{i18n.ERRORS}")]
CATALOGUE = json.loads((i18n.LOCALES / "zh-CN" / i18n.ERRORS).read_text(encoding="utf-8"))
ZH = "zh-CN"


def short(value: ast.expr) -> str:
    """The name that a placeholder gets for an f-string's expression."""
    match value:
        case ast.Name():
            return value.id
        case ast.Attribute():
            return value.attr
        case ast.Subscript():
            return short(value.value)
        case ast.Call(args=[argument, *_]):
            return short(argument)
        case ast.Call():
            return short(value.func)
        case ast.ListComp() | ast.GeneratorExp() | ast.SetComp():
            return short(value.generators[0].iter)
        case ast.IfExp():
            return short(value.body)
        case ast.BinOp():
            return short(value.left)
    return "value"


def template(node: ast.Constant | ast.JoinedStr) -> str:
    """A string of the source as a template; another expression of the same name is "name2"."""
    if isinstance(node, ast.Constant):
        return escaped(node.value).strip()
    text, names = "", dict[str, str]()  # of expressions
    for part in node.values:
        if isinstance(part, ast.FormattedValue):
            name, source = short(part.value), ast.unparse(part.value)
            number = sum(known.rstrip("23456789") == name for known in names.values()) + 1
            names.setdefault(source, name if number == 1 else f"{name}{number}")
            text += f"{{{names[source]}}}"
        else:
            text += escaped(part.value)
    return text.strip()


def escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


@cache
def sources() -> frozenset[str]:
    """Every string of the backend, quantize and ui. More than the errors: hints, reasons and bounds
    come as constants, branches and helpers' results as well."""
    return frozenset(
        template(node)
        for folder in ("backend", "quantize", "ui")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str)))


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def entries() -> Iterator[tuple[str, str]]:
    for locale in LOCALES:
        yield from json.loads(
            (i18n.LOCALES / locale / i18n.ERRORS).read_text(encoding="utf-8")).items()


def test_every_sentence_is_still_in_the_source() -> None:
    assert {english for english, _ in entries()} - sources() == set()


def test_both_languages_have_the_same_placeholders() -> None:
    for english, translation in entries():
        assert placeholders(english) == placeholders(translation), english
        assert translation, english


def test_a_template_has_words_of_its_own() -> None:
    """One that is all placeholders would fit whatever is said."""
    for english, _ in entries():
        assert any(c.isalpha() for c in "".join(Template.of(english, "").pieces)), english


# No letter of a template's own words, so that a value is no part of a sentence by chance.
VALUES = st.text("αβγδ文字0123456789/_-'", min_size=1, max_size=12)


@given(entry=st.sampled_from(sorted(CATALOGUE.items())), data=st.data())
def test_any_values_are_kept(entry: tuple[str, str], data: st.DataObject) -> None:
    english, translation = entry
    values = {name: data.draw(VALUES, name) for name in sorted(placeholders(english))}
    assert translated(english.format(**values), ZH) == translation.format(**values)


@pytest.mark.parametrize("values", [
    "αβ", "/home/me/a model.bin", "{braces}", "100 %", "a.b", "<b>", "\\1", "C:\\x",
])
def test_odd_values_are_kept(values: str) -> None:
    assert translated(f"There is no model {values}.", ZH) == f"没有模型 {values}。"


@pytest.mark.parametrize("text", [
    "A prompt that nobody wrote is missing.",
    "x was read as an API key.",
    "m.bin holds x in a form that is not supported.",
    "The weather must be fine, not bad or worse.",
])
def test_a_weak_template_does_not_swallow_another_sentence(text: str) -> None:
    assert translated(text, ZH) == text


def test_what_is_unknown_and_what_has_no_catalogue_stays_english() -> None:
    assert translated("A sentence that nobody wrote.", ZH) == "A sentence that nobody wrote."
    assert translated("No model is loaded.", "en") == "No model is loaded."
    assert translated("No model is loaded.", "tlh") == "No model is loaded."
    assert templates("en") == templates("tlh") == ()
    assert translated("", ZH) == ""


def test_errors_of_the_backend() -> None:
    with pytest.raises(UserError) as caught:
        SamplingParams(temperature=7.0)
    assert sentence(caught.value, ZH) == "temperature 应为 0.0 到 2.0，而不是 7.0。"
    assert sentence(caught.value, "en") == str(caught.value)
    with pytest.raises(UserError) as caught:
        validate(EngineConfig(model="m", kv_cache_dtype="int3"))
    assert sentence(caught.value, ZH) == (
        "kv_cache_dtype 只能是 auto, int8, int4 之一，而不是 'int3'。")
    assert sentence(RepliesOpenError(3), ZH) == (
        "当前加载的模型还有回复没有写完（3 条）。请等待，或同意中断它们。")
    assert sentence(UserError(i18n.t("error.not_offered", value="'x'")), ZH) == "'x' 不在可选项中。"


def test_message_and_hint_are_said_each_by_itself() -> None:
    error = ContextLengthError("The prompt is empty.", "A hint of no catalogue.")
    assert error_text(error, ZH) == "提示词是空的。A hint of no catalogue."
    assert error_text(UserError("Nobody's words.", "Try again."), ZH) == "Nobody's words. 请重试。"
    joined = str(UserError("There is no model x.y.", "Try again."))  # as a status has it
    assert translated(joined, ZH) == "没有模型 x.y。请重试。"


def test_a_sentence_in_a_sentence() -> None:
    text = "The chat history cannot be used: it does not answer."
    assert translated(text, ZH) == "无法使用对话历史：没有应答。"


@pytest.mark.parametrize(("english", "chinese"), [
    ("The api_server at http://x:1 needs an API key. Enter the key it was started with.",
     "http://x:1 的 api_server 需要 API 密钥。请输入启动它时设置的密钥。"),
    ("new could not be loaded: The weights are damaged. Download the model again. old is served "
     "again.",
     "new 加载失败：权重已损坏。请重新下载模型。已恢复服务 old。"),
    ("One block of this model needs about 2.0 GB of memory, and the GPU has 1.0 GB free.",
     "这个模型的一个块约需 2.0 GB 内存，而 GPU 只有 1.0 GB 可用。"),
    ("huggingface.co has no such model, or it is private and needs a token.",
     "huggingface.co 上没有这个模型，或者它是私有的，需要令牌。"),
    ("huggingface.co cannot be used now: it answered with status 503.",
     "暂时无法使用 huggingface.co：应答的状态码为 503。"),
    ("c4 cannot be had here: https://h does not answer (refused). Calibrated on the bundled "
     "English and Chinese text instead.",
     "在这里无法取得 c4：https://h 没有应答（refused）。改用自带的中英文文本校准。"),
])
def test_whole_sentences(english: str, chinese: str) -> None:
    assert translated(english, ZH) == chinese


def test_strangers_texts_take_no_long() -> None:
    began = time.monotonic()
    for text in (" of memory, and", "{name} must be , not ", ". ", "a b refuses: c d failed: ",
                 "a b is missing. ", "x is no model. Try again. "):
        long = text * (LONGEST // len(text))
        translated(long, ZH)
        assert translated(long * 2, ZH) == long * 2
    assert time.monotonic() - began < 60


def measured(nats: float) -> Measured:
    return Measured("m", nats, 1, 1, "float32", ("a",), 1.0)


@pytest.mark.parametrize(("loss", "words"), [
    (0.0123, "合格：模型比原模型每 token 差 0.0123 nat（损失的 95% 区间为 0.0100 到 0.0200），"
             "困惑度由 7.39 变为 7.48，98.5% 的 token 与原模型一致；允许最多 0.05 nat。"),
    (-0.5, "合格：模型比原模型每 token 好 0.5000 nat（"),
    (0.5, "不合格：模型比原模型每 token 差 0.5000 nat（"),
    (None, "已测量：困惑度 7.48；"),
])
def test_a_job_in_chinese(loss: float | None, words: str) -> None:
    """Its notes, its verdict and its error."""
    comparison = None if loss is None else Comparison(loss, 0.01, 0.02, 0.1, 0.985)
    verdict = judge(measured(2.0123), None if loss is None else measured(2.0), comparison,
                    threshold=0.05, vocab_size=100, tokens=1, documents=1, text="", prompts=("p",))
    note = "Calibrated on x.txt. Only its first 16 MiB were read."
    job = Job("1", "quantize", "m", ("lite",), {}, 0.0, 0.0, "failed", 2, 1.0, False)
    progress = JobProgress(notes=[note], result={"verdict": verdict.as_dict()}, error={
        "message": "The folder /x exists already.", "hint": "Choose another --work-dir."})
    shown = job_view.job_html(job, progress, "", ZH)
    assert words in shown
    assert "校准文本：x.txt。只读取了开头 16 MiB。" in shown
    assert "文件夹 /x 已存在。请换一个 --work-dir。" in shown
    english = job_view.job_html(job, progress, "", "en")
    assert note in english and "The folder /x exists already. Choose another" in english
