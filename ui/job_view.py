"""A job as HTML: state, progress, speed, errors of layers, verdict, log. Pure functions."""

from __future__ import annotations

import time
from html import escape
from typing import Any

from backend.hub.fetch import gigabytes
from backend.job_events import JobProgress
from backend.jobs import Job
from ui.benchmark_view import benchmark_html
from ui.i18n import t
from ui.sentences import told, translated

BARS = 96  # of the plot, at most; neighbours of longer models share one


def job_html(job: Job, progress: JobProgress, log: str, locale: str) -> str:
    """Everything about one job."""
    error = progress.error
    parts = [
        f'<div class="lmd-job-head"><span class="lmd-job-title">{escape(job.title)}</span>'
        f"{state_html(job, locale)}</div>",
        progress_html(job, progress, locale),
        plot_html(progress.losses, locale),
        benchmark_html(progress.benchmark, locale),
        "".join(f'<p class="lmd-note">{escape(translated(note, locale))}</p>'
                for note in progress.notes[-4:]),
        verdict_html(progress.result, locale),
    ]
    if error:
        parts.append(problem_html(told(error, locale)))
    elif job.state == "died":
        parts.append(problem_html(t("job.died", locale)))
    parts.append(command_html(job.command_line, locale))
    if log.strip():
        parts.append(f'<details class="lmd-log"><summary>{escape(t("job.log", locale))}</summary>'
                     f"<pre>{escape(log)}</pre></details>")
    body = "".join(parts)
    return f'<div class="lmd-job" data-job="{job.id}" data-state="{job.state}">{body}</div>'


def state_html(job: Job, locale: str) -> str:
    """Its state in a word."""
    word = escape(t(f"job.state.{job.state}", locale))
    return f'<span class="lmd-pill" data-state="{job.state}">{word}</span>'


def progress_html(job: Job, progress: JobProgress, locale: str) -> str:
    """A bar, and what it counts: bytes of a download, steps of other jobs."""
    share = 1.0 if job.state == "finished" else progress.share
    figures = progress.figures
    words = []
    if "bytes_per_s" in figures:
        words.append(t("job.bytes", locale, done=gigabytes(progress.done),
                       total=gigabytes(progress.total)))
        if job.running:
            words.append(t("job.rate", locale, rate=gigabytes(figures["bytes_per_s"])))
    elif progress.total:
        words.append(t("job.steps", locale, stage=progress.stage, done=progress.done,
                       total=progress.total))
    if job.running and progress.eta_s is not None and progress.total:
        words.append(t("job.eta", locale, time=clock(progress.eta_s)))
    seconds = (job.ended or time.time()) - job.started
    words.append(t("job.took", locale, time=clock(max(seconds, 0))))
    text = escape(" · ".join(words))
    return (f'<div class="lmd-progress" role="progressbar" aria-valuenow="{share * 100:.0f}">'
            f'<span style="width:{share * 100:.1f}%"></span></div>'
            f'<p class="lmd-figures">{text}</p>')


def plot_html(losses: list[float], locale: str) -> str:
    """The error of each layer as bars; nothing where none was told."""
    if not losses:
        return ""
    width = -(-len(losses) // BARS)
    grouped = [max(losses[i:i + width]) for i in range(0, len(losses), width)]
    top = max(grouped) or 1.0
    bars = "".join(
        f'<span style="height:{max(value / top * 100, 2):.1f}%" title="{i * width}: {value:.3g}">'
        "</span>" for i, value in enumerate(grouped))
    caption = escape(t("job.losses", locale, layers=len(losses), most=f"{max(losses):.3g}"))
    return f'<figure class="lmd-plot"><div>{bars}</div><figcaption>{caption}</figcaption></figure>'


def verdict_html(result: dict[str, Any] | None, locale: str) -> str:
    """What a quantized model is worth, beside its original."""
    verdict = (result or {}).get("verdict")
    if not verdict:
        return ""
    models = [m for m in (verdict.get("against"), verdict["model"]) if m]
    rows = (
        ("verdict.perplexity", [_number(m["perplexity"]) for m in models]),
        ("verdict.disk", [gigabytes(m["disk_bytes"]) for m in models]),
        ("verdict.memory", [gigabytes(m["memory_bytes"]) for m in models]),
    )
    names = "".join(f"<th>{escape(t(key, locale))}</th>"
                    for key in ("verdict.original", "verdict.result")[2 - len(models):])
    body = "".join(
        f"<tr><th scope=row>{escape(t(key, locale))}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>" for key, cells in rows)
    word = "passed" if verdict["passed"] else "failed"
    replies = "".join(
        f"<dt>{escape(prompt)}</dt>" + "".join(
            f"<dd>{escape(' '.join(m['replies'][i].split())[:300])}</dd>" for m in models)
        for i, prompt in enumerate(verdict["prompts"]))
    return (f'<section class="lmd-verdict" data-verdict="{word}">'
            f"<strong>{escape(t(f'verdict.{word}', locale))}</strong>"
            f"<p>{escape(translated(verdict['sentence'], locale))}</p>"
            f"<table><thead><tr><th></th>{names}</tr></thead><tbody>{body}</tbody></table>"
            f'<details><summary>{escape(t("verdict.replies", locale))}</summary>'
            f"<dl>{replies}</dl></details></section>")


def command_html(command: str, locale: str) -> str:
    """The same in a terminal."""
    return (f'<div class="lmd-command"><span>{escape(t("job.command", locale))}</span>'
            f"<code>{escape(command)}</code></div>")


def problem_html(words: str) -> str:
    """What went wrong, in place."""
    return f'<p class="lmd-problem" role="alert">{escape(words)}</p>'


def clock(seconds: float) -> str:
    """1:05, or 2:03:04."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
