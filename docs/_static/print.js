// Printed from a dark window, a page would be light letters on white paper.
const root = document.documentElement;
let shown = root.dataset.theme;
addEventListener("beforeprint", () => {
  shown = root.dataset.theme;
  root.dataset.theme = "light";
});
addEventListener("afterprint", () => (root.dataset.theme = shown));
