// The page: events change the model, and what they change is drawn with the next frame.

import { attribute, byId, count, h, hide, keyed, text } from "./dom.js";
import { drawBackends } from "./backends.js";
import { drawFaults } from "./faults.js";
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
const OVER_S = 8; // after the end of a workflow the timeline goes on to another one, if none was chosen by hand
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
  if (parts.has("top") || parts.has("backends")) drawFaults(model);
  if (parts.has("graphs")) drawGraphs(model);
  if (parts.has("backends")) drawBackends(model);
  if (parts.has("workflows")) drawWorkflows(model, numberOfChosen(), choose);
  if (parts.has("waiting")) drawWaiting(model);
  if (parts.has("timeline")) drawTimeline();
  if (parts.has("welcome")) drawWelcome();
}

function standingOf(state, lost) {
  if (lost !== null) return ["connection lost", "bad"];
  if (state === null) return ["connecting …", "dim"];
  return state.condition === "ready" ? ["live", "good"] : [state.condition, "warn"];
}

function drawTop() {
  const { state, hello, lost } = model;
  const [said, level] = standingOf(state, lost);
  text(byId("condition"), said);
  attribute(byId("condition"), "class", `pill ${level}`);
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
  const make = ([name]) => h("div", {}, h("dt", {}, name), h("dd", {}));
  keyed(
    byId("totals"),
    figures,
    ([name]) => name,
    make,
    (each, [, value]) => text(each.lastChild, value),
  );
  document.title = waiting ? `${count(waiting)} waiting · orla_lg` : "orla_lg";
}

function drawWelcome() {
  const { state } = model;
  const isNew = state !== null && state.calls === 0 && state.runs === 0 && model.workflows.size === 0;
  hide(byId("welcome"), !isNew);
  if (!isNew) return;
  const backend = state.backends[0]?.name ?? "auto";
  const body = JSON.stringify({
    model: backend,
    messages: [{ role: "user", content: "Say hello." }],
    max_tokens: 20,
  });
  const key = model.hello?.keyed ? ['-H "Authorization: Bearer $ORLA_SERVER_KEY"'] : [];
  const words = [
    `curl ${location.origin}/v1/chat/completions`,
    ...key,
    "-H 'Content-Type: application/json'",
    `-d '${body}'`,
  ];
  text(byId("curl"), words.join(" \\\n  "));
  const lines = [
    "from orla_lg import Orla",
    "",
    `orla = Orla.remote("${location.origin}")`,
    "graph = orla.wrap(builder)",
  ];
  text(byId("wrapped"), [...lines, "graph.invoke(…)"].join("\n"));
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
  if (byHand && matchMedia("(max-width: 860px)").matches)
    byId("timeline").scrollIntoView({ behavior: "smooth", block: "start" });
}

/** Show a workflow without being asked, as long as none was chosen by hand and none that is shown goes on. */
function follow() {
  const number = numberOfChosen();
  if (number !== null && (wasChosen || isOpen(model.workflows.get(number)))) {
    if (number !== stream.workflow) choose(model.workflows.get(number), false); // a server that began anew counts anew
    return;
  }
  if (wasChosen) return;
  const all = [...model.workflows.values()];
  const youngest = all.filter(isOpen).sort((one, other) => one.calls - other.calls || other.last - one.last)[0];
  const isOver = number !== null && model.now() - model.workflows.get(number).last > OVER_S;
  if (number === null ? all.length : isOver && youngest) choose(youngest ?? all.at(-1), false);
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
    try {
      await navigator.clipboard.writeText(byId(button.dataset.copies).textContent);
      toast("Copied.");
    } catch {
      toast("This browser does not let the page copy.", true);
    }
  });
}

const calm = matchMedia("(prefers-reduced-motion: reduce)");
let drawnMs = 0;
setInterval(() => {
  const now = performance.now();
  if (
    document.visibilityState === "visible" &&
    timeline.isMoving &&
    now - drawnMs >= (calm.matches ? CALM_MS : MOVING_MS) - 5
  ) {
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
