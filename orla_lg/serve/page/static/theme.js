// Light, dark, or as the system has it.

import { attribute, text } from "./dom.js";

const KINDS = { auto: ["◐", "as the system has them"], light: ["○", "light"], dark: ["●", "dark"] };
const NAME = "orla-theme";

export function prepareTheme(button) {
  const names = Object.keys(KINDS);
  let kind = read();
  const apply = () => {
    attribute(document.documentElement, "data-theme", kind === "auto" ? null : kind);
    text(button, KINDS[kind][0]);
    attribute(button, "aria-label", `Colours: ${KINDS[kind][1]}`);
    attribute(button, "title", `Colours: ${KINDS[kind][1]}`);
  };
  button.addEventListener("click", () => {
    kind = names[(names.indexOf(kind) + 1) % names.length];
    try {
      localStorage.setItem(NAME, kind);
    } catch {
      // A browser that keeps nothing: the choice lasts as long as the page.
    }
    apply();
  });
  apply();
}

function read() {
  try {
    const kept = localStorage.getItem(NAME);
    return kept in KINDS ? kept : "auto";
  } catch {
    return "auto";
  }
}
