"""Pieces of HTML for the page of a comparison: lists of terms, pictures with captions, names of rows."""

import base64
import io
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from PIL import Image

from mmfm.evaluation.comparison import Comparison, Row, differs, place_of, setting_of


def name_of(row: Row, rows: list[Row], sampling: bool = True) -> str:
    """Return what tells a row from the others: encoder and setting, and whatever else differs."""
    words = [row["encoder"]] if differs(rows, "encoder") else []
    words.append(setting_of(row))
    shown: dict[str, Callable[[Row], str]] = {
        "results": lambda r: f"of {r['results']}",
        "model": lambda r: f"{r['model']}" if r["model"] else "",
        "seed": lambda r: f"seed {r['seed']}",
    }
    if len({r["n_modes"] for r in rows} - {0}) > 1 and row["n_modes"]:
        words.append(f"K = {row['n_modes']:,}")
    words += [show(row) for name, show in shown.items() if differs(rows, name)]
    if sampling and differs(rows, "step"):
        words.append(f"step {row['step']:,}" if row["step"] is not None else "")
    if sampling and differs(rows, "time_points"):
        words.append(f"{row['time_points']} time points")
    if sampling and row["guidance"] and len({str(r["guidance"]) for r in rows if r["guidance"]}) > 1:
        words.append(f"guidance {row['guidance']['scale']:g}")
    return ", ".join(word for word in words if word)


def heading(place: tuple[str, str], comparison: Comparison) -> str:
    """Return a heading with encoder and results folder; none if there is one place only."""
    several = len(set(map(place_of, comparison.rows))) > 1
    return f"<h3>{escape(place[1])}, {escape(place[0])}</h3>\n" if several else ""


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of terms and what they say; nothing for none."""
    items = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>\n" for term, text in pairs)
    return f"<dl>\n{items}</dl>\n" if items else ""


def figure(picture: str, text: str, kind: str = "") -> str:
    """Return a picture with a caption, which may hold markup."""
    return f'<figure class="{kind.strip()}">{picture}<figcaption>{text}</figcaption></figure>\n'.replace(
        ' class=""', ""
    )


def opened(path: Path) -> Image.Image:
    """Read a picture as RGB."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def embed(picture: Image.Image, alt: str, factor: float, widest: int = 1000) -> str:
    """Embed a picture, at most ``factor`` times ``widest`` pixels wide."""
    width = min(picture.width, int(factor * widest), int(factor * picture.width))
    if width < picture.width:
        picture = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=82, method=6)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img src="data:image/webp;base64,{data}" alt="{escape(alt)}" {size}>'
