"""An HTML page of rows as the model sees them, and histograms of lengths.

All text from data is escaped, so that a row cannot run code on the page.
"""

import base64
import html as markup
import io
import json

from PIL import Image

from ares_jax.data.images import load_image
from ares_jax.system import figures

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem;
  padding: 0 1rem; color: #1b1b1b; background: #fff }
article { border-top: 1px solid #bbb; padding: 1rem 0 } h2 { margin-top: 3rem }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f4f4f4; padding: .6rem }
img { max-width: 100%; margin: .3rem .6rem .3rem 0; border: 1px solid #bbb }
.bad { color: #a40000 } dt { font-weight: 600 }"""
_SHOWN = 4000  # characters shown of a text


def example_html(found, encoder):
  """One row as HTML, or the reason why it cannot be used.

  `found` is a validation.Examined; (row, EncodedPrompt) was measured of a good row.
  """
  if found.bad:
    return f'<article><p class="bad">cannot be used: {_escape(found.bad)}</p></article>'
  row, prompt = found.measured
  pictures = [_picture(encoder, image) for image in row["images"]]
  windows = encoder.count_windows(prompt)
  parts = [f"<h3>{_escape(row['id'])}</h3><p>source {_escape(row['source'])}; "
           f"{len(prompt.tokens)} prompt tokens, {windows} vision windows</p>",
           *pictures, *(f"<p>{turn['role']}:</p><pre>{_escape(turn['content'])}</pre>"
                        for turn in row.get("history", ())),
           f"<pre>{_escape(row['question'] + encoder.chat.suffix)}</pre>"]
  answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
  accepted = " or ".join(f"<code>{_escape(text)}</code>" for text in answers)
  parts += [f"<p>accepted: {accepted}</p>"] if answers else []
  for text in row.get("responses") or [row[field] for field in ("response",) if field in row]:
    parts.append(f"<p>response, {len(encoder.chat.response(text))} tokens:</p>"
                 f"<pre>{_escape(text)}</pre>")
  return f"<article>{''.join(parts)}</article>"


def inspect_html(prompt, sections):
  """The page: the config's prompt section, a dict, and what `sections` hold.

  A section is (name, summary as text, list of figures and examples as HTML).
  """
  body = "".join(f"<h2>{_escape(name)}</h2><pre>{_escape(text)}</pre>{''.join(examples)}"
                 for name, text, examples in sections)
  return ('<!doctype html><html lang="en"><meta charset="utf-8"><title>Data</title>'
          "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; "
          "img-src data:; style-src 'unsafe-inline'\">"
          f"<style>{_STYLE}</style><h1>Data</h1><pre>{_escape(json.dumps(prompt))}</pre>"
          f"{body}</html>\n")


def picture_html(path, alt):
  """An image element with the content of a PNG file."""
  with open(path, "rb") as file:
    data = base64.b64encode(file.read()).decode()
  return f'<p><img alt="{_escape(alt)}" src="data:image/png;base64,{data}"></p>'


def histogram_png(values, path, *, title):
  """Writes a histogram of numbers as a PNG."""
  figure, (panel,) = figures.new_figure(f"{title}, {len(values)} rows", x_label="tokens",
                                        y_labels=["rows"], height=3.2)
  figures.draw_histogram(panel, values)
  figures.save_png(figure, path)


def _picture(encoder, image):
  pixels = load_image(image, min_pixels=encoder.config.min_pixels,
                      max_pixels=encoder.config.max_pixels, factor=encoder.patch * encoder.merge,
                      turn=encoder.config.turn_images)
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  height, width = pixels.shape[:2]
  return (f'<img width="{width}" height="{height}" alt="image of {width} x {height} px" '
          f'src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">')


def _escape(value):
  text = str(value)
  left = len(text) - _SHOWN
  return markup.escape(text[:_SHOWN] + (f" ... {left} more characters" if left > 0 else ""))
