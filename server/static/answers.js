// Headline, both answers, and a table of their costs.
const $ = (id) => document.getElementById(id);

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;
}

function bytes(value) {
  const unit = value >= 1e9 ? [1e9, "GB"] : value >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  return `${(value / unit[0]).toPrecision(3)} ${unit[1]}`;
}

function change(before, after) {
  const percent = Math.round((100 * (after - before)) / Math.max(before, 1e-9));
  return percent < 0 ? `−${-percent}%` : percent > 0 ? `+${percent}%` : "±0%";
}

function add(parent, tag, text, name) {
  const element = Object.assign(document.createElement(tag), { textContent: text ?? "" });
  if (name) element.className = name;
  return parent.appendChild(element);
}

// Texts of an explanation, for the page, for the PNG and for screen readers.
export function words({ reduced, full, keep }, title) {
  const before = full.last_visual_tokens;
  const after = reduced.last_visual_tokens;
  const percent = Math.round(100 * (1 - after / before));
  const place = reduced.visual_tokens === after ? "reach the language model" : "are left in the last layer of the language model";
  const isSame = reduced.answer.trim() === full.answer.trim();
  return {
    headline: percent > 0 ? `${percent}% fewer visual tokens` : "All visual tokens are kept",
    explained: `${after} of ${before} visual tokens ${place}. ${isSame ? "Both answers are the same." : "The answers differ."}`,
    answers: [
      [`All ${before} tokens`, full.answer.trim() || "(no words)"],
      [`${title}, ${after} kept`, reduced.answer.trim() || "(no words)"],
    ],
    name: `${title}, ${keep} kept`,
  };
}

// `runs`: explanations of one request, asked one after the other.
export function show(runs, title) {
  const said = words(runs[0], title);
  $("headline").textContent = said.headline;
  $("explained").textContent = said.explained;
  $("answers").replaceChildren();
  said.answers.forEach(([name, answer], index) => {
    const section = add($("answers"), "section", "", index ? "answer is-reduced" : "answer");
    add(section, "h3", name);
    add(section, "p", answer, "said");
  });
  showFigures(runs);
  return said;
}

export function showFigures(runs) {
  const [{ full, reduced }] = runs;
  const times = (side, field) => median(runs.map((run) => run[side][field]));
  const many = runs.length > 1 ? `median of ${runs.length}` : "one measurement";
  const rows = [
    ["KV cache", "of the prompt", full.kv_bytes, reduced.kv_bytes, bytes],
    ["First token", many, times("full", "ttft_seconds"), times("reduced", "ttft_seconds"), seconds],
    ["Whole answer", many, times("full", "total_seconds"), times("reduced", "total_seconds"), seconds],
  ];
  const body = document.querySelector("#figures tbody");
  body.replaceChildren();
  for (const [name, note, before, after, format] of rows) {
    const row = add(body, "tr");
    const head = add(row, "th", name);
    head.scope = "row";
    add(head, "span", note, "note");
    for (const value of [before, after]) {
      const cell = add(row, "td", format(value));
      add(cell, "span", "", "bar").style.setProperty("--part", (value / Math.max(before, after, 1e-9)).toFixed(4));
    }
    add(row, "td", change(before, after), after < before ? "change is-less" : "change");
  }
}
