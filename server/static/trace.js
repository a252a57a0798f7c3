// Follows information through the layers of an explanation. Tokens are numbers; see the schema of /ficoco/explain.

// Location of the information of `token` after the first `count` layers: shares by token, and the lost share.
export function whereIs(layers, token, count) {
  let mass = new Map([[token, 1]]);
  let lost = 0;
  for (const layer of layers.slice(0, count)) {
    const next = new Map(mass);
    for (const left of layer.left) {
      const amount = mass.get(left.token);
      if (amount === undefined) continue;
      next.delete(left.token);
      for (const [target, share] of left.targets) next.set(target, (next.get(target) ?? 0) + amount * share);
      lost += amount * (left.lost + left.rest);
    }
    mass = next;
  }
  return { shares: [...mass].sort((a, b) => b[1] - a[1] || a[0] - b[0]), lost };
}

// Tokens merged into `token` by the first `count` layers, with the share of their own information.
export function whatWentInto(layers, token, count) {
  const weight = new Map([[token, 1]]);
  for (const layer of layers.slice(0, count).reverse()) {
    for (const left of layer.left) {
      const sum = left.targets.reduce((total, [target, share]) => total + share * (weight.get(target) ?? 0), 0);
      if (sum > 0) weight.set(left.token, sum);
    }
  }
  weight.delete(token);
  return [...weight].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
}

// Token to the index of the layer (in `layers`) where it left.
export function departures(layers) {
  const when = new Map();
  layers.forEach((layer, index) => layer.left.forEach((left) => when.set(left.token, index)));
  return when;
}

export function ordinal(number) {
  const tens = number % 100;
  const ending = tens > 10 && tens < 14 ? "th" : ({ 1: "st", 2: "nd", 3: "rd" })[number % 10] ?? "th";
  return `${number}${ending}`;
}

export function layerName(layer) {
  if (layer.site === "features") return "output of the vision tower";
  const part = layer.site === "encoder" ? "vision tower" : "language model";
  return `${ordinal(layer.layer + 1)} layer of the ${part}`;
}
