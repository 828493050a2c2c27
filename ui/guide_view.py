"""What the guide tab shows of a walk: a job's progress, figures and answers side by side."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from backend.guide import QUESTIONS, Figures
from backend.job_events import JobProgress
from backend.jobs import Job
from ui.config_view import gigabytes, problem_html as problem, rounded
from ui.i18n import t
from ui.sentences import told

__all__ = ["about", "figures", "problem", "progress", "replies", "result"]


def about(step: str, locale: str) -> str:
    """Why one does this step."""
    return f'<p class="lmd-quiet">{escape(t(f"guide.why.{step}", locale))}</p>'


def progress(job: Job | None, found: JobProgress | None, command: str, locale: str) -> str:
    """How far a step's job is, or how it ended; nothing where none was started."""
    if job is None or found is None:
        return ""
    line = f'<code class="lmd-command">{escape(command)}</code>'
    if job.running:
        words = t("guide.running", locale, stage=found.stage or "…", done=found.done,
                  total=found.total)
        return (f'<p class="lmd-quiet lmd-busy" role="status">{escape(words)}</p>'
                f'<progress max="1" value="{found.share:.3f}"></progress>{line}')
    if job.state == "finished":
        return line
    words = told(found.error or {}, locale)
    return problem(words or t("guide.ended", locale, state=job.state)) + line


def figures(
    found: Mapping[str, Figures], step: str, judged: Mapping[str, bool], locale: str
) -> str:
    """A column a measured step."""
    if not found:
        return ""
    rows = {
        "weights": [f"{gigabytes(f.weight_bytes)} · {f.quantization or f.dtype}"
                    for f in found.values()],
        "per_token": [f"{f.kv_bytes_per_token:,} B · {f.kv_bits} bit" for f in found.values()],
        "tokens_fit": [f"{rounded(f.tokens_fit):,}" for f in found.values()],
        "ttft": [f"{f.ttft_s * 1e3:.0f} ms" for f in found.values()],
        "speed": [f"{f.tokens_per_s:.1f}" for f in found.values()],
        "perplexity": [f"{f.perplexity:.3f}" for f in found.values()],
        "loss": ["" if f.loss is None else f"{f.loss:+.4f}" for f in found.values()],
        "verdict": [t("guide.good_enough" if judged.get(name, f.passed) else "guide.not_enough",
                      locale) for name, f in found.items()],
    }
    head = "".join(
        f'<th{" class=lmd-here" if name == step else ""}>'
        f'{escape(t(f"guide.steps.{name}", locale))}</th>' for name in found
    )
    body = "".join(
        f'<tr><th>{escape(t(f"guide.rows.{name}", locale))}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        for name, cells in rows.items()
    )
    return (f'<div class="lmd-wide"><table class="lmd-table"><thead><tr><th></th>{head}</tr>'
            f"</thead><tbody>{body}</tbody></table></div>")


def replies(found: Mapping[str, Figures], locale: str) -> str:
    """The same questions to every step."""
    if not found:
        return ""
    head = "".join(f'<th>{escape(t(f"guide.steps.{name}", locale))}</th>' for name in found)
    body = "".join(
        f"<tr><th>{escape(question)}</th>"
        + "".join(f"<td>{escape(f.replies[number] if number < len(f.replies) else '')}</td>"
                  for f in found.values()) + "</tr>"
        for number, question in enumerate(QUESTIONS)
    )
    return (f'<details class="lmd-answers" open><summary>{escape(t("guide.answers", locale))}'
            '</summary><div class="lmd-wide"><table class="lmd-table lmd-text">'
            f"<thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div></details>")


def result(best: Figures | None, found: Mapping[str, Figures], locale: str) -> str:
    """What follows so far."""
    if not found:
        return ""
    if best is None:
        return problem(t("guide.none_good", locale))
    words = t("guide.recommended", locale, step=t(f"guide.steps.{best.step}", locale))
    return (f'<p class="lmd-said">{escape(words)}</p>'
            f'<code class="lmd-command">{escape(best.serve_command)}</code>')
