// What the page knows of the server: what its events told, and nothing else.

export const PHASES = ["waiting", "prefill", "decode", "tools"];
const HISTORY = 60; // states, one a second

export class Model {
  constructor() {
    this.hello = null;
    this.lost = null; // why there is no stream now
    this.reset();
  }

  /** Forget a server; the next one numbers its stages and workflows itself. */
  reset() {
    this.state = null;
    this.graphs = [];
    this.stages = new Map(); // by number
    this.workflows = new Map(); // by number
    this.spans = new Map(); // of the workflow that is watched, by id
    this.history = [];
  }

  /** Take an event in; returns which parts of the page it changes. */
  take(name, data) {
    if (typeof data.at === "number") this.agree(data.at);
    switch (name) {
      case "hello":
        this.offset = performance.now() / 1000 - data.at;
        this.hello = data;
        this.stages.clear();
        return ["top", "graphs", "backends"];
      case "state":
        this.state = data;
        if (this.history.length && this.history.at(-1).at >= data.at) this.history = []; // another server
        this.history.push(totalsOf(data));
        if (this.history.length > HISTORY) this.history.shift();
        return ["top", "backends", "waiting", "welcome"];
      case "graphs":
        this.graphs = data;
        return ["graphs", "welcome"];
      case "stages":
        for (const [number, graph, stage] of data.names) this.stages.set(number, { number, graph, stage, beat: 0 });
        for (const row of data.rows) this.counted(row);
        return ["graphs"];
      case "workflows":
        if (data.all) this.workflows.clear();
        for (const row of data.rows) this.workflows.set(row[0], workflowOf(row));
        for (const number of data.gone) this.workflows.delete(number);
        return ["workflows", "welcome", "timeline"];
      case "spans":
        if (data.workflow !== this.hello?.watching) return [];
        if (data.all) this.spans.clear();
        for (const span of data.spans ?? []) this.spans.set(span.id, span);
        return ["timeline"];
      default:
        return []; // of a newer server
    }
  }

  counted([number, waiting, prefill, decode, tools, inside, done, failed]) {
    const stage = this.stages.get(number);
    if (stage === undefined) return;
    if (stage.done !== undefined && done > stage.done) stage.beat += 1;
    Object.assign(stage, { waiting, prefill, decode, tools, inside, done, failed });
  }

  /** Keep the least difference seen between the server's clock and ours: the way there takes time. */
  agree(at) {
    const offset = performance.now() / 1000 - at;
    this.offset = this.offset === undefined ? offset : Math.min(this.offset, offset);
  }

  /** Return the server's clock now, in seconds. */
  now() {
    return performance.now() / 1000 - (this.offset ?? 0);
  }

  /** Return a workflow's number after the server has begun anew. */
  find(name, tenant) {
    for (const each of this.workflows.values()) if (each.name === name && each.tenant === tenant) return each.number;
    return null;
  }

  get mayControl() {
    return this.hello?.control === true && this.lost === null;
  }
}

function workflowOf([number, name, tenant, graph, runs, waiting, prefill, decode, tools, calls, failed, last]) {
  return { number, name, tenant, graph, runs, waiting, prefill, decode, tools, calls, failed, last };
}

/** Return what grows and what stands, of each backend and of all together. */
function totalsOf(state) {
  const backends = {};
  for (const each of state.backends) {
    const [calls, , , completion] = each.spent;
    backends[each.name] = { calls, tokens: completion, waiting: each.waiting, flying: each.in_flight };
  }
  return { at: state.at, backends };
}

/** Return calls and tokens per second of a backend over the last seconds; null while that is not known. */
export function rates(history, backend, overS = 10) {
  const last = history.at(-1);
  const first = history.find((each) => last.at - each.at <= overS);
  const [before, after] = [first?.backends[backend], last?.backends[backend]];
  const took = last && first ? last.at - first.at : 0;
  if (!before || !after || took <= 0) return null;
  return { calls: (after.calls - before.calls) / took, tokens: (after.tokens - before.tokens) / took };
}
