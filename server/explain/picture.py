"""Picture of an explanation, layer by layer, as in the paper's Figure 3."""

from collections.abc import Iterable, Iterator, Sequence

from PIL import Image, ImageDraw, ImageFont

from ficoco_vllm.server.explain.schema import Explanation, Layer, Measured

_WIDTH = 1120
_MARGIN = 32
_GAP = 24
_COLUMNS = 6
# Tried before Pillow's own font, which has Latin letters only.
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf")

_PAGE = (255, 255, 255)
_INK = (29, 33, 38)
_QUIET = (93, 102, 112)
_RED = (211, 34, 42)
_GREEN = (15, 140, 80)
_DIM = (66, 72, 80)
# Opacity of the veil over removed patches, and where boxes are drawn over it.
_VEIL = 0.82
_FAINT = 0.5
# Default number of patches whose path is drawn.
_NUM_EXAMPLES = 3

Box = tuple[int, int, int, int]


def visible_part(image: Image.Image, central_square: float | None) -> Image.Image:
    """Crop an image to the part that the model sees.

    Args:
        image: RGB image.
        central_square: as in `Explanation`.

    Returns:
        The central square, or the image as it is. Where the square is larger than the image, its border is black.
    """
    if central_square is None:
        return image
    width, height = image.size
    side = central_square * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return image.crop((round(left), round(top), round(left + side), round(top + side)))


def examples(explanation: Explanation, count: int = _NUM_EXAMPLES) -> list[int]:
    """Choose removed patches whose information went to many tokens, far from each other.

    Args:
        explanation: response of `POST /ficoco/explain`.
        count: largest number of patches.
    """
    rows, columns = explanation.grid
    patches = [left for left in explanation.destinations if left.token < rows * columns and left.targets]
    max_targets = max((len(left.targets) for left in patches), default=0)
    candidates = [left.token for left in patches if 2 * len(left.targets) > max_targets]

    def distance(one: int, other: int) -> int:
        (row, column), (other_row, other_column) = divmod(one, columns), divmod(other, columns)
        return (row - other_row) ** 2 + (column - other_column) ** 2

    middle = rows // 2 * columns + columns // 2
    chosen: list[int] = []
    while candidates and len(chosen) < count:
        if chosen:
            patch = max(candidates, key=lambda token: min(distance(token, other) for other in chosen))
        else:
            patch = min(candidates, key=lambda token: distance(token, middle))
        chosen.append(patch)
        candidates.remove(patch)
    return chosen


def draw(image: Image.Image, explanation: Explanation, patches: Sequence[int] | None = None) -> Image.Image:
    """Draw an explanation.

    Args:
        image: the explained image.
        explanation: response of `POST /ficoco/explain`.
        patches: indices of the removed patches whose path is drawn; None chooses some.

    Returns:
        RGB image, 1120 pixels wide.

    Raises:
        ValueError: a patch is not in the grid.

    Source: arXiv:2411.17686, Fig. 3.
    """
    rows, columns = explanation.grid
    patches = examples(explanation) if patches is None else patches
    for patch in patches:
        if not 0 <= patch < rows * columns:
            raise ValueError(f"patch = {patch} is not allowed; allowed: 0 to {rows * columns - 1}")
    seen = visible_part(image.convert("RGB"), explanation.central_square)
    canvas = Image.new("RGB", (_WIDTH, 4000), _PAGE)
    pen = ImageDraw.Draw(canvas)
    top = _head(pen, explanation)
    side = (_WIDTH - 2 * _MARGIN - _GAP) // 2
    kept = explanation.layers[-1].kept if explanation.layers else range(rows * columns)
    panels = (
        (f"kept: {len(kept)} of {rows * columns}", _veiled(seen, side, explanation.grid, kept, _VEIL)),
        (_legend(patches), _followed(seen, side, explanation, kept, patches)),
    )
    for index, (title, panel) in enumerate(panels):
        left = _MARGIN + index * (side + _GAP)
        pen.text((left, top), title, _QUIET, _font(15))
        canvas.paste(panel, (left, top + 26))
    bottom = _layers(canvas, pen, seen, explanation, top + 26 + side + _GAP)
    return canvas.crop((0, 0, _WIDTH, bottom + _MARGIN))


def _head(pen: ImageDraw.ImageDraw, explanation: Explanation) -> int:
    """Draw question and answers with their figures. Returns the bottom."""
    top = _MARGIN
    for line in _wrapped(explanation.question, _font(22), _WIDTH - 2 * _MARGIN, 3):
        pen.text((_MARGIN, top), line, _INK, _font(22))
        top += 30
    top += 10
    full = explanation.full
    sides = [(f"{explanation.method}, {explanation.keep} kept", explanation.reduced)]
    if full is not None:
        sides.insert(0, (f"all {full.visual_tokens} visual tokens", full))
    width = (_WIDTH - 2 * _MARGIN - _GAP) // 2
    bottom = top
    for index, (title, measured) in enumerate(sides):
        left, line_top = _MARGIN + index * (width + _GAP), top
        pen.text((left, line_top), title, _QUIET, _font(15))
        line_top += 22
        for line in _wrapped(measured.answer.strip() or "(no words)", _font(20), width, 4):
            pen.text((left, line_top), line, _INK, _font(20))
            line_top += 27
        pen.text((left, line_top), _figures(measured), _QUIET, _font(14))
        bottom = max(bottom, line_top + 24)
    return bottom + 16


def _figures(measured: Measured) -> str:
    seconds = f"first token {measured.ttft_seconds:.3f} s, all {measured.total_seconds:.3f} s"
    return f"{seconds}, KV cache of the prompt {measured.kv_bytes / 1e6:.2f} MB"


def _legend(patches: Sequence[int]) -> str:
    if not patches:
        return "no patch was removed"
    return "red: removed patches; green: final location of their information"


def _layers(
    canvas: Image.Image, pen: ImageDraw.ImageDraw, seen: Image.Image, explanation: Explanation, top: int
) -> int:
    """Draw one small image for every reduction. Returns the bottom."""
    side = (_WIDTH - 2 * _MARGIN - (_COLUMNS - 1) * 12) // _COLUMNS
    for index, layer in enumerate(explanation.layers):
        row, column = divmod(index, _COLUMNS)
        left, line_top = _MARGIN + column * (side + 12), top + row * (side + 34)
        canvas.paste(_veiled(seen, side, explanation.grid, layer.kept, _VEIL), (left, line_top))
        pen.text((left, line_top + side + 4), _layer_title(layer), _QUIET, _font(12))
    num_rows = -(-len(explanation.layers) // _COLUMNS)
    return top + num_rows * (side + 34) - (10 if num_rows else _GAP)


def _layer_title(layer: Layer) -> str:
    where = {
        "encoder": f"tower {layer.layer + 1}",
        "features": "tower's output",
        "decoder": f"decoder {layer.layer + 1}",
    }[layer.site]
    return f"{where}: {len(layer.kept)} kept"


def _veiled(
    seen: Image.Image, side: int, grid: tuple[int, int], kept: Iterable[int], strength: float
) -> Image.Image:
    """The image with a veil over removed patches."""
    panel = seen.resize((side, side), Image.Resampling.LANCZOS)
    mask = Image.new("L", panel.size, round(255 * strength))
    pen = ImageDraw.Draw(mask)
    for token in kept:
        for box in _boxes(token, side, grid):
            pen.rectangle(box, 0)
    panel.paste(Image.new("RGB", panel.size, _DIM), mask=mask)
    return panel


def _followed(
    seen: Image.Image, side: int, explanation: Explanation, kept: Iterable[int], patches: Sequence[int]
) -> Image.Image:
    """The image with removed patches boxed in red, and in green the patches that took over their information."""
    grid = explanation.grid
    panel = _veiled(seen, side, grid, kept, _FAINT)
    targets = {left.token: left.targets for left in explanation.destinations}
    flows = [(patch, token, share) for patch in patches for token, share in targets.get(patch, ())]
    for source, token, share in flows:
        for start, end in zip(_boxes(source, side, grid), _boxes(token, side, grid), strict=False):
            layer = Image.new("RGBA", panel.size)
            pen = ImageDraw.Draw(layer)
            pen.line([_middle(start), _middle(end)], (*_GREEN, round(60 + 120 * share)), 2)
            pen.rectangle(end, (*_GREEN, round(150 * share)), (*_GREEN, round(90 + 165 * share)), 3)
            panel.paste(layer, mask=layer)
    pen = ImageDraw.Draw(panel)
    for patch in patches:
        for box in _boxes(patch, side, grid):
            pen.rectangle(box, outline=_RED, width=3)
    return panel


def _boxes(token: int, side: int, grid: tuple[int, int]) -> Iterator[Box]:
    """Box of a token, none if it has no place in the grid."""
    rows, columns = grid
    row, column = divmod(token, columns)
    if row < rows:
        edges = (column * side / columns, row * side / rows)
        ends = ((column + 1) * side / columns, (row + 1) * side / rows)
        yield round(edges[0]), round(edges[1]), round(ends[0]) - 1, round(ends[1]) - 1


def _middle(box: Box) -> tuple[float, float]:
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
