// The image with its patches, layer by layer, and the destinations of a chosen patch's information.
import { departures, layerName, whatWentInto, whereIs } from "./trace.js";

const CLASSES = ["is-left", "is-now", "is-chosen", "is-target", "is-origin"];
const PLAY_MILLISECONDS = 800;
const $ = (id) => document.getElementById(id);
const percent = (share) => `${share >= 0.0995 ? Math.round(share * 100) : (share * 100).toFixed(1)}%`;

export class Stage {
  constructor() {
    this.cells = [];
    this.timer = null;
    $("layer").addEventListener("input", () => this.show(Number($("layer").value)));
    $("previous").addEventListener("click", () => this.show(this.count - 1));
    $("next").addEventListener("click", () => this.show(this.count + 1));
    $("play").addEventListener("click", () => (this.timer ? this.stop() : this.play()));
    $("patches").addEventListener("click", (event) => this.onClick(event));
    $("patches").addEventListener("keydown", (event) => this.onKey(event));
  }

  load(explanation, image) {
    this.stop();
    this.explanation = explanation;
    this.layers = explanation.layers;
    this.when = departures(this.layers);
    this.chosen = null;
    $("picture").src = image.src;
    this.place(image);
    this.build(explanation.grid);
    $("layer").max = this.layers.length;
    this.show(this.layers.length);
  }

  // The model sees the central square of the image, or all of it.
  place(image) {
    const { naturalWidth: width, naturalHeight: height } = image;
    const side = this.explanation.central_square;
    const shown = side === null ? [width, height] : [side * Math.min(width, height), side * Math.min(width, height)];
    const style = $("patches").style;
    style.left = `${50 - (50 * shown[0]) / width}%`;
    style.top = `${50 - (50 * shown[1]) / height}%`;
    style.width = `${(100 * shown[0]) / width}%`;
    style.height = `${(100 * shown[1]) / height}%`;
    $("stage").style.maxWidth = `${Math.round(560 * Math.min(1, width / height))}px`;
  }

  build([rows, columns]) {
    const grid = $("patches");
    grid.replaceChildren();
    grid.style.gridTemplate = `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)`;
    grid.setAttribute("aria-rowcount", rows);
    grid.setAttribute("aria-colcount", columns);
    this.cells = [];
    for (let row = 0; row < rows; row += 1) {
      const line = document.createElement("div");
      line.setAttribute("role", "row");
      for (let column = 0; column < columns; column += 1) {
        const cell = document.createElement("div");
        cell.className = "patch";
        cell.setAttribute("role", "gridcell");
        cell.tabIndex = -1;
        cell.dataset.token = this.cells.length;
        this.cells.push(cell);
        line.append(cell);
      }
      grid.append(line);
    }
    this.cells[0].tabIndex = 0;
  }

  get numPatches() {
    return this.cells.length;
  }

  nameOf(token) {
    if (token >= this.numPatches) return `fused token ${token - this.numPatches + 1}`;
    const columns = this.explanation.grid[1];
    return `row ${Math.floor(token / columns) + 1}, column ${(token % columns) + 1}`;
  }

  show(count) {
    this.count = Math.max(0, Math.min(this.layers.length, count));
    $("layer").value = this.count;
    $("previous").disabled = this.count === 0;
    $("next").disabled = this.count === this.layers.length;
    const layer = this.layers[this.count - 1];
    const text = layer
      ? `${this.count} of ${this.layers.length}: ${layerName(layer)}, ${layer.left.length} leave, ${layer.kept.length} stay`
      : `before any reduction: ${this.numPatches} patches`;
    $("caption").textContent = this.layers.length ? text : "Every patch was kept.";
    $("layer").setAttribute("aria-valuetext", $("caption").textContent);
    this.paint();
  }

  paint() {
    const sizes = new Map();
    const last = this.layers[this.count - 1];
    last?.kept.forEach((token, index) => sizes.set(token, last.sizes[index]));
    this.cells.forEach((cell, token) => {
      cell.classList.remove(...CLASSES);
      cell.style.removeProperty("--share");
      cell.setAttribute("aria-selected", token === this.chosen);
      const left = this.when.get(token);
      let state = "kept";
      if (left !== undefined && left < this.count) {
        state = left === this.count - 1 ? "leaves in this layer" : "has left";
        cell.classList.add(left === this.count - 1 ? "is-now" : "is-left");
      } else if ((sizes.get(token) ?? 1) > 1.0005) {
        state = `kept, represents ${sizes.get(token).toFixed(1)} patches`;
      }
      cell.setAttribute("aria-label", `${this.nameOf(token)}: ${state}`);
    });
    this.describe();
  }

  mark(tokens, name) {
    const most = Math.max(...tokens.map(([, share]) => share), 1e-9);
    for (const [token, share] of tokens) {
      const cell = this.cells[token];
      cell?.classList.add(name);
      cell?.style.setProperty("--share", (share / most).toFixed(3));
    }
  }

  describe() {
    const detail = $("detail");
    detail.replaceChildren();
    const say = (tag, text) => detail.appendChild(Object.assign(document.createElement(tag), { textContent: text }));
    if (this.chosen === null) {
      say("p", "Choose a removed patch to see where its information went, or a kept one to see what was merged into it.");
      return;
    }
    this.cells[this.chosen]?.classList.add("is-chosen");
    const name = this.nameOf(this.chosen);
    say("h3", name[0].toUpperCase() + name.slice(1));
    const left = this.when.get(this.chosen);
    if (left === undefined || left >= this.count) {
      const origins = whatWentInto(this.layers, this.chosen, this.count);
      this.mark(origins, "is-origin");
      const where = left === undefined ? "Kept to the end." : `Kept so far; leaves in the ${layerName(this.layers[left])}.`;
      const taken = origins.length === 1 ? "1 other token" : `${origins.length} other tokens`;
      say("p", `${where} ${origins.length ? `It received information from ${taken}:` : "No other token was merged into it so far."}`);
      this.list(origins);
      return;
    }
    const { shares, lost } = whereIs(this.layers, this.chosen, this.count);
    this.mark(shares, "is-target");
    const since = this.count - 1 > left ? `, and now is, ${this.count - 1 - left} ${this.count - left > 2 ? "layers" : "layer"} later, in` : " and went into";
    say("p", `Left in the ${layerName(this.layers[left])}${shares.length ? since : ". Its information was dropped"}${shares.length ? ":" : "."}`);
    this.list(shares);
    if (shares.length && lost > 0.0005) say("p", `${percent(lost)} went to others or was dropped.`);
  }

  list(shares, most = 8) {
    if (!shares.length) return;
    const list = document.createElement("ol");
    for (const [token, share] of shares.slice(0, most)) {
      const item = document.createElement("li");
      const name = document.createElement(token < this.numPatches ? "button" : "span");
      name.textContent = this.nameOf(token);
      name.addEventListener("click", () => this.choose(token));
      const value = document.createElement("span");
      value.textContent = percent(share);
      item.append(name, value);
      list.append(item);
    }
    $("detail").append(list);
    if (shares.length > most) {
      $("detail").append(Object.assign(document.createElement("p"), { textContent: `and ${shares.length - most} more` }));
    }
  }

  choose(token) {
    this.chosen = token;
    this.focusOn(token, false);
    this.paint();
  }

  focusOn(token, move = true) {
    this.cells.forEach((cell) => (cell.tabIndex = -1));
    this.cells[token].tabIndex = 0;
    if (move) this.cells[token].focus();
  }

  onClick(event) {
    const cell = event.target.closest(".patch");
    if (cell) this.choose(Number(cell.dataset.token));
  }

  onKey(event) {
    const token = Number(event.target.dataset.token);
    const [rows, columns] = this.explanation.grid;
    const column = token % columns;
    const moves = {
      ArrowLeft: column > 0 ? -1 : 0,
      ArrowRight: column < columns - 1 ? 1 : 0,
      ArrowUp: token >= columns ? -columns : 0,
      ArrowDown: token < (rows - 1) * columns ? columns : 0,
      Home: -column,
      End: columns - 1 - column,
    };
    if (event.key in moves) this.focusOn(token + moves[event.key]);
    else if (event.key === "Enter" || event.key === " ") this.choose(token);
    else if (event.key === "Escape") {
      this.chosen = null;
      this.paint();
    } else return;
    event.preventDefault();
  }

  play() {
    if (this.count === this.layers.length) this.show(0);
    this.timer = setInterval(() => {
      this.show(this.count + 1);
      if (this.count === this.layers.length) this.stop();
    }, PLAY_MILLISECONDS);
    $("play").textContent = "❚❚";
    $("play").setAttribute("aria-label", "Stop");
  }

  stop() {
    clearInterval(this.timer);
    this.timer = null;
    $("play").textContent = "▶";
    $("play").setAttribute("aria-label", "Play the layers");
  }
}
