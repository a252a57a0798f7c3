// The map: the image with its patches, step by step, and the path of a chosen patch's information.
import { apply, legend, marks, MODES } from "./marks.js";
import { departures, destinations, layerName, origins } from "./trace.js";

const PLAY_MILLISECONDS = 900;
const $ = (id) => document.getElementById(id);
const percent = (share) => `${share >= 0.0995 ? Math.round(share * 100) : (share * 100).toFixed(1)}%`;
const many = (count, noun) => (count === 1 ? `1 ${noun}` : `${count} ${noun}s`);

function element(tag, properties = {}, attributes = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export class Stage {
  // `onChange` is called after the user has changed the view.
  constructor(onChange) {
    this.onChange = onChange;
    this.mode = MODES[0][0];
    this.timer = null;
    for (const [name, title] of MODES) {
      const input = element("input", { type: "radio", name: "mode", value: name, checked: name === this.mode });
      input.addEventListener("change", () => this.setMode(name));
      const label = element("label");
      label.append(input, element("span", { textContent: title }));
      $("modes").append(label);
    }
    $("layer").addEventListener("input", () => this.go(Number($("layer").value)));
    $("previous").addEventListener("click", () => this.go(this.step - 1));
    $("next").addEventListener("click", () => this.go(this.step + 1));
    $("play").addEventListener("click", () => (this.timer ? this.stop() : this.play()));
    $("panels").addEventListener("click", (event) => this.onClick(event));
    $("panels").addEventListener("keydown", (event) => this.onKey(event));
  }

  // `state`: mode, step and patch of a link; null for what it leaves out.
  load(explanation, image, state = {}) {
    this.stop();
    this.layers = explanation.layers;
    this.views = explanation.views;
    this.when = departures(this.layers);
    this.cells = [];
    this.chosen = null;
    const whole = this.views.filter((view) => view.tile === null);
    const tiles = this.views.filter((view) => view.tile !== null);
    $("panels").replaceChildren(this.panel(whole, image, tiles.length ? "Base tile: the whole image" : ""));
    if (tiles.length) $("panels").append(this.panel(tiles, image, `${many(tiles.length, "tile")} of higher resolution`));
    if (state.patch !== null && state.patch < this.cells.length) this.chosen = state.patch;
    $("layer").max = this.lastStep;
    if (MODES.some(([name]) => name === state.mode)) this.mode = state.mode;
    for (const input of $("modes").querySelectorAll("input")) input.checked = input.value === this.mode;
    this.show(state.step ?? this.lastStep);
  }

  // Before any reduction, one for each layer that reduces, and the result.
  get lastStep() {
    return this.layers.length ? this.layers.length + 1 : 0;
  }

  get numPatches() {
    return this.cells.length;
  }

  panel(views, image, title) {
    const figure = element("figure");
    const stage = element("div", { className: "stage" });
    stage.style.setProperty("--shape", image.naturalWidth / image.naturalHeight);
    stage.append(element("img", { src: image.src, alt: "The image of the question" }));
    for (const view of views) stage.append(this.grid(view, title && (view.tile ? `Tile in row ${view.tile[0] + 1}, column ${view.tile[1] + 1}` : "Base tile")));
    figure.append(stage);
    if (title) figure.append(element("figcaption", { textContent: title }));
    return figure;
  }

  grid(view, title) {
    const [rows, columns] = view.grid;
    const label = `${title || "Patches of the image"}. Arrow keys move, Enter chooses.`;
    const grid = element("div", { className: "view" }, { role: "grid", "aria-label": label, "aria-rowcount": rows, "aria-colcount": columns });
    const [left, top, width, height] = view.box.map((part) => `${100 * part}%`);
    Object.assign(grid.style, { left, top, width, height, gridTemplate: `repeat(${rows}, 1fr) / repeat(${columns}, 1fr)` });
    for (let row = 0; row < rows; row += 1) {
      const line = element("div", {}, { role: "row" });
      for (let column = 0; column < columns; column += 1) {
        const cell = element("div", { className: "patch", tabIndex: row + column ? -1 : 0 }, { role: "gridcell" });
        cell.dataset.token = this.cells.length;
        this.cells.push(cell);
        line.append(cell);
      }
      grid.append(line);
    }
    return grid;
  }

  viewOf(token) {
    return this.views.findLast((view) => view.first <= token);
  }

  nameOf(token) {
    if (token >= this.numPatches) return `token without a patch ${token - this.numPatches + 1}`;
    const view = this.viewOf(token);
    const place = token - view.first;
    const part = this.views.length === 1 ? "" : view.tile ? `tile ${view.tile[0] + 1}.${view.tile[1] + 1}, ` : "base tile, ";
    return `${part}row ${Math.floor(place / view.grid[1]) + 1}, column ${(place % view.grid[1]) + 1}`;
  }

  setMode(mode) {
    this.mode = mode;
    this.show(this.step);
    this.onChange();
  }

  go(step) {
    this.stop();
    this.show(step);
    this.onChange();
  }

  show(step) {
    this.step = Math.max(0, Math.min(this.lastStep, step));
    $("layer").value = this.step;
    $("previous").disabled = this.step === 0;
    $("next").disabled = this.step === this.lastStep;
    this.at = this.state();
    $("caption").textContent = this.caption();
    $("layer").setAttribute("aria-valuetext", $("caption").textContent);
    this.paint();
  }

  // State of all tokens at the shown step.
  state() {
    const { layers, when, step } = this;
    const count = Math.min(step, layers.length);
    const last = layers[count - 1];
    const isResult = step > layers.length;
    return {
      count,
      isResult,
      numPatches: this.numPatches,
      numLeft: [...when.values()].filter((left) => left < count).length,
      sizes: new Map(last?.kept.map((token, index) => [token, last.sizes[index]])),
      rank: new Map(last?.kept.map((token, index) => [token, index])),
      destinations: destinations(layers, count),
      origins: (token) => origins(layers, token, count),
      state: (token) => {
        const left = when.get(token);
        if (left === undefined || left >= count) return "kept";
        return left === count - 1 && !isResult ? "now" : "left";
      },
    };
  }

  caption() {
    if (!this.layers.length) return "Every patch is kept.";
    if (this.step === 0) return `Before any reduction: ${this.numPatches} patches.`;
    const layer = this.layers[this.at.count - 1];
    if (this.step <= this.layers.length) {
      return `Step ${this.step} of ${this.layers.length}, ${layerName(layer)}: ${layer.left.length} leave, ${layer.kept.length} stay.`;
    }
    const gone = [...this.at.destinations].filter(([token]) => token < this.numPatches);
    const dropped = gone.reduce((sum, [, { lost }]) => sum + lost, 0);
    const where = dropped < 0.5 ? "merged into them" : dropped > gone.length - 0.5 ? "dropped" : `${Math.round(gone.length - dropped)} merged into them and ${Math.round(dropped)} dropped`;
    const biggest = Math.max(...layer.sizes);
    const size = biggest > 1.5 ? ` The largest represents ${biggest.toFixed(0)} patches.` : "";
    return `Result: ${many(layer.kept.length, "token")} kept, ${many(gone.length, "patch").replace("patchs", "patches")} ${where.startsWith("merged") || where === "dropped" ? where : `removed: ${where}`}.${size}`;
  }

  paint() {
    const look = marks(this.mode, this.at, this.chosen);
    const words = { kept: "kept", now: "leaves in this step", left: "has left" };
    this.cells.forEach((cell, token) => {
      apply(cell, look.get(token));
      cell.classList.toggle("is-chosen", token === this.chosen);
      cell.setAttribute("aria-selected", token === this.chosen);
      const state = this.at.state(token);
      cell.dataset.state = state;
      const size = this.at.sizes.get(token) ?? 1;
      const merged = state === "kept" && size > 1.0005 ? `, represents ${size.toFixed(1)} patches` : "";
      cell.setAttribute("aria-label", `${this.nameOf(token)}: ${words[state]}${merged}`);
    });
    $("legend").replaceChildren(
      ...legend(this.mode, this.at, this.chosen).map(([text, mark]) => {
        const row = element("li");
        const swatch = element("span", { className: "swatch" });
        swatch.append(element("span"));
        apply(swatch.firstChild, mark);
        row.append(swatch, text);
        return row;
      }),
    );
    this.describe();
  }

  describe() {
    const detail = $("detail");
    detail.replaceChildren();
    const say = (tag, text) => detail.append(element(tag, { textContent: text }));
    if (this.chosen === null) {
      say("p", "Choose a removed patch to see where its information went, or a kept one to see what was merged into it.");
      return;
    }
    const name = this.nameOf(this.chosen);
    say("h3", name[0].toUpperCase() + name.slice(1));
    const left = this.when.get(this.chosen);
    if (!this.at.destinations.has(this.chosen)) {
      const merged = this.at.origins(this.chosen);
      const until = left === undefined ? "Kept to the end." : `Kept so far; leaves in the ${layerName(this.layers[left])}.`;
      say("p", `${until} ${merged.length ? `It received information from ${many(merged.length, "other token")}:` : "No other token was merged into it."}`);
      this.list(merged);
      return;
    }
    const { shares, lost } = this.at.destinations.get(this.chosen);
    const where = `Left in the ${layerName(this.layers[left])}.`;
    say("p", `${where} ${shares.length ? `Its information is now in ${many(shares.length, "token")}:` : "Its information was dropped."}`);
    this.list(shares);
    if (shares.length && lost > 0.0005) say("p", `${percent(lost)} went to others or was dropped.`);
  }

  list(shares, most = 8) {
    if (!shares.length) return;
    const list = element("ol");
    for (const [token, share] of shares.slice(0, most)) {
      const item = element("li");
      const name = element(token < this.numPatches ? "button" : "span", { textContent: this.nameOf(token) });
      if (token < this.numPatches) {
        name.type = "button";
        name.addEventListener("click", () => this.choose(token, true));
      }
      item.append(name, element("span", { textContent: percent(share) }));
      list.append(item);
    }
    $("detail").append(list);
    if (shares.length > most) $("detail").append(element("p", { textContent: `and ${shares.length - most} more` }));
  }

  choose(token, isFocused = false) {
    this.chosen = token;
    if (token !== null) this.focusOn(token, isFocused);
    this.paint();
    this.onChange();
  }

  focusOn(token, isFocused = true) {
    const grid = this.cells[token].closest(".view");
    grid.querySelector('[tabindex="0"]').tabIndex = -1;
    this.cells[token].tabIndex = 0;
    if (isFocused) this.cells[token].focus();
  }

  onClick(event) {
    const cell = event.target.closest(".patch");
    if (cell) this.choose(Number(cell.dataset.token));
  }

  onKey(event) {
    const token = Number(event.target.dataset.token);
    const view = this.viewOf(token);
    const [rows, columns] = view.grid;
    const place = token - view.first;
    const column = place % columns;
    const moves = {
      ArrowLeft: column > 0 ? -1 : 0,
      ArrowRight: column < columns - 1 ? 1 : 0,
      ArrowUp: place >= columns ? -columns : 0,
      ArrowDown: place < (rows - 1) * columns ? columns : 0,
      Home: -column,
      End: columns - 1 - column,
    };
    if (event.key in moves) this.focusOn(token + moves[event.key]);
    else if (event.key === "Enter" || event.key === " ") this.choose(token);
    else if (event.key === "Escape") this.choose(null);
    else return;
    event.preventDefault();
  }

  play() {
    if (this.step === this.lastStep) this.show(0);
    this.timer = setInterval(() => {
      this.show(this.step + 1);
      if (this.step === this.lastStep) this.stop();
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
