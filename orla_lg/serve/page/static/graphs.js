// The graph of each application, its stages lit by what is open in them.

import { attribute, byId, count, h, hide, keyed, svg, text } from "./dom.js";
import { END, START, layered } from "./layout.js";
import { PHASES } from "./model.js";

const WIDEST = 176; // of a stage
const NARROWEST = 112;
const HEIGHT = 80;
const GAP_ALONG = 26;
const GAP_ACROSS = 16;
const MARGIN = 6;
const DOT = 6;
const ENDS = 26; // from the dots of start and end to the stages

const OFTEN_MS = 900;

const WORDS = { waiting: "waiting", prefill: "in prefill", decode: "in decode", tools: "in a tool" };

/** Bring the graphs up to date. */
export function drawGraphs(model) {
  const list = byId("graph-list");
  const room = Math.floor(list.clientWidth / 20) * 20;
  const byGraph = new Map();
  for (const stage of model.stages.values()) {
    if (!byGraph.has(stage.graph)) byGraph.set(stage.graph, []);
    byGraph.get(stage.graph).push(stage);
  }
  const known = model.graphs.map((graph) => ({ graph, stages: byGraph.get(graph.name) ?? [] }));
  const names = new Set(model.graphs.map((graph) => graph.name));
  const others = [...byGraph]
    .filter(([name]) => !names.has(name))
    .map(([name, stages]) => ({ graph: seenOnly(name, stages), stages }));
  const shown = [...known, ...others].filter(({ graph }) => graph.stages.length);
  shown.sort((one, other) => busy(other.stages) - busy(one.stages) || 0);
  const order = (list.order ??= new Map()); // once shown, a graph keeps its place: what jumps cannot be read
  for (const { graph } of shown) if (!order.has(graph.name)) order.set(graph.name, order.size);
  shown.sort((one, other) => order.get(one.graph.name) - order.get(other.graph.name));
  keyed(
    list,
    shown,
    ({ graph }) => `${graph.name}\n${room}\n${shapeOf(graph)}`,
    ({ graph }) => drawing(graph, room),
    light,
  );
  let empty = byId("no-graphs");
  if (empty === null) {
    empty = h(
      "p",
      { id: "no-graphs", class: "muted empty" },
      "A graph shows here once an application has wrapped one: graph = Orla.remote(…).wrap(builder). Stages of the gateway's callers show when they call.",
    );
    list.after(empty);
  }
  hide(empty, shown.length > 0);
}

function busy(stages) {
  return stages.reduce((sum, stage) => sum + (stage.inside || 0) + (stage.waiting || 0) + (stage.done || 0), 0);
}

const shapes = new WeakMap();

function shapeOf(graph) {
  if (!shapes.has(graph)) shapes.set(graph, JSON.stringify([graph.stages, graph.arrows]));
  return shapes.get(graph);
}

/** Return a graph of which no structure is known: its stages side by side. */
function seenOnly(name, stages) {
  const names = stages.map((stage) => stage.stage).sort();
  return {
    name,
    stages: names.map((each) => ({ name: each, home: "", open: false })),
    arrows: [],
    more: 0,
    loose: true,
  };
}

function titleOf(graph) {
  if (graph.name === "gateway" && graph.loose) return "Gateway";
  return graph.name || (graph.loose ? "Calls outside a graph" : "graph");
}

function drawing(graph, room) {
  const picture = graph.loose ? loose(graph, room) : connected(graph, room);
  const note = graph.more ? h("p", { class: "muted small" }, `and ${graph.more} more stages`) : null;
  return h(
    "figure",
    { class: graph.loose ? "graph loose-graph" : "graph" },
    h("figcaption", {}, h("strong", {}, titleOf(graph)), h("span", { class: "muted small counts" })),
    h(
      "div",
      { class: "scroller", tabindex: "0", role: "group", "aria-label": `Stages of ${titleOf(graph)}` },
      picture,
    ),
    note,
  );
}

function loose(graph, room) {
  const width = Math.min(WIDEST, Math.max(NARROWEST, (room - 16) / 2));
  const picture = h("div", { class: "loose" });
  for (const stage of graph.stages) {
    picture.append(
      svg("svg", { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}` }, stageNode(stage, 0, 0, width)),
    );
  }
  return picture;
}

/** Return how long or broad a row of boxes is. */
function extent(boxes, size, gap) {
  return boxes * size + (boxes - 1) * gap;
}

/** Return the way a graph runs, and how wide its stages are: from left to right where that fits, else downwards. */
function fitted(plan, loops, room) {
  const layers = plan.depth - 2;
  const fixed = 2 * (ENDS + 2 * DOT) + 2 * MARGIN + (layers - 1) * GAP_ALONG;
  const across = Math.floor((room - fixed) / layers);
  if (across >= NARROWEST) return { wide: true, width: Math.min(WIDEST, across) };
  const down = Math.floor((room - 2 * MARGIN - loops - (plan.breadth - 1) * GAP_ACROSS) / plan.breadth);
  if (down >= NARROWEST) return { wide: false, width: Math.min(WIDEST, down) };
  return { wide: plan.breadth > 3, width: NARROWEST };
}

function connected(graph, room) {
  const plan = layered(
    graph.stages.map((stage) => stage.name),
    graph.arrows,
  );
  const loops = plan.arrows.filter((arrow) => arrow.back).length;
  const beside = loops ? 10 + 12 * loops : 0; // room for arrows that go back
  const { wide, width } = fitted(plan, beside, room);
  const [thick, broad] = wide ? [width, HEIGHT] : [HEIGHT, width];
  const half = extent(plan.breadth, broad, GAP_ACROSS) / 2;
  const length = extent(plan.depth - 2, thick, GAP_ALONG) + 2 * (MARGIN + 2 * DOT + ENDS);
  const breadth = 2 * half + 2 * MARGIN + beside;
  const centre = (name) => {
    const place = plan.places.get(name);
    const main =
      name === START
        ? MARGIN + DOT
        : name === END
          ? length - MARGIN - DOT
          : MARGIN + 2 * DOT + ENDS + (place.depth - 1) * (thick + GAP_ALONG) + thick / 2;
    const cross = MARGIN + half + place.at * (broad + GAP_ACROSS);
    return wide ? [main, cross] : [cross, main];
  };
  const reach = (name) => (name === START || name === END ? DOT : thick / 2);
  const [w, tall] = wide ? [length, breadth] : [breadth, length];
  const picture = svg("svg", {
    width: w,
    height: tall,
    viewBox: `0 0 ${w} ${tall}`,
    role: "list",
    "aria-label": `Stages of ${titleOf(graph)}`,
  });
  picture.append(heads());
  let lane = 0;
  for (const arrow of plan.arrows) {
    const way = arrow.back
      ? around(centre, arrow, wide, broad / 2, MARGIN + 2 * half + 4 + 12 * ++lane)
      : straight(centre, reach, arrow, wide);
    picture.append(
      svg("path", { d: way, class: arrow.sure ? "arrow" : "arrow perhaps", "marker-end": "url(#head)" }),
    );
  }
  for (const end of [START, END]) {
    const [cx, cy] = centre(end);
    picture.append(
      svg(
        "circle",
        { cx, cy, r: DOT, class: `end ${end === START ? "start" : ""}` },
        svg("title", {}, end === START ? "start" : "end"),
      ),
    );
  }
  for (const stage of graph.stages) {
    const [x, y] = centre(stage.name);
    picture.append(stageNode(stage, x - width / 2, y - HEIGHT / 2, width));
  }
  return picture;
}

function heads() {
  return svg(
    "defs",
    {},
    svg(
      "marker",
      { id: "head", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" },
      svg("path", { d: "M0 0.8 7 4 0 7.2z", class: "head" }),
    ),
  );
}

function straight(centre, reach, { from, to, through }, wide) {
  const point = (name, by) => {
    const [x, y] = centre(name);
    return wide ? [x + by, y] : [x, y + by];
  };
  let [x, y] = point(from, reach(from));
  let way = `M${x} ${y}`;
  for (const name of [...through, to]) {
    const [nextX, nextY] = point(name, name === to ? -reach(name) - 2 : -reach(name));
    const bend = (wide ? nextX - x : nextY - y) / 2;
    way += wide
      ? `C${x + bend} ${y} ${nextX - bend} ${nextY} ${nextX} ${nextY}`
      : `C${x} ${y + bend} ${nextX} ${nextY - bend} ${nextX} ${nextY}`;
    if (name !== to) {
      [x, y] = point(name, reach(name));
      way += `L${x} ${y}`;
    }
  }
  return way;
}

/** Return the way of an arrow that goes back: around the stages, beyond the last of them. */
function around(centre, { from, to }, wide, reach, beyond) {
  const [[x1, y1], [x2, y2]] = [centre(from), centre(to)];
  const [a, b] = from === to ? [14, -14] : [0, 0];
  return wide
    ? `M${x1 + a} ${y1 + reach}C${x1 + a} ${beyond} ${x2 + b} ${beyond} ${x2 + b} ${y2 + reach + 2}`
    : `M${x1 + reach} ${y1 + a}C${beyond} ${y1 + a} ${beyond} ${y2 + b} ${x2 + reach + 2} ${y2 + b}`;
}

function stageNode(stage, x, y, width) {
  const node = svg("g", {
    class: "stage",
    transform: `translate(${x} ${y})`,
    role: "listitem",
    "data-stage": stage.name,
    "data-width": width,
  });
  const short = stage.name.split("|").at(-1) || "(no stage)";
  const where = stage.home ? `→ ${stage.home}` : stage.open ? "→ as its code says" : "";
  const chars = (width - 24) / 7.4;
  node.append(
    svg("title", {}, stage.name || "calls without a stage"),
    svg("rect", { class: "halo", width, height: HEIGHT, rx: 12 }),
    svg("rect", { class: "box", width, height: HEIGHT, rx: 12 }),
    svg("text", { class: "name", x: 12, y: 22 }, cut(short, Math.floor(chars))),
    svg("text", { class: "home", x: 12, y: 39 }, cut(where, Math.floor(chars * 0.66))),
    svg("text", { class: "done", x: width - 12, y: 39, "text-anchor": "end" }),
    svg("g", { class: "marks", transform: "translate(12 49)" }),
    svg("g", { class: "share", transform: `translate(12 ${HEIGHT - 11})` }),
  );
  return node;
}

function cut(name, most) {
  return name.length > most ? `${name.slice(0, most - 1)}…` : name;
}

// What is open

function light(figure, { graph, stages }) {
  const byName = new Map(stages.map((stage) => [stage.stage, stage]));
  let open = 0;
  let ended = 0;
  for (const node of figure.querySelectorAll(".stage")) {
    const stage = byName.get(node.dataset.stage);
    open += stage ? stage.waiting + stage.prefill + stage.decode : 0;
    ended += stage?.done ?? 0;
    lightStage(node, stage);
  }
  const said = open || ended ? `${count(open)} calls open · ${count(ended)} done` : "no call since this page was opened";
  text(figure.querySelector(".counts"), said);
}

const NOTHING = { waiting: 0, prefill: 0, decode: 0, tools: 0, inside: 0, done: 0, failed: 0, beat: 0 };

function lightStage(node, stage = NOTHING) {
  const now = JSON.stringify([
    stage.waiting,
    stage.prefill,
    stage.decode,
    stage.tools,
    stage.inside,
    stage.done,
    stage.failed,
  ]);
  if (node.now === now) return;
  node.now = now;
  const main = PHASES.toReversed().find((phase) => stage[phase] > 0) ?? (stage.inside > 0 ? "inside" : "idle");
  attribute(node, "class", `stage is-${main}`);
  if (node.beat !== undefined && stage.beat !== node.beat) flash(node.querySelector(".halo"));
  node.beat = stage.beat;
  drawMarks(node.querySelector(".marks"), stage);
  drawShare(node.querySelector(".share"), stage, node.dataset.width - 24);
  const ended = [stage.done && `✓ ${count(stage.done)}`, stage.failed && `✕ ${count(stage.failed)}`];
  text(node.querySelector(".done"), ended.filter(Boolean).join(" "));
  const open = PHASES.filter((phase) => stage[phase]).map((phase) => `${stage[phase]} ${WORDS[phase]}`);
  const said = [open.join(", ") || "nothing open", `${stage.done} done`, `${stage.failed} failed`].join(", ");
  attribute(node, "aria-label", `${node.dataset.stage || "no stage"}: ${said}`);
}

/** Have a stage flash because a call ended; where calls end all the time, it says nothing and costs each frame. */
function flash(halo) {
  const sinceMs = performance.now() - (halo.endedMs ?? 0);
  halo.endedMs = performance.now();
  if (sinceMs < OFTEN_MS || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
  halo.animate([{ opacity: 0.9 }, { opacity: 0 }], { duration: 700, easing: "ease-out" });
}

function drawMarks(group, stage) {
  const open = PHASES.filter((phase) => stage[phase] > 0);
  let x = 0;
  const make = (phase) => svg("g", {}, markOf(phase), svg("text", { x: 15, y: 9, class: "number" }));
  keyed(
    group,
    open,
    (phase) => phase,
    make,
    (child, phase) => {
      attribute(child, "transform", `translate(${x} 0)`);
      const said = count(stage[phase]);
      text(child.lastChild, said);
      x += 22 + 7.4 * said.length;
    },
  );
}

/** Return a phase's mark: each has a shape of its own, so that colour is not needed to tell them apart. */
export function markOf(phase) {
  const group = svg("g", { class: `shape ${phase}` });
  if (phase === "tools") group.append(svg("path", { d: "M5.5 0 11 5.5 5.5 11 0 5.5z" }));
  else {
    group.append(svg("circle", { cx: 5.5, cy: 5.5, r: 4.6 }));
    if (phase === "prefill") group.append(svg("path", { class: "half", d: "M5.5 0.9a4.6 4.6 0 0 1 0 9.2z" }));
  }
  return group;
}

function drawShare(group, stage, room) {
  const whole = PHASES.reduce((sum, phase) => sum + stage[phase], 0);
  let x = 0;
  const make = (phase) => svg("rect", { class: `fill ${phase}`, y: 0, height: 4, rx: 1 });
  keyed(
    group,
    whole ? PHASES : [],
    (phase) => phase,
    make,
    (child, phase) => {
      const width = (room * stage[phase]) / whole;
      attribute(child, "x", x.toFixed(1));
      attribute(child, "width", Math.max(0, width - 1).toFixed(1));
      x += width;
    },
  );
}
