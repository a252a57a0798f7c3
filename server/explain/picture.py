"""Picture of an explanation, layer by layer, as in the paper's Figure 3."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import dist

from PIL import Image, ImageDraw, ImageFont

from ficoco_vllm.server.explain.schema import Box, Explanation, Layer, Measured, View

_WIDTH = 1120
_MARGIN = 32
_GAP = 24
_COLUMNS = 6
# Tried before Pillow's own font, which has Latin letters only.
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf")

_PAGE = (255, 255, 255)
_INK = (29, 33, 38)
_QUIET = (93, 102, 112)
_LINE = (220, 221, 216)
_RED = (211, 34, 42)
_GREEN = (15, 140, 80)
_DIM = (66, 72, 80)
# Opacity of the veil over removed patches, and where boxes are drawn over it.
_VEIL = 0.82
_FAINT = 0.5
# Default number of patches whose path is drawn.
_NUM_EXAMPLES = 3

# Left, top, right and bottom.
Pixels = tuple[int, int, int, int]


@dataclass(frozen=True)
class Panel:
    """Adjacent views, and the part of the image that they cover.

    Attributes:
        views: the whole image, or all tiles.
        image: RGB image of that part.
        region: that part, as in `View.box`.
    """

    views: tuple[View, ...]
    image: Image.Image
    region: Box

    @classmethod
    def of(cls, image: Image.Image, views: Sequence[View]) -> "Panel":
        """Cut the part out of an image. Where a view is larger than the image, its border is black."""
        # Tiles show the whole image; their patches at its edges may reach beyond it.
        region = views[0].box if views[0].tile is None else (0.0, 0.0, 1.0, 1.0)
        (left, top), (width, height) = region[:2], image.size
        right, bottom = left + region[2], top + region[3]
        edges = (round(left * width), round(top * height), round(right * width), round(bottom * height))
        return cls(tuple(views), image.crop(edges), region)

    def resized(self, width: int) -> "Panel":
        """Scale the image to a width; its shape stays."""
        height = max(1, round(width * self.image.height / self.image.width))
        return replace(self, image=self.image.resize((width, height), Image.Resampling.LANCZOS))

    def boxes(self, token: int) -> Iterator[Pixels]:
        """Box of a token in the image, none if it has no place here."""
        for view in self.views:
            rows, columns = view.grid
            row, column = divmod(token - view.first, columns)
            if 0 <= row < rows:
                edges = []
                for axis, (index, number) in enumerate(((column, columns), (row, rows))):
                    scale = self.image.size[axis] / self.region[axis + 2]
                    start, size = view.box[axis] - self.region[axis], view.box[axis + 2] / number
                    edges.append([round((start + place * size) * scale) for place in (index, index + 1)])
                (left, right), (top, bottom) = edges
                yield left, top, max(left, right - 1), max(top, bottom - 1)


def panels(image: Image.Image, explanation: Explanation) -> list[Panel]:
    """The parts of an image that the model sees: one panel, and one of the tiles where there are any.

    Args:
        image: RGB image.
        explanation: response of `POST /ficoco/explain`.
    """
    whole = [view for view in explanation.views if view.tile is None]
    tiles = [view for view in explanation.views if view.tile is not None]
    return [Panel.of(image, views) for views in (whole, tiles) if views]


def examples(panel: Panel, explanation: Explanation, count: int = _NUM_EXAMPLES) -> list[int]:
    """Choose removed patches whose information went to many tokens, far from each other.

    Args:
        panel: where they lie.
        explanation: response of `POST /ficoco/explain`.
        count: largest number of patches.
    """
    patches = [left for left in explanation.destinations if left.targets and any(panel.boxes(left.token))]
    max_targets = max((len(left.targets) for left in patches), default=0)
    candidates = [left.token for left in patches if 2 * len(left.targets) > max_targets]
    places = {token: _middle(next(panel.boxes(token))) for token in candidates}
    middle = panel.image.width / 2, panel.image.height / 2
    chosen: list[int] = []
    while candidates and len(chosen) < count:
        if chosen:
            patch = max(
                candidates, key=lambda token: min(dist(places[token], places[other]) for other in chosen)
            )
        else:
            patch = min(candidates, key=lambda token: dist(places[token], middle))
        chosen.append(patch)
        candidates.remove(patch)
    return chosen


def draw(image: Image.Image, explanation: Explanation, patches: Sequence[int] | None = None) -> Image.Image:
    """Draw an explanation.

    Args:
        image: the explained image.
        explanation: response of `POST /ficoco/explain`.
        patches: numbers of the removed patches whose path is drawn; None chooses some.

    Returns:
        RGB image, 1120 pixels wide.

    Raises:
        ValueError: a patch is not in the image.

    Source: arXiv:2411.17686, Fig. 3.
    """
    num_patches = sum(rows * columns for rows, columns in (view.grid for view in explanation.views))
    for patch in patches or ():
        if not 0 <= patch < num_patches:
            raise ValueError(f"patch = {patch} is not allowed; allowed: 0 to {num_patches - 1}")
    side = (_WIDTH - 2 * _MARGIN - _GAP) // 2
    shown = [panel.resized(side) for panel in panels(image.convert("RGB"), explanation)]
    kept = set(explanation.layers[-1].kept if explanation.layers else range(num_patches))
    num_rows = -(-len(explanation.layers) // _COLUMNS)
    height = 600 + sum(panel.image.height + 60 for panel in shown) + num_rows * (shown[0].image.height + 60)
    canvas = Image.new("RGB", (_WIDTH, height), _PAGE)
    pen = ImageDraw.Draw(canvas)
    top = _head(pen, explanation)
    for panel in shown:
        tokens = [token for view in panel.views for token in _tokens(view)]
        part = "" if len(shown) == 1 else f"{'tiles' if panel.views[0].tile else 'whole image'}, "
        followed = examples(panel, explanation) if patches is None else patches
        columns = (
            (f"{part}kept: {len(kept.intersection(tokens))} of {len(tokens)} patches", _veiled(panel, kept)),
            (_legend(followed), _followed(panel, explanation, kept, followed)),
        )
        for index, (title, drawn) in enumerate(columns):
            left = _MARGIN + index * (side + _GAP)
            pen.text((left, top), title, _QUIET, _font(15))
            canvas.paste(drawn, (left, top + 26))
        top += 26 + panel.image.height + _GAP
    bottom = _layers(canvas, pen, shown[0], explanation, top)
    return canvas.crop((0, 0, _WIDTH, bottom + _MARGIN))


def _tokens(view: View) -> range:
    return range(view.first, view.first + view.grid[0] * view.grid[1])


def _head(pen: ImageDraw.ImageDraw, explanation: Explanation) -> int:
    """Draw question, saving and answers with their figures. Returns the bottom."""
    top = _MARGIN
    width = _WIDTH - 2 * _MARGIN
    for line in _wrapped(explanation.question, _font(22), width, 3):
        pen.text((_MARGIN, top), line, _INK, _font(22))
        top += 30
    full, reduced = explanation.full, explanation.reduced
    rows = [(f"{explanation.method}, {reduced.last_visual_tokens} visual tokens", reduced)]
    if full is not None:
        saved = 1 - reduced.last_visual_tokens / full.last_visual_tokens
        pen.text((_MARGIN, top + 4), f"{saved:.0%} fewer visual tokens", _INK, _font(26))
        top += 42
        rows.insert(0, (f"without reduction, {full.visual_tokens} visual tokens", full))
    top += 8
    for title, measured in rows:
        pen.text((_MARGIN, top), f"{title} · {_figures(measured)}", _QUIET, _font(14))
        top += 21
        for line in _wrapped(measured.answer.strip() or "(no words)", _font(20), width, 4):
            pen.text((_MARGIN, top), line, _INK, _font(20))
            top += 27
        top += 8
    pen.line([(_MARGIN, top + 2), (_WIDTH - _MARGIN, top + 2)], _LINE)
    return top + 18


def _figures(measured: Measured) -> str:
    seconds = f"first token {measured.ttft_seconds:.3f} s, all {measured.total_seconds:.3f} s"
    return f"{seconds}, KV cache of the prompt {measured.kv_bytes / 1e6:.2f} MB"


def _legend(patches: Sequence[int]) -> str:
    if not patches:
        return "no patch was removed"
    return "red: removed patches; green: final location of their information"


def _layers(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, panel: Panel, explanation: Explanation, top: int
) -> int:
    """Draw one small image for every reduction. Returns the bottom."""
    small = panel.resized((_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * 12) // _COLUMNS)
    width, height = small.image.size
    for index, layer in enumerate(explanation.layers):
        row, column = divmod(index, _COLUMNS)
        left, line_top = _MARGIN + column * (width + 12), top + row * (height + 34)
        canvas.paste(_veiled(small, layer.kept), (left, line_top))
        pen.text((left, line_top + height + 4), _layer_title(layer), _QUIET, _font(12))
    num_rows = -(-len(explanation.layers) // _COLUMNS)
    return top + num_rows * (height + 34) - (10 if num_rows else _GAP)


def _layer_title(layer: Layer) -> str:
    where = {
        "encoder": f"tower {layer.layer + 1}",
        "features": "tower's output",
        "decoder": f"decoder {layer.layer + 1}",
    }[layer.site]
    return f"{where}: {len(layer.kept)} kept"


def _veiled(panel: Panel, kept: Iterable[int], strength: float = _VEIL) -> Image.Image:
    """The image with a veil over removed patches."""
    mask = Image.new("L", panel.image.size, round(255 * strength))
    pen = ImageDraw.Draw(mask)
    for token in kept:
        for box in panel.boxes(token):
            pen.rectangle(box, 0)
    veiled = panel.image.copy()
    veiled.paste(Image.new("RGB", veiled.size, _DIM), mask=mask)
    return veiled


def _followed(
    panel: Panel, explanation: Explanation, kept: Iterable[int], patches: Sequence[int]
) -> Image.Image:
    """The image with removed patches boxed in red, and in green the patches that took over their information."""
    drawn = _veiled(panel, kept, _FAINT)
    targets = {left.token: left.targets for left in explanation.destinations}
    flows = [(patch, token, share) for patch in patches for token, share in targets.get(patch, ())]
    for source, token, share in flows:
        for start, end in zip(panel.boxes(source), panel.boxes(token), strict=False):
            layer = Image.new("RGBA", drawn.size)
            pen = ImageDraw.Draw(layer)
            pen.line([_middle(start), _middle(end)], (*_GREEN, round(60 + 120 * share)), 2)
            pen.rectangle(end, (*_GREEN, round(150 * share)), (*_GREEN, round(90 + 165 * share)), 3)
            drawn.paste(layer, mask=layer)
    pen = ImageDraw.Draw(drawn)
    for patch in patches:
        for box in panel.boxes(patch):
            pen.rectangle(box, outline=_RED, width=3)
    return drawn


def _middle(box: Pixels) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _wrapped(
    text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, max_lines: int
) -> list[str]:
    """Wrap text to lines no wider than `width`; at most `max_lines` of them."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [_cut(line, font, width) for line in lines]
    if len(lines) <= max_lines:
        return lines
    return [*lines[: max_lines - 1], _cut(lines[max_lines - 1] + " …", font, width)]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while font.getlength(line) > width:
        line = line[:-2].rstrip("…") + "…"
    return line
