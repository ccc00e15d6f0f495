"use strict";
// Moves what depends on delta: the table of all deltas has every text, and each mark knows all its places.
const slider = document.getElementById("delta-slider");
if (slider) {
  const rows = [...document.querySelectorAll("#deltas tbody tr")];
  const find = (selector) => [...document.querySelectorAll(selector)];
  const outputs = find("[data-cell]"), marks = find("[data-at]"), articles = find(".generation");
  const places = marks.map((mark) => mark.dataset.at.split(" "));
  const statement = document.getElementById("statement");
  const show = () => {
    const step = Number(slider.value), row = rows[step];
    for (const output of outputs) output.textContent = row.cells[output.dataset.cell].textContent;
    statement.textContent = row.dataset.say;
    slider.setAttribute("aria-valuetext", `delta ${row.cells[0].textContent}`);
    rows.forEach((other) => other.classList.toggle("chosen", other === row));
    marks.forEach((mark, i) => {
      const place = places[i][step];
      mark.style.display = place === "-" ? "none" : "";
      if (place !== "-") mark.setAttribute("transform", `translate(${place})`);
    });
    for (const article of articles) {
      let any = false;
      for (const one of article.querySelectorAll("[data-key]")) {
        one.hidden = one.dataset.key !== row.dataset.key;
        any ||= !one.hidden;
      }
      article.querySelector(".absent").hidden = any;
    }
  };
  slider.addEventListener("input", show);
  document.documentElement.classList.add("live");
  if (slider.value !== slider.defaultValue) show(); // a browser may restore where it stood
}
const open = () => document.querySelectorAll("details").forEach((one) => (one.open = true));
window.addEventListener("beforeprint", open);
