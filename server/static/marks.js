// How a patch looks on the map: a fill over the image and a ring. The page and the PNG draw the same marks.

const RING = "#3ee08f";
const VEIL = "rgb(22 26 31 / 76%)";
const DROPPED = "rgb(0 0 0 / 90%)";
const NOW = "rgb(214 126 22 / 80%)";
const CHOSEN = "#ff3b46";
const target = (strength) => `rgb(20 168 98 / ${(0.2 + 0.65 * strength).toFixed(3)})`;
const origin = (strength) => `rgb(48 116 230 / ${(0.25 + 0.6 * strength).toFixed(3)})`;
const HEAT = [[255, 236, 150], [244, 120, 50], [140, 0, 60]];

export const MODES = [
  ["kept", "Kept"],
  ["sizes", "Sizes"],
  ["flow", "Destinations"],
];

function heat(part) {
  const place = Math.min(part, 0.999) * (HEAT.length - 1);
  const [low, high] = [HEAT[Math.floor(place)], HEAT[Math.floor(place) + 1]];
  const colour = low.map((value, index) => Math.round(value + (high[index] - value) * (place % 1)));
  return `rgb(${colour.join(" ")} / 85%)`;
}

// Neighbours in the order of the tokens get hues that are far apart.
const territory = (rank, alpha) => `hsl(${Math.round((rank * 137.508) % 360)} 75% 52% / ${alpha})`;

// Marks of all patches. `view`: mode, step, chosen token; `at`: state of the tokens at that step, see stage.js.
export function marks(mode, at, chosen) {
  const look = new Map();
  const biggest = Math.max(...at.sizes.values(), 2);
  for (let token = 0; token < at.numPatches; token += 1) {
    const state = at.state(token);
    let mark = {};
    if (state === "now") mark = { fill: NOW };
    else if (state === "left") mark = { fill: VEIL };
    else if (at.numLeft) mark = { ring: RING };
    if (mode === "sizes" && state === "kept" && at.numLeft) {
      mark = { fill: heat(Math.log(Math.max(1, at.sizes.get(token) ?? 1)) / Math.log(biggest)) };
    } else if (mode === "flow" && at.numLeft) {
      const [main] = at.destinations.get(token)?.shares ?? [];
      if (state === "kept") mark = { fill: territory(at.rank.get(token), 0.85), ring: "#fff" };
      else mark = { fill: main ? territory(at.rank.get(main[0]) ?? 0, 0.55) : DROPPED };
    }
    look.set(token, mark);
  }
  if (chosen !== null) choose(look, at, chosen);
  return look;
}

function choose(look, at, chosen) {
  const isGone = at.destinations.has(chosen);
  const shares = isGone ? at.destinations.get(chosen).shares : at.origins(chosen);
  const most = Math.max(...shares.map(([, share]) => share), 1e-9);
  for (const [token, share] of shares) {
    if (look.has(token)) look.set(token, { fill: (isGone ? target : origin)(share / most), ring: isGone ? RING : undefined });
  }
  if (look.has(chosen)) look.set(chosen, { ...look.get(chosen), ring: CHOSEN, isThick: true });
}

export function legend(mode, at, chosen) {
  const rows = [];
  if (mode === "kept") {
    rows.push(["kept", { ring: RING }]);
    if (!at.isResult) rows.push(["leaves in this step", { fill: NOW }]);
    rows.push(["removed", { fill: VEIL }]);
  }
  if (mode === "sizes") {
    const biggest = Math.max(...at.sizes.values(), 1);
    rows.push(["a kept token of 1 patch", { fill: heat(0) }], [`of ${biggest.toFixed(0)} patches`, { fill: heat(1) }], ["removed", { fill: VEIL }]);
  }
  if (mode === "flow") {
    rows.push(["a kept token", { fill: territory(0, 0.85), ring: "#fff" }], ["merged mostly into the token of its colour", { fill: territory(0, 0.55) }]);
    rows.push(["dropped", { fill: DROPPED }]);
  }
  if (chosen !== null) {
    rows.push(["chosen", { ring: CHOSEN, isThick: true }]);
    rows.push(at.destinations.has(chosen) ? ["received its information (stronger: more)", { fill: target(1), ring: RING }] : ["merged into it (stronger: more)", { fill: origin(1) }]);
  }
  return rows;
}

export function apply(element, { fill = "", ring, isThick }) {
  element.style.background = fill;
  element.style.boxShadow = ring ? `inset 0 0 0 ${isThick ? 3 : 1.5}px ${ring}` : "";
}

export function paint(context, { fill, ring, isThick }, left, top, width, height) {
  if (fill) {
    context.fillStyle = fill;
    context.fillRect(left, top, width, height);
  }
  if (ring) {
    const line = isThick ? 3 : 1.5;
    context.strokeStyle = ring;
    context.lineWidth = line;
    context.strokeRect(left + line / 2, top + line / 2, width - line, height - line);
  }
}
