// The form, and the way from a question to its answers.
import { show, showFigures } from "./answers.js";
import { call, key } from "./api.js";
import { download, fileOf, read } from "./image.js";
import * as link from "./link.js";
import { picture } from "./picture.js";
import { Stage } from "./stage.js";

// Number of times that a question is asked; the times shown are medians.
const RUNS = 3;
const $ = (id) => document.getElementById(id);
const stage = new Stage(writeLink);
let options = null;
let isKeepChosen = false; // else the request names no budget and gets the server's
let image = null;
let example = null; // file name of the chosen example, null for an image of the user
let asking = null; // AbortController of the question that is being asked
let shown = null; // what the result shows: image, question and texts

async function loadOptions() {
  try {
    options = await call("options");
  } catch (error) {
    options = null;
    $("error").textContent = error.message;
    if (error.status === 401) {
      key.forget();
      $("key-field").hidden = false;
      $("key").focus();
    }
    return;
  }
  $("error").textContent = "";
  $("key-field").hidden = true;
  $("model").textContent = options.model;
  $("model").hidden = false;
  $("method").replaceChildren(...options.methods.map(({ name, title }) => new Option(title, name)));
  $("keep-label").textContent = options.keep_per === "tile" ? "Tokens kept in each tile" : "Visual tokens kept";
  $("keep").min = options.min_keep;
  $("keep").max = options.max_keep;
  $("examples").replaceChildren(...options.examples.map(thumbnail));
  $("examples-field").hidden = !options.examples.length;
  await openLink();
}

function setFields({ method, keep }) {
  const known = options.methods.some(({ name }) => name === method);
  $("method").value = known ? method : options.method;
  isKeepChosen = keep !== null && keep !== undefined;
  // The share that a server without a budget keeps; shown as a position alone.
  $("keep").value = keep ?? options.keep ?? Math.max(options.min_keep, Math.round(options.max_keep / 9));
  describeFields();
}

function describeFields() {
  const isServers = !isKeepChosen && options && options.keep === null;
  $("keep-value").textContent = isServers ? "follows the image" : `${$("keep").value} of ${$("keep").max}`;
  $("method-summary").textContent = options?.methods.find(({ name }) => name === $("method").value)?.summary ?? "";
}

function thumbnail(choice) {
  const button = document.createElement("button");
  button.type = "button";
  button.dataset.name = nameOf(choice);
  button.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-label", `Example: ${choice.question}`);
  button.title = choice.question;
  button.append(Object.assign(new Image(), { src: choice.image, alt: "" }));
  button.addEventListener("click", async () => {
    if (await takeExample(choice)) ask();
  });
  return button;
}

const nameOf = (choice) => choice.image.split("/").pop();

async function takeExample(choice, question = choice.question) {
  try {
    const blob = await (await fetch(choice.image)).blob();
    $("question").value = question;
    return await takeImage(blob, nameOf(choice), true);
  } catch {
    $("error").textContent = "The example cannot be loaded. The server may have stopped.";
    return false;
  }
}

async function takeImage(blob, name, isExample = false) {
  if (!blob) return false;
  $("error").textContent = "";
  try {
    image = await read(blob, name);
  } catch (error) {
    $("error").textContent = error.message;
    return false;
  }
  example = isExample ? name : null;
  for (const button of $("examples").children) button.setAttribute("aria-pressed", String(button.dataset.name === example));
  $("preview").src = image.src;
  $("preview").alt = `Chosen image: ${name}`;
  $("preview").hidden = false;
  $("drop").classList.add("has-image");
  $("drop-text").textContent = "Choose another image";
  return true;
}

// The view of the address; a link to an example asks its question.
async function openLink() {
  const state = link.read();
  setFields(state);
  const choice = options.examples.find((one) => nameOf(one) === state.example);
  if (state.question) $("question").value = state.question;
  if (choice && (await takeExample(choice, state.question ?? undefined))) await ask(state);
}

function writeLink() {
  if (!shown) return;
  const step = stage.step === stage.lastStep ? null : stage.step;
  const mode = stage.mode === "kept" ? null : stage.mode;
  const { question, method, keep } = shown;
  link.write({ example: shown.example, question, method, keep, mode, step, patch: stage.chosen });
}

function setBusy(controller) {
  asking = controller;
  $("ask").textContent = controller ? "Cancel" : "Ask";
  $("ask").classList.toggle("primary", !controller);
  $("result").setAttribute("aria-busy", String(Boolean(controller)));
  document.body.classList.toggle("is-busy", Boolean(controller));
}

async function ask(state = {}) {
  if (asking) asking.abort();
  if (!options) await loadOptions();
  if (!options) return;
  if (!image) {
    $("error").textContent = "Choose an image first.";
    $("file").focus();
    return;
  }
  if (!$("form").reportValidity()) return;
  const controller = new AbortController();
  setBusy(controller);
  $("error").textContent = "";
  const started = performance.now();
  const clock = setInterval(() => ($("elapsed").textContent = `${((performance.now() - started) / 1000).toFixed(0)} s`), 250);
  $("elapsed").textContent = "0 s";
  try {
    await run(controller.signal, state);
  } catch (error) {
    if (asking === controller || !asking) fail(error, controller.signal.aborted);
  } finally {
    clearInterval(clock);
    if (asking === controller) {
      $("elapsed").textContent = "";
      setBusy(null);
    }
  }
}

function fail(error, isCancelled) {
  $("status").textContent = isCancelled ? "Cancelled." : "";
  if (isCancelled) return;
  $("error").textContent = error.message;
  if (error.status === 401) {
    key.forget();
    $("key-field").hidden = false;
  }
}

async function run(signal, state) {
  const method = $("method").value;
  const title = $("method").selectedOptions[0].textContent;
  const request = { image: image.src, question: $("question").value, method };
  if (isKeepChosen) request.keep = Number($("keep").value);
  const sent = { ...request, example, image };
  const runs = [];
  $("status").textContent = `Asking with all tokens and with ${request.keep ?? options.keep ?? "fewer"}.`;
  for (let index = 0; index < RUNS; index += 1) {
    const answer = index ? await again(request, signal) : await patiently(request, signal);
    if (!answer) break;
    runs.push(answer);
    if (index) showFigures(runs);
    else {
      shown = { ...sent, kept: answer.keep, said: show(runs, title) };
      $("empty").hidden = true;
      $("summary").hidden = $("way").hidden = false;
      stage.load(answer, shown.image, { mode: null, step: null, patch: null, ...state });
      writeLink();
      announce(shown.said);
      if (matchMedia("(max-width: 860px)").matches) $("result").scrollIntoView();
    }
    const isDone = runs.length === RUNS;
    $("status").textContent = isDone ? "" : `Measuring again, ${runs.length + 1} of ${RUNS}.`;
  }
  $("status").textContent = "";
}

// For screen readers; everyone else sees the result.
function announce({ headline, explained, answers }) {
  $("heard").textContent = [`${headline}.`, explained, ...answers.map(([name, text]) => `${name}: ${text}.`)].join(" ");
}

// Waits where the server allows no explanation yet.
async function patiently(request, signal) {
  for (;;) {
    try {
      return await call("explain", { body: request, signal });
    } catch (error) {
      if (error.status !== 429 || !error.waitSeconds) throw error;
      $("status").textContent = `${sentence(error.message)} Asking then.`;
      await new Promise((resolve, reject) => {
        setTimeout(resolve, 1000 * error.waitSeconds);
        signal.addEventListener("abort", () => reject(signal.reason), { once: true });
      });
    }
  }
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}.`;

// Another measurement; the server may refuse it, which leaves those that there are.
async function again(request, signal) {
  try {
    return await call("explain", { body: request, signal });
  } catch (error) {
    if (signal.aborted) throw error;
    return null;
  }
}

function useKey() {
  if (!$("key").value) return;
  key.set($("key").value);
  $("key").value = "";
  loadOptions();
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (asking) asking.abort();
  else ask();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("keep").addEventListener("input", () => {
  isKeepChosen = true;
  describeFields();
});
$("method").addEventListener("change", describeFields);
$("file").addEventListener("change", () => takeImage($("file").files[0], $("file").files[0]?.name));
$("key-use").addEventListener("click", useKey);
$("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault();
  useKey();
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
  const file = fileOf(event.dataTransfer);
  takeImage(file, file?.name);
});
document.addEventListener("paste", (event) => {
  const file = fileOf(event.clipboardData);
  if (!file) return; // text, for the field that has the focus
  event.preventDefault();
  takeImage(file, file.name);
});
$("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(location.href); // absent over plain HTTP off this computer
    $("copied").textContent = shown.example ? "Link copied." : "Link copied. It does not contain your image.";
  } catch {
    $("copied").textContent = "This browser cannot copy here. The address of the page is the link.";
  }
});
$("download").addEventListener("click", async () => {
  const blob = await picture(stage, shown.image, shown.question, shown.said, options.model);
  download(blob, `${shown.method}-${shown.kept}.png`);
});
addEventListener("hashchange", () => options && openLink());
loadOptions();
