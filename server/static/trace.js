// Follows information through the layers of an explanation. Tokens are numbers; see the schema of /ficoco/explain.

const byShare = (shares) => [...shares].sort((a, b) => b[1] - a[1] || a[0] - b[0]);

// Location of the information of every token that has left after the first `count` layers: token to
// { shares: [[token, share], ...], lost }, the largest share first.
export function destinations(layers, count) {
  const held = new Map();
  for (const layer of layers.slice(0, count).reverse()) {
    for (const left of layer.left) {
      const mass = new Map();
      let lost = left.lost + left.rest;
      for (const [target, share] of left.targets) {
        const later = held.get(target);
        if (!later) mass.set(target, (mass.get(target) ?? 0) + share);
        else {
          for (const [token, part] of later.shares) mass.set(token, (mass.get(token) ?? 0) + share * part);
          lost += share * later.lost;
        }
      }
      held.set(left.token, { shares: byShare(mass), lost });
    }
  }
  return held;
}

// Tokens merged into `token` by the first `count` layers, with the share of their own information.
export function origins(layers, token, count) {
  const weight = new Map([[token, 1]]);
  for (const layer of layers.slice(0, count).reverse()) {
    for (const left of layer.left) {
      const sum = left.targets.reduce((total, [target, share]) => total + share * (weight.get(target) ?? 0), 0);
      if (sum > 0) weight.set(left.token, sum);
    }
  }
  weight.delete(token);
  return byShare(weight);
}

// Token to the index of the layer (in `layers`) where it left.
export function departures(layers) {
  const when = new Map();
  layers.forEach((layer, index) => layer.left.forEach((left) => when.set(left.token, index)));
  return when;
}

function ordinal(number) {
  const tens = number % 100;
  const ending = tens > 10 && tens < 14 ? "th" : ({ 1: "st", 2: "nd", 3: "rd" })[number % 10] ?? "th";
  return `${number}${ending}`;
}

export function layerName(layer) {
  if (layer.site === "features") return "output of the vision tower";
  const part = layer.site === "encoder" ? "vision tower" : "language model";
  return `${ordinal(layer.layer + 1)} layer of the ${part}`;
}
