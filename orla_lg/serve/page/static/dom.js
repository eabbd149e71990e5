// Elements made and changed by hand. Text is always text: no name of a thread or a stage is ever read as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** Return a new element with attributes and children; a child that is no node becomes text. */
export function h(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** Return a new element of SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) attribute(element, name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Set an attribute, or take it away, if it is not so already. */
export function attribute(element, name, value) {
  if (value === null || value === undefined || value === false) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
  } else {
    const text = value === true ? "" : String(value);
    if (element.getAttribute(name) !== text) element.setAttribute(name, text);
  }
}

/** Set several attributes; numbers with one decimal. */
export function attributes(element, values) {
  for (const [name, value] of Object.entries(values)) {
    attribute(element, name, typeof value === "number" ? Number(value.toFixed(1)) : value);
  }
}

/** Set an element's text, if it is not so already. */
export function text(element, value) {
  const wanted = String(value);
  if (element.textContent !== wanted) element.textContent = wanted;
}

export function hide(element, isHidden) {
  if (element.hidden !== isHidden) element.hidden = isHidden;
}

/**
 * Have a parent hold one child for each item, in order; a child whose key stays is kept, with its focus.
 * `make(item)` returns a new child, `update(child, item)` brings it up to date.
 */
export function keyed(parent, items, keyOf, make, update) {
  const known = parent.keyedChildren ?? (parent.keyedChildren = new Map());
  const left = new Set(known.keys());
  let at = parent.firstChild;
  for (const item of items) {
    const key = keyOf(item);
    let child = known.get(key);
    if (child === undefined) {
      child = make(item);
      known.set(key, child);
    }
    left.delete(key);
    update(child, item);
    if (child === at) at = at.nextSibling;
    else parent.insertBefore(child, at);
  }
  for (const key of left) {
    known.get(key).remove();
    known.delete(key);
  }
}

/** Return a table with a head and an empty body. */
export function table(...headings) {
  const head = h("tr", {}, ...headings.map((each) => h("th", { scope: "col" }, each)));
  return h("table", {}, h("thead", {}, head), h("tbody", {}));
}

/** Bring a table's rows up to date. */
export function fill(table, items, keyOf, cellsOf) {
  const columns = table.tHead.rows[0].cells.length;
  const make = () => h("tr", {}, ...Array.from({ length: columns }, () => h("td", {})));
  keyed(table.tBodies[0], items, keyOf, make, (row, item) => {
    cellsOf(item).forEach((cell, at) => text(row.children[at], cell ?? "–"));
  });
}

// Numbers, as people read them

export function count(number) {
  if (number < 10_000) return number.toLocaleString("en");
  return number < 10_000_000
    ? `${(number / 1e3).toFixed(number < 100_000 ? 1 : 0)}k`
    : `${(number / 1e6).toFixed(1)}M`;
}

export function seconds(value) {
  if (value < 0.0995) return `${Math.round(value * 1000)} ms`;
  if (value < 99.95) return `${value.toFixed(value < 9.995 ? 2 : 1)} s`;
  return value < 6000 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

export function several(number, one) {
  return `${count(number)} ${one}${number === 1 ? "" : "s"}`;
}
