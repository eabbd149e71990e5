// The backends: who is served there, who waits, and whose cache it holds.

import { attribute, byId, count, h, hide, keyed, several, svg, text } from "./dom.js";
import { rates } from "./model.js";
import { askAndDrain, setPaused } from "./steer.js";

const PIPS = 32; // more places are drawn as a bar
const DOINGS = { generating: "generating", tool: "between calls", human: "waits for a person", idle: "idle" };

/** Return a backend's condition: a word, how bad it is, and a mark. */
export function conditionOf(backend) {
  if (backend.paused) return backend.in_flight ? ["paused", "warn", "‖"] : ["drained", "warn", "‖"];
  if (backend.circuit !== "closed") return [`circuit ${backend.circuit}`, "bad", "✕"];
  if (backend.reachable === false) return ["gone", "bad", "✕"];
  return backend.reachable === null ? ["not asked yet", "dim", "?"] : ["open", "good", "●"];
}

export function drawBackends(model) {
  const backends = model.state?.backends ?? [];
  const list = byId("backend-list");
  keyed(
    list,
    backends,
    (each) => each.name,
    makeBackend,
    (card, each) => update(card, each, model),
  );
  let empty = byId("no-backends");
  if (empty === null) {
    empty = h(
      "p",
      { id: "no-backends", class: "muted empty" },
      "No engine is behind this server. ",
      h("code", {}, "orla-lg serve --demo"),
      " starts one, ",
      h("code", {}, "--config orla.toml"),
      " names yours.",
    );
    list.after(empty);
  }
  hide(empty, backends.length > 0 || model.state === null);
}

function makeBackend({ name }) {
  const part = (cls, tag = "div") => h(tag, { class: cls });
  const pause = h("button", { type: "button", class: "pause" });
  const drain = h("button", { type: "button", class: "quiet drain" }, "Drain …");
  pause.addEventListener("click", () => setPaused(name, pause.dataset.paused !== "true"));
  drain.addEventListener("click", () => askAndDrain(name));
  return h(
    "article",
    { class: "backend", "data-backend": name, "aria-label": `Backend ${name}` },
    h("header", {}, h("h3", {}, name), part("engine muted small", "span"), sparkline(), part("pill", "span")),
    h(
      "div",
      { class: "meter" },
      h("span", { class: "label" }, "At the engine"),
      part("places"),
      part("figure flying", "span"),
    ),
    h(
      "div",
      { class: "meter" },
      h("span", { class: "label" }, "Waiting"),
      part("bar queue"),
      part("figure queued", "span"),
    ),
    part("queues chips", "ul"),
    h(
      "div",
      { class: "meter" },
      h("span", { class: "label" }, "KV cache"),
      part("bar cache"),
      part("figure cached", "span"),
    ),
    part("holders chips", "ul"),
    h("footer", {}, part("rates muted small", "span"), h("span", { class: "row steering" }, pause, drain)),
  );
}

function sparkline() {
  return svg(
    "svg",
    { class: "spark", width: 96, height: 22, viewBox: "0 0 96 22", "aria-hidden": "true" },
    svg("path", { class: "spark-area" }),
    svg("path", { class: "spark-line" }),
  );
}

function update(card, backend, model) {
  const find = (selector) => card.querySelector(selector);
  const [word, level, mark] = conditionOf(backend);
  text(find(".engine"), backend.engine);
  text(find(".pill"), `${mark} ${word}`);
  attribute(find(".pill"), "class", `pill ${level}`);
  drawPlaces(find(".places"), backend);
  text(
    find(".flying"),
    `${count(backend.in_flight)} of ${backend.most === null ? "any number" : count(backend.most)}`,
  );
  drawQueue(find(".queue"), find(".queues"), backend);
  text(find(".queued"), count(backend.waiting));
  drawCache(find(".cache"), find(".holders"), find(".cached"), backend.kv);
  const now = rates(model.history, backend.name);
  const [, prompt, cached] = backend.spent;
  const parts = now ? [`${now.calls.toFixed(1)} calls/s`, `${count(Math.round(now.tokens))} tokens/s`] : [];
  if (prompt) parts.push(`${Math.round((100 * cached) / prompt)} % cached`);
  text(find(".rates"), [...parts, backend.policy].join(" · "));
  drawSpark(find(".spark"), model.history, backend.name);
  const pause = find(".pause");
  pause.dataset.paused = backend.paused;
  text(pause, backend.paused ? "Resume" : "Pause");
  attribute(pause, "aria-label", `${backend.paused ? "Resume" : "Pause"} ${backend.name}`);
  attribute(find(".drain"), "aria-label", `Drain ${backend.name}`);
  hide(find(".drain"), backend.paused);
  hide(find(".steering"), !model.mayControl);
}

function drawPlaces(places, { in_flight: flying, most }) {
  const all = Math.max(most ?? flying, flying);
  if (all > PIPS) {
    attribute(places, "class", "places bar");
    const make = () => h("i", { class: "fill decode" });
    keyed(
      places,
      [flying / all],
      () => "bar",
      make,
      (bar, share) => {
        bar.style.width = `${100 * share}%`;
      },
    );
    return;
  }
  attribute(places, "class", "places");
  const pips = Array.from({ length: all }, (_, at) =>
    at >= flying ? "pip" : at >= (most ?? all) ? "pip over" : "pip on",
  );
  keyed(
    places,
    [...pips.entries()],
    ([at]) => at,
    () => h("i", {}),
    (pip, [, kind]) => attribute(pip, "class", kind),
  );
}

const makeChip = () => h("li", {}, h("span", {}), h("b", {}));

function drawQueue(bar, chips, { waiting, capacity, queues, others }) {
  const parts = others ? [...queues, ["others", others]] : queues;
  // A queue of two is to be seen beside one of two thousand: the bar's length goes by the logarithm.
  const most = Math.max(1_000, Math.min(capacity, 10_000));
  const length = waiting ? 12 + 88 * Math.min(1, Math.log10(1 + waiting) / Math.log10(1 + most)) : 0;
  keyed(
    bar,
    parts,
    ([stage]) => stage,
    () => h("i", { class: "fill waiting" }),
    (child, [stage, number]) => {
      child.style.width = `${(length * number) / waiting}%`;
      attribute(child, "title", `${stage || "no stage"}: ${number}`);
    },
  );
  keyed(
    chips,
    parts.slice(0, 6),
    ([stage]) => stage,
    makeChip,
    (child, [stage, number]) => {
      text(child.firstChild, stage || "no stage");
      text(child.lastChild, count(number));
    },
  );
  hide(chips, parts.length === 0);
}

function drawCache(bar, chips, held, kv) {
  const known = kv.workflows.reduce((sum, each) => sum + each[2], 0);
  const resident = Math.max(kv.resident, known); // an account of what is needed now leaves out what merely lies there
  const whole = Math.max(kv.capacity ?? 0, resident + kv.promised, 1);
  const keyOf = ([name, tenant]) => `${tenant}\n${name}`;
  const parts = kv.workflows
    .filter((each) => each[2] > 0)
    .map((each) => ({
      key: keyOf(each),
      tokens: each[2],
      kind: each[3],
      said: `${each[0]}: ${count(each[2])} tokens, ${DOINGS[each[3]] ?? each[3]}`,
    }));
  const others = resident - known;
  if (others > 0) {
    const said = `${kv.holders - parts.length} other workflows: ${count(others)} tokens`;
    parts.push({ key: "others", tokens: others, kind: "others", said });
  }
  if (kv.promised) {
    const said = `promised to calls under way: ${count(kv.promised)} tokens`;
    parts.push({ key: "promised", tokens: kv.promised, kind: "promised", said });
  }
  keyed(
    bar,
    parts,
    ({ key }) => key,
    () => h("i", {}),
    (child, { tokens, kind, said }) => {
      child.style.width = `${(100 * tokens) / whole}%`;
      attribute(child, "class", kind);
      attribute(child, "title", said);
    },
  );
  const share = Math.round((100 * (resident + kv.promised)) / kv.capacity);
  text(held, kv.capacity ? `${share} % of ${count(kv.capacity)}` : several(resident, "token"));
  keyed(chips, kv.workflows.slice(0, 4), keyOf, makeChip, (child, [name, tenant, tokens, doing]) => {
    attribute(child, "class", `holder ${doing}`);
    attribute(child, "title", `${tenant ? `${tenant}: ` : ""}${name}, ${DOINGS[doing] ?? doing}`);
    text(child.firstChild, name);
    text(child.lastChild, count(tokens));
  });
  hide(chips, kv.workflows.length === 0);
}

function drawSpark(spark, history, name) {
  const points = [];
  for (let at = 1; at < history.length; at += 1) {
    const [before, after] = [history[at - 1], history[at]];
    const grown = (after.backends[name]?.tokens ?? 0) - (before.backends[name]?.tokens ?? 0);
    points.push(Math.max(0, grown / Math.max(0.1, after.at - before.at)));
  }
  const most = Math.max(1, ...points);
  const at = (index) => (96 - ((points.length - 1 - index) * 96) / 59).toFixed(1);
  const line = points.map((value, index) => `${at(index)} ${(20 - (18 * value) / most).toFixed(1)}`).join("L");
  attribute(spark.lastChild, "d", points.length > 1 ? `M${line}` : "");
  attribute(spark.firstChild, "d", points.length > 1 ? `M${at(0)} 21L${line}L96 21z` : "");
}
