"""The style sheet of the HTML page of a grid."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1c1f23; --soft: #5d6570; --rule: #d9dde2;
  --hair: #eceef1; --paper: #fff; --link: #0072b2 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa3ae; --rule: #3a4048;
  --hair: #272c33; --paper: #15181c; --link: #56b4e9 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 74rem; padding: 3rem 2rem 5rem; color: var(--ink);
  background: var(--paper); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100% }
h1 { font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -0.015em;
  margin: 0 0 .75rem }
h2 { font-size: 1.15rem; font-weight: 650; margin: 3.25rem 0 .35rem; letter-spacing: -0.005em }
h3 { font-size: .95rem; font-weight: 600; margin: 1.75rem 0 .35rem }
p { margin: 0 0 .9rem; max-width: 46rem }
p.note, dd { color: var(--soft) }
p.note { font-size: .9rem }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; margin: .75rem 0 1.25rem }
table { border-collapse: collapse; font-size: .84rem; line-height: 1.35;
  font-variant-numeric: tabular-nums lining-nums; border-bottom: 1px solid var(--rule) }
th { font-weight: 600; text-align: right; vertical-align: bottom; white-space: nowrap;
  border-bottom: 1px solid var(--rule) }
th, td { padding: .26rem .7rem }
th:first-child, td:first-child { padding-left: 0 }
td { text-align: right; white-space: nowrap }
th.w, td.w { text-align: left }
td.v { white-space: normal; overflow-wrap: anywhere; text-align: left; min-width: 12rem }
tr.first > td { border-top: 1px solid var(--hair) }
td small { font-size: inherit; color: var(--soft) }
td i { position: absolute; padding-left: .15em; font-style: normal; font-weight: 700 }
td b { font-weight: 650 }
figure { margin: .9rem 0 1.4rem; padding: .8rem .9rem .6rem; background: #fff; color: #333;
  border: 1px solid var(--rule); border-radius: 6px; overflow-x: auto }
figure svg { display: block; width: 100%; height: auto }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif
  !important }
figure.one { max-width: 37rem }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; margin: 0 0 .5rem; font-size: .8rem }
.legend span { display: inline-flex; align-items: center; gap: .4rem; white-space: nowrap }
.legend svg { width: 2.4rem }
.panels { display: grid; gap: .9rem .5rem;
  grid-template-columns: repeat(var(--columns), minmax(0, 1fr)) }
dl { max-width: 46rem; margin: .75rem 0 }
dt { font-weight: 600; font-size: .92rem; margin-top: .7rem }
dd { margin: .1rem 0 0; font-size: .92rem }
@media (max-width: 40rem) { body { padding: 1.5rem 1rem 3rem } h1 { font-size: 1.4rem }
  h2 { margin-top: 2.4rem } figure { padding: .6rem }
  .panels { grid-template-columns: minmax(0, 1fr) } .panels div:empty { display: none }
  th, td { padding-inline: .5rem } }
@media print { :root { --ink: #000; --soft: #444; --rule: #bbb; --hair: #e4e4e4; --paper: #fff }
  body { padding: 0; max-width: none; font-size: 9pt } table { font-size: 7.5pt }
  th, td { padding-inline: .35rem } .scroll, figure { overflow: visible }
  figure, tr, .note { break-inside: avoid } h2, h3, .note { break-after: avoid } }
"""
