"""The look of the report; no font, script or image comes from outside."""

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1d2430; --soft: #5b6573;
  --line: #d9dee5; --panel: #f6f8fa; --frozen: #98a2ae; --naive: #d9822b; --naive_joint: #e5ab72;
  --addmm: #3d9a6c; --peft: #9a5fc0; --peft_bf16: #bd96d6; --peft_checkpoint: #c7a4dd;
  --fused: #6aa5ea; --fused_joint: #94bff0; --fused_block: #1254a8; --fused_block_joint: #2f73c4;
  --fused_block_gemm: #0b8a8f; --full: #b94a48; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ground: #14181e; --ink: #e4e8ee; --soft: #9aa5b3;
  --line: #2d3641; --panel: #1b2129; --frozen: #77828f; --naive: #e0944a; --naive_joint: #b8834f;
  --addmm: #4fae80; --peft: #b17fd4; --peft_bf16: #86629f; --peft_checkpoint: #76568c;
  --fused: #3a6ba8; --fused_joint: #2f5688; --fused_block: #6db0ff; --fused_block_joint: #4b95f0;
  --fused_block_gemm: #35b9be; --full: #d06a66; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 2rem 1.5rem 3rem; background: var(--ground);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .6rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: 1.2rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.3rem 0 .2rem; }
p { max-width: 46rem; margin: .4rem 0; }
.soft, figcaption, dd { color: var(--soft); }
.panels { display: flex; flex-wrap: wrap; gap: .4rem 0; margin: .5rem 0; }
svg { max-width: 100%; height: auto; font: 12px system-ui, sans-serif; }
svg .heading { font-weight: 600; fill: var(--ink); font-size: 13px; }
svg .name { fill: var(--soft); } svg .value { fill: var(--ink); }
svg .mark { stroke: var(--ink); stroke-dasharray: 3 3; opacity: .55; }
svg .bar { fill: var(--soft); } svg .axis { stroke: var(--line); }
.answer { font-size: 1.15rem; max-width: 56rem; }
.scroll { overflow-x: auto; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid var(--line); } tr.case th { padding-top: .9rem; }
tr.ours td { font-weight: 600; }
.refused { border-left: 4px solid var(--bad); padding: .3rem 1rem; background: var(--panel); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem;
  font-size: .88rem; } dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
"""

COLOURED = (
    *("frozen", "naive", "naive_joint", "addmm", "peft", "peft_bf16"),
    *("peft_checkpoint", "fused", "fused_joint", "full"),
    *("fused_block", "fused_block_joint", "fused_block_gemm"),
)

BARS = "\n".join(f"svg .bar.{name} {{ fill: var(--{name}); }}" for name in COLOURED)
