// Where the stages of a graph stand: in layers by the longest way from the start, ordered so that few arrows cross.

export const START = "__start__";
export const END = "__end__";

const MOST_BENDS = 300; // of a graph with more, long arrows run straight

/**
 * Return places and arrows of a graph. An arrow past a layer goes through a free place there (`through`).
 * @param {string[]} stages in the order in which the graph was written
 * @param {[string, string, boolean][]} written from, to, and whether it is always taken
 */
export function layered(stages, written) {
  const names = [START, ...stages, END];
  const known = new Set(names);
  const arrows = written.filter(([from, to]) => known.has(from) && known.has(to));
  const onward = new Map(names.map((name) => [name, []]));
  for (const [from, to] of arrows) if (from !== to) onward.get(from).push(to);
  const back = backwards(names, onward);
  const isBack = (from, to) => from === to || back.has(`${from}\u0000${to}`);
  const layer = layers(names, onward, isBack);
  const rows = rowsOf(names, layer);
  const drawn = arrows.map(([from, to, sure]) => ({ from, to, sure, back: isBack(from, to), through: [] }));
  let bends = 0;
  for (const arrow of drawn) {
    for (let depth = layer.get(arrow.from) + 1; depth < layer.get(arrow.to) && bends < MOST_BENDS; depth += 1) {
      const place = `${arrow.from}\u0000${arrow.to}\u0000${depth}`;
      arrow.through.push(place);
      rows[depth].push(place);
      bends += 1;
    }
  }
  straighten(rows, drawn);
  const places = new Map();
  rows.forEach((row, depth) =>
    row.forEach((name, index) => places.set(name, { depth, at: index - (row.length - 1) / 2 })),
  );
  return { places, depth: rows.length, breadth: Math.max(...rows.map((row) => row.length)), arrows: drawn };
}

/** Return the arrows that close a circle, found depth first. */
function backwards(names, onward) {
  const found = new Set();
  const state = new Map(); // 1: on the way, 2: done
  const visit = (name) => {
    state.set(name, 1);
    for (const next of onward.get(name)) {
      if (state.get(next) === 1) found.add(`${name}\u0000${next}`);
      else if (!state.has(next)) visit(next);
    }
    state.set(name, 2);
  };
  for (const name of names) if (!state.has(name)) visit(name);
  return found;
}

function layers(names, onward, isBack) {
  // A stage that no arrow leads to, since code alone names it, stands behind the start like the first.
  const layer = new Map(names.map((name) => [name, name === START ? 0 : 1]));
  for (let round = 0; round < names.length; round += 1) {
    let moved = false;
    for (const name of names) {
      for (const next of onward.get(name)) {
        if (!isBack(name, next) && layer.get(next) <= layer.get(name)) {
          layer.set(next, layer.get(name) + 1);
          moved = true;
        }
      }
    }
    if (!moved) break;
  }
  layer.delete(END);
  layer.set(END, Math.max(...layer.values()) + 1);
  return layer;
}

function rowsOf(names, layer) {
  const rows = [];
  for (const name of names) (rows[layer.get(name)] ??= []).push(name);
  return rows.filter(Boolean);
}

/** Put each place near the mean of those before it; a few sweeps forth and back do. */
function straighten(rows, arrows) {
  const before = new Map();
  const after = new Map();
  for (const { from, to, back, through } of arrows) {
    const stops = back ? [] : [from, ...through, to];
    for (let at = 1; at < stops.length; at += 1) {
      (before.get(stops[at]) ?? before.set(stops[at], []).get(stops[at])).push(stops[at - 1]);
      (after.get(stops[at - 1]) ?? after.set(stops[at - 1], []).get(stops[at - 1])).push(stops[at]);
    }
  }
  for (let sweep = 0; sweep < 4; sweep += 1) {
    const forth = sweep % 2 === 0;
    const index = new Map(rows.flatMap((row) => row.map((name, at) => [name, at - (row.length - 1) / 2])));
    for (const row of forth ? rows : [...rows].reverse()) {
      const mean = new Map(
        row.map((name) => [name, meanOf((forth ? before : after).get(name), index) ?? index.get(name)]),
      );
      row.sort((one, other) => mean.get(one) - mean.get(other));
      row.forEach((name, at) => index.set(name, at - (row.length - 1) / 2));
    }
  }
}

function meanOf(names, index) {
  return names?.length ? names.reduce((sum, name) => sum + index.get(name), 0) / names.length : undefined;
}
