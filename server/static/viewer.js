// The form and the two answers.
import { Stage } from "./stage.js";

// Larger images are scaled down before they are sent: the model sees a few hundred pixels.
const MAX_SIDE = 2048;
const $ = (id) => document.getElementById(id);
const stage = new Stage();
let image = null;

function seconds(value) {
  return value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(2)} s`;
}

function bytes(value) {
  const unit = value >= 1e9 ? [1e9, "GB"] : value >= 1e6 ? [1e6, "MB"] : [1e3, "kB"];
  return `${(value / unit[0]).toPrecision(3)} ${unit[1]}`;
}

async function call(path, body) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  const options = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  const answer = await fetch(path, options);
  const data = await answer.json().catch(() => null);
  if (answer.status === 401) $("key-field").hidden = false;
  if (!answer.ok) {
    const detail = data?.error?.message ?? (typeof data?.error === "string" ? data.error : data?.detail);
    throw new Error(typeof detail === "string" ? detail : `The server answered ${answer.status}.`);
  }
  return data;
}

async function loadOptions() {
  try {
    const options = await call("options");
    $("error").textContent = "";
    $("model").textContent = options.model;
    $("method").replaceChildren(
      ...options.methods.map(({ name, title }) => new Option(title, name, false, name === options.method)),
    );
    $("keep").min = options.min_keep;
    $("keep").max = options.max_keep;
    $("keep").value = options.keep;
    $("keep-value").textContent = `${options.keep} of ${options.max_keep}`;
    $("ask").disabled = false;
  } catch (error) {
    $("ask").disabled = true;
    $("error").textContent = $("key").value || $("key-field").hidden ? error.message : "";
  }
}

// Redraws the image, so that the shown image equals the sent one: rotation applied, of bounded size.
async function takeImage(file) {
  $("error").textContent = "";
  if (!file) return;
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const context = canvas.getContext("2d");
    context.fillStyle = "#fff"; // background of transparent images
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    image = new Image();
    image.src = file.type === "image/jpeg" ? canvas.toDataURL("image/jpeg", 0.95) : canvas.toDataURL("image/png");
    await image.decode();
    $("preview").src = image.src;
    $("preview").alt = `Chosen image: ${file.name}`;
    $("preview").hidden = false;
    $("drop").classList.add("has-image");
    $("drop-text").firstChild.textContent = "Choose another image";
  } catch {
    $("error").textContent = `${file.name || "This file"} is not an image that this browser can read.`;
  }
}

function card(measured, other, title, isReduced) {
  const section = document.createElement("section");
  section.className = isReduced ? "answer is-reduced" : "answer";
  const add = (parent, tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return parent.appendChild(element);
  };
  add(section, "h2", title);
  add(section, "p", measured.answer.trim() || "(no words)", "said");
  const list = add(section, "dl");
  const tokens = measured.last_visual_tokens === measured.visual_tokens
    ? `${measured.visual_tokens}`
    : `${measured.visual_tokens} → ${measured.last_visual_tokens}`;
  const rows = [
    ["Visual tokens", tokens, "last_visual_tokens"],
    ["First token", seconds(measured.ttft_seconds), "ttft_seconds"],
    ["Whole answer", seconds(measured.total_seconds), "total_seconds"],
    ["KV cache", bytes(measured.kv_bytes), "kv_bytes"],
  ];
  for (const [name, text, field] of rows) {
    add(list, "dt", name);
    const bar = add(add(list, "dd", undefined, "bar"), "span");
    bar.style.setProperty("--part", (measured[field] / Math.max(measured[field], other?.[field] ?? 0, 1e-9)).toFixed(4));
    bar.parentElement.setAttribute("aria-hidden", "true");
    add(list, "dd", text);
  }
  return section;
}

async function ask(event) {
  event.preventDefault();
  if (!image) {
    $("error").textContent = "Choose an image first.";
    return;
  }
  $("error").textContent = "";
  $("ask").disabled = true;
  $("ask").textContent = "Asking …";
  try {
    const sent = image;
    const explanation = await call("explain", {
      image: sent.src,
      question: $("question").value,
      method: $("method").value,
      keep: Number($("keep").value),
    });
    const title = $("method").selectedOptions[0].textContent;
    const cards = [card(explanation.reduced, explanation.full, `${title}, ${explanation.keep} kept`, true)];
    if (explanation.full) {
      cards.unshift(card(explanation.full, explanation.reduced, `All ${explanation.full.visual_tokens} visual tokens`, false));
    }
    $("answers").replaceChildren(...cards);
    $("empty").hidden = true;
    $("answers").hidden = false;
    $("way").hidden = false;
    stage.load(explanation, sent);
    if (matchMedia("(max-width: 860px)").matches) $("result").scrollIntoView();
  } catch (error) {
    $("error").textContent = error.message;
  } finally {
    $("ask").disabled = false;
    $("ask").textContent = "Ask";
  }
}

$("form").addEventListener("submit", ask);
$("keep").addEventListener("input", () => ($("keep-value").textContent = `${$("keep").value} of ${$("keep").max}`));
$("file").addEventListener("change", () => takeImage($("file").files[0]));
$("key-use").addEventListener("click", loadOptions);
$("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  loadOptions();
});
for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    $("drop").classList.add("is-over");
  });
}
document.addEventListener("dragleave", (event) => event.relatedTarget ?? $("drop").classList.remove("is-over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("is-over");
  takeImage(event.dataTransfer.files[0]);
});
loadOptions();
