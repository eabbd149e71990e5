// What is wrong now, and what that means for calls.

import { attribute, byId, h, hide, keyed, several, text } from "./dom.js";
import { conditionOf } from "./backends.js";

const CONDITIONS = {
  draining: [
    "The server is ending",
    "Calls under way go on to their end; new ones are refused until the next server takes over.",
  ],
  standby: ["This server is a standby", "Another one decides; this one takes over when that ends."],
};

/** Return what is wrong, each with how bad it is, a title and a sentence. */
function faultsOf({ state, lost }) {
  if (lost !== null) {
    const said = `${lost[0].toUpperCase()}${lost.slice(1)}. Trying again; what you see is from before.`;
    return [{ level: "bad", title: "Connection lost", said }];
  }
  const condition = CONDITIONS[state?.condition];
  const found = condition ? [{ level: "warn", title: condition[0], said: condition[1] }] : [];
  return [...found, ...(state?.backends ?? []).flatMap(faultOf)];
}

function faultOf(backend) {
  const [word, level] = conditionOf(backend);
  const wait = `${several(backend.waiting, "call")} ${backend.waiting === 1 ? "waits" : "wait"}`;
  if (word === "gone") {
    const said = `Its engine does not answer.${backend.waiting ? ` ${wait} for it.` : ""}`;
    return [{ level, title: `${backend.name} is gone`, said }];
  }
  if (word.startsWith("circuit")) {
    const said = "Its engine failed again and again; one call at a time tries whether it is back.";
    return [{ level, title: `${backend.name}: ${word}`, said }];
  }
  if (backend.paused && backend.waiting) {
    return [{ level, title: `${backend.name} is paused`, said: `${wait} until it is resumed.` }];
  }
  return [];
}

export function drawFaults(model) {
  const faults = faultsOf(model);
  const make = () => h("li", {}, h("b", {}), h("span", {}));
  keyed(
    byId("faults"),
    faults,
    ({ title }) => title,
    make,
    (item, { level, title, said }) => {
      attribute(item, "class", level);
      text(item.firstChild, `${level === "bad" ? "✕" : "!"} ${title}`);
      text(item.lastChild, said);
    },
  );
  hide(byId("faults"), faults.length === 0);
}
