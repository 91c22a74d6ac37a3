"""How the page looks: system fonts, one accent, light and dark as the browser is; nothing is fetched for it."""

from __future__ import annotations

import gradio as gr

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Hiragino Sans", "Yu Gothic UI", "Noto Sans", sans-serif'
MONO = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "Noto Sans Mono", monospace'
HEAD = '<meta name="color-scheme" content="light dark"><meta name="robots" content="noindex">'
PICK = """
const items = () => [...element.querySelectorAll('[data-pick]')].filter((one) => one.offsetParent);
const enlarge = (one, large) => {
  one.classList.toggle('large', large);
  element.querySelectorAll('.large-name').forEach((old) => old.remove());
  if (!large) return;
  const name = document.createElement('div');
  name.className = 'large-name'; name.textContent = one.alt; one.after(name);
};
const pick = (target) => {
  const found = target.closest('[data-pick]');
  if (!found || !element.contains(found)) return;
  if (found.tagName === 'IMG' && !found.dataset.vote) {
    enlarge(found, !found.classList.contains('large')); found.focus(); return;
  }
  trigger('select', {value: found.dataset.pick});
};
const middle = (one) => { const b = one.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; };
const beside = (from, key) => {
  const all = items(), along = {ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1]}[key];
  const [x, y] = middle(from), far = (one) => {
    const [a, b] = middle(one), on = (a - x) * along[0] + (b - y) * along[1];
    return on < 4 ? Infinity : on + 8 * Math.abs((a - x) * along[1] + (b - y) * along[0]);
  };
  const best = all.reduce((one, other) => far(other) < far(one) ? other : one, from);
  return far(best) < Infinity ? best : all[all.indexOf(from) + along[0] + along[1]];
};
element.addEventListener('click', (e) => pick(e.target));
element.addEventListener('keydown', (e) => {
  const from = e.target;
  if (!from.dataset || !from.dataset.pick) return;
  if (e.key === 'Enter' || e.key === ' ') { e.preventDefault(); pick(from); return; }
  if (e.key === 'Escape') { enlarge(from, false); return; }
  if (!e.key.startsWith('Arrow')) return;
  const large = from.classList.contains('large');
  enlarge(from, false);
  const next = beside(from, e.key);
  enlarge(next || from, large);
  if (next) { e.preventDefault(); next.focus(); }
});
"""  # what has data-pick is chosen by a click, or by the arrows and Enter; a picture of a grid becomes large
KEYS = """() => {
  document.addEventListener('keydown', (e) => {
    const halt = document.querySelector('#halt');
    if (e.key !== ' ' || !halt || !halt.offsetParent || e.target.closest('input, textarea, button, select')) return;
    e.preventDefault(); e.stopPropagation(); halt.click();
  }, true);
}"""  # space stops what is being drawn
SHOW = """() => {
  const one = document.querySelector('#picture');
  if (window.innerWidth < 900 && one) one.scrollIntoView({behavior: 'smooth', block: 'start'});
}"""  # where the picture lies below the gallery
FOLLOW = "() => document.querySelector('#jobs')?.scrollIntoView({behavior: 'smooth', block: 'start'})"
DARK = "() => { document.body.classList.toggle('dark'); }"
CSS = (
    f":root, .gradio-container, body {{ --font: {FONT}; --font-mono: {MONO}; }}"
    + """
body, .gradio-container { font-family: var(--font) !important; }
.gradio-container { max-width: 1680px !important; width: 100% !important; margin: 0 auto;
  padding: 0 clamp(12px, 2.5vw, 36px) 48px !important; }
.gradio-container .fillable { padding: 0 !important; max-width: none !important; width: 100% !important; }
footer { display: none !important; }
:root { --ink: #1c2530; --soft: #566170; --line: #dfe4ea; --wash: #f6f8fa; --accent: #14507f; --good: #00674f;
  --warn: #8a5a00; --bad: #a3293a; --paper: #fff; }
.dark { --ink: #e4e9ee; --soft: #9aa6b2; --line: #2b333c; --wash: #171c22; --accent: #7fb8e6; --good: #5cc9a7;
  --warn: #e0b15a; --bad: #f08a97; --paper: #101418; }
.studio { color: var(--ink); font-size: 14px; line-height: 1.5; overflow-wrap: anywhere; }
.studio h2 { font-size: 17px; margin: 18px 0 8px; color: var(--ink); }
.studio h3 { font-size: 14px; margin: 14px 0 6px; color: var(--ink); }
.studio p { margin: 0 0 8px; max-width: 80ch; }
.studio .soft, .studio .empty { color: var(--soft); }
.studio .empty { padding: 28px 0; }
.studio .bad { color: var(--bad); } .studio .good { color: var(--good); } .studio .warn { color: var(--warn); }
.studio .scroll { overflow-x: auto; }
.studio table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13.5px; }
.studio th, .studio td { padding: 7px 10px; border-bottom: 1px solid var(--line); text-align: left; color: var(--ink);
  vertical-align: top; background: none; white-space: nowrap; }
.studio td.wide { white-space: normal; min-width: 180px; }
.studio th { color: var(--soft); font-weight: 600; }
.studio .r { text-align: right; }
.studio tr[data-pick], .studio [data-pick] { cursor: pointer; }
.studio tr[data-pick]:hover td, .studio tr.chosen td { background: var(--wash); }
.studio tr.chosen td:first-child { box-shadow: inset 3px 0 var(--accent); }
.studio [data-pick]:focus-visible, .studio a:focus-visible { outline: 2px solid var(--accent); outline-offset: -2px; }
.studio pre { margin: 0; padding: 10px 12px; background: var(--wash); border: 1px solid var(--line); border-radius: 6px;
  font: 12px/1.5 var(--font-mono); white-space: pre-wrap; max-height: 340px; overflow: auto; color: var(--ink); }
.studio iframe { width: 100%; height: 72vh; border: 1px solid var(--line); border-radius: 6px; background: #fff; }
.studio a { color: var(--accent); padding: 0; }
.studio .state { display: inline-block; padding: 0 8px; border-radius: 9px; border: 1px solid var(--line); 
  font-size: 12.5px; white-space: nowrap; }
.studio .facts { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 0 0 12px; }
.studio .facts div { min-width: 84px; } .studio .facts dt { color: var(--soft); font-size: 12.5px; }
.studio .facts dd { margin: 0; font-size: 16px; font-variant-numeric: tabular-nums; }
.studio table { border: 0 !important; }
.studio tr, .studio th, .studio td { border-left: 0 !important; border-right: 0 !important;
  border-top: 0 !important; }
.studio .bar { height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; margin: 4px 0 12px; }
.studio .bar i { display: block; height: 100%; background: var(--accent); }
.studio figure { margin: 0 0 14px; } .studio figcaption { font-size: 13px; margin-bottom: 4px; color: var(--soft); }
.studio .grid-picture img { max-width: 100%; border-radius: 4px; background: #fff; }
.studio .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 8px 24px; }
.studio .pair figure { max-width: 620px; }
.studio .narrow-chart { display: none; }
.studio { --target: #1769aa; --bank: #b86e00; --base: #7a8794; }
.dark .studio { --target: #6cb6f0; --bank: #e0a34a; --base: #8a96a2; }
.studio svg.lines { display: block; width: 100%; height: auto; }
.studio .who { max-width: 560px; margin-top: 16px; }
.studio .rule { stroke: var(--line); } .studio .tick { fill: var(--soft); font-size: 12px; }
.studio .line { fill: none; stroke-width: 2; } .studio .line.faint { stroke-width: 1; opacity: .35; }
.studio .line.dashed { stroke-dasharray: 5 4; }
.studio .line.target { stroke: var(--target); } .studio .line.bank { stroke: var(--bank); }
.studio .line.base { stroke: var(--base); } .studio .dot.target { fill: var(--target); }
.studio .dot.bank { fill: var(--bank); } .studio .dot.base { fill: var(--base); }
.studio .keys span::before { content: ""; display: inline-block; width: 16px; border-top: 3px solid var(--target);
  margin: 0 6px 3px 0; }
.studio .keys span.bank::before { border-color: var(--bank); } .studio .keys span { margin-right: 18px; }
.gradio-container .form, .gradio-container .gr-group, .gradio-container .gr-group > .styler { background: transparent
  !important; border: 0 !important; box-shadow: none !important; }
.gradio-container .form { gap: 12px; }
.gradio-container button.sm { font-size: 13px; max-width: 220px; min-height: 34px; }
.gradio-container button.sm.secondary { border: 1px solid var(--line); background: transparent; color: var(--ink); }
.gradio-container button.sm.stop { border: 1px solid var(--line); background: transparent; color: var(--bad); }
.gradio-container .block > .hide { display: none; }
.studio.first { padding: 14px 16px; border: 1px solid var(--line); border-radius: 8px; background: var(--wash); }
.studio.first ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 10px 28px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 230px), 1fr)); }
.studio.first b { display: block; }
.studio .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 12px; }
.studio .card { border: 1px solid var(--line); border-radius: 6px; padding: 6px; background: var(--paper); }
.studio .card.chosen { outline: 2px solid var(--accent); }
.studio .card img, .studio .card .none { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--wash);
  border-radius: 4px; margin: 0; }
.studio .card .none { display: grid; place-items: center; color: var(--soft); }
.studio .card p { margin: 4px 0 0; line-height: 1.35; } .studio .card { scroll-margin: 8px; }
.studio .draft { font-style: italic; } .studio .tag { color: var(--accent); font-size: 12.5px; font-style: normal; }
.studio .small { font-size: 12.5px; }
.studio .card .caption { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; }
.studio .framed { position: relative; display: inline-block; max-width: 100%; overflow: hidden; line-height: 0; }
.studio .framed img { max-width: 100%; max-height: 56vh; min-width: 160px; margin: 0; }
.studio .framed i { position: absolute; border: 2px solid #fff;
  box-shadow: 0 0 0 1px #14507f, 0 0 0 4000px rgb(0 0 0 / .45); }
.studio .pictures img { width: clamp(96px, 13vw, 260px); aspect-ratio: 1; object-fit: contain; margin: 0;
  border-radius: 4px; image-rendering: auto; }
.studio .pictures tr { border: 0 !important; } .studio .pictures td { border: 0; padding: 4px; }
.studio .pictures th { white-space: normal; overflow-wrap: break-word; border: 0; padding: 4px; }
.studio .pictures th[scope=row] { position: sticky; left: 0; background: var(--paper); max-width: 120px; }
.studio .pictures img[data-pick] { cursor: zoom-in; outline: 1px solid var(--line); }
.studio img.large { position: fixed; inset: 0; z-index: 1000; width: 100vw !important; height: 100vh; padding: 3vmin;
  max-width: none; border-radius: 0 !important; background: rgb(8 11 14 / .94); cursor: zoom-out; }
.studio .large-name { position: fixed; left: 0; right: 0; bottom: 0; z-index: 1001; padding: 6px; text-align: center;
  font-size: 14px; color: #e4e9ee; background: rgb(8 11 14 / .8); pointer-events: none; }
.studio .condition { display: block; width: 72px !important; margin-top: 6px !important; }
.studio .two { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; max-width: 820px; }
.studio .two img { width: 100%; border-radius: 6px; margin: 0; cursor: pointer; }
.studio-head { align-items: center; border-bottom: 1px solid var(--line); padding: 12px 0 8px; gap: 12px !important;
  flex-wrap: nowrap !important; }
.studio-head .studio { font-size: 13.5px; }
.studio-head b { font-size: 18px; letter-spacing: -.01em; margin-right: 10px; color: var(--accent); }
.studio-head button { max-width: 96px; }
button.tab-nav, .tab-nav button, .tab-container button { font-size: 15px !important; }
.tab-container button { padding: 0 14px !important; }
.tab-container button.selected { color: var(--accent) !important; }
.tab-container button.selected::after { background: var(--accent) !important; }
.gradio-container .block:has(input[type=range]) { padding-bottom: 10px !important; }
.gradio-container button.lg.secondary { background: transparent; border: 1px solid var(--line); color: var(--ink);
  font-weight: 500; }
.gradio-container .wrap:has(> .error) { display: none; }
.studio > h2:first-child { margin-top: 0; }
.gradio-container button.lg { min-height: 42px; font-size: 15px; }
.gradio-container .label-wrap { padding: 8px 0; border-top: 1px solid var(--line); }
.gradio-container .label-wrap > span { color: var(--ink); }
@media (max-width: 640px) {
  .tab-container button { padding: 0 8px !important; font-size: 14px !important; }
  .gradio-container { padding: 0 10px 40px !important; }
  .studio th, .studio td { padding: 6px 7px; }
  .gradio-container .fillable { padding: 0 !important; }
  .studio iframe { height: 80vh; }
  .studio .wide-chart { display: none; } .studio .narrow-chart { display: block; }
}
"""
)


BLUE = gr.themes.Color(
    name="blue",
    c50="#eef5fa",
    c100="#d9e8f3",
    c200="#b5d1e7",
    c300="#8ab6d8",
    c400="#5b98c6",
    c500="#2f7bb0",
    c600="#14507f",
    c700="#10436b",
    c800="#0d3656",
    c900="#0a2a44",
    c950="#071d30",
)


def theme() -> gr.themes.Base:
    """Gradio's own look with less of it."""
    plain = gr.themes.Base(
        primary_hue=BLUE,
        neutral_hue=gr.themes.colors.slate,
        text_size=gr.themes.sizes.text_sm,
        spacing_size=gr.themes.sizes.spacing_md,
        radius_size=gr.themes.sizes.radius_sm,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return plain.set(
        body_background_fill="#ffffff",
        body_background_fill_dark="#101418",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_padding="0px",
        block_label_text_color="#566170",
        block_info_text_color="#5d6875",
        block_info_text_color_dark="#9aa6b2",
        input_placeholder_color="#6b7683",
        input_placeholder_color_dark="#8b97a3",
        slider_color="#14507f",
        slider_color_dark="#4d94cc",
        color_accent="#14507f",
        panel_background_fill="transparent",
        panel_background_fill_dark="transparent",
        input_background_fill="#ffffff",
        input_background_fill_dark="#171c22",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_border_color="#cfd6de",
        input_border_color_dark="#333c46",
        button_primary_background_fill="#14507f",
        button_primary_background_fill_hover="#0f4068",
        button_primary_background_fill_dark="#2a6fa5",
        button_primary_background_fill_hover_dark="#3580bb",
        button_primary_text_color="#ffffff",
    )
