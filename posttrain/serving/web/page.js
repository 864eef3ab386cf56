// Text of the model, of the server and of the user only ever becomes textContent.
const $ = (id) => document.getElementById(id);
const FULL = 3; // nats at which a colour is at its strongest
const REACH = 8; // characters of the answer that a token's own name may lack: a space, or a character made of several tokens
let key = sessionStorage.getItem("key") ?? "";
let running = null;
let lazy = []; // guides that tell nothing of their steps

function make(tag, className = "", ...inside) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...inside);
  return element;
}

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body) });
  const told = await answer.json();
  if (answer.ok) return told;
  throw Object.assign(new Error(told.error.message), { status: answer.status });
}

function complain(error) {
  $("error").hidden = !error;
  $("error").textContent = error ? error.message : "";
}

// What the server offers

async function begin() {
  complain(null);
  try {
    offer((await call("/v1/models")).data[0]);
    if (key) sessionStorage.setItem("key", key);
  } catch (error) {
    const locked = error.status === 401;
    $("offer").textContent = locked ? "this server asks for a key" : "";
    $("unlock").hidden = !locked && !key;
    if (!locked || key) complain(error);
    sessionStorage.removeItem("key");
    key = "";
  }
}

function offer(card) {
  lazy = card.lazy;
  const list = (kind, names) => `${kind}: ${names.join(", ") || "none"}`;
  $("offer").textContent = [card.id, list("guides", card.guides), list("probes", card.probes)].join(" · ");
  for (const name of card.guides) $("guide").append(new Option(name, name));
  for (const name of card.probes) $("scorer").append(new Option(`probe: ${name}`, JSON.stringify({ probe: name })));
  for (const name of card.guides) $("scorer").append(new Option(`value model: ${name}`, JSON.stringify({ guide: name })));
  $("guidance").hidden = !card.guides.length;
  $("rerank").hidden = !$("scorer").length;
  for (const hidden of document.querySelectorAll("#ask [hidden] input")) hidden.disabled = true;
  $("unlock").hidden = true;
  $("ask").hidden = false;
}

// Asking

async function ask() {
  const controller = (running = new AbortController());
  const number = (id) => Number($(id).value);
  const common = {
    messages: [{ role: "user", content: $("question").value }],
    temperature: number("temperature"),
    max_tokens: number("tokens"),
    seed: number("seed"),
  };
  const columns = [["Base", { logprobs: true, top_logprobs: 5 }]];
  if (!$("guidance").hidden) {
    const guide = $("guide").value;
    columns.push(["Guided", { guidance: { guide, beta: number("beta"), explain: !lazy.includes(guide) } }]);
  }
  if (!$("rerank").hidden) {
    const rerank = { k: number("k"), ...JSON.parse($("scorer").value) };
    columns.push([`Best of ${rerank.k}`, { rerank, logprobs: true, top_logprobs: 5 }]);
  }
  complain(null);
  conceal();
  $("go").textContent = "Stop";
  try {
    // The same seed: where guidance changes nothing, the same noise draws the same tokens; a lazy guide draws in another way.
    const asked = columns.map(([, more]) => call("/v1/chat/completions", { ...common, ...more }, controller.signal));
    const told = await Promise.all(asked);
    const [base, guided] = told.map((one) => tokensOf(one.choices[0]).map((token) => token.token));
    const guidedAt = $("guidance").hidden ? -1 : 1;
    const fork = guidedAt < 0 ? -1 : guided.findIndex((token, index) => token !== base[index]);
    $("answers").replaceChildren(
      ...told.map((one, index) => column(columns[index][0], one, index === guidedAt ? fork : -1)),
    );
    $("legend").hidden = guidedAt < 0 || !guided.length;
  } catch (error) {
    controller.abort();
    if (error.name !== "AbortError") complain(error);
  } finally {
    running = null;
    $("go").textContent = "Ask";
  }
}

// Showing

const tokensOf = (choice) => choice.guidance?.tokens ?? choice.logprobs?.content ?? [];

function column(title, told, fork) {
  const choice = told.choices[0];
  const notes = [`${told.usage.completion_tokens} tokens`];
  if (choice.finish_reason === "length") notes.push("cut off");
  if (choice.guidance) notes.push(choice.guidance.kl === null ? "KL not known" : `KL ${choice.guidance.kl.toFixed(2)} nats`);
  const text = make("div", "text");
  const tokens = tokensOf(choice);
  const pieces = spelled(choice.message.content, tokens);
  tokens.forEach((token, index) => text.append(span(token, pieces[index], index === fork)));
  if (!tokens.length) text.append(choice.message.content);
  const section = make("section", "", make("h2", "", title), make("small", "", notes.join(" · ")), text);
  if (told.rerank) section.append(bars(told.rerank));
  return section;
}

// Each token's part of the text. Alone a token may lack the space before it, or be part of a character: what the next whole
// one leaves behind is its own. A token that is not in the text ends it, and is shown by its name.
function spelled(text, tokens) {
  let position = 0;
  return tokens.map(({ token }) => {
    const found = text.indexOf(token, position);
    if (found < 0 || found - position > REACH) return token.includes("\ufffd") ? "" : null;
    const piece = text.slice(position, found + token.length);
    position = found + token.length;
    return piece;
  });
}

function span(token, piece, fork) {
  const element = make("span", "token", piece ?? token.token);
  element.classList.toggle("special", piece === null);
  element.classList.toggle("fork", fork);
  element.tabIndex = 0;
  if (token.candidates) tint(element, token.logprob - token.reference);
  for (const event of ["mouseenter", "focus"]) element.addEventListener(event, () => reveal(element, token));
  for (const event of ["mouseleave", "blur"]) element.addEventListener(event, conceal);
  return element;
}

function tint(element, shift) {
  const strength = (Math.min(Math.abs(shift), FULL) / FULL) * 0.6;
  element.dataset.shift = shift;
  element.style.backgroundColor = `rgb(var(${shift < 0 ? "--less" : "--more"}) / ${strength.toFixed(3)})`;
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
const visible = (token) => token.replaceAll("\n", "↵").replaceAll(" ", "␣") || "(nothing)";

function reveal(element, token) {
  const rows = token.candidates
    ? token.candidates.map((one) => [one.token, percent(one.reference), percent(one.logprob), one.value?.toFixed(3) ?? "not asked"])
    : token.top_logprobs.map((one) => [one.token, percent(one.logprob)]);
  const head = token.candidates ? ["token", "base", "guided", "value"] : ["token", "probability"];
  const table = make("table", "", make("tr", "", ...head.map((name) => make("th", "", name))));
  for (const [name, ...values] of rows) {
    const cells = [visible(name), ...values].map((value) => make("td", "", value));
    table.append(make("tr", name === token.token ? "sampled" : "", ...cells));
  }
  $("detail").replaceChildren(table);
  $("detail").hidden = false;
  const box = element.getBoundingClientRect();
  const most = document.documentElement.clientWidth - $("detail").offsetWidth - 8;
  $("detail").style.left = `${Math.max(8, Math.min(box.left, most)) + scrollX}px`;
  $("detail").style.top = `${box.bottom + 6 + scrollY}px`;
}

function conceal() {
  $("detail").hidden = true;
}

function bars({ scores, chosen }) {
  const least = Math.min(...scores);
  const range = Math.max(...scores) - least || 1;
  const list = make("ol", "scores");
  scores.forEach((score, index) => {
    const bar = make("i");
    bar.style.width = `${4 + (96 * (score - least)) / range}%`;
    const line = make("li", index === chosen ? "chosen" : "", make("span", "", index + 1), make("span", "bar", bar));
    line.append(make("span", "", score.toFixed(3)));
    list.append(line);
  });
  return list;
}

$("unlock").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  $("key").value = "";
  begin();
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else ask();
});
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
addEventListener("keydown", (event) => event.key === "Escape" && conceal());
for (const swatch of document.querySelectorAll(".swatch")) tint(swatch, Number(swatch.dataset.shift));
begin();
