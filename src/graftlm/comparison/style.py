"""The report's style sheet: one page, light and dark, no font or file from elsewhere."""

# Colours that people with colour-blindness tell apart (after Okabe and Ito), darkened or lightened for contrast.
LIGHT = ("#0067a8", "#c04a00", "#00805c", "#a8508a", "#8a6a00", "#3d4aa8", "#5b7c00", "#7a4a2a")
DARK = ("#5cb8ff", "#ff9a57", "#3fd6a4", "#f09ad2", "#e8c547", "#a3b0ff", "#b5d64a", "#d9a57f")

BASE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:40px 24px 64px}
header{margin-bottom:28px}
.brand{font-weight:650;letter-spacing:.02em;color:var(--accent);font-size:14px;text-transform:uppercase}
h1{font-size:34px;line-height:1.15;margin:6px 0 10px;letter-spacing:-.015em}
h2{font-size:21px;margin:40px 0 12px;letter-spacing:-.01em}
h3{font-size:16px;margin:0 0 2px}
p{margin:0 0 10px}
.lead{font-size:18px;color:var(--soft);max-width:70ch}
.muted,.note{color:var(--soft);font-size:14px}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:14px;margin:24px 0 8px}
.tile,.card{background:var(--card);border:1px solid var(--edge);border-radius:14px}
.tile{padding:16px 18px}
.tile b{display:block;white-space:nowrap;font-size:24px;line-height:1.2;font-weight:650;letter-spacing:-.02em;
  font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13.5px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px}
.card{padding:18px 20px}
.card p.note{margin-bottom:10px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--soft)}
svg .title{font-size:12.5px}
svg .name,svg .value{font-weight:600;font-size:12.5px;fill:var(--ink)}
svg .grid{stroke:var(--edge);stroke-width:1}
svg .axis{stroke:var(--soft);stroke-width:1}
svg .reference{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:5 4}
svg .leader{stroke:var(--soft);stroke-width:.8;opacity:.55;fill:none}
svg .line{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}
svg .bell{stroke-width:3;opacity:.55}
svg .frontier{fill:none;stroke:var(--soft);stroke-width:1.5;stroke-dasharray:2 4}
.advice p{margin:6px 0}
svg .before{fill:var(--card);stroke:var(--soft);stroke-width:2}
svg .mark{stroke:var(--card);stroke-width:1}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--soft);text-align:right;font-size:13px;padding:8px 10px;
  border-bottom:1px solid var(--edge);white-space:nowrap}
td{padding:9px 10px;vertical-align:top;text-align:right;border-bottom:1px solid var(--edge);white-space:nowrap}
tr:last-child td{border-bottom:0}
th:first-child,td:first-child{text-align:left}
td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:150px}
td.left,th.left{text-align:left;white-space:normal}
tr.best td{background:var(--tint)}
tr.base td{color:var(--soft)}
.dot{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:9px;vertical-align:0}
.badge{display:inline-block;margin-left:8px;padding:1px 8px;border-radius:99px;background:var(--accent);
  color:var(--card);font-size:12px;font-weight:600}
td small{display:block;color:var(--soft);font-size:12.5px}
td small.gain{color:var(--good)}
td small.loss{color:var(--bad)}
.failed{color:var(--bad)}
.failed td.left{white-space:pre-wrap;overflow-wrap:anywhere}
.sample{padding:14px 18px;margin-bottom:12px}
.sample .prompt{color:var(--soft);margin-bottom:8px;white-space:pre-wrap;overflow-wrap:anywhere}
.sample table{font-size:14px}
.sample td{padding:5px 8px;text-align:left;white-space:pre-wrap;overflow-wrap:anywhere;border-bottom:0;vertical-align:top}
.sample td:first-child{width:210px;color:var(--soft);white-space:nowrap}
.right{color:var(--good);font-weight:600}
.wrong{color:var(--bad)}
details{background:var(--card);border:1px solid var(--edge);border-radius:12px;margin-bottom:10px}
summary{padding:12px 18px;cursor:pointer;font-weight:600}
details pre{margin:0;padding:4px 18px 16px;overflow-x:auto}
footer{margin-top:44px;color:var(--soft);font-size:13.5px;border-top:1px solid var(--edge);padding-top:16px}
@media print{body{background:#fff}.card,.tile,details{break-inside:avoid}}
"""

THEMES = {
    "light": "--page:#f6f7f9;--card:#fff;--ink:#14181f;--soft:#596273;--edge:#e1e5eb;--tint:#eef6ff;--accent:#0067a8;"
    "--good:#0a7a4b;--bad:#b3261e",
    "dark": "--page:#0f1217;--card:#181c23;--ink:#eceff4;--soft:#9aa4b5;--edge:#2b313c;--tint:#172738;--accent:#5cb8ff;"
    "--good:#4fd69c;--bad:#ff8a80",
}


def sheet() -> str:
    """The whole style sheet."""
    light = THEMES["light"] + "".join(f";--c{i}:{c}" for i, c in enumerate(LIGHT))
    dark = THEMES["dark"] + "".join(f";--c{i}:{c}" for i, c in enumerate(DARK))
    colours = "".join(
        f".f{i}{{fill:var(--c{i})}}.s{i}{{stroke:var(--c{i})}}svg .t{i}{{fill:var(--c{i})}}.d{i}{{background:var(--c{i})}}\n"
        for i in range(len(LIGHT))
    )
    themes = (
        f":root{{color-scheme:light dark;{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
        f':root[data-theme="light"]{{{light}}}\n:root[data-theme="dark"]{{{dark}}}\n'
    )
    return themes + BASE.strip() + "\n" + colours
