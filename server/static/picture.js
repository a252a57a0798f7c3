// The shown view as a PNG: headline, question, answers and map.
import { marks, paint } from "./marks.js";

const WIDTH = 1200;
const MARGIN = 40;
const FONT = 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';

// Lines of a text, at most `most`.
function wrap(context, text, width, most) {
  const lines = [""];
  for (const word of text.split(/\s+/)) {
    const longer = `${lines.at(-1)} ${word}`.trim();
    if (context.measureText(longer).width <= width || !lines.at(-1)) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines.length > most ? [...lines.slice(0, most - 1), `${lines[most - 1]} …`] : lines;
}

// `said`: texts of answers.js. Returns a promise of a PNG blob.
export function picture(stage, image, question, said, model) {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d");
  const groups = [stage.views.filter((view) => view.tile === null), stage.views.filter((view) => view.tile !== null)].filter((views) => views.length);
  const width = groups.length > 1 ? (WIDTH - 2 * MARGIN - 24) / 2 : Math.min(WIDTH - 2 * MARGIN, 800);
  const height = Math.round((width * image.naturalHeight) / image.naturalWidth);
  const texts = [
    [said.headline, 40, "700", "#12533a"],
    [question, 24, "600", "#1d2126"],
    ...said.answers.map(([name, answer]) => [`${name}: ${answer}`, 20, "400", "#1d2126"]),
    [`${stage.caption()} ${model}`, 17, "400", "#5d6670"],
  ].map(([text, size, weight, colour]) => {
    context.font = `${weight} ${size}px ${FONT}`;
    return { lines: wrap(context, text, WIDTH - 2 * MARGIN, 3), size, weight, colour };
  });
  canvas.width = WIDTH;
  canvas.height = texts.reduce((sum, { lines, size }) => sum + lines.length * size * 1.4 + 6, 0) + height + 2 * MARGIN + 13;
  context.fillStyle = "#fff";
  context.fillRect(0, 0, canvas.width, canvas.height);
  let top = MARGIN;
  for (const { lines, size, weight, colour } of texts) {
    context.font = `${weight} ${size}px ${FONT}`;
    context.fillStyle = colour;
    for (const line of lines) context.fillText(line, MARGIN, (top += size * 1.4) - size * 0.3);
    top += 6;
  }
  top = Math.ceil(top) + 12;
  const look = marks(stage.mode, stage.at, stage.chosen);
  groups.forEach((views, index) => {
    const left = MARGIN + index * (width + 24);
    context.save();
    context.beginPath();
    context.rect(left, top, width, height);
    context.clip();
    context.drawImage(image, left, top, width, height);
    for (const view of views) drawView(context, view, look, left, top, width, height);
    context.restore();
  });
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

function drawView(context, view, look, left, top, width, height) {
  const [rows, columns] = view.grid;
  const edges = (place, count, start, size, scale) => [place, place + 1].map((index) => Math.round((start + (size * index) / count) * scale));
  for (let place = 0; place < rows * columns; place += 1) {
    const [x, right] = edges(place % columns, columns, view.box[0], view.box[2], width);
    const [y, bottom] = edges(Math.floor(place / columns), rows, view.box[1], view.box[3], height);
    paint(context, look.get(view.first + place), left + x, top + y, right - x, bottom - y);
  }
}
