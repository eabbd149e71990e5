// One workflow's calls and tools on an axis of time: waiting, prefill, decode, and what ran between them.

import { attribute, attributes, byId, count, fill, h, hide, keyed, seconds, svg, table, text } from "./dom.js";

const ROW = 20;
const BAR = 12;
const AXIS = 24;
const MOST_ROWS = 60;
const MOST_KEPT = 40;
const COLUMNS = [
  "Stage",
  "Backend",
  "Waited",
  "Prefill",
  "Decode or tool",
  "Prompt",
  "Cached",
  "Answer",
  "How it ended",
];
const STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200];

/** Return what a span's time went to, in order: [phase, from, to]. */
export function partsOf(span, now) {
  const end = span.ended ?? now;
  if (span.tool) return [["tools", span.began, end]];
  if (span.sent === null) return [["waiting", span.began, end]];
  const parts = [["waiting", span.began, span.sent]];
  if (span.first === null) parts.push([span.ended === null ? "prefill" : "served", span.sent, end]);
  else parts.push(["prefill", span.sent, span.first], ["decode", span.first, end]);
  return parts.filter(([, from, to]) => to > from);
}

/** Put the spans of each stage in rows; such as overlap stand below each other. */
export function rowsOf(spans) {
  const stages = new Map();
  for (const span of spans) {
    const key = span.tool ? `${span.stage}\n${span.tool}` : span.stage;
    if (!stages.has(key)) stages.set(key, { stage: span.stage, tool: span.tool, lanes: [] });
    const { lanes } = stages.get(key);
    let lane = lanes.find((each) => each.end <= span.began);
    if (lane === undefined) lanes.push((lane = { end: 0, spans: [] }));
    lane.end = span.ended ?? Infinity;
    lane.spans.push(span);
  }
  return [...stages].flatMap(([key, { stage, tool, lanes }]) =>
    lanes.map((lane, at) => ({
      key: `${key}\n${at}`,
      label: at ? "" : tool || stage || "no stage",
      isTool: tool !== "",
      spans: lane.spans,
    })),
  );
}

export class Timeline {
  constructor(model) {
    this.model = model;
    this.body = byId("timeline-body");
    this.pointed = null;
    this.label = h("p", { class: "muted empty" });
    this.picture = svg("svg", { class: "timeline", tabindex: "0", role: "img" });
    this.detail = h("p", { class: "detail muted small" });
    this.note = h(
      "p",
      { class: "muted small note", hidden: true },
      h("i", { class: "fill served" }),
      "at the engine, not streamed: prefill and decode in one",
    );
    this.kept = h("div", { class: "kept" });
    this.figures = table(...COLUMNS);
    this.table = h(
      "details",
      { class: "as-table" },
      h("summary", {}, "As a table"),
      h("div", { class: "scroller" }, this.figures),
    );
    this.body.append(
      this.label,
      h("div", { class: "drawn" }, this.picture),
      this.detail,
      this.note,
      this.kept,
      this.table,
    );
    this.picture.append(
      svg("defs", {}, hatching()),
      svg("g", { class: "axis" }),
      svg("g", { class: "rows" }),
      svg("line", { class: "now" }),
    );
    this.picture.addEventListener("pointerover", (event) =>
      this.point(event.target.closest?.(".span")?.dataset.id ?? null),
    );
    this.picture.addEventListener("pointerleave", () => this.point(null));
    this.picture.addEventListener("keydown", (event) => this.step(event));
    this.table.addEventListener("toggle", () => this.draw());
  }

  /** Show the spans of a workflow; null: none is chosen. */
  show(workflow, overS) {
    this.workflow = workflow;
    this.overS = overS;
    this.draw();
  }

  get isMoving() {
    return this.model.lost === null && [...this.model.spans.values()].some((span) => span.ended === null);
  }

  draw() {
    const { workflow, model } = this;
    const now = model.now();
    const all = workflow ? [...model.spans.values()] : [];
    const live = all.filter((span) => span.timed !== false).sort((one, other) => one.began - other.began);
    const kept = all.filter((span) => span.timed === false);
    text(
      this.label,
      !workflow
        ? "Choose a workflow to see its calls."
        : all.length
          ? ""
          : "No call of it is kept, and none has come since.",
    );
    hide(this.label, all.length > 0);
    hide(this.picture.parentElement, live.length === 0);
    hide(this.detail, live.length === 0);
    hide(this.table, all.length === 0);
    hide(
      this.note,
      !all.some((span) => !span.tool && span.sent !== null && span.first === null && span.ended !== null),
    );
    if (live.length) this.drawLive(live, now);
    this.drawKept(kept);
    if (this.table.open) this.drawTable(all, now);
  }

  drawLive(live, now) {
    const isOpen = live.some((span) => span.ended === null);
    const until = isOpen ? now : Math.max(...live.map((span) => span.ended));
    const first = live[0].began;
    const since = this.overS ? Math.max(first, until - this.overS) : first;
    const whole = Math.max(until - since, 0.5);
    const spans = live.filter((span) => (span.ended ?? now) >= since);
    const rows = rowsOf(spans).slice(0, MOST_ROWS);
    const width = Math.max(280, this.body.clientWidth);
    const gutter = Math.min(132, Math.round(width * 0.27));
    const room = width - gutter - 14;
    const place = (at) => gutter + (room * (Math.max(at, since) - since)) / whole;
    const height = AXIS + rows.length * ROW + 6;
    const said = `${spans.length} calls and tools of ${this.workflow.name} in ${seconds(whole)}`;
    attributes(this.picture, {
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
      "aria-label": `${said}; the arrow keys go through them`,
    });
    this.drawAxis(place, since, whole, room, height);
    this.shown = rows.flatMap((row) => row.spans);
    const most = Math.floor(gutter / 7.2);
    keyed(
      this.picture.querySelector(".rows"),
      rows,
      (row) => row.key,
      makeLane,
      (lane, row) => {
        attribute(lane, "transform", `translate(0 ${AXIS + rows.indexOf(row) * ROW})`);
        const [name, line, bars] = lane.children;
        text(name, row.label.length > most ? `${row.label.slice(0, most - 1)}…` : row.label);
        attribute(name, "class", row.isTool ? "lane-name tool-name" : "lane-name");
        attributes(line, { x1: gutter, x2: width, y1: 10, y2: 10 });
        keyed(
          bars,
          row.spans,
          (span) => span.id,
          makeSpan,
          (bar, span) => this.drawSpan(bar, span, place, now),
        );
      },
    );
    const visibility = isOpen ? "visible" : "hidden";
    attributes(this.picture.querySelector(".now"), {
      x1: place(until),
      x2: place(until),
      y1: AXIS - 6,
      y2: height,
      visibility,
    });
    this.drawDetail();
  }

  drawSpan(bar, span, place, now) {
    const parts = partsOf(span, now);
    const is = { failed: span.error, pointed: span.id === this.pointed, open: span.ended === null };
    attribute(bar, "class", ["span", ...Object.keys(is).filter((each) => is[each])].join(" "));
    keyed(
      bar,
      parts,
      ([phase]) => phase,
      makePart,
      (rect, [, from, to]) => {
        attributes(rect, { x: place(from), width: Math.max(1.5, place(to) - place(from)) });
      },
    );
  }

  drawAxis(place, since, whole, room, height) {
    const step = STEPS.find((each) => (whole / each) * 56 <= room) ?? 14_400;
    const marks = [];
    for (let at = 0; at <= whole; at += step) marks.push(at);
    const make = () => svg("g", {}, svg("line", {}), svg("text", { y: 11 }));
    keyed(
      this.picture.querySelector(".axis"),
      marks,
      (at) => at,
      make,
      (child, at) => {
        const x = place(since + at);
        attributes(child.firstChild, { x1: x, x2: x, y1: 16, y2: height });
        attributes(child.lastChild, { x });
        text(child.lastChild, step < 1 ? `${at.toFixed(1)} s` : at < 120 ? `${at} s` : `${Math.round(at / 60)} min`);
      },
    );
  }

  drawDetail() {
    const span = this.pointed === null ? undefined : this.model.spans.get(this.pointed);
    text(
      this.detail,
      span ? sentence(span, this.model.now()) : "Point at a bar, or use the arrow keys, to see one call.",
    );
  }

  /** Draw calls of which it is not known when they were: a record has how long each phase took. */
  drawKept(kept) {
    const shown = kept.slice(-MOST_KEPT);
    hide(this.kept, shown.length === 0);
    if (!shown.length) return;
    if (!this.kept.firstChild) this.kept.append(h("h3", {}), h("ol", {}));
    text(
      this.kept.firstChild,
      `Before this page was open: the newest ${shown.length === 1 ? "call" : `${count(shown.length)} calls`}, by how long they took`,
    );
    const longest = Math.max(0.001, ...shown.map((span) => span.ended - span.began));
    const make = () => h("li", {}, ...["lane-name", "bar", "figure"].map((each) => h("span", { class: each })));
    const makeBar = ([phase]) => h("i", { class: `fill ${phase}` });
    keyed(
      this.kept.lastChild,
      shown,
      (span) => span.id,
      make,
      (item, span) => {
        const [name, bar, figure] = item.children;
        text(name, span.stage || "no stage");
        keyed(
          bar,
          partsOf(span, 0),
          ([phase]) => phase,
          makeBar,
          (part, [, from, to]) => {
            part.style.width = `${(100 * (to - from)) / longest}%`;
          },
        );
        text(figure, seconds(span.ended - span.began));
        attribute(item, "title", sentence(span, 0));
        attribute(item, "class", span.error ? "failed" : "");
      },
    );
  }

  drawTable(all, now) {
    fill(
      this.figures,
      all.slice(-MOST_ROWS),
      (span) => span.id,
      (span) => {
        const took = new Map(partsOf(span, now).map(([phase, from, to]) => [phase, seconds(to - from)]));
        return [
          span.tool ? `${span.stage}: ${span.tool}` : span.stage || "–",
          span.backend || "–",
          took.get("waiting"),
          took.get("prefill"),
          took.get("decode") ?? took.get("served") ?? took.get("tools"),
          span.prompt,
          span.cached,
          span.completion,
          span.error ?? (span.ended === null ? "under way" : "well"),
        ];
      },
    );
  }

  point(id) {
    if (this.pointed === id) return;
    this.pointed = id;
    this.draw();
  }

  step(event) {
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (by === undefined || !this.shown?.length) return;
    event.preventDefault();
    const at = this.shown.findIndex((span) => span.id === this.pointed);
    this.point(this.shown[Math.max(0, Math.min(this.shown.length - 1, at + by))].id);
  }
}

const makeLane = () =>
  svg(
    "g",
    { class: "lane" },
    svg("text", { class: "lane-name", x: 0, y: 14 }),
    svg("line", { class: "lane-line" }),
    svg("g", {}),
  );
const makeSpan = (span) => svg("g", { class: "span", "data-id": span.id });
const makePart = ([phase]) => svg("rect", { class: `fill ${phase}`, y: 10 - BAR / 2, height: BAR, rx: 2 });

/** Return what time of waiting is filled with: told from the others by more than its colour. */
function hatching() {
  const pattern = {
    id: "hatch",
    width: 6,
    height: 6,
    patternUnits: "userSpaceOnUse",
    patternTransform: "rotate(45)",
  };
  return svg(
    "pattern",
    pattern,
    svg("rect", { width: 6, height: 6, class: "hatch-ground" }),
    svg("rect", { width: 2.4, height: 6, class: "hatch-line" }),
  );
}

/** Return a span in words. */
function sentence(span, now) {
  const words = { waiting: "waited", prefill: "prefill", decode: "decode", served: "at the engine", tools: "ran" };
  const parts = partsOf(span, now).map(([phase, from, to]) => `${words[phase]} ${seconds(to - from)}`);
  const stage = span.stage || "no stage";
  const where = span.backend ? `${stage} on ${span.backend}` : stage;
  const said = [span.tool ? `tool ${span.tool} in ${stage}` : where, ...parts];
  if (span.prompt != null) {
    const cached = span.cached == null ? "" : `, ${count(span.cached)} cached`;
    said.push(`${count(span.prompt)} prompt tokens${cached}`, `${count(span.completion ?? 0)} answered`);
  }
  if (span.attempts > 1) said.push(`${span.attempts} attempts`);
  if (span.error) said.push(`failed: ${span.error}`);
  else if (span.ended === null) said.push("under way");
  return said.join(" · ");
}
