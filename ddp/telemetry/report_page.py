"""The report's HTML and styles: plain values in, a page out. All that users wrote is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ddp.telemetry.charts import Drawing

POLICY = "default-src 'none'; style-src 'unsafe-inline'"

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f5f7fa; --card: #ffffff; --line: #e1e6ed;
  --ink: #1b2430; --muted: #667182; --grid: #e7ebf0;
  --blue: #2563eb; --orange: #d9660a; --green: #15925a; --red: #d1344b;
  --violet: #7c4ddb; --teal: #0b8c9c; --sand: #b58a1b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #10151c; --card: #18202a; --line: #2a3441;
    --ink: #e8edf4; --muted: #97a3b4; --grid: #273140;
    --blue: #6ea0ff; --orange: #f5994a; --green: #45c28b; --red: #f2748a;
    --violet: #ab8bf5; --teal: #42bccb; --sand: #d8b04a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 1180px; margin: 0 auto; padding: 2.5rem clamp(1rem, 4vw, 2.5rem) 3rem; }
header { margin-bottom: 1.75rem; }
h1 { font-size: clamp(1.6rem, 4vw, 2.2rem); line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 .35rem; overflow-wrap: anywhere; }
h2 { font-size: 1.02rem; letter-spacing: -0.005em; margin: 0; }
header p { margin: 0; color: var(--muted); overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: .9rem; margin-bottom: .9rem; }
.card, figure, section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 1rem 1.15rem 1.05rem; }
.card dt { color: var(--muted); font-size: .86rem; overflow-wrap: anywhere; }
.card dd { margin: 0; }
.card .value { font-size: 1.7rem; line-height: 1.25; font-weight: 650; letter-spacing: -0.02em; font-variant-numeric: tabular-nums; margin: .2rem 0; }
.card .detail { color: var(--muted); font-size: .84rem; line-height: 1.4; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .9rem; }
figure { margin: 0; padding: 1.1rem 1.15rem; min-width: 0; display: flex; flex-direction: column; }
figure.wide { grid-column: 1 / -1; }
figure svg { display: block; width: 100%; height: auto; margin: .6rem 0 .3rem; }
figure svg text { font-family: inherit !important; }
figure ul { list-style: none; margin: .5rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem .95rem; }
figure li { display: flex; align-items: center; gap: .45rem; font-size: .84rem; color: var(--muted); }
figure i { width: 1.25rem; border-top: 2.5px solid var(--key); }
figure i.faint { opacity: .35; border-top-width: 1.5px; }
figure i.dashed { border-top-style: dashed; border-top-width: 2px; }
figure i.dotted { border-top-style: dotted; }
figure i.band { height: .75rem; border: 0; background: var(--key); opacity: .22; border-radius: 2px; }
figure i.hatched { width: 1.1rem; height: .75rem; border: 0; background: repeating-linear-gradient(135deg, var(--key) 0 1px, transparent 1px 4px); }
figure i.bar { width: .75rem; height: .75rem; border: 0; background: var(--key); border-radius: 2px; }
.on-narrow { display: none; }
figcaption { color: var(--muted); font-size: .84rem; line-height: 1.4; margin-top: auto; }
section { margin-top: .9rem; padding: 1.1rem 1.15rem; }
section + .charts { margin-top: .9rem; }
section p { margin: .6rem 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin-top: .6rem; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--muted); white-space: nowrap; }
th, td { padding: .38rem .9rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; white-space: nowrap; }
td.words { color: var(--muted); min-width: 10rem; }
.state { white-space: nowrap; }
summary { cursor: pointer; font-weight: 600; font-size: 1.02rem; }
pre { overflow-x: auto; margin: .8rem 0 0; font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
footer { color: var(--muted); font-size: .84rem; margin-top: 1.5rem; }
@media (max-width: 820px) {
  .charts { grid-template-columns: minmax(0, 1fr); }
  .on-narrow { display: block; }
  .on-wide, .words { display: none; }
  main { padding-top: 1.5rem; }
}
@media (max-width: 480px) {
  .cards { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .card { padding: .8rem .9rem; }
  .card .value { font-size: 1.35rem; }
}
@media print { body { background: none; } .card, figure, section { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class Card:
    """One number that matters, with what it is above and what to hold beside it below."""

    title: str
    value: str
    detail: str


@dataclass(frozen=True)
class Chart:
    """A figure; one with a `wide` drawing takes a whole row, and `drawing` where the page is narrow."""

    title: str
    drawing: Drawing
    caption: str
    wide: Drawing | None = None


@dataclass(frozen=True)
class Table:
    """A titled table; one without rows is left out. Each column is a heading and its class, see `table_html`."""

    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, ...]]


def page(
    *,
    title: str,
    subtitle: str,
    note: str,
    cards: Sequence[Card],
    charts: Sequence[Chart],
    tables: Sequence[Table],
    job_text: str,
    made: str,
) -> str:
    """A run's page."""
    body = cards_html(cards) + charts_html(charts) + "".join(map(_table, tables)) + _job(job_text)
    return document(title=title, notes=(subtitle, note), body=body, footer=f"Made {made} from run.db.")


def document(*, title: str, notes: Sequence[str], body: str, footer: str) -> str:
    """The whole document around `body`, which is HTML; well-formed XML too, but for its first line."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<h1>{escape(title)}</h1>
{"".join(f"<p>{escape(note)}</p>" for note in notes)}
</header>
{body}<footer>{escape(footer)}</footer>
</main>
</body>
</html>
"""


def cards_html(cards: Sequence[Card]) -> str:
    return f'<dl class="cards">\n{"".join(map(_card, cards))}</dl>\n'


def charts_html(charts: Sequence[Chart]) -> str:
    return f'<div class="charts">\n{"".join(map(_figure, charts))}</div>\n'


def _card(card: Card) -> str:
    return (
        f'<div class="card"><dt>{escape(card.title)}</dt><dd><div class="value">{escape(card.value)}</div>'
        f'<div class="detail">{escape(card.detail)}</div></dd></div>\n'
    )


def _figure(chart: Chart) -> str:
    svg = chart.drawing.svg
    if chart.wide is not None:
        svg = f'<div class="on-narrow">{svg}</div><div class="on-wide">{chart.wide.svg}</div>'
    kind = ' class="wide"' if chart.wide else ""
    legend = "".join(
        f'<li><i class="{key.style}" style="--key: var(--{key.colour})"></i>{escape(key.label)}</li>'
        for key in chart.drawing.legend
    )
    legend = f"<ul>{legend}</ul>" if legend else ""
    title, caption = escape(chart.title), escape(chart.caption)
    return f"<figure{kind}><h2>{title}</h2>{legend}\n{svg}<figcaption>{caption}</figcaption></figure>\n"


def _table(table: Table) -> str:
    headings, kinds = zip(*table.columns, strict=True)
    return table_html(table.title, headings, kinds, table.rows)


def table_html(title: str, headings: Sequence[str], kinds: Sequence[str], rows: Sequence[tuple[str, ...]]) -> str:
    """A titled table; empty without rows. `kinds` are the columns' classes: number, state, words or "" for text."""
    if not rows:
        return ""
    head = "".join(f'<th class="{kind}">{escape(name)}</th>' for kind, name in zip(kinds, headings, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<section><h2>{escape(title)}</h2><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div></section>\n"
    )


def _job(text: str) -> str:
    if not text:
        return ""
    return f"<section><details><summary>Job file</summary><pre>{escape(text)}</pre></details></section>\n"
