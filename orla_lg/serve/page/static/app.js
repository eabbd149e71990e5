// The page: events change the model, and what they change is drawn with the next frame.

import { attribute, byId, count, h, hide, keyed, several, text } from "./dom.js";
import { conditionOf, drawBackends } from "./backends.js";
import { drawGraphs } from "./graphs.js";
import { Model, rates } from "./model.js";
import { prepareSignIn, showSignIn, signOut } from "./sign_in.js";
import { prioritize, toast } from "./steer.js";
import { Stream } from "./stream.js";
import { prepareTheme } from "./theme.js";
import { Timeline } from "./timeline.js";
import { drawWaiting, drawWorkflows, isOpen } from "./workflows.js";

const MOVING_MS = 100; // between two pictures of a timeline that goes on
const CALM_MS = 1_000; // where motion is not wanted
const HIDDEN_MS = 20_000; // a page that nobody sees lets go of its stream after so long

const model = new Model();
const timeline = new Timeline(model);
const stream = new Stream(take, tell);
let chosen = null; // the workflow of the timeline: { name, tenant }
let wasChosen = false; // by hand

// Drawing

const dirty = new Set();
let isDue = false;

function redraw(...parts) {
  for (const part of parts) dirty.add(part);
  if (!isDue && dirty.size) {
    isDue = true;
    requestAnimationFrame(draw);
  }
}

function draw() {
  isDue = false;
  const parts = new Set(dirty);
  dirty.clear();
  if (parts.has("top")) drawTop();
  if (parts.has("top") || parts.has("backends")) drawFaults();
  if (parts.has("graphs")) drawGraphs(model);
  if (parts.has("backends")) drawBackends(model);
  if (parts.has("workflows")) drawWorkflows(model, numberOfChosen(), choose);
  if (parts.has("waiting")) drawWaiting(model);
  if (parts.has("timeline")) drawTimeline();
  if (parts.has("welcome")) drawWelcome();
}

function drawTop() {
  const { state, hello, lost } = model;
  const standing = lost !== null ? ["connection lost", "bad"] : state === null ? ["connecting …", "dim"] : { ready: ["live", "good"], draining: ["the server is ending", "warn"], standby: ["standby", "warn"] }[state.condition] ?? [state.condition, "warn"];
  text(byId("condition"), standing[0]);
  attribute(byId("condition"), "class", `pill ${standing[1]}`);
  attribute(document.body, "class", lost === null ? "" : "is-lost");
  const caller = byId("caller");
  text(caller, hello?.keyed ? `${hello.name}${hello.control ? "" : " (view only)"}` : "");
  hide(caller, !hello?.keyed);
  hide(byId("sign-out"), !hello?.signed_in);
  if (state === null) return;
  const sum = (what) => state.backends.reduce((whole, backend) => whole + what(backend), 0);
  const now = state.backends.map((backend) => rates(model.history, backend.name)).filter(Boolean);
  const waiting = sum((backend) => backend.waiting);
  const figures = [
    ["open runs", count(state.runs)],
    ["at engines", count(sum((backend) => backend.in_flight))],
    ["waiting", count(waiting)],
    ["tokens/s", now.length ? count(Math.round(now.reduce((whole, each) => whole + each.tokens, 0))) : "–"],
    ["calls served", count(state.calls)],
  ];
  keyed(byId("totals"), figures, ([name]) => name, ([name]) => h("div", {}, h("dt", {}, name), h("dd", {})), (each, [, value]) => text(each.lastChild, value));
  document.title = waiting ? `${count(waiting)} waiting · orla_lg` : "orla_lg";
}

function drawFaults() {
  const faults = [];
  const { state, lost } = model;
  if (lost !== null) faults.push(["lost", "bad", "Connection lost", `${lost[0].toUpperCase()}${lost.slice(1)}. Trying again; what you see is from before.`]);
  if (lost === null && state?.condition === "draining") faults.push(["draining", "warn", "The server is ending", "Calls under way go on to their end; new ones are refused until the next server takes over."]);
  if (lost === null && state?.condition === "standby") faults.push(["standby", "warn", "This server is a standby", "Another one decides; this one takes over when that ends."]);
  for (const backend of lost === null ? (state?.backends ?? []) : []) {
    const [word, level] = conditionOf(backend);
    const waiting = several(backend.waiting, "call");
    if (word === "gone") faults.push([`gone ${backend.name}`, "bad", `${backend.name} is gone`, `Its engine does not answer. ${backend.waiting ? `${waiting} wait for it.` : ""}`]);
    else if (word.startsWith("circuit")) faults.push([`circuit ${backend.name}`, "bad", `${backend.name}: ${word}`, "Its engine failed again and again; one call at a time tries whether it is back."]);
    else if (level === "warn" && backend.waiting) faults.push([`paused ${backend.name}`, "warn", `${backend.name} is paused`, `${waiting} ${backend.waiting === 1 ? "waits" : "wait"} until it is resumed.`]);
  }
  keyed(byId("faults"), faults, ([key]) => key, () => h("li", {}, h("b", {}), h("span", {})), (item, [, level, title, said]) => {
    attribute(item, "class", level);
    text(item.firstChild, `${level === "bad" ? "✕" : "!"} ${title}`);
    text(item.lastChild, said);
  });
  hide(byId("faults"), faults.length === 0);
}

function drawWelcome() {
  const { state } = model;
  const isNew = state !== null && state.calls === 0 && state.runs === 0 && model.workflows.size === 0;
  hide(byId("welcome"), !isNew);
  if (!isNew) return;
  const backend = state.backends[0]?.name ?? "auto";
  const keyed = model.hello?.keyed === true;
  const body = JSON.stringify({ model: backend, messages: [{ role: "user", content: "Say hello." }], max_tokens: 20 });
  text(byId("curl"), [`curl ${location.origin}/v1/chat/completions`, ...(keyed ? ["-H \"Authorization: Bearer $ORLA_SERVER_KEY\""] : []), "-H 'Content-Type: application/json'", `-d '${body}'`].join(" \\\n  "));
  text(byId("wrapped"), `from orla_lg import Orla\n\norla = Orla.remote("${location.origin}")\ngraph = orla.wrap(builder)\ngraph.invoke(…)`);
}

function drawTimeline() {
  const number = numberOfChosen();
  const workflow = number === null ? null : (model.workflows.get(number) ?? null);
  const title = workflow ? `Timeline of ${workflow.name}` : "Timeline";
  text(byId("timeline-title"), title);
  attribute(byId("timeline-title"), "title", title);
  hide(byId("timeline-tools"), workflow === null);
  hide(byId("priority"), workflow === null || !model.mayControl || workflow.runs.length === 0);
  timeline.show(workflow, Number(byId("span-of-time").value));
}

// Choosing

function numberOfChosen() {
  return chosen === null ? null : model.find(chosen.name, chosen.tenant);
}

function choose(workflow, byHand = true) {
  chosen = { name: workflow.name, tenant: workflow.tenant };
  wasChosen ||= byHand;
  model.spans.clear();
  stream.open(workflow.number);
  redraw("workflows", "timeline");
  if (byHand && matchMedia("(max-width: 860px)").matches) byId("timeline").scrollIntoView({ behavior: "smooth", block: "start" });
}

/** Show a workflow without being asked, as long as none was chosen by hand and none that is shown goes on. */
function follow() {
  const number = numberOfChosen();
  if (number !== null && (wasChosen || isOpen(model.workflows.get(number)))) {
    if (number !== stream.workflow) choose(model.workflows.get(number), false); // a server that began anew counts anew
    return;
  }
  const busiest = [...model.workflows.values()].filter((each) => !wasChosen && isOpen(each)).sort((one, other) => one.calls - other.calls || other.last - one.last)[0];
  const newest = number === null && !wasChosen ? [...model.workflows.values()].at(-1) : undefined;
  const next = busiest ?? newest;
  if (next && (number === null || (busiest && model.now() - model.workflows.get(number).last > 8))) choose(next, false);
}

// What comes

function take(name, data) {
  redraw(...model.take(name, data));
  if (name === "workflows") follow();
}

function tell(state, why = {}) {
  const isRefused = state === "refused" && why.status !== 421;
  if (state === "open") {
    model.lost = null;
    show("main");
  } else if (isRefused) {
    const wasIn = model.hello !== null;
    model.reset();
    model.hello = null;
    show("sign-in");
    showSignIn(wasIn || why.status === 403 ? why.message : "");
    text(byId("condition"), "signed out");
    attribute(byId("condition"), "class", "pill dim");
    hide(byId("caller"), true);
    hide(byId("sign-out"), true);
    keyed(byId("totals"), [], String, String, String);
    return;
  } else {
    model.lost = why.why ?? why.message;
    if (why.why === "key") model.lost = "the key or the sign-in no longer holds";
    if (byId("sign-in").hidden) show("main");
  }
  redraw("top", "graphs", "backends", "workflows", "timeline", "waiting", "welcome");
}

function show(which) {
  hide(byId("main"), which !== "main");
  hide(byId("sign-in"), which !== "sign-in");
}

// The page's own controls

prepareTheme(byId("theme"));
prepareSignIn(() => stream.open(null));
byId("sign-out").addEventListener("click", async () => {
  await signOut().catch(() => toast("The server does not answer; you are still signed in.", true));
  chosen = null;
  wasChosen = false;
  stream.open(null);
});
byId("span-of-time").addEventListener("change", () => redraw("timeline"));
byId("workflow-search").addEventListener("input", () => redraw("workflows"));
byId("priority").addEventListener("submit", (event) => {
  event.preventDefault();
  const workflow = model.workflows.get(numberOfChosen());
  const value = byId("priority-value").valueAsNumber;
  if (workflow && Number.isFinite(value)) prioritize(workflow, value);
});
for (const button of document.querySelectorAll("[data-copies]")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard?.writeText(byId(button.dataset.copies).textContent).then(() => toast("Copied."), () => toast("This browser does not let the page copy.", true));
  });
}

const calm = matchMedia("(prefers-reduced-motion: reduce)");
let drawnMs = 0;
setInterval(() => {
  const now = performance.now();
  if (document.visibilityState === "visible" && timeline.isMoving && now - drawnMs >= (calm.matches ? CALM_MS : MOVING_MS) - 5) {
    drawnMs = now;
    redraw("timeline");
  }
}, MOVING_MS);

new ResizeObserver(() => redraw("graphs", "timeline")).observe(byId("main"));

let unseen;
document.addEventListener("visibilitychange", () => {
  clearTimeout(unseen);
  if (document.visibilityState === "hidden") unseen = setTimeout(() => stream.close(), HIDDEN_MS);
  else if (stream.current?.signal.aborted) stream.open();
});

stream.open(null);
