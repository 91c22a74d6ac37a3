"""How the page looks: system fonts, one accent, light and dark as the browser is; nothing is fetched for it."""

from __future__ import annotations

import gradio as gr

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Hiragino Sans", "Yu Gothic UI", "Noto Sans", sans-serif'
MONO = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "Noto Sans Mono", monospace'
HEAD = '<meta name="color-scheme" content="light dark"><meta name="robots" content="noindex">'
PICK = """
const pick = (target) => {
  const found = target.closest('[data-pick]');
  if (found && element.contains(found)) trigger('select', {value: found.dataset.pick});
};
element.addEventListener('click', (e) => pick(e.target));
element.addEventListener('keydown', (e) => {
  if (e.key === 'Enter' || e.key === ' ') { if (e.target.dataset.pick) { e.preventDefault(); pick(e.target); } return; }
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[e.key];
  if (!step || !e.target.dataset || !e.target.dataset.pick) return;
  const all = [...element.querySelectorAll('[data-pick]')];
  const next = all[all.indexOf(e.target) + step];
  if (next) { e.preventDefault(); next.focus(); }
});
"""  # what has data-pick is chosen by a click, or by the arrows and Enter
DARK = "() => { document.body.classList.toggle('dark'); }"
CSS = (
    f":root, .gradio-container, body {{ --font: {FONT}; --font-mono: {MONO}; }}"
    + """
body, .gradio-container { font-family: var(--font) !important; }
.gradio-container { max-width: 1680px !important; margin: 0 auto; padding: 0 clamp(12px, 2.5vw, 36px) 48px !important; }
.gradio-container > main, main.fillable { padding: 0 !important; max-width: none !important; }
footer { display: none !important; }
:root { --ink: #1c2530; --soft: #5d6875; --line: #dfe4ea; --wash: #f6f8fa; --accent: #14507f; --good: #00674f;
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
.studio a { color: var(--accent); }
.studio .state { display: inline-block; padding: 0 8px; border-radius: 9px; border: 1px solid var(--line); font-size: 12.5px;
  white-space: nowrap; }
.studio .facts { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 0 0 12px; }
.studio .facts div { min-width: 84px; } .studio .facts dt { color: var(--soft); font-size: 12.5px; }
.studio .facts dd { margin: 0; font-size: 16px; font-variant-numeric: tabular-nums; }
.head { align-items: center; border-bottom: 1px solid var(--line); padding: 14px 0 10px; gap: 12px !important;
  flex-wrap: nowrap !important; }
.head .studio { font-size: 13.5px; }
.head b { font-size: 18px; letter-spacing: -.01em; margin-right: 10px; color: var(--accent); }
.head button { max-width: 96px; }
button.tab-nav, .tab-nav button, .tab-container button { font-size: 15px !important; }
@media (max-width: 640px) {
  .gradio-container { padding: 0 10px 40px !important; }
  .studio th, .studio td { padding: 6px 7px; }
  .studio iframe { height: 80vh; }
}
"""
)


def theme() -> gr.themes.Base:
    """Gradio's own look with less of it."""
    plain = gr.themes.Base(
        primary_hue=gr.themes.colors.sky,
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
        block_padding="4px",
        panel_background_fill="transparent",
        panel_background_fill_dark="transparent",
        input_background_fill="#ffffff",
        input_background_fill_dark="#171c22",
        input_border_color="#cfd6de",
        input_border_color_dark="#333c46",
        button_primary_background_fill="#14507f",
        button_primary_background_fill_hover="#0f4068",
        button_primary_background_fill_dark="#2a6fa5",
        button_primary_background_fill_hover_dark="#3580bb",
        button_primary_text_color="#ffffff",
    )
