"""Pages of HTML that need no network: their style, and pictures as part of them. Needs no torch."""

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

from library.dataset.picture_files import open_picture

PICTURE = 512  # longest side of an embedded picture, in pixels
QUALITY = 88  # of WebP

STYLE = """
:root{color-scheme:light dark;--paper:#fbfbfd;--card:#fff;--ink:#1a1c22;--dim:#636b7a;--line:#e2e5ec;--tint:#f1f3f8;
--accent:#2f6fde;--second:#d9730d;--third:#1f9d74}
@media (prefers-color-scheme:dark){:root{--paper:#14161b;--card:#1c1f26;--ink:#e8eaf0;--dim:#9aa3b2;--line:#30353f;
--tint:#242833;--accent:#7aa7ff;--second:#ffa657;--third:#4fd1a5}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);line-height:1.55;overflow-wrap:anywhere;
font-family:system-ui,-apple-system,"Segoe UI","PingFang SC","Hiragino Sans GB","Microsoft YaHei","Noto Sans CJK SC",
"Noto Sans SC","Source Han Sans SC",sans-serif}
main{max-width:1080px;margin:0 auto;padding:24px 16px 64px}
main.wide{max-width:none}
h1{font-size:1.6rem;line-height:1.25;margin:.4em 0 .2em}
h2{font-size:1.15rem;margin:2.2em 0 .7em;padding-bottom:.3em;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.4em 0 .5em}
.note,figcaption{color:var(--dim);margin:.2em 0 .8em}
figcaption{font-size:.85rem;margin:.3em 0 0}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.fact{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 14px}
.fact b{display:block;font-size:1.15rem;font-weight:600}
.fact span{color:var(--dim);font-size:.82rem}
.scroll{overflow-x:auto;margin:0 -16px;padding:0 16px}
table{border-collapse:separate;border-spacing:0}
table.plain{width:100%;font-size:.92rem}
table.plain td,table.plain th{text-align:left;vertical-align:top;padding:5px 12px 5px 0;
border-bottom:1px solid var(--line)}
table.plain th{font-weight:500;color:var(--dim);width:min(15em,34%)}
table.grid th{font-weight:500;font-size:.85rem;text-align:left;padding:4px 8px;vertical-align:bottom;min-width:5em}
table.grid tbody th{position:sticky;left:0;background:var(--paper);vertical-align:top;max-width:14em;z-index:1}
table.grid td{padding:3px;vertical-align:top}
.corner{color:var(--dim)}
img{max-width:100%;height:auto;border-radius:6px;display:block;background:var(--tint)}
table.grid img{width:min(256px,40vw);min-width:128px}
.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(130px,1fr));gap:12px}
figure{margin:0}
svg{width:100%;height:auto;display:block}
svg text{fill:var(--dim);font-size:12px}
.chart{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:10px 8px 4px;margin-bottom:14px}
.chart p{margin:0 8px 4px;font-size:.9rem;display:flex;flex-wrap:wrap;gap:4px 16px}
.unit{color:var(--dim)}
.key{display:inline-block;width:14px;height:3px;border-radius:2px;vertical-align:middle;margin-right:6px}
code,pre{font-family:ui-monospace,"Cascadia Mono",Menlo,Consolas,"Noto Sans Mono CJK SC",monospace;font-size:.88em;
background:var(--tint);border-radius:5px}
code{padding:.1em .35em}
pre{padding:10px 12px;overflow-x:auto}
details summary{cursor:pointer;color:var(--accent)}
.bad{color:#c62828}
@media print{main{max-width:none}details{display:block}}
"""


def page(title: str, body: str, wide: bool = False) -> str:
    """A whole page; `body` is HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n"
        f"<body><main{' class=wide' if wide else ''}>\n<h1>{escape(title)}</h1>\n{body}\n</main></body></html>\n"
    )


def embedded(path: Path, text: str = "") -> str:
    """An <img> with the picture of a file in it, made smaller where it is large."""
    with open_picture(path) as picture:
        return embedded_picture(picture, text or path.stem)


def embedded_picture(picture: Image.Image, text: str) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail((PICTURE, PICTURE), Image.Resampling.LANCZOS)
    data = base64.b64encode(as_webp(picture)).decode("ascii")
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img decoding="async" {size} alt="{escape(text)}" src="data:image/webp;base64,{data}">'


def as_webp(picture: Image.Image, quality: int = QUALITY) -> bytes:
    data = io.BytesIO()
    picture.save(data, format="WEBP", quality=quality, method=4)
    return data.getvalue()
