// Where the stages of a graph stand: in layers by the longest way from the start, ordered so that few arrows cross.

export const START = "__start__";
export const END = "__end__";

/**
 * Return places and arrows of a graph.
 * @param {string[]} stages in the order in which the graph was written
 * @param {[string, string, boolean][]} arrows from, to, and whether it is always taken
 */
export function layered(stages, arrows) {
  const names = [START, ...stages, END];
  const onward = new Map(names.map((name) => [name, []]));
  for (const [from, to] of arrows) if (from !== to && onward.has(from) && onward.has(to)) onward.get(from).push(to);
  const back = backwards(names, onward);
  const isBack = (from, to) => from === to || back.has(`${from}\u0000${to}`);
  const layer = layers(names, onward, isBack);
  const rows = rowsOf(names, layer);
  straighten(rows, onward, isBack);
  const places = new Map();
  rows.forEach((row, depth) =>
    row.forEach((name, index) => places.set(name, { depth, at: index - (row.length - 1) / 2 })),
  );
  return {
    places,
    depth: rows.length,
    breadth: Math.max(...rows.map((row) => row.length)),
    arrows: arrows
      .filter(([from, to]) => places.has(from) && places.has(to))
      .map(([from, to, sure]) => ({ from, to, sure, back: isBack(from, to) })),
  };
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
  const layer = new Map(names.map((name) => [name, 0]));
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
  layer.set(END, Math.max(...layer.values(), 1));
  return layer;
}

function rowsOf(names, layer) {
  const rows = [];
  for (const name of names) (rows[layer.get(name)] ??= []).push(name);
  return rows.filter(Boolean);
}

/** Put each stage near the mean of those before it; a few sweeps forth and back do. */
function straighten(rows, onward, isBack) {
  const before = new Map();
  const after = new Map();
  for (const [from, targets] of onward) {
    for (const to of targets) {
      if (isBack(from, to)) continue;
      (before.get(to) ?? before.set(to, []).get(to)).push(from);
      (after.get(from) ?? after.set(from, []).get(from)).push(to);
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
