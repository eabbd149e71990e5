// The workflows: what is open of each, and which of them the timeline shows. And the calls that wait.

import { attribute, byId, count, fill, h, hide, keyed, seconds, several, svg, table, text } from "./dom.js";
import { markOf } from "./graphs.js";
import { PHASES } from "./model.js";

const MOST_SHOWN = 40;
const MOST_WAITS = 12;

const REASONS = {
  place: () => "a place",
  slot: () => "a cache slot",
  cache: (tokens) => `its cache to fit (${count(tokens)} tokens)`,
  prefix: () => "its prefix, which another branch prefills",
  paused: () => "its backend to be resumed",
  circuit: () => "its engine, which another call tries",
};

export function isOpen(workflow) {
  return workflow.runs.length + workflow.waiting + workflow.prefill + workflow.decode > 0;
}

/** Bring the list up to date; `choose(workflow)` shows one in the timeline. */
export function drawWorkflows(model, chosen, choose) {
  const sought = byId("workflow-search").value.trim().toLowerCase();
  const all = [...model.workflows.values()];
  const found = sought
    ? all.filter((each) => `${each.name}\n${each.tenant}\n${each.graph}`.toLowerCase().includes(sought))
    : all;
  found.sort((one, other) => isOpen(other) - isOpen(one) || other.last - one.last || other.number - one.number);
  const shown = found.slice(0, MOST_SHOWN);
  const make = (workflow) => {
    const button = h(
      "button",
      { type: "button" },
      h("span", { class: "who" }, h("b", {}), h("span", { class: "tenant", hidden: true })),
      h("span", { class: "in muted small" }),
      svg("svg", { class: "now", height: 11, width: 130, "aria-hidden": "true" }),
      h("span", { class: "ended muted small" }),
    );
    button.addEventListener("click", () => choose(model.workflows.get(workflow.number) ?? workflow));
    return h("li", {}, button);
  };
  keyed(
    byId("workflow-list"),
    shown,
    (each) => each.number,
    make,
    (item, each) => update(item.firstChild, each, each.number === chosen),
  );
  const rest = found.length - shown.length;
  const note = byId("workflow-rest");
  hide(note, rest <= 0 && found.length > 0);
  if (all.length === 0)
    text(note, "A workflow is a thread, or a run without one. It shows here with its first call.");
  else if (found.length === 0) text(note, `No workflow has “${sought}” in its name, tenant or graph.`);
  else text(note, `and ${count(rest)} more; find one by its name`);
}

function update(button, workflow, isChosen) {
  const [who, graph, now, ended] = button.children;
  text(who.firstChild, workflow.name);
  attribute(who.firstChild, "title", workflow.name);
  text(who.lastChild, workflow.tenant);
  hide(who.lastChild, !workflow.tenant);
  text(graph, workflow.graph);
  const failed = workflow.failed ? `, ${count(workflow.failed)} failed` : "";
  text(ended, `${several(workflow.calls, "call")}${failed}`);
  attribute(button, "aria-pressed", String(isChosen));
  attribute(button, "class", isOpen(workflow) ? "open" : "over");
  const open = PHASES.filter((phase) => workflow[phase] > 0);
  let x = 0;
  const make = (phase) => svg("g", {}, markOf(phase), svg("text", { x: 15, y: 9.5, class: "number" }));
  keyed(
    now,
    open,
    (phase) => phase,
    make,
    (child, phase) => {
      attribute(child, "transform", `translate(${x} 0)`);
      text(child.lastChild, count(workflow[phase]));
      x += 24 + 7 * String(workflow[phase]).length;
    },
  );
  const said =
    open.map((phase) => `${workflow[phase]} ${phase}`).join(", ") || (workflow.runs.length ? "running" : "idle");
  const whose = workflow.tenant ? ` of ${workflow.tenant}` : "";
  attribute(button, "aria-label", `${workflow.name}${whose}: ${said}, ${several(workflow.calls, "call")}`);
}

export function drawWaiting(model) {
  const waits = (model.state?.backends ?? []).flatMap((backend) =>
    backend.waits.map((wait) => ({ backend: backend.name, wait })),
  );
  const all = (model.state?.backends ?? []).reduce((sum, backend) => sum + backend.waiting, 0);
  const body = byId("waiting-body");
  if (!body.firstChild) {
    body.append(
      h("p", { class: "muted empty" }, "No call waits."),
      h(
        "div",
        { class: "scroller", tabindex: "0", role: "group", "aria-label": "Calls that wait" },
        table("Workflow", "Stage", "Backend", "Priority", "Waited", "Waits for"),
      ),
      h("p", { class: "muted rest" }),
    );
  }
  const [empty, scroller, rest] = body.children;
  const shown = waits.slice(0, MOST_WAITS);
  hide(empty, all > 0);
  hide(scroller, all === 0);
  hide(rest, all <= shown.length);
  text(rest, `and ${count(all - shown.length)} more`);
  fill(
    scroller.firstChild,
    shown,
    ({ wait }) => wait[0],
    ({ backend, wait }) => {
      const [, workflow, tenant, stage, priority, waited, reason, tokens] = wait;
      const whose = tenant ? `${workflow} (${tenant})` : workflow;
      return [whose, stage || "–", backend, priority, seconds(waited), (REASONS[reason] ?? String)(tokens)];
    },
  );
}
