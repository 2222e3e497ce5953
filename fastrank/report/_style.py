"""The style sheet of the HTML report: light and dark, from a phone's width upward."""

from __future__ import annotations

CSS = """
:root{color-scheme:light dark;--back:#f7f7f5;--panel:#fff;--ink:#1b2130;--soft:#5d6678;--rule:#e4e6ea;--grid:#eceef1;
--accent:#0b63b0;--s0:#0072b2;--s1:#d55e00;--s2:#009e73;--s3:#b3558f;--s4:#b07d00;--s5:#4b9fd5;
--e0:#b9e0d5;--e1:#86cbc8;--e2:#59b1c4;--e3:#3f94c0;--e4:#3a74b4;--e5:#3f549e;--e6:#40367f;--e7:#38185f}
@media (prefers-color-scheme:dark){:root{--back:#0e1218;--panel:#161b23;--ink:#e7eaf0;--soft:#9aa4b5;--rule:#29303b;
--grid:#222933;--accent:#6db5f2;--s0:#4ea8e8;--s1:#ff8f47;--s2:#36c99d;--s3:#e59cc9;--s4:#e9b33a;--s5:#9bd0f3;
--e0:#54458f;--e1:#4d53ab;--e2:#4468b4;--e3:#3c80bd;--e4:#48a1c8;--e5:#68bfcd;--e6:#9adad2;--e7:#d6f4e4}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 18px 48px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:18px;margin:38px 0 4px}
h3{font-size:14px;margin:20px 0 8px;color:var(--soft);font-weight:600}
p{margin:4px 0 12px;max-width:75ch}
.lead,.why,.foot,figcaption small{color:var(--soft)}
.why{font-style:italic}.cards+.lead{margin-top:8px}
.facts{display:flex;flex-wrap:wrap;gap:6px;margin:12px 0 0;padding:0;list-style:none}
.facts li{border:1px solid var(--rule);background:var(--panel);border-radius:99px;padding:2px 11px;font-size:13px}
.facts b{color:var(--soft);font-weight:500}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:22px 0 0}
.card{background:var(--panel);border:1px solid var(--rule);border-radius:12px;padding:12px 16px}
.card b{display:block;font-size:25px;line-height:1.25;font-variant-numeric:tabular-nums}
.card span{color:var(--soft);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:14px;align-items:start}
figure{margin:0;background:var(--panel);border:1px solid var(--rule);border-radius:12px;padding:12px;min-width:0}
figcaption{font-weight:600;font-size:14px;margin:0 2px 6px;overflow-wrap:anywhere}
figcaption small{font-weight:400;font-size:12.5px;display:block}
svg{display:block;width:100%;height:auto}
.keys{display:flex;flex-wrap:wrap;gap:2px 14px;margin:6px 4px 0;font-size:12.5px;color:var(--soft)}
.keys i{display:inline-block;width:16px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle}
.keys i.dashed{background:repeating-linear-gradient(90deg,currentColor 0 5px,transparent 5px 8px)!important}
.ramp{display:flex;align-items:center;gap:8px;font-size:12.5px;color:var(--soft);margin:2px 0 10px}
.ramp span{display:flex}.ramp i{width:18px;height:8px}
.table{overflow-x:auto;background:var(--panel);border:1px solid var(--rule);border-radius:12px}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:7px 12px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--rule)}
tr:last-child td{border-bottom:0}
th{font-weight:600;color:var(--soft);font-size:12.5px}
th.text,td.text{text-align:left}
td.long{white-space:normal;min-width:230px;text-align:left;color:var(--soft)}
tr.best td{font-weight:600}
details{margin-top:14px}summary{cursor:pointer;color:var(--accent)}
pre{overflow:auto;background:var(--panel);border:1px solid var(--rule);border-radius:12px;padding:12px;font-size:12.5px}
.foot{margin-top:40px;font-size:13px}
text{font:11px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;fill:var(--soft)}
.tag{font-size:10.5px;font-weight:600}
.axis{stroke:var(--soft);stroke-width:1;opacity:.6}.grid{stroke:var(--grid);stroke-width:1}
.note{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 3}
.line{fill:none;stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
.front{fill:none;stroke:var(--soft);stroke-width:1.2;stroke-dasharray:4 3}
.area{opacity:.18;stroke:none!important}.cell{stroke:none!important}
.mark{stroke:var(--panel)!important;stroke-width:1.5}
"""
_COLOURS = [*(f"s{i}" for i in range(6)), *(f"e{i}" for i in range(8))]
CSS += "".join(
    f".line.{c}{{stroke:var(--{c})}}.area.{c},.mark.{c},.dot.{c},.cell.{c},.tag.{c}{{fill:var(--{c})}}"
    f"i.{c}{{background:var(--{c});color:var(--{c})}}\n"
    for c in _COLOURS
)
