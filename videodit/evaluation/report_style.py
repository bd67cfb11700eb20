"""The report page's style sheet and script. Both go into the page itself: it loads nothing, from disk or network."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #1d1e22; --soft: #5d6069; --line: #e3e3de; --shade: #efefeb;
  --accent: #2c5fc4; --heat: #2c5fc4; --on-heat: #ffffff;
  --good: #0f6b4c; --good-bg: #e2f3ea; --bad: #a3301f; --bad-bg: #fbe7e2; --tag: #5b3fa8; --tag-bg: #ece7fa;
  --s0: #2c5fc4; --s1: #b8560b; --s2: #0f7a5a; --s3: #a02c76; --s4: #6b6f78;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131417; --card: #1b1d21; --ink: #ececef; --soft: #a0a4ae; --line: #2d3036; --shade: #24272c;
    --accent: #8db0ff; --heat: #7ba2f7; --on-heat: #10131a;
    --good: #6bd6a4; --good-bg: #17332a; --bad: #ff9d8a; --bad-bg: #3d211d; --tag: #c3b1ff; --tag-bg: #2c2545;
    --s0: #8db0ff; --s1: #f0a35e; --s2: #5fd0a5; --s3: #ec8fc6; --s4: #a0a4ae;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
main, header, footer { max-width: 1140px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 52px; }
.brand { display: flex; align-items: center; gap: 9px; color: var(--soft); font-size: 14px; font-weight: 600; }
.brand svg { width: 21px; height: 21px; fill: none; stroke: var(--accent); stroke-width: 1.7; }
h1 {
  font-size: clamp(28px, 5vw, 42px); line-height: 1.14; letter-spacing: -0.022em; margin: 12px 0 12px;
  text-wrap: balance;
}
.verdict {
  font-size: clamp(17px, 2.2vw, 20px); color: var(--soft); max-width: 52em; margin: 0 0 30px;
  text-wrap: pretty;
}
section { margin: 56px 0; }
h2 { font-size: 23px; letter-spacing: -0.012em; margin: 0 0 4px; }
h3 { font-size: 16px; margin: 0 0 10px; }
.lead { color: var(--soft); margin: 0 0 18px; max-width: 52em; }
.head { display: flex; gap: 16px; align-items: center; justify-content: space-between; }
button {
  font: inherit; font-size: 14px; color: var(--ink); background: var(--card); border: 1px solid var(--line);
  border-radius: 999px; padding: 6px 16px; cursor: pointer; white-space: nowrap;
}
button:hover { border-color: var(--accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 18px 20px;
  min-width: 0;
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px; }
.tile { padding: 15px 18px; }
.tile b {
  display: block; font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; font-weight: 650;
  white-space: nowrap;
}
.tile small { font-size: 0.58em; font-weight: 500; color: var(--soft); letter-spacing: 0; margin-left: 3px; }
.tile span { color: var(--soft); font-size: 14px; display: block; }
.clips {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(166px, 1fr)); gap: 14px; margin: 0 0 30px;
  align-items: start;
}
.clip { padding: 0; margin: 0; overflow: hidden; display: flex; flex-direction: column; }
.clip video { border-bottom: 1px solid var(--line); }
video { display: block; width: 100%; image-rendering: pixelated; background: var(--shade); }
.clip figcaption {
  padding: 11px 13px 13px; font-size: 14px; line-height: 1.42; display: flex; flex-direction: column;
  gap: 9px; flex: 1;
}
.marks { display: flex; flex-wrap: wrap; gap: 5px; margin-top: auto; }
.mark { font-size: 12.5px; line-height: 1.5; padding: 1px 8px; border-radius: 999px; white-space: nowrap; }
.ok { color: var(--good); background: var(--good-bg); }
.no { color: var(--bad); background: var(--bad-bg); }
.mark.wrap { white-space: normal; border-radius: 9px; }
.from { font-size: 12.5px; color: var(--soft); overflow-wrap: anywhere; }
.tag { color: var(--tag); background: var(--tag-bg); font-weight: 600; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(256px, 1fr)); gap: 14px; }
.pair { margin: 0; padding: 12px; }
.pair > div { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
.pair video { border-radius: 8px; outline: 1px solid var(--line); }
.pair span, .pair figcaption { font-size: 13px; color: var(--soft); display: block; padding-top: 5px; }
.pair figcaption { border-top: 1px solid var(--line); margin-top: 9px; padding-top: 8px; }
.pair figcaption b { color: var(--ink); }
.two {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px;
  align-items: start;
}
.gap { margin-top: 14px; }
.chart { display: block; width: 100%; height: auto; }
.chart text { fill: var(--soft); font-size: 12.5px; font-family: inherit; }
.chart .grid { stroke: var(--line); stroke-width: 1; }
.chart .axis { stroke: var(--soft); stroke-width: 1; opacity: 0.55; }
.chart path { fill: none; stroke: var(--c); stroke-linejoin: round; stroke-linecap: round; }
.chart .line { stroke-width: 2.2; }
.chart .raw { stroke-width: 1; opacity: 0.3; }
.chart .dot { fill: var(--c); }
.chart .bin { fill: var(--accent); } .chart .bin.out { opacity: 0.3; }
.chart .limit { stroke: var(--bad); stroke-width: 1.6; stroke-dasharray: 5 4; }
.s0 {
  --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3);
  } .s4 { --c: var(--s4);
}
.legend { display: flex; flex-wrap: wrap; gap: 3px 16px; font-size: 13.5px; color: var(--soft); margin: -6px 0 8px; }
.legend i {
  display: inline-block; width: 14px; height: 3px; border-radius: 2px; background: var(--c);
  margin-right: 6px; vertical-align: middle;
}
.legend b { color: var(--ink); font-weight: 600; }
.empty { color: var(--soft); margin: 0; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; width: 100%; }
.measured th, .measured td {
  text-align: left; padding: 11px 14px 11px 0; border-bottom: 1px solid var(--line); vertical-align: top;
}
.measured tr:last-child > * { border-bottom: 0; padding-bottom: 2px; }
.measured thead th { font-size: 13.5px; color: var(--soft); font-weight: 600; padding-top: 0; }
.measured tbody th { font-weight: 600; font-size: 15px; line-height: 1.4; min-width: 168px; }
.measured th small, .measured td small {
  display: block; font-weight: 400; color: var(--soft); font-size: 13px; white-space: nowrap;
}
.measured tbody th small { white-space: normal; }
.measured td { min-width: 104px; }
.scroll tbody th { position: sticky; left: 0; z-index: 1; background: var(--card); }
.meter {
  position: relative; display: block; height: 6px; margin: 7px 4px 3px; border-radius: 3px;
  background: var(--shade);
}
.meter::before {
  content: ""; position: absolute; inset: 0 calc(100% - var(--hi)) 0 var(--lo); border-radius: 3px;
  background: var(--accent); opacity: 0.42;
}
.meter::after {
  content: ""; position: absolute; left: calc(var(--p) - 4px); top: -1px; width: 8px; height: 8px;
  border-radius: 50%; background: var(--accent);
}
.meter i { position: absolute; left: var(--chance); top: -3px; width: 2px; height: 12px; background: var(--soft); }
.note { font-size: 13.5px; color: var(--soft); margin: 14px 0 0; }
.heat { width: auto; font-size: 13px; border-collapse: separate; border-spacing: 3px; }
.heat th { font-weight: 500; color: var(--soft); padding: 2px 8px 2px 0; text-align: right; white-space: nowrap; }
.heat thead th { writing-mode: vertical-rl; transform: rotate(180deg); padding: 6px 0 2px; text-align: left; }
.heat td {
  width: 38px; min-width: 34px; height: 32px; text-align: center; border-radius: 5px;
  background: color-mix(in oklab, var(--heat) calc(var(--v) * 100%), var(--shade));
}
.heat td.hot { color: var(--on-heat); }
.heat td.self { box-shadow: inset 0 0 0 1.5px var(--soft); }
.stages td, .stages th { padding: 6px 0; text-align: left; font-weight: 400; }
.stages th { padding-right: 16px; white-space: nowrap; width: 1%; }
.stages td:last-child { text-align: right; white-space: nowrap; width: 1%; padding-left: 16px; color: var(--soft); }
.bar { display: block; height: 10px; border-radius: 5px; background: var(--accent); width: max(3px, var(--w)); }
.stages tfoot > tr > * { border-top: 1px solid var(--line); font-weight: 600; padding-top: 10px; color: var(--ink); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 6px 18px; margin: 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
details { border-top: 1px solid var(--line); }
details:first-of-type { border-top: 0; }
summary { cursor: pointer; padding: 12px 2px; font-weight: 600; }
pre {
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-x: auto;
  background: var(--shade); border-radius: 10px; padding: 14px 16px; margin: 0 0 14px;
}
.configs { padding: 4px 20px; }
footer { color: var(--soft); font-size: 13.5px; padding-bottom: 52px; }
@media (max-width: 560px) {
  main, header, footer { padding-left: 16px; padding-right: 16px; }
  header { padding-top: 30px; }
  section { margin: 42px 0; }
  .card { padding: 15px; }
  .clips { grid-template-columns: 1fr 1fr; gap: 10px; }
  .clip { padding: 0; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 12px 14px; }
  .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .tile b { font-size: 25px; }
  .chart text { font-size: 14px; }
  .measured tbody th { min-width: 124px; padding-right: 10px; }
  .heat td { width: 30px; min-width: 27px; height: 29px; }
  .configs { padding: 2px 15px; }
}
"""

# Clips out of sight rest, so that a page of many stays light; the button, or a wish for reduced motion, pauses all.
SCRIPT = """
const videos = [...document.querySelectorAll('video')], button = document.getElementById('pause'), visible = new Set();
let playing = !matchMedia('(prefers-reduced-motion: reduce)').matches;
const apply = () => {
  for (const v of videos) playing && visible.has(v) ? v.play().catch(() => {}) : v.pause();
  if (button) button.textContent = playing ? 'Pause clips' : 'Play clips';
};
const watch = new IntersectionObserver(entries => {
  for (const e of entries) e.isIntersecting ? visible.add(e.target) : visible.delete(e.target);
  apply();
});
videos.forEach(v => watch.observe(v));
for (const pair of document.querySelectorAll('.pair')) {  // a reconstruction keeps step with its original
  const [a, b] = pair.querySelectorAll('video');
  a.onseeked = () => { b.currentTime = a.currentTime; };  // a loop's restart is a seek
}
if (button) { button.hidden = false; button.onclick = () => { playing = !playing; apply(); }; }
apply();
"""
