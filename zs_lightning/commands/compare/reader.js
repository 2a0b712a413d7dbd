"use strict";
// Texts of others become text nodes, never markup.

const ROW = 50; // Pixels of a line of the list.
const GRADES = ["○", "◐", "●"];
const ENDED = {
  answered: "answered", turn_limit: "out of turns", length_limit: "out of context", failed: "search failed",
};
const WRITTEN = {
  think: "thinks", search: "searches", answer: "answers", information: "forges a result", text: "writes",
};
const $ = (id) => document.getElementById(id);
const form = $("filters"), list = $("list"), shown = $("shown");
let data, all, found = [], current = null, second = null, byId, byKey;

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

const fixed = (value, digits = 2) => value === null ? "–" : value.toFixed(digits).replace("-", "−");
const signed = (value) => (value > 0 ? "+" : "") + fixed(value);
const whole = (count) => count.toLocaleString("en");
const many = (count, one, more = `${one}s`) => `${whole(count)} ${count === 1 ? one : more}`;
const sum = (values) => values.reduce((total, value) => total + value, 0);
const place = (row) => row.decoding ? row.decoding : `step ${row.step}, #${row.sample}`;
const keyOf = (row) => [data.runs[row.run], row.decoding || row.step, row.sample, row.id].join("/");
const hash = (row, other) => `#t=${encodeURIComponent(keyOf(row))}` + (other ? `&with=${encodeURIComponent(keyOf(other))}` : "");

// ------------------------------------------------------------------------------------------ data

async function read() {
  const text = atob($("trajectories").textContent), packed = new Uint8Array(text.length);
  for (let number = 0; number < text.length; number++) packed[number] = text.charCodeAt(number);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  data = JSON.parse(await new Response(stream).text());
  all = data.rows;
  byId = new Map(all.map((row) => [row.id, []]));
  byKey = new Map(all.map((row) => [keyOf(row), row]));
  for (const row of all) {
    byId.get(row.id).push(row);
    const searches = row.turns.filter((turn) => turn.kind === "search" && turn.answered);
    row.searches = searches.length;
    row.kinds = new Set(searches.map((turn) => turn.label).filter((label) => label));
    row.noisy = [...row.kinds].some((label) => label !== "useful");
  }
}

// What a search in texts looks at.
function words(row) {
  if (row.words === undefined) {
    const texts = [row.id, row.question, ...row.golds];
    for (const turn of row.turns) {
      texts.push(turn.content, turn.notice || "");
      for (const [, text] of turn.pieces) texts.push(text);
      for (const document of turn.documents || []) texts.push(...document);
    }
    row.words = texts.join("\n").toLowerCase();
  }
  return row.words;
}

// --------------------------------------------------------------------------------------- filters

function fill(name, options) {
  const select = form.elements[name];
  select.closest("label").hidden = options.length < 2;
  select.append(...options.map(([value, text]) => el("option", { value }, text)));
}

function fillAll() {
  const different = (values) => [...new Set(values)].sort((a, b) => a < b ? -1 : a > b ? 1 : 0);
  fill("run", data.runs.map((name, number) => [number, name]));
  fill("status", different(all.map((row) => row.status)).map((name) => [name, ENDED[name] || name]));
  fill("searches", [...new Set(all.map((row) => row.searches))].sort((a, b) => a - b).map((count) => [count, count]));
  const parts = different(all.map((row) => row.subset ? `${row.source} · ${row.subset}` : ""));
  const sources = different(all.map((row) => row.source));
  fill("part", [...sources, ...parts].filter((name) => name).map((name) => [name, name]));
  const kinds = different(all.flatMap((row) => [...row.kinds])).filter((label) => label !== "useful");
  const noise = [["none", "none"], ["some", "some"], ...kinds.map((label) => [`kind ${label}`, label.replaceAll("_", " ")])];
  fill("noise", kinds.length ? noise : []);
  const steps = all.filter((row) => !row.decoding).map((row) => row.step);
  const [least, most] = [Math.min(...steps), Math.max(...steps)];
  $("steps").hidden = !steps.length;
  for (const [name, value] of [["from", least], ["to", most]]) {
    Object.assign(form.elements[name], { min: least, max: most, placeholder: value });
  }
}

function passes() {
  const { run, score, status, searches, part, noise, from, to, text } =
    Object.fromEntries([...form.elements].map((field) => [field.name, field.value]));
  const wanted = text.trim().toLowerCase();
  return (row) =>
    (run === "" || row.run === +run) && (score === "" || row.grade === +score) &&
    (status === "" || row.status === status) && (searches === "" || row.searches === +searches) &&
    (part === "" || row.source === part || `${row.source} · ${row.subset}` === part) &&
    (noise === "" || (noise === "none" ? row.kinds.size && !row.noisy : noise === "some" ? row.noisy : row.kinds.has(noise.slice(5)))) &&
    // A test has no steps.
    (from === "" || (!row.decoding && row.step >= +from)) && (to === "" || (!row.decoding && row.step <= +to)) &&
    (wanted === "" || words(row).includes(wanted));
}

function filter() {
  const begun = performance.now();
  found = all.filter(passes());
  list.scrollTop = 0;
  choose(found.includes(current) ? current : found[0], false);
  document.documentElement.dataset.filtered = (performance.now() - begun).toFixed(1);
  $("count").textContent = `${whole(found.length)} of ${many(all.length, "trajectory", "trajectories")}`;
}

// ------------------------------------------------------------------------------------------ list

// Only the lines in sight exist.
function draw() {
  $("rows").style.height = `${found.length * ROW}px`;
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
  const last = Math.min(found.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
  const lines = [];
  for (let number = first; number < last; number++) {
    const row = found[number];
    const line = el("div", {
      role: "option", class: "line", id: `line-${number}`, "aria-selected": row === current,
      "aria-setsize": found.length, "aria-posinset": number + 1,
    },
    el("span", { class: `grade g${row.grade}`, title: ["zero", "part", "full"][row.grade] }, GRADES[row.grade]),
    el("b", {}, row.question),
    el("small", {}, `${data.runs[row.run]} · ${place(row)} · ${many(row.searches, "search", "searches")}` +
      (row.status === "answered" ? "" : ` · ${ENDED[row.status] || row.status}`) + (row.noisy ? " · noise" : "")));
    line.style.top = `${number * ROW}px`;
    line.addEventListener("click", () => choose(row));
    lines.push(line);
  }
  $("rows").replaceChildren(...lines);
  const at = found.indexOf(current);
  if (at < 0) list.removeAttribute("aria-activedescendant");
  else list.setAttribute("aria-activedescendant", `line-${at}`);
}

function move(event) {
  const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const ways = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1, PageDown: page, PageUp: -page, Home: -all.length, End: all.length };
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "p") $("tokens").click();
  else if (event.key === "Enter") shown.focus();
  else if (event.key in ways && found.length) {
    const to = Math.min(found.length - 1, Math.max(0, found.indexOf(current) + ways[event.key]));
    choose(found[to]);
  } else return;
  event.preventDefault();
}

// Shows a trajectory, beside it one of the same question by the run that stood there before.
function choose(row, told = true, other = null) {
  // Those of other steps and runs first.
  const group = (mate) => mate.run === row.run && mate.step === row.step && !row.decoding;
  const mates = row ? byId.get(row.id).filter((mate) => mate !== row).sort((a, b) => group(a) - group(b)) : [];
  const before = second;
  second = other || (before && mates.find((mate) => mate.run === before.run && mate.decoding === before.decoding)) || null;
  current = row || null;
  if (told) history.replaceState(null, "", hash(row, second));
  const at = found.indexOf(current);
  if (at >= 0) {
    const above = list.scrollTop - at * ROW, below = (at + 1) * ROW - list.clientHeight - list.scrollTop;
    if (Math.max(above, below) > 2 * ROW) list.scrollTop = at * ROW - list.clientHeight / 2;
    else if (Math.max(above, below) > 0) list.scrollTop += above > 0 ? -above : below;
  }
  draw();
  shown.replaceChildren(...(row ? [head(row, mates), pair(row)] : [el("p", { class: "none" }, "No trajectory is like this.")]));
  shown.scrollTop = 0;
}

// ------------------------------------------------------------------------------------ trajectory

function head(row, mates) {
  const beside = el("select", {}, el("option", { value: "" }, mates.length ? "–" : "no other one here"));
  mates.forEach((mate, number) => {
    const text = `${GRADES[mate.grade]} ${data.runs[mate.run]}, ${place(mate)}`;
    beside.append(el("option", { value: number, ...(mate === second ? { selected: "" } : {}) }, text));
  });
  beside.disabled = !mates.length;
  beside.addEventListener("change", () => {
    second = null;
    choose(row, true, mates[beside.value] || null);
  });
  return el("header", {},
    el("h3", {}, row.question),
    el("p", { class: "gold" }, "Golden answer: ", el("b", {}, row.golds.join(" · ")), row.subset ? ` · ${row.subset}` : ""),
    el("p", { class: "tools" }, el("label", {}, "Same question beside it ", beside), el("a", { href: hash(row, second) }, "Link to this")));
}

const pair = (row) => el("div", { class: second ? "sides two" : "sides" }, trajectory(row), second ? trajectory(second) : null);

function trajectory(row) {
  const sampled = sum(row.turns.map((turn) => turn.sampled)), told = sum(row.turns.map((turn) => turn.told));
  const parts = Object.entries(row.parts).filter(([, value]) => value);
  const facts = [
    ["Reward", (row.reward === null ? "none, it is not trained on" : fixed(row.reward)) + (parts.length ? ` = ${parts.map(([name, value]) => `${name} ${signed(value)}`).join(", ")}` : "")],
    ["Advantage", signed(row.advantage)],
    ["F1, exact", `${fixed(row.f1)}, ${row.em ? "yes" : "no"}`],
    ["Tokens", `${whole(sampled)} sampled, ${whole(told)} told, ${whole(row.asked)} prompt`],
    ["Noise", row.noise ? `planned at ${fixed(row.noise)}` : "none planned"],
    ["Ended", [ENDED[row.status] || row.status, row.answer || row.failure].filter((text) => text).join(": ")],
  ];
  const prompt = data.prompts[row.prompt];
  return el("section", { class: "side" },
    el("h4", {}, el("span", { class: `grade g${row.grade}` }, GRADES[row.grade]), `${data.runs[row.run]}, ${place(row)}`),
    el("dl", {}, ...facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    prompt
      ? el("details", { class: "put" }, el("summary", {}, `inserted: prompt, ${many(row.asked, "token")}`), el("pre", {}, prompt))
      : block("put", `inserted: prompt, ${many(row.asked, "token")}`),
    ...row.turns.flatMap((turn) => turnOf(turn, row)),
    row.status === "answered" ? null : el("p", { class: "notice" }, el("b", {}, "ended"), el("span", {}, `${ENDED[row.status] || row.status}, no answer`)));
}

const block = (kind, label, ...children) => el("div", { class: kind }, el("p", { class: "label" }, label), ...children);

function turnOf(turn, row) {
  const made = [];
  if (turn.sampled) {
    const written = turn.pieces.map(([kind, text]) => el("p", { class: kind }, el("b", {}, WRITTEN[kind]), el("span", {}, text)));
    if (turn.kind === "invalid") {
      written.push(el("p", { class: "notice" }, el("b", {}, "invalid"), el("span", {}, turn.content.replaceAll("_", " "))));
    }
    const body = $("tokens").checked ? [likelihoods(turn)] : written;
    made.push(block("said", `sampled, ${many(turn.sampled, "token")}`, ...body));
  } else if (turn.kind === "search") {
    made.push(block("put", "searched for it, 0 tokens", el("p", { class: "search" }, el("b", {}, "searches"), el("span", {}, turn.content))));
  }
  if (turn.documents && turn.answered) {
    const what = [["", "useful"].includes(turn.label) ? turn.label : ["noise", turn.label.replaceAll("_", " ")].filter((text) => text !== "noisy").join(": "), turn.repeated && "asked before"];
    const items = turn.documents.map(([title, text]) => el("li", {}, title ? el("em", {}, title, " ") : null, ...marked(text, row.golds)));
    if (!items.length) items.push(el("li", { class: "none" }, "nothing found"));
    const label = ["retrieved", many(turn.told, "token"), ...what.filter((text) => text)].join(", ");
    made.push(block("found", label, el("ol", { class: "documents" }, ...items)));
  } else if (turn.told) {
    made.push(block("put", `inserted: notice, ${many(turn.told, "token")}`, turn.notice ? el("pre", {}, turn.notice.trim()) : null));
  }
  return made;
}

function likelihoods(turn) {
  const values = turn.logprobs.map((value) => -value / 100), least = Math.min(...values);
  const chance = (value) => `log-prob ${fixed(value)}, probability ${(100 * Math.exp(value)).toPrecision(2)} %`;
  const strip = values.map((value, number) => {
    const text = turn.tokens ? data.tokens[turn.tokens[number]] : "▪";
    const kind = value < Math.log(0.1) ? "rare" : value < Math.log(0.5) ? "unsure" : "";
    return el("span", { class: value === least ? `${kind} least` : kind, title: chance(value) }, text === "" ? "∅" : text.replaceAll("\n", "⏎\n"));
  });
  const at = values.indexOf(least);
  const what = turn.tokens ? `“${data.tokens[turn.tokens[at]].trim()}”` : `token ${at + 1}`;
  return el("div", { class: "strip" }, el("p", {}, ...strip),
    el("p", { class: "label" }, `mean ${fixed(sum(values) / values.length)}; least likely ${what}, ${chance(least)}`));
}

// The text, with golden answers that stand in it as whole words marked.
function marked(text, golds) {
  const known = golds.filter((gold) => gold.trim()).sort((a, b) => b.length - a.length);
  if (!known.length) return [text];
  const either = known.map((gold) => gold.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&")).join("|");
  const parts = text.split(new RegExp(`(?<![\\p{L}\\p{N}_])(${either})(?![\\p{L}\\p{N}_])`, "iu"));
  return parts.map((part, number) => number % 2 ? el("mark", {}, part) : part);
}

// ----------------------------------------------------------------------------------------- start

function follow() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  const row = byKey.get(wanted.get("t"));
  if (!row) return;
  choose(row, false, byKey.get(wanted.get("with")) || null);
  $("reader").scrollIntoView();
}

async function start() {
  $("reader").hidden = false;
  $("count").textContent = "Reading the trajectories …";
  try {
    await read();
  } catch (error) {
    $("count").textContent = `The trajectories cannot be shown: ${error}`;
    return;
  }
  fillAll();
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  list.addEventListener("scroll", draw);
  list.addEventListener("keydown", move);
  $("tokens").addEventListener("change", () => choose(current, false, second));
  window.addEventListener("hashchange", follow);
  window.addEventListener("resize", draw);
  filter();
  follow();
  document.documentElement.dataset.ready = performance.now().toFixed(0);
  // What the first search would wait for.
  setTimeout(() => all.forEach(words));
}

start();
